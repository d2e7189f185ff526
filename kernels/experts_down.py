"""The second half of a MoE feed-forward: down for every chosen expert, weighted and summed, plus the shared expert.

experts_down(hidden, choice, down, shared_down, residual) -> y, and the same with `_ops`
    hidden         (T, K * F + S)  from `experts_gate_up`; T may be several dimensions, here and below
    choice         (T, 2, K)   uint32, from there too: experts, of which the kernel clamps those past E - 1, and weights
    down           (E, D, F)   `Weight`
    shared_down    (D, S)      `Weight` or None
    residual       (T, D)      added to the result, or None; the kernel takes one of hidden's dtype
    y              (T, D)      dtype of hidden; the shared expert is added unweighted; summed in float32

The kernel takes up to 8 tokens. It reads the rows of the chosen experts and of the shared one once for each token: for
GLM-4.7-Flash in Q4_0, 5 * 2048 * 1536 * 4.5 / 8 = 8.8 MB a token. A threadgroup computes a few rows of the result, each
of its simdgroups for one expert; their sums are added in a fixed order, so every run gives the same bits.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import QUANT_TYPES, SUPER, Weight
from kernels.qmv import gather_qmv_ops, qmv_ops
from kernels.route import experts_of, weights_of
from kernels.shapes import launch_shape, matrix_names

DEPTH = 8  # chunks that a lane loads in one go, at most
ROWS = 4  # rows of a threadgroup
MAX_SIMDGROUPS = 8  # of a threadgroup


def experts_down_ops(
    hidden: mx.array, choice: mx.array, down: Weight, shared_down: Weight | None, residual: mx.array | None
) -> mx.array:
    experts, weights = experts_of(choice), weights_of(choice)
    ids, routed_width = experts.reshape(-1, experts.shape[-1]), experts.shape[-1] * down.shape[-1]
    rows = hidden[..., :routed_width].reshape(*ids.shape, -1)
    routed = gather_qmv_ops(rows, down, ids).astype(mx.float32)
    y = (routed.reshape(*experts.shape, -1) * weights[..., None]).sum(axis=-2)
    if shared_down is not None:
        y = y + qmv_ops(hidden[..., routed_width:], shared_down).astype(mx.float32)
    if residual is not None:
        y = y + residual.astype(mx.float32)
    return y.astype(hidden.dtype)


def experts_down(
    hidden: mx.array, choice: mx.array, down: Weight, shared_down: Weight | None, residual: mx.array | None
) -> mx.array:
    tokens = hidden.size // hidden.shape[-1]
    back_end = launcher.back_end("experts_down") if tokens <= launcher.MAX_TOKENS else None
    whole = shared_down is None or shared_down.shape[-1] % down.shape[-1] == 0  # shared experts are as wide as others
    if back_end is None or not whole or not launcher.fits(down, shared_down):
        return experts_down_ops(hidden, choice, down, shared_down, residual)
    matrices = [down] if shared_down is None else [down, shared_down]
    layout, arrays = launcher.placed(*matrices)
    launch = _launch(
        back_end,
        tuple(hidden.shape),
        tuple(choice.shape),
        None if residual is None else (tuple(residual.shape), residual.dtype),
        hidden.dtype,
        tuple(launcher.kind(w) for w in matrices),
        layout,
    )
    added = [] if residual is None else [residual]
    return launch(hidden, choice, *added, *arrays)[0]


@cache
def _launch(
    back_end: launcher.BackEnd,
    hidden: tuple[int, ...],
    choice: tuple[int, ...],
    residual: tuple[tuple[int, ...], mx.Dtype] | None,
    dtype: mx.Dtype,
    kinds: tuple[launcher.Kind, ...],
    layout: launcher.Layout | None,
) -> launcher.Launch:
    num_experts, rows, width = kinds[0][1]
    *lead, results = hidden
    top_k = choice[-1]
    tokens = math.prod(lead)
    shared_width = kinds[1][1][1] if len(kinds) > 1 else 0
    with_residual = residual is not None
    launcher.require(
        "experts_down",
        launcher.floats(dtype, "hidden"),
        (choice == (*lead, 2, top_k), f"a choice of shape {choice} for tokens of {(*lead,)}"),
        (
            results == top_k * width + shared_width,
            f"hidden of shape {hidden} for {top_k} experts of width {width} and shared ones of {shared_width}",
        ),
        (
            residual in (None, ((*lead, rows), dtype)),
            f"a residual of shape and dtype {residual} for a result of {((*lead, rows), dtype)}",
        ),
        *(
            (shape == (rows, shared_width), f"shared down of shape {shape}, others of {rows} rows")
            for _, shape in kinds[1:]
        ),
    )
    at_once, depth, most = launch_shape(
        "experts_down", matrix_names(kinds), tokens, ROWS=ROWS, DEPTH=DEPTH, MAX_SIMDGROUPS=MAX_SIMDGROUPS
    )
    # Of shared experts that are one matrix each has a slot, unless a K-quant's block would fall to two of them.
    quant = QUANT_TYPES.get(kinds[-1][0])
    part = shared_width if quant is not None and quant.is_super and width % SUPER else width
    slots = top_k + shared_width // part
    simdgroups = min(slots, most)
    return launcher.prepare(
        back_end,
        "experts_down",
        inputs=["hidden", "choice", *["residual"] * with_residual],
        weights=dict(zip(("DOWN", "SHARED_DOWN"), kinds, strict=False)),
        layout=layout,
        outputs={"y": ((*lead, rows), dtype)},
        template={
            "T": dtype,
            "WIDTH": width,
            "DEPTH": launcher.depth(width, launcher.LANES, depth),
            "SHARED_WIDTH": shared_width,
            "SHARED_PART": part,
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
