"""Choose K of E experts and their weights.

Router(bias, top_k, gating, normalize, scale)(router_logits) -> (experts, weights)
    router_logits  (T, E)  float32
    bias           (E,)    float32 `e_score_correction_bias`, or None: used to choose, not to weigh
    gating         "sigmoid" (GLM-4.7-Flash) or "softmax" (DeepSeek-V2-Lite)
    normalize      divide the K weights by their sum
    experts        (T, K)  uint32, best first; exact ties go to the lower index
    weights        (T, K)  float32, times `scale`

`choice` has both in one array, as the kernels want it: an array of a launch costs the host time.

This is the twin. The kernel is the beginning of `experts_gate_up`'s.

Source: transformers `modeling_glm4_moe_lite.py`, `Glm4MoeLiteTopkRouter` and `route_tokens_to_experts`.
"""

from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

Gating = Literal["sigmoid", "softmax"]


@dataclass(frozen=True)
class Router:
    bias: mx.array | None
    top_k: int
    gating: Gating
    normalize: bool
    scale: float

    def choice(self, router_logits: mx.array) -> mx.array:
        """Both in one array: (T, 2, K) uint32, the experts, then the bits of their weights."""
        return choice_of(*self(router_logits))

    def __call__(self, router_logits: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(router_logits) if self.gating == "sigmoid" else mx.softmax(router_logits, axis=-1)
        choice = scores if self.bias is None else scores + self.bias
        experts = mx.argsort(-choice, axis=-1)[..., : self.top_k]  # which is stable, with NaN last
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return experts, weights * self.scale


def choice_of(experts: mx.array, weights: mx.array) -> mx.array:
    return mx.stack([experts, weights.view(mx.uint32)], axis=-2)


def experts_of(choice: mx.array) -> mx.array:
    """(T, 2, K) -> (T, K) uint32"""
    return choice[..., 0, :]


def weights_of(choice: mx.array) -> mx.array:
    """(T, 2, K) -> (T, K) float32"""
    return choice[..., 1, :].view(mx.float32)
