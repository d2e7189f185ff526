"""A MoE feed-forward of few tokens whose experts are small, on a CPU.

small_experts(gate, up, down, shared_gate, shared_up, shared_down) -> `SmallExperts`, or None where it does not apply:
    `Weight`s as for `experts_gate_up` and `experts_down`; those of one half must be of one type

small_moe(x, router_logits, router, small, residual) -> (y, choice)
    x              (T, D)      float32, bfloat16 or float16; T may be several dimensions, here and below
    router_logits  (T, E)      float32
    small          `SmallExperts`
    residual       (T, D)      added to the result
    y              (T, D)      dtype of x; computed in float32
    choice         (T, 2, K)   uint32, as from `experts_gate_up`

The same as `experts_gate_up_ops` and then `experts_down_ops`, in less than half as many operations of MLX, each of
which costs more here than what it computes: gate and up are one matrix, and shared experts stand behind the others,
always chosen and with a weight of 1. For that the matrices stand in memory once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx

from kernels import launcher
from kernels.experts_gate_up import swiglu_ops
from kernels.planes import GROUP, QuantizedTensor, Weight
from kernels.route import Router, choice_of

Planes: TypeAlias = tuple[mx.array, mx.array, mx.array]  # quants, scales and biases, as MLX's matmuls take them


@dataclass(frozen=True)
class Bank:
    """Matrices (E, rows, cols), one for each expert."""

    planes: Planes
    bits: int

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (T, K or 1, 1, cols), experts (T, K) -> (T, K, 1, rows)"""
        quants, scales, biases = self.planes
        return mx.gather_qmm(x, quants, scales, biases, rhs_indices=experts, group_size=GROUP, bits=self.bits)


@dataclass(frozen=True)
class SmallExperts:
    weights: tuple[Weight, ...]  # of which the others were made
    gate_up: Bank  # of the experts, then of the shared ones: (E + shared, 2 F, D)
    down: Bank  # (E + shared, D, F)
    shared: mx.array  # (shared,) uint32, their places
    ones: mx.array  # (shared,) float32, their weights

    @property
    def apply(self) -> bool:
        """Not where launches are recorded."""
        return launcher.back_end("experts_gate_up") is None


def small_moe(
    x: mx.array, router_logits: mx.array, router: Router, small: SmallExperts, residual: mx.array
) -> tuple[mx.array, mx.array]:
    experts, weights = router(router_logits)
    ids, factors = _beside(experts, small.shared), _beside(weights, small.ones)
    ids = ids.reshape(-1, ids.shape[-1])
    tokens, cols = ids.shape[0], x.shape[-1]
    gate, up = mx.split(small.gate_up(x.astype(mx.float32).reshape(tokens, 1, 1, cols), ids), 2, axis=-1)
    routed = small.down(swiglu_ops(gate, up), ids)
    y = factors.reshape(tokens, 1, -1) @ routed.reshape(tokens, -1, cols)
    return (y.reshape(x.shape) + residual.astype(mx.float32)).astype(x.dtype), choice_of(experts, weights)


def _beside(of_tokens: mx.array, constant: mx.array) -> mx.array:
    return mx.concatenate([of_tokens, mx.broadcast_to(constant, (*of_tokens.shape[:-1], constant.size))], axis=-1)


def small_experts(
    gate: Weight,
    up: Weight,
    down: Weight,
    shared_gate: Weight | None,
    shared_up: Weight | None,
    shared_down: Weight | None,
) -> SmallExperts | None:
    gate_up = _bank([gate, up], [shared_gate, shared_up], axis=0)
    downs = _bank([down], [shared_down], axis=1)
    if gate_up is None or downs is None:
        return None
    places = mx.arange(gate.shape[0], gate_up.planes[0].shape[0], dtype=mx.uint32)
    ones = mx.ones(places.shape)
    mx.eval(gate_up.planes, downs.planes, places, ones)
    weights = tuple(w for w in (gate, up, down, shared_gate, shared_up, shared_down) if w is not None)
    return SmallExperts(weights, gate_up, downs, places, ones)


def _bank(routed: Sequence[Weight], shared: Sequence[Weight | None], axis: int) -> Bank | None:
    """The routed experts' matrices, one below the other, and then the shared ones', of which those of all experts stand
    in one, along `axis`. None where they are not of one type, or without scales and biases kept for MLX's matmuls."""
    present = [*routed, *(w for w in shared if w is not None)]
    small = [w for w in present if isinstance(w, QuantizedTensor) and len(w.affine) == 1]
    if len(small) < len(present) or len({w.type for w in small}) > 1:
        return None
    planes = [(w.quants, *w.affine[0]) for w in small]
    bank = _concatenated(planes[: len(routed)], axis=-2)
    if len(small) > len(routed):
        count = small[-1].shape[axis] // small[0].shape[axis + 1]
        behind = _concatenated([_by_expert(of_all, axis, count) for of_all in planes[len(routed) :]], axis=-2)
        bank = _concatenated([bank, behind], axis=0)
    return Bank(bank, small[0].type.bits)


def _by_expert(of_all: Planes, axis: int, count: int) -> Planes:
    quants, scales, biases = (mx.moveaxis(mx.unflatten(plane, axis, (count, -1)), axis, 0) for plane in of_all)
    return quants, scales, biases


def _concatenated(parts: Sequence[Planes], axis: int) -> Planes:
    quants, scales, biases = (mx.concatenate(list(planes), axis) for planes in zip(*parts, strict=True))
    return quants, scales, biases
