"""Runs a DeepSeek-V2/V3 checkpoint folder through Hugging Face transformers and records what happens.

Shared by make_goldens.py and check_logits.py. The mathematics is transformers' own code; this file
only loads, hooks and stores. Works with transformers 5.x; transformers 4.57 is enough for `forward`
in float32/bfloat16 (that version fills the router mask with 0 and sums experts in float32).

float64: transformers upcasts to float32 in five places whatever the model's dtype is (RMSNorm
statistics, attention softmax, router, rotary angles, inverse frequencies). `f64_modules` imports a
copy of transformers' own source files in which the token `torch.float32`/`torch.float` reads
`torch.float64` and `.float()` reads `.double()`; nothing else changes. The count of replaced tokens
goes into meta.json.
"""

import importlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

transformers.utils.logging.disable_progress_bar()
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}
MAJOR = int(transformers.__version__.split(".")[0])


# ------------------------------------------------------------------------- float64 copies of the source
def _patched_source(path, extra):
    text = Path(path).read_text()
    text, n1 = re.subn(r"\btorch\.float(32)?\b(?!\d)", "torch.float64", text)
    text, n2 = re.subn(r"\.float\(\)", ".double()", text)
    for old, new in extra:
        if text.count(old) != 1:
            raise RuntimeError(f"{path}: expected exactly one {old!r}, found {text.count(old)}")
        text = text.replace(old, new)
    return text, n1 + n2


def _import_source(name, text, folder):
    path = Path(folder) / (name.rsplit(".", 1)[1] + ".py")
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_cache = {}
_folder = None


def modeling(arch, f64, mask_zero=False):
    """The modelling module of `arch` ("deepseek_v3" or "deepseek_v2"), and a note on what was changed."""
    global _folder
    base = f"transformers.models.{arch}.modeling_{arch}"
    original = importlib.import_module(base)
    if not f64 and not mask_zero:
        return original, {"source": "unmodified"}
    key = (arch, f64, mask_zero)
    if key in _cache:
        return _cache[key]
    if MAJOR < 5:
        raise RuntimeError("the float64 copies are made for transformers 5")
    if _folder is None:
        _folder = tempfile.mkdtemp(prefix="hf_f64_")
    extra = [('float("-inf")', "0.0")] if mask_zero else []
    if f64:
        text, count = _patched_source(original.__file__, extra)
    else:
        text, count = Path(original.__file__).read_text(), 0
        for old, new in extra:
            assert text.count(old) == 1
            text = text.replace(old, new)
    module = _import_source(f"{base}_f64_{int(f64)}_{int(mask_zero)}", text, _folder)
    note = {"source": f"modeling_{arch}.py with {count} float32 tokens read as float64"}
    if f64:
        funcs, n = rope_functions(f64=True)
        module.ROPE_INIT_FUNCTIONS = funcs
        note["source"] += f", modeling_rope_utils.py with {n}"
    if mask_zero:
        note["source"] += ', router mask fill float("-inf") read as 0.0'
    _cache[key] = (module, note)
    return _cache[key]


def rope_functions(f64):
    """ROPE_INIT_FUNCTIONS (name -> function(config, device, seq_len)) and the number of replaced tokens."""
    global _folder
    from transformers import modeling_rope_utils as original

    if not f64:
        return original.ROPE_INIT_FUNCTIONS, 0
    if "rope" not in _cache:
        if _folder is None:
            _folder = tempfile.mkdtemp(prefix="hf_f64_")
        text, count = _patched_source(original.__file__, [])
        module = _import_source("transformers.modeling_rope_utils_f64", text, _folder)
        _cache["rope"] = (module.ROPE_INIT_FUNCTIONS, count)
    return _cache["rope"]


