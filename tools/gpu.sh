#!/usr/bin/env bash
# Everything that needs a GPU, in the environment of `python3`: tools/gpu.sh OUT [build|check|sanitize|bench ...]
# Builds the CUDA extension in place for this GPU, checks every kernel against the float64 oracle, runs some cases under
# compute-sanitizer, and measures. OUT gets gpu.log and a result file of each step. PYTHON chooses the interpreter;
# TOTAL_S limits all steps together, STEP_S each of them, in seconds; PROCESSES cases are checked at a time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu.sh OUT [build|check|sanitize|bench ...]}
shift
python=${PYTHON:-python3}
total=${TOTAL_S:-560}
each=${STEP_S:-420}
processes=${PROCESSES:-8}
mkdir -p "$out"
failed=0

seconds() {  # what the next step may take
  local left=$((total - SECONDS))
  echo $((left < each ? left : each))
}

step() {  # name, command...
  local name=$1 start=$SECONDS limit
  shift
  limit=$(seconds)
  if [ "$limit" -lt 20 ]; then
    echo "== $name: not begun, TOTAL_S=$total is over" | tee -a "$out/gpu.log"
    failed=1
    return
  fi
  timeout -k 10 "$limit" "$@" >"$out/step.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed=1
  echo "== $name: exit $status after $((SECONDS - start)) s" | tee -a "$out/gpu.log"
  tail -n 25 "$out/step.log"
  cat "$out/step.log" >>"$out/gpu.log"
  rm "$out/step.log"
}

check=("$python" -m cpo_kernels.cli check --device cuda)

# compute-sanitizer is slow: rows of one block and of a cluster, split rows, edges and none, every kind of kernel.
sanitized=('sizes/*/N=7,V=257' 'sizes/bfloat16/N=1,V=262144' 'sizes/*/N=4,V=4096' 'sizes/float32/N=3,V=50257'
  'loss-types/float32/aot' 'loss-types/float32/sigmoid')

for what in "${@:-build check sanitize bench}"; do
  for name in $what; do
    case $name in
      build)
        capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
        step build env TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace
        ;;
      check) # CUDA C++ first, which compiles nothing
        step check-cuda "${check[@]}" --impl cuda --case-limit 60 --out "$out/check-cuda.json"
        step check-triton "${check[@]}" --impl triton --processes "$processes" --case-limit 120 --out "$out/check-triton.json"
        ;;
      sanitize) # without torch's cache an access outside of a tensor is outside of an allocation
        for tool in memcheck racecheck; do
          step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${check[@]}" --in-process --only "${sanitized[@]}" --out "$out/$tool.json"
        done
        ;;
      bench)
        left=$(seconds)
        step bench "$python" -m cpo_kernels.cli bench --device cuda --set gpu --time-limit $((left > 65 ? left - 45 : 20)) \
          --out "$out/gpu.json"
        ;;
      *) echo "unknown step $name: build, check, sanitize or bench" >&2; exit 2 ;;
    esac
  done
done
exit $failed
