"""route's kernel: choices, ties and weights, for every number of experts, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.route import Gating, route
from parity_tests.kernel_cases import Route, float64, run, verify

EXPERTS = (8, 31, 32, 33, 48, 64, 160, 255, 256)
GATINGS: tuple[Gating, ...] = ("sigmoid", "softmax")
PLAIN = [
    Route(experts, top_k, gating, normalize, bias, tokens=1 + (i + top_k) % 8)
    for i, experts in enumerate(EXPERTS)
    for top_k, gating, normalize, bias in (
        (4, "sigmoid", True, True),
        (6, "softmax", False, False),
        (1 + i % 3, "softmax", True, bool(i % 2)),
        (8, "sigmoid", bool(i % 2), False),
    )
]
TIES = [
    Route(experts, 7, gating, logits="ties", bias=bias, tokens=5)
    for experts in EXPERTS
    for gating in GATINGS
    for bias in (True, False)
]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_agrees_with_float64(case: Route) -> None:
    verify(case)


@pytest.mark.parametrize("case", TIES, ids=str)
def test_exact_ties_go_to_the_lower_expert(case: Route) -> None:
    verify(case)


@pytest.mark.parametrize("gating", GATINGS)
def test_no_bias_no_weight_no_scale_is_lost(gating: Gating) -> None:
    """Scales far from 1, and logits far from 0."""
    for scale in (1e-3, 1.0, 2.5, 16.0):
        verify(Route(64, 4, gating, scale=scale))
    logits = mx.array([[80.0] + [-80.0] * 63, [-200.0] * 63 + [200.0]])
    experts, weights = run(lambda: route(logits, None, 1, gating, False, 1.0))
    assert np.array(experts).tolist() == [[0], [63]]
    assert np.array(weights).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("bias", [None, np.linspace(0, 1, 64, dtype=np.float32)])
def test_nan_is_chosen_last_and_shows(bias: np.ndarray | None) -> None:
    """One NaN does not reach the weights of the others; a row of NaN gives NaN, and experts that exist."""
    logits = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    b = None if bias is None else mx.array(bias)
    clean = run(lambda: route(mx.array(logits), b, 4, "sigmoid", True, 1.8))
    worst = np.argsort(logits[1])[0]
    logits[1, worst] = np.nan
    logits[2] = np.nan
    experts, weights = run(lambda: route(mx.array(logits), b, 4, "sigmoid", True, 1.8))
    assert np.array(experts)[:2].tolist() == np.array(clean[0])[:2].tolist()
    assert np.array(weights)[:2].tolist() == np.array(clean[1])[:2].tolist()
    assert np.isnan(float64(weights)[2]).all()
    assert sorted(set(np.array(experts)[2].tolist())) == [0, 1, 2, 3]
