#!/usr/bin/env bash
# One command on a fresh Debian 12 machine: installs what is missing, builds with warnings as errors and runs
# all tests. The last lines are ctest's. Another preset: scripts/test.sh asan
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
preset=${1:-ci}
scripts/install_deps.sh
scripts/build.sh "$preset" tests
if [ "$preset" = ci ]; then mkdir -p build/release; cp -f build/ci/v3bench build/release/v3bench; fi
scripts/prepare_corpus.sh
ctest --test-dir "build/$preset" --output-on-failure -j 1
