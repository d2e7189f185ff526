"""Attention, routing and the expert ops: each `_ops` function against a plain float64 computation."""

import mlx.core as mx
import numpy as np
import pytest

from kernels import mla_decode
from kernels.experts_down import experts_down_ops
from kernels.experts_gate_up import experts_gate_up_ops
from kernels.mla_decode import attend_ops, rope_ops
from kernels.qmv import qmv_ops
from kernels.route import Gating, Router, experts_of
from parity_tests.budgets import check
from parity_tests.test_quants import weight

LATENT, ROPE = 64, 16


def attention_by_hand(q: np.ndarray, rows: np.ndarray, before: int) -> np.ndarray:
    """One sequence in float64, query by query: q (H, L, R + P), rows (S, R + P) -> (H, L, R)"""
    want = np.zeros((*q.shape[:2], LATENT))
    for i in range(q.shape[1]):
        seen = rows[: before + i + 1].astype(np.float64)
        scores = np.einsum("hw,sw->hs", q[:, i], seen) * 0.25
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        want[:, i] = (p / p.sum(axis=-1, keepdims=True)) @ seen[:, :LATENT]
    return want


def queries_and_rows(sequences: int, length: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(length + rows)
    q = rng.standard_normal((sequences, 3, length, LATENT + ROPE)).astype(np.float32)
    return q, rng.standard_normal((sequences, rows, LATENT + ROPE)).astype(np.float32)


def attend(q: np.ndarray, rows: np.ndarray, context: mx.array | None = None) -> np.ndarray:
    return np.array(attend_ops(mx.array(q[..., :LATENT]), mx.array(q[..., LATENT:]), mx.array(rows), 0.25, context))


def in_blocks(patch: pytest.MonkeyPatch, queries: int, rows: int) -> None:
    """Attention in blocks of so many queries and rows."""
    patch.setattr(mla_decode, "QUERIES", queries)
    patch.setattr(mla_decode, "block_rows", lambda *_: rows)


@pytest.mark.parametrize("position", [0, 1, 4095, 202_000])
@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("traced", [False, True])
def test_rotations_agree_with_float64(length: int, position: int, traced: bool) -> None:
    """Positions as a number and as an array; angles are float32, as everybody's are."""
    wavelengths = 1e6 ** (np.arange(0, 32, 2, dtype=np.float32) / 32)
    x = np.random.default_rng(0).standard_normal((2, 3, length, 32)).astype(np.float32)
    angles = np.arange(position, position + length, dtype=np.float32)[:, None] * (1 / wavelengths)
    want = x.astype(np.float64).view(np.complex128) * np.exp(1j * angles.astype(np.float64))
    at = mx.array([position]) if traced else position
    # A part of each row, as the model has it.
    whole = mx.concatenate([mx.zeros((2, 3, length, 8)), mx.array(x)], axis=-1)
    got = rope_ops(whole[..., 8:], mx.array(wavelengths), at)
    check("attention op", np.array(got), want.view(np.float64), f"rotation of {length} at {position}")


@pytest.mark.parametrize(("length", "offset"), [(1, 0), (1, 1), (1, 31), (1, 300), (2, 0), (5, 7), (33, 100)])
def test_attention_agrees_with_float64_and_sees_no_later_row(length: int, offset: int) -> None:
    q, rows = queries_and_rows(2, length, offset + length)
    want = [attention_by_hand(*one, offset) for one in zip(q, rows, strict=True)]
    check("attention op", attend(q, rows), want, f"{length} queries at {offset}")


@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
@pytest.mark.parametrize("offset", [0, 1, 14, 15, 16, 17, 48])
@pytest.mark.parametrize(("queries", "block"), [(8, 16), (8, 1), (5, 7), (64, 16)])
def test_attention_in_blocks_agrees_with_float64(
    queries: int, block: int, offset: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts and chunks that end before, at and behind the edge of a block."""
    in_blocks(monkeypatch, queries, block)
    q, rows = queries_and_rows(2, length, offset + length)
    want = [attention_by_hand(*one, offset) for one in zip(q, rows, strict=True)]
    check("attention op", attend(q, rows), want, f"{length} queries at {offset}, blocks of {queries} and {block}")


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_sequences_of_different_lengths_see_only_their_own_context(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a sequence's context is another's, or nobody's: large numbers would show."""
    in_blocks(monkeypatch, 4, block)
    contexts = [9, 16, 17, 40]
    q, rows = queries_and_rows(len(contexts), 9, 40)
    for sequence, context in enumerate(contexts):
        rows[sequence, context:] = 1e4
    want = [attention_by_hand(q[i], rows[i], context - 9) for i, context in enumerate(contexts)]
    check("attention op", attend(q, rows, mx.array(contexts)), want, f"blocks of {block}")


def test_scores_far_apart_in_different_blocks_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best row of all comes in the last block, the worst in the first: exponentials over- and underflow."""
    in_blocks(monkeypatch, 2, 8)
    q, rows = queries_and_rows(1, 3, 40)
    rows *= np.linspace(0.1, 40, 40, dtype=np.float32)[:, None]
    check("attention op", attend(q, rows)[0], attention_by_hand(q[0], rows[0], 37), "scores far apart")


@pytest.mark.parametrize("queries", [1, 20, 20 * 8, 20 * 512, 4 * 20 * 512, 1 << 30])
def test_a_block_holds_no_more_scores_than_are_allowed(queries: int) -> None:
    """And not many fewer. A whole context of GLM-4.7-Flash is one block for one token."""
    rows = mla_decode.block_rows(queries)
    assert rows == 1 or 0.75 * mla_decode.SCORES <= rows * queries <= mla_decode.SCORES
    assert queries > 20 or rows >= 202_752


def attention_memory(queries: int, rows: int) -> int:
    """Bytes that attention takes beside what it is given, for 3 heads; the least of three, as MLX frees late."""
    q, cache = mx.random.normal((1, 3, queries, LATENT + ROPE)), mx.random.normal((1, rows, LATENT + ROPE))
    mx.eval(q, cache)
    taken = []
    for _ in range(3):
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(attend_ops(q[..., :LATENT], q[..., LATENT:], cache, 0.25))
        taken.append(mx.get_peak_memory() - held)
    return min(taken)


def test_attention_takes_no_more_memory_at_any_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are computed one after the other: no more of them are prepared than the memory plan allows for."""
    in_blocks(monkeypatch, 512, 512)
    scores, results, rows = 3 * 64 * 512, 3 * 64 * (LATENT + ROPE), 512 * (LATENT + ROPE)
    assert 4 * scores < attention_memory(64, 32_768) <= 4 * (9 * scores + 10 * results + 2 * rows)


def test_attention_takes_no_more_memory_for_more_queries_than_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks(monkeypatch, 16, 512)
    results = 4 * 3 * (256 - 64) * LATENT
    # The blocks, what they are joined to, and as much again that MLX has not freed yet.
    assert attention_memory(256, 400) - attention_memory(64, 400) <= 4 * results


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
    hidden, choice = experts_gate_up_ops(mx.array(x), mx.array(logits), router, gate, up, w_gate, w_up)
    choice = mx.stack([experts_of(choice), mx.array(weights).view(mx.uint32)], axis=-2)
    got = experts_down_ops(hidden, choice, down, w_down, None)
    check("matmul", np.array(got), want, "experts")


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "IQ4_NL"])
def test_eight_rows_are_two_matmuls_of_four_beside_cuda(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For eight MLX would compile another one first."""
    w, _ = weight(kind, (48, 512))
    x = mx.random.normal((2, 8, 512), key=mx.random.key(0))
    whole, seen, matmul = qmv_ops(x, w), list[int](), mx.quantized_matmul

    def noted(x: mx.array, *args: object) -> mx.array:
        seen.append(x.shape[-2])
        return matmul(x, *args)

    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mx, "quantized_matmul", noted)
    check("same path", qmv_ops(x, w), whole, f"{kind}, eight rows in two")
    assert set(seen) == (set() if kind == "IQ4_NL" else {4})
