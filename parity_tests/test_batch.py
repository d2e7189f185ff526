"""A batch of sequences: each gets the logits that it gets alone, whatever stands beside it."""

import mlx.core as mx
import numpy as np
import pytest

from glm_mlx.batch import Batch
from glm_mlx.cache import STEP, BatchCache, KvBits
from glm_mlx.errors import InputError
from glm_mlx.exclusive import InUseError
from glm_mlx.load import load_model
from glm_mlx.model import Model
from kernels import wide
from kernels.rows import RowFormat
from parity_tests.budgets import check
from parity_tests.compare import to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.test_engine import in_a_thread
from parity_tests.test_layers import tokens
from parity_tests.variants import VARIANTS

GLM = "GLM Q4_0, output Q6_K"


def texts(lengths: list[int], vocabulary: int) -> list[list[int]]:
    """No two begin alike."""
    return [[(token * (3 + i) + i) % vocabulary for token in tokens(length)] for i, length in enumerate(lengths)]


def alone(model: Model, parts: list[list[int]]) -> list[np.ndarray]:
    """The logits after each part of a sequence."""
    cache, logits = model.new_cache(), []
    for part in parts:
        logits.append(to_numpy(model.logits(model.hidden_states(mx.array([part]), cache)[:, -1:])[0, 0]))
    return logits


def together(model: Model, turns: list[list[list[int]]], chunk: int | None = None) -> list[np.ndarray]:
    """For each turn, in which each sequence has new tokens, (B, vocabulary)."""
    batch = Batch(model, len(turns[0]), chunk)
    return [to_numpy(batch(new)) for new in turns]


@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize("name", [GLM, "DeepSeek-V2-Lite"])
def test_a_sequence_in_a_batch_gets_the_logits_that_it_gets_alone(
    name: str, kv_bits: KvBits, chunk: int | None, model_file: MakeModel
) -> None:
    """Prompts, then single tokens, then a second turn of several tokens behind different lengths, then one more."""
    model = load_model(model_file(VARIANTS[name]), mx.float32, kv_bits=kv_bits).model
    lengths = [[7, 1, 19, 12], *[[1] * 4] * 3, [2, 9, 1, 5], [1] * 4]
    whole = texts([sum(column) for column in zip(*lengths, strict=True)], model.cfg.vocab_size)
    begins = np.cumsum([[0] * 4, *lengths], axis=0)
    turns = [
        [text[begin : begin + count] for text, begin, count in zip(whole, row, counts, strict=True)]
        for row, counts in zip(begins[:-1].tolist(), lengths, strict=True)
    ]
    got = together(model, turns, chunk)
    for i in range(4):
        for turn, want in enumerate(alone(model, [new[i] for new in turns])):
            check("same path", got[turn][i], want, f"{name}, {kv_bits} bits, sequence {i}, turn {turn}")


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_batch_of_prompts_in_16_bits_stays_near_one_prompt(
    kv_bits: KvBits, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where many tokens are computed in another way than few."""
    monkeypatch.setattr(wide, "_on_cuda", lambda: True)
    model = load_model(model_file(VARIANTS[GLM]), mx.bfloat16, kv_bits=kv_bits).model
    texts_ = texts([wide.LEAST_TOKENS + 6, wide.LEAST_TOKENS, 3], model.cfg.vocab_size)
    turns = [texts_, *[[[token], [token + 1], [token + 2]] for token in (5, 9)]]
    got = together(model, turns)
    for i in range(3):
        for turn, want in enumerate(alone(model, [new[i] for new in turns])):
            check("logits, 16-bit", got[turn][i], want, f"batch, {kv_bits} bits, sequence {i}, turn {turn}")


@pytest.mark.parametrize("row_format", [RowFormat(6, 2, mx.float32), RowFormat(64, 8, mx.uint8)], ids=["floats", "8"])
def test_rows_go_to_where_each_sequence_ends(row_format: RowFormat) -> None:
    """Over padding, past a step, and no other row changes."""
    cache = BatchCache(1, row_format, 2)
    want = np.zeros((2, 2 * STEP, row_format.values), np.float32)
    for count, kept in [(STEP - 1, [STEP - 1, 4]), (3, [STEP + 2, 6]), (1, [STEP + 3, 7])]:
        new = mx.random.normal((2, count, row_format.values), key=mx.random.key(count))
        for sequence, begin in enumerate(cache.offsets):
            want[sequence, begin : begin + count] = to_numpy(new[sequence])
        got = cache.update(0, new)
        cache.advance(count)
        for sequence, end in enumerate(cache.offsets):
            stored = row_format.store(mx.array(want[sequence : sequence + 1, :end]))[0]
            assert bool((got[sequence, :end] == stored).all())
        cache.keep(kept)
        assert (cache.offsets, cache.offset) == (kept, max(kept))
    cache.trim(5)
    assert cache.offsets == [5, 5]
    assert cache.position == 5


def test_a_batch_is_refused_past_its_limit_and_without_tokens(model_file: MakeModel) -> None:
    model = load_model(model_file(VARIANTS[GLM]), mx.float32).model
    batch = Batch(model, 2)
    batch.cache.limit = 8
    for new in ([[1]], [[1], []], [[1], [2], [3]]):
        with pytest.raises(ValueError, match="tokens for 2 sequences"):
            batch(new)
    batch([[1] * 8, [2]])
    with pytest.raises(InputError, match="context of 8 tokens is full"):
        batch([[1], [2]])
    assert batch.cache.offsets == [8, 1]
    batch = Batch(model, 2, chunk=8)
    batch.cache.limit = 8
    with pytest.raises(InputError, match="context of 8 tokens is full"):
        batch([[1] * 9, [2] * 2])
    assert batch.cache.offsets == [8, 2]


def test_a_batch_ends_with_the_models_context(model_file: MakeModel) -> None:
    model = load_model(model_file(VARIANTS[GLM]), mx.float32).model
    assert Batch(model, 2).cache.limit == model.cfg.context_length
    with pytest.raises(ValueError, match="a batch of 0 sequences"):
        Batch(model, 0)
    with pytest.raises(ValueError, match=f"a token id outside 0 to {model.cfg.vocab_size - 1}"):
        Batch(model, 2)([[1], [model.cfg.vocab_size]])


def test_many_sequences_are_read_by_chunks_that_matrix_units_take(model_file: MakeModel) -> None:
    model = load_model(model_file(VARIANTS[GLM]), mx.float32).model
    assert [Batch(model, n).chunk for n in (1, 4, 8, 100)] == [512, 128, 64, 64]
    assert Batch(model, 4, chunk=8).chunk == 2


def test_a_batch_belongs_to_the_thread_of_its_first_call(model_file: MakeModel) -> None:
    batch = Batch(load_model(model_file(VARIANTS[GLM])).model, 1)
    batch([[1, 2]])
    assert isinstance(in_a_thread(lambda: batch([[3]])), InUseError)
    assert batch.cache.offsets == [2]
