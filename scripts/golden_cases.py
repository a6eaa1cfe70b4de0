"""The cases of make_goldens.py: configurations, what each covers, and the RoPE table parameter sets."""


def config(**changes):
    c = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 24,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5,
        "kv_lora_rank": 32, "q_lora_rank": 40, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 16, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_layer_freq": 1,
        "first_k_dense_replace": 1, "norm_topk_prob": True, "hidden_act": "silu",
        "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_theta": 10000.0, "rope_scaling": None, "attention_bias": False, "attention_dropout": 0.0,
        "rope_interleave": True, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1,
        "torch_dtype": "bfloat16",
    }
    c.update(changes)
    return c


def yarn(factor, orig, mscale=1.0, all_dim=1.0, **more):
    y = {"type": "yarn", "factor": factor, "original_max_position_embeddings": orig,
         "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": all_dim}
    y.update(more)
    return {k: v for k, v in y.items() if v is not None}


F64 = {"norm_rounding": "none (float64)", "rope_layout": "interleaved", "router_mask": "neg_inf",
       "router_dtype": "float64", "gate_eps": "1e-20", "moe_accum": "float64", "yarn_when": "always",
       "yarn_ramp": "index"}
GROUPS = dict(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)

CASES = {
    "base_f32": dict(
        seed=101, storage="F32", tokens=16, config=config(hidden_size=40, num_hidden_layers=2),
        covers="q_lora set, no RoPE scaling, one group, norm_topk_prob true, 1 dense lead layer, F32, "
               "one file, non-zero bias", flags=F64),
    "qnull_yarn0707": dict(
        seed=102, storage="BF16", tokens=24,
        config=config(q_lora_rank=None, norm_topk_prob=False, n_shared_experts=2, routed_scaling_factor=1.0,
                      rope_scaling=yarn(40, 8, 0.707, 0.707), max_position_embeddings=320,
                      rope_theta=1000.0, qk_rope_head_dim=12),
        covers="q_lora null, YaRN factor 40 with mscale 0.707/0.707 and positions beyond the original "
               "context, norm_topk_prob false, 2 shared experts, route scale 1, rope dim 12 (6 pairs)",
        flags=F64),
    "groups_yarn_sharded": dict(
        seed=103, storage="BF16", tokens=24, shards=3,
        config=config(**GROUPS, first_k_dense_replace=0, num_hidden_layers=2, vocab_size=130,
                      rope_scaling=yarn(4, 12, 1.0, 1.0, beta_fast=2, beta_slow=0.05),
                      qk_rope_head_dim=16, max_position_embeddings=48),
        covers="4 groups of 2, 2 kept, K=3, YaRN mscale 1/1 with a ramp that ends inside the table, "
               "no dense lead layer, 3 shards with an index", flags=F64),
    "halfsplit_lead2_f16": dict(
        seed=104, storage="F16", tokens=14,
        config={k: v for k, v in config(
            rope_interleave=False, first_k_dense_replace=2, n_group=2, topk_group=1,
            norm_topk_prob=False, num_attention_heads=3, num_key_value_heads=3, v_head_dim=20,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0}).items()
            if k not in ("rope_theta", "rope_scaling", "torch_dtype")} | {"dtype": "float16"},
        covers="rope_interleave false, 2 dense lead layers, 2 groups, norm_topk_prob false, F16, 3 heads, "
               "the new key spelling (rope_parameters, dtype)",
        flags=F64 | {"rope_layout": "hf_halfsplit"}),
    "yarn_mscale_unequal": dict(
        seed=105, storage="F32", tokens=20,
        config=config(num_hidden_layers=2, hidden_size=40, rope_scaling=yarn(8, 16, 1.0, 0.5),
                      max_position_embeddings=128, rope_theta=500.0, n_group=2, topk_group=2),
        covers="YaRN with mscale 1.0 and mscale_all_dim 0.5: cos and sin are multiplied by their ratio",
        flags=F64),
    "yarn_plain": dict(
        seed=106, storage="BF16", tokens=20,
        config=config(num_hidden_layers=2, rope_scaling=yarn(8, 16, None, None), rope_theta=500.0,
                      max_position_embeddings=128, first_k_dense_replace=0),
        covers="YaRN without mscale keys: cos and sin times 0.1 ln s + 1, softmax scale unchanged",
        flags=F64),
    "linear_f16_sharded": dict(
        seed=107, storage="F16", tokens=18, shards=2,
        config=config(num_hidden_layers=2, rope_scaling={"type": "linear", "factor": 4.0}),
        covers="linear (PI) scaling, F16, 2 shards", flags=F64),
    "mask_negative_bias": dict(
        seed=108, storage="F32", tokens=20, bias=(-1.0, 0.2), mask_zero=True,
        config=config(hidden_size=40, num_hidden_layers=2, first_k_dense_replace=0, n_routed_experts=6,
                      n_group=3, topk_group=2, num_experts_per_tok=3),
        covers="biases around -1: with the mask value 0 experts of forbidden groups win, with -inf never",
        flags=F64),
    "mtp": dict(
        seed=109, storage="BF16", tokens=16,
        config=config(num_hidden_layers=2, num_nextn_predict_layers=1, **GROUPS,
                      rope_scaling=yarn(40, 4096), max_position_embeddings=163840),
        covers="one MTP module (copies of embedding and head included), V3's own YaRN keys, 4 groups",
        flags=F64 | {"mtp_hidden": "post_norm", "mtp_concat": "emb_h", "mtp_zero_pos0": 0}),
    "fp8_ragged": dict(
        seed=110, storage="BF16", tokens=16, fp8=True, shards=2,
        config=config(hidden_size=144, q_lora_rank=136, kv_lora_rank=40, intermediate_size=200,
                      moe_intermediate_size=36, n_group=2, topk_group=1, num_hidden_layers=2,
                      num_attention_heads=6, num_key_value_heads=6, qk_nope_head_dim=20, v_head_dim=24,
                      rope_scaling=yarn(40, 4096), max_position_embeddings=163840,
                      num_nextn_predict_layers=1,
                      quantization_config={"quant_method": "fp8", "fmt": "e4m3",
                                           "activation_scheme": "dynamic",
                                           "weight_block_size": [128, 128]}),
        covers="E4M3 weights with 128x128 block scales, ragged blocks in rows and columns, scales in "
               "another shard than their weights, MTP module; dequantised and rounded to bf16 (SPEC 2.1)",
        flags=F64 | {"mtp_hidden": "post_norm", "mtp_concat": "emb_h", "mtp_zero_pos0": 0, "fp8_dequant": "bf16",
                     "act_scale": "none (activations are not quantised)"}),
    "bf16_hf": dict(
        seed=111, storage="BF16", tokens=16, compute="bf16", bias_storage="BF16",
        config=config(n_group=4, topk_group=3, num_experts_per_tok=2, hidden_size=56,
                      num_hidden_layers=2, rope_scaling=yarn(4, 16), max_position_embeddings=64),
        covers="computed in bf16 by unmodified transformers; bias stored as BF16",
        flags={"norm_rounding": "hf", "rope_layout": "interleaved", "router_mask": "neg_inf",
               "router_dtype": "fp32", "gate_eps": "1e-20", "moe_accum": "bf16", "yarn_when": "always",
               "yarn_ramp": "index"}),
    "v2lite_softmax": dict(
        seed=112, storage="BF16", tokens=20,
        config=config(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"], q_lora_rank=None,
                      scoring_func="softmax", topk_method="greedy", norm_topk_prob=False,
                      routed_scaling_factor=1.0, n_shared_experts=2, num_experts_per_tok=3,
                      rope_scaling=yarn(40, 8, 0.707, 0.707), max_position_embeddings=320,
                      num_hidden_layers=2),
        covers="V2-Lite: softmax router, greedy top-k, no bias (transformers' DeepSeek-V2 class)", flags=F64),
    "v2_group_limited": dict(
        seed=113, storage="BF16", tokens=20,
        config=config(model_type="deepseek_v2", architectures=["DeepseekV2ForCausalLM"],
                      scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False,
                      routed_scaling_factor=16.0, n_shared_experts=2, num_experts_per_tok=2,
                      n_group=4, topk_group=2, num_hidden_layers=2, rope_scaling=None),
        covers="V2: softmax router, group_limited_greedy (group score = max), route scale 16",
        flags=F64 | {"router_mask": "zero"}),
}


