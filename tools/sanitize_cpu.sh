#!/usr/bin/env bash
# The C++ kernels of the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: the cases of `cpo-kernels check` that
# call them, once for each instruction set that this processor has.
#
#   tools/sanitize_cpu.sh [WORK_DIR]        minutes, most of them to compile; WORK_DIR is kept, a default one is removed
#
# Builds the extension with both sanitizers into WORK_DIR, and puts it in the place of the installed one. $PYTHON
# (default: .venv/bin/python) must have the library and its test requirements; gcc's sanitizers are needed.
set -euo pipefail

cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if [ $# -ge 1 ]; then
  work=$1
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

echo "== extension with -fsanitize=address,undefined"
CPO_KERNELS_CUDA=0 CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g" \
  "$python" setup.py -q build_ext --build-lib "$work/lib" --build-temp "$work/build"

cat >"$work/run.py" <<'PYTHON'
import importlib.util
import sys

import torch  # its libraries are what the extension is linked to

library, *arguments = sys.argv[1:]
spec = importlib.util.spec_from_file_location("cpo_kernels._C", library)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["cpo_kernels._C"] = module
from cpo_kernels.check.run import main

sys.exit(main(arguments))
PYTHON

preload=""
for name in libasan.so libubsan.so libstdc++.so; do preload+="$(gcc -print-file-name=$name) "; done
sets=$(grep -qw avx2 /proc/cpuinfo && echo avx2 || true)
sets+=$(grep -qw avx512bw /proc/cpuinfo && echo " avx512" || true)
sets+=$(grep -qw amx_bf16 /proc/cpuinfo && echo " amx" || true)
for isa in portable $sets; do
  echo "== $isa"
  # Left out: rows gigabytes apart, and what starts from hidden states.
  LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 CPO_KERNELS_CPU_ISA=$isa PYTHONPATH=. \
    "$python" "$work/run.py" "$work/lib/cpo_kernels/_C.abi3.so" --device cpu --impl cpu --in-process --only \
    sizes/\* layouts/\* options/\* against-naive/\* extreme/\* labels/\* same-bits/\* errors/\* sequence_sum/\* loss-types/\* \
    far/\* pairs/\* live/\* own\ matmuls/\*
done
