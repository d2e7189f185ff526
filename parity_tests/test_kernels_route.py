"""How experts_gate_up's kernel chooses experts: choices, ties, weights, against float64."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.route import Gating
from parity_tests.kernel_cases import Route, bits, float64, run, verify

EXPERTS = (8, 31, 32, 33, 48, 64, 160, 255, 256)
GATINGS: tuple[Gating, ...] = ("sigmoid", "softmax")
PLAIN = [
    Route(experts, top_k, gating, normalize, bias, tokens=1 + (i + top_k) % 8)
    for i, experts in enumerate(EXPERTS)
    for top_k, gating, normalize, bias in (
        (4, "sigmoid", True, 9.03),
        (6, "softmax", False, None),
        (1 + i % 3, "softmax", True, -4.0),
        (8, "sigmoid", bool(i % 2), None),
    )
]
TIES = [
    Route(experts, 7, gating, logits="ties", bias=bias, tokens=5)
    for experts in EXPERTS
    for gating in GATINGS
    for bias in (0.0, None)
]


NAN = [Route(experts, 5, bias=bias, logits="nan", tokens=4) for experts in EXPERTS for bias in (-4.0, None)]
FAR = [Route(experts, 1, "softmax", bias=None, logits="far", tokens=2) for experts in EXPERTS if experts > 33]


@pytest.mark.parametrize("case", [*PLAIN, *NAN, *FAR], ids=str)
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
    case = Route(64, 1, gating, normalize=False, tokens=2, scale=1.0)
    experts, weights = run(lambda: case.call(logits, None))
    assert np.array(experts).tolist() == [[0], [63]]
    assert np.array(weights).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("bias", [9.0, None])
def test_a_token_of_nan_shows_and_the_others_do_not_change(gating: Gating, bias: float | None) -> None:
    """Its weights are NaN, and its experts exist."""
    case = Route(64, 4, gating, bias=bias, tokens=3)
    logits, b = case.inputs
    clean = run(case.kernel)
    spoilt = np.array(logits)
    spoilt[1] = np.nan
    experts, weights = run(lambda: case.call(mx.array(spoilt), b))
    assert np.isnan(float64(weights)[1]).all()
    assert np.array(experts)[1].tolist() == [0, 1, 2, 3]
    for got, same in zip((experts, weights), clean, strict=True):
        assert bits(got[::2]) == bits(same[::2])


def test_neighbouring_floats_are_told_apart() -> None:
    """Choices of 1.5 and some units of its last place, the largest last."""
    bias = mx.array((1 + np.arange(64) * 2.0**-23).astype(np.float32))
    experts, _ = run(lambda: Route(64, 4).call(mx.zeros((1, 64)), bias))
    assert np.array(experts).tolist() == [[63, 62, 61, 60]]