def rope_table_sets():
    """Parameter sets of rope_tables.json."""
    sets = []

    def add(name, dim, maxpos, seq_len=None, **rope):
        sets.append({"name": name, "dim": dim, "max_position_embeddings": maxpos, "seq_len": seq_len,
                     "rope_parameters": rope})

    for dim, theta in ((64, 10000.0), (8, 10000.0), (6, 500.0), (16, 1e6)):
        add(f"default_d{dim}", dim, 4096, rope_type="default", rope_theta=theta)
    add("linear_40", 64, 163840, rope_type="linear", factor=40.0, rope_theta=10000.0)
    add("linear_3", 12, 512, rope_type="linear", factor=3.0, rope_theta=10000.0)
    for factor in (1.0, 2.0, 40.0):
        for seq in (1024, 4096, 4097, 8192, 16384, 163840):
            add(f"dynamic_{factor:g}_{seq}", 64, 4096, seq, rope_type="dynamic", factor=factor,
                rope_theta=10000.0)
    add("dynamic_small", 8, 32, 100, rope_type="dynamic", factor=2.0, rope_theta=10000.0)

    def yarn_set(name, dim, factor, orig, theta=10000.0, **more):
        add(name, dim, int(factor * orig), rope_type="yarn", factor=factor,
            original_max_position_embeddings=orig, rope_theta=theta, **more)

    v = dict(beta_fast=32, beta_slow=1)
    yarn_set("yarn_v3", 64, 40.0, 4096, **v, mscale=1.0, mscale_all_dim=1.0)
    yarn_set("yarn_v2_lite", 64, 40.0, 4096, **v, mscale=0.707, mscale_all_dim=0.707)
    yarn_set("yarn_kimi_k2", 64, 32.0, 4096, theta=50000.0, beta_fast=1.0, beta_slow=1.0,
             mscale=1.0, mscale_all_dim=1.0)
    yarn_set("yarn_unequal", 64, 40.0, 4096, **v, mscale=1.0, mscale_all_dim=0.5)
    yarn_set("yarn_plain", 64, 16.0, 4096, **v)
    yarn_set("yarn_attention_factor", 64, 16.0, 4096, **v, attention_factor=1.1)
    yarn_set("yarn_factor_1", 64, 1.0, 4096, **v, mscale=1.0, mscale_all_dim=1.0)
    yarn_set("yarn_tiny_512", 16, 8.0, 512, **v, mscale=1.0, mscale_all_dim=1.0)
    yarn_set("yarn_tiny_512_x32", 16, 32.0, 512, **v)
    yarn_set("yarn_small_8", 8, 4.0, 16, beta_fast=2, beta_slow=0.05, mscale=1.0, mscale_all_dim=1.0)
    yarn_set("yarn_odd_12", 12, 40.0, 8, theta=1000.0, **v, mscale=0.707, mscale_all_dim=0.707)
    yarn_set("yarn_corners_equal", 8, 4.0, 1024, theta=1e9, beta_fast=32, beta_slow=31)
    return sets
