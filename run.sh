#!/bin/sh
# ./run.sh VERB ...   makes .venv on first use, then runs `qmax VERB ...`
# ./run.sh test [--parity] [--full] [pytest's arguments]   lint, types, tests
#
# QMAX_PYTHON=/path/to/python3.12 chooses the interpreter; QMAX_EXTRA=cpu|cuda|cuda13|tpu the accelerator.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
venv=$root/.venv
in_colab=${COLAB_RELEASE_TAG:-}

say() { printf 'run.sh: %s\n' "$*" >&2; }
die() {
    say "$*"
    exit 2
}

# Whether $1 runs and is a Python that the dependencies have wheels for. A pyenv shim may exist and not run.
fits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

version() { "$1" -c 'import sys; print(sys.version_info[:2])'; }

# Prints the interpreter to use: the user's own python3 first, because its packages (venv) are likeliest complete.
find_python() {
    if [ -n "${QMAX_PYTHON:-}" ]; then
        fits "$QMAX_PYTHON" || die "QMAX_PYTHON=$QMAX_PYTHON is not a Python 3.11, 3.12 or 3.13 that runs"
        printf '%s\n' "$QMAX_PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    found=$(python3 -c 'import platform; print("Python " + platform.python_version() + " is here")' 2>/dev/null ||
        echo "no python3 is here")
    die "qmax needs Python 3.11, 3.12 or 3.13 and $found; install one (on Debian or Ubuntu:" \
        "sudo apt-get install python3 python3-venv) or name it: QMAX_PYTHON=/path/to/python3.12 ./run.sh ..."
}

# Prints which of the extras tpu, cuda13 and cuda this machine needs, or cpu.
accelerator() {
    if [ -n "${QMAX_EXTRA:-}" ]; then
        case $QMAX_EXTRA in
        cpu | cuda | cuda13 | tpu) printf '%s\n' "$QMAX_EXTRA" ;;
        *) die "QMAX_EXTRA=$QMAX_EXTRA is none of cpu, cuda, cuda13 and tpu" ;;
        esac
        return
    fi
    # Google's network and disk devices carry the same vendor number, so the device counts too.
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/vendor" 2>/dev/null)" = 0x1ae0 ] || continue
        case $(cat "$device/device" 2>/dev/null) in
        0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076)
            echo tpu
            return
            ;;
        esac
    done
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
    case ${driver%%.*} in
    '' | *[!0-9]*) echo cpu ;;
    *) if [ "${driver%%.*}" -ge 580 ]; then echo cuda13; else echo cuda; fi ;;
    esac
}

# Makes the virtual environment $2 with the interpreter $1, with pip inside, by whichever way this machine offers.
make_venv() {
    rm -rf "$2"
    mkdir "$2"
    : >"$2/qmax-unfinished"
    echo '*' >"$2/.gitignore"
    if "$1" -c 'import ensurepip, venv' 2>/dev/null && "$1" -m venv "$2" >&2; then return; fi
    if "$1" -m virtualenv --quiet "$2" >/dev/null 2>&1; then return; fi
    if virtualenv --quiet --python "$1" "$2" >/dev/null 2>&1; then return; fi
    if "$1" -m venv --without-pip "$2" >&2 && pip_into "$1" "$2/bin/python"; then return; fi
    rm -rf "$2"
    die "this Python cannot make a virtual environment with pip in it;" \
        "on Debian or Ubuntu: sudo apt-get install python3-venv, then run this again"
}

# Installs pip for the interpreter $2 by a pip of $1, or one on the PATH, that stands outside (they can since 22.3).
pip_into() {
    "$1" -m pip --python "$2" install --quiet pip >/dev/null 2>&1 ||
        pip3 --python "$2" install --quiet pip >/dev/null 2>&1 ||
        pip --python "$2" install --quiet pip >/dev/null 2>&1 ||
        uv pip install --quiet --python "$2" pip >/dev/null 2>&1
}

# Says why `pip` failed: without the network a small package fails in the same way, and at once.
explain_failure() {
    probe=$(mktemp -d)
    if "$1" -m pip download --quiet --no-deps --no-cache-dir --retries 0 --timeout 10 --dest "$probe" wheel \
        >/dev/null 2>&1; then
        why="the lines above say why; mend that and run this again"
    else
        why="the Python package index cannot be reached; connect to the network (behind a proxy, set HTTPS_PROXY;\
 with a mirror, set PIP_INDEX_URL) and run this again"
    fi
    rm -rf "$probe"
    die "the installation failed: $why"
}

pip_install() {
    python=$1
    shift
    "$python" -m pip install --disable-pip-version-check --no-input "$@" >&2 || explain_failure "$python"
}

# One installation at a time; a second call waits and then finds everything done. Where flock is missing, trust to luck.
lock() {
    exec 9<"$root/pyproject.toml"
    if command -v flock >/dev/null 2>&1; then
        flock -n 9 || { say "waiting for another installation to end" && flock 9; } || :
    fi
}

