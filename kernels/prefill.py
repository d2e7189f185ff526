"""A MoE feed-forward for many tokens: their choices are sorted by expert, so that its rows come one after the other.

moe_prefill(x, router_logits, router, gate, up, down, shared_gate, shared_up, shared_down, residual)
    -> (y, choice)
    x              (T, D)      float32, bfloat16 or float16; T may be several dimensions, here and below
    router_logits  (T, E)      float32
    router         `Router`
    gate, up       (E, F, D)   `Weight`s
    down           (E, D, F)   `Weight`
    shared_*       (S, D), (S, D) and (D, S), the shared experts side by side, or None
    residual       (T, D)      added to the result
    y              (T, D)      dtype of x
    choice         (T, 2, K)   uint32, as from `experts_gate_up`

The same as `experts_gate_up` and then `experts_down`, with their roundings, for as many tokens as `takes` says. One
permutation serves gate, up and down, and is undone where the weighted sum is taken. With N = T * K choices, each of the
three is one matmul of MLX over the planes, `gather_qmm` with sorted indices: no expert without a choice is read, and
nothing is padded. Beside the planes stand scales and biases in float32: for GLM-4.7-Flash in Q4_0, 50 MB a matrix.
Where `kernels.wide` applies the choices stand in tiles of one expert each (tiles.py), and the three are batched matmuls
with the expanded experts of a few tiles at a time.
"""

import mlx.core as mx

from kernels import launcher, wide
from kernels.experts_gate_up import swiglu_ops
from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops
from kernels.route import Router, experts_of, weights_of
from kernels.tiles import tiles_of

# Choices for each expert, on average, from which on sorting is worth its own launches, where no kernel takes the
# tokens. With fewer than one, deriving the scales of the chosen experts alone is cheaper. Not measured on a GPU.
CHOICES = 1


def takes(tokens: int, router: Router, num_experts: int) -> bool:
    """Whether so many tokens are for `moe_prefill`."""
    return tokens > launcher.MAX_TOKENS and tokens * router.top_k > CHOICES * num_experts


def moe_prefill(
    x: mx.array,
    router_logits: mx.array,
    router: Router,
    gate: Weight,
    up: Weight,
    down: Weight,
    shared_gate: Weight | None,
    shared_up: Weight | None,
    shared_down: Weight | None,
    residual: mx.array,
) -> tuple[mx.array, mx.array]:
    choice = router.choice(router_logits)
    experts, weights = experts_of(choice), weights_of(choice)
    tokens, choices = x.reshape(-1, x.shape[-1]), experts.reshape(-1, router.top_k)
    path = in_tiles if wide.applies(choices.size, x.dtype) else in_order
    routed = path(tokens, choices, gate, up, down).reshape(*experts.shape, -1)  # (T, K, D)
    y = (routed.astype(mx.float32) * weights[..., None]).sum(axis=-2)
    if shared_gate is not None and shared_up is not None and shared_down is not None:
        shared_hidden = swiglu_ops(qmv_ops(x, shared_gate), qmv_ops(x, shared_up))
        y = y + qmv_ops(shared_hidden, shared_down).astype(mx.float32)
    return (y + residual.astype(mx.float32)).astype(x.dtype), choice


def in_order(x: mx.array, experts: mx.array, gate: Weight, up: Weight, down: Weight) -> mx.array:
    """x (T, D), experts (T, K) -> (T, K, D), what each expert makes of its token; no two choices mix."""
    order = mx.argsort(experts.reshape(-1))
    chosen = experts.reshape(-1)[order]  # (N,), ascending
    rows = x[order // experts.shape[-1]]  # (N, D)
    hidden = swiglu_ops(by_expert(rows, gate, chosen), by_expert(rows, up, chosen))  # (N, F)
    return unsort(by_expert(hidden, down, chosen), order).reshape(*experts.shape, -1)


def in_tiles(x: mx.array, experts: mx.array, gate: Weight, up: Weight, down: Weight) -> mx.array:
    """As `in_order`, for x in 16 bits where `kernels.wide` applies."""
    tiles = tiles_of(experts, gate.shape[0])
    rows = wide.start(x[tiles.tokens])  # (tiles, rows, D)
    parts: list[mx.array] = []
    for begin in range(0, len(rows), wide.TILES):
        some = slice(begin, begin + wide.TILES)
        of_tile = tiles.experts[some]
        hidden = swiglu_ops(wide.by_tile(rows[some], gate, of_tile), wide.by_tile(rows[some], up, of_tile))
        parts.append(wide.start(wide.by_tile(wide.start(hidden), down, of_tile)))
    routed = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    return wide.start(routed.reshape(-1, routed.shape[-1])[tiles.places])


def by_expert(x: mx.array, w: Weight, experts: mx.array) -> mx.array:
    """x (N, cols), w (E, rows, cols), experts (N,) ascending -> (N, rows)"""
    return gather_qmv_ops(x[:, None], w, experts[:, None], sorted_indices=True)[:, 0]


def unsort(x: mx.array, order: mx.array) -> mx.array:
    """The rows (N, cols) as they were before `order` was taken of them."""
    return x[mx.argsort(order)]
