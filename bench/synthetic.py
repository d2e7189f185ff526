"""GLM-4.7-Flash at its real shapes with seeded random weights made on the device, so that speed needs no 17 GB file.

Every weight has the type that a published file gives it and the planes that `glm_mlx.weights` would make of it; all
quants take all values. Scales are set so that a matmul's output has about the size of its input and its mean is zero:
activations neither explode nor vanish over 47 layers, and time is measured on numbers, not on zeros or infinities.
The text that such a model writes means nothing.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
from gguf.constants import GGMLQuantizationType

from glm_mlx.cache import KvBits, LatentCache
from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.gguf import GGUFFile
from glm_mlx.memory import available_memory
from glm_mlx.model import Model, activation_dtype
from glm_mlx.packing import packed_nbytes
from glm_mlx.weights import Expected, expected_tensors
from kernels.planes import GROUP, IQ4_NL_VALUES, QUANT_TYPES, SUPER, QuantizedTensor, QuantType, Weight

LAYERS = 47
VOCABULARY = 154_880
DENSE = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}

InLayer = Callable[[int, int], bool]  # (layer, layers of the model)


def metadata(layers: int = LAYERS) -> dict[str, Any]:
    """What the header of a published GLM-4.7-Flash file says, as far as `Config` reads it."""
    keys = {
        "block_count": layers,
        "context_length": 202_752,
        "embedding_length": 2048,
        "feed_forward_length": 10_240,
        "attention.head_count": 20,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 768,
        "attention.kv_lora_rank": 512,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 256,
        "attention.value_length_mla": 256,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": 64,
        "rope.freq_base": 1e6,
        "leading_dense_block_count": 1,
        "expert_count": 64,
        "expert_used_count": 4,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 1536,
        "expert_group_count": 1,
        "expert_group_used_count": 1,
        "expert_weights_scale": 1.8,
        "expert_weights_norm": True,
        "expert_gating_func": 2,
    }
    return {
        "general.architecture": "deepseek2",
        "general.name": "GLM-4.7-Flash, random weights",
        "tokenizer.ggml.tokens": [""] * VOCABULARY,
    } | {f"deepseek2.{key}": value for key, value in keys.items()}


def config(layers: int = LAYERS) -> Config:
    """GLM-4.7-Flash, or its first layers. Raises InputError for a number of layers that it does not have."""
    if not 1 <= layers <= LAYERS:
        raise InputError(f"a GLM-4.7-Flash of {layers} layers can't be made; take 1 to {LAYERS}")
    return Config.from_metadata(metadata(layers), ())


@dataclass(frozen=True)
class Rule:
    """The type of the tensors whose GGUF name, without block and suffix, `pattern` matches whole, in some layers."""

    pattern: str
    type: str
    in_layer: InLayer = lambda layer, layers: True


@dataclass(frozen=True)
class Mix:
    """The composition of a published file: the type of all matrices but those of a rule. A later rule wins."""

    type: str
    rules: tuple[Rule, ...] = ()


def _first_eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _more_bits(layer: int, layers: int) -> bool:
    """llama.cpp `src/llama-quant.cpp`, `use_more_bits`: the first and last eighth, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


MIXES = {
    "q4_0": Mix("Q4_0", (Rule("output", "Q6_K"),)),
    "q4_0-imatrix": Mix("Q4_0", (Rule("output", "Q6_K"), Rule("ffn_down.*", "Q4_1", _first_eighth))),
    "q4_k_m": Mix(  # attn_k_b: its 192 columns are no multiple of a K-quant's 256
        "Q4_K", (Rule("output", "Q6_K"), Rule("ffn_down.*", "Q6_K", _more_bits), Rule("attn_k_b", "Q5_0"))
    ),
    "unsloth-q4_0": Mix(
        "Q4_0",
        (
            Rule("attn_(k_b|v_b|kv_a_mqa)", "Q8_0"),
            Rule("ffn_(gate|up)_shexp", "Q5_K"),
            Rule("ffn_down_shexp|output", "Q6_K"),
            Rule("token_embd", "Q4_K"),
        ),
    ),
    "q8_0": Mix("Q8_0"),
}


def type_of(mix: Mix, tensor: Expected, layers: int) -> str:
    """The type that a file of this mix gives a tensor of a model with so many layers."""
    block = re.match(r"blk\.(\d+)\.", tensor.source)
    stem = tensor.source[block.end() if block else 0 :].removesuffix(".weight")
    if len(tensor.shape) == 1 or stem == "ffn_gate_inp":
        return "F32"
    kind = mix.type
    for rule in mix.rules:
        if re.fullmatch(rule.pattern, stem) and rule.in_layer(int(block[1]) if block else 0, layers):
            kind = rule.type
    return kind


def tensors(cfg: Config, mix: Mix) -> Iterator[tuple[Expected, str]]:
    """Every tensor of the model and its type, in the layout of today's files."""
    split_layout = cast(GGUFFile, SimpleNamespace(tensors={}))  # no unsplit kv_b, no fused gate and up
    for tensor in expected_tensors(cfg, split_layout):
        yield tensor, type_of(mix, tensor, cfg.num_layers)


