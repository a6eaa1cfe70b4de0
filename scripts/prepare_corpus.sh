#!/usr/bin/env bash
# Text for the scenarios and for training, extracted from Debian's documentation packages into build/corpus.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -f build/corpus/manifest.json ]; then
  python3 scripts/build_corpus.py --out build/corpus > build/corpus.log 2>&1 || { cat build/corpus.log; exit 1; }
fi
