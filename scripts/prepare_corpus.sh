#!/usr/bin/env bash
# Text for the scenarios and for training, extracted from Debian's documentation packages into build/corpus.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -f build/corpus/manifest.json ] || exit 0
mkdir -p build
if ! python3 scripts/build_corpus.py --out build/corpus > build/corpus.log 2>&1; then
  # Package lists may be missing or too old for what the mirror holds now: fetch them, then try once more.
  sudo=""; if [ "$(id -u)" -ne 0 ]; then sudo="sudo"; fi
  $sudo apt-get update -qq
  python3 scripts/build_corpus.py --out build/corpus > build/corpus.log 2>&1 || { cat build/corpus.log >&2; exit 1; }
fi
