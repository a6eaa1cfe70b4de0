"""Which model, which cases, which tokens: what run.py asks of v3bench and gives to the peers.

A model is a checkpoint folder, or NAME[:LAYERS] of one that v3bench makes itself (random weights, SHAPES below; the keys
are those of `v3bench bench --case`): its weights are written once by `v3bench export`, so all run the same bits.
"""

import json
import math
import os
import shutil
import sys
from pathlib import Path

# V2-Lite's widths with this project's gate; one layer of V3 with 64 experts; a small one, for tests. As the lists of
# bench/ops/forward_*.cpp have them.
SHAPES = {
    "v2-lite": "L=7,L_d=1,d=2048,n_h=16,d_n=128,d_r=64,d_v=128,d_q=0,d_c=512,f=10944,m=1408,E=64,N_s=2,K=6,G=1,M=1,V=102400",
    "v3-layer": "L=1,L_d=0,d=7168,n_h=128,d_n=128,d_r=64,d_v=128,d_q=1536,d_c=512,f=512,m=2048,E=64,N_s=1,K=8,G=8,M=4,V=4096",
    "steered": "L=4,L_d=1,d=256,n_h=8,d_n=32,d_r=16,d_v=32,d_q=96,d_c=64,f=512,m=128,E=16,N_s=1,K=4,G=4,M=2,V=4096",
}
# Relative Frobenius error of all logits against ours, both computing in bf16 on other orders of sums: twice what is
# allowed to one of them against the reference (SPEC 0.6 for the shipped model; bench/ops/forward_common.cpp for steered
# ones, whose residual stream is dominated by the embedding, so that small errors mean more).
TRAINED_TOLERANCE = 6e-2


class Model:
    def __init__(self, text, build):
        self.text = str(text)
        name, _, layers = self.text.partition(":")
        self.made = name in SHAPES
        if not self.made:
            self.folder = Path(text)
            self.name = self.folder.name
            self.config = json.loads((self.folder / "config.json").read_text())
            c = self.config
            self.shape = {"L": c["num_hidden_layers"], "L_d": c["first_k_dense_replace"], "d": c["hidden_size"],
                          "n_h": c["num_attention_heads"], "d_n": c["qk_nope_head_dim"], "d_r": c["qk_rope_head_dim"],
                          "d_v": c["v_head_dim"], "d_q": c.get("q_lora_rank") or 0, "d_c": c["kv_lora_rank"],
                          "f": c["intermediate_size"], "m": c["moe_intermediate_size"], "E": c["n_routed_experts"],
                          "N_s": c["n_shared_experts"], "K": c["num_experts_per_tok"], "G": c["n_group"],
                          "M": c["topk_group"], "V": c["vocab_size"]}
            self.tolerance = TRAINED_TOLERANCE
            self.where = build / self.name
            return
        self.shape = {k: int(v) for k, v in (pair.split("=") for pair in SHAPES[name].split(","))}
        if layers:
            if not layers.isdigit() or int(layers) <= self.shape["L_d"]:
                sys.exit(f"run.py: {text}: more than {self.shape['L_d']} layers, please")
            self.shape["L"] = int(layers)
        self.name = f"{name}-{self.shape['L']}"
        self.where = build / self.name
        self.folder = self.where / "hf"
        self.tolerance = 2 * 1.7e-3 * math.sqrt(2 * self.shape["L"] + 1)

    def bytes(self):
        """Of its matrices in bf16."""
        s = self.shape
        q = s["d_q"] * s["d"] + s["n_h"] * (s["d_n"] + s["d_r"]) * (s["d_q"] or s["d"])
        attention = q + s["d"] * (s["d_c"] + s["d_r"]) + s["n_h"] * (s["d_n"] + s["d_v"]) * s["d_c"] + s["n_h"] * s["d_v"] * s["d"]
        moe = s["d"] * s["E"] + 3 * s["d"] * s["m"] * (s["E"] + s["N_s"])
        return 2 * (s["L"] * attention + s["L_d"] * 3 * s["d"] * s["f"] + (s["L"] - s["L_d"]) * moe + 2 * s["V"] * s["d"])

    def case_text(self, case):
        """Keys of reference/spec/forward.h. Contexts of ours are made-up rows: their values cost nothing, their length does."""
        pairs = {"B": case["B"], "T": case["T"], "s0": case["s0"], **self.shape,
                 "context": "rows" if case["s0"] else "tokens", "weights": "steered" if self.made else "tiny_v3"}
        return ",".join(f"{k}={v}" for k, v in pairs.items())

    def why_not(self, available, disk):
        """What it lacks to be run here, or ""."""
        if not self.made:
            return ""
        gb = self.bytes() / 1e9
        if available < 2.2 * self.bytes():  # a peer may hold the file's pages and its own copy
            return f"needs {2.2 * gb:.1f} GB of memory, {available / 1e9:.1f} GB are free"
        if disk < 2.2 * self.bytes():
            return f"needs {2.2 * gb:.1f} GB in {self.where.parent}, {disk / 1e9:.1f} GB are free"
        return ""


def parse_cases(text):
    out = []
    for item in text.split(","):
        parts = item.split(":")
        if len(parts) != 3 or parts[0] not in ("decode", "prefill") or not all(p.isdigit() and int(p) for p in parts[1:]):
            sys.exit(f"run.py: bad case {item!r}; decode:B:S or prefill:B:T")
        kind, b, n = parts[0], int(parts[1]), int(parts[2])
        out.append({"op": "forward_" + kind, "B": b, "T": 1 if kind == "decode" else n, "s0": n if kind == "decode" else 0})
    return out


MASK = (1 << 64) - 1


def _mix(z):  # model/rng.h
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def tokens_of(case, vocab, seed=1):
    """[B][s0 + T], the very tokens of `v3bench bench --seed 1`: a step's tokens decide which experts it reads."""
    stream = _mix(_mix(seed) ^ 1)
    n = case["s0"] + case["T"]
    return [[_mix(stream ^ (b * n + i)) * vocab >> 64 for i in range(n)] for b in range(case["B"])]


def available_memory():
    with open("/proc/meminfo") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def free_disk(path):
    path = Path(path)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free if os.access(path, os.W_OK) else 0
