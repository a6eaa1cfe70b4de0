#!/usr/bin/env python3
"""Writes tests/goldens/: small random DeepSeek-V3 checkpoints and what transformers computes from them.

    python scripts/make_goldens.py --out tests/goldens [--only CASE ...]
        [--legacy-python /path/to/python-with-transformers-4.57]
        [--tiny-v3 model/tiny-v3]

The contents of every file are described in tests/goldens/README.md. Deterministic: fixed seeds, one
thread, eager attention and experts. Needs torch, transformers >= 5.23, safetensors, numpy.
"""

import argparse
import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hf_reference as hf  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from golden_cases import CASES, rope_table_sets  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

STORAGE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK = 128


# ------------------------------------------------------------------------------------ random checkpoints
def normal(seed, name, shape, std):
    rng = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    return torch.from_numpy(rng.standard_normal(shape) * std)


def layer_shapes(c, l, mtp=False):
    """name -> (shape, std or "norm" or "bias") of one decoder layer."""
    d, h = c["hidden_size"], c["num_attention_heads"]
    dn, dr, dv = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    p = f"model.layers.{l}."
    t = {p + "input_layernorm.weight": ((d,), "norm"),
         p + "post_attention_layernorm.weight": ((d,), "norm")}
    a = p + "self_attn."
    q_rows, dc = h * (dn + dr), c["kv_lora_rank"]
    # queries 2x and keys 1.5x larger than N(0,1/in): softmax far from uniform, so that position matters
    if c["q_lora_rank"] is None:
        t[a + "q_proj.weight"] = ((q_rows, d), 2 / d**0.5)
    else:
        dq = c["q_lora_rank"]
        t[a + "q_a_proj.weight"] = ((dq, d), d**-0.5)
        t[a + "q_a_layernorm.weight"] = ((dq,), "norm")
        t[a + "q_b_proj.weight"] = ((q_rows, dq), 2 / dq**0.5)
    t[a + "kv_a_proj_with_mqa.weight"] = ((dc + dr, d), 1.5 / d**0.5)
    t[a + "kv_a_layernorm.weight"] = ((dc,), "norm")
    t[a + "kv_b_proj.weight"] = ((h * (dn + dv), dc), dc**-0.5)
    t[a + "o_proj.weight"] = ((d, h * dv), (h * dv) ** -0.5)

    def mlp(prefix, f):
        for n in ("gate_proj", "up_proj"):
            t[f"{prefix}{n}.weight"] = ((f, d), 1.5 / d**0.5)
        t[f"{prefix}down_proj.weight"] = ((d, f), 1.5 / f**0.5)

    m = p + "mlp."
    if l < c["first_k_dense_replace"] and not mtp:
        mlp(m, c["intermediate_size"])
        return t
    f = c["moe_intermediate_size"]
    t[m + "gate.weight"] = ((c["n_routed_experts"], d), 1.5 / d**0.5)
    if c["model_type"] == "deepseek_v3":
        t[m + "gate.e_score_correction_bias"] = ((c["n_routed_experts"],), "bias")
    for e in range(c["n_routed_experts"]):
        mlp(f"{m}experts.{e}.", f)
    mlp(m + "shared_experts.", f * c["n_shared_experts"])
    return t


