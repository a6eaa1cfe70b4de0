#!/usr/bin/env python3
"""Adds the CUDA implementations that passed on a GPU to kernels/hardware_runs.csv.

usage: scripts/record_hardware.py DIR [--into kernels/hardware_runs.csv]
DIR holds the bench.csv of a run. An implementation is added for a GPU and commit when at least one of its rows there
passed and none failed, was an error, or faulted. A dirty commit is written with a `+`. Emulated rows never count.
"""
import argparse
import csv
import pathlib
import sys

HEADER = ["impl", "gpu", "date", "commit"]
NO_GPU = {"", "cpu", "cuda", "cuda_emulated"}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir", type=pathlib.Path)
    parser.add_argument("--into", type=pathlib.Path,
                        default=pathlib.Path(__file__).resolve().parent.parent / "kernels" / "hardware_runs.csv")
    args = parser.parse_args()
    source = args.dir / "bench.csv"
    if not source.exists():
        print(f"record_hardware: {source} does not exist", file=sys.stderr)
        return 66
    runs: dict[tuple, dict] = {}
    with open(source, newline="") as f:
        for row in csv.DictReader(f):
            if row["device"] in NO_GPU:
                continue
            commit = row["commit"] + ("+" if row["dirty"] == "1" else "")
            run = runs.setdefault((row["impl"], row["device"].replace(",", " "), commit), {"passed": 0, "bad": 0, "date": ""})
            run["passed"] += row["status"] in ("passed", "suspect")
            run["bad"] += row["status"] in ("failed", "error")
            run["date"] = max(run["date"], row["utc_time"][:10])
    known = set()
    if args.into.exists():
        with open(args.into, newline="") as f:
            known = {(r["impl"], r["gpu"], r["commit"]) for r in csv.DictReader(f)}
    new = [key for key, run in sorted(runs.items()) if run["passed"] and not run["bad"] and key not in known]
    fresh = not args.into.exists()
    with open(args.into, "a", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        if fresh:
            writer.writerow(HEADER)
        for impl, gpu, commit in new:
            writer.writerow([impl, gpu, runs[impl, gpu, commit]["date"], commit])
    refused = sorted({key[0] for key, run in runs.items() if run["bad"]})
    print(f"{args.into}: {len(new)} lines added" + (f"; not passed: {' '.join(refused)}" if refused else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main())
