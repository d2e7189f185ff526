"""The first half of a MoE feed-forward: choose the experts, then silu(gate x) * (up x) for them and the shared one.

experts_gate_up(x, router_logits, router, gate, up, shared_gate, shared_up)
    -> (hidden, choice), and the same with `_ops`
    x              (T, D)      float32, bfloat16 or float16; T may be several dimensions, here and below
    router_logits  (T, E)      float32
    router         `Router`    kernels/route.py: what is chosen, and what the weights are
    gate, up       (E, F, D)   `Weight`s of one type each
    shared_*       (S, D)      the shared experts side by side, or None
    hidden         (T, K * F + S)  dtype of x: of the chosen experts, best first, then of the shared; summed in float32
    choice         (T, 2, K)   uint32: the chosen experts, then the bits of their weights, which are float32

The kernel takes up to 8 tokens, and 8 to 256 experts. It reads the rows of the chosen experts and of the shared ones
once for each token, at the file's own bits: for GLM-4.7-Flash in Q4_0, 5 * 2 * 1536 * 2048 * 4.5 / 8 = 17.7 MB a token.
A simdgroup chooses as far as it must know, then computes a row of gate and the same row of up, so that x is read once
for both. NaN or infinity in x comes out as NaN. A NaN among the logits is chosen last, and its weight is NaN.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import Weight
from kernels.qmv import gather_qmv_ops, qmv_ops
from kernels.route import Gating, Router, experts_of
from kernels.shapes import launch_shape, matrix_names

DEPTH = 4  # chunks that a lane loads in one go, at most
ROWS, SIMDGROUPS = 1, 4  # rows of a simdgroup, simdgroups of a threadgroup
MAX_EXPERTS = 256  # eight for each lane


def swiglu_ops(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def experts_gate_up_ops(
    x: mx.array,
    router_logits: mx.array,
    router: Router,
    gate: Weight,
    up: Weight,
    shared_gate: Weight | None,
    shared_up: Weight | None,
) -> tuple[mx.array, mx.array]:
    choice = router.choice(router_logits)
    rows, ids = x.reshape(-1, 1, x.shape[-1]), experts_of(choice).reshape(-1, router.top_k)
    hidden = swiglu_ops(gather_qmv_ops(rows, gate, ids), gather_qmv_ops(rows, up, ids)).reshape(*x.shape[:-1], -1)
    if shared_gate is not None and shared_up is not None:
        shared_hidden = swiglu_ops(qmv_ops(x, shared_gate), qmv_ops(x, shared_up))
        hidden = mx.concatenate([hidden, shared_hidden], axis=-1)
    return hidden, choice


def experts_gate_up(
    x: mx.array,
    router_logits: mx.array,
    router: Router,
    gate: Weight,
    up: Weight,
    shared_gate: Weight | None,
    shared_up: Weight | None,
) -> tuple[mx.array, mx.array]:
    tokens = x.size // x.shape[-1]
    back_end = launcher.back_end("experts_gate_up") if tokens <= launcher.MAX_TOKENS else None
    possible = 8 <= gate.shape[0] <= MAX_EXPERTS and launcher.fits(gate, up, shared_gate, shared_up)
    if back_end is None or not possible:
        return experts_gate_up_ops(x, router_logits, router, gate, up, shared_gate, shared_up)
    matrices = [gate, up]
    if shared_gate is not None and shared_up is not None:
        matrices += [shared_gate, shared_up]
    layout, arrays = launcher.placed(*matrices, *([] if router.bias is None else [router.bias]))
    launch = _launch(
        back_end,
        tuple(x.shape),
        tuple(router_logits.shape),
        None if router.bias is None else router.bias.size,
        router.top_k,
        router.gating,
        router.normalize,
        router.scale,
        x.dtype,
        tuple(launcher.kind(w) for w in matrices),
        layout,
    )
    hidden, choice = launch(x, router_logits, *arrays)
    return hidden, choice


@cache
def _launch(
    back_end: launcher.BackEnd,
    x_shape: tuple[int, ...],
    logits_shape: tuple[int, ...],
    bias_size: int | None,
    top_k: int,
    gating: Gating,
    normalize: bool,
    scale: float,
    dtype: mx.Dtype,
    kinds: tuple[launcher.Kind, ...],
    layout: launcher.Layout | None,
) -> launcher.Launch:
    num_experts, width, cols = kinds[0][1]
    lead = logits_shape[:-1]
    with_bias = bias_size is not None
    launcher.require(
        "experts_gate_up",
        launcher.floats(dtype, "x"),
        (x_shape == (*lead, cols), f"x of shape {x_shape} for tokens of {lead} and matrices of {cols} columns"),
        (logits_shape[-1] == num_experts, f"router_logits of shape {logits_shape} for {num_experts} experts"),
        (bias_size in (None, num_experts), f"a bias of {bias_size} values for {num_experts} experts"),
        (0 < top_k <= num_experts, f"{top_k} of {num_experts} experts"),
        (kinds[1][1] == kinds[0][1], f"gate of shape {kinds[0][1]} and up of {kinds[1][1]}"),
        *((shape[-1] == cols, f"shared experts of shape {shape}, others of {cols} columns") for _, shape in kinds[2:]),
        (len({shape for _, shape in kinds[2:]}) < 2, "shared gate and up of two shapes"),
    )
    tokens = math.prod(lead)
    rows, simdgroups, most = launch_shape(
        "experts_gate_up", matrix_names(kinds), tokens, ROWS=ROWS, SIMDGROUPS=SIMDGROUPS, DEPTH=DEPTH
    )
    shared_width = kinds[2][1][0] if len(kinds) > 2 else 0
    template: dict[str, int | bool | mx.Dtype] = {
        "T": dtype,
        "COLS": cols,
        "DEPTH": launcher.depth(cols, launcher.LANES, most),
        "WIDTH": width,
        "SHARED_WIDTH": shared_width,
        "EXPERTS": num_experts,
        "PER_LANE": -(-num_experts // launcher.LANES),
        "TOP_K": top_k,
        "SOFTMAX": gating == "softmax",
        "HAS_BIAS": with_bias,
        "NORMALIZE": normalize,
        "ROWS": rows,
        "SIMDGROUPS": simdgroups,
    }
    slots = top_k + -(-shared_width // width)
    return launcher.prepare(
        back_end,
        "experts_gate_up",
        inputs=["x", "router_logits"],
        weights=dict(zip(("GATE", "UP", "SHARED_GATE", "SHARED_UP"), kinds, strict=False)),
        vectors=["bias"] * with_bias,
        layout=layout,
        outputs={
            "hidden": ((*lead, top_k * width + shared_width), dtype),
            "choice": ((*lead, 2, top_k), mx.uint32),
        },
        template=template,
        defines={"SCALE": f"{scale!r}f"} | ({"BIAS": ""} if with_bias else {}),
        threadgroups=(-(-width // (rows * simdgroups)), slots, tokens),
        simdgroups=simdgroups,
    )
