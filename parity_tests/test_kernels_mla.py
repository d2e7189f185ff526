"""mla_decode's kernels: contexts on both sides of every split and block, among rows of NaN, against float64."""

from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest

from kernels import launcher
from kernels import mla_decode as module
from kernels.mla_decode import (
    HEADS_AT_ONCE,
    MANY_ROWS,
    MATRIX_HEADS,
    MATRIX_ROWS,
    MATRIX_THREADGROUPS,
    MAX_LATENT,
    MAX_SPLITS,
    MERGE_ROWS,
    MERGE_SIMDGROUPS,
    ROWS_AT_ONCE,
    ROWS_OF_SPLIT,
    SIMDGROUPS,
    mla_decode,
)
from kernels.qmv import Norm
from parity_tests.kernel_cases import DTYPES, KINDS, Mla, block, float64, run, verify

ROUND = SIMDGROUPS * ROWS_AT_ONCE  # rows that a threadgroup takes at a time
CONTEXTS = sorted(
    {1, 2, 3}
    | {edge + d for edge in (ROUND, ROWS_OF_SPLIT, 2 * ROWS_OF_SPLIT, 4 * ROWS_OF_SPLIT) for d in (-1, 0, 1)}
    | {1023, MAX_SPLITS * ROWS_OF_SPLIT, MAX_SPLITS * ROWS_OF_SPLIT + 77}
)
HEADS = (1, HEADS_AT_ONCE, HEADS_AT_ONCE + 1, 2 * HEADS_AT_ONCE - 1)
WIDTHS = ((64, 16), (96, 32), (128, 64), (72, 10), (512, 64))
CASES = [
    Mla(HEADS[i % 4], context, *WIDTHS[i % 5], tokens=min(context, 1 + (3 * i) % 8), dtype=DTYPES[i % 3], room=room)
    for i, context in enumerate(CONTEXTS)
    for room in (3, 2048)[i % 2 :]
]
# Splits are as many as the whole cache wants: most have no row yet.
MOSTLY_EMPTY = [
    Mla(5, 2, room=MAX_SPLITS * ROWS_OF_SPLIT),
    Mla(3, 70, 96, 32, tokens=3, room=1000, dtype=mx.bfloat16),
    Mla(4, MAX_SPLITS + 1, room=MAX_SPLITS * ROWS_OF_SPLIT, tokens=2),
    Mla(4, 40, before=24, tokens=2),
    Mla(20, 70, 512, 64, before=768, dtype=mx.bfloat16),
    Mla(4, 5, MAX_LATENT, room=2048),  # fewer heads at a time, for the sake of threadgroup memory
]
# v_b of every type, with rows on both sides of a threadgroup's, and in latents that leave lanes without work.
BLOCK = MERGE_ROWS * MERGE_SIMDGROUPS
V_B = [
    Mla(2, 33, max(block(kind), (24, 64, 264)[i % 3] if block(kind) == 1 else 96), tokens=1 + i % 3, kind=kind,
        values=BLOCK * (1 + i % 2) + i % 3 - 1, dtype=DTYPES[i % 3])
    for i, kind in enumerate(KINDS)
]  # fmt: skip
REAL = [
    Mla(20, 4096, 512, 64, dtype=mx.bfloat16, kind="Q8_0", values=256),
    Mla(20, 129, 512, 64, tokens=8, kind="Q6_K", values=256),
    Mla(16, 1000, 512, 64, tokens=2, dtype=mx.float16, kind="Q4_0", values=128),
]
# In caches with room for many rows, by matrices: contexts on both sides of eight rows, of a turn and of a split, with
# new rows that begin a whole eight and that do not, and heads on both sides of a matrix and of a threadgroup.
EDGES = (8, 32, 40, 8 * (MATRIX_THREADGROUPS // 3 - 1), 32 * (MATRIX_THREADGROUPS // 3 - 1) + 8)
MATRIX_WIDTHS = ((64, 8), (128, 32), (512, 64), (192, 72))
MATRIX = [
    Mla((1, 8, 9, 16, 17, 20)[i % 6], context, *MATRIX_WIDTHS[i % 4], tokens=min(context, 1 + (3 * i) % 8),
        room=(MATRIX_ROWS, MANY_ROWS)[i % 3 == 1], dtype=DTYPES[1 + i % 2])
    for i, context in enumerate(sorted({1, 2, 7} | {edge + d for edge in EDGES for d in (-1, 0, 1, 5)}))
] + [Mla(MATRIX_HEADS + 8, 45, 64, 16, dtype=mx.float16, room=MATRIX_ROWS, tokens=8, before=24)]  # fmt: skip


@pytest.mark.parametrize("case", [*CASES, *MOSTLY_EMPTY, *V_B, *MATRIX], ids=str)
def test_agrees_with_float64(case: Mla) -> None:
    verify(case)


def test_long_contexts_of_16_bits_are_read_by_matrices() -> None:
    """And no others: of float32, in 8 bits, in small caches, or of widths that are no whole matrices."""
    for case, wanted in {
        Mla(20, 9, 512, 64, dtype=mx.bfloat16, room=MATRIX_ROWS): "mla_matrix",
        Mla(20, 9, 512, 64, dtype=mx.float16, room=MATRIX_ROWS): "mla_matrix",
        Mla(20, 9, 512, 64, dtype=mx.bfloat16, room=MATRIX_ROWS - 10): "mla_decode",
        Mla(20, 9, 512, 64, room=MATRIX_ROWS): "mla_decode",
        Mla(20, 9, 512, 64, dtype=mx.bfloat16, room=MATRIX_ROWS, packed=True): "mla_decode",
        Mla(20, 9, 96, 16, dtype=mx.bfloat16, room=MATRIX_ROWS): "mla_decode",
        Mla(20, 9, 64, 12, dtype=mx.bfloat16, room=MATRIX_ROWS): "mla_decode",
        Mla(2, 9, 2048, 64, dtype=mx.bfloat16, room=MATRIX_ROWS): "mla_decode",
    }.items():
        with launcher.recording() as launches:
            case.kernel()
        assert [launch.op for launch, _ in launches] == [wanted, "mla_merge"]


@pytest.mark.parametrize("case", REAL, ids=str)
def test_agrees_with_float64_at_real_shapes(case: Mla) -> None:
    verify(case, "fast")


@pytest.mark.parametrize(
    "case",
    [
        Mla(1, 202_752, 64, 8, room=0),
        Mla(1, 202_752, 64, 8, dtype=mx.bfloat16, room=0),
        Mla(1, 202_752, 64, 8, packed=True, room=0),
    ],
    ids=["float32", "bfloat16, by matrices", "8 bits"],
)
def test_agrees_with_float64_at_the_end_of_the_longest_context(case: Mla) -> None:
    """RoPE's angles are largest there."""
    verify(case, "fast")


# 16 values a lane: latents that leave lanes without any, and one that does not.
PACKED_WIDTHS = ((64, 16), (96, 10), (512, 64), (32, 2), (256, 96))
PACKED = [
    *(
        replace(case, latent=latent, rope=rope, packed=True)
        for i, case in enumerate(CASES)
        for latent, rope in [PACKED_WIDTHS[i % 5]]
    ),
    replace(MOSTLY_EMPTY[1], packed=True),
    *(replace(case, packed=True) for case in V_B[::5] if case.latent % 32 == 0),
]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_rows_in_8_bits_agree_with_float64(case: Mla) -> None:
    verify(case)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_rows_in_8_bits_agree_with_float64_at_real_shapes(case: Mla) -> None:
    verify(replace(case, packed=True), "fast")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", PACKED_WIDTHS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_new_rows_in_8_bits_are_those_of_the_twin(tokens: int, widths: tuple[int, int], dtype: mx.Dtype) -> None:
    """Bit for bit, from the same float32 values: those that the kernel stores where rows are float32. It writes these
    rows and nothing else. One latent of several is zero, and the last 32 values of all are so small that their scale
    has few bits left."""
    case = Mla(3, 37, *widths, tokens=tokens, dtype=dtype, packed=True)
    q_latent, q, kv_a, norm, wavelengths, cache, position = case.inputs
    kv_a[:, 1:2, : widths[0]] = 0
    small = mx.arange(widths[0]) >= widths[0] - 32
    norm = Norm(mx.where(small, 1e-5 * norm.weight, norm.weight), norm.eps)
    before, width = np.array(cache), sum(widths)
    others = norm, wavelengths, cache, position, case.scale, case.v_b
    run(lambda: [mla_decode(q_latent, q, kv_a, *others)[0]], launches=2)
    floats = [x.astype(mx.float32) for x in (q_latent, q, kv_a)]
    exact = mx.contiguous(mx.zeros((1, cache.shape[1], width)) + 0)
    run(lambda: [mla_decode(*floats, norm, wavelengths, exact, position, case.scale, case.v_b)[0]], launches=2)
    new, stored = slice(37 - tokens, 37), case.row_format
    used = widths[0] + 2 * widths[1] + widths[0] // 16  # of the bytes
    np.testing.assert_array_equal(np.array(cache)[:, new, :used], np.array(stored.store(exact[:, new]))[..., :used])
    after = np.array(cache)
    np.testing.assert_array_equal(after[..., used:], before[..., used:])
    after[:, new] = before[:, new]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_in_8_bits_stays_with_the_queries_that_see_it(value: float) -> None:
    """An infinite value norms to NaN, the others of its row to 0."""
    case = Mla(5, 70, tokens=3, packed=True)
    q_latent, q, kv_a, *others = *case.inputs, case.scale, case.v_b
    new = np.array(kv_a)
    new[0, 1, 40] = value
    (y,) = run(lambda: [mla_decode(q_latent, q, mx.array(new), *others)[0]], launches=2)
    assert np.isnan(float64(y)[0, 1:]).all()
    assert not np.isnan(float64(y)[0, 0]).any()


# context, a row of it, dtype: float32 by vectors, bfloat16 by matrices (there 1047 is the last row of a split)
FAR = [
    *((context, at, mx.float32) for context, at in [(100, 0), (100, 40), (100, 98), (2100, 2000)]),
    *(
        (context, at, mx.bfloat16)
        for context, at in [(100, 0), (100, 40), (100, 95), (100, 98), (2100, 1047), (2100, 2000)]
    ),
]


def attend(
    q_latent: np.ndarray, rows: np.ndarray, dtype: mx.Dtype = mx.float32, new: np.ndarray | None = None
) -> np.ndarray:
    """(H, 64): one query of each head, without RoPE, over rows of 80 of which the last is the query's own. v_b changes
    nothing. More than eight heads are in a cache where a threadgroup takes them all."""
    heads = q_latent.shape[1]
    case = Mla(heads, rows.shape[1])
    _, q, kv_a, norm, wavelengths, _, position = case.inputs
    own = kv_a if new is None else mx.array(new)
    room = 0 if dtype == mx.float32 else MATRIX_ROWS if heads <= MATRIX_HEADS else MANY_ROWS
    cache = mx.contiguous(mx.pad(mx.array(rows), [(0, 0), (0, room), (0, 0)], constant_values=mx.nan).astype(dtype))
    others = (own.astype(dtype), norm, wavelengths, cache, position)
    v_b = mx.repeat(mx.eye(64)[None], heads, axis=0)
    no_rope = (0 * mx.nan_to_num(q)).astype(dtype)
    # Two splits and that of the last rows, so that a threadgroup of matrices goes through several turns of 32 rows.
    with mock.patch.object(module, "MATRIX_THREADGROUPS", 3):
        module._launches.cache_clear()
        (y,) = run(lambda: [mla_decode(mx.array(q_latent).astype(dtype), no_rope, *others, 1.0, v_b)[0]], launches=2)
    module._launches.cache_clear()
    return float64(y).reshape(heads, 64)


def rounded(values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return float64(mx.array(values).astype(dtype))


@pytest.mark.parametrize(("context", "at", "dtype"), FAR)
def test_one_row_that_wins_is_the_result(context: int, at: int, dtype: mx.Dtype) -> None:
    """Scores far above all others: nothing overflows, wherever the winner is."""
    rows = np.random.default_rng(0).standard_normal((1, context, 80)).astype(np.float32)
    rows[0, at, 0] = 1e4
    q_latent = np.zeros((1, 5, 1, 64), np.float32)
    q_latent[..., 0] = 1.0
    want = np.tile(rounded(rows[0, at, :64], dtype), (5, 1))
    np.testing.assert_array_equal(attend(q_latent, rows, dtype), want)


@pytest.mark.parametrize(("context", "at", "dtype"), FAR)
def test_the_best_of_scores_far_below_zero_is_the_result(context: int, at: int, dtype: mx.Dtype) -> None:
    rows = np.random.default_rng(0).standard_normal((1, context, 80)).astype(np.float32)
    rows[0, :, 0] = -1
    rows[0, at, 0] = -0.5
    new = np.zeros((1, 1, 80), np.float32)
    new[..., 0] = -1  # normed, -8
    q_latent = np.zeros((1, 5, 1, 64), np.float32)
    q_latent[..., 0] = 1e4
    want = np.tile(rounded(rows[0, at, :64], dtype), (5, 1))
    np.testing.assert_array_equal(attend(q_latent, rows, dtype, new), want)


@pytest.mark.parametrize(
    ("dtype", "near", "heads"), [(mx.float32, 1e-5, 5), (mx.bfloat16, 2**-8, 5), (mx.bfloat16, 2**-8, 17)]
)
def test_heads_do_not_share_a_largest_score(dtype: mx.Dtype, near: float, heads: int) -> None:
    """Every second head sees scores of 0 beside a neighbour's of 10,000: it gives the mean of the rows."""
    rows = np.random.default_rng(0).standard_normal((1, 100, 80)).astype(np.float32)
    rows[0, 40, 0] = 1e4
    q_latent = np.zeros((1, heads, 1, 64), np.float32)
    q_latent[0, ::2, 0, 0] = 1.0
    own = np.zeros((1, 1, 80), np.float32)
    rows[0, 99] = 0
    out = attend(q_latent, rows, dtype, own)
    held = rounded(rows[0, :, :64], dtype)
    np.testing.assert_array_equal(out[::2], np.tile(held[40], (-(-heads // 2), 1)))
    np.testing.assert_allclose(out[1::2], np.tile(held.mean(axis=0), (heads // 2, 1)), rtol=near, atol=near / 10)


@pytest.mark.parametrize(
    "case", [Mla(5, 70, tokens=3), Mla(5, 70, tokens=3, dtype=mx.bfloat16, room=MATRIX_ROWS)], ids=str
)
def test_what_is_not_finite_stays_with_the_queries_that_see_it(case: Mla) -> None:
    """A new row of NaN reaches every query that sees it, and no other; a query of NaN, only itself."""
    q_latent, q, kv_a, *others = *case.inputs, case.scale, case.v_b

    def by_head(*inputs: Any) -> np.ndarray:
        """(L, H, V)"""
        (y,) = run(lambda: [mla_decode(*inputs, *others)[0]], launches=2)
        return float64(y).reshape(3, 5, -1)

    def with_nan(x: mx.array, *at: int) -> mx.array:
        values = float64(x)
        values[at] = np.nan
        return mx.array(values.astype(np.float32)).astype(x.dtype)

    clean = by_head(q_latent, q, kv_a)
    got = by_head(q_latent, q, with_nan(kv_a, 0, 1))
    assert np.isnan(got[1:]).all()
    np.testing.assert_array_equal(got[0], clean[0])
    got = by_head(with_nan(q_latent, 0, 2, 1), q, kv_a)
    assert np.isnan(got[1, 2]).all()
    queries_left = np.ones((3, 5), bool)
    queries_left[1, 2] = False
    np.testing.assert_array_equal(got[queries_left], clean[queries_left])


@pytest.mark.parametrize(
    "case", [Mla(4, 37, tokens=2), Mla(4, 37, tokens=2, dtype=mx.float16, room=MATRIX_ROWS)], ids=str
)
def test_rows_are_written_in_place_and_nothing_else_is(case: Mla) -> None:
    cache = case.inputs[5]
    before = np.array(cache)
    (_, after) = run(lambda: list(mla_decode(*case.inputs, case.scale, case.v_b)), launches=2)
    assert after is cache
    np.testing.assert_array_equal(np.array(after)[:, :35], before[:, :35])
    np.testing.assert_array_equal(np.array(after)[:, 37:], before[:, 37:])
    assert not np.isnan(np.array(after)[:, 35:37]).any()
