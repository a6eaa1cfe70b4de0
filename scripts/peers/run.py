#!/usr/bin/env python3
"""Whole-model peers beside ours: same model, same weights, same minutes.

    scripts/peers/run.py --out DIR [--model model/tiny-v3] [--cases decode:1:1024,prefill:1:1024] [--rounds 5]

Sets up its own Python environment (setup.sh), exports the checkpoint, compares each peer's logits with ours, then takes
turns: a round is a slice of time for v3bench and one for each peer. Rows of bench.csv's schema go to DIR/bench.csv:
forward_decode.cpu_backend, .cpu_transformers, .cpu_llamacpp. A peer whose logits do not agree, or that does not run,
gets a row that says so, and no time. A case is decode:B:S (one token of B sequences, S cached) or prefill:B:T.
Ends with 0 when every peer that runs agreed, 1 otherwise, 64 for bad usage.
"""

import argparse
import array
import ast
import csv
import datetime
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PEERS = ("transformers", "llamacpp")
CHECK_TOKENS = 192
# Relative Frobenius error of all logits against ours, both computing in bf16 on other orders of sums: twice what SPEC
# 0.6 allows one of them against float64. A wrong gate, rotation or head is above 0.3.
TOLERANCE = 6e-2
BARS = {"forward_decode": 1.5, "forward_prefill": 3.0}


def parse_cases(text):
    out = []
    for item in text.split(","):
        parts = item.split(":")
        if len(parts) != 3 or parts[0] not in ("decode", "prefill") or not all(p.isdigit() and int(p) for p in parts[1:]):
            sys.exit(f"run.py: bad case {item!r}; decode:B:S or prefill:B:T")
        kind, b, n = parts[0], int(parts[1]), int(parts[2])
        out.append({"op": "forward_" + kind, "B": b, "T": 1 if kind == "decode" else n, "s0": n if kind == "decode" else 0})
    return out


def disagreement(mine, theirs):
    """Relative Frobenius error and top-1 agreement; NaN where shapes differ, which fails every comparison."""
    (shape, a), (other, b) = mine, theirs
    if shape != other or not a:
        return float("nan"), 0.0
    wrong, size = math.fsum((x - y) ** 2 for x, y in zip(a, b)), math.fsum(x * x for x in a)
    width = shape[-1]
    first = lambda v, r: max(range(r * width, (r + 1) * width), key=v.__getitem__)  # noqa: E731
    rows = len(a) // width
    same = sum(first(a, r) == first(b, r) for r in range(rows))
    return (math.sqrt(wrong / size) if size > 0 else float("nan")), same / rows


def read_npy(path):
    """(shape, values) of a float32 array in C order."""
    data = Path(path).read_bytes()
    if data[:6] != b"\x93NUMPY":
        raise ValueError(f"{path} is no .npy file")
    at, width = (10, 2) if data[6] == 1 else (12, 4)
    end = at + int.from_bytes(data[8 : 8 + width], "little")
    head = ast.literal_eval(data[at:end].decode())
    if head["descr"] != "<f4" or head["fortran_order"]:
        raise ValueError(f"{path}: float32 in C order expected")
    values = array.array("f")
    values.frombytes(data[end:])
    return tuple(head["shape"]), values


def quartiles(samples):
    s = sorted(samples)
    at = lambda q: s[min(len(s) - 1, int(q * (len(s) - 1) + 0.5))]  # noqa: E731
    return {"samples": len(s), "min_us": s[0], "q1_us": at(0.25), "median_us": statistics.median(s), "q3_us": at(0.75),
            "stdrel_pct": 100 * statistics.pstdev(s) / statistics.fmean(s) if len(s) > 1 else 0.0}


