"""The second half of a MoE feed-forward: down for every chosen expert, weighted and summed, plus the shared expert.

experts_down_ops(hidden, shared_hidden, down, shared_down, experts, weights) -> y
    hidden         (T, K, F)   from `experts_gate_up`
    shared_hidden  (T, S)      or None
    down           (E, D, F)   `Weight`
    shared_down    (D, S)      `Weight` or None
    experts        (T, K)      integers in [0, E)
    weights        (T, K)      float32, from `route`, scale included
    y              (T, D)      dtype of hidden; the shared expert is added unweighted; summed in float32
"""

import mlx.core as mx

from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops


def experts_down_ops(
    hidden: mx.array,
    shared_hidden: mx.array | None,
    down: Weight,
    shared_down: Weight | None,
    experts: mx.array,
    weights: mx.array,
) -> mx.array:
    routed = gather_qmv_ops(hidden, down, experts).astype(mx.float32)
    y = (routed * weights[..., None]).sum(axis=1)
    if shared_hidden is not None and shared_down is not None:
        y = y + qmv_ops(shared_hidden, shared_down).astype(mx.float32)
    return y.astype(hidden.dtype)
