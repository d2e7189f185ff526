"""What the metadata of a `deepseek2` GGUF file says about the model, under Hugging Face's names.

Keys are those of llama.cpp's `gguf-py/gguf/constants.py`; fall-backs for old files follow llama.cpp's `deepseek2`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from .gguf_file import GgufFile

SCORING_FUNCTIONS: dict[int, Literal["softmax", "sigmoid"]] = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True)
class Yarn:
    """RoPE scaling, as in DeepSeek-V2. `rope.py` says what each number does."""

    factor: float
    original_context_length: int
    log_multiplier: float
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class Config:
    """Sizes and switches of one model; the comments give GLM-4.7-Flash's values."""

    n_layers: int  # 47; MTP layers, which follow them in the file, are left out
    hidden_size: int  # D 2048
    n_heads: int  # H 20
    q_lora_rank: int | None  # 768; None where q is one projection
    kv_lora_rank: int  # R 512
    qk_head_dim: int  # N + P 256
    qk_rope_head_dim: int  # P 64
    v_head_dim: int  # V 256
    rms_norm_eps: float  # 1e-5
    rope_theta: float  # 1e6
    yarn: Yarn | None  # None
    first_k_dense_replace: int  # 1: layer 0 has no experts
    n_routed_experts: int  # E 64
    num_experts_per_tok: int  # K 4
    n_shared_experts: int  # 1
    scoring_func: Literal["softmax", "sigmoid"]  # sigmoid
    norm_topk_prob: bool  # True
    routed_scaling_factor: float  # 1.8

    @property
    def qk_nope_head_dim(self) -> int:
        """N, 192 in GLM-4.7-Flash."""
        return self.qk_head_dim - self.qk_rope_head_dim


def read_config(file: GgufFile) -> Config:
    prefix = file.metadata["general.architecture"] + "."  # deepseek2; Ollama writes glm4moelite
    arch = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if arch.get("expert_group_count", 1) > 1:
        raise ValueError(f"expert_group_count is {arch['expert_group_count']}; the reference knows one group only")

    n_layers = arch["block_count"] - arch.get("nextn_predict_layers", 0)
    n_experts = arch.get("expert_count", 0)
    has_selection_bias = any(name.endswith(".exp_probs_b.bias") for name in file.names())
    return Config(
        n_layers=n_layers,
        hidden_size=arch["embedding_length"],
        n_heads=arch["attention.head_count"],
        q_lora_rank=arch.get("attention.q_lora_rank") or None,
        kv_lora_rank=arch["attention.kv_lora_rank"],
        # Beside *_mla keys, the plain ones hold the absorbed sizes (576, 512); alone, in old files, the true sizes.
        qk_head_dim=arch.get("attention.key_length_mla") or arch["attention.key_length"],
        qk_rope_head_dim=arch["rope.dimension_count"],
        v_head_dim=arch.get("attention.value_length_mla") or arch["attention.value_length"],
        rms_norm_eps=arch["attention.layer_norm_rms_epsilon"],
        rope_theta=arch.get("rope.freq_base", 10000.0),
        yarn=read_yarn(arch),
        first_k_dense_replace=arch.get("leading_dense_block_count", 0) if n_experts else n_layers,
        n_routed_experts=n_experts,
        num_experts_per_tok=arch.get("expert_used_count", 0),
        n_shared_experts=arch.get("expert_shared_count", 0),
        scoring_func=SCORING_FUNCTIONS[arch.get("expert_gating_func") or (2 if has_selection_bias else 1)],
        norm_topk_prob=arch.get("expert_weights_norm", False),
        routed_scaling_factor=arch.get("expert_weights_scale") or 1.0,
    )


def read_yarn(arch: dict[str, Any]) -> Yarn | None:
    if arch.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError(
            f"rope.scaling.attn_factor is {arch['rope.scaling.attn_factor']}; the reference has no place for it"
        )
    if arch.get("rope.scaling.type") != "yarn":
        return None
    if not arch.get("rope.scaling.yarn_log_multiplier"):
        raise ValueError("rope.scaling.yarn_log_multiplier is not given; YaRN means different things without it")
    return Yarn(
        factor=arch["rope.scaling.factor"],
        original_context_length=arch["rope.scaling.original_context_length"],
        log_multiplier=arch["rope.scaling.yarn_log_multiplier"],
        beta_fast=arch.get("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=arch.get("rope.scaling.yarn_beta_slow", 1.0),
    )
