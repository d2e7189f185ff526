"""Experts sorted for a prompt: whoever chose what, the result is that of float64 and of the unsorted twin."""

import mlx.core as mx
import numpy as np
import pytest

from kernels import launcher, prefill, wide
from kernels.experts_down import experts_down_ops
from kernels.experts_gate_up import experts_gate_up_ops
from kernels.planes import Weight
from kernels.prefill import moe_prefill, takes
from kernels.route import Router, experts_of, weights_of
from parity_tests.budgets import check
from parity_tests.compare import to_numpy
from parity_tests.test_quants import EVERY, weight

EXPERTS, TOP_K, WIDTH, COLS = 7, 3, 96, 256
ROUTER = Router(None, TOP_K, "sigmoid", True, 1.8)


CHOICES: dict[str, np.ndarray] = {
    "at random": np.stack([np.random.default_rng(i).permutation(EXPERTS)[:TOP_K] for i in range(40)]),
    "all tokens on the same": np.tile([5, 0, 3], (12, 1)),
    "all tokens on the same, last first": np.tile([6, 5, 4], (12, 1)),
    "experts that nobody chose": np.stack([np.random.default_rng(i).permutation([1, 2, 4, 6])[:3] for i in range(12)]),
    "each as often as the others": np.arange(4 * EXPERTS * TOP_K).reshape(-1, TOP_K) % EXPERTS,
    "no expert twice": np.array([[4, 0, 6], [2, 5, 1]]),
    "one far more often than the others": np.concatenate([np.tile([2, 1, 0], (70, 1)), [[6, 2, 5]]]),
}


def logits_of(choices: np.ndarray) -> mx.array:
    """Router logits by which these experts are chosen, best first."""
    logits = np.random.default_rng(9).uniform(-5, -4, (len(choices), EXPERTS))
    np.put_along_axis(logits, choices, np.linspace(3, -1, TOP_K)[None], axis=-1)
    return mx.array(logits.astype(np.float32))


def by_twins(x: mx.array, logits: mx.array, bank: list[Weight], shared: list[Weight], residual: mx.array) -> mx.array:
    gate, up, down = bank
    shared_gate, shared_up, shared_down = shared or (None, None, None)
    hidden, choice = experts_gate_up_ops(x, logits, ROUTER, gate, up, shared_gate, shared_up)
    return experts_down_ops(hidden, choice, down, shared_down, residual)


def swiglu(g: np.ndarray, u: np.ndarray) -> np.ndarray:
    return g / (1 + np.exp(-g)) * u


@pytest.mark.parametrize("in_tiles", [False, True])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_sorted_experts_agree_with_float64(
    name: str, shared: bool, in_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate, up and down of different types, the shared expert of another width and type. In tiles as in 16 bits."""
    monkeypatch.setattr(wide, "applies", lambda tokens, dtype: in_tiles)
    choices = CHOICES[name]
    banks = [weight("Q4_0", (7, 96, 256), 1), weight("Q6_K", (7, 96, 256), 2), weight("Q8_0", (7, 256, 96), 3)]
    others = [weight("Q5_K", (256, 256), 4), weight("Q4_K", (256, 256), 5), weight("Q6_K", (256, 256), 6)]
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((len(choices), COLS)).astype(np.float32) for _ in range(2))
    logits = logits_of(choices)
    gate, up, down = (values for _, values in banks)
    scores = 1 / (1 + np.exp(-np.take_along_axis(np.array(logits, np.float64), choices, axis=-1)))
    weights = scores / scores.sum(axis=-1, keepdims=True) * 1.8
    want = residual.astype(np.float64)
    for t, row in enumerate(x):
        for e, w in zip(choices[t], weights[t], strict=True):
            want[t] += w * (down[e] @ swiglu(gate[e] @ row, up[e] @ row))
        if shared:
            want[t] += others[2][1] @ swiglu(others[0][1] @ row, others[1][1] @ row)
    extra = [w for w, _ in others] if shared else [None] * 3
    got, choice = moe_prefill(mx.array(x), logits, ROUTER, *(w for w, _ in banks), *extra, mx.array(residual))
    assert np.array(experts_of(choice)).tolist() == choices.tolist()
    check("router weights", weights_of(choice), weights, name)
    check("matmul", got, want, name)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", EVERY)
def test_sorted_experts_equal_the_unsorted_twin(kind: str, dtype: mx.Dtype) -> None:
    """Tokens of two dimensions, as the model has them. In 16 bits the same roundings, so the same error."""
    choices = CHOICES["at random"]
    bank = [weight(kind, (7, 256, 256), seed)[0] for seed in (1, 2, 3)]
    shared = [weight(kind, (256, 256), seed)[0] for seed in (4, 5, 6)]
    x, residual = (mx.random.normal((2, 20, 256), key=mx.random.key(i)).astype(dtype) for i in range(2))
    logits = logits_of(choices).reshape(2, 20, EXPERTS)
    got, _ = moe_prefill(x, logits, ROUTER, *bank, *shared, residual)
    want = by_twins(x, logits, bank, shared, residual)
    assert got.dtype == dtype
    check("same path", to_numpy(got), to_numpy(want), kind)


def test_mlx_is_told_that_experts_are_sorted_and_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not check, it would use one expert's weights for another's tokens."""
    seen = []
    gather = mx.gather_qmm

    def watch(*args: object, **kw: object) -> mx.array:
        seen.append(kw)
        return gather(*args, **kw)  # type: ignore[arg-type]

    monkeypatch.setattr(mx, "gather_qmm", watch)
    bank = [weight("Q4_0", shape, 1)[0] for shape in ((7, 96, 256), (7, 96, 256), (7, 256, 96))]
    x = mx.zeros((40, COLS))
    moe_prefill(x, logits_of(CHOICES["at random"]), ROUTER, *bank, None, None, None, x)
    assert len(seen) == 3
    for kw in seen:
        ids = np.array(kw["rhs_indices"]).reshape(-1)
        assert kw["sorted_indices"] is True
        assert "lhs_indices" not in kw  # MLX then takes no notice of the order
        assert (np.diff(ids.astype(np.int64)) >= 0).all()
        assert len(ids) == 40 * TOP_K


@pytest.mark.parametrize("kind", ["F32", "BF16", "IQ4_NL"])
def test_rows_for_gather_mm_are_a_row_apart_along_every_axis(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA, MLX 0.32 takes the distance of rows from the axis of one, and would read other values."""
    strides = []
    gather = mx.gather_mm

    def watch(a: mx.array, *args: mx.array, **kw: bool) -> mx.array:
        mx.eval(a)
        strides.append((a.shape, memoryview(a).strides))
        return gather(a, *args, **kw)

    monkeypatch.setattr(mx, "gather_mm", watch)
    bank = [weight(kind, shape, 1)[0] for shape in ((7, 96, 256), (7, 96, 256), (7, 256, 96))]
    x = mx.zeros((40, COLS))
    moe_prefill(x, logits_of(CHOICES["at random"]), ROUTER, *bank, None, None, None, x)
    assert len(strides) == 3
    assert all(steps is not None and steps[-2] == 4 * shape[-1] for shape, steps in strides)


def test_few_tokens_are_left_to_the_kernels_and_the_twins() -> None:
    most = launcher.MAX_TOKENS
    assert not takes(most, ROUTER, 8)  # a kernel's, however few the experts
    assert takes(most + 1, ROUTER, 8)
    glm = Router(None, 4, "sigmoid", True, 1.8)
    assert not takes(16 * prefill.CHOICES, glm, 64)
    assert takes(16 * prefill.CHOICES + 1, glm, 64)
