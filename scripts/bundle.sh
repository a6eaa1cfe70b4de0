#!/usr/bin/env bash
# One relocatable archive of v3bench for a machine without compiler, root or network: the program of the `cuda` preset,
# every shared library but glibc and the driver's (lib/, found by $ORIGIN), presets, tiny-v3, slices of the corpus,
# run_on_target.sh. cuBLAS and cuDNN are not carried: where the target has them, their baselines run.
#   scripts/bundle.sh [--preset cuda] [--out build/v3bench-bundle.tar.xz] [--no-build]
# Fails above 60 MB.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
preset=cuda; out=; build=1
while [ $# -gt 0 ]; do
  case $1 in
    --preset) preset=${2:?}; shift 2 ;;
    --out) out=${2:?}; shift 2 ;;
    --no-build) build=0; shift ;;
    *) echo "bundle.sh: unknown argument '$1' (--preset NAME, --out FILE, --no-build)" >&2; exit 64 ;;
  esac
done
out=${out:-build/v3bench-bundle-$preset.tar.xz}
limit=60000000
if [ $build = 1 ]; then
  scripts/build.sh "$preset"
  cmake --build --preset "$preset" --target test_goldens -j "$(nproc)"
fi
[ -x "build/$preset/test_goldens" ] || { echo "bundle.sh: no build/$preset/test_goldens" >&2; exit 66; }
[ -x "build/$preset/v3bench" ] || { echo "bundle.sh: no build/$preset/v3bench" >&2; exit 66; }
[ -f build/corpus/manifest.json ] || scripts/prepare_corpus.sh

stage=$(mktemp -d); trap 'rm -rf "$stage"' EXIT
top=$stage/v3bench; mkdir -p "$top/lib" "$top/model" "$top/corpus"
cmake --install "build/$preset" --prefix "$top" --component v3bench --strip > build/bundle.log

# Libraries of the program, and of those libraries; glibc and the loader stay the target's.
deps=$(LD_LIBRARY_PATH=$root/build/deps/onednn/lib ldd "$top/v3bench" "build/$preset/test_goldens" | sort -u | awk '$2 == "=>" {print $1, $3}')
if echo "$deps" | grep -q not; then echo "bundle.sh: a library is missing here:" >&2; echo "$deps" | grep not >&2; exit 66; fi
while read -r name path; do
  case $name in
    libc.so.*|libm.so.*|libdl.so.*|libpthread.so.*|librt.so.*|ld-linux*|libcuda.so.*|libnvidia*|libcublas*|libcudnn*) continue ;;
  esac
  cp -L "$path" "$top/lib/$name"
  strip --strip-unneeded "$top/lib/$name"
done <<< "$deps"

# transformers' logits on small checkpoints, against every backend that runs on the target.
cp "build/$preset/test_goldens" "$top/"; strip "$top/test_goldens"
cp -r tests/goldens "$top/"
cp -r model/presets "$top/model/"
mkdir "$top/model/tiny-v3"
cp model/tiny-v3/{config.json,model.safetensors,tokenizer.model,tokenizer_config.json,README.md} "$top/model/tiny-v3/"
python3 scripts/corpus_slice.py build/corpus "$top/corpus" --train-bytes 6000000
cp scripts/run_on_target.sh scripts/sanitize_gpu.sh scripts/record_hardware.py "$top/"
cp kernels/hardware_runs.csv "$top/"
if [ -f "build/$preset/resources.csv" ]; then cp "build/$preset/resources.csv" "$top/"; fi
needed=$(for f in "$top/v3bench" "$top"/lib/*; do objdump -T "$f" 2>/dev/null | grep -o 'GLIBC_[0-9.]*'; done | sort -Vu | tail -1)
cat > "$top/README" <<TEXT
v3bench $(git describe --always --dirty 2>/dev/null || echo unknown), preset $preset. x86-64 with AVX2, ${needed/GLIBC_/glibc } or later, NVIDIA driver for CUDA 13 (580 or later) for the GPU jobs.
./run_on_target.sh --minutes 30   does everything and leaves CSV files in v3bench-results/
./v3bench --help                  the program itself
TEXT
mkdir -p "$(dirname "$out")"
tar -C "$stage" --owner=0 --group=0 --sort=name -c v3bench | xz -T0 -6 > "$out"
bytes=$(stat -c %s "$out")
echo "$out: $bytes bytes (unpacked $(du -sb "$top" | cut -f1)), needs ${needed/GLIBC_/glibc }, lib: $(ls "$top/lib" | tr '\n' ' ')"
if [ "$bytes" -gt $limit ]; then echo "bundle.sh: more than $limit bytes" >&2; exit 1; fi
