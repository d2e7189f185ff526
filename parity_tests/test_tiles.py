"""Tiles of one expert each: whoever chose what, each choice has its own row, and products are those of float64."""

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from kernels import tiles, wide
from kernels.prefill import in_order, in_tiles
from kernels.tiles import tiles_of, tiles_shape
from parity_tests.budgets import check
from parity_tests.compare import to_numpy
from parity_tests.test_prefill import swiglu
from parity_tests.test_quants import weight

# Choices of each expert; with these averages a tile has 128 rows, or 64, or 32.
COUNTS = {
    "around a tile's 128": [127, 128, 129, 0],
    "around two tiles": [255, 0, 256, 257, 1],
    "around 64": [63, 64, 65, 0, 1, 0, 0],
    "around 32": [31, 0, 32, 33, *[0] * 12],
    "one each": [1] * 7,
    "one and a tile more": [129] * 6,
    "all on the first": [300, 0, 0],
    "all on the last": [0, 0, 300],
    "a single choice": [0, 1, 0],
    "one expert": [200],
}


def shuffled(counts: list[int]) -> npt.NDArray[np.uint32]:
    """(N, 1): one choice of each token."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts), dtype=np.uint32), counts))[:, None]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", COUNTS)
def test_every_choice_has_a_row_of_its_own_in_a_tile_of_its_expert(name: str, top_k: int) -> None:
    counts = COUNTS[name]
    experts = np.repeat(shuffled(counts), top_k, axis=1)
    if top_k > 1 and len(counts) > 1:  # in other places the next expert
        experts = (experts + np.arange(top_k, dtype=np.uint32) % 2) % np.uint32(len(counts))
    got = tiles_of(mx.array(experts), len(counts))
    of_tile, of_row, places = (np.array(a) for a in (got.experts, got.tokens, got.places))
    assert (len(of_tile), of_row.shape[1]) == tiles_shape(experts.size, len(counts))
    assert (of_tile.dtype, of_row.dtype) == (np.uint32, np.uint32)
    used = np.unique(places // of_row.shape[1])
    assert (used == np.arange(len(used))).all()
    assert (of_tile[len(used) :] == len(counts)).all()  # so that nothing is expanded for them
    assert of_row.max() < len(experts)
    assert places.shape == experts.shape
    assert len(np.unique(places)) == experts.size
    assert (of_tile[places // of_row.shape[1]] == experts).all()
    assert (of_row.reshape(-1)[places] == np.arange(len(experts))[:, None]).all()


def test_there_are_tiles_enough_for_any_choices() -> None:
    """The most are needed where every expert has one choice more than whole tiles."""
    for experts in (1, 3, 64):
        for choices in range(1, 40 * experts, 7):
            count, rows = tiles_shape(choices, experts)
            chosen = min(experts, choices)
            assert chosen + (choices - chosen) // rows <= count


def test_tiles_grow_with_the_choices_of_an_expert() -> None:
    assert tiles_shape(8192, 64) == (128, 128)
    assert [tiles_shape(64 * each, 64)[1] for each in (1, 7, 8, 31, 32, 1000)] == [32, 32, 64, 64, 128, 128]
    assert tiles.MOST_ROWS == 128


@pytest.mark.parametrize("at_once", [1, 3, 32])
@pytest.mark.parametrize("name", COUNTS)
def test_products_in_tiles_agree_with_float64(
    name: str, at_once: int, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, which the same code takes, so that a fault is not within a rounding."""
    monkeypatch.setattr(wide, "TILES", at_once)
    experts = shuffled(COUNTS[name])
    count = len(COUNTS[name])
    bank = [weight("Q4_0", (count, 32, 64), 1), weight("Q8_0", (count, 32, 64), 2), weight("Q4_1", (count, 64, 32), 3)]
    x = np.random.default_rng(1).standard_normal((len(experts), 64)).astype(np.float32)
    got = in_tiles(mx.array(x), mx.array(experts), *(w for w, _ in bank))
    gate, up, down = (values[experts[:, 0]] for _, values in bank)
    x64 = x.astype(np.float64)[..., None]
    check("matmul", to_numpy(got), (down @ swiglu(gate @ x64, up @ x64)).swapaxes(-1, -2), name)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_tiles_in_16_bits_are_as_near_as_one_expert_after_the_other(dtype: mx.Dtype) -> None:
    """Three matmuls, each with weights, hidden values and results rounded once."""
    experts = mx.array(np.stack([np.random.default_rng(i).permutation(7)[:3] for i in range(40)]).astype(np.uint32))
    bank = [weight("Q6_K", (7, 256, 256), seed)[0] for seed in (1, 2, 3)]
    x = mx.random.normal((40, 256), key=mx.random.key(0)).astype(dtype)
    got = in_tiles(x, experts, *bank)
    want = in_order(x.astype(mx.float32), experts, *bank)
    assert (got.dtype, got.shape) == (dtype, (40, 3, 256))
    check("layer taps, 16-bit", to_numpy(got), to_numpy(want), str(dtype))