# ------------------------------------------------------------------------------------- checkpoint access
def read_checkpoint(folder):
    """All tensors of a checkpoint folder, one file or sharded, by name."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        with safe_open(folder / name, framework="pt") as f:
            for key in f.keys():
                tensors[key] = f.get_tensor(key)
    return tensors


def dequantise(weight, scale, block=128):
    """E4M3 [out,in] times its 128x128 block scales, exact in float64."""
    out, inn = weight.shape
    s = scale.double().repeat_interleave(block, 0)[:out].repeat_interleave(block, 1)[:, :inn]
    return weight.double() * s


def plain_copy(folder, target, fp8_round="bf16"):
    """Writes a copy without FP8. fp8_round "bf16": w = rnd_bf16(rnd_f32(q * scale)), SPEC 2.1's
    conversion; "none": the exact product, stored as float64."""
    folder, target = Path(folder), Path(target)
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    tensors = read_checkpoint(folder)
    out = {}
    for name, t in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if t.dtype == torch.float8_e4m3fn:
            t = dequantise(t, tensors[name + "_scale_inv"])
            if fp8_round == "bf16":
                t = t.to(torch.float32).to(torch.bfloat16)  # float(q)*scale is formed in float32 first
        out[name] = t.contiguous()
    save_file(out, target / "model.safetensors", metadata={"format": "pt"})


# --------------------------------------------------------------------------------------------- the model
class Loaded:
    def __init__(self, model, note, folder, keep, mask_value):
        self.model, self.config, self.note, self.folder = model, model.config, note, folder
        self.keep, self.mask_value = keep, mask_value  # temporary folder or None; router mask fill


def load(folder, dtype="f64", mask_zero=False, fp8_round="bf16"):
    """Loads a checkpoint folder with transformers' from_pretrained. dtype: f64 | f32 | bf16."""
    config_json = json.loads((Path(folder) / "config.json").read_text())
    arch = config_json.get("model_type", "deepseek_v3")
    keep = None
    if "quantization_config" in config_json:
        keep = tempfile.mkdtemp(prefix="hf_plain_")
        plain_copy(folder, keep, fp8_round)
        folder = keep
    if MAJOR < 5 and "rope_parameters" in config_json:  # transformers 4 reads the old spelling only
        keep = tempfile.mkdtemp(prefix="hf_plain_")
        plain_copy(folder, keep, fp8_round)
        rope = config_json.pop("rope_parameters")
        config_json["rope_theta"] = rope.pop("rope_theta")
        config_json["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        (Path(keep) / "config.json").write_text(json.dumps(config_json))
        folder = keep
    module, note = modeling(arch, dtype == "f64", mask_zero)
    cls = getattr(module, "DeepseekV3ForCausalLM" if arch == "deepseek_v3" else "DeepseekV2ForCausalLM")
    layers = config_json["num_hidden_layers"]
    extra = config_json.get("num_nextn_predict_layers", 0)
    # transformers names V3's own MTP layer (61) here; the same for a model of another depth
    if extra:
        cls._keys_to_ignore_on_load_unexpected = [
            rf"model\.layers\.{l}\..*" for l in range(layers, layers + extra)
        ]
    kwargs = {"attn_implementation": "eager"}
    if MAJOR >= 5:
        kwargs["experts_implementation"] = "eager"
    from transformers import modeling_utils

    saved = dict(getattr(modeling_utils, "ROPE_INIT_FUNCTIONS", {}))
    if dtype == "f64":
        saved and modeling_utils.ROPE_INIT_FUNCTIONS.update(rope_functions(True)[0])
    try:
        model, info = cls.from_pretrained(
            str(folder), dtype=DTYPES[dtype], output_loading_info=True, **kwargs
        )
    finally:
        if saved:
            modeling_utils.ROPE_INIT_FUNCTIONS.update(saved)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        raise RuntimeError(f"{folder}: transformers did not take every tensor: {info}")
    model.eval()
    if dtype == "f64":
        for name, t in list(model.named_parameters()) + list(model.named_buffers()):
            if t.dtype != torch.float64 and "e_score_correction_bias" not in name:
                raise RuntimeError(f"{name} is {t.dtype}, not float64")
        inv = model.model.rotary_emb.inv_freq
        rope = getattr(model.config, "rope_parameters")
        if rope.get("rope_type", "default") == "default":
            d = model.config.qk_rope_head_dim
            want = float(rope["rope_theta"]) ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
            assert torch.allclose(inv, want, rtol=1e-14, atol=0), "rotary buffer is not float64-exact"
    zero = mask_zero or MAJOR < 5 or arch == "deepseek_v2"
    return Loaded(model, note, str(folder), keep, 0.0 if zero else float("-inf"))


def close(loaded):
    if loaded.keep:
        shutil.rmtree(loaded.keep, ignore_errors=True)


def _router_hook(store, layer):
    def hook(module, args, output):
        if len(output) == 3:  # transformers 5: logits, weights, indices
            _, weight, idx = output
        else:  # transformers 4: indices, weights
            idx, weight = output
        x = args[0].detach()
        store[layer] = (idx.detach().to(torch.int32), weight.detach().clone(), x.reshape(-1, x.shape[-1]))

    return hook


@torch.no_grad()
def moe_block(loaded, ids, layer, tokens, columns):
    """One expert layer in the model's own dtype: routes, every chosen expert's output (weight 1, nothing
    added), what the layer makes of them, and with the shared expert. The first `tokens` and `columns`."""
    mlp, seen = loaded.model.model.layers[layer].mlp, {}

    def hook(module, args, output):
        seen["x"], seen["y"] = args[0].detach(), output.detach()

    h = mlp.register_forward_hook(hook)
    loaded.model(input_ids=torch.tensor([ids]), use_cache=False)
    h.remove()
    x = seen["x"].reshape(-1, seen["x"].shape[-1])
    _, weight, idx = mlp.gate(seen["x"])
    routed = mlp.experts(x, idx, weight)
    shared = mlp.shared_experts(x)
    if not torch.equal(routed + shared, seen["y"].reshape(routed.shape)):
        raise RuntimeError("the layer is not routed + shared")
    one = torch.ones_like(weight[:, :1])
    out = torch.stack([mlp.experts(x, idx[:, k:k + 1].contiguous(), one) for k in range(idx.shape[1])], 1)
    return {"idx": idx[:tokens].to(torch.int32), "weight": weight[:tokens].float(),
            "out": out[:tokens, :, :columns], "routed": routed[:tokens, :columns],
            "shared": shared[:tokens, :columns], "y": (routed + shared)[:tokens, :columns]}


@torch.no_grad()
def forward(loaded, ids):
    """Dictionary of tensors: logits, hidden.<l>, hidden_final, routes.<l>.{idx,weight} (input dtype)."""
    model = loaded.model
    store, routes, hooks = {}, {}, []

    def grab(name):
        def hook(module, args, output):
            store[name] = (output[0] if isinstance(output, tuple) else output)[0].detach().clone()

        return hook

    inner = model.model
    hooks.append(inner.embed_tokens.register_forward_hook(grab("hidden.0")))
    for l, layer in enumerate(inner.layers):
        hooks.append(layer.register_forward_hook(grab(f"hidden.{l + 1}")))
        if hasattr(layer.mlp, "gate"):
            hooks.append(layer.mlp.gate.register_forward_hook(_router_hook(routes, l)))
    hooks.append(inner.norm.register_forward_hook(grab("hidden_final")))
    out = model(input_ids=torch.tensor([ids]), use_cache=False)
    for h in hooks:
        h.remove()
    for key in list(store):
        if store[key].dim() == 3:
            store[key] = store[key][0]
    store["logits"] = out.logits[0].detach().clone()
    for l, (idx, weight, _) in routes.items():
        store[f"routes.{l}.idx"], store[f"routes.{l}.weight"] = idx, weight
    return store, min([router_margin(loaded, inner.layers[l].mlp.gate, r) for l, r in routes.items()],
                      default=float("inf"))


def router_margin(loaded, gate, record):
    """Smallest gap (K-th to next biased score, M-th to next group score) of one layer: how far the
    routes are from flipping. Our own arithmetic, used only to choose inputs without near-ties."""
    x = record[2].double()
    c = loaded.config
    z = x @ gate.weight.detach().double().T
    softmax = c.model_type == "deepseek_v2"
    s = z.softmax(-1) if softmax else z.sigmoid()
    b = 0 if softmax else gate.e_score_correction_bias.detach().double()
    s = s + b
    groups, keep = (c.n_group or 1), (c.topk_group or 1)
    if softmax and c.topk_method == "greedy":
        groups = keep = 1
    gap = float("inf")
    if groups > 1:
        per = s.view(len(s), groups, -1)
        g = per.max(-1).values if softmax else per.topk(2, -1).values.sum(-1)
        if keep < groups:
            v = g.sort(-1, descending=True).values
            gap = min(gap, float((v[:, keep - 1] - v[:, keep]).min()))
        mask = torch.zeros_like(g).scatter_(1, g.topk(keep, -1).indices, 1.0)
        s = per.masked_fill(mask[..., None] == 0, loaded.mask_value).reshape(len(s), -1)
    k = c.num_experts_per_tok
    v = s.sort(-1, descending=True).values
    if k < v.shape[-1]:
        gap = min(gap, float((v[:, k - 1] - v[:, k]).min()))
    return gap


@torch.no_grad()
def forward_mtp(loaded, ids, hidden, position_offset=0):
    """MTP logits for rows j = 0..T-2 = (Emb(t_{j+1}), hidden[j]) at position j + position_offset, with
    transformers' own MtpModel (loaded from the same folder). hidden: [T,d] as the flag mtp_hidden says."""
    from transformers.modeling_layers import MtpModel

    loaded.model.config.name_or_path = loaded.folder
    mtp = MtpModel.from_pretrained(loaded.model).eval()
    assert mtp.config.model_type == loaded.config.model_type and len(mtp.layers) == 1
    mtp.config._attn_implementation = "eager"
    mtp.config._experts_implementation = "eager"
    for name, t in mtp.named_parameters():
        if t.dtype != loaded.model.dtype and "bias" not in name:
            raise RuntimeError(f"MTP {name} is {t.dtype}")
    routes = {}
    hook = mtp.layers[0].mtp_block.mlp.gate.register_forward_hook(_router_hook(routes, 0))
    rows = len(ids) - 1
    pos = torch.arange(rows)[None] + position_offset
    h = mtp.forward_layer(0, hidden[None, :rows], pos, None, input_ids=torch.tensor([ids[1:]]))
    logits = mtp._project_to_logits(h)[0]
    hook.remove()
    margin = router_margin(loaded, mtp.layers[0].mtp_block.mlp.gate, routes[0])
    return {"mtp_hidden": h[0], "mtp_logits": logits, "mtp_routes.idx": routes[0][0],
            "mtp_routes.weight": routes[0][1]}, margin
