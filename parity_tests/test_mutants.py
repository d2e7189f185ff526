"""Faults planted in the product: the comparison must see every one, at the right place. Adding one is a line."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import glm_mlx.model
import glm_mlx.packing
import kernels.mla_decode
import kernels.planes
import kernels.prefill
import kernels.qmv
from glm_mlx.cache import LatentCache
from glm_mlx.config import Config
from glm_mlx.make_tiny import TinySpec
from glm_mlx.model import Attention, MoE
from kernels.planes import dequantize_ops
from kernels.route import Router
from kernels.small_experts import Bank
from parity_tests import compare
from parity_tests.budgets import BUDGETS, relative_error
from parity_tests.compare import compare_layers
from parity_tests.conftest import MakeModel
from parity_tests.test_layers import tokens
from parity_tests.test_model import run
from parity_tests.variants import VARIANTS
from reference.model import Reference

Plant = Callable[[pytest.MonkeyPatch], None]
IDS = tokens(24)


@cache
def reference(path: Path) -> Reference:
    """One reference a file, which remembers its layers: every mutant is held against the same values."""
    judge = Reference(path)
    layers: dict[int, dict[str, Any]] = {}
    compute = judge.layer
    judge.layer = lambda i, x: layers.setdefault(i, compute(i, x)) if i not in layers else layers[i]  # type: ignore
    return judge


# --- ways to plant a fault


def after_init(part: type, change: Callable[[Any], None]) -> Plant:
    """Change a part of the model once it is built."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        build = part.__init__  # type: ignore[misc]

        def wrong(self: Any, *args: Any) -> None:
            build(self, *args)
            change(self)

        patch.setattr(part, "__init__", wrong)

    return plant


def instead(owner: Any, name: str, make: Callable[[Any], Any]) -> Plant:
    """Put `make(the original)` in the place of a function."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def swap_heads(name: str) -> Plant:
    def swap(attention: Attention) -> None:
        order = mx.array([1, 0, *range(2, attention.cfg.num_heads)])
        setattr(attention, name, getattr(attention, name)[order])

    return after_init(Attention, swap)


def transpose_k_b(attention: Attention) -> None:
    attention.k_b = dequantize_ops(attention.k_b).swapaxes(-1, -2)


def change_config(**changes: Any) -> Plant:
    """A configuration that was read wrongly."""

    def make(read: Any) -> Any:
        return classmethod(lambda cls, *args: replace(read(*args), **changes))

    return instead(Config, "from_metadata", make)


def scaled(name: str, factor: float) -> Callable[[Any], None]:
    def scale(part: Any) -> None:
        setattr(part, name, factor * dequantize_ops(getattr(part, name)))

    return scale


def route_with_biased_weights(router: Router, logits: mx.array) -> tuple[mx.array, mx.array]:
    scores = mx.sigmoid(logits) + (0 if router.bias is None else router.bias)
    experts = mx.argsort(-scores, axis=-1)[..., : router.top_k]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    return experts, weights / weights.sum(axis=-1, keepdims=True) * router.scale


def nibbles_in_file_order(blocks: np.ndarray) -> tuple[np.ndarray, ...]:
    return np.ascontiguousarray(blocks[:, 2:]), blocks[:, :2]


def swapped_halves(terms: Callable[..., Any]) -> Callable[..., Any]:
    """Q6_K's two sets of scales, each used with the other's inputs."""

    def wrong(x: mx.array, w: Any) -> Any:
        good = terms(x, w)
        return [(a[0], b[1], b[2]) for a, b in zip(good, good[::-1], strict=True)]

    return wrong


def rope(traditional: bool = True, shift: int = 0, only_keys: bool = False) -> Plant:
    """Both callers: the model for queries, latent_rows_ops for keys, which have one head."""

    def wrong(x: mx.array, wavelengths: mx.array, position: int) -> mx.array:
        moved = position + (shift if not only_keys or x.shape[1] == 1 else 0)
        return mx.fast.rope(
            x, x.shape[-1], traditional=traditional, base=None, scale=1.0, offset=moved, freqs=wavelengths
        )

    def plant(patch: pytest.MonkeyPatch) -> None:
        for module in (glm_mlx.model, kernels.mla_decode):
            patch.setattr(module, "rope_ops", wrong)

    return plant


def attend(change: Callable[..., tuple[Any, ...]]) -> Plant:
    """Call the attention op with changed arguments (q_latent, q_pe, cache, scale)."""
    return instead(glm_mlx.model, "attend_ops", lambda op: lambda *args: op(*change(*args[:4]), *args[4:]))


def seeing_one_later_row(op: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Attention as if the last query were not there, for which every other one sees a row more."""

    def attend(q_latent: mx.array, q_pe: mx.array, *rest: object) -> mx.array:
        parts = [op(q_latent[:, :, at], q_pe[:, :, at], *rest) for at in (slice(0, -1), slice(-1, None))]
        return mx.concatenate(parts, axis=2)

    return attend


