#!/usr/bin/env bash
# Does the wheel that is built here work with another torch? tools/wheel_matrix.py asks it for many, and other Pythons.
#
#   tools/check_wheel.sh TORCH_VERSION [WORK_DIR]        e.g.  tools/check_wheel.sh 2.10.0
#
# Builds the abi3 wheel with the torch of $PYTHON (default: python3), or takes the file $WHEEL. Installs it into a new
# virtual environment of $PYTHON with torch TORCH_VERSION, checks that the extensions ask for nothing that this torch
# lacks (tools/check_symbols.py), and runs there, away from the source tree, a smoke test of every kernel against the
# reference and `cpo-kernels check`, once more for its token ops on each instruction set of this processor. Needs pip
# with an index (about 200 MB for a CPU build of torch; set PIP_EXTRA_INDEX_URL or PIP_INDEX_URL for one) and binutils.
# WORK_DIR is kept, a default one is removed. With CPO_KERNELS_CUDA=1 the wheel holds the CUDA extension too.
set -euo pipefail

torch_version=${1:?usage: tools/check_wheel.sh TORCH_VERSION [WORK_DIR]}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -ge 2 ]; then
  work=$2
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

wheel=${WHEEL:-}
if [ -z "$wheel" ]; then
  echo "== wheel, built with torch $("$python" -c 'import torch; print(torch.__version__)')"
  rm -rf "$work/dist"
  "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/dist" "$root"
  wheel=$(ls "$work"/dist/*.whl)
fi
basename "$wheel"
case $wheel in
  *-cp310-abi3-*) ;;
  *) echo "not an abi3 wheel for CPython 3.10" >&2; exit 1 ;;
esac

echo "== new environment with torch $torch_version"
[ -x "$work/venv/bin/python" ] || "$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "torch==$torch_version" numpy
"$work/venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"

echo "== names that the extensions take from libtorch, against the headers of torch $torch_version"
"$work/venv/bin/python" "$root/tools/check_symbols.py" "$wheel"

cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import torch
import cpo_kernels
from cpo_kernels import reference
from cpo_kernels.backends import dispatch

print(f"torch {torch.__version__}, cpo_kernels from {cpo_kernels.__file__}")
assert not dispatch.missing("cpu"), dispatch.missing("cpu")
logits, labels = torch.randn(5, 1000), torch.tensor([1, 2, -100, 3, 999])
options = (labels, -100, 1.0, 0.0, 1000, True)
for got, want in zip(
    torch.ops.cpo_kernels.token_logps_fwd(logits, *options), reference.token_logps_fwd(logits.double(), *options)
):
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
try:
    torch.ops.cpo_kernels.token_logps_fwd(logits, labels + 1000, *options[1:])
except RuntimeError as error:
    assert "out of range" in str(error), error
else:
    raise AssertionError("a label out of range went through")
print("smoke test passed")
PYTHON
"$work/venv/bin/cpo-kernels" check --device cpu --impl cpu
sets=$(grep -qw avx2 /proc/cpuinfo && echo avx2 || true)
sets+=$(grep -qw avx512bw /proc/cpuinfo && echo " avx512" || true)
for isa in portable $sets; do
  echo "== $isa"
  CPO_KERNELS_CPU_ISA=$isa "$work/venv/bin/cpo-kernels" check --device cpu --impl cpu \
    --only sizes/\* layouts/\* options/\* extreme/\* labels/\* same-bits/\* errors/\*
done
echo "== the wheel works with torch $torch_version"
