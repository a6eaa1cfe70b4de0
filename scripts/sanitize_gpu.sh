#!/usr/bin/env bash
# The check jobs of every CUDA implementation under compute-sanitizer, on the quick cases: memcheck (bounds), racecheck
# (shared memory), initcheck (uninitialised device memory), synccheck (barriers).
#   scripts/sanitize_gpu.sh [--out DIR] [--op NAME,...] [--tools memcheck,...] [--seconds N a call]
# One line a tool and op in DIR/sanitizer.csv (tool,op,exit_code,status,seconds,log); logs of what is not clean stay in
# DIR. Exit code: 0 clean, 1 findings or timeouts, 4 nothing could run, 66 no compute-sanitizer.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=sanitizer; ops=; tools=memcheck,racecheck,initcheck,synccheck; seconds=300
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=${2:?}; shift 2 ;;
    --op) ops=${2:?}; shift 2 ;;
    --tools) tools=${2:?}; shift 2 ;;
    --seconds) seconds=${2:?}; shift 2 ;;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "sanitize_gpu.sh: unknown argument '$1'" >&2; exit 64 ;;
  esac
done
v3bench=${V3BENCH:-}
for p in "$here/v3bench" "$here/../build/cuda/v3bench"; do [ -n "$v3bench" ] || [ ! -x "$p" ] || v3bench=$p; done
[ -x "${v3bench:-none}" ] || { echo "sanitize_gpu.sh: no v3bench (build it with scripts/build.sh cuda, or set V3BENCH)" >&2; exit 66; }
sanitizer=${COMPUTE_SANITIZER:-$(command -v compute-sanitizer || true)}
for p in /usr/local/cuda/bin/compute-sanitizer /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
  [ -n "$sanitizer" ] || [ ! -x "$p" ] || sanitizer=$p
done
[ -x "${sanitizer:-none}" ] || { echo "sanitize_gpu.sh: no compute-sanitizer in PATH or /usr/local/cuda" >&2; exit 66; }
mkdir -p "$out" || exit 74
# Ops with at least one CUDA implementation that can run here. The cases are small: --quick, below a second on a GPU.
[ -n "$ops" ] || ops=$("$v3bench" support --device cuda --csv | awk -F, 'NR > 1 && $3 == "yes" && !seen[$1]++ {printf "%s%s", sep, $1; sep = ","}')
[ -n "$ops" ] || { echo "sanitize_gpu.sh: no CUDA implementation can run here (v3bench support --device cuda says why)" >&2; exit 4; }

ours='^(?!.*\.cuda_(cublas|cudnn))'  # libraries' kernels are not ours to clean
csv=$out/sanitizer.csv
[ -s "$csv" ] || echo "tool,op,exit_code,status,seconds,log" > "$csv"
bad=0
for tool in ${tools//,/ }; do
  for op in ${ops//,/ }; do
    if grep -q "^$tool,$op,[0-9]*,clean," "$csv"; then continue; fi  # of a call before
    log=$out/sanitizer-$tool-$op.log; t0=$SECONDS
    timeout --kill-after=20 "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 86 --print-limit 20 \
      "$v3bench" check --device cuda --quick --op "$op" --filter "$ours" > "$log" 2>&1
    rc=$?
    case $rc in
      0) status=clean ;;
      4) status=nothing_ran ;;
      86) status=findings ;;
      124|137) status=timeout ;;
      *) status=failed ;;
    esac
    echo "$tool,$op,$rc,$status,$(( SECONDS - t0 )),$(basename "$log")" >> "$csv"
    echo "$tool $op: $status ($(( SECONDS - t0 )) s)"
    if [ $status = clean ]; then rm -f "$log"; elif [ $status != nothing_ran ]; then bad=$((bad + 1)); fi
  done
done
echo "$csv: $bad not clean"
[ $bad = 0 ]
