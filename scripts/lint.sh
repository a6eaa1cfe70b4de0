#!/usr/bin/env bash
# clang-format and clang-tidy over the first-party sources, or over the files given. Prints counts; ends with 1 when
# anything is found. Changes no file. clang-tidy needs a configured build (build/ci or build/release, or $BUILD).
#   scripts/lint.sh                      everything (clang-tidy takes long)
#   scripts/lint.sh --format             clang-format only
#   scripts/lint.sh --install [...]      first installs what is missing of the two (Debian packages clang-format, clang-tidy)
#   scripts/lint.sh scenarios/logits.cpp model/config.h
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
tidy=1; install=0
while :; do
  case ${1:-} in
    --format) tidy=0; shift ;;
    --install) install=1; shift ;;
    *) break ;;
  esac
done
if [ $# -gt 0 ]; then files=("$@"); else
  mapfile -t files < <(find bench kernels model reference reports scenarios tests -name '*.h' -o -name '*.cpp' | sort)
fi
for f in "${files[@]}"; do [ -f "$f" ] || { echo "lint.sh: $f: no such file" >&2; exit 66; }; done
tools=(clang-format)
if [ $tidy = 1 ]; then tools+=(clang-tidy); fi
missing=()
for tool in "${tools[@]}"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
if [ ${#missing[@]} -gt 0 ]; then
  [ $install = 1 ] || { echo "lint.sh: missing: ${missing[*]}; scripts/lint.sh --install gets them" >&2; exit 66; }
  sudo=""; if [ "$(id -u)" -ne 0 ]; then sudo="sudo"; fi
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

unclean=0
for f in "${files[@]}"; do
  if ! clang-format --dry-run -Werror "$f" 2>/dev/null; then
    echo "not clang-format clean: $f"
    unclean=$((unclean + 1))
  fi
done
echo "clang-format: ${#files[@]} files, $unclean not clean"
[ $tidy = 1 ] || exit $((unclean > 0))

build=${BUILD:-}
for b in build/ci build/release; do [ -n "$build" ] || [ ! -f $b/compile_commands.json ] || build=$b; done
[ -f "${build:-none}/compile_commands.json" ] || { echo "lint.sh: no compile_commands.json; configure first: cmake --preset ci" >&2; exit 66; }
units=()  # headers are seen through the units that include them (.clang-tidy, HeaderFilterRegex)
for f in "${files[@]}"; do case $f in *.cpp) units+=("$f") ;; esac; done
log=$(mktemp)
trap 'rm -f "$log" "$log.err"' EXIT
failed=0
if [ ${#units[@]} -gt 0 ]; then
  # GCC's flags that clang does not know are no finding.
  printf '%s\0' "${units[@]}" | xargs -0 -n 1 -P "${JOBS:-$(nproc)}" clang-tidy -p "$build" --quiet \
    --extra-arg=-Wno-unknown-warning-option --extra-arg=-Wno-unknown-pragmas \
    --extra-arg=-Wno-ignored-optimization-argument >"$log" 2>"$log.err" || failed=1
fi
findings() { { grep -E ": ($1):" "$log" || true; } | sed "s|$root/||" | sort -u; }
findings 'warning|error'
found=$(findings 'warning|error' | wc -l)
errors=$(findings error | wc -l)
echo "clang-tidy ($build): ${#units[@]} units, $found findings, $errors of them errors"
findings 'warning|error' | { grep -oE '\[[a-z][a-zA-Z0-9.,-]+\]$' || true; } | sort | uniq -c | sort -rn
if [ $failed = 1 ] && [ "$errors" = 0 ]; then  # it could not run: that is no clean result
  echo "clang-tidy did not finish:" >&2
  tail -5 "$log.err" >&2
fi
exit $((unclean + found + failed > 0))
