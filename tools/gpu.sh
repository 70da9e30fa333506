#!/usr/bin/env bash
# A quarter of an hour on a GPU, most wanted first: tools/gpu.sh OUT first, then tools/gpu.sh OUT second (or single steps).
#
#   first    build  quick-cuda  quick-triton  kernels  head                      TOTAL_S=410
#   second   profile  check-cuda  check-triton  memcheck  racecheck  baselines  training  growth  cold    TOTAL_S=330
#
# build takes the extensions from build/gpu (tools/gpu_pack.sh) where they fit the sources, else compiles them. A step may
# take its share of TOTAL_S, and never what the later ones need at least. Everything is saved as it comes: OUT/gpu.log, a
# file of each check, gpu.json (kernels and head), profile.json and gpu-more.json (the rest).
# PYTHON chooses the interpreter; PROCESSES how many cases are checked at a time (all cores). DEVICE=cpu is a dry run: the
# same steps on tiny sizes, the CPU kernels in place of CUDA C++ and Triton's interpreter in place of its compiler.
set -uo pipefail
cd "$(dirname "$0")/.."
first=(build quick-cuda quick-triton kernels head)
second=(profile check-cuda check-triton memcheck racecheck baselines training growth cold)
# Percent of TOTAL_S: at most, and at least where time is short.
declare -A most=([build]=25 [quick-cuda]=15 [quick-triton]=27 [kernels]=27 [head]=40
  [profile]=8 [check-cuda]=15 [check-triton]=30 [memcheck]=12 [racecheck]=12 [baselines]=30 [training]=20 [growth]=15 [cold]=10)
declare -A least=([build]=1 [quick-cuda]=8 [quick-triton]=15 [kernels]=17 [head]=25
  [profile]=5 [check-cuda]=9 [check-triton]=15 [memcheck]=7 [racecheck]=7 [baselines]=18 [training]=12 [growth]=8 [cold]=5)

usage() {
  echo "usage: tools/gpu.sh OUT first|second|STEP...; steps: ${first[*]} ${second[*]}" >&2
  exit 2
}
out=${1:-}
shift || usage
case ${1:-} in
  '') usage ;;
  first | second) [ $# -eq 1 ] || usage ;;&
  first) steps=("${first[@]}") total=${TOTAL_S:-410} ;;
  second) steps=("${second[@]}") total=${TOTAL_S:-330} ;;
  *) steps=("$@") total=${TOTAL_S:-410} ;;
esac
for name in "${steps[@]}"; do [ -n "${most[$name]:-}" ] || { echo "unknown step $name" >&2; usage; }; done

python=${PYTHON:-python3}
device=${DEVICE:-cuda}
impls=(triton cuda)
[ "$device" = cpu ] && impls=(cpu)
processes=${PROCESSES:-$(nproc)}
pack=${PACK:-build/gpu}
mkdir -p "$out"
log=$out/gpu.log
touch "$log"
failed=0
export PYTHONUNBUFFERED=1 PYTHONPATH=$pack/site${PYTHONPATH:+:$PYTHONPATH}

limit_of() {  # seconds that the i-th step may take: its share, and what the later ones do not need; 0: no time is left
  local i=$1 name=${steps[$1]} spare=$((total - SECONDS)) share later
  share=$((total * most[$name] / 100))
  for later in "${steps[@]:i+1}"; do spare=$((spare - total * least[$later] / 100)); done
  share=$((spare < share ? spare : share))
  echo $((share > 0 ? share : 0))
}

timed() {  # name, seconds, command...
  local name=$1 limit=$2 start=$SECONDS before
  shift 2
  before=$(wc -c <"$log")
  timeout -k 5 "$limit" "$@" >>"$log" 2>&1 </dev/null
  status=$?
  [ $status -eq 0 ] || failed=1
  [ $status -eq 124 ] || [ $status -eq 137 ] && echo "stopped at its share of $limit s: raise TOTAL_S" >>"$log"
  tail -c "+$((before + 1))" "$log" | tail -n 25 | cut -c -240
  echo "== $name: exit $status after $((SECONDS - start)) s of at most $limit" | tee -a "$log"
}

check() {  # impl, options...: of the checks
  local impl=$1 environment=()
  shift
  if [ "$device" = cpu ] && [ "$impl" = triton ]; then  # whose interpreter rounds bfloat16 wrongly
    environment=(TRITON_INTERPRET=1)
    set -- --only '*/float*' "$@"
  elif [ "$device" = cpu ]; then
    impl=cpu
  fi
  timed "$name" "$limit" env "${environment[@]}" "$python" -m cpo_kernels.cli check --device "$device" --impl "$impl" \
    --time-limit $((limit * 9 / 10 + 1)) --case-limit 60 "$@"
}

