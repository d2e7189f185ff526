"""The cache of one conversation: how it grows, what growing costs, where it ends."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx import cache as cache_module
from glm_mlx.cache import STEP, BatchCache, LatentCache
from glm_mlx.errors import InputError
from kernels.rows import RowFormat
from parity_tests.compare import memory_held

FLOATS, PACKED = RowFormat(6, 2, mx.float32), RowFormat(64, 8, mx.uint8)


def filled(rows: int, layers: int = 2, row_format: RowFormat = FLOATS, limit: int | None = None) -> LatentCache:
    """Row i of every layer holds i."""
    cache = LatentCache(layers, row_format, limit)
    append(cache, rows)
    return cache


def append(cache: LatentCache, count: int) -> None:
    for layer in range(len(cache.rows)):
        cache.update(layer, numbered(cache, cache.offset, cache.offset + count))
    cache.advance(count)


def numbered(cache: LatentCache, begin: int, end: int) -> mx.array:
    return mx.zeros((1, end - begin, cache.format.values)) + mx.arange(begin, end)[None, :, None]


def by_step(cache: LatentCache, count: int) -> None:
    """As a traced step does: whole arrays out, whole arrays in."""
    for _ in range(count):
        rows = cache.reserve(1)
        for array in rows:
            array[:, cache.offset] = cache.format.store(numbered(cache, cache.offset, cache.offset + 1))[:, 0]
        cache.take(rows, 1)


def by_update(cache: LatentCache, count: int) -> None:
    for _ in range(count):
        append(cache, 1)


def sizes(cache: LatentCache) -> set[int]:
    return {0 if rows is None else rows.shape[1] for rows in cache.rows}


def assert_rows(cache: LatentCache) -> None:
    want = np.array(cache.format.store(numbered(cache, 0, cache.offset)))
    for rows in cache.rows:
        np.testing.assert_array_equal(np.array(rows)[:, : cache.offset], want)


@pytest.mark.parametrize("row_format", [FLOATS, PACKED], ids=["floats", "8 bits"])
@pytest.mark.parametrize("grow", [by_step, by_update])
def test_a_long_answer_copies_few_rows_for_each_new_one(
    grow: Callable[[LatentCache, int], None], row_format: RowFormat
) -> None:
    """Not all of them every few hundred tokens: the square of the length would be copied."""
    cache, copied, before = filled(1, row_format=row_format), 0, STEP
    while cache.offset < 32 * STEP:
        grow(cache, STEP // 4)
        (now,) = sizes(cache)
        copied += before if now > before else 0
        assert now - cache.offset < STEP + now // 8, "more than it will need"
        before = now
    assert copied < 8 * cache.offset
    assert_rows(cache)


def test_what_is_expected_is_made_at_once() -> None:
    """A prompt in chunks: its length is known at the first, and no chunk copies those before it."""
    cache = filled(3)
    cache.expect(20 * STEP + 1)
    append(cache, STEP)
    assert sizes(cache) == {21 * STEP}
    first = [rows for rows in cache.rows if rows is not None]
    for _ in range(19):
        append(cache, STEP)
    assert all(a is b for a, b in zip(first, cache.rows, strict=True))
    assert_rows(cache)


@pytest.mark.parametrize("grow", [by_step, by_update])
def test_growing_takes_the_memory_of_one_layer_more_and_not_of_all(
    grow: Callable[[LatentCache, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_module, "LARGE", 1 << 20)
    cache = filled(4 * STEP, layers=16, row_format=RowFormat(224, 32, mx.float32))
    mx.eval(cache.rows)
    mx.clear_cache()
    others = memory_held() - cache.nbytes
    grow(cache, 1)
    mx.eval(cache.rows)
    assert sizes(cache) == {5 * STEP}
    assert mx.get_peak_memory() - others < 1.15 * cache.nbytes
    assert mx.get_cache_memory() < cache.nbytes / 16, "MLX keeps what was too small"


def test_buffers_of_mlx_are_emptied_only_for_large_arrays_that_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt wants them back at once: with each layer's array that is made for it, a GPU would allocate them anew."""
    emptied = []
    monkeypatch.setattr(mx, "clear_cache", lambda: emptied.append(True))
    cache = filled(STEP, layers=3)
    append(cache, STEP)
    assert emptied == []
    monkeypatch.setattr(cache_module, "LARGE", 1)
    append(cache, STEP)
    assert len(emptied) == 3
    assert_rows(cache)


@pytest.mark.parametrize("row_format", [FLOATS, PACKED], ids=["floats", "8 bits"])
@pytest.mark.parametrize("limit", [STEP - 56, 2 * STEP, 2 * STEP + 1])
def test_a_full_cache_is_refused_and_stays_as_it_was(limit: int, row_format: RowFormat) -> None:
    """By `reserve` too: before the launch of a kernel that would write behind the arrays' end."""
    cache = filled(limit - 1, row_format=row_format, limit=limit)
    cache.expect(100 * STEP)
    by_step(cache, 1)
    assert sizes(cache) == {-(-limit // STEP) * STEP}
    for grow in (by_step, by_update):
        with pytest.raises(InputError, match=f"context of {limit} tokens is full"):
            grow(cache, 1)
    assert cache.offset == limit
    assert_rows(cache)
    cache.trim(5)
    by_update(cache, 2)
    assert cache.offset == 7
    assert_rows(cache)


@pytest.mark.parametrize("offset", [0, 3, 5, 6, STEP])
def test_to_trim_forgets_rows_and_never_invents_any(offset: int) -> None:
    cache = filled(5)
    cache.trim(offset)
    assert cache.offset == min(5, offset)
    batch = BatchCache(1, FLOATS, 2)
    batch.advance(5)
    batch.keep([5, 2])
    batch.trim(offset)
    assert batch.offsets == [min(5, offset), min(2, offset)]
    assert batch.offset == min(5, offset)
