#!/usr/bin/env bash
# The peers' own Python environment (build/peers/venv, or $V3BENCH_PEERS_VENV): torch, transformers, gguf and
# llama-cpp-python from PyPI, versions of requirements.txt. llama.cpp is compiled for this machine's CPU (its default),
# 15 minutes on two free cores; without it (--no-llamacpp, or where it does not build) its rows say so.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${V3BENCH_PEERS_VENV:-$root/build/peers/venv}
llamacpp=1
if [ "${1:-}" = --no-llamacpp ]; then llamacpp=0; fi
if [ ! -x "$venv/bin/python" ]; then python3 -m venv "$venv"; fi
grep -v '^llama-cpp-python' "$here/requirements.txt" > "$venv/requirements.wheels.txt"
"$venv/bin/pip" install --quiet -r "$venv/requirements.wheels.txt"
if [ $llamacpp = 1 ] && ! "$venv/bin/python" -c 'import llama_cpp' 2>/dev/null; then
  launcher=""
  if command -v ccache >/dev/null; then launcher="-DCMAKE_C_COMPILER_LAUNCHER=ccache -DCMAKE_CXX_COMPILER_LAUNCHER=ccache"; fi
  # Only the library: no image models, no server, no command line tools.
  export CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF $launcher"
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
  if ! "$venv/bin/pip" install "$(grep '^llama-cpp-python' "$here/requirements.txt")" > "$venv/llama-cpp-python.log" 2>&1; then
    tail -5 "$venv/llama-cpp-python.log" >&2
    echo "setup.sh: llama-cpp-python did not build ($venv/llama-cpp-python.log); its rows will say so" >&2
  fi
fi
echo "$venv"
