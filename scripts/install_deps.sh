#!/usr/bin/env bash
# Installs what a fresh Debian 12 lacks: compiler and libraries from Debian, oneDNN (OpenMP build)
# from PyPI, because Debian's is 2.6 without AMX fixes and fp8. Safe to run again.
#   --cudnn: also the headers of cuDNN and of its frontend from PyPI (a download of 530 MB, of which 5 MB stay).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
sudo=""; if [ "$(id -u)" -ne 0 ]; then sudo="sudo"; fi

packages=(g++ cmake ninja-build ccache pkg-config git python3 python3-pip xz-utils
  libbenchmark-dev libeigen3-dev libhwy-dev libsentencepiece-dev sentencepiece libcli11-dev libfmt-dev
  nlohmann-json3-dev libgtest-dev libfccp-dev)
missing=()
for p in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing+=("$p")
done
if [ "${#missing[@]}" -gt 0 ]; then
  echo "installing: ${missing[*]}"
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

deps="$root/build/deps"
stamp="$deps/onednn/.version-2023.2.0-gomp"
if [ ! -f "$stamp" ]; then
  mkdir -p "$deps/whl"
  python3 -m pip download -q --no-deps --disable-pip-version-check -d "$deps/whl" \
    --require-hashes -r "$root/scripts/onednn_requirements.txt"
  rm -rf "$deps/onednn" "$deps/unpack"; mkdir -p "$deps/onednn" "$deps/unpack"
  for w in "$deps"/whl/onednn_*.whl; do python3 -m zipfile -e "$w" "$deps/unpack"; done
  for d in "$deps"/unpack/*.data/data; do cp -r "$d"/. "$deps/onednn/"; done
  # The wheel holds three full copies of the library under three names; one file and links will do.
  (cd "$deps/onednn/lib" && ln -sf libdnnl.so.3.2 libdnnl.so.3 && ln -sf libdnnl.so.3 libdnnl.so)
  rm -rf "$deps/unpack" "$deps/whl"
  touch "$stamp"
fi

for option in "$@"; do
  if [ "$option" = --cudnn ] && [ ! -f "$deps/cudnn/.version-9.28.0.42-1.32.0" ]; then
    rm -rf "$deps/cudnn" "$deps/whl"; mkdir -p "$deps/cudnn/include" "$deps/whl"
    python3 -m pip download -q --no-deps --disable-pip-version-check -d "$deps/whl" \
      --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --only-binary=:all: \
      --require-hashes -r "$root/scripts/cudnn_requirements.txt"
    for w in "$deps"/whl/nvidia_cudnn_*.whl; do
      python3 - "$w" "$deps/cudnn/include" <<'PY'
import pathlib, sys, zipfile
wheel, out = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
for name in wheel.namelist():
    at = name.find("include/")
    if at >= 0 and name.endswith((".h", ".hpp")):
        to = out / name[at + len("include/"):]
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(wheel.read(name))
PY
    done
    rm -rf "$deps/whl"
    touch "$deps/cudnn/.version-9.28.0.42-1.32.0"
  fi
done
