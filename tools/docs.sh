#!/usr/bin/env bash
# The API reference as a folder of HTML pages, made of the docstrings by pdoc: tools/docs.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
# The public names, the modules that a user imports by name, and the adapters; not what is behind them.
modules=(cpo_kernels cpo_kernels.objectives cpo_kernels.reference cpo_kernels.batch_plan)
modules+=(cpo_kernels.integrations.{transformers,heads,trl,fused_head})
exec "${PYTHON:-.venv/bin/python}" -m pdoc --docformat google --output-directory "${1:-build/docs}" "${modules[@]}"