bench() {  # file, options...
  local file=$1 set=gpu
  shift
  [ "$device" = cpu ] && set=ci
  timed "$name" "$limit" "$python" -m cpo_kernels.cli bench --device "$device" --set $set --resume \
    --time-limit $((limit * 85 / 100 + 1)) --out "$out/$file" "$@"
}

loads() {  # both extensions, the kernels of every backend of the device, and a CPU op that once crashed on such a machine
  timed "$1" "$limit" "$python" -W error::RuntimeWarning -c "import torch; from cpo_kernels.backends import dispatch
for impl in '${impls[*]}'.split(): dispatch.kernels(impl, torch.empty(0, device='$device'))
from cpo_kernels import preference_loss
x = torch.zeros(4); preference_loss(x, ref_logps=x)
print('loaded: ${impls[*]}')"
  return $status
}

build() {
  local targets until=$((SECONDS + limit))
  if [ "$device" = cpu ]; then
    loads build
    return
  fi
  if [ -f "$pack/sources" ] && [ "$(cat "$pack/sources")" = "$(tools/source_hash.sh)" ]; then
    cp "$pack"/lib/cpo_kernels/*.so cpo_kernels/
    loads build && return
  fi
  echo "no extensions of these sources in $pack that load here: compiling" | tee -a "$log"
  limit=$((until > SECONDS ? until - SECONDS : 1))  # 0 would be none
  targets=$(timeout -k 5 "$limit" "$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
  limit=$((until > SECONDS ? until - SECONDS : 1))
  timed compile "$limit" env TORCH_CUDA_ARCH_LIST="$targets" "$python" setup.py build_ext --inplace
  limit=$((until > SECONDS ? until - SECONDS : 1))
  loads build
}

profile() {  # where the time of a step goes, printed too
  local set=default
  [ "$device" = cpu ] && set=ci
  timed "$name" "$limit" "$python" -m benchmarks.profile --device "$device" --set $set --rounds 3 \
    --out "$out/profile.json"
}

# compute-sanitizer is slow: rows of one block and of a cluster, split rows, edges and none, every kind of kernel. CUDA C++
# only, as Triton would be compiled under it; without torch's cache an access outside of a tensor is outside of an
# allocation.
sanitized=('sizes/*/N=7,V=257' 'sizes/bfloat16/N=1,V=262144' 'sizes/*/N=4,V=4096' 'sizes/float32/N=3,V=50257'
  'loss-types/float32/aot' 'loss-types/float32/sigmoid')
sanitize() {
  local tool=(compute-sanitizer --tool "$name" --error-exitcode 9) impl=cuda
  [ "$device" = cpu ] && tool=() impl=cpu
  timed "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${tool[@]}" "$python" -m cpo_kernels.cli check \
    --device "$device" --impl $impl --in-process --time-limit $((limit * 9 / 10 + 1)) --only "${sanitized[@]}" \
    --out "$out/$name.json"
}

kernels=(copy)
for impl in "${impls[@]}"; do kernels+=({forward,backward,fused,preference}_"$impl"); done
heads=()
for mode in trainable frozen forward; do
  shape=head=llama-3-8b,groups=8,length=1024,prompt=512
  [ "$device" = cpu ] && shape=head=smollm2-135m,groups=2,length=16,prompt=8
  heads+=(--workload "$shape,mode=$mode")
done

for i in "${!steps[@]}"; do
  name=${steps[$i]}
  limit=$(limit_of "$i")
  if [ "$limit" -lt $((total * least[$name] / 150)) ] || [ "$limit" -lt 1 ]; then  # two thirds of what it needs
    echo "== $name: not begun, $limit s are left of TOTAL_S=$total" | tee -a "$log"
    failed=1
    continue
  fi
  case $name in
    build) build ;;
    quick-cuda) check cuda --quick --processes $((processes < 4 ? processes : 4)) --out "$out/check-cuda-quick.json" ;;
    quick-triton) check triton --quick --processes "$processes" --out "$out/check-triton-quick.json" ;;
    kernels) bench gpu.json --only tokens preference --implementations "${kernels[@]}" ;;
    head) bench gpu.json --only head "${heads[@]}" --implementations products ours ours_triton ours_cuda ours_two_pass \
      naive_unmasked ;;
    profile) profile ;;
    check-cuda) check cuda --processes $((processes < 4 ? processes : 4)) --out "$out/check-cuda.json" ;;
    check-triton) check triton --processes "$processes" --out "$out/check-triton.json" ;;
    memcheck | racecheck) sanitize ;;
    baselines) bench gpu-more.json --only head ;;
    training) bench gpu-more.json --only training_step ;;
    growth) bench gpu-more.json --only growth ;;
    cold) bench gpu-more.json --only cold_start ;;
  esac
done
rm -f "$out"/*.tmp
echo "== in all $SECONDS s of $total" | tee -a "$log"
exit $failed
