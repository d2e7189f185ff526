"""A model with its cache in 8 bits beside the same with the cache in the type of its activations."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest

from glm_mlx import generate
from glm_mlx.cache import STEP, KvBits
from glm_mlx.engine import Engine
from glm_mlx.errors import InputError
from glm_mlx.load import load_model, open_model
from glm_mlx.make_tiny import GLM_FLASH, TinySpec
from glm_mlx.model import Model
from glm_mlx.small import SMALL_MODEL
from glm_mlx.small.evaluate import SEED
from glm_mlx.small.train import Recipe, make_batch
from kernels import mla_decode
from parity_tests import golden
from parity_tests.budgets import BUDGETS, check, record
from parity_tests.compare import load_part, to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.test_engine import generate as generated
from parity_tests.test_layers import tokens

Logits = npt.NDArray[np.float64]


def both(model_file: MakeModel, spec: TinySpec) -> list[Model]:
    """The same weights with a cache in 16 bits and in 8."""
    cfg, weights = load_part(model_file(spec), lambda name: True)
    return [Model(cfg, weights, mx.float32, bits) for bits in (16, 8)]


def logits(model: Model, ids: Sequence[int], chunks: Sequence[int] = ()) -> npt.NDArray[np.float32]:
    """(T, vocabulary), with the ids read in pieces of these lengths."""
    cache, parts, start = model.new_cache(), [], 0
    for length in chunks or [len(ids)]:
        piece = mx.array([list(ids[start : start + length])])
        parts.append(to_numpy(model.logits(model.hidden_states(piece, cache)))[0])
        start += length
    assert start == len(ids) == cache.offset
    return np.concatenate(parts)


def divergence(exact: npt.ArrayLike, other: npt.ArrayLike) -> Logits:
    """Kullback-Leibler divergence of the next token's distributions from logits (T, vocabulary), in nats: (T,)"""
    p, q = (np.asarray(x, np.float64) for x in (exact, other))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (p, q))
    return (np.exp(p) * (p - q)).sum(axis=-1)


def check_mean(kind: str, found: Sequence[float] | Logits, where: str) -> None:
    mean = float(np.mean(found))
    record(kind, mean, where)
    assert 0 < mean <= BUDGETS[kind].most, f"{kind}, {where}: {mean:.3g}"


# --- what 8 bits change


def test_the_small_model_foretells_the_same_of_its_own_held_out_text() -> None:
    """Tokens of conversations that its training left out."""
    loaded = [load_model(SMALL_MODEL, mx.float32, kv_bits=bits) for bits in (16, 8)]
    vocabulary = {k: v for k, v in loaded[0].gguf.metadata.items() if k.startswith("tokenizer.")}
    batch = make_batch(SEED, replace(Recipe(), rows=1), vocabulary, held_out=True)
    found, same = list[float](), list[bool]()
    for number in range(1, int(batch.segments.max()) + 1):
        ids = batch.tokens[batch.segments == number].tolist()
        exact, packed = (logits(one.model, ids) for one in loaded)
        found += divergence(exact, packed).tolist()
        same += (exact.argmax(axis=-1) == packed.argmax(axis=-1)).tolist()
    assert len(found) > 300
    check_mean("8-bit cache", found, f"small model, {len(found)} held-out tokens")
    assert np.mean(same) > 0.99


def logits_and_experts(model: Model, ids: Sequence[int]) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """(T, vocabulary), and the experts that each token chose in all layers."""
    chosen: list[npt.NDArray[Any]] = []

    def tap(name: str, value: mx.array) -> None:
        if name == "experts":
            chosen.append(np.sort(np.array(value).reshape(len(ids), -1), axis=-1))

    x, cache = model.embed(mx.array([list(ids)])), model.new_cache()
    for layer in model.layers:
        x = layer(x, cache, tap)
    return to_numpy(model.logits(x))[0], np.concatenate(chosen, axis=-1)


def test_layers_of_the_real_width_foretell_the_same(model_file: MakeModel) -> None:
    """Three of random weights. Their experts are as random as the text, so that another choice at a near tie is
    another answer: the divergence is that of the tokens with the same experts in both runs, and the others are few."""
    spec = replace(GLM_FLASH, layers=3, num_experts=16, intermediate_size=2048)
    (exact, experts), (packed, others) = (logits_and_experts(model, tokens(64)) for model in both(model_file, spec))
    found, same = divergence(exact, packed), (experts == others).all(axis=-1)
    print(f"mean of all {found.mean():.3g}, of the {same.mean():.0%} with the same experts {found[same].mean():.3g}")
    assert same.mean() > 0.8
    check_mean("8-bit cache", found[same], "full width, same experts")


