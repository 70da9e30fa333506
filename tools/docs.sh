#!/usr/bin/env bash
# The documentation site as a folder of pages: tools/docs.sh [FOLDER]. A broken link is an error.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-.venv/bin/python}" -m mkdocs build --quiet --strict --site-dir "$(realpath -m "${1:-build/docs}")"
