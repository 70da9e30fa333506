#!/usr/bin/env bash
# Everything that needs a GPU, in the environment of `python3`: tools/gpu.sh OUT [build|check|sanitize|bench ...]
# Builds the CUDA extension in place for this GPU, checks every kernel against the float64 oracle, runs the quick cases
# under compute-sanitizer, and measures. Result files and logs go to OUT. PYTHON chooses the interpreter; STEP_S limits
# each step in seconds.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu.sh OUT [build|check|sanitize|bench ...]}
shift
python=${PYTHON:-python3}
limit=${STEP_S:-420}
mkdir -p "$out"
failed=0

step() {  # name, command...
  local name=$1 start=$SECONDS
  shift
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  [ $status -eq 0 ] || failed=1
  echo "== $name: exit $status after $((SECONDS - start)) s"
  tail -n 25 "$out/$name.log"
}

for what in "${@:-build check sanitize bench}"; do
  for name in $what; do
    case $name in
      build)
        capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
        step build env TORCH_CUDA_ARCH_LIST="$capability" "$python" setup.py build_ext --inplace
        ;;
      check) step check "$python" -m cpo_kernels.cli check --device cuda --out "$out/check-gpu.json" ;;
      sanitize)
        for tool in memcheck racecheck; do
          step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m cpo_kernels.cli check \
            --device cuda --quick --in-process --only '*N=7*' --out "$out/$tool.json"
        done
        ;;
      bench) step bench "$python" -m cpo_kernels.cli bench --device cuda --set gpu --out "$out/gpu.json" ;;
      *) echo "unknown step $name: build, check, sanitize or bench" >&2; exit 2 ;;
    esac
  done
done
exit $failed
