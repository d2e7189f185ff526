"""mlx-lm's own model with our weights, converted in memory and timed through mlx-lm's own `generate_step`.

Facts are from mlx-lm 0.32.2: `models/glm4_moe_lite.py` (names, shapes), `models/mla.py`, `models/switch_layers.py`,
`utils.py` (which modules are quantised how) and `generate.py` (`stream_generate`: wired limit, stream, cache, sampler).
"""

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from rich.filesize import decimal

from bench import contest, script, synthetic
from bench.contest import Turn, UnavailableError
from bench.decode import WARM_UP
from glm_mlx.cache import LatentCache, row_format
from glm_mlx.config import Config
from glm_mlx.model import decode_bytes
from kernels.planes import GROUP, QuantizedTensor, Weight, dequantize_ops, group_scales
from kernels.shown import shown

PIECE = 1 << 24  # values expanded at a time

NAMES = {
    "lm_head": "lm_head",
    "self_attn.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attn.k_b": "self_attn.embed_q",
    "self_attn.v_b": "self_attn.unembed_out",
    "mlp.e_score_correction_bias": "mlp.gate.e_score_correction_bias",
    **{f"mlp.experts.{part}_proj": f"mlp.switch_mlp.{part}_proj" for part in ("gate", "up", "down")},
}


@dataclass(frozen=True)
class Held:
    """A weight as MLX holds it. how: in words. scales None: dense. bits: of a quant."""

    how: str
    is_exact: bool
    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0

    @property
    def arrays(self) -> dict[str, mx.array]:
        named = {"weight": self.weight, "scales": self.scales, "biases": self.biases}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def convert(weight: Weight, dtype: mx.Dtype) -> Held:
    """A weight as MLX's affine quantisation: value = scale * q + bias, groups of 32, scales and biases in `dtype`.

    The quants are not copied. A type whose groups are of another form (Q6_K, IQ4_NL) is quantised anew, in 8 bits.
    Biases of types without minima are -zero * scale, as in `kernels.planes`.
    """
    name = script.dtype_name(dtype)
    if isinstance(weight, mx.array):
        held = weight if weight.dtype == dtype else weight.astype(dtype)
        return Held(f"dense {name}", dtype in (weight.dtype, mx.float32), held)
    kind = weight.type
    if kind.name in ("Q6_K", "IQ4_NL"):
        return _quantized_anew(weight, dtype)
    scales, mins = group_scales(weight)
    # All zeros are powers of two: a bias is rounded as its scale is, and the quant that stands for 0 stays 0.
    biases = scales * -kind.zero if mins is None else mins
    # float16 holds the scales of a file as they are; the product of two, as K-quants have them, needs more.
    is_exact = dtype == mx.float32 or (dtype == mx.float16 and not kind.is_super)
    how = f"{kind.bits} bits, groups of {GROUP}, scales {'' if is_exact else 'rounded to '}{name}"
    return Held(how, is_exact, weight.quants, scales.astype(dtype), biases.astype(dtype), kind.bits)


