"""Choose K of E experts and their weights.

route(router_logits, bias, top_k, gating, normalize, scale) -> (experts, weights), and the same with `_ops`
    router_logits  (T, E)  float32
    bias           (E,)    float32 `e_score_correction_bias`, or None: used to choose, not to weigh
    gating         "sigmoid" (GLM-4.7-Flash) or "softmax" (DeepSeek-V2-Lite)
    normalize      divide the K weights by their sum
    experts        (T, K)  uint32, best first; exact ties go to the lower index
    weights        (T, K)  float32, times `scale`

The kernel takes up to 8 tokens, a simdgroup for each, and up to 256 experts. A NaN among the logits is chosen last, and
its weight is NaN.

Source: transformers `modeling_glm4_moe_lite.py`, `Glm4MoeLiteTopkRouter` and `route_tokens_to_experts`.
"""

from functools import cache
from typing import Literal

import mlx.core as mx

from kernels import launcher

MAX_EXPERTS = 256  # of the kernel: eight for each lane

Gating = Literal["sigmoid", "softmax"]


def route_ops(
    router_logits: mx.array, bias: mx.array | None, top_k: int, gating: Gating, normalize: bool, scale: float
) -> tuple[mx.array, mx.array]:
    scores = mx.sigmoid(router_logits) if gating == "sigmoid" else mx.softmax(router_logits, axis=-1)
    choice = scores if bias is None else scores + bias
    # MLX promises no order among equals, so sort by rank: how many experts come before this one.
    mine, other, index = choice[..., :, None], choice[..., None, :], mx.arange(choice.shape[-1])
    before = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    experts = mx.argsort(before.sum(axis=-1), axis=-1)[..., :top_k]
    weights = mx.take_along_axis(scores, experts, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return experts, weights * scale


def route(
    router_logits: mx.array, bias: mx.array | None, top_k: int, gating: Gating, normalize: bool, scale: float
) -> tuple[mx.array, mx.array]:
    tokens, num_experts = router_logits.shape
    back_end = launcher.back_end("route") if tokens <= launcher.MAX_TOKENS else None
    if back_end is None or not 8 <= num_experts <= MAX_EXPERTS:
        return route_ops(router_logits, bias, top_k, gating, normalize, scale)
    bias_size = None if bias is None else bias.size
    launch = _launch(back_end, tokens, num_experts, bias_size, top_k, gating, normalize, scale)
    experts, weights = launch(router_logits, *([] if bias is None else [bias]))
    return experts, weights


@cache
def _launch(
    back_end: launcher.BackEnd,
    tokens: int,
    num_experts: int,
    bias_size: int | None,
    top_k: int,
    gating: Gating,
    normalize: bool,
    scale: float,
) -> launcher.Launch:
    with_bias = bias_size is not None
    launcher.require(
        "route",
        (bias_size in (None, num_experts), f"a bias of {bias_size} values for {num_experts} experts"),
        (0 < top_k <= num_experts, f"{top_k} of {num_experts} experts"),
    )
    return launcher.prepare(
        back_end,
        "route",
        inputs=["router_logits", *["bias"] * with_bias],
        weights={},
        outputs={"experts": ((tokens, top_k), mx.uint32), "weights": ((tokens, top_k), mx.float32)},
        template={
            "EXPERTS": num_experts,
            "PER_LANE": -(-num_experts // launcher.LANES),
            "TOP_K": top_k,
            "SOFTMAX": gating == "softmax",
            "NORMALIZE": normalize,
        },
        defines={"SCALE": f"{scale!r}f"} | ({"BIAS": ""} if with_bias else {}),
        threadgroups=(tokens, 1, 1),
        simdgroups=1,
    )