def checkpoint(case):
    """name -> tensor as stored. The seed of a tensor is (case seed, crc32 of its name)."""
    c, seed = case["config"], case["seed"]
    store = STORAGE[case["storage"]]
    d, L, V = c["hidden_size"], c["num_hidden_layers"], c["vocab_size"]
    shapes = {"model.embed_tokens.weight": ((V, d), 1.0)}
    for l in range(L):
        shapes.update(layer_shapes(c, l))
    shapes["model.norm.weight"] = ((d,), "norm")
    shapes["lm_head.weight"] = ((V, d), 2 / d**0.5)
    mtp = c.get("num_nextn_predict_layers", 0)
    if mtp:
        p = f"model.layers.{L}."
        shapes.update(layer_shapes(c, L, mtp=True))
        shapes[p + "enorm.weight"] = ((d,), "norm")
        shapes[p + "hnorm.weight"] = ((d,), "norm")
        shapes[p + "eh_proj.weight"] = ((d, 2 * d), (2 * d) ** -0.5)
        shapes[p + "shared_head.norm.weight"] = ((d,), "norm")
    tensors = {}
    for name, (shape, kind) in shapes.items():
        if kind == "norm":
            t = (1 + normal(seed, name, shape, 0.2)).to(store)
        elif kind == "bias":
            mean, std = case.get("bias", (0.0, 0.2))
            t = (mean + normal(seed, name, shape, std)).to(STORAGE[case.get("bias_storage", "F32")])
        else:
            t = normal(seed, name, shape, kind)
            if case.get("fp8") and len(shape) == 2 and quantised(name):
                tensors.update(quantise(name, t, seed))
                continue
            t = t.to(store)
        tensors[name] = t.contiguous()
    if mtp:  # the checkpoint's copies
        tensors[p + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[p + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def quantised(name):
    kept = ("embed_tokens", "lm_head", ".gate.weight", "eh_proj", "shared_head")
    return not any(k in name for k in kept)


def quantise(name, w, seed):
    """E4M3 with 128x128 blocks, s = max|block|/448. Each block is first scaled by its own power of two
    (0.5..2), so that a reader that takes the wrong block's scale is seen."""
    out, inn = w.shape
    rb, cb = -(-out // BLOCK), -(-inn // BLOCK)
    gain = torch.exp2(normal(seed, name + "#gain", (rb, cb), 1.0).clamp(-1, 1))
    w = w * gain.repeat_interleave(BLOCK, 0)[:out].repeat_interleave(BLOCK, 1)[:, :inn]
    scale = torch.empty(rb, cb, dtype=torch.float32)
    code = torch.empty(out, inn, dtype=torch.float8_e4m3fn)
    for i in range(rb):
        for j in range(cb):
            r, s = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scale[i, j] = float(w[r, s].abs().max()) / 448
            code[r, s] = (w[r, s] / scale[i, j].double()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {name: code, name + "_scale_inv": scale}


def check_dequantise():
    """Our dequantisation against transformers' own, where that one is right: whole blocks. (5.23 derives
    the block from matrix size / scale grid, so it refuses or misreads ragged blocks.)"""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    t = quantise("w", normal(1, "w", (384, 256), 1.0), 1)
    theirs = Fp8Dequantize(None)._dequantize_one(t["w"], t["w_scale_inv"])
    ours = hf.dequantise(t["w"], t["w_scale_inv"])
    if not torch.equal(theirs.double(), ours.to(torch.float32).double()):
        raise RuntimeError("dequantisation differs from transformers'")


def write_checkpoint(folder, case):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(case["config"], indent=2) + "\n")
    tensors, shards = checkpoint(case), case.get("shards", 1)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map, total = list(tensors), {}, 0
    for i in range(shards):
        # neighbours go to different files, so that one layer is spread over all of them
        part = {n: tensors[n] for n in names[i::shards]}
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update({n: file for n in part})
        total += sum(t.numel() * t.element_size() for t in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------- running
def draw_tokens(case, attempt):
    rng = np.random.Generator(np.random.PCG64([case["seed"], 777, attempt]))
    ids = rng.integers(0, case["config"]["vocab_size"], case["tokens"]).tolist()
    ids[1], ids[-2] = 0, case["config"]["vocab_size"] - 1  # both ends of the table
    return ids


def store(path, tensors):
    out = {}
    for name, t in tensors.items():
        out[name] = (t if t.dtype == torch.int32 else t.to(torch.float32)).contiguous()
    save_file(out, path)


def difference(a, b):
    """max abs and relative Frobenius error of the logits, and how many tokens' routes differ."""
    x, y = a["logits"].double(), b["logits"].double()
    flips = 0
    for key in b:
        if key.startswith("routes.") and key.endswith(".idx"):
            flips += int((a[key].sort(-1).values != b[key].sort(-1).values).any(-1).sum())
    return {"max_abs": float((x - y).abs().max()), "rel_frobenius": float((x - y).norm() / y.norm()),
            "route_flips": flips}


def run_legacy(python, folder, dtype):
    """The same folder through transformers 4.57 (another interpreter): tensors, version."""
    import tempfile
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp) / "out.safetensors"
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import hf_reference as hf, torch\n"
                "from safetensors.torch import save_file\n"
                "ids = [int(x) for x in open(sys.argv[2] + '/tokens.txt').read().split()]\n"
                "torch.set_num_threads(1)\n"
                "m = hf.load(sys.argv[2], sys.argv[3]); t, _ = hf.forward(m, ids); hf.close(m)\n"
                "save_file({k: v.contiguous() for k, v in t.items()}, sys.argv[4],"
                " metadata={'version': hf.transformers.__version__})\n")
        subprocess.run([python, "-c", code, str(Path(__file__).resolve().parent), str(folder), dtype,
                        str(out)], check=True)
        from safetensors import safe_open

        with safe_open(out, framework="pt") as f:
            version = f.metadata()["version"]
        return load_file(out), version


def run(folder, ids, dtype, **kwargs):
    model = hf.load(folder, dtype, **kwargs)
    tensors, margin = hf.forward(model, ids)
    mtp = None
    if model.config.num_mtp_layers if hasattr(model.config, "num_mtp_layers") else 0:
        mtp = {}
        hidden = tensors["hidden_final"]
        mtp["post_norm"], m = hf.forward_mtp(model, ids, hidden)
        mtp["post_norm_pos1"], _ = hf.forward_mtp(model, ids, hidden, position_offset=1)
        last = tensors[f"hidden.{model.config.num_hidden_layers}"]
        mtp["pre_norm"], m2 = hf.forward_mtp(model, ids, last)
        margin = min(margin, m, m2)
    note = model.note
    hf.close(model)
    return tensors, margin, mtp, note


def make_case(name, case, root, legacy):
    folder = root / name
    shutil.rmtree(folder, ignore_errors=True)
    if case.get("fp8"):
        check_dequantise()
    case["config"].setdefault("num_nextn_predict_layers", 0)
    write_checkpoint(folder, case)
    dtype = case.get("compute", "f64")
    need = 2e-2 if dtype == "bf16" else 1e-3
    for attempt in range(400):
        ids = draw_tokens(case, attempt)
        tensors, margin, mtp, note = run(folder, ids, dtype)
        zero = None
        if margin > need and case.get("mask_zero"):
            # experts of forbidden groups all sit at exactly 0: a tie there would leave the choice open
            zero, zmargin, _, znote = run(folder, ids, dtype, mask_zero=True)
            margin = min(margin, zmargin)
        exact = None
        if margin > need and case.get("fp8"):  # both ways of dequantising must choose the same experts
            exact = run(folder, ids, dtype, fp8_round="none")
            margin = min(margin, exact[1]) * (difference(exact[0], tensors)["route_flips"] == 0)
        if margin > need:
            break
    else:
        raise RuntimeError(f"{name}: no tokens without near-ties found")
    (folder / "tokens.txt").write_text(" ".join(map(str, ids)) + "\n")
    meta = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
            "seed": case["seed"], "token_attempt": attempt, "storage": case["storage"],
            "covers": case["covers"], "computed_in": dtype, "how": note["source"],
            "router_min_margin": margin, "flags": dict(case["flags"]), "files": {}}
    main = {"tolerance_note": "float64 result stored as float32"} if dtype == "f64" else {}
    if mtp:
        tensors = {**tensors, **mtp["post_norm"], "mtp_logits_pre_norm": mtp["pre_norm"]["mtp_logits"]}
        meta["mtp"] = {
            "positions_j_versus_j_plus_1": difference(
                {"logits": mtp["post_norm_pos1"]["mtp_logits"]}, {"logits": mtp["post_norm"]["mtp_logits"]}),
            "pre_norm_versus_post_norm": difference(
                {"logits": mtp["pre_norm"]["mtp_logits"]}, {"logits": mtp["post_norm"]["mtp_logits"]})}
    store(folder / "expected.safetensors", tensors)
    meta["files"]["expected.safetensors"] = main
    if dtype == "f64":  # how far transformers' own float32 run is away: the scale for float32 tests
        plain = run(folder, ids, "f32")
        main["transformers_float32_unmodified"] = difference(plain[0], tensors)
        bf = run(folder, ids, "bf16")
        main["transformers_bf16_unmodified"] = difference(bf[0], tensors)
    else:
        full = run(folder, ids, "f64")
        store(folder / "expected_f64.safetensors", full[0])
        main["against_f64"] = difference(tensors, full[0])
        meta["files"]["expected_f64.safetensors"] = {"computed_in": "f64", "router_min_margin": full[1]}
    if zero:
        if difference(zero, tensors)["route_flips"] < 5:
            raise RuntimeError(f"{name}: the mask value hardly matters for these tokens")
        store(folder / "expected_zero.safetensors", zero)
        meta["files"]["expected_zero.safetensors"] = {
            "flags": {"router_mask": "zero"}, "how": znote["source"],
            "against_expected": difference(zero, tensors)}
    if exact:
        store(folder / "expected_exact_dequant.safetensors",
              {**exact[0], **(exact[2]["post_norm"] if exact[2] else {})})
        meta["files"]["expected_exact_dequant.safetensors"] = {
            "flags": {"fp8_dequant": "exact"}, "against_expected": difference(exact[0], tensors)}
    if legacy and case["config"]["model_type"] == "deepseek_v3" and not case.get("fp8"):
        legacy_checks(folder, case, dtype, ids, tensors, meta, legacy)
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"{name}: {size / 1024:.0f} KiB, margin {margin:.2e}, attempt {attempt}", flush=True)


