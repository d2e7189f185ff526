"""The product against the reference: every layer is fed the reference's input, so its error is its own."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from glm_mlx import weights
from glm_mlx.cache import LatentCache, row_format
from glm_mlx.config import Config
from glm_mlx.gguf import GGUFFile
from glm_mlx.model import Block, Model, Weights
from kernels.embed import embed_ops
from kernels.planes import Weight
from kernels.qmv import qmv_ops
from parity_tests.budgets import BUDGETS, NEAR_TIE, NEAR_TIE_16, relative_error
from reference.model import Reference

Array = npt.NDArray[np.float32]
Taps = dict[str, Array]
LAYER_TAPS = ("attn_norm", "q", "latent", "k_pe", "attn_out", "ffn_norm", "router_logits", "ffn_out", "out")


@dataclass(frozen=True)
class TapError:
    """One compared value. kind: the budget's class. swaps: expert choices that differ; excused: at a near-tie."""

    name: str
    kind: str
    error: float
    swaps: int = 0
    excused: int = 0

    @property
    def within_budget(self) -> bool:
        return self.error <= BUDGETS[self.kind].most


def load_part(path: Path, wanted: Callable[[str], bool]) -> tuple[Config, dict[str, Weight]]:
    """The product's configuration and those of its weights whose names are wanted."""
    gguf = GGUFFile(path)
    cfg = Config.from_metadata(gguf.metadata, gguf.tensors)
    plan = [(expected, info) for expected, info in weights.plan(gguf, cfg) if wanted(expected.name)]
    return cfg, weights.load(gguf, cfg, plan)


def load_whole(path: Path, dtype: mx.Dtype = mx.float32) -> Model:
    cfg, tensors = load_part(path, lambda name: True)
    return Model(cfg, tensors, dtype)


def compare_layers(
    path: Path, tokens: Sequence[int], layers: Collection[int] | None = None, dtype: mx.Dtype = mx.float32
) -> Iterator[TapError]:
    """Compare embedding, the given layers (default: all) and, if the last layer is among them, the head.

    Other dtypes than float32 are held to the 16-bit budgets. Both sides hold one layer at a time, so that a 17 GB file
    fits a 32 GB machine.
    """
    for tap in _compare_layers(path, tokens, layers, dtype):
        yield tap if dtype == mx.float32 else replace(tap, kind=f"{tap.kind}, 16-bit")


def _compare_layers(
    path: Path, tokens: Sequence[int], layers: Collection[int] | None, dtype: mx.Dtype
) -> Iterator[TapError]:
    reference = Reference(path)
    chosen = set(range(reference.n_layers)) if layers is None else set(layers)
    x = reference.embed(tokens)
    cfg, tensors = load_part(path, lambda name: name == "embed_tokens")
    got = embed_ops(tensors["embed_tokens"], mx.array(np.asarray(tokens)[None]), dtype)
    yield TapError("embed", "embed", relative_error(to_numpy(got)[0], x))
    for i in range(max(chosen) + 1):
        want = reference.layer(i, x)
        if i in chosen:
            prefix = f"layers.{i}."
            _, tensors = load_part(path, lambda name, prefix=prefix: name.startswith(prefix))  # type: ignore[misc]
            block = Block(cfg, Weights(tensors, prefix), i)
            got_taps = product_taps(cfg, block, i, x, dtype)
            if dtype == mx.float32:
                yield from compare_taps(prefix, got_taps, want)
            else:
                yield from compare_taps(prefix, got_taps, want, NEAR_TIE_16, residual=x)
        x = want["out"]
    if reference.n_layers - 1 in chosen:
        _, tensors = load_part(path, lambda name: name in ("norm", "lm_head", "embed_tokens"))
        norm = Weights(tensors, "").norm("norm", cfg)(mx.array(x[None]).astype(dtype))
        logits = qmv_ops(norm, tensors.get("lm_head", tensors["embed_tokens"]))
        want = reference.head(x)
        yield TapError("output_norm", "layer taps", relative_error(to_numpy(norm)[0], want["output_norm"]))
        yield TapError("logits", "logits", relative_error(to_numpy(logits)[0], want["logits"]))


def product_taps(cfg: Config, block: Block, layer: int, x: Array, dtype: mx.Dtype = mx.float32) -> Taps:
    """The product's named values of one layer for a whole sequence (T, D)."""
    taps: Taps = {}
    cache = LatentCache(cfg.num_layers, row_format(cfg, dtype))
    block(mx.array(x[None]).astype(dtype), cache, lambda name, value: taps.__setitem__(name, to_numpy(value)))
    rows = len(x)
    return {name: tap.reshape(rows, *tap.shape[-1:]) if name != "q" else tap[0] for name, tap in taps.items()}


def compare_taps(
    prefix: str, got: Taps, want: Taps, near_tie: float = NEAR_TIE, residual: Array | None = None
) -> Iterator[TapError]:
    """Tap by tap in the order of computation. The reference tells routed and shared experts apart, the product not.

    Tokens whose expert choice differs at a near-tie are left out of what follows from that choice. `residual`, the
    layer's input, is given for 16 bits: the product adds it in the same launch, so that what it knows of `attn_out` and
    `ffn_out` is their sum with it, rounded; those sums are compared then.
    """
    got, want = dict(got), dict(want)
    if "experts_out" in want:
        want["ffn_out"] = want["experts_out"] + want.get("shared_out", np.float32(0))
    if residual is not None:
        for taps in (got, want):
            taps["attn_out"] = taps["attn_out"] + residual
            taps["ffn_out"] = taps["ffn_out"] + taps["attn_out"]
    same = np.ones(len(want["out"]), bool)
    for name in LAYER_TAPS:
        if name in want:
            yield TapError(prefix + name, "layer taps", relative_error(got[name][same], want[name][same]))
        if name == "router_logits" and name in want:
            choice, same = compare_experts(prefix, got, want, near_tie)
            yield choice


def compare_experts(prefix: str, got: Taps, want: Taps, near_tie: float) -> tuple[TapError, npt.NDArray[np.bool_]]:
    """Expert choices as sets, weights by expert; and which tokens to go on with.

    A choice that differs counts as agreement only where the reference's own scores were nearer than `near_tie`.
    """
    num_experts = want["router_logits"].shape[1]
    a = _by_expert(got["experts"], got["expert_weights"], num_experts)
    b = _by_expert(want["experts"], want["expert_weights"], num_experts)
    differs = ((a != 0) != (b != 0)).any(axis=1)
    excused = differs & (want["router_margin"] < near_tie)
    error = relative_error(a[~excused], b[~excused]) if (differs == excused).all() else float("inf")
    tap = TapError(f"{prefix}expert_weights", "router weights", error, int(differs.sum()), int(excused.sum()))
    return tap, ~excused


def _by_expert(experts: Array, values: Array, num_experts: int) -> Array:
    """(T, K) choices and weights as a (T, E) array, 0 for experts that were not chosen."""
    table = np.zeros((len(experts), num_experts), np.float32)
    np.put_along_axis(table, experts.astype(np.int64), values, axis=1)
    return table


def to_numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32))


def memory_held() -> int:
    """Bytes of MLX's arrays that somebody holds, without what earlier tests left to Python's garbage collector; from
    here on the peak counts."""
    gc.collect()
    mx.synchronize()
    mx.reset_peak_memory()
    return mx.get_active_memory()
