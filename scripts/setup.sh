#!/usr/bin/env bash
# Makes the virtual environment: setup.sh [FOLDER]. PYTHON picks the interpreter, EXTRA=cuda|cpu the build of vLLM.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
log=$venv/setup.log
steps=3 step=0

suits() { "$1" -c 'import sys; raise SystemExit(not (3, 11) <= sys.version_info[:2] < (3, 15))' 2>/dev/null; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        suits "$PYTHON" && echo "$PYTHON" && return
        echo "PYTHON=$PYTHON is not a working Python 3.11 to 3.14: name another one." >&2
        return 1
    fi
    for candidate in python3 python3.12 python3.13 python3.11 python3.14; do
        suits "$candidate" && echo "$candidate" && return
    done
    echo "No Python 3.11 to 3.14 found: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2
    return 1
}

find_extra() {
    if [ -n "${EXTRA:-}" ]; then
        echo "$EXTRA"
    elif [ "$(uname -sm)" = "Linux x86_64" ] && nvidia-smi >/dev/null 2>&1; then
        echo cuda
    else
        echo cpu
    fi
}

# run NAME COMMAND...: one step, its output in the log, with a sign of life.
run() {
    local name=$1 begin=$SECONDS life=$SECONDS failed=0 now doing
    shift
    step=$((step + 1))
    [ -t 1 ] || printf '[%d/%d] %s ...\n' $step $steps "$name"
    set -m # a process group of its own, so that Ctrl-C ends all of it
    "$@" </dev/null >>"$log" 2>&1 &
    set +m
    trap "kill -- -$! 2>/dev/null; exit 130" INT TERM
    while kill -0 $! 2>/dev/null; do
        sleep 0.2
        now=$((SECONDS - begin))
        doing=$(tail -n 30 "$log" | grep -oE '^(Collecting|Processing|Installing collected) [^ ;]+' | tail -n 1 || true)
        if [ -t 1 ]; then
            printf '\r\033[K[%d/%d] %s ... %d s  %.50s' $step $steps "$name" $now "${doing##*/}"
        elif [ $((SECONDS - life)) -ge 20 ]; then
            life=$SECONDS
            printf '      %d s  %s\n' $now "${doing##*/}"
        fi
    done
    wait $! || failed=$?
    [ -t 1 ] && printf '\r\033[K'
    if [ $failed -ne 0 ]; then
        printf '[%d/%d] %s: FAILED after %d s. The end of %s:\n' $step $steps "$name" $((SECONDS - begin)) "$log" >&2
        tail -n 25 "$log" >&2
        exit 1
    fi
    printf '[%d/%d] %s: done in %d s\n' $step $steps "$name" $((SECONDS - begin))
}

# One call of pip, so that the pin of the CPU build (torch==...+cpu) decides which torch is fetched. That build is on
# PyTorch's own index, which is asked only when the configured sources (a folder of wheels, say) do not have it.
install() {
    local pip=("$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile --progress-bar off)
    "${pip[@]}" -e ".[$extra,dev]" && return
    [ "$extra" = cpu ] || return 1
    "${pip[@]}" --extra-index-url "${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}" -e ".[$extra,dev]"
}

finish() {
    [ "$extra" = cuda ] || "$venv/bin/python" scripts/prepare_cpu.py
}

python=$(find_python)
extra=$(find_extra)
mkdir -p "$venv"
: >"$log"
echo "Setting up $venv with $("$python" --version) and the '$extra' build of vLLM; details in $log"
run "Virtual environment" "$python" -m venv "$venv"
run "vLLM, its dependencies and this plugin (a few minutes, once)" install
run "Finishing touches" finish