def legacy_checks(folder, case, dtype, ids, tensors, meta, python):
    """transformers 4.57 on the same folder: a second implementation of everything, with the zero mask
    and float32 accumulation of the experts."""
    from safetensors.torch import load_file

    kind = "bf16" if dtype == "bf16" else "f32"
    try:
        old, version = run_legacy(python, folder, kind)
    except subprocess.CalledProcessError:
        meta["transformers_4"] = {"error": "transformers 4 cannot run this case"}
        return
    meta["transformers_4"] = {"version": version, "dtype": kind, "against_expected": difference(old, tensors)}
    if case.get("mask_zero"):
        zero = load_file(folder / "expected_zero.safetensors")
        meta["transformers_4"]["against_expected_zero"] = difference(old, zero)
        if meta["transformers_4"]["against_expected_zero"]["route_flips"]:
            raise RuntimeError("transformers 4.57 does not agree with the zero mask")
    if dtype == "bf16":
        store(folder / "expected_moe_accum_fp32.safetensors", old)
        meta["files"]["expected_moe_accum_fp32.safetensors"] = {
            "flags": {"moe_accum": "fp32", "router_mask": "zero"}, "how": f"transformers {version}, unmodified",
            "against_expected": difference(old, tensors)}


# ------------------------------------------------------------------------------------------ RoPE tables
def rope_tables(path):
    """inv_freq and attention factor from transformers' own functions, float64 copies and as shipped."""
    from transformers import DeepseekV3Config

    f64, count = hf.rope_functions(True)
    f32, _ = hf.rope_functions(False)
    module, _ = hf.modeling("deepseek_v3", True)
    rows = []
    for entry in rope_table_sets():
        c = DeepseekV3Config(qk_rope_head_dim=entry["dim"], qk_nope_head_dim=16, hidden_size=64,
                             num_attention_heads=4, num_key_value_heads=4,
                             max_position_embeddings=entry["max_position_embeddings"],
                             rope_parameters=dict(entry["rope_parameters"]))
        kind = entry["rope_parameters"]["rope_type"]
        kw = {} if entry.get("seq_len") is None else {"seq_len": entry["seq_len"]}
        if kind == "default":
            inv, factor = module.DeepseekV3RotaryEmbedding.compute_default_rope_parameters(c)
            inv32 = None
        else:
            inv, factor = f64[kind](c, None, **kw)
            inv32 = f32[kind](c, None, **kw)[0].tolist()
        assert inv.dtype == torch.float64
        scale = module.yarn_apply_mscale(c.rope_parameters, 1.0)
        rows.append({**entry, "inv_freq": inv.tolist(), "inv_freq_float32_as_shipped": inv32,
                     "attention_factor": float(factor), "softmax_scale_multiplier": float(scale)})
    path.write_text(json.dumps({"transformers": transformers.__version__,
                                "how": f"ROPE_INIT_FUNCTIONS, {count} float32 tokens read as float64",
                                "tables": rows}, indent=1) + "\n")
    print(f"rope_tables.json: {len(rows)} tables")


