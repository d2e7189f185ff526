"""The model without a file: composition and sizes of published files, planes as a loader makes them, sane values."""

from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from bench import synthetic
from glm_mlx.cache import LatentCache
from glm_mlx.config import Config
from glm_mlx.errors import InputError
from glm_mlx.make_tiny import random_blocks
from glm_mlx.packing import pack, packed_nbytes
from kernels.planes import QUANT_TYPES, QuantizedTensor, dequantize_ops, unpack_quants
from kernels.rows import RowFormat

# import-linter keeps tests and benchmarks from importing one another.
MIXES, config, tensors = synthetic.MIXES, synthetic.config, synthetic.tensors

# Of published files: tensors by type, and GB.
PUBLISHED = {
    "q4_0": ({"Q4_0": 562, "Q6_K": 1}, 16.95),
    "q4_0-imatrix": ({"Q4_0": 553, "Q4_1": 9, "Q6_K": 1}, 17.00),
    "q4_k_m": ({"Q4_K": 470, "Q6_K": 46, "Q5_0": 47}, 18.12),
    "unsloth-q4_0": ({"Q4_0": 282, "Q8_0": 141, "Q5_K": 92, "Q6_K": 47, "Q4_K": 1}, 17.16),
    "q8_0": ({"Q8_0": 563}, 31.83),
}


def narrow(layers: int) -> Config:
    """All layers, but narrow: K-quants need 256 columns."""
    real: Config = config(layers)
    return replace(
        real,
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_heads=2,
        q_lora_rank=256,
        kv_lora_rank=256,
        num_experts=8,
        moe_intermediate_size=256,
    )


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_the_composition_of_the_published_file(mix: str) -> None:
    planned = list(tensors(config(), MIXES[mix]))
    counts, gigabytes = PUBLISHED[mix]
    assert Counter(kind for _, kind in planned) == Counter(counts | {"F32": 281})
    nbytes = sum(packed_nbytes(GGMLQuantizationType[kind], tensor.shape) for tensor, kind in planned)
    assert nbytes / 1e9 == pytest.approx(gigabytes, abs=0.005)


def test_q4_k_m_gives_more_bits_to_the_layers_that_llama_cpp_gives_them() -> None:
    found = {t.name.split(".")[1] for t, kind in tensors(config(), MIXES["q4_k_m"]) if kind == "Q6_K" and "." in t.name}
    assert {int(layer) for layer in found} == {*range(5), *range(7, 41, 3), *range(41, 47)}


@pytest.mark.parametrize("mix", MIXES)
def test_weights_hold_the_bytes_of_their_types(mix: str) -> None:
    cfg = narrow(9)  # from 8 layers on there is a first eighth
    expected: Counter[str] = Counter()
    for tensor, kind in tensors(cfg, MIXES[mix]):
        expected[kind] += packed_nbytes(GGMLQuantizationType[kind], tensor.shape)
    assert {
        kind: nbytes for kind, (_, nbytes) in synthetic.by_type(synthetic.make_weights(cfg, MIXES[mix])).items()
    } == expected


@pytest.mark.parametrize("kind", [*QUANT_TYPES, "F16", "BF16", "F32"])
def test_planes_are_those_that_a_loader_makes(kind: str) -> None:
    shape = (3, 8, 512)
    made = synthetic.random_weight(kind, shape, 0.02, mx.random.key(0))
    blocks = random_blocks(np.random.default_rng(0), kind, shape, 0.02).view(np.uint8)
    loaded = pack(blocks, GGMLQuantizationType[kind], shape)
    assert isinstance(made, QuantizedTensor) == isinstance(loaded, QuantizedTensor)
    for ours, theirs in zip(
        *(w.planes if isinstance(w, QuantizedTensor) else (w,) for w in (made, loaded)), strict=True
    ):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert made.shape == shape


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_random_weights_have_the_size_asked_for_and_every_quant(kind: str) -> None:
    made = synthetic.random_weight(kind, (256, 1024), 0.02, mx.random.key(1))
    assert isinstance(made, QuantizedTensor)
    values = np.asarray(dequantize_ops(made), np.float64)
    assert np.sqrt((values**2).mean()) == pytest.approx(0.02, rel=0.02)
    assert abs(values.mean()) < 0.01 * 0.02 * 3
    counts = np.bincount(np.asarray(unpack_quants(made)).reshape(-1), minlength=1 << made.type.bits)
    assert counts.min() > 0.8 * counts.mean()