class Worker:
    def __init__(self, python, peer, model, threads, context, scratch):
        self.peer, self.why, self.what = peer, "", ""
        self.process = subprocess.Popen(
            [python, str(HERE / "worker.py"), "--peer", peer, "--model", str(model), "--threads", str(threads),
             "--context", str(context), "--scratch", scratch],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        first = self.read()
        self.what = first.get("what", "")
        self.why = first.get("error", "")

    def read(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}

    def ask(self, **task):
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            pass
        return self.read()

    def close(self):
        try:
            self.process.stdin.close()
        except OSError:
            pass
        self.process.wait()


def run(command):
    return subprocess.run([str(c) for c in command], text=True, capture_output=True)


def bench_row(v3bench, case_text, op, seconds, scratch):
    """One slice of ours: its own row of bench.csv, or a reason."""
    out = Path(scratch) / "ours"
    done = run([v3bench, "bench", "--op", op, "--impl", "cpu_backend", "--case", case_text, "--cache", "hot",
                "--min-time", seconds, "--rounds", "1", "--out", out])
    try:
        with open(out / "bench.csv", newline="") as f:
            return next(csv.DictReader(f)), ""
    except (OSError, StopIteration):
        return None, (done.stderr or done.stdout).strip().splitlines()[-1:]


def case_text(config, case):
    """Keys of reference/spec/forward.h. Contexts of ours are made-up rows: their values cost nothing, their length does."""
    c = config
    pairs = {"B": case["B"], "T": case["T"], "s0": case["s0"], "L": c["num_hidden_layers"],
             "L_d": c["first_k_dense_replace"], "d": c["hidden_size"], "n_h": c["num_attention_heads"],
             "d_n": c["qk_nope_head_dim"], "d_r": c["qk_rope_head_dim"], "d_v": c["v_head_dim"],
             "d_q": c.get("q_lora_rank") or 0, "d_c": c["kv_lora_rank"], "f": c["intermediate_size"],
             "m": c["moe_intermediate_size"], "E": c["n_routed_experts"], "N_s": c["n_shared_experts"],
             "K": c["num_experts_per_tok"], "G": c["n_group"], "M": c["topk_group"], "V": c["vocab_size"],
             "context": "rows" if case["s0"] else "tokens", "weights": "tiny_v3"}
    return ",".join(f"{k}={v}" for k, v in pairs.items())


def check_peer(worker, ids, mine):
    if worker.why:
        return "unsupported", worker.why, None
    got = worker.ask(do="logits", ids=ids)
    if "error" in got:
        return "unsupported", got["error"], None
    rel, top1 = disagreement(mine, read_npy(got["logits"]))
    note = f"logits of {len(ids)} tokens against ours: relative error {rel:.2e}, same first choice {100 * top1:.1f}%"
    return ("passed" if rel <= TOLERANCE else "failed"), note, rel


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--model", type=Path, default=ROOT / "model/tiny-v3")
    ap.add_argument("--cases", default="decode:1:1024,decode:8:1024,decode:32:1024,decode:1:4096,prefill:1:1024")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--seconds", type=float, default=0.3, help="of samples for each in each round")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--v3bench", type=Path, default=ROOT / "build/release/v3bench")
    ap.add_argument("--python", help="of an environment that is set up already; skips setup.sh")
    ap.add_argument("--append", action="store_true", help="keep the rows of DIR/bench.csv")
    a = ap.parse_args()
    cases = parse_cases(a.cases)
    python = a.python
    if not python:
        done = subprocess.run([str(HERE / "setup.sh")], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit("run.py: the peers' environment could not be set up")
        python = done.stdout.strip().splitlines()[-1] + "/bin/python"
    sys.exit(measure(a, cases, python))


def measure(a, cases, python):
    # The exported folder is the same for all contexts up to this.
    context = max(16384, *(c["s0"] + c["T"] for c in cases)) + 64
    folder = ROOT / "build/peers" / a.model.name
    done = run([python, HERE / "export_model.py", a.model, folder, context])
    if done.returncode != 0:
        sys.exit(f"run.py: export: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    hf, gguf = folder / "hf", folder / "model.gguf"
    config = json.loads((a.model / "config.json").read_text())
    vocab = config["vocab_size"]
    scratch = tempfile.mkdtemp(prefix="v3bench_peers_")
    rng = random.Random(7)
    ids = [rng.randrange(vocab) for _ in range(CHECK_TOKENS)]
    tokens = Path(scratch) / "ids.txt"
    tokens.write_text(" ".join(map(str, ids)))
    ours_npy = Path(scratch) / "ours.npy"
    done = run([a.v3bench, "logits", "--model", a.model, "--tokens", tokens, "--backend", "cpu", "--dtype", "bf16",
                "--out", ours_npy, "--threads", a.threads])
    if done.returncode != 0:
        sys.exit(f"run.py: v3bench logits: {(done.stderr or done.stdout).strip()}")
    mine = read_npy(ours_npy)
    workers = {p: Worker(python, p, hf if p == "transformers" else gguf, a.threads, context, scratch) for p in PEERS}
    verdicts = {p: check_peer(w, ids, mine) for p, w in workers.items()}
    for p, (status, note, _) in verdicts.items():
        print(f"{p}: {workers[p].what or 'not running'}: {status}: {note}", flush=True)

    rows, columns = [], None
    for case in cases:
        long_ids = [[rng.randrange(vocab) for _ in range(case["s0"] + case["T"])] for _ in range(case["B"])]
        text = case_text(config, case)
        ours, medians, slices = None, [], {p: [] for p in PEERS}
        broken = {}
        for _ in range(a.rounds):
            row, why = bench_row(a.v3bench, text, case["op"], a.seconds, scratch)
            if row is None or not row["median_us"]:
                sys.exit(f"run.py: ours did not run: {why or row['reason']}")
            ours = row
            medians.append({k: float(row[k]) for k in ("min_us", "q1_us", "median_us", "q3_us", "samples")})
            for p, w in workers.items():
                if verdicts[p][0] != "passed" or p in broken:
                    continue
                got = w.ask(do="time", ids=long_ids, T=case["T"], seconds=a.seconds)
                if "error" in got:
                    broken[p] = got["error"]
                else:
                    slices[p].append(got["samples_us"])
        columns = columns or list(ours.keys())
        common = f"rounds={a.rounds};seconds={a.seconds};threads={a.threads};interleaved=1"
        # Ours: the median over the rounds of each slice's own figures.
        mid = {k: statistics.median(m[k] for m in medians) for k in ("q1_us", "median_us", "q3_us")}
        first = dict(ours, params=ours["params"] + ";" + common, min_us=min(m["min_us"] for m in medians),
                     samples=int(sum(m["samples"] for m in medians)), stop_reason="budget", **mid)
        flop, size = float(ours["flop"]), float(ours["bytes"])
        roof_us = float(ours["pct_of_roof"]) / 100 * float(ours["median_us"]) if ours["pct_of_roof"] else None
        rows.append(rated(first, flop, size, roof_us))
        for p in PEERS:
            status, note, rel = verdicts[p]
            row = {k: "" for k in columns}
            row.update({k: ours[k] for k in ("schema_version", "run_id", "commit", "dirty", "machine", "device", "op",
                                             "case", "dtype", "cache_state", "flop", "bytes")})
            row.update(impl=f"{case['op']}.cpu_{p}", resolved_isa=workers[p].what, status=status, reason=note, peer="1",
                       params=common + f";tolerance={TOLERANCE}", rel_fro_err="" if rel is None else repr(rel),
                       err_over_bound="" if rel is None else repr(rel / TOLERANCE), utc_time=now(),
                       repro=f"scripts/peers/run.py --cases {case['op'][8:]}:{case['B']}:{case['s0'] or case['T']}")
            if p in broken:
                row.update(status="error", reason=broken[p])
            elif slices[p]:
                per = [quartiles(s) for s in slices[p]]
                row.update({k: statistics.median(q[k] for q in per) for k in ("q1_us", "median_us", "q3_us", "stdrel_pct")},
                           min_us=min(q["min_us"] for q in per), samples=sum(q["samples"] for q in per),
                           stop_reason="budget")
                row = rated(row, flop, size, roof_us, ours["roof"])
            rows.append(row)
        report(case, rows[-1 - len(PEERS):])
        write(a.out, columns, rows, a.append)
    for w in workers.values():
        w.close()
    return 0 if all(v[0] != "failed" for v in verdicts.values()) else 1


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def rated(row, flop, size, roof_us, roof=None):
    us = float(row["median_us"])
    row["gflop_s"], row["gb_s"] = flop / us * 1e-3, size / us * 1e-3
    if roof_us:
        row["pct_of_roof"] = 100 * roof_us / us
        row["roof"] = roof or row["roof"]
    return row


def report(case, rows):
    timed = {r["impl"].split(".cpu_")[1]: float(r["median_us"]) for r in rows if r["median_us"] not in ("", None)}
    peers = {k: v for k, v in timed.items() if k != "backend"}
    line = f"{case['op']} B={case['B']} T={case['T']} s0={case['s0']}: ours {timed['backend']:.0f} us"
    for k, v in peers.items():
        line += f", {k} {v:.0f} us"
    if peers:
        best = min(peers, key=peers.get)
        line += f"; {peers[best] / timed['backend']:.2f}x {best} (bar {BARS[case['op']]}x)"
    print(line, flush=True)


def write(out, columns, rows, append):
    out.mkdir(parents=True, exist_ok=True)
    path = out / "bench.csv"
    old = []
    if append and path.exists():
        keys = {(r["impl"], r["case"]) for r in rows}
        with open(path, newline="") as f:
            old = [r for r in csv.DictReader(f) if (r["impl"], r["case"]) not in keys]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="") as f:
        w = csv.DictWriter(f, columns, lineterminator="\n")
        w.writeheader()
        w.writerows(old + rows)
    temporary.replace(path)


if __name__ == "__main__":
    main()
