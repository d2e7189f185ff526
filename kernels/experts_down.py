"""The second half of a MoE feed-forward: down for every chosen expert, weighted and summed, plus the shared expert.

experts_down(hidden, shared_hidden, down, shared_down, experts, weights, residual) -> y, and the same with `_ops`
    hidden         (T, K, F)   from `experts_gate_up`; T may be several dimensions, here and below
    shared_hidden  (T, S)      or None
    down           (E, D, F)   `Weight`
    shared_down    (D, S)      `Weight` or None
    experts        (T, K)      integers in [0, E); the kernel clamps others
    weights        (T, K)      float32, from `experts_gate_up`, scale included
    residual       (T, D)      added to the result, or None
    y              (T, D)      dtype of hidden; the shared expert is added unweighted; summed in float32

The kernel takes up to 8 tokens. It reads the rows of the chosen experts and of the shared one once for each token: for
GLM-4.7-Flash in Q4_0, 5 * 2048 * 1536 * 4.5 / 8 = 8.8 MB a token. A threadgroup computes a few rows of the result, each
of its simdgroups for one expert; their sums are added in a fixed order, so every run gives the same bits.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops
from kernels.shapes import launch_shape, matrix_names

DEPTH = 8  # chunks that a lane loads in one go, at most
ROWS = 4  # rows of a threadgroup
MAX_SIMDGROUPS = 8  # of a threadgroup


def experts_down_ops(
    hidden: mx.array,
    shared_hidden: mx.array | None,
    down: Weight,
    shared_down: Weight | None,
    experts: mx.array,
    weights: mx.array,
    residual: mx.array | None,
) -> mx.array:
    ids = experts.reshape(-1, experts.shape[-1])
    routed = gather_qmv_ops(hidden.reshape(*ids.shape, -1), down, ids).astype(mx.float32)
    y = (routed.reshape(*experts.shape, -1) * weights[..., None]).sum(axis=-2)
    if shared_hidden is not None and shared_down is not None:
        y = y + qmv_ops(shared_hidden, shared_down).astype(mx.float32)
    if residual is not None:
        y = y + residual.astype(mx.float32)
    return y.astype(hidden.dtype)


def experts_down(
    hidden: mx.array,
    shared_hidden: mx.array | None,
    down: Weight,
    shared_down: Weight | None,
    experts: mx.array,
    weights: mx.array,
    residual: mx.array | None,
) -> mx.array:
    tokens = experts.size // experts.shape[-1]
    back_end = launcher.back_end("experts_down") if tokens <= launcher.MAX_TOKENS else None
    whole = shared_down is None or shared_down.shape[-1] % down.shape[-1] == 0  # shared experts are as wide as others
    if back_end is None or not whole or not launcher.fits(down, shared_down):
        return experts_down_ops(hidden, shared_hidden, down, shared_down, experts, weights, residual)
    arrays, matrices = [hidden, experts, weights], [down]
    if shared_hidden is not None and shared_down is not None:
        arrays.append(shared_hidden)
        matrices.append(shared_down)
    if residual is not None:
        arrays.append(residual)
    kinds = tuple(launcher.kind(w) for w in matrices)
    shapes = tuple(None if a is None else tuple(a.shape) for a in (hidden, shared_hidden, weights, residual))
    launch = _launch(back_end, tuple(experts.shape), hidden.dtype, kinds, launcher.layout(*matrices), shapes)
    return launch(*arrays, *launcher.arrays(*matrices))[0]


@cache
def _launch(
    back_end: launcher.BackEnd,
    experts_shape: tuple[int, ...],
    dtype: mx.Dtype,
    kinds: tuple[launcher.Kind, ...],
    layout: launcher.Layout | None,
    shapes: tuple[tuple[int, ...] | None, ...],
) -> launcher.Launch:
    num_experts, rows, width = kinds[0][1]
    *lead, top_k = experts_shape
    tokens = math.prod(lead)
    shared_width = kinds[1][1][1] if len(kinds) > 1 else 0
    hidden, shared_hidden, weights, residual = shapes
    with_residual = residual is not None
    launcher.require(
        "experts_down",
        launcher.floats(dtype, "hidden"),
        (hidden == (*experts_shape, width), f"hidden of shape {hidden} for experts {experts_shape} of width {width}"),
        (weights == experts_shape, f"weights of shape {weights} for experts of {experts_shape}"),
        (residual in (None, (*lead, rows)), f"a residual of shape {residual} for a result of {(*lead, rows)}"),
        *(
            (shape == (rows, shared_width), f"shared down of shape {shape}, others of {rows} rows")
            for _, shape in kinds[1:]
        ),
        (len(kinds) == 1 or shared_hidden == (*lead, shared_width), f"shared hidden of shape {shared_hidden}"),
    )
    at_once, depth, most = launch_shape(
        "experts_down", matrix_names(kinds), tokens, ROWS=ROWS, DEPTH=DEPTH, MAX_SIMDGROUPS=MAX_SIMDGROUPS
    )
    slots = top_k + shared_width // width
    simdgroups = min(slots, most)
    return launcher.prepare(
        back_end,
        "experts_down",
        inputs=["hidden", "experts", "weights"] + ["shared_hidden"] * (len(kinds) > 1) + ["residual"] * with_residual,
        weights=dict(zip(("DOWN", "SHARED_DOWN"), kinds, strict=False)),
        layout=layout,
        outputs={"y": ((*lead, rows), dtype)},
        template={
            "T": dtype,
            "WIDTH": width,
            "DEPTH": launcher.depth(width, launcher.LANES, depth),
            "SHARED_WIDTH": shared_width,
            "ROWS_IN_ALL": rows,
            "EXPERTS": num_experts,
            "TOP_K": top_k,
            "SLOTS": slots,
            "ROWS": at_once,
            "SIMDGROUPS": simdgroups,
        },
        defines={"RESIDUAL": ""} if with_residual else {},
        threadgroups=(-(-rows // at_once), tokens, 1),
        simdgroups=simdgroups,
        threadgroup_bytes=simdgroups * at_once * 4,
    )
