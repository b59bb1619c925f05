#!/usr/bin/env bash
# What only a GPU can confirm, one after the other, in about 8 minutes on an H100:
#
#     benchmarks/gpu/run.sh [DIRECTORY FOR RESULTS]
#
# Gradients of tree packing, FlexAttention and the fused head against padding; throughput, MFU and peak memory of a
# whole step; where its time goes; what casting and bucketing cost a publish. Needs the packages of pyproject.toml
# and psutil. A part that fails or takes longer than its limit does not stop the others; the exit status tells.
# To try the script itself on a CPU: DEVICE=cpu MODEL=tiny CASES=tiny,tiny-tree STEP=tiny TOKENS=256
set -uo pipefail
cd "$(dirname "$0")/../.."
results=${1:-runs/gpu}
device=${DEVICE:-cuda} model=${MODEL:-qwen3-0.6b-random}
cases=${CASES:-c,d} step=${STEP:-throughput} tokens=${TOKENS:-16384}
status=0
mkdir -p "$results"

part() { # NAME LIMIT MODULE ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    echo "== $name: python -m $*"
    timeout "$limit" "${PYTHON:-python3}" -m "$@" 2>&1 | tee "$results/$name.txt" || status=1
}

part equality 120 benchmarks.step --device "$device" --model "$model" --cases "$cases" --dtype float32,bfloat16 \
    --contenders ours,padding --repeats 0 --json "$results/equality.json"
part throughput 180 benchmarks.step --device "$device" --model "$model" --cases "$step" --dtype bfloat16 \
    --micro-batch-tokens "$tokens" --activation-recomputation --optimizer-step --json "$results/throughput.json"
part profile 120 benchmarks.gpu.profile --device "$device" --model "$model" --case "$step" \
    --micro-batch-tokens "$tokens"
part casting 60 benchmarks.gpu.casting --device "$device" --model "$model" --json "$results/casting.json"
exit $status