def route(**changes: Callable[[Router], Any]) -> Plant:
    """A router with other fields."""

    def change(moe: MoE) -> None:
        moe.router = replace(moe.router, **{name: value(moe.router) for name, value in changes.items()})

    return after_init(MoE, change)


def without_shared_expert(moe: MoE) -> None:
    moe.shared_gate = None


def swap_gate_and_up(moe: MoE) -> None:
    moe.gate_proj, moe.up_proj = moe.up_proj, moe.gate_proj


def next_expert(op: Any) -> Any:
    return lambda x, w, experts, *args, **kw: op(x, w, (experts + 1) % w.shape[0], *args, **kw)


def next_expert_of_bank(bank: Any) -> Any:
    return lambda self, x, experts: bank(self, x, (experts + 1) % self.planes[0].shape[0])


def in_blocks_of_7(plant: Plant) -> Plant:
    """A fault that shows only where attention goes through the context in several blocks."""

    def both(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(kernels.mla_decode, "QUERIES", 5)
        patch.setattr(kernels.mla_decode, "block_rows", lambda *_: 7)
        plant(patch)

    return both


def one_later_row_at_an_edge(visible: Any) -> Any:
    """The last row of a block is seen one query too early."""

    def wrong(begin: int, end: int, before: int, length: int) -> mx.array:
        early = visible(begin - 1, end - 1, before, length)
        return mx.where(mx.arange(begin, end) == end - 1, early, visible(begin, end, before, length))

    return wrong


def without_rescaling(merge: Any) -> Any:
    """The sum is right, but what was added up before is not weighted anew."""
    return lambda a, b: merge(a, b)._replace(out=a.out + b.out * mx.exp(b.log_sum - merge(a, b).log_sum))


def stale_cache(update: Any) -> Any:
    """A chunk that is written one row too early over the rows of the one before."""

    def wrong(self: LatentCache, layer: int, new: mx.array) -> mx.array:
        rows = update(self, layer, new)
        return mx.concatenate([rows[:, 1:], rows[:, -1:]], axis=1) if self.offset else rows

    return wrong


# --- the table

GLM = VARIANTS["GLM Q4_0, output Q6_K"]
LITE = VARIANTS["DeepSeek-V2-Lite"]
SQUARE = TinySpec(qk_nope_head_dim=64, kv_lora_rank=64)


@dataclass(frozen=True)
class Mutant:
    """plant: the fault. tap: the first value that must break ("decode": only the step-by-step run can see it)."""

    plant: Plant
    tap: str
    spec: TinySpec = GLM


MUTANTS = {
    "two heads of k_b swapped": Mutant(swap_heads("k_b"), "layers.0.attn_out"),
    "two heads of v_b swapped": Mutant(swap_heads("v_b"), "layers.0.attn_out"),
    "k_b transposed": Mutant(after_init(Attention, transpose_k_b), "layers.0.attn_out", SQUARE),
    "RoPE on halves instead of pairs": Mutant(rope(traditional=False), "layers.0.q"),
    "positions off by one": Mutant(rope(shift=1), "layers.0.q"),
    "key positions off by one": Mutant(rope(shift=1, only_keys=True), "layers.0.k_pe"),
    "RoPE base wrong": Mutant(change_config(rope_theta=1e4), "layers.0.q"),
    "softmax scale of the absorbed width": Mutant(
        attend(lambda q, pe, cache, scale: (q, pe, cache, (q.shape[-1] + pe.shape[-1]) ** -0.5)), "layers.0.attn_out"
    ),
    "every query sees the last row": Mutant(
        instead(glm_mlx.model, "attend_ops", seeing_one_later_row), "layers.0.attn_out"
    ),
    "chunks see only their own rows": Mutant(
        attend(lambda q, pe, cache, scale: (q, pe, cache[:, -q.shape[2] :], scale)), "decode"
    ),
    "cache rows shifted by one": Mutant(instead(LatentCache, "update", stale_cache), "decode"),
    "selection bias used as weight": Mutant(
        instead(Router, "__call__", lambda call: route_with_biased_weights), "layers.1.expert_weights"
    ),
    "selection bias ignored": Mutant(route(bias=lambda _: None), "layers.1.expert_weights", TinySpec(seed=3)),
    "expert weights not times 1.8": Mutant(route(scale=lambda _: 1.0), "layers.1.expert_weights"),
    "expert weights times 1.8 twice": Mutant(route(scale=lambda r: r.scale**2), "layers.1.expert_weights"),
    "expert weights not normalised": Mutant(route(normalize=lambda _: False), "layers.1.expert_weights"),
    "one expert too few": Mutant(route(top_k=lambda r: r.top_k - 1), "layers.1.expert_weights"),
    "softmax gating read as sigmoid": Mutant(change_config(gating="sigmoid"), "layers.1.expert_weights", LITE),
    "each choice runs the next expert": Mutant(
        instead(kernels.prefill, "gather_qmv_ops", next_expert), "layers.1.ffn_out"
    ),
    "each choice of a few tokens runs the next expert": Mutant(
        instead(Bank, "__call__", next_expert_of_bank), "decode"
    ),
    "experts' results in the order of experts": Mutant(
        instead(kernels.prefill, "unsort", lambda f: lambda x, order: x), "layers.1.ffn_out"
    ),
    "experts' results sorted twice": Mutant(
        instead(kernels.prefill, "unsort", lambda f: lambda x, order: x[order]), "layers.1.ffn_out"
    ),
    "blocks of the context: one row too many at an edge": Mutant(
        in_blocks_of_7(instead(kernels.mla_decode, "_visible", one_later_row_at_an_edge)), "layers.0.attn_out"
    ),
    "blocks of the context: no rescaling": Mutant(
        in_blocks_of_7(instead(kernels.mla_decode, "_merge", without_rescaling)), "layers.0.attn_out"
    ),
    "blocks of the context: only the last": Mutant(
        in_blocks_of_7(instead(kernels.mla_decode, "_merge", lambda f: lambda a, b: b)), "layers.0.attn_out"
    ),
    "gate and up swapped": Mutant(after_init(MoE, swap_gate_and_up), "layers.1.ffn_out"),
    "no shared expert": Mutant(after_init(MoE, without_shared_expert), "layers.1.ffn_out"),
    "o_proj 1 % too large": Mutant(after_init(Attention, scaled("o_proj", 1.01)), "layers.0.attn_out"),
    "expert down_proj 0.1 % too large": Mutant(after_init(MoE, scaled("down_proj", 1.001)), "layers.1.ffn_out"),
    "norm epsilon 1e-3": Mutant(change_config(rms_norm_eps=1e-3), "layers.0.attn_norm"),
    "Q4_0 nibbles in the file's order": Mutant(
        lambda patch: patch.setitem(glm_mlx.packing._SPLITTERS, "Q4_0", nibbles_in_file_order), "embed"
    ),
    "Q6_K scales of the wrong half": Mutant(
        instead(kernels.qmv, "_affine_terms", swapped_halves), "layers.0.ffn_out", VARIANTS["GLM Q4_K_M"]
    ),
    "Q4_K minima added": Mutant(
        instead(kernels.qmv, "group_scales", lambda f: lambda w: (f(w)[0], None if f(w)[1] is None else -f(w)[1])),
        "layers.0.q",
        VARIANTS["GLM Q4_K_M"],
    ),
    "YaRN: mscale not squared": Mutant(
        instead(Config, "softmax_scale", lambda p: property(lambda c: c.yarn.mscale / c.qk_head_dim**0.5)),
        "layers.0.attn_out",
        LITE,
    ),
    "YaRN: plain frequencies": Mutant(
        instead(glm_mlx.model, "rope_wavelengths", lambda f: lambda cfg: f(replace(cfg, yarn=None))), "layers.0.q", LITE
    ),
    "YaRN: everything interpolated": Mutant(
        instead(
            glm_mlx.model,
            "rope_wavelengths",
            lambda f: lambda cfg: f(replace(cfg, yarn=None)) * cfg.yarn.factor,
        ),
        "layers.0.q",
        LITE,
    ),
}


def first_fault(path: Path) -> str | None:
    """The first compared value that is out of its budget; "decode" if only the step-by-step run is."""
    for tap in compare_layers(path, IDS):
        if not tap.within_budget:
            return tap.name
    want = reference(path).forward(IDS)["logits"]
    got = run(path, IDS, [10, 9, *[1] * 5])
    return None if relative_error(got, want) <= BUDGETS["logits"].most else "decode"


@pytest.mark.parametrize("spec", [GLM, LITE, SQUARE, TinySpec(seed=3), VARIANTS["GLM Q4_K_M"]])
def test_without_a_fault_nothing_breaks(spec: TinySpec, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "Reference", reference)
    assert first_fault(model_file(spec)) is None


def test_without_a_fault_nothing_breaks_in_blocks(model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "Reference", reference)
    in_blocks_of_7(lambda patch: None)(monkeypatch)
    assert first_fault(model_file(GLM)) is None


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_fault_is_seen_where_it_is(name: str, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    monkeypatch.setattr(compare, "Reference", reference)
    mutant.plant(monkeypatch)
    assert first_fault(model_file(mutant.spec)) == mutant.tap
