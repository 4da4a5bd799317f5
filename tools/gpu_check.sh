#!/usr/bin/env bash
# Measure what needs a CUDA GPU, in two scripts of minutes, on a machine without a network.
#
#   tools/gpu_check.sh prepare BUNDLE [CLONES]   put the files for the machine into .gpu (ignored by git), under 64 MiB
#                                                with the checkout. BUNDLE is a folder of tools/offline_bundle.sh, and
#                                                CLONES has clones of the released systems in everest/ and videomae/
#   tools/gpu_check.sh 1 OUT [--tiny]            on the machine: ceilings, the engine's steps with traces, the released
#                                                systems, the GPU tests; at most 330 s, at most 8 files in OUT
#   tools/gpu_check.sh 2 OUT [--tiny]            on the machine: the gain of each change, waiting for the host,
#                                                training from video files, memory, calibration; at most 330 s,
#                                                at most 8 files in OUT
#   tools/gpu_check.sh tables OUT [OUT]          anywhere: the results as Markdown and for docs/measured
#   tools/gpu_check.sh predict "H100 SXM"        anywhere: the predicted times of the engine's steps
#
# Copy the checkout with its .gpu folder to the machine, and run the scripts in its root. The machine needs Python
# 3.10 to 3.12 as `python3` (or set PYTHON), with torch, numpy, einops, typer, rich, jinja2, matplotlib, tensorboard,
# safetensors, mpi4py and pytest; the other packages come from .gpu, or must be installed if there is no .gpu.
# --tiny rehearses with tiny models, on any device; SLOWER=4 gives every part four times its time, for a rehearsal on
# a busy CPU. Every part writes its JSON after each row, so that an early end loses little. Exit code 1: a part or a
# test failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

SLOWER=${SLOWER:-1}
LIMIT=$((330 * SLOWER)) # seconds per script
GRACE=10                # seconds for a part to end by itself
# Wheels of the bundle that a machine with torch and its usual packages lacks.
LACKING="deepspeed fairscale hjson pydantic pydantic_core annotated_types typing_inspection typing_extensions av decord"
# Files of a clone that tools/peers.py imports.
IMPORTED="modeling_pretrain.py modeling_finetune.py masking_generator.py"

usage() { sed -n '2,23s/^# \{0,1\}//p' "$0"; exit "$1"; }

prepare() {
    local bundle=$1 clones=${2:-} name
    rm -rf .gpu && mkdir -p .gpu/wheels || exit 1
    for name in $LACKING; do cp "$bundle/$name"-[0-9]*.whl .gpu/wheels/ || exit 1; done
    for name in ${clones:+everest videomae}; do
        mkdir -p ".gpu/peers/$name" && (cd "$clones/$name" && cp $IMPORTED "$OLDPWD/.gpu/peers/$name/") || exit 1
    done
    git rev-parse HEAD > .gpu/commit
    printf '%s MiB in .gpu, %s MiB with the checkout; 64 may travel\n' "$(du -sm .gpu | cut -f1)" \
        "$({ git ls-files -z | xargs -0 cat; find .gpu -type f -exec cat {} +; } | wc -c | awk '{ print int($1 / 2^20) + 1 }')"
}

# Print the seconds that are left for this script.
left() { echo $((LIMIT - SECONDS)); }

# part SECONDS PART...: run a part in a process of its own, so that a crash of the GPU's driver ends no other part.
part() {
    local seconds=$(($1 * SLOWER))
    shift
    [ "$seconds" -le $(($(left) - GRACE)) ] || seconds=$(($(left) - GRACE))
    [ "$seconds" -gt 0 ] || { echo "LEFT OUT: $*, no time is left" && return; }
    printf '\n=== %s (%s s)\n' "$*" "$seconds"
    timeout --kill-after=3 $((seconds + GRACE - 3)) \
        "$python" -m gpu_check "$out" "$@" --until $(($(date +%s) + seconds)) $tiny \
        || fail "$* (exit code $?)"
}

fail() {
    echo "FAILED: $1"
    failed=1
}

set_up() {
    out=${1:?"error: no folder for the results was given"} tiny=${2:-}
    python=${PYTHON:-python3} site=$(mktemp -d)
    mkdir -p "$out" && exec > >(tee "$out/log$script.txt") 2>&1
    trap 'rm -rf "$site"' EXIT
    [ ! -d .gpu/wheels ] || "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$site" .gpu/wheels/*.whl || exit 1
    export PYTHONPATH=$site:$PWD:$PWD/tools PYTHONUNBUFFERED=1 COLUMNS=150
    export NCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo
    echo "began after $SECONDS s"
}

# Run every test file in its own process. All run at once, because the models are tiny, except the tests of times.
gpu_tests() {
    local file running=()
    for file in tests/gpu/test_*.py; do
        if [ "$file" != tests/gpu/test_measuring.py ]; then
            one_test "$file" &
            running+=($!)
        fi
    done
    wait "${running[@]}" # a bare wait would also wait for the tee of the log
    one_test tests/gpu/test_measuring.py
    tail -n +1 "$site"/test_*.txt > "$out/tests.txt" # tail prints each file below its name
    for file in "$site"/test_*.txt; do printf '%-24s %s\n' "$(basename "$file" .txt)" "$(tail -n 1 "$file")"; done
    ! grep -q '^FAILED ' "$out/tests.txt" || fail tests
}

one_test() {
    local seconds=$(($(left) - 5)) output
    output=$site/$(basename "$1" .py).txt
    [ "$seconds" -gt 5 ] || { echo "FAILED $1: no time was left" > "$output" && return; }
    timeout "$seconds" "$python" -m pytest -q -rsfE --tb=short -p no:cacheprovider "$1" > "$output" 2>&1 \
        || echo "FAILED $1: exit code $?" >> "$output"
}

script=${1:-} failed=0
case $script in
    prepare) [ $# -ge 2 ] || usage 2; prepare "${@:2}" ;;
    1)
        set_up "${@:2}"
        part 55 ceilings
        part 95 engine
        part 90 released $([ ! -d .gpu/peers ] || echo --peers .gpu/peers)
        printf '\n=== tests\n' && gpu_tests
        ;;
    2)
        set_up "${@:2}"
        part 75 changes
        part 50 replay
        part 80 end_to_end
        part 25 memory
        part 80 calibration
        ;;
    tables | predict)
        export PYTHONPATH=$PWD:$PWD/tools
        exec "${PYTHON:-.venv/bin/python}" -m "gpu_check.$script" "${@:2}"
        ;;
    -h | --help) usage 0 ;;
    *) usage 2 ;;
esac
[ "$script" != prepare ] || exit 0
ls -la "$out"
echo "ended after $SECONDS s"
exit $failed