def test_the_small_model_gives_its_golden_answers() -> None:
    loaded = load_model(SMALL_MODEL, kv_bits=8)
    for case in golden.cases():
        assert golden.answer(loaded, case["prompt"], case["thinking"]) == case["answer"]


# --- what it does not


@pytest.mark.parametrize("chunk", [1, 7, 64, STEP - 1, STEP, STEP + 1])
def test_chunked_prefill_equals_one_chunk(chunk: int, model_file: MakeModel) -> None:
    """Every token reads the rows as they are stored, its own and those of its chunk too."""
    _, model = both(model_file, TinySpec(layers=2))
    ids = tokens(STEP + 45)
    chunks = [min(chunk, len(ids) - start) for start in range(0, len(ids), chunk)]
    check("8-bit cache, other chunks", logits(model, ids, chunks), logits(model, ids), f"chunks of {chunk}")


@pytest.mark.parametrize("chunk", [1, 31, 32, 33, 100])
def test_chunks_on_both_sides_of_a_block_edge_equal_one_chunk(
    chunk: int, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = both(model_file, TinySpec(layers=2))
    ids = tokens(100)
    whole = logits(model, ids)
    monkeypatch.setattr(mla_decode, "QUERIES", 16)
    monkeypatch.setattr(mla_decode, "block_rows", lambda *_: 32)
    chunks = [min(chunk, len(ids) - start) for start in range(0, len(ids), chunk)]
    check("8-bit cache, other chunks", logits(model, ids, chunks), whole, f"chunks of {chunk}")


def test_a_trimmed_cache_forgets_what_was_cut(model_file: MakeModel) -> None:
    _, model = both(model_file, TinySpec())
    ids, cache = tokens(20), model.new_cache()
    model.hidden_states(mx.array([ids[:10] + tokens(10, seed=9)]), cache)
    cache.trim(10)
    again = to_numpy(model.logits(model.hidden_states(mx.array([ids[10:]]), cache)))[0]
    check("8-bit cache, other chunks", again, logits(model, ids)[10:], "after trim")


def test_a_traced_step_gives_the_tokens_of_an_eager_one_while_the_cache_grows(model_file: MakeModel) -> None:
    _, model = both(model_file, TinySpec(context_length=600))
    eager, traced = Engine(model), Engine(model)
    traced._step = model.step
    for prompt, count in ((tokens(3), 280), (tokens(9), 10)):  # past the first 256 rows; then a cache to cut back
        assert generated(traced, prompt, count) == generated(eager, prompt, count)
        assert all(rows is not None and rows.dtype == mx.uint8 for rows in traced.cache.rows)


def test_16_bit_activations_are_rounded_once(model_file: MakeModel) -> None:
    """Rows of a bfloat16 model are made from float32 values, by a prompt as by a traced step."""
    cfg, weights = load_part(model_file(TinySpec()), lambda name: True)
    model, ids = Model(cfg, weights, mx.bfloat16, 8), tokens(6)
    seen: list[mx.Dtype] = []
    store = mla_decode.RowFormat.store

    def noted(row_format: mla_decode.RowFormat, values: mx.array) -> mx.array:
        seen.append(values.dtype)
        return store(row_format, values)

    with mock.patch.object(mla_decode.RowFormat, "store", noted):
        cache = model.new_cache()
        model.hidden_states(mx.array([ids]), cache)
        model.step(mx.array([[7]]), mx.array([6], mx.int32), cache.reserve(1))
    assert seen == [mx.float32] * 2 * cfg.num_layers


# --- options


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_the_option_sets_the_cache_and_what_is_planned_and_shown(
    kv_bits: KvBits, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[KvBits] = []
    with mock.patch("glm_mlx.session.open_model", lambda *a, **o: seen.append(o["kv_bits"]) or open_model(*a, **o)):
        arguments = ["Hi", "-n", "2", "--context", "1000", "--verbose", "--kv-bits", str(kv_bits)]
        assert generate.main(arguments) == 0
    cfg = open_model(SMALL_MODEL).config
    row = 208 if kv_bits == 8 else 4 * cfg.cache_dim
    assert seen == [kv_bits]
    assert f"{cfg.num_layers * 1024 * row / 1e6:.1f} MB" in (err := capfd.readouterr().err)
    assert f"{cfg.num_layers * row / 1e3:.1f} kB for each token before it" in err


def test_latents_that_8_bits_cannot_hold_are_refused_before_loading(model_file: MakeModel) -> None:
    path = model_file(TinySpec(kv_lora_rank=40, type="F16"))
    with pytest.raises(InputError, match="multiple of 32 values, this model's have 40; leave --kv-bits out"):
        open_model(path, kv_bits=8)
    assert open_model(path).memory.fits


def test_other_numbers_of_bits_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        generate.main(["Hi", "--kv-bits", "4"])
    assert "argument --kv-bits: invalid choice: 4" in capfd.readouterr().err