# --------------------------------------------------------------------------------------- the shipped model
def tiny_v3(model_dir, folder):
    """expected only: the weights live in model/tiny-v3. Every 4th row of the logits if V is large."""
    config = json.loads((model_dir / "config.json").read_text())
    V = config["vocab_size"]
    ids, x = [], 12345
    for _ in range(64):
        x = (1103515245 * x + 12345) % 2**31
        ids.append((x >> 8) % V)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "tokens.txt").write_text(" ".join(map(str, ids)) + "\n")
    tensors, margin, mtp, note = run(model_dir, ids, "f64")
    plain = run(model_dir, ids, "f32")
    bf = run(model_dir, ids, "bf16")
    rows = list(range(64)) if V <= 1024 else list(range(3, 64, 4))
    out = {k: v for k, v in tensors.items() if k.startswith("routes.") or k == "hidden_final"}
    out["logits_rows"] = torch.tensor(rows, dtype=torch.int32)
    out["logits"] = tensors["logits"][rows]
    out["argmax"] = tensors["logits"].argmax(-1).to(torch.int32)
    out["logsumexp"] = tensors["logits"].logsumexp(-1)
    if mtp:
        m = mtp["post_norm"]
        out["mtp_logits_rows"] = torch.tensor([r for r in rows if r < 63], dtype=torch.int32)
        out["mtp_logits"] = m["mtp_logits"][[r for r in rows if r < 63]]
        out["mtp_argmax"] = m["mtp_logits"].argmax(-1).to(torch.int32)
        out["mtp_routes.idx"], out["mtp_routes.weight"] = m["mtp_routes.idx"], m["mtp_routes.weight"]
    store(folder / "expected.safetensors", out)
    digest = zlib.crc32((model_dir / "model.safetensors").read_bytes()) if (
        model_dir / "model.safetensors").exists() else None
    meta = {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0],
            "weights": "model/tiny-v3", "weights_crc32": digest, "computed_in": "f64", "how": note["source"],
            "router_min_margin": margin,
            "transformers_float32_unmodified": difference(plain[0], tensors),
            "transformers_bf16_unmodified": difference(bf[0], tensors)}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")
    print(f"tiny_v3: margin {margin:.2e}")


