"""Whole models, free-running: prefill in chunks and token-by-token decode against the whole-sequence reference."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx.cache import STEP
from glm_mlx.make_tiny import TinySpec
from kernels import mla_decode
from parity_tests.budgets import check
from parity_tests.compare import Array, load_whole, to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.test_layers import tokens
from parity_tests.variants import VARIANTS
from reference.model import Reference


def run(path: Path, ids: list[int], chunks: list[int]) -> Array:
    """Logits (T, V) with the prompt fed in pieces of these lengths; each piece sees the cache of those before."""
    model = load_whole(path)
    cache, start, parts = model.new_cache(), 0, []
    for length in chunks:
        part = mx.array([ids[start : start + length]])
        parts.append(to_numpy(model.logits(model.hidden_states(part, cache)))[0])
        start += length
    assert start == len(ids) == cache.offset
    return np.concatenate(parts)


@pytest.mark.parametrize("name", VARIANTS)
def test_prefill_then_decode_gives_the_reference_logits(name: str, model_file: MakeModel) -> None:
    path, ids = model_file(VARIANTS[name]), tokens(24)
    got = run(path, ids, [16, *[1] * 8])
    check("logits", got, Reference(path).forward(ids)["logits"], name)


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, STEP - 1, STEP, STEP + 1])
def test_chunked_prefill_equals_one_chunk(chunk: int, model_file: MakeModel) -> None:
    """Chunks on both sides of the cache's growth step; the last one is ragged."""
    path = model_file(TinySpec(layers=2))
    ids = tokens(STEP + 45)
    whole = run(path, ids, [len(ids)])
    chunks = [min(chunk, len(ids) - start) for start in range(0, len(ids), chunk)]
    check("same path", run(path, ids, chunks), whole, f"chunks of {chunk}")


@pytest.mark.parametrize("chunk", [1, 31, 32, 33, 64, 100])
def test_chunks_on_both_sides_of_a_block_edge_equal_one_chunk(
    chunk: int, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 16 queries and 32 rows, against a whole prompt in one block."""
    path = model_file(TinySpec(layers=2))
    ids = tokens(100)
    whole = run(path, ids, [len(ids)])
    monkeypatch.setattr(mla_decode, "QUERIES", 16)
    monkeypatch.setattr(mla_decode, "block_rows", lambda *_: 32)
    chunks = [min(chunk, len(ids) - start) for start in range(0, len(ids), chunk)]
    check("same path", run(path, ids, chunks), whole, f"chunks of {chunk}")


def test_sequences_of_a_batch_do_not_see_each_other(model_file: MakeModel) -> None:
    model = load_whole(model_file(TinySpec()))
    batch = [tokens(9, seed) for seed in range(3)]
    cache = model.new_cache()
    first = model.hidden_states(mx.array([ids[:5] for ids in batch]), cache)
    rest = model.hidden_states(mx.array([ids[5:] for ids in batch]), cache)
    together = to_numpy(model.logits(mx.concatenate([first, rest], axis=1)))
    for i, ids in enumerate(batch):
        alone = to_numpy(model.logits(model.hidden_states(mx.array([ids]), model.new_cache())))[0]
        check("same path", together[i], alone, f"sequence {i} of 3")


def test_a_trimmed_cache_forgets_what_was_cut(model_file: MakeModel) -> None:
    model, ids = load_whole(model_file(TinySpec())), tokens(20)
    cache = model.new_cache()
    model.hidden_states(mx.array([ids[:10] + tokens(10, seed=9)]), cache)
    cache.trim(10)
    again = to_numpy(model.logits(model.hidden_states(mx.array([ids[10:]]), cache)))[0]
    fresh = to_numpy(model.logits(model.hidden_states(mx.array([ids]), model.new_cache())))[0, 10:]
    check("same path", again, fresh, "after trim")
