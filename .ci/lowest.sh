#!/bin/sh
# Run the tests, but for those that take minutes, with the lowest versions that pyproject.toml allows, in .venv-lowest;
# arguments go to pytest. torch stays as setup.sh installs it: wheels of older ones bring gigabytes of CUDA libraries.
# Old versions warn of what newer ones of their own dependencies deprecate, and leave event loops open: no errors here.
set -eu
cd "$(dirname "$0")/.."

VENV=.venv-lowest
LOWEST=$VENV/lowest.txt OVERRIDES=$VENV/overrides.txt
VENV=$VENV sh .ci/setup.sh
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
echo 'torch; sys_platform == "never"' >"$OVERRIDES"
uv() { UV_LINK_MODE=copy UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "$VENV/bin/uv" "$@"; }
uv pip compile --quiet --resolution lowest-direct --overrides "$OVERRIDES" --python "$VENV/bin/python" \
    --extra all --extra test pyproject.toml --output-file "$LOWEST"
uv pip install --quiet --python "$VENV/bin/python" --overrides "$OVERRIDES" --requirements "$LOWEST"
exec "$VENV/bin/python" -m pytest -m "not slow" -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning \
    -W ignore::pytest.PytestUnraisableExceptionWarning "$@"
