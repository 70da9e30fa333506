#!/usr/bin/env bash
# The runs of docs/results.md: both stages, the baselines SFT and plain DPO, and the judgement of all of them.
#   recipes/truthfulqa.sh truthfulqa_ratings.jsonl [runs/truthfulqa]
set -euo pipefail
data=$1 out=${2:-runs/truthfulqa}
here=$(dirname "$0")
# Freed memory stays in the process (docs/machines.md).
export GLIBC_TUNABLES=glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.tcache_count=0

train() { # recipe, name of the run, overrides
  cpo-kernels train "$here/truthfulqa_$1.yaml" --data.train "$data" --run_dir "$out/$2" "${@:3}"
}
train cpsft cpsft
train cdpo cdpo --model "$out/cpsft/model"
train cdpo cdpo2 --model "$out/cdpo/model" --seed 1
train cpsft sft --stage sft
train cdpo dpo --stage dpo --model "$out/sft/model"
conditions=(--condition honesty=5,helpfulness=5 --condition honesty=5,helpfulness=1 --condition honesty=1,helpfulness=5)
cpo-kernels eval "$out/sft" "$out/dpo" --base --no-text --out "$out/eval_baselines.json" "${conditions[@]}"
cpo-kernels eval "$out/cpsft" "$out/cdpo" "$out/cdpo2" --no-text --out "$out/eval_cpo.json" "${conditions[@]}"
