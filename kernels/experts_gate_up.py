"""The first half of a MoE feed-forward: silu(gate x) * (up x), for the chosen experts and the shared one.

experts_gate_up(x, gate, up, experts, shared_gate, shared_up) -> (hidden, shared_hidden), and the same with `_ops`
    x              (T, D)      float32, bfloat16 or float16
    gate, up       (E, F, D)   `Weight`s of one type each
    experts        (T, K)      integers in [0, E); the kernel clamps others
    shared_*       (S, D)      the shared experts side by side, or None
    hidden         (T, K, F)   dtype of x; summed in float32
    shared_hidden  (T, S)      dtype of x, or None

The kernel takes up to 8 tokens. It reads the rows of the chosen experts and of the shared ones once for each token, at
the file's own bits: for GLM-4.7-Flash in Q4_0, 5 * 2 * 1536 * 2048 * 4.5 / 8 = 17.7 MB a token. A simdgroup computes a
row of gate and the same row of up, so that x is read once for both. NaN or infinity in x comes out as NaN.
"""

from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops

DEPTH = 4  # chunks that a lane loads in one go, at most
ROWS, SIMDGROUPS = 1, 4  # rows of a simdgroup, simdgroups of a threadgroup


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


def experts_gate_up(
    x: mx.array, gate: Weight, up: Weight, experts: mx.array, shared_gate: Weight | None, shared_up: Weight | None
) -> tuple[mx.array, mx.array | None]:
    tokens, top_k = experts.shape
    back_end = launcher.back_end("experts_gate_up") if tokens <= launcher.MAX_TOKENS else None
    if back_end is None or not launcher.fits(gate, up, shared_gate, shared_up):
        return experts_gate_up_ops(x, gate, up, experts, shared_gate, shared_up)
    weights = [gate, up]
    if shared_gate is not None and shared_up is not None:
        weights += [shared_gate, shared_up]
    launch = _launch(back_end, tuple(x.shape), tokens, top_k, x.dtype, tuple(launcher.kind(w) for w in weights))
    hidden, *shared = launch(x, experts, *(plane for w in weights for plane in launcher.planes(w)))
    return hidden, shared[0] if shared else None


@cache
def _launch(
    back_end: launcher.BackEnd,
    x_shape: tuple[int, ...],
    tokens: int,
    top_k: int,
    dtype: mx.Dtype,
    kinds: tuple[launcher.Kind, ...],
) -> launcher.Launch:
    num_experts, width, cols = kinds[0][1]
    launcher.require(
        "experts_gate_up",
        launcher.floats(dtype, "x"),
        (x_shape == (tokens, cols), f"x of shape {x_shape} for {tokens} tokens and matrices of {cols} columns"),
        (kinds[1][1] == kinds[0][1], f"gate of shape {kinds[0][1]} and up of {kinds[1][1]}"),
        *((shape[-1] == cols, f"shared experts of shape {shape}, others of {cols} columns") for _, shape in kinds[2:]),
        (len({shape for _, shape in kinds[2:]}) < 2, "shared gate and up of two shapes"),
    )
    outputs: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {"hidden": ((tokens, top_k, width), dtype)}
    template: dict[str, int | bool | mx.Dtype] = {
        "T": dtype,
        "COLS": cols,
        "DEPTH": launcher.depth(cols, launcher.LANES, DEPTH),
        "WIDTH": width,
        "EXPERTS": num_experts,
        "TOP_K": top_k,
        "ROWS": ROWS,
        "SIMDGROUPS": SIMDGROUPS,
    }
    slots = top_k
    if len(kinds) > 2:
        shared_width = kinds[2][1][0]
        outputs["shared_hidden"] = ((tokens, shared_width), dtype)
        template["SHARED_WIDTH"] = shared_width
        slots += -(-shared_width // width)
    return launcher.prepare(
        back_end,
        "experts_gate_up",
        inputs=["x", "experts"],
        weights=dict(zip(("GATE", "UP", "SHARED_GATE", "SHARED_UP"), kinds, strict=False)),
        outputs=outputs,
        template=template,
        threadgroups=(-(-width // (ROWS * SIMDGROUPS)), slots, tokens),
        simdgroups=SIMDGROUPS,
    )
