"""Attention, routing and the expert ops: each `_ops` function against a plain float64 computation."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.experts_down import experts_down_ops
from kernels.experts_gate_up import experts_gate_up_ops
from kernels.mla_decode import attend_ops
from kernels.route import Gating, Router
from parity_tests.budgets import check
from parity_tests.test_quants import weight

LATENT, ROPE = 64, 16


@pytest.mark.parametrize(("length", "offset"), [(1, 0), (1, 1), (1, 31), (1, 300), (2, 0), (5, 7), (33, 100)])
def test_attention_agrees_with_float64_and_sees_no_later_row(length: int, offset: int) -> None:
    rng = np.random.default_rng(length + offset)
    q = rng.standard_normal((2, 3, length, LATENT + ROPE)).astype(np.float32)
    cache = rng.standard_normal((2, offset + length, LATENT + ROPE)).astype(np.float32)
    want = np.zeros((2, 3, length, LATENT))
    for i in range(length):
        rows = cache[:, : offset + i + 1].astype(np.float64)
        scores = np.einsum("bhw,bsw->bhs", q[:, :, i], rows) * 0.25
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        want[:, :, i] = np.einsum("bhs,bsr->bhr", p / p.sum(axis=-1, keepdims=True), rows[..., :LATENT])
    got = attend_ops(mx.array(q[..., :LATENT]), mx.array(q[..., LATENT:]), mx.array(cache), 0.25)
    check("attention op", np.array(got), want, f"{length} queries at {offset}")


def route_by_hand(
    logits: np.ndarray, bias: np.ndarray | None, top_k: int, gating: str, normalize: bool, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """One token, in a loop: choose the best remaining expert, the lower index among equals."""
    if gating == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits - logits.max())
        scores = scores / scores.sum()
    choice = list(scores if bias is None else scores + bias)
    experts = []
    for _ in range(top_k):
        best = max(range(len(choice)), key=lambda e: (choice[e], -e))
        experts.append(best)
        choice[best] = -np.inf
    weights = scores[experts]
    return np.array(experts), (weights / weights.sum() if normalize else weights) * scale


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_routing_agrees_with_a_plain_loop(gating: Gating, with_bias: bool, normalize: bool) -> None:
    """The bias is near 9, as reported of the real model, so that using it as a weight would show."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((50, 64)).astype(np.float32)
    bias = (9.03 + 0.3 * rng.standard_normal(64)).astype(np.float32) if with_bias else None
    router = Router(None if bias is None else mx.array(bias), 4, gating, normalize, 1.8)
    experts, weights = router(mx.array(logits))
    for row, got_experts, got_weights in zip(logits, np.array(experts), np.array(weights), strict=True):
        want_experts, want_weights = route_by_hand(row.astype(np.float64), bias, 4, gating, normalize, 1.8)
        assert list(got_experts) == list(want_experts)
        check("router weights", got_weights, want_weights, gating)


@pytest.mark.parametrize("experts", [8, 48, 64, 160])
def test_exact_ties_go_to_the_lower_expert(experts: int) -> None:
    equal, _ = Router(None, 4, "sigmoid", True, 1.0)(mx.zeros((3, experts)))
    assert np.array(equal).tolist() == [[0, 1, 2, 3]] * 3
    pairs = mx.array(np.repeat(np.arange(experts // 2), 2).astype(np.float32))[None]
    chosen, _ = Router(None, 3, "softmax", True, 1.0)(pairs)
    assert np.array(chosen).tolist() == [[experts - 2, experts - 1, experts - 4]]


@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize("shared", [True, False])
def test_experts_agree_with_float64(tokens: int, shared: bool) -> None:
    """Gate, up and down of different types, the shared expert of another width and type."""
    rng = np.random.default_rng(0)
    gate, gate64 = weight("Q4_0", (7, 96, 256), 1)
    up, up64 = weight("Q5_1", (7, 96, 256), 2)
    down, down64 = weight("Q8_0", (7, 256, 96), 3)
    parts = [weight("Q5_K", (256, 256), 4), weight("Q4_K", (256, 256), 5), weight("Q6_K", (256, 256), 6)]
    x = rng.standard_normal((tokens, 256)).astype(np.float32)
    experts = np.stack([rng.permutation(7)[:3] for _ in range(tokens)])
    weights = rng.random((tokens, 3)).astype(np.float32)
    logits = np.zeros((tokens, 7), np.float32)
    np.put_along_axis(logits, experts, np.array([[3, 2, 1]], np.float32), axis=1)

    def swiglu(g: np.ndarray, u: np.ndarray) -> np.ndarray:
        return g / (1 + np.exp(-g)) * u

    want = np.zeros((tokens, 256))
    for t in range(tokens):
        for e, w in zip(experts[t], weights[t], strict=True):
            want[t] += w * (down64[e] @ swiglu(gate64[e] @ x[t], up64[e] @ x[t]))
        if shared:
            want[t] += parts[2][1] @ swiglu(parts[0][1] @ x[t], parts[1][1] @ x[t])
    w_gate, w_up, w_down = (part[0] if shared else None for part in parts)
    router = Router(None, 3, "sigmoid", True, 1.0)
    hidden, shared_hidden, chosen, _ = experts_gate_up_ops(
        mx.array(x), mx.array(logits), router, gate, up, w_gate, w_up
    )
    got = experts_down_ops(hidden, shared_hidden, down, w_down, chosen, mx.array(weights), None)
    check("matmul", np.array(got), want, "experts")