def _quantized_anew(weight: QuantizedTensor, dtype: mx.Dtype) -> Held:
    rows = max(1, PIECE // math.prod(weight.shape[1:]))
    pieces = []
    for start in range(0, weight.shape[0], rows):
        pieces.append(mx.quantize(dequantize_ops(weight[start : start + rows]), group_size=GROUP, bits=8))
        mx.eval(pieces[-1])
    quants, scales, biases = (mx.concatenate(list(parts)) for parts in zip(*pieces, strict=True))
    how = f"quantised anew, 8 bits, groups of {GROUP}, scales {script.dtype_name(dtype)}"
    return Held(how, False, quants, scales.astype(dtype), biases.astype(dtype), 8)


def name_of(ours: str) -> str:
    """The module or array of mlx-lm's model that holds a weight of ours."""
    layer, dot, rest = "", "", ours
    if ours.startswith("layers."):
        _, number, rest = ours.split(".", 2)
        layer, dot = f"layers.{number}", "."
    name = NAMES.get(rest, rest)
    return name if name == "lm_head" else f"model.{layer}{dot}{name}"


def model_args(cfg: Config) -> dict[str, Any]:
    """What mlx-lm's model would find in the checkpoint's `config.json`.

    Raises UnavailableError for a model that its class does not run.
    """
    if cfg.num_experts and cfg.gating != "sigmoid":
        raise UnavailableError("its glm4_moe_lite chooses experts by sigmoids, this model by softmax")
    if cfg.yarn is not None:
        raise UnavailableError("this script converts no YaRN scaling for it; take a GLM-4.7-Flash")
    return {
        "model_type": "glm4_moe_lite",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "moe_intermediate_size": cfg.moe_intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_heads,
        "n_shared_experts": cfg.num_shared_experts or None,
        "n_routed_experts": cfg.num_experts or None,
        "routed_scaling_factor": cfg.routed_scaling_factor,
        "kv_lora_rank": cfg.kv_lora_rank,
        "q_lora_rank": cfg.q_lora_rank,
        "qk_rope_head_dim": cfg.qk_rope_head_dim,
        "qk_nope_head_dim": cfg.qk_nope_head_dim,
        "v_head_dim": cfg.v_head_dim,
        "norm_topk_prob": cfg.norm_topk_prob,
        "num_experts_per_tok": cfg.num_experts_per_tok,
        "first_k_dense_replace": cfg.first_k_dense,
        "max_position_embeddings": cfg.context_length,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope_theta,
    }


@dataclass(frozen=True)
class Library:
    """Parts of mlx-lm, by its own names. architecture: its module of this model. stream: `generation_stream`."""

    version: str
    architecture: Any
    make_prompt_cache: Callable[[Any], list[Any]]
    generate_step: Callable[..., Iterator[tuple[int, mx.array]]]
    wired_limit: Callable[[Any, list[Any]], AbstractContextManager[None]]
    stream: Any
    make_sampler: Callable[..., Callable[[mx.array], mx.array]]


def import_library() -> Library:
    """Raises UnavailableError where mlx-lm, or something that it needs, is missing."""
    if importlib.util.find_spec("mlx_lm") is None:
        raise UnavailableError("not installed: pip install mlx-lm")
    try:
        generate = importlib.import_module("mlx_lm.generate")
        return Library(
            version("mlx-lm"),
            importlib.import_module("mlx_lm.models.glm4_moe_lite"),
            importlib.import_module("mlx_lm.models.cache").make_prompt_cache,
            generate.generate_step,
            generate.wired_limit,
            generate.generation_stream,
            importlib.import_module("mlx_lm.sample_utils").make_sampler,
        )
    except ImportError as error:
        raise UnavailableError(
            f"its mlx_lm.generate can't be imported ({shown(str(error), 200)}): pip install mlx-lm, with what it needs"
        ) from None


def fill_cache(caches: list[Any], cfg: Config, dtype: mx.Dtype, count: int) -> None:
    """The random rows of `synthetic.fill_cache`, cut into mlx-lm's keys (the latent) and values (k_pe)."""
    ours = LatentCache(cfg.num_layers, row_format(cfg, dtype))
    synthetic.fill_cache(ours, count)
    for layer, theirs in enumerate(caches):
        rows = ours.rows[layer]
        if rows is None:  # nothing to fill
            return
        ours.rows[layer] = None
        latent, k_pe = mx.split(rows[:, None, :count], [cfg.kv_lora_rank], axis=-1)
        mx.eval(theirs.update_and_fetch(latent, k_pe))


class MlxLm:
    """mlx-lm's model with our weights, its scales and activations in the type of ours.

    rounded: names, as ours, of weights that it holds inexactly.
    """

    def __init__(self, cfg: Config, weights: dict[str, Weight], dtype: mx.Dtype, room: int):
        """Empties `weights`; `room`: bytes of memory that they leave.

        Raises UnavailableError where mlx-lm is missing, does not run this model, or memory is short.
        """
        self.cfg, self.dtype = cfg, dtype
        args = model_args(cfg)
        self.library = import_library()
        held = {
            # mlx-lm keeps these in float32 too
            name: convert(weight, mx.float32 if name.endswith("e_score_correction_bias") else dtype)
            for name, weight in weights.items()
        }
        more = sum(array.nbytes for name in held for array in _own_arrays(held[name], weights[name]))
        if more > room:
            raise UnavailableError(
                f"its scales and biases need {decimal(more)} more memory than ours, {decimal(max(room, 0))} "
                "are left; take fewer --layers"
            )
        fixed, per_row = decode_bytes(cfg, cast("Mapping[str, Weight]", held), row_format(cfg, dtype))
        self.details: dict[str, Any] = {
            "version": self.library.version,
            "activations": script.dtype_name(dtype),
            "more_memory": more,
            "bytes_a_token": {"weights": fixed, "each_row_of_the_cache": per_row},
            "weights": _how(weights, held),
        }
        self.notes = [
            f"{entry['type']} in mlx-lm: {entry['held_as']}"
            for entry in self.details["weights"]
            if not entry["exact"] and entry["type"] not in synthetic.DENSE
        ]
        self.rounded = {name for name in held if not held[name].is_exact}
        for name in held:  # our scales go as theirs are made
            mx.eval(list(held[name].arrays.values()))
            del weights[name]
        architecture = self.library.architecture
        self.model = architecture.Model(architecture.ModelArgs.from_dict(args))
        _load(self.model, held if "lm_head" in held else held | {"lm_head": held["embed_tokens"]})

    def measure(self, turn: Turn, count: int) -> None:
        """Fill `turn` with WARM_UP and then `count` tokens, generated as `stream_generate` has it, less the text.

        The cache is mlx-lm's own; a context that is not read is put into it before the clock starts.
        """
        prompt = contest.prompt_tokens(turn.depth, self.cfg.vocab_size)
        caches = self.library.make_prompt_cache(self.model)
        known = 0
        if turn.fill == "random":
            known = len(prompt) - 1
            fill_cache(caches, self.cfg, self.dtype, known)
        tokens = mx.array(prompt[known:])
        with self.library.wired_limit(self.model, [self.library.stream]):
            last = time.perf_counter()
            steps = self.library.generate_step(
                tokens,
                self.model,
                self.library.stream,
                max_tokens=1 + WARM_UP + count,  # the first comes from the prompt
                sampler=self.library.make_sampler(temp=0),
                prompt_cache=caches,
            )
            for n, (token, _) in enumerate(steps):
                now = time.perf_counter()
                turn.tokens.append(token)
                if n:
                    (turn.warm_up if n <= WARM_UP else turn.seconds).append(now - last)
                elif turn.fill == "prefill":
                    turn.time_to_first_token = now - last
                last = now


def _load(model: Any, held: Mapping[str, Held]) -> None:
    """As mlx-lm loads a quantised checkpoint: modules are exchanged for quantised ones, then every array is set."""
    modules = {name_of(name): kept for name, kept in held.items()}

    def quantisation(path: str, module: Any) -> bool | dict[str, int]:
        kept = modules.get(path)
        if kept is None or kept.scales is None:
            return False
        return {"group_size": GROUP, "bits": kept.bits}

    nn.quantize(model, class_predicate=quantisation)  # type: ignore[attr-defined]
    arrays = [
        (path if path.endswith("e_score_correction_bias") else f"{path}.{part}", array)
        for path, kept in modules.items()
        for part, array in kept.arrays.items()
    ]
    model.load_weights(arrays, strict=True)
    model.eval()
    mx.eval(model.parameters())


def _own_arrays(held: Held, ours: Weight) -> Iterator[mx.array]:
    """Those that are no array of ours."""
    shared = {id(array) for array in ((ours,) if isinstance(ours, mx.array) else ours.planes)}
    yield from (array for array in held.arrays.values() if id(array) not in shared)


def _how(weights: Mapping[str, Weight], held: Mapping[str, Held]) -> list[dict[str, Any]]:
    """For each type of the file how MLX holds it, with the number of tensors and the bytes there and here."""
    found: dict[tuple[str, str, bool], list[int]] = {}
    for name, weight in weights.items():
        ((kind, _),) = synthetic.by_type({name: weight}).items()
        kept = held[name]
        total = found.setdefault((kind, kept.how, kept.is_exact), [0, 0, 0])
        for i, more in enumerate((1, weight.nbytes, kept.nbytes)):
            total[i] += more
    return [
        {"type": kind, "held_as": how, "exact": exact, "tensors": n, "bytes": ours, "bytes_held": theirs}
        for (kind, how, exact), (n, ours, theirs) in found.items()
    ]
