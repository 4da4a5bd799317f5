#!/usr/bin/env bash
# What can only be checked on a CUDA GPU, in less than 9 minutes and without a network:
#
#   tools/gpu_check.sh [FOLDER]     results as JSON in FOLDER (default: runs/gpu_check)
#
# EVEREST_CODE and VIDEOMAE_CODE, folders of clones, add the original systems to the benchmark.
# PRETRAIN_BATCH and FINETUNE_BATCH are the clips of a step; the defaults fit 80 GB with both systems.
# Exit code: 0 all well, 1 something failed (the rest has run), 2 no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

folder=${1:-runs/gpu_check}
python=.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} COLUMNS=${COLUMNS:-120}
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
failed=()

# part NAME SECONDS COMMAND...: run it, bounded; remember whether it failed.
part() {
    local name=$1 seconds=$2 code=0
    shift 2
    printf '\n=== %s (at most %s s)\n' "$name" "$seconds"
    timeout --kill-after=5 "$seconds" "$@" || code=$?
    if [ "$code" -eq 124 ]; then
        echo "FAILED: $name ran past $seconds s"
    elif [ "$code" -ne 0 ]; then
        echo "FAILED: $name (exit code $code)"
    fi
    [ "$code" -eq 0 ] || failed+=("$name")
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device here (or no torch in $python): nothing can be checked"
    exit 2
fi
mkdir -p "$folder" || exit 1
rm -f "$folder"/pretrain.json "$folder"/finetune.json

peers=()
[ -z "${EVEREST_CODE:-}" ] || peers+=(--peer "everest=$EVEREST_CODE")
[ -z "${VIDEOMAE_CODE:-}" ] || peers+=(--peer "videomae=$VIDEOMAE_CODE")
bench=("$python" tools/bench_step.py --backbone vit_large --dtype bf16 --rounds 10 --warmup 3
    ${peers[@]+"${peers[@]}"})

part "device" 30 "$python" -c '
import torch
device = torch.cuda.get_device_properties(0)
print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB; torch {torch.__version__}, CUDA {torch.version.cuda}")'
part "tests" 150 "$python" -m pytest -q -m gpu
part "pre-training, ViT-L" 160 "${bench[@]}" --batch "${PRETRAIN_BATCH:-32}" --json "$folder/pretrain.json" pretrain
part "fine-tuning, ViT-L" 160 "${bench[@]}" --batch "${FINETUNE_BATCH:-4}" --json "$folder/finetune.json" finetune

part "summary" 15 "$python" - "$folder" <<'PYTHON'
import json, pathlib, sys

for task in ("pretrain", "finetune"):
    file = pathlib.Path(sys.argv[1]) / f"{task}.json"
    if not file.is_file():
        print(f"{task:9} not measured")
        continue
    result = json.loads(file.read_text())
    for row in result["contenders"]:
        mfu = f"{row['mfu_pct']:.1f} % MFU" if row["mfu_pct"] else ""
        memory = (row["activations_peak_bytes"] + row["states_bytes"]) / 2**30
        print(
            f"{task:9} {row['contender']:18} {row['step_ms']:8.1f} ms {row['clips_per_s']:8.1f} clips/s"
            f" {memory:6.1f} GiB  {mfu}"
        )
    for row in result["ratios"]:
        print(
            f"{task:9} {row['step time']}: {row['of_medians']:.2f}"
            f" (quartiles {row['quartile_1']:.2f} to {row['quartile_3']:.2f})"
        )
PYTHON

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nFAILED: '
    printf '%s; ' "${failed[@]}"
    echo
    exit 1
fi
printf '\nall well\n'
