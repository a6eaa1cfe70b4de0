#!/usr/bin/env bash
# Installs what a fresh Debian 12 lacks: compiler and libraries from Debian, oneDNN (OpenMP build)
# from PyPI, because Debian's is 2.6 without AMX fixes and fp8. Safe to run again.
#   install_deps.sh           all that a CPU build needs
#   install_deps.sh --cuda    only what a CUDA build may use besides the toolkit: the CUTLASS headers. No root, no compiler;
#                             scripts/build.sh runs it for the cuda preset where there is nvcc
#   install_deps.sh --cudnn   only the headers of cuDNN and of its frontend (a download of 530 MB, of which 5 MB stay)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
deps="$root/build/deps"

# CUTLASS is headers only; of the wheel (1500 files) the include folder and the licence are kept, where cmake/cuda.cmake looks.
cutlass_headers() {
  local stamp="$deps/cutlass/.version-4.2.0.0" work
  if [ -f "$stamp" ]; then return; fi
  mkdir -p "$deps"
  work=$(mktemp -d "$deps/cutlass.XXXXXX")
  trap 'rm -rf "$work"' RETURN
  python3 -m pip download -q --no-deps --disable-pip-version-check -d "$work/whl" \
    --require-hashes -r "$root/scripts/cutlass_requirements.txt" || return 1
  python3 - "$work" <<'PY' || return 1
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
wheel, = work.glob("whl/nvidia_cutlass-*.whl")
keep = ("cutlass_library/source/include/", "nvidia_cutlass-4.2.0.0.dist-info/licenses/")
with zipfile.ZipFile(wheel) as z:
    z.extractall(work / "new", [n for n in z.namelist() if n.startswith(keep)])
PY
  touch "$work/new/.version-4.2.0.0"
  if [ -d "$deps/cutlass" ]; then mv "$deps/cutlass" "$work/old"; fi  # a whole folder or none, whoever compiles beside us
  mv "$work/new" "$deps/cutlass"
}

# cuDNN: headers only; the library itself is opened at run time where a machine has it.
cudnn_headers() {
  local stamp="$deps/cudnn/.version-9.28.0.42-1.32.0" work
  if [ -f "$stamp" ]; then return; fi
  mkdir -p "$deps"
  work=$(mktemp -d "$deps/cudnn.XXXXXX")
  trap 'rm -rf "$work"' RETURN
  python3 -m pip download -q --no-deps --disable-pip-version-check -d "$work/whl" \
    --python-version 3.11 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --only-binary=:all: \
    --require-hashes -r "$root/scripts/cudnn_requirements.txt" || return 1
  python3 - "$work" <<'PY' || return 1
import pathlib, sys, zipfile
work = pathlib.Path(sys.argv[1])
for wheel in work.glob("whl/nvidia_cudnn_*.whl"):
    with zipfile.ZipFile(wheel) as z:
        for name in z.namelist():
            at = name.find("include/")
            if at >= 0 and name.endswith((".h", ".hpp")):
                to = work / "new" / "include" / name[at + len("include/"):]
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(z.read(name))
PY
  touch "$work/new/$(basename "$stamp")"
  if [ -d "$deps/cudnn" ]; then mv "$deps/cudnn" "$work/old"; fi
  mv "$work/new" "$deps/cudnn"
}

case "${1:-}" in
  "") ;;
  --cuda)
    cutlass_headers && exit 0
    echo "install_deps.sh: the CUTLASS headers could not be fetched from PyPI" >&2
    exit 1 ;;
  --cudnn)
    cudnn_headers && exit 0
    echo "install_deps.sh: the cuDNN headers could not be fetched from PyPI" >&2
    exit 1 ;;
  *) echo "usage: install_deps.sh [--cuda | --cudnn]" >&2; exit 64 ;;
esac
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
