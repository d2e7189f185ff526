"""The architecture and file variants that every whole-model claim is made for."""

from glm_mlx.make_tiny import TinySpec

# Rows of 256 where K-quants need them; kv_b and k_b keep the narrow rows that make real files fall back.
WIDE = {
    "hidden_size": 256,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "moe_intermediate_size": 256,
    "intermediate_size": 512,
}

VARIANTS = {
    "GLM Q4_0, output Q6_K": TinySpec(**WIDE, overrides={"output.weight": "Q6_K"}, seed=1),
    "GLM Q4_0 with imatrix": TinySpec(
        **WIDE, overrides={"output.weight": "Q6_K", "ffn_down": "Q4_1"}, mtp=True, seed=2
    ),
    "GLM Q4_K_M": TinySpec(
        **WIDE, type="Q4_K", overrides={"output.weight": "Q6_K", "ffn_down": "Q6_K", "attn_k_b": "Q5_0"}, seed=3
    ),
    "GLM Unsloth Q4_0": TinySpec(
        **WIDE,
        overrides={
            "attn_k_b": "Q8_0",
            "attn_v_b": "Q8_0",
            "attn_kv_a_mqa": "Q8_0",
            "ffn_gate_shexp": "Q5_K",
            "ffn_up_shexp": "Q5_K",
            "ffn_down_shexp": "Q6_K",
            "output.weight": "Q6_K",
            "token_embd": "Q4_K",
        },
        seed=4,
    ),
    "GLM Q8_0": TinySpec(type="Q8_0", seed=5),
    "GLM IQ4_NL, Q5_1": TinySpec(type="IQ4_NL", overrides={"ffn_down": "Q5_1", "attn": "Q5_0"}, seed=6),
    "GLM F16": TinySpec(type="F16", seed=7),
    "GLM BF16, tied": TinySpec(type="BF16", tied=True, seed=8),
    "GLM F32": TinySpec(type="F32", seed=9),
    "k_b and v_b in two dimensions": TinySpec(layout="flat", seed=10),
    "old file: kv_b unsplit, no gating key": TinySpec(layout="kv_b", write_gating=False, seed=11),
    "gate and up fused": TinySpec(fused_gate_up=True, seed=12),
    "pruned (REAP): 6 experts": TinySpec(num_experts=6, seed=13),
    "DeepSeek-V2-Lite": TinySpec(
        q_lora_rank=0, gating="softmax", yarn=True, num_shared_experts=2, num_experts_per_tok=3, seed=14
    ),
    "DeepSeek-V2-Lite, old file": TinySpec(
        q_lora_rank=0, gating="softmax", write_gating=False, yarn=True, num_shared_experts=2, layout="kv_b", seed=15
    ),
    "no shared expert, two dense layers": TinySpec(num_shared_experts=0, first_k_dense=2, seed=16),
}
