#!/bin/sh
# Run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest; arguments go to pytest.
# torch stays as setup.sh installs it: wheels of older ones bring gigabytes of CUDA libraries. langchain-tests wants a newer
# langchain-core than we do, so LangChain's own suites are left out, and so are the tests that take minutes.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv-lowest
DIRECT=$VENV/direct.txt LOWEST=$VENV/lowest.txt
VENV=$VENV sh .ci/setup.sh
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$VENV/bin/python" - >"$DIRECT" <<'EOF'
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
direct = [*project["dependencies"], *(line for name in ("data", "embedded", "quality", "tools", "test") for line in extras[name])]
print("\n".join(line for line in direct if not line.startswith(("mara-integrations", "langchain-tests"))))
EOF
echo 'torch; sys_platform == "never"' >"$VENV/overrides.txt"
uv() { UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "$VENV/bin/uv" "$@"; }
uv pip compile --quiet --resolution lowest-direct --overrides "$VENV/overrides.txt" --python "$VENV/bin/python" \
    "$DIRECT" --output-file "$LOWEST"
uv pip install --quiet --python "$VENV/bin/python" --overrides "$VENV/overrides.txt" --requirements "$LOWEST"
exec "$VENV/bin/python" -m pytest -m "not slow" --ignore tests/test_langchain_standard.py "$@"
