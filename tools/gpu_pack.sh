#!/usr/bin/env bash
# What tools/gpu.sh would otherwise build on a GPU machine, made on one without a GPU: tools/gpu_pack.sh [FOLDER]
# FOLDER (build/gpu) gets lib/: both extensions for ARCH (9.0: H100, H200), for every torch >= 2.10 and Python >= 3.10 as
# they use stable ABIs; site/: the baselines and what they need that a machine with torch, transformers and accelerate
# lacks, for Python VERSION (3.12); sources: the hash of what lib/ was built from. Needs nvcc, and .venv for torch's headers.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-build/gpu}
python=${PYTHON:-.venv/bin/python}
rm -rf "$folder"
mkdir -p "$folder"
CPO_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=${ARCH:-9.0} "$python" setup.py -q build_ext \
  --build-lib "$folder/lib" --build-temp "build/gpu-objects-${ARCH:-9.0}"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder/site" \
  --python-version "${VERSION:-3.12}" --only-binary=:all: -c constraints.txt \
  trl liger-kernel cut-cross-entropy datasets 'dill<0.4.2' 'multiprocess<0.70.20'
find "$folder/site" -name '__pycache__' -prune -exec rm -rf {} +
tools/source_hash.sh > "$folder/sources"
du -sh "$folder"