# Whether the environment $1 is finished, of this pyproject.toml, and has all of the extras that follow.
# `machine` stands for the extra of this machine, whichever that was found to be when it was installed.
is_ready() {
    stamp=$1/qmax-installed
    shift
    [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$(cksum <"$root/pyproject.toml")" ] || return 1
    fits "${stamp%/*}/bin/python" || return 1
    for extra in "$@"; do
        grep -qx "$extra" "$stamp" || return 1
    done
}

# ensure ENVIRONMENT INTERPRETER EXTRA...: the environment exists and has the project with these extras; INTERPRETER
# may be empty. The stamp is written last: what was cut short is seen, and made afresh (pip keeps its downloads).
ensure() {
    env=$1 wish=$2
    shift 2
    if [ -n "${QMAX_EXTRA:-}" ]; then
        extra=$(accelerator)
        set -- "$@" "$extra"
    fi
    if [ -z "$wish" ] && [ -n "${QMAX_PYTHON:-}" ] && [ -x "$env/bin/python" ] &&
        [ "$(version "$(find_python)")" != "$(version "$env/bin/python")" ]; then
        rm -f "$env/qmax-installed"
        : >"$env/qmax-unfinished"
    fi
    if is_ready "$env" "$@"; then return; fi
    lock
    if ! is_ready "$env" "$@"; then install "$@"; fi
    exec 9<&-
}

# Installs into $env what `ensure` found missing.
install() {
    stamp=$env/qmax-installed
    if [ -f "$env/qmax-unfinished" ] || ! fits "$env/bin/python"; then
        interpreter=${wish:-$(find_python)}
        say "making ${env##*/} with $("$interpreter" --version) and installing into it; this takes some minutes, once"
        make_venv "$interpreter" "$env"
    else
        say "bringing ${env##*/} up to date"
        : >"$env/qmax-unfinished"
        for extra in $(tail -n +2 "$stamp" 2>/dev/null); do # what was there stays
            case " $* " in *" $extra "*) ;; *) set -- "$@" "$extra" ;; esac
        done
        rm -f "$stamp"
    fi
    chosen=
    for extra in "$@"; do
        [ "$extra" != machine ] || extra=$(accelerator)
        [ "$extra" = cpu ] || chosen=$chosen${chosen:+,}$extra
    done
    pip_install "$env/bin/python" --editable "$root${chosen:+[$chosen]}"
    { cksum <"$root/pyproject.toml" && printf '%s\n' "$@"; } >"$stamp"
    rm "$env/qmax-unfinished"
}

# Colab's own jax fits Colab's driver: install the rest beside it and leave jax alone.
ensure_colab() {
    python=$(find_python)
    stamp=${TMPDIR:-/tmp}/qmax-installed
    digest=$(cksum <"$root/pyproject.toml")
    [ "$(cat "$stamp" 2>/dev/null)" = "$digest" ] && return 0
    say "using Colab's own Python and jax"
    "$python" -m pip list --format=freeze 2>/dev/null | grep -iE '^(jax|jaxlib|libtpu|numpy|jax-cuda[a-z0-9-]*)==' >"$stamp.keep" || :
    "$python" -m pip install --quiet --disable-pip-version-check --constraint "$stamp.keep" --editable "$root" >&2 ||
        die "this runtime's packages do not go with qmax ($(grep -i '^jax==' "$stamp.keep" || echo 'no jax'));" \
            "choose a newer runtime (Runtime > Change runtime type) and run this again"
    printf '%s\n' "$digest" >"$stamp"
}

# The whole check. Everything runs on the CPU, wherever it is.
check() {
    parity=''
    full=''
    while [ $# -gt 0 ]; do
        case $1 in
        --parity) parity=yes ;;
        --full) full=yes ;;
        *) break ;;
        esac
        shift
    done
    if [ -n "$parity" ]; then
        old=${QMAX_PARITY_PYTHON:-python3.11}
        "$old" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 ||
            die "--parity needs Python 3.11 (torch 2.13.0 for the CPU exists for it); QMAX_PARITY_PYTHON names one"
        old=$(command -v "$old")
    fi
    ensure "$venv" "" machine dev
    cd "$root"
    export JAX_PLATFORMS=cpu
    [ -z "$full" ] || export QMAX_FULL=1
    say "lint"
    "$venv/bin/python" -m ruff check .
    "$venv/bin/python" -m ruff format --check .
    say "types"
    PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$venv/bin/python" -m pyright --pythonpath "$venv/bin/python"
    say "tests"
    "$venv/bin/python" -m pytest "$@"
    if [ -n "$parity" ]; then
        QMAX_EXTRA="" ensure "$root/.venv-parity" "$old" dev parity plan
        say "parity with transformers, lm-eval through the server, and plans by the TPU compiler"
        QMAX_PARITY=1 "$root/.venv-parity/bin/python" -m pytest tests/parity tests/test_plan.py
    fi
}

trap 'exit 130' INT

case ${1:-} in
test)
    shift
    check "$@"
    ;;
*)
    if [ -n "$in_colab" ]; then
        ensure_colab
    else
        ensure "$venv" "" machine
        python=$venv/bin/python
    fi
    exec "$python" "$root/qmax.py" "$@"
    ;;
esac
