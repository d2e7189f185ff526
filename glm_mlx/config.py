"""The shape of a model, made only from a GGUF file's metadata.

Key names: llama.cpp `gguf-py/gguf/constants.py`. Field names: transformers `Glm4MoeLiteConfig`.
"""

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from glm_mlx.errors import InputError
from kernels.route import Gating

ARCHITECTURES = ("deepseek2", "glm4moelite")  # the second in Ollama's files
LARGEST = 1 << 31  # no dimension of a real model is near it; products stay well inside 64 bits


@dataclass(frozen=True)
class Yarn:
    """YaRN position scaling (arXiv 2309.00071) as llama.cpp's `deepseek2` graph applies it."""

    factor: float
    original_context_length: int
    log_multiplier: float  # 0.1 * mscale_all_dim of the checkpoint
    beta_fast: float
    beta_slow: float

    @property
    def mscale(self) -> float:
        """Attention scores are multiplied by its square."""
        return 1.0 + self.log_multiplier * math.log(self.factor)


@dataclass(frozen=True)
class SamplingDefaults:
    temperature: float
    top_p: float
    top_k: int
    min_p: float


@dataclass(frozen=True)
class Config:
    architecture: str
    name: str
    num_layers: int  # without the MTP layers, which stand last in the file
    num_mtp_layers: int
    context_length: int
    hidden_size: int
    vocab_size: int
    intermediate_size: int  # of the dense layers
    first_k_dense: int
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float
    yarn: Yarn | None
    rms_norm_eps: float
    num_experts: int
    num_experts_per_tok: int
    num_shared_experts: int
    moe_intermediate_size: int
    gating: Gating
    norm_topk_prob: bool
    routed_scaling_factor: float
    sampling: SamplingDefaults

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_dim(self) -> int:
        """Numbers cached for a token and layer: [latent | k_pe]."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        mscale = self.yarn.mscale if self.yarn else 1.0
        return float(mscale * mscale / math.sqrt(self.qk_head_dim))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tensor_names: Iterable[str]) -> "Config":
        """Raises InputError that names the key. `tensor_names` settle what older files leave unsaid."""
        architecture = metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"general.architecture = {reprlib.repr(architecture)} can't be run; give a file of "
                f"{' or '.join(ARCHITECTURES)} (GLM-4.7-Flash, DeepSeek-V2-Lite)"
            )
        keys = _Keys(metadata, architecture)
        names = set(tensor_names)
        num_mtp = keys.integer("nextn_predict_layers", 0, least=0)
        num_layers = keys.integer("block_count") - num_mtp
        if num_layers < 1:
            raise keys.error("block_count", f"leaves no layer beside {num_mtp} MTP layers")
        for key in ("expert_group_count", "expert_group_used_count"):
            if keys.integer(key, 1, least=0) > 1:
                raise keys.error(key, "means group-limited routing, which is not supported")
        # Absorbed files say 576/512 in key_length/value_length, the real head sizes in *_mla; older files lack those.
        qk_head_dim = keys.integer("attention.key_length_mla", None) or keys.integer("attention.key_length")
        v_head_dim = keys.integer("attention.value_length_mla", None) or keys.integer("attention.value_length")
        rope_dim = keys.integer("rope.dimension_count")
        if rope_dim % 2 or rope_dim >= qk_head_dim:
            raise keys.error("rope.dimension_count", f"must be even and below the head size {qk_head_dim}")
        num_experts = keys.integer("expert_count", 0, least=0)
        per_token = keys.integer("expert_used_count", 0, least=0)
        if per_token > num_experts or (num_experts and not per_token):
            raise keys.error("expert_used_count", f"does not fit {num_experts} experts")
        name = metadata.get("general.name")
        return cls(
            architecture=architecture,
            name=name if isinstance(name, str) else "unnamed model",
            num_layers=num_layers,
            num_mtp_layers=num_mtp,
            context_length=keys.integer("context_length"),
            hidden_size=keys.integer("embedding_length"),
            vocab_size=_vocab_size(keys),
            intermediate_size=keys.integer("feed_forward_length"),
            first_k_dense=keys.integer("leading_dense_block_count", 0, least=0) if num_experts else num_layers,
            num_heads=keys.integer("attention.head_count"),
            q_lora_rank=keys.integer("attention.q_lora_rank", 0, least=0) or None,
            kv_lora_rank=keys.integer("attention.kv_lora_rank"),
            qk_nope_head_dim=qk_head_dim - rope_dim,
            qk_rope_head_dim=rope_dim,
            v_head_dim=v_head_dim,
            rope_theta=keys.number("rope.freq_base", 10000.0, least=2.0, most=1e12),
            yarn=_yarn(keys),
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon", least=1e-12, most=1.0),
            num_experts=num_experts,
            num_experts_per_tok=per_token,
            num_shared_experts=keys.integer("expert_shared_count", 0, least=0),
            moe_intermediate_size=keys.integer("expert_feed_forward_length") if num_experts else 0,
            gating=_gating(keys, names),
            norm_topk_prob=keys.boolean("expert_weights_norm", False),
            # llama.cpp writes 0 for "no scale"
            routed_scaling_factor=keys.number("expert_weights_scale", 1.0, least=0.0, most=1e6) or 1.0,
            sampling=SamplingDefaults(
                # The makers' advice for GLM-4.7-Flash where the file has none.
                temperature=keys.general_number("sampling.temp", 1.0, 0.0, 100.0),
                top_p=keys.general_number("sampling.top_p", 0.95, 0.0, 1.0),
                top_k=int(keys.general_number("sampling.top_k", 0, 0, LARGEST)),
                min_p=keys.general_number("sampling.min_p", 0.0, 0.0, 1.0),
            ),
        )


class _Keys:
    """Typed look-ups that name the key in every complaint."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata, self.prefix = metadata, architecture + "."

    def error(self, key: str, why: str) -> InputError:
        return InputError(f"{self.prefix}{key} = {self._shown(key)} {why}; the file is damaged or too new")

    def _shown(self, key: str) -> str:
        return reprlib.repr(self.metadata.get(self.prefix + key))

    def _get(self, key: str, *default: Any) -> Any:
        value = self.metadata.get(self.prefix + key)
        if value is not None:
            return value
        if default and default[0] is not None:
            return default[0]
        raise InputError(f"the file has no {self.prefix}{key}; download a newer conversion of this model")

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def integer(self, key: str, *default: int | None, least: int = 1) -> int:
        """`default` None: 0 stands for "absent"; no default: the key must be there."""
        if default == (None,) and not self.has(key):
            return 0
        value = self._get(key, *default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            raise self.error(key, f"is not a whole number from {least}")
        return value

    def number(self, key: str, *default: float, least: float, most: float) -> float:
        """The bounds are wide, and keep NaN, infinities and what float32 can't hold out of the model's arithmetic."""
        value = self._get(key, *default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.error(key, f"is not a number from {least:g} to {most:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "is not true or false")
        return value

    def general_number(self, key: str, default: float, least: float, most: float) -> float:
        value = self.metadata.get("general." + key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise InputError(
                f"general.{key} = {reprlib.repr(value)} is not a number from {least:g} to {most:g}; the file is damaged"
            )
        return value


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise InputError("the file has no tokenizer.ggml.tokens; download a newer conversion of this model")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"tokenizer.ggml.tokens = {reprlib.repr(tokens)} is not a list of tokens; the file is damaged")
    return len(tokens)


def _gating(keys: _Keys, tensor_names: set[str]) -> Gating:
    if not keys.has("expert_gating_func"):
        return "sigmoid" if any(name.endswith("exp_probs_b.bias") for name in tensor_names) else "softmax"
    value = keys.integer("expert_gating_func", least=0)
    known: dict[int, Gating] = {0: "softmax", 1: "softmax", 2: "sigmoid"}
    if value not in known:
        raise keys.error("expert_gating_func", "is neither 1 (softmax) nor 2 (sigmoid)")
    return known[value]


def _yarn(keys: _Keys) -> Yarn | None:
    kind = keys.metadata.get(keys.prefix + "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        raise keys.error("rope.scaling.type", "is neither none nor yarn")
    return Yarn(
        factor=keys.number("rope.scaling.factor", least=1.0, most=1e6),
        original_context_length=keys.integer("rope.scaling.original_context_length"),
        log_multiplier=keys.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0, most=10.0),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, least=1e-6, most=1e6),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, least=1e-6, most=1e6),
    )
