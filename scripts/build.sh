#!/usr/bin/env bash
# Configures and builds one preset (release by default) without tests, or with them: build.sh PRESET tests
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=${1:-release}; what=${2:-v3bench}
if [ "$what" = tests ]; then target=all; else target=v3bench; fi
# One job a core, but at least 2 GiB of memory for each: Eigen and Google Test are hungry.
mem_jobs=$(awk '/MemAvailable/ {print int($2 / 2097152)}' /proc/meminfo)
jobs=$(nproc); if [ "$mem_jobs" -lt "$jobs" ]; then jobs=$((mem_jobs > 0 ? mem_jobs : 1)); fi
mkdir -p build
# A CUDA build may use CUTLASS. Without it (no network) the kernels that need it are rows with that reason.
if [ "$preset" = cuda ] && { command -v nvcc >/dev/null || [ -x "${CUDA_PATH:-/usr/local/cuda}/bin/nvcc" ]; }; then
  scripts/install_deps.sh --cuda || echo "build.sh: going on with what build/deps has" >&2
fi
# Objects of one clone serve the next one on the same machine.
export CCACHE_BASEDIR=$PWD CCACHE_NOHASHDIR=1
cmake --preset "$preset" > "build/$preset.configure.log" 2>&1 || { cat "build/$preset.configure.log"; exit 1; }
grep '^-- CUDA' "build/$preset.configure.log" || true  # toolkit, architectures, what is left out
cmake --build --preset "$preset" --target "$target" -j "$jobs"
