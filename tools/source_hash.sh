#!/usr/bin/env bash
# One hash of everything that the compiled extensions are built from.
cd "$(dirname "$0")/.."
find csrc setup.py -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1