def spread(quant: QuantType) -> float:
    """Root mean square of a type's values, as a multiple of the block's scale, when all other bits are random."""
    if quant.name == "IQ4_NL":
        return float((sum(v * v for v in IQ4_NL_VALUES) / len(IQ4_NL_VALUES)) ** 0.5)
    levels = 1 << quant.bits
    variance, mean = (levels**2 - 1) / 12, (levels - 1) / 2
    if not quant.is_super:
        return float((variance if quant.has_mins else variance + (mean - quant.zero) ** 2) ** 0.5)
    if quant.has_mins:  # scale (q - mean) + mean (scale - minimum), both of them 6-bit numbers
        return float((63 * 127 / 6 * variance + mean**2 * 2 * (64**2 - 1) / 12) ** 0.5)
    return float(((256**2 - 1) / 12 + 0.25) ** 0.5 * (variance + (mean - quant.zero) ** 2) ** 0.5)


def random_weight(kind: str, shape: tuple[int, ...], std: float, key: mx.array) -> Weight:
    """A weight (..., rows, cols) of a GGUF type with values of this standard deviation and mean 0, lazily."""
    if kind in DENSE:
        return (mx.random.normal(shape, key=key) * std).astype(DENSE[kind])
    quant, (*rows, cols) = QUANT_TYPES[kind], shape
    keys = mx.random.split(key, 3)
    quants = _random_words(keys[0], (*rows, cols * quant.bits // 32))
    uniform = mx.random.uniform(-1, 1, (*rows, cols // (SUPER if quant.is_super else GROUP)), key=keys[1])
    # 0.5 to 1.5 times one size, of either sign
    size = std / (13 / 12) ** 0.5 / spread(quant)
    scales = mx.where(uniform < 0, uniform - 0.5, uniform + 0.5) * size
    mins = sub_scales = None
    if quant.has_mins:
        mean = ((1 << quant.bits) - 1) / 2
        mins = (scales * (mean if quant.is_super else -mean)).astype(mx.float16)
    if quant.is_super:
        width = cols // SUPER * 12 if quant.has_mins else cols // 16
        sub_scales = _random_words(keys[2], (*rows, width // 4)).view(mx.uint8 if quant.has_mins else mx.int8)
    return QuantizedTensor(quant, tuple(shape), quants, scales.astype(mx.float16), mins, sub_scales)


def _random_words(key: mx.array, shape: tuple[int, ...]) -> mx.array:
    """uint32 with all bits random. (`randint` draws from float32, whose 24 bits leave the lowest ones zero.)"""
    count = 1
    for n in shape:
        count *= n
    return mx.random.split(key, -(-count // 2)).reshape(-1)[:count].reshape(shape)


def make_weights(cfg: Config, mix: Mix, seed: int = 0) -> dict[str, Weight]:
    """The weights of a model, by the names that `glm_mlx.weights` gives them. The same seed gives the same weights.

    Made tensor by tensor, so that no more memory is needed than for the weights and one tensor's scales in float32.
    Raises InputError where they do not fit.
    """
    planned = list(tensors(cfg, mix))
    needed = sum(packed_nbytes(GGMLQuantizationType[kind], tensor.shape) for tensor, kind in planned)
    if needed > (available := available_memory()):
        raise InputError(
            f"{cfg.num_layers} layers need {needed / 1e9:.1f} GB of memory, this machine has {available / 1e9:.1f} GB "
            "to give; take fewer with --layers"
        )
    weights: dict[str, Weight] = {}
    for number, (tensor, kind) in enumerate(planned):
        # A key by the tensor's place, so that a model of fewer layers has the same weights in those.
        key, shape = mx.random.key(seed << 16 | number), tensor.shape
        if tensor.name.endswith("norm"):
            weight: Weight = mx.ones(shape)
        elif tensor.name.endswith("e_score_correction_bias"):
            weight = 9.03 + 0.02 * mx.random.normal(shape, key=key)  # as reported of the real model
        else:
            weight = random_weight(kind, shape, 1.0 if tensor.name == "embed_tokens" else shape[-1] ** -0.5, key)
        mx.eval(weight if isinstance(weight, mx.array) else weight.planes)
        weights[tensor.name] = weight
    return weights


@dataclass(frozen=True)
class Synthetic:
    """A model without a file, and what it was made of."""

    config: Config
    weights: Mapping[str, Weight]
    model: Model


def make_model(
    cfg: Config, mix: str = "q4_0", seed: int = 0, dtype: mx.Dtype | None = None, kv_bits: KvBits = 16
) -> Synthetic:
    """A model of this shape, from `config`, and the mix of this name. Raises InputError for an unknown one."""
    if mix not in MIXES:
        raise InputError(f"there is no mix {mix}; take one of {', '.join(MIXES)}")
    weights = make_weights(cfg, MIXES[mix], seed)
    return Synthetic(cfg, weights, Model(cfg, weights, dtype or activation_dtype(), kv_bits))


def fill_cache(cache: LatentCache, count: int, seed: int = 0) -> None:
    """Random rows behind those that a cache has, of about the size of real ones: a context that nobody has to read."""
    if count < 1:
        return
    for layer in range(len(cache.rows)):
        new = mx.random.normal((1, count, cache.format.values), key=mx.random.key(seed << 16 | layer))
        mx.eval(cache.update(layer, new))
    cache.advance(count)


def by_type(weights: Mapping[str, Weight]) -> dict[str, tuple[int, int]]:
    """GGUF type -> (tensors, bytes), the most bytes first."""
    names = {dtype: name for name, dtype in DENSE.items()}
    found: dict[str, tuple[int, int]] = {}
    for weight in weights.values():
        name = names[weight.dtype] if isinstance(weight, mx.array) else weight.type.name
        count, nbytes = found.get(name, (0, 0))
        found[name] = (count + 1, nbytes + weight.nbytes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