def moe_accum(model_dir, folder):
    """How transformers sums experts (index_add_ in bf16): one layer of the shipped model, computed in bf16."""
    ids = [int(x) for x in (folder / "tokens.txt").read_text().split()]
    model = hf.load(model_dir, "bf16")
    store(folder / "moe_accum.safetensors", hf.moe_block(model, ids, layer=1, tokens=24, columns=32))
    hf.close(model)
    print("tiny_v3/moe_accum.safetensors")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--only", nargs="*", help="only these cases (also: rope_tables, tiny_v3, moe_accum)")
    ap.add_argument("--tiny-v3", type=Path, help="model/tiny-v3: write tiny_v3/ when the folder exists")
    ap.add_argument("--legacy-python", help="python with transformers 4.57, for the cross-checks")
    a = ap.parse_args()
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}, numpy {np.__version__}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    wanted = set(a.only or [])
    unknown = wanted - set(CASES) - {"rope_tables", "tiny_v3", "moe_accum"}
    if unknown:
        sys.exit(f"unknown cases: {sorted(unknown)}; known: {sorted(CASES)}")
    a.out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        if not wanted or name in wanted:
            make_case(name, case, a.out, a.legacy_python)
    if not wanted or "rope_tables" in wanted:
        rope_tables(a.out / "rope_tables.json")
    if a.tiny_v3 and (a.tiny_v3 / "config.json").exists() and (not wanted or "tiny_v3" in wanted):
        tiny_v3(a.tiny_v3, a.out / "tiny_v3")
    if a.tiny_v3 and (a.out / "tiny_v3/tokens.txt").exists() and (not wanted or wanted & {"tiny_v3", "moe_accum"}):
        moe_accum(a.tiny_v3, a.out / "tiny_v3")


if __name__ == "__main__":
    main()
