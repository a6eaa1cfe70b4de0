#!/usr/bin/env bash
# One command on a fresh Debian 12 machine: installs what is missing, builds, prepares the corpus and runs
# `v3bench all --quick`. Leaves the binary at build/release/v3bench and the reports in build/reports/quick
# (another folder: V3BENCH_OUT). Arguments replace `--quick`, e.g. scripts/run.sh --full.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
scripts/install_deps.sh
scripts/build.sh release
scripts/prepare_corpus.sh
out=${V3BENCH_OUT:-build/reports/quick}
if [ $# -eq 0 ]; then set -- --quick; fi
exec build/release/v3bench all "$@" --out "$out"
