"""mlx-lm's own model with our weights, as a contestant: converted in memory, checked against ours, and timed.

Only `mlx_lm.models` is imported, which needs nothing but MLX. Facts are from mlx-lm 0.32.2: `models/glm4_moe_lite.py`
(names, shapes), `models/mla.py`, `models/switch_layers.py`, `utils.py` (which modules are quantised how) and
`generate.py` (chunks of 2,048 tokens, the last token of a prompt by itself, one step of look-ahead).
"""

import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from rich.filesize import decimal

from bench import contest, script, synthetic
from bench.contest import WARM_UP, Turn, UnavailableError
from bench.subject import Subject
from glm_mlx.cache import LatentCache, row_format
from glm_mlx.config import Config
from glm_mlx.model import Model, decode_bytes
from kernels import launcher
from kernels.planes import GROUP, QuantizedTensor, Weight, dequantize_ops, group_scales

PREFILL_CHUNK = 2048  # tokens
TOKENS = 8  # on which layers are compared
PIECE = 1 << 24  # values expanded at a time
# What a step may differ by in float32 arithmetic, as a share of what it gives. Seen on the small model and on layers of
# the real shapes: 3e-7 with scales in float32, 0.008 with scales in bfloat16 and Q6_K held in 8 bits.
EXACT, ROUNDED = 1e-4, 0.02

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


def step_of(name: str) -> str:
    """The step of the model to which a weight belongs: a layer, the embedding or the head with its norm."""
    return ".".join(name.split(".")[:2]) if name.startswith("layers.") else "lm_head" if name == "norm" else name


