#!/bin/sh
# other_versions.sh lowest|newest [pytest arguments]
# Run the tests, without the slow ones, with the lowest or the newest versions that pyproject.toml allows, in an environment
# of their own (.venv-lowest, .venv-newest). torch stays as setup.sh installs it: other wheels of it bring gigabytes of CUDA
# libraries.
set -eu
cd "$(dirname "$0")/.."

WHICH=$1
shift
VENV=.venv-$WHICH
VERSIONS=$VENV/versions.txt OVERRIDES=$VENV/overrides.txt
case $WHICH in
    lowest) RESOLUTION=lowest-direct ;;
    newest) RESOLUTION=highest ;;
    *) echo "other_versions.sh: lowest or newest, not '$WHICH'" >&2; exit 2 ;;
esac

VENV=$VENV sh .ci/setup.sh base
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
echo 'torch; sys_platform == "never"' >"$OVERRIDES"
uv() { UV_LINK_MODE=copy UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "$VENV/bin/uv" "$@"; }
echo "[setup] installing the $WHICH versions that pyproject.toml allows into $VENV"
uv pip compile --quiet --upgrade --resolution "$RESOLUTION" --overrides "$OVERRIDES" --python "$VENV/bin/python" \
    --extra all --extra test pyproject.toml --output-file "$VERSIONS"
uv pip install --quiet --python "$VENV/bin/python" --overrides "$OVERRIDES" --requirements "$VERSIONS"
uv pip install --quiet --python "$VENV/bin/python" --no-deps --editable .
if [ "$WHICH" = lowest ]; then
    # Old versions warn of what newer ones of their own dependencies deprecate, and leave event loops open: no errors here.
    set -- -W ignore::DeprecationWarning -W ignore::PendingDeprecationWarning \
        -W ignore::pytest.PytestUnraisableExceptionWarning "$@"
fi
exec "$VENV/bin/python" -m pytest -m "not slow" --numprocesses auto --dist loadscope --no-loadscope-reorder "$@"
