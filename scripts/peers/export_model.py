"""A checkpoint folder of ours -> what the peers read: a folder for transformers (config.json and safetensors, without the
MTP module, which transformers has no code for) and a GGUF file of llama.cpp's deepseek2 architecture. Same bf16 bits in
both; norms, router and its bias in f32. No tokenizer: the peers are driven with token ids.

Needs numpy, and gguf for the second; no torch. The conversion follows llama.cpp's tensor names and keys.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np


def read_safetensors(path):
    """name -> (dtype, shape, raw bytes as a numpy array of the element's size)."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    (n,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + n].tobytes())
    out = {}
    kinds = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32}
    for name, t in header.items():
        if name == "__metadata__":
            continue
        if t["dtype"] not in kinds:
            raise SystemExit(f"{path}: {name} is {t['dtype']}; the peers are given BF16 and F32 checkpoints only")
        lo, hi = t["data_offsets"]
        raw = data[8 + n + lo : 8 + n + hi].view(kinds[t["dtype"]])
        out[name] = (t["dtype"], raw.reshape(t["shape"]))
    return out


def read_checkpoint(folder):
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    tensors = {}
    for name in names:
        tensors.update(read_safetensors(folder / name))
    return tensors


def widen(dtype, a):
    if dtype == "BF16":
        return (a.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return a.view(np.float16).astype(np.float32)
    return a.astype(np.float32)


def without_mtp(name, layers):
    parts = name.split(".")
    return not (parts[:2] == ["model", "layers"] and int(parts[2]) >= layers)


def write_hf(config, tensors, out, context):
    """The same tensors under the same names."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    c = peer_config(config, context)
    (out / "config.json").write_text(json.dumps(c, indent=1) + "\n")
    # By hand: numpy has no bfloat16 for the safetensors package to write.
    header, blobs, at = {}, [], 0
    for name, (dtype, a) in sorted(tensors.items()):
        if not without_mtp(name, c["num_hidden_layers"]):
            continue
        blob = np.ascontiguousarray(a).tobytes()
        header[name] = {"dtype": dtype, "shape": list(a.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(out / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for blob in blobs:
            f.write(blob)


def gguf_tensors(config, tensors):
    """(GGUF name, "bf16" | "f32", array) of every tensor that deepseek2 wants; one at a time is in memory."""
    for name, kind, _, make in gguf_plan(config, tensors):
        yield name, kind, make()


def gguf_plan(config, tensors):
    """(GGUF name, "bf16" | "f32", shape, function that makes the array)."""
    h, dn, dv = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    dc, experts = config["kv_lora_rank"], config["n_routed_experts"]

    def get(name, kind):
        dtype, a = tensors[name]
        if kind == "bf16" and dtype == "BF16":
            return a
        a = widen(dtype, a)
        if kind == "f32":
            return a
        bits = a.view(np.uint32)  # nearest even
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    def plain(gguf_name, kind, name):
        return gguf_name, kind, tensors[name][1].shape, lambda: get(name, kind)

    def stacked(names):
        return np.stack([get(n, "bf16") for n in names])

    yield plain("token_embd.weight", "bf16", "model.embed_tokens.weight")
    yield plain("output_norm.weight", "f32", "model.norm.weight")
    if not config.get("tie_word_embeddings", False):
        yield plain("output.weight", "bf16", "lm_head.weight")
    for l in range(config["num_hidden_layers"]):
        hf, gg = f"model.layers.{l}.", f"blk.{l}."
        yield plain(gg + "attn_norm.weight", "f32", hf + "input_layernorm.weight")
        yield plain(gg + "ffn_norm.weight", "f32", hf + "post_attention_layernorm.weight")
        if config.get("q_lora_rank"):
            yield plain(gg + "attn_q_a.weight", "bf16", hf + "self_attn.q_a_proj.weight")
            yield plain(gg + "attn_q_a_norm.weight", "f32", hf + "self_attn.q_a_layernorm.weight")
            yield plain(gg + "attn_q_b.weight", "bf16", hf + "self_attn.q_b_proj.weight")
        else:
            yield plain(gg + "attn_q.weight", "bf16", hf + "self_attn.q_proj.weight")
        yield plain(gg + "attn_kv_a_mqa.weight", "bf16", hf + "self_attn.kv_a_proj_with_mqa.weight")
        yield plain(gg + "attn_kv_a_norm.weight", "f32", hf + "self_attn.kv_a_layernorm.weight")
        # Absorbed form: W_UK of each head transposed, W_UV as it is.
        kv_b = lambda at=hf: get(at + "self_attn.kv_b_proj.weight", "bf16").reshape(h, dn + dv, dc)  # noqa: E731
        yield (gg + "attn_k_b.weight", "bf16", (h, dc, dn),
               lambda kv_b=kv_b: np.ascontiguousarray(kv_b()[:, :dn].transpose(0, 2, 1)))
        yield gg + "attn_v_b.weight", "bf16", (h, dv, dc), lambda kv_b=kv_b: np.ascontiguousarray(kv_b()[:, dn:])
        yield plain(gg + "attn_output.weight", "bf16", hf + "self_attn.o_proj.weight")
        ffn = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
        if l < config["first_k_dense_replace"]:
            for g, n in ffn.items():
                yield plain(gg + f"ffn_{g}.weight", "bf16", hf + f"mlp.{n}.weight")
            continue
        yield plain(gg + "ffn_gate_inp.weight", "f32", hf + "mlp.gate.weight")
        if config.get("topk_method") == "noaux_tc":
            yield plain(gg + "exp_probs_b.bias", "f32", hf + "mlp.gate.e_score_correction_bias")
        for g, n in ffn.items():
            names = [hf + f"mlp.experts.{e}.{n}.weight" for e in range(experts)]
            yield (gg + f"ffn_{g}_exps.weight", "bf16", (experts, *tensors[names[0]][1].shape),
                   lambda names=names: stacked(names))
            if config.get("n_shared_experts"):
                yield plain(gg + f"ffn_{g}_shexp.weight", "bf16", hf + f"mlp.shared_experts.{n}.weight")


def write_gguf(config, tensors, path, context):
    import gguf

    c = config
    w = gguf.GGUFWriter(str(path), "deepseek2")
    w.add_vocab_size(c["vocab_size"])
    w.add_context_length(max(context, c["max_position_embeddings"]))
    w.add_embedding_length(c["hidden_size"])
    w.add_block_count(c["num_hidden_layers"])
    w.add_feed_forward_length(c["intermediate_size"])
    w.add_head_count(c["num_attention_heads"])
    w.add_head_count_kv(1)  # absorbed MLA is attention with one key for all heads
    w.add_layer_norm_rms_eps(c["rms_norm_eps"])
    w.add_rope_freq_base(float(c["rope_theta"]))
    w.add_rope_dimension_count(c["qk_rope_head_dim"])
    w.add_leading_dense_block_count(c["first_k_dense_replace"])
    w.add_q_lora_rank(c.get("q_lora_rank") or 0)
    w.add_kv_lora_rank(c["kv_lora_rank"])
    w.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
    w.add_value_length(c["kv_lora_rank"])
    w.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
    w.add_value_length_mla(c["v_head_dim"])
    w.add_expert_feed_forward_length(c["moe_intermediate_size"])
    w.add_expert_count(c["n_routed_experts"])
    w.add_expert_used_count(c["num_experts_per_tok"])
    w.add_expert_shared_count(c["n_shared_experts"])
    w.add_expert_weights_scale(float(c["routed_scaling_factor"]))
    w.add_expert_weights_norm(bool(c["norm_topk_prob"]))
    sigmoid = c.get("scoring_func", "softmax") == "sigmoid"
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if c.get("n_group", 1) > 1:
        w.add_expert_group_count(c["n_group"])
        w.add_expert_group_used_count(c["topk_group"])
    w.add_tokenizer_model("none")
    w.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    plan = list(gguf_plan(c, tensors))
    for name, kind, shape, _ in plan:
        n = int(np.prod(shape))
        if kind == "bf16":
            w.add_tensor_info(name, shape, np.dtype(np.uint16), 2 * n, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            w.add_tensor_info(name, shape, np.dtype(np.float32), 4 * n)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    for _, kind, _, make in plan:
        w.write_tensor_data(np.ascontiguousarray(make(), dtype=np.uint16 if kind == "bf16" else np.float32))
    w.close()


def peer_config(config, context):
    """Without the MTP module; the context is raised so that long ones run."""
    c = dict(config, max_position_embeddings=max(context, config["max_position_embeddings"]), num_nextn_predict_layers=0)
    c["head_dim"] = c["qk_rope_head_dim"]
    return c


def export(model, out, context, gguf_too=True):
    """(folder for transformers, GGUF file), made once: a newer checkpoint is exported again. A checkpoint that lies in
    OUT/hf already is for transformers as it is: only its config.json is rewritten."""
    model, out = Path(model), Path(out)
    hf, gg = out / "hf", out / "model.gguf"
    stamp = out / "stamp.json"
    source = model / ("model.safetensors.index.json" if (model / "model.safetensors.index.json").exists() else "model.safetensors")
    # Anything that changes what is written must be here.
    now = {"source": str(source.resolve()), "mtime": source.stat().st_mtime, "context": context, "gguf": gguf_too,
           "code": Path(__file__).stat().st_mtime}
    if stamp.exists() and json.loads(stamp.read_text()) == now:
        return hf, gg
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())
    if config.get("rope_scaling"):
        raise SystemExit(f"{model}: scaled RoPE is not exported (no shipped model has it)")
    tensors = read_checkpoint(model)
    if model.resolve() == hf.resolve():
        (hf / "config.json").write_text(json.dumps(peer_config(config, context), indent=1) + "\n")
    else:
        write_hf(config, tensors, hf, context)
    if gguf_too:
        write_gguf(config, tensors, gg, context)
    stamp.write_text(json.dumps(now))
    return hf, gg


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: export_model.py CHECKPOINT OUT CONTEXT")
    export(sys.argv[1], sys.argv[2], int(sys.argv[3]))