@pytest.mark.parametrize("mix", ["q4_k_m", "unsloth-q4_0"])
def test_two_layers_of_the_real_widths_stay_finite(mix: str) -> None:
    made = synthetic.make_model(replace(config(2), vocab_size=1024, num_experts=8), mix)
    tokens = mx.array([[1, 2, 3, 1000]])
    cache = made.model.new_cache()
    for layer in range(2):
        assert made.model.layers[layer].self_attn.k_b.shape == (20, 512, 192)
    hidden = made.model.hidden_states(tokens, cache)
    logits = made.model.logits(hidden)
    assert mx.isfinite(hidden).all()
    assert mx.isfinite(logits).all()
    assert 0.5 < float(logits.square().mean().sqrt()) < 2
    experts = made.weights["layers.1.mlp.experts.down_proj"]
    assert isinstance(experts, QuantizedTensor)
    assert experts.shape == (8, 2048, 1536)


def test_activations_neither_explode_nor_vanish_over_47_layers() -> None:
    made = synthetic.make_model(narrow(47))
    hidden = made.model.hidden_states(mx.arange(8)[None], made.model.new_cache())
    assert 1 < float(hidden.square().mean().sqrt()) < 50
    assert 0.5 < float(made.model.logits(hidden).square().mean().sqrt()) < 2


def test_tokens_choose_different_experts() -> None:
    made = synthetic.make_model(narrow(2))
    bias = made.weights["layers.1.mlp.e_score_correction_bias"]
    assert isinstance(bias, mx.array)
    assert mx.abs(bias - 9.03).max() < 0.1
    assert np.unique(np.asarray(bias)).size == 8
    seen: list[list[int]] = []
    x = made.model.embed(mx.arange(32)[None])
    made.model.layers[1](
        x, made.model.new_cache(), lambda name, v: seen.extend(v[0].tolist()) if name == "experts" else None
    )
    assert len({tuple(sorted(chosen)) for chosen in seen}) > 10


def test_the_same_seed_gives_the_same_weights_and_another_others() -> None:
    def head(layers: int, seed: int) -> mx.array:
        weight = synthetic.make_weights(narrow(layers), MIXES["q4_0"], seed)["layers.1.self_attn.o_proj"]
        assert isinstance(weight, QuantizedTensor)
        return weight.quants

    first = head(2, 0)
    assert mx.array_equal(first, head(2, 0))
    assert mx.array_equal(first, head(3, 0))  # fewer layers are the first ones of more
    assert not mx.array_equal(first, head(2, 1))


def test_what_does_not_fit_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "available_memory", lambda: 1 << 20)
    with pytest.raises(InputError, match=r"2 layers need .* GB of memory, .* take fewer with --layers"):
        synthetic.make_model(narrow(2))
    with pytest.raises(InputError, match="48 layers can't be made; take 1 to 47"):
        config(48)
    with pytest.raises(InputError, match="there is no mix q2; take one of q4_0"):
        synthetic.make_model(narrow(1), "q2")


@pytest.mark.parametrize("dtype", [mx.float16, mx.uint8], ids=str)
def test_a_cache_is_filled_behind_its_rows(dtype: mx.Dtype) -> None:
    cache = LatentCache(2, RowFormat(64, 8, dtype))
    synthetic.fill_cache(cache, 300)
    synthetic.fill_cache(cache, 0)
    synthetic.fill_cache(cache, 1, seed=1)
    assert cache.offset == 301
    for rows in cache.rows:
        assert rows is not None
        values = np.asarray(cache.format.load(rows[:, :301]))
        assert values.std() == pytest.approx(1, abs=0.05)
    assert not mx.array_equal(cache.rows[0], cache.rows[1])  # type: ignore[arg-type]
