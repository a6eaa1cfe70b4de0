#!/usr/bin/env python3
"""Whole-model peers beside ours: same model, same weights, same minutes.

    scripts/peers/run.py --out DIR [--model model/tiny-v3] [--cases decode:1:1024,prefill:1:1024] [--rounds 5]
    scripts/peers/run.py --out DIR --append --model v2-lite[:LAYERS] | v3-layer    random weights, made by v3bench

Sets up its own Python environment (setup.sh), writes the model for each peer, compares each peer's logits with ours,
then takes turns: a round is a slice of time for v3bench and one for each peer. Models that do not fit into memory three
times are held by one process at a time: a turn then loads the model and goes through all cases. Their row of ours is
checked by the peers' logits, not by the reference (minutes a case; `bench --full` does that), and of the cached context
of a batch the peers compute the first sequence and copy it to the others.
Rows of bench.csv's schema go to DIR/bench.csv: forward_decode.cpu_backend, .cpu_transformers, .cpu_llamacpp. A peer whose
logits do not agree, or that does not run, gets a row that says so, and no time. A case is decode:B:S (one token of B
sequences, S cached) or prefill:B:T. Ends with 0 when every peer that runs agreed, 1 otherwise, 64 for bad usage.
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
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from models import Model, available_memory, free_disk, parse_cases, tokens_of  # noqa: E402

ROOT = HERE.parent.parent
PEERS = ("transformers", "llamacpp")
CHECK_TOKENS = 192
BARS = {"forward_decode": 1.5, "forward_prefill": 3.0}


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
        self.process.stdout.close()


def run(command):
    return subprocess.run([str(c) for c in command], text=True, capture_output=True)


def bench_row(v3bench, case_text, op, seconds, scratch, made):
    """One slice of ours: its own row of bench.csv, or a reason."""
    out = Path(scratch) / "ours"
    how = ["--cache", "cold", "--unchecked"] if made else ["--cache", "hot"]
    done = run([v3bench, "bench", "--op", op, "--impl", "cpu_backend", "--case", case_text, *how,
                "--min-time", seconds, "--rounds", "1", "--out", out])
    try:
        with open(out / "bench.csv", newline="") as f:
            return next(csv.DictReader(f)), ""
    except (OSError, StopIteration):
        return None, (done.stderr or done.stdout).strip().splitlines()[-1:]


def prepare(a, model, python, context):
    """The model as the peers read it: (folder for transformers, GGUF file)."""
    if model.made:
        why = model.why_not(available_memory(), free_disk(model.where))
        if why:
            sys.exit(f"run.py: {model.name}: {why}")
        case = {"B": 1, "T": 1, "s0": 0}
        done = run([a.v3bench, "export", "--case", model.case_text(case), "--out", model.folder])
        if done.returncode != 0:
            sys.exit(f"run.py: v3bench export: {(done.stderr or done.stdout).strip()}")
    done = run([python, HERE / "export_model.py", model.folder, model.where, context])
    if done.returncode != 0:
        sys.exit(f"run.py: export: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return model.where / "hf", model.where / "model.gguf"


def check_peer(worker, ids, mine, tolerance):
    if worker.why:
        return "unsupported", worker.why, None
    got = worker.ask(do="logits", ids=ids)
    if "error" in got:
        return "unsupported", got["error"], None
    rel, top1 = disagreement(mine, read_npy(got["logits"]))
    note = f"logits of {len(ids)} tokens against ours: relative error {rel:.2e}, same first choice {100 * top1:.1f}%"
    return ("passed" if rel <= tolerance else "failed"), note, rel


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--model", default=str(ROOT / "model/tiny-v3"), help="checkpoint folder, or v2-lite, v3-layer, steered [:LAYERS]")
    ap.add_argument("--keep", action="store_true", help="leave the written model of random weights in build/peers")
    ap.add_argument("--peers", default=",".join(PEERS), help="which of them")
    ap.add_argument("--beside", type=int, default=0, help="so many busy loops run beside everything: a machine that is not ours alone")
    ap.add_argument("--turns", choices=("together", "alone"), help="all processes hold the model, or one at a time")
    ap.add_argument("--outputs", choices=("last", "all"), default="last",
                    help="rows whose logits llama.cpp is asked for: its other rows skip the last layer's FFN, which is "
                         "most of a model of one layer; all multiplies every row by the head too")
    ap.add_argument("--cases", default="decode:1:1024,decode:8:1024,decode:32:1024,decode:1:4096,prefill:1:1024")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--seconds", type=float, default=0.3, help="of samples for each in each round and case")
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--v3bench", type=Path, default=ROOT / "build/release/v3bench")
    ap.add_argument("--python", help="of an environment that is set up already; skips setup.sh")
    ap.add_argument("--append", action="store_true", help="keep the rows of DIR/bench.csv")
    a = ap.parse_args()
    cases = parse_cases(a.cases)
    a.peers = a.peers.split(",")
    if not set(a.peers) <= set(PEERS):
        sys.exit(f"run.py: --peers: {' and '.join(PEERS)} are there")
    python = a.python
    if not python:
        done = subprocess.run([str(HERE / "setup.sh")], stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            sys.exit("run.py: the peers' environment could not be set up")
        python = done.stdout.strip().splitlines()[-1] + "/bin/python"
    sys.exit(measure(a, cases, python))


class Peer:
    """A peer over the rounds: its process, its verdict (once), the samples of each case."""

    def __init__(self, name, start, check, cases):
        self.name, self.start, self.check = name, start, check
        self.worker, self.what, self.verdict = None, "", None
        self.slices, self.broken = [[] for _ in cases], {}

    def open(self):
        if self.worker is None and (self.verdict is None or self.verdict[0] == "passed"):
            self.worker = self.start(self.name)
            self.what = self.worker.what or self.what
            if self.verdict is None:
                self.verdict = self.check(self.worker)
                print(f"{self.name}: {self.what or 'not running'}: {self.verdict[0]}: {self.verdict[1]}", flush=True)

    def close(self):
        if self.worker is not None:
            self.worker.close()
            self.worker = None

    def slice(self, i, **task):
        if self.worker is None or self.verdict[0] != "passed" or i in self.broken:
            return
        got = self.worker.ask(do="time", **task)
        if "error" in got:
            self.broken[i] = got["error"]
        else:
            self.slices[i].append(got["samples_us"])


def measure(a, cases, python):
    model = Model(a.model, ROOT / "build/peers")
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(a.beside)]
    try:
        return measure_model(a, model, cases, python)
    finally:
        for process in busy:
            process.kill()
            process.wait()
        if model.made and not a.keep:
            shutil.rmtree(model.where, ignore_errors=True)


def measure_model(a, model, cases, python):
    # The exported folder is the same for all contexts up to this.
    context = max(16384, *(c["s0"] + c["T"] for c in cases)) + 64
    hf, gguf = prepare(a, model, python, context)
    alone = (a.turns or ("alone" if model.made and 4 * model.bytes() > available_memory() else "together")) == "alone"
    vocab = model.shape["V"]
    scratch = tempfile.mkdtemp(prefix="v3bench_peers_")
    rng = random.Random(7)
    ids = [rng.randrange(vocab) for _ in range(CHECK_TOKENS)]
    tokens = Path(scratch) / "ids.txt"
    tokens.write_text(" ".join(map(str, ids)))
    ours_npy = Path(scratch) / "ours.npy"
    done = run([a.v3bench, "logits", "--model", model.folder, "--tokens", tokens, "--backend", "cpu", "--dtype", "bf16",
                "--out", ours_npy, "--threads", a.threads])
    if done.returncode != 0:
        sys.exit(f"run.py: v3bench logits: {(done.stderr or done.stdout).strip()}")
    mine = read_npy(ours_npy)
    peers = [Peer(p, lambda n: Worker(python, n, hf if n == "transformers" else gguf, a.threads, context, scratch),
                  lambda w: check_peer(w, ids, mine, model.tolerance), cases) for p in a.peers]
    ours = [[] for _ in cases]

    def turn_of_ours(group):
        for i in group:
            row, why = bench_row(a.v3bench, model.case_text(cases[i]), cases[i]["op"], a.seconds, scratch, model.made)
            if row is None or not row["median_us"]:
                sys.exit(f"run.py: ours did not run: {why or row['reason']}")
            ours[i].append(row)

    def turn_of(peer, group):
        peer.open()
        for i in group:
            peer.slice(i, ids=tokens_of(cases[i], vocab), T=cases[i]["T"], seconds=a.seconds, copied=model.made,
                       outputs=a.outputs)
        if alone:
            peer.close()

    columns, rows = None, []
    everything = list(range(len(cases)))
    for group in ([everything] if alone else [[i] for i in everything]):
        for _ in range(a.rounds):
            turn_of_ours(group)
            for peer in peers:
                turn_of(peer, group)
        for i in group:
            columns = columns or list(ours[i][0].keys())
            part = case_rows(a, model, cases[i], ours[i], peers, i, alone, columns)
            report(cases[i], part)
            rows += part
        write(a.out, columns, rows, a.append)
    for peer in peers:
        peer.close()
    shutil.rmtree(scratch, ignore_errors=True)
    return 0 if all(p.verdict[0] != "failed" for p in peers) else 1


def case_rows(a, model, case, ours, peers, i, alone, columns):
    """Ours (the median over the rounds of each slice's own figures) and one row a peer."""
    common = f"rounds={a.rounds};seconds={a.seconds};threads={a.threads};interleaved=1;model={model.text if model.made else model.name}"
    common += f";beside={a.beside}" if a.beside else ""
    common += f";turns={'alone' if alone else 'together'}" + (";context=copied" if model.made and case["s0"] else "")
    common += f";outputs={a.outputs}" if case["T"] > 1 else ""
    last = ours[-1]
    first = dict(last, params=last["params"] + ";" + common, min_us=min(float(r["min_us"]) for r in ours),
                 samples=sum(int(float(r["samples"])) for r in ours), stop_reason="budget",
                 **{k: statistics.median(float(r[k]) for r in ours) for k in ("q1_us", "median_us", "q3_us")})
    repro = f"scripts/peers/run.py --model {model.text if model.made else model.name} --cases {case['op'][8:]}:{case['B']}:{case['s0'] or case['T']}" + ("" if a.outputs == "last" else f" --outputs {a.outputs}")
    if model.made:  # ours came without a reference: it stands or falls with the peers
        agreed = [p for p in peers if p.verdict[0] == "passed"]
        differ = [p for p in peers if p.verdict[0] == "failed"]
        first.update(repro=repro)
        if differ or agreed:
            first.update(status="failed" if differ else "passed", reason="; ".join(f"{p.name}: {p.verdict[1]}" for p in differ or agreed))
    flop, size = float(last["flop"]), float(last["bytes"])
    roofs = [float(r["pct_of_roof"]) / 100 * float(r["median_us"]) for r in ours if r["pct_of_roof"]]
    roof_us = min(roofs) if roofs else None  # the best probe counts: memory may be faster in one round than in another
    rows = [rated(first, flop, size, roof_us)]
    for p in peers:
        status, note, rel = p.verdict
        row = {k: "" for k in columns}
        row.update({k: last[k] for k in ("schema_version", "run_id", "commit", "dirty", "machine", "device", "op",
                                         "case", "dtype", "cache_state", "flop", "bytes")})
        row.update(impl=f"{case['op']}.cpu_{p.name}", resolved_isa=p.what, status=status, reason=note, peer="1",
                   params=common + f";tolerance={model.tolerance:.3g}", rel_fro_err="" if rel is None else repr(rel),
                   err_over_bound="" if rel is None else repr(rel / model.tolerance), utc_time=now(), repro=repro)
        if i in p.broken:
            row.update(status="error", reason=p.broken[i])
        elif p.slices[i]:
            per = [quartiles(s) for s in p.slices[i]]
            row.update({k: statistics.median(q[k] for q in per) for k in ("q1_us", "median_us", "q3_us", "stdrel_pct")},
                       min_us=min(q["min_us"] for q in per), samples=sum(q["samples"] for q in per),
                       stop_reason="budget")
            row = rated(row, flop, size, roof_us, last["roof"])
        rows.append(row)
    return rows


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
