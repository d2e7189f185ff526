"""Choose K of E experts and their weights.

route_ops(router_logits, bias, top_k, gating, normalize, scale) -> (experts, weights)
    router_logits  (T, E)  float32
    bias           (E,)    float32 `e_score_correction_bias`, or None: used to choose, not to weigh
    gating         "sigmoid" (GLM-4.7-Flash) or "softmax" (DeepSeek-V2-Lite)
    normalize      divide the K weights by their sum
    experts        (T, K)  uint32, best first; exact ties go to the lower index
    weights        (T, K)  float32, times `scale`

Source: transformers `modeling_glm4_moe_lite.py`, `Glm4MoeLiteTopkRouter` and `route_tokens_to_experts`.
"""

from typing import Literal

import mlx.core as mx

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
