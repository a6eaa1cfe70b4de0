#!/usr/bin/env python3
"""The resource table of a CUDA build, from the ptxas logs that scripts/cuda_compile.py left beside the objects.

usage: scripts/cuda_resources.py BUILD_DIR --out resources.csv
One line a kernel and architecture: file, kernel, arch, registers, shared_bytes (static), stack_bytes,
spill_store_bytes, spill_load_bytes. Ends with 1 when a tensor-core kernel (a file whose name has mma, wgmma or
cutlass in it) spills on sm_80 or sm_90a, or when there is no log at all: an unproven build is a failed one.
"""
import argparse
import csv
import pathlib
import re
import subprocess
import sys

COLUMNS = ["file", "kernel", "arch", "registers", "shared_bytes", "stack_bytes", "spill_store_bytes", "spill_load_bytes"]
TENSOR_CORE = re.compile(r"mma|cutlass")
# The architectures that the kernels are written for. Blackwell runs the same code without its own tensor instructions;
# ptxas allocates differently there, and its spills are printed, not fatal, until somebody tunes for it.
GATED = re.compile(r"sm_(80|90)")


def read_log(path: pathlib.Path) -> list[dict]:
    """Kernels in the order of the log; an entry is complete when its "Used N registers" line came."""
    rows, row = [], None
    source = path.name.removesuffix(".ptxas").removesuffix(".o")
    for line in path.read_text().splitlines():
        if m := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
            row = dict.fromkeys(COLUMNS, 0) | {"file": source, "kernel": m[1], "arch": m[2], "registers": None}
            rows.append(row)
        elif row is None:
            continue
        elif m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # Before "Used" it is the kernel's own line; a function that is really called has one of its own behind
            # it, and counts with the kernel.
            for column, value in zip(COLUMNS[5:], m.groups()):
                row[column] = max(row[column], int(value))
        elif m := re.search(r"Used (\d+) registers", line):
            row["registers"] = int(m[1])
            shared = re.search(r"(\d+) bytes smem", line)
            row["shared_bytes"] = int(shared[1]) if shared else 0
    for r in rows:
        if r["registers"] is None:
            raise SystemExit(f"cuda_resources: {path}: no register count for {r['kernel']} on {r['arch']}")
    return rows


def demangle(rows: list[dict]) -> None:
    try:
        names = subprocess.run(["c++filt"], input="\n".join(r["kernel"] for r in rows), text=True,
                               capture_output=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return  # mangled names are still right
    for r, name in zip(rows, names):
        name = re.sub(r"^void ", "", re.sub(r"\(anonymous namespace\)::|_NV_ANON_NAMESPACE::|v3b::kern::", "", name))
        depth = 0
        for i, c in enumerate(name):  # the argument list: the first ( outside of < >
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0 and i > 0:
                name = name[:i]
                break
        r["kernel"] = name


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    logs = [p for p in sorted(args.build.rglob("*.ptxas")) if p.with_suffix("").exists()]
    rows = [r for p in logs for r in read_log(p)]
    if not rows:
        print(f"cuda_resources: no ptxas log under {args.build}", file=sys.stderr)
        return 1
    demangle(rows)
    rows.sort(key=lambda r: (r["file"], r["kernel"], r["arch"]))
    with open(args.out, "w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    spills = [r for r in rows if r["spill_store_bytes"] + r["spill_load_bytes"] > 0]
    bad = 0
    for r in spills:
        wrong = TENSOR_CORE.search(r["file"]) is not None and GATED.match(r["arch"]) is not None
        bad += wrong
        print(f"cuda_resources: {'ERROR' if wrong else 'note'}: {r['file']}: {r['kernel']} on {r['arch']} spills "
              f"{r['spill_store_bytes']} bytes of stores, {r['spill_load_bytes']} of loads", file=sys.stderr)
    print(f"{args.out.name}: {len(rows)} kernels x architectures, {len(spills)} spill, {bad} of them in tensor-core files")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
