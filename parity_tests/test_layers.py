"""Each layer on the reference's own input: its error is its own, and the first tap that breaks names the fault."""

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx.make_tiny import GLM_FLASH, TinySpec
from kernels.prefill import takes
from kernels.route import Router
from parity_tests.budgets import record
from parity_tests.compare import TapError, compare_layers
from parity_tests.conftest import MakeModel
from parity_tests.variants import VARIANTS


def assert_taps(errors: list[TapError], where: str) -> None:
    for tap in errors:
        record(tap.kind, tap.error, f"{where}: {tap.name}")
    broken = [tap for tap in errors if not tap.within_budget]
    assert not broken, f"the first tap that breaks is {broken[0]}"


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 500, count).tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tap_of_every_layer_agrees(name: str, model_file: MakeModel) -> None:
    errors = list(compare_layers(model_file(VARIANTS[name]), tokens(24)))
    assert len(errors) > 3 * VARIANTS[name].layers
    assert_taps(errors, name)


def test_full_width_layers_agree(model_file: MakeModel) -> None:
    """One dense and one MoE layer of GLM-4.7-Flash's real shapes, 64 experts of 1536, with so many tokens that their
    choices are sorted by expert."""
    assert takes(17, Router(None, 4, "sigmoid", True, 1.8), 64)
    assert_taps(list(compare_layers(model_file(GLM_FLASH), tokens(17))), "full width")


def test_full_width_layers_agree_in_the_unsloth_mix(model_file: MakeModel) -> None:
    """With few tokens."""
    spec = VARIANTS["GLM Unsloth Q4_0"]
    full = TinySpec(**{**vars(GLM_FLASH), "overrides": spec.overrides, "seed": 1})
    assert_taps(list(compare_layers(model_file(full), tokens(8))), "full width, mixed types")


@pytest.mark.parametrize("name", ["GLM Q4_0, output Q6_K", "GLM Unsloth Q4_0", "DeepSeek-V2-Lite"])
def test_16_bit_activations_stay_near_the_reference(name: str, model_file: MakeModel) -> None:
    """What a GPU computes with: bfloat16 between the ops, float32 inside them."""
    assert_taps(list(compare_layers(model_file(VARIANTS[name]), tokens(24), dtype=mx.bfloat16)), name)
