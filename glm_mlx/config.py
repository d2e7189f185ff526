"""The shape of a model, made only from a GGUF file's metadata.

Key names: llama.cpp `gguf-py/gguf/constants.py`. Field names: transformers `Glm4MoeLiteConfig`.
"""

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gguf.constants import RopeScalingType

from glm_mlx.errors import InputError
from kernels.route import Gating

ARCHITECTURES = ("deepseek2", "glm4moelite")  # the second in Ollama's files
ONLY_WITHOUT = "use a file without it: GLM-4.7-Flash and DeepSeek-V2-Lite need none"
FACTORS = (
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scale_linear",
)
LARGEST = 1 << 31  # no dimension of a real model is near it; products stay well inside 64 bits


@dataclass(frozen=True)
class Yarn:
    """YaRN position scaling (arXiv 2309.00071) as llama.cpp's `deepseek2` graph applies it."""

    factor: float
    original_context_length: int
    log_multiplier: float  # 0.1 * mscale_all_dim of the checkpoint; programs differ where a file does not say it
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
    notes: tuple[str, ...]  # what a user should know of these metadata, a line each

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
                raise keys.error(key, "means group-limited routing", ONLY_WITHOUT)
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
        gating = _gating(keys, names)
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
            gating=gating,
            norm_topk_prob=keys.boolean("expert_weights_norm", False),
            # llama.cpp writes 0 for "no scale"
            routed_scaling_factor=keys.number("expert_weights_scale", 1.0, least=0.0, most=1e6) or 1.0,
            sampling=_sampling(keys),
            notes=tuple(keys.notes),
        )


class _Keys:
    """Typed look-ups that name the key in every complaint."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str):
        self.metadata, self.prefix = metadata, architecture + "."
        self.notes: list[str] = []

    def error(self, key: str, why: str, advice: str = "the file is damaged or too new") -> InputError:
        return InputError(f"{self.prefix}{key} = {self._shown(key)} {why}; {advice}")

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

    def advice(self, key: str, default: float, wanted: str, is_good: Callable[[float], bool]) -> float:
        """A setting of the sampler that the file advises. One that cannot be followed is noted, and `default` taken."""
        value = self.metadata.get("general.sampling." + key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not is_good(value):
            self.notes.append(
                f"the file advises general.sampling.{key} = {reprlib.repr(value)}, which is not {wanted}; "
                f"the default is {default:g} instead"
            )
            return default
        return value


def _sampling(keys: _Keys) -> SamplingDefaults:
    """The file's advice within the range of `sampling.SamplingParams`, else the makers' for GLM-4.7-Flash."""
    temperature = keys.advice("temp", 1.0, "0 to 1000", lambda value: 0 <= value <= 1e3)
    top_k = keys.advice("top_k", 0, "a number of tokens, or -1 for all", lambda value: abs(value) < LARGEST)
    return SamplingDefaults(
        temperature=temperature if temperature >= 1e-3 else 0.0,  # next to 0 means the most likely token
        top_p=keys.advice("top_p", 0.95, "above 0 and at most 1", lambda value: 0 < value <= 1),
        top_k=max(0, int(top_k)),  # llama.cpp takes all below 1 for "off"
        min_p=keys.advice("min_p", 0.0, "0 to 1", lambda value: 0 <= value <= 1),
    )


def _vocab_size(keys: _Keys) -> int:
    tokens = keys.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise InputError("the file has no tokenizer.ggml.tokens; download a newer conversion of this model")
    if not isinstance(tokens, list) or not tokens:
        raise InputError(f"tokenizer.ggml.tokens = {reprlib.repr(tokens)} is not a list of tokens; the file is damaged")
    return len(tokens)


def _gating(keys: _Keys, tensor_names: set[str]) -> Gating:
    has_bias = any(name.endswith("exp_probs_b.bias") for name in tensor_names)
    value = keys.integer("expert_gating_func", 0, least=0)
    if value == 0:  # unsaid
        return "sigmoid" if has_bias else "softmax"
    known: dict[int, Gating] = {1: "softmax", 2: "sigmoid"}
    if value not in known:
        raise keys.error("expert_gating_func", "is neither 1 (softmax) nor 2 (sigmoid)", ONLY_WITHOUT)
    if known[value] == "softmax" and has_bias:
        keys.notes.append(
            f"{keys.prefix}expert_gating_func = 1 means softmax, but the file has exp_probs_b, which goes with sigmoid "
            "(2), as is right for GLM-4.7-Flash; softmax is used, as the file says: if this is GLM-4.7-Flash, take "
            "another conversion"
        )
    return known[value]


def _yarn(keys: _Keys) -> Yarn | None:
    for key in FACTORS:  # no model of these has one, and programs disagree about what they multiply
        if keys.metadata.get(keys.prefix + key, 1) != 1:
            raise keys.error(key, "is a factor that is not applied here", ONLY_WITHOUT)
    kind = keys.metadata.get(keys.prefix + "rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind != "yarn":
        known = [item.value for item in RopeScalingType]
        advice = (ONLY_WITHOUT,) if kind in known else ()
        raise keys.error("rope.scaling.type", "is neither none nor yarn", *advice)
    log_multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0, least=0.0, most=10.0)
    if not log_multiplier:
        given = "is 0" if keys.has("rope.scaling.yarn_log_multiplier") else "is missing"
        raise InputError(
            f"{keys.prefix}rope.scaling.yarn_log_multiplier {given} beside rope.scaling.type = 'yarn', and without it "
            "programs compute different things; take a conversion that names it (0.1 * mscale_all_dim)"
        )
    return Yarn(
        factor=keys.number("rope.scaling.factor", least=1.0, most=1e6),
        original_context_length=keys.integer("rope.scaling.original_context_length"),
        log_multiplier=log_multiplier,
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0, least=1e-6, most=1e6),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0, least=1e-6, most=1e6),
    )
