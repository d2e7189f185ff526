"""The first half of a MoE feed-forward: silu(gate x) * (up x), for the chosen experts and the shared one.

experts_gate_up_ops(x, gate, up, experts, shared_gate, shared_up) -> (hidden, shared_hidden)
    x              (T, D)
    gate, up       (E, F, D)   `Weight`s of one type each
    experts        (T, K)      integers in [0, E)
    shared_*       (S, D)      the shared experts side by side, or None
    hidden         (T, K, F)   dtype of x
    shared_hidden  (T, S)      dtype of x, or None
"""

import mlx.core as mx

from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops


def swiglu_ops(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def experts_gate_up_ops(
    x: mx.array, gate: Weight, up: Weight, experts: mx.array, shared_gate: Weight | None, shared_up: Weight | None
) -> tuple[mx.array, mx.array | None]:
    rows = x[:, None, :]
    hidden = swiglu_ops(gather_qmv_ops(rows, gate, experts), gather_qmv_ops(rows, up, experts))
    if shared_gate is None or shared_up is None:
        return hidden, None
    return hidden, swiglu_ops(qmv_ops(x, shared_gate), qmv_ops(x, shared_up))
