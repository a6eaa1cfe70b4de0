#!/usr/bin/env bash
# The run behind a published CPU table, once more: every op at every size, the peers of the whole model beside ours, and
# the closure of the forward passes, into reports/published/<cpu>/ with its tables. Say what else runs on the machine:
# nothing should.
#   scripts/publish_cpu.sh NAME            reports/published/NAME (say zen4-2c), `bench --full`; hours
#   scripts/publish_cpu.sh NAME --quick    the small subset into build/published/NAME, for tests
# --no-peers leaves out what needs PyPI; --resume goes on with an interrupted run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:-}; shift || true
case $name in ''|-*|*/*) echo "usage: scripts/publish_cpu.sh NAME [--quick] [--no-peers] [--resume]" >&2; exit 64 ;; esac
size=--full; peers=1; resume=()
for a in "$@"; do
  case $a in
    --quick) size=--quick ;;
    --no-peers) peers=0 ;;
    --resume) resume=(--resume) ;;
    *) echo "publish_cpu.sh: unknown option $a" >&2; exit 64 ;;
  esac
done
v3bench=${V3BENCH:-build/release/v3bench}
if [ ! -x "$v3bench" ]; then scripts/build.sh release; fi
out=reports/published/$name
if [ $size = --quick ]; then out=build/published/$name; fi
mkdir -p "$out"
jobs=$("$v3bench" list $size --device cpu | tail -1)
free_gb=$(awk '/MemAvailable/ {print int($2 / 1048576)}' /proc/meminfo)
echo "$out: $jobs; ${free_gb} GiB of memory are free$([ "$free_gb" -ge 18 ] || echo ' (the largest cases want 18 and say so where they do not fit)')"
status=0
started=$SECONDS
"$v3bench" bench $size --device cpu --out "$out" "${resume[@]}" > "$out/bench.log" || status=$?
echo "bench: $((SECONDS - started)) s, exit code $status: $(tail -1 "$out/bench.log")"
[ $status -le 1 ] || exit $status
if [ $peers = 1 ]; then
  cases=decode:1:1024,decode:8:1024,decode:32:1024,decode:1:4096,decode:1:16384,prefill:1:1024,prefill:1:4096
  rounds=5
  if [ $size = --quick ]; then cases=decode:1:128; rounds=2; fi
  scripts/peers/run.py --v3bench "$v3bench" --out "$out/peers" --cases $cases --rounds $rounds || status=1
  # Random weights made by v3bench: half an hour each, most of it loading and filling the peers' caches; a model that does
  # not fit here says what it lacks.
  models="v2-lite v3-layer"; cases=decode:1:1024,decode:8:1024,decode:32:1024,prefill:1:512; rounds=3; seconds=2
  if [ $size = --quick ]; then models=steered; cases=decode:2:128,prefill:1:64; rounds=1; seconds=0.1; fi
  for model in $models; do
    # Of one layer llama.cpp would leave out the experts of all rows but the last.
    outputs=last; if [ $model = v3-layer ]; then outputs=all; fi
    scripts/peers/run.py --v3bench "$v3bench" --out "$out/peers" --append --model $model --cases $cases \
      --rounds $rounds --seconds $seconds --outputs $outputs || status=1
  done
fi
if [ $size = --quick ]; then
  "$v3bench" closure --quick --op forward_decode --out "$out" > "$out/closure.log" || status=1
else
  "$v3bench" closure --full --out "$out" > "$out/closure.log" || status=1
fi
# What the table shows comes from the files alone.
{ "$v3bench" table "$out"; if [ $peers = 1 ]; then echo; echo "# The whole model beside its peers"; echo; "$v3bench" table "$out/peers/bench.csv"; fi; } | tr -s ' ' > "$out/TABLES.md"
echo "$out/TABLES.md: $((SECONDS - started)) s in all"
exit $status
