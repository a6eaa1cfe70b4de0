#!/usr/bin/env bash
# Runs a v3bench bundle on a machine with an NVIDIA GPU: no compiler, no root, no network. Most valuable first, within a
# time budget; every finished row is kept, and a second call goes on where the first one ended.
#   ./run_on_target.sh [--minutes N] [--out DIR] [--checks-only]
# Leaves in DIR (default v3bench-results beside the current folder): bench.csv, the scenarios' CSVs, machine.json,
# info.txt, goldens.txt, log.txt, sanitizer.csv, hardware_runs.csv (lines for kernels/hardware_runs.csv).
# Exit code: 0 all checks passed, 1 something failed or faulted, 4 nothing could run here (rows say why), 124 the time was
# over before the quick checks were done.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
minutes=30; out=v3bench-results; checks_only=0
while [ $# -gt 0 ]; do
  case $1 in
    --minutes) minutes=${2:?--minutes N}; shift 2 ;;
    --out) out=${2:?--out DIR}; shift 2 ;;
    --checks-only) checks_only=1; shift ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "run_on_target.sh: unknown argument '$1' (--minutes N, --out DIR, --checks-only)" >&2; exit 64 ;;
  esac
done
case $minutes in ''|*[!0-9]*) echo "run_on_target.sh: --minutes takes a whole number, found '$minutes'" >&2; exit 64 ;; esac
v3bench=${V3BENCH:-$here/v3bench}
[ -x "$v3bench" ] || { echo "run_on_target.sh: no program at $v3bench" >&2; exit 66; }
mkdir -p "$out" || exit 74
: >> "$out/log.txt" || exit 74
deadline=$(( SECONDS + minutes * 60 ))

say() { echo "$*" | tee -a "$out/log.txt"; }
left() { echo $(( deadline - SECONDS )); }

# step NAME ARGS...: runs v3bench in what is left of the time, the device's CSVs in $out. After a fault of a kernel, or
# a killed process, the same line goes on behind the job that did it, as long as it gets further.
rc=0
step() {
  local name=$1 before after faulted=0 t0=$SECONDS; shift
  if [ "$(left)" -lt 5 ]; then say "-- $name: no time left"; rc=124; return; fi
  say "-- $name: v3bench $*"
  before=-1
  while :; do
    timeout --signal=TERM --kill-after=30 "$(left)" "$v3bench" "$@" --out "$out" --resume \
      >> "$out/log.txt" 2> "$out/stderr.txt"; rc=$?
    cat "$out/stderr.txt" >> "$out/log.txt"
    after=$(wc -l 2>/dev/null < "$out/bench.csv" || echo 0)
    if [ "$(left)" -lt 5 ] || [ "$rc" = 124 ]; then break; fi
    if ! grep -q 'CUDA fault' "$out/stderr.txt" && [ "$rc" -lt 128 ]; then break; fi
    say "   ended with $rc: $(grep -m1 'CUDA fault' "$out/stderr.txt" || echo "killed"); going on behind it"
    faulted=1
    # A killed process leaves no row of its own: one more try writes it.
    if [ "$after" -le "$before" ] && [ ! -e "$out/bench.csv.running" ]; then break; fi
    before=$after
  done
  rm -f "$out/stderr.txt"
  if [ $faulted = 1 ] && [ "$rc" != 124 ]; then rc=1; fi
  say "   exit code $rc after $(( SECONDS - t0 )) s, $after lines in bench.csv"
}

say "run_on_target: $(date -u +%Y-%m-%dT%H:%M:%SZ), $minutes minutes, results in $out"
timeout 30 "$v3bench" info --no-peaks > "$out/info.txt" 2>&1 || say "info ended with $?"
grep -E '^\| (gpu|peak gpu)' "$out/info.txt" | tee -a "$out/log.txt"

step "check, quick cases" check --device cuda --quick
verdict=$rc
if [ "$verdict" = 4 ]; then
  say "no CUDA job can run here; the rows in $out/bench.csv say why"
  exit 4
fi
if [ "$verdict" != 124 ]; then  # with the peaks: worth its seconds now that something can run
  timeout 60 "$v3bench" info > "$out/info.tmp" 2>&1 && mv "$out/info.tmp" "$out/info.txt"
  rm -f "$out/info.tmp"
fi
# worst CODE: failures of later checks count; time that ran out does not.
worst() { if [ "$1" != 0 ] && [ "$1" != 4 ] && [ "$1" != 124 ] && { [ "$verdict" = 0 ] || [ "$verdict" = 124 ]; }; then verdict=$1; fi; }
if [ "$(left)" -gt 30 ] && [ -x "$here/test_goldens" ]; then
  say "-- goldens: transformers' logits, hidden states and routes on every backend"
  LD_LIBRARY_PATH=$here/lib V3BENCH_GOLDENS=$here/goldens V3BENCH_TINY_V3=$here/model/tiny-v3 \
    timeout --kill-after=30 "$(left)" "$here/test_goldens" > "$out/goldens.txt" 2>&1; rc=$?
  say "   exit code $rc, $(grep -c '^golden ' "$out/goldens.txt") lines in goldens.txt"
  worst $rc
fi
if [ $checks_only = 0 ]; then
  step "bench, quick cases" bench --device cuda --quick --min-time 0.1; worst $rc
fi
step "check, all standard cases" check --device cuda; worst $rc
if [ $checks_only = 0 ]; then
  step "bench, standard cases" bench --device cuda; worst $rc
  for s in kv-cache expert-load yarn-perplexity mtp-decoding; do
    if "$v3bench" scenario $s --help 2>/dev/null | grep -q -- --device; then
      step "scenario $s" scenario $s --device cuda
    else
      say "-- scenario $s: this build's has no --device"
    fi
    worst $rc
  done
fi
if [ "$(left)" -gt 60 ] && [ -x "$here/sanitize_gpu.sh" ]; then
  say "-- compute-sanitizer"
  V3BENCH=$v3bench timeout --kill-after=30 "$(left)" "$here/sanitize_gpu.sh" --out "$out" >> "$out/log.txt" 2>&1
  sanitizer=$?
  say "   exit code $sanitizer (66: not installed)"
  if [ $sanitizer = 1 ]; then worst 1; fi
fi
if [ $checks_only = 0 ]; then
  step "bench, full cases" bench --device cuda --full; worst $rc
fi
if command -v python3 >/dev/null && [ -f "$here/record_hardware.py" ] && [ -f "$out/bench.csv" ]; then
  python3 "$here/record_hardware.py" "$out" --into "$out/hardware_runs.csv" | tee -a "$out/log.txt"
fi
[ "$verdict" != 124 ] || say "the time was over before the quick checks were done; call again to go on"
files=("$out"/*.csv "$out"/machine.json)
say "done: exit code $verdict; ${files[*]}"
exit "$verdict"