def import_models() -> tuple[Any, Callable[[Any], list[Any]], str]:
    """mlx-lm's `models.glm4_moe_lite`, its maker of caches, and its version.

    Importing `mlx_lm` itself would import transformers too, so an empty package stands in for it. Raises
    UnavailableError where it is missing.
    """
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or spec.submodule_search_locations is None:
        raise UnavailableError(
            "not installed: pip install --no-deps mlx-lm (the rest of what it asks for is not needed)"
        )
    package = ModuleType("mlx_lm")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules.setdefault("mlx_lm", package)
    model = importlib.import_module("mlx_lm.models.glm4_moe_lite")
    cache = importlib.import_module("mlx_lm.models.cache")
    return model, cache.make_prompt_cache, version("mlx-lm")


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
    """mlx-lm's model with the weights of `subject`, its scales and activations in the type of ours."""

    name = "mlx-lm"
    warms_up_itself = False

    def __init__(self, subject: Subject):
        """Raises UnavailableError where mlx-lm is missing or memory is short, or its model computes something else."""
        self.cfg, self.dtype = subject.config, subject.model.dtype
        args = model_args(self.cfg)
        module, self._make_cache, release = import_models()
        held = {
            # mlx-lm keeps these in float32 too
            name: convert(weight, mx.float32 if name.endswith("e_score_correction_bias") else self.dtype)
            for name, weight in subject.weights.items()
        }
        more = sum(array.nbytes for name in held for array in _own_arrays(held[name], subject.weights[name]))
        if more > subject.room:
            raise UnavailableError(
                f"its scales and biases need {decimal(more)} more memory than ours, {decimal(max(subject.room, 0))} "
                "are left; take fewer --layers"
            )
        fixed, per_row = decode_bytes(self.cfg, cast("Mapping[str, Weight]", held), row_format(self.cfg, self.dtype))
        self.details: dict[str, Any] = {
            "version": release,
            "activations": script.dtype_name(self.dtype),
            "more_memory": more,
            "bytes_a_token": {"weights": fixed, "each_row_of_the_cache": per_row},
            "weights": _how(subject.weights, held),
        }
        self.notes = [
            f"{entry['type']} in mlx-lm: {entry['held_as']}"
            for entry in self.details["weights"]
            if not entry["exact"] and entry["type"] not in synthetic.DENSE
        ]
        self.model = module.Model(module.ModelArgs.from_dict(args))
        _load(self.model, held if "lm_head" in held else held | {"lm_head": held["embed_tokens"]})
        self._check(subject, {step_of(name) for name in held if not held[name].is_exact})

    def measure(self, turn: Turn, count: int) -> None:
        prompt = contest.prompt_tokens(turn.depth, self.cfg.vocab_size)
        caches = self._make_cache(self.model)
        known = 0
        if turn.fill == "random":
            known = len(prompt) - 1
            fill_cache(caches, self.cfg, self.dtype, known)
        start = time.perf_counter()
        token = self._greedy(self._prefill(mx.array([prompt[known:]]), caches))
        mx.eval(token)
        last = time.perf_counter()
        if turn.fill == "prefill":
            turn.time_to_first_token = last - start
        wanted = WARM_UP + count if count else 0
        for n in range(wanted + 1):
            if count:  # one more than wanted: beside the last token too the next one is computed
                ahead = self._greedy(self.model(token[:, None], cache=caches)[:, -1])
                mx.async_eval(ahead)
            turn.tokens.append(int(cast(int, token.item())))
            if n:
                now = time.perf_counter()
                (turn.warm_up if n <= WARM_UP else turn.seconds).append(now - last)
                last = now
            if count:
                token = ahead
        mx.synchronize()

    def _prefill(self, prompt: mx.array, caches: list[Any]) -> mx.array:
        """(1, L) -> the logits of the last token, (1, vocabulary)."""
        last = prompt.shape[1] - 1
        for begin in range(0, last, PREFILL_CHUNK):
            self.model(prompt[:, begin : min(begin + PREFILL_CHUNK, last)], cache=caches)
            mx.eval([cache.state for cache in caches])
            mx.clear_cache()
        return cast(mx.array, self.model(prompt[:, last:], cache=caches)[:, -1])

    @staticmethod
    def _greedy(logits: mx.array) -> mx.array:
        return mx.argmax(logits, axis=-1)

    def _check(self, subject: Subject, rounded: set[str]) -> None:
        """`rounded`: steps with a weight that is held inexactly.

        Raises UnavailableError where a step computes something else than ours.
        """
        exact = Model(subject.config, dict(subject.weights), mx.float32)  # which may move its weights
        with launcher.avoiding():
            errors = dict(self._step_errors(exact))
        budgets = {step: ROUNDED if step in rounded else EXACT for step in errors}
        logits = self._logit_errors(exact, subject.model)
        self.details["agreement"] = {
            "steps_in_float32": {step: {"error": errors[step], "budget": budgets[step]} for step in errors},
            "first_logits": logits,
        }
        for step, error in errors.items():
            if not error <= budgets[step]:
                raise UnavailableError(
                    f"its {step} differs from ours by {error:.2g} (budget {budgets[step]}): it computes something else "
                    "and is not timed"
                )
        worst = max(errors, key=errors.__getitem__)
        self.notes.append(
            f"mlx-lm computes what we do: step by step in float32 it differs by at most {errors[worst]:.2g} ({worst})"
        )
        for what, found in logits.items():
            if not math.isfinite(found["mlx-lm"]):
                raise UnavailableError(f"its logits of the {what} are not finite; they are not timed")
            self.notes.append(
                f"logits of the {what}, relative error against ours in float32: ours {found[contest.OURS]:.2g}, "
                f"mlx-lm {found['mlx-lm']:.2g}; {'the same' if found['same_token'] else 'another'} greedy token"
            )

    def _step_errors(self, exact: Model) -> Iterator[tuple[str, float]]:
        """Every step of the model on our input, in float32: the median over tokens, since one of two experts that are
        all but equal may win here and the other there. Theirs takes token by token, as when it decodes."""
        prompt = mx.array([contest.prompt_tokens(TOKENS, self.cfg.vocab_size)])
        cache, caches = exact.new_cache(), self._make_cache(self.model)
        x = exact.embed(prompt)
        yield "embed_tokens", _relative(self.model.model.embed_tokens(prompt).astype(mx.float32), x)
        for number, layer in enumerate(self.model.model.layers):
            out = exact.layers[number](x, cache)
            parts = [layer(x[:, t : t + 1], None, cache=caches[number]) for t in range(TOKENS)]
            yield f"layers.{number}", _relative(mx.concatenate(parts, axis=1) - x, out - x)
            x = out
        yield "lm_head", _relative(self.model.lm_head(self.model.model.norm(x)), exact.logits(x))

    def _logit_errors(self, exact: Model, ours: Model) -> dict[str, dict[str, Any]]:
        """Of the whole models, each in its own arithmetic, after a prompt and after one decoded token more."""
        prompt = mx.array([contest.prompt_tokens(TOKENS + 1, self.cfg.vocab_size)])
        with launcher.avoiding():
            truth = our_logits(exact, prompt)
        found, caches = our_logits(ours, prompt), self._make_cache(self.model)
        theirs = [self._prefill(prompt[:, :-1], caches), self.model(prompt[:, -1:], cache=caches)[:, -1]]
        return {
            what: {
                contest.OURS: _relative(a, exactly),
                "mlx-lm": _relative(b, exactly),
                "same_token": bool(mx.argmax(a) == mx.argmax(b)),
            }
            for what, exactly, a, b in zip(("prompt", "decoded token"), truth, found, theirs, strict=True)
        }


def our_logits(model: Model, tokens: mx.array) -> list[mx.array]:
    """(1, L) -> the logits (1, vocabulary) of token L - 1, the last of a prompt, and of token L, decoded as usual."""
    cache = model.new_cache()
    prompt = model.logits(model.hidden_states(tokens[:, :-1], cache)[:, -1:])[:, 0]
    mx.eval(prompt, [rows for rows in cache.rows if rows is not None])
    if mx.default_device() == mx.Device(mx.gpu):
        decoded, _ = model.step(tokens[:, -1:], mx.array([cache.offset], mx.int32), cache.reserve(1))
    else:
        decoded = model.logits(model.hidden_states(tokens[:, -1:], cache))[:, 0]
    mx.eval(decoded)
    return [prompt, decoded]


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


def _relative(a: mx.array, exact: mx.array) -> float:
    """Root mean square of the difference to that of `exact`, over the last axis; of several tokens the median."""
    a, exact = a.astype(mx.float32), exact.astype(mx.float32)
    ratios = mx.sqrt((a - exact).square().sum(axis=-1) / exact.square().sum(axis=-1))
    return float(np.median(np.asarray(ratios)))
