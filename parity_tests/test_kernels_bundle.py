"""Weights of one launch in one array: the same values, the same results, and one array for the launch."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench.calls import record
from glm_mlx.compositions import COMPOSITIONS, NARROW, Composition, read_small
from glm_mlx.load import load_model
from glm_mlx.make_tiny import TinySpec
from glm_mlx.model import Model
from kernels import launcher
from kernels.experts_down import experts_down
from kernels.experts_gate_up import experts_gate_up
from kernels.mla_decode import mla_decode
from kernels.planes import QUANT_TYPES, Bundle, Weight, bundled, dequantize_ops
from kernels.qmv import Norm, absorb, norm_qmv, qmv, qmv_all
from kernels.route import Router
from parity_tests.budgets import check
from parity_tests.compare import to_numpy
from parity_tests.conftest import MakeModel
from parity_tests.kernel_cases import bits, random_array, random_weight, run

Op = Callable[[Sequence[Weight], mx.array, Bundle | None], Sequence[mx.array]]


def vectors(*shape: int, seed: int = 0) -> mx.array:
    return random_array(shape, mx.float32, seed)


def gate_up(weights: Sequence[Weight], bias: mx.array, bundle: Bundle | None) -> list[mx.array]:
    router = Router(bias, 2, "sigmoid", True, 1.5)
    return [*experts_gate_up(vectors(1, 2, 64), vectors(1, 2, 8, seed=1), router, *weights)]


def down(weights: Sequence[Weight], vector: mx.array, bundle: Bundle | None) -> list[mx.array]:
    experts, shares = mx.array([[[3, 1], [0, 7]]], mx.uint32), mx.array([[[0.5, 0.25], [1.0, 0.5]]])
    choice = mx.stack([experts, shares.view(mx.uint32)], axis=-2)
    return [experts_down(vectors(1, 2, 3 * 64), choice, weights[0], weights[1], None)]


def attention(weights: Sequence[Weight], gains: mx.array, bundle: Bundle | None) -> list[mx.array]:
    norm, wavelengths = Norm(gains, 1e-5, bundle), mx.array([1.0, 10.0, 100.0, 1000.0])
    y, _ = mla_decode(
        vectors(1, 2, 1, 64),
        vectors(1, 1, 2 * 40),
        vectors(1, 1, 72),
        norm,
        wavelengths,
        vectors(1, 40, 72),
        mx.array([9], mx.int32),
        0.1,
        weights[0],
    )
    return [y]


# What is computed, the types and the shapes of the weights, the size of a vector of floats, and the launches.
OPS: dict[str, tuple[Op, list[tuple[str, tuple[int, ...]]], int, int]] = {
    "qmv, a scale for 32": (
        lambda w, gains, bundle: qmv_all(vectors(1, 256), w, Norm(gains, 1e-5, bundle)),
        [("Q4_0", (9, 256)), ("Q8_0", (17, 256)), ("IQ4_NL", (8, 256))],
        256,
        1,
    ),
    "qmv, minima": (lambda w, *_: qmv_all(vectors(1, 256), w), [("Q5_1", (9, 256)), ("Q4_1", (8, 256))], 8, 1),
    "qmv, K-quants": (
        lambda w, *_: qmv_all(vectors(1, 768), w),
        [("Q6_K", (10, 768)), ("Q4_K", (12, 768)), ("Q5_K", (8, 768))],
        8,
        1,
    ),
    "qmv, one matrix": (lambda w, *_: [qmv(vectors(1, 256), w[0])], [("Q5_0", (8, 256))], 8, 1),
    "qmv, floats": (
        lambda w, gains, bundle: [*norm_qmv(vectors(1, 256), w[0], Norm(gains, 1e-5, bundle), mx.float32)],
        [("F32", (8, 256))],
        256,
        1,
    ),
    "qmv, 16 bits": (
        lambda w, gains, bundle: [qmv(vectors(1, 256), w[0], Norm(gains, 1e-5, bundle))],
        [("BF16", (9, 256))],
        256,
        1,
    ),
    "absorb": (lambda w, *_: [absorb(vectors(1, 1, 2 * 40), w[0])], [("Q8_0", (2, 16, 32))], 8, 1),
    "gate_up": (
        gate_up,
        [("Q4_0", (8, 16, 64)), ("Q4_0", (8, 16, 64)), ("Q5_0", (32, 64)), ("Q5_0", (32, 64))],
        8,
        1,
    ),
    "down": (down, [("Q8_0", (8, 24, 64)), ("Q4_0", (24, 64))], 8, 1),
    "mla_decode": (attention, [("Q8_0", (2, 16, 64))], 64, 2),
}


@pytest.mark.parametrize("name", OPS)
def test_a_launch_gets_one_array_for_its_weights_and_computes_the_same(name: str) -> None:
    call, kinds, size, launches = OPS[name]
    apart = [random_weight(kind, shape, i) for i, (kind, shape) in enumerate(kinds)]
    vector = random_array((size,), mx.float32, 7)
    (*together, moved), bundle = bundled([*apart, vector])
    assert bundle is not None
    assert isinstance(moved, mx.array)
    assert [bits(y) for y in run(lambda: call(together, moved, bundle), launches=launches)] == [
        bits(y) for y in run(lambda: call(apart, vector, None), launches=launches)
    ]
    with launcher.recording() as seen:
        call(together, moved, bundle)
    assert len(seen) == launches
    for launch, arrays in seen:
        assert len(arrays) == len(launch.inputs) + 1
        assert arrays[-1] is bundle.words


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_bundled_weights_are_the_weights(kind: str) -> None:
    apart = [random_weight(kind, (2, 5, 768), 0), vectors(4, 8), random_weight("Q4_0", (7, 64), 1), vectors(9)]
    together, bundle = bundled(apart)
    assert bundle is not None
    for moved, weight in zip(together, apart, strict=True):
        np.testing.assert_array_equal(np.array(dequantize_ops(moved)), np.array(dequantize_ops(weight)))
    begins = [begin for weight in together for begin in bundle.begins(weight) or ()]
    assert len(set(begins)) == len(begins) >= 6
    assert all(begin % 64 == 0 for begin in begins)


def test_a_weight_that_is_not_whole_words_keeps_its_arrays() -> None:
    odd, even = random_weight("Q4_0", (7, 32), 0), random_weight("Q4_0", (8, 32), 1)  # 7 scales of two bytes
    (same, moved), bundle = bundled([odd, even])
    assert same is odd
    assert bundle is not None
    assert bundle.begins(odd) is None
    assert bundle.begins(moved) is not None
    assert launcher.placed(odd, moved)[0] is None
    assert bundled([odd]) == ([odd], None)


def test_weights_that_stand_in_one_array_stay_there() -> None:
    """Of a second model over the same weights nothing stands in memory twice."""
    apart = [random_weight("Q4_0", (16, 64), 0), vectors(4, 8), random_weight("Q4_0", (7, 32), 1)]
    together, bundle = bundled(apart)
    again, same = bundled(together)
    assert same is bundle
    assert all(a is b for a, b in zip(again, together, strict=True))
    more, another = bundled([*together, random_weight("Q4_0", (16, 64), 2)])
    assert another is not bundle
    assert launcher.placed(more[0], more[-1])[0] is not None


def test_weights_of_two_bundles_are_read_from_their_planes() -> None:
    (one,), (two,) = (bundled([random_weight("Q4_0", (16, 64), seed)])[0] for seed in range(2))
    x = vectors(1, 64)
    with launcher.recording() as seen:
        qmv_all(x, [one, two])
    assert len(seen[0][1]) == 1 + 4


SPECS = {
    "GLM": TinySpec(layers=4),
    "DeepSeek-V2-Lite": TinySpec(layers=4, q_lora_rank=0, gating="softmax", num_shared_experts=2),
    "two dense layers, no shared expert": TinySpec(layers=4, first_k_dense=2, num_shared_experts=0),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_model_on_a_gpu_moves_what_each_launch_reads_into_one_array(
    name: str, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays that were loaded are let go, the model computes the same, and no layer has a text of its own."""
    file = model_file(SPECS[name])
    cfg, loaded = read_small(file)
    weights, ids = dict(loaded), mx.array([[5, 6, 7]])
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        model = Model(cfg, weights, mx.float32)
    with launcher.recording() as seen:
        rows = [model.row_format.zeros(1, 256)] * model.cfg.num_layers
        model.step(mx.array([[5]], mx.int32), mx.array([0], mx.int32), rows)
    of_layers = [(launch, arrays) for launch, arrays in seen if launch.op != "embed"][:-1]  # the last is the head
    assert len(of_layers) > 7 * model.cfg.num_layers
    for launch, arrays in of_layers:
        assert len(arrays) == len(launch.inputs) + 1, launch.op
    assert len({id(arrays[-1]) for _, arrays in of_layers}) <= 3 * model.cfg.num_layers
    names = [launch.name for launch, _ in of_layers]
    middles = [i for i, (launch, _) in enumerate(of_layers) if launch.op == "mla_decode"]
    assert len(middles) == model.cfg.num_layers
    assert len({tuple(names[i - 2 : i + 3]) for i in middles}) == 1, "from q to o_proj"
    assert len({name for name in names if name.startswith("experts_")}) == 2
    assert not [name for name, old in loaded.items() if name.endswith("down_proj") and weights[name] is old]
    own = [call.weights for call in record(model, weights, 9) if call.place.part in ("attention", "feed-forward")]
    assert own.count(("gate",)) == model.cfg.num_layers - cfg.first_k_dense, "by the router's launch alone"
    assert not [names for names in own if "gate" in names and len(names) > 1], "what stands in an array is not read"
    both = [m.logits(m.hidden_states(ids, m.new_cache())) for m in (model, load_model(file, mx.float32).model)]
    check("same path", to_numpy(both[0]), to_numpy(both[1]), f"{name}, bundled")


@pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda c: c.name)
def test_a_layer_of_any_composition_is_nine_launches_at_most(
    composition: Composition, model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """424 for the 47 layers of GLM-4.7-Flash with the embedding: 428 with what MLX does for a greedy token."""
    cfg, weights = read_small(model_file(replace(NARROW, layers=3, **composition.changes)))
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        model = Model(cfg, dict(weights), mx.bfloat16)
    with launcher.recording() as seen:
        rows = [model.row_format.zeros(1, 256)] * model.cfg.num_layers
        model.step(mx.array([[5]], mx.int32), mx.array([0], mx.int32), rows)
    assert len(seen) <= 9 * model.cfg.num_layers + 2, "those of layers, the embedding and the head"


def test_experts_that_are_not_quantised_stay_where_they_are(
    model_file: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bank of GLM-4.7-Flash is 0.4 GB in 16 bits, and would stand in memory twice."""
    loaded = load_model(model_file(TinySpec(type="F16")), mx.float32)
    weights = dict(loaded.weights)
    with monkeypatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        Model(loaded.model.cfg, weights, mx.float32)
    moved = {name for name, old in loaded.weights.items() if weights[name] is not old}
    assert "layers.1.self_attn.o_proj" in moved
    assert "layers.1.mlp.gate" in moved
    assert not any("expert" in name for name in moved)


def cuda_header(monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    """What the launcher gives to MLX's CUDA back end as the header of a kernel, less the line that names the GPU."""
    given: dict[str, Any] = {}

    def back_end(**options: Any) -> Callable[..., list[mx.array]]:
        given.update(options)
        return lambda **_: []

    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(mx.fast, "cuda_kernel", back_end)
    launcher.prepare(
        back_end,
        "embed",
        inputs=["tokens"],
        weights={"W": ("Q4_0", (16, 64))},
        outputs={"y": ((1, 64), mx.float32)},
        template={},
        threadgroups=(1, 1, 1),
        simdgroups=1,
    )
    gpu, _, header = str(given["header"]).partition("\n")
    assert gpu.startswith("// sm_")
    return header


def test_on_cuda_a_text_is_included_from_a_file_that_holds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """MLX hashes what it is given before each launch. A damaged file is written anew."""
    line = cuda_header(monkeypatch, tmp_path)
    assert len(line) < 300
    file = Path(line.removeprefix('#include "').rstrip('"\n'))
    text = file.read_text()
    assert "#define W Scaled<Linear<4, 8>, 64>" in text
    file.write_text("damaged")
    assert cuda_header(monkeypatch, tmp_path) == line
    assert file.read_text() == text
    (tmp_path / "a file").write_text("")
    assert cuda_header(monkeypatch, tmp_path / "a file") == text
    assert cuda_header(monkeypatch, tmp_path / 'a "quote"') == text
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cuda_header(monkeypatch, Path("near")).startswith(f'#include "{tmp_path}/'), "NVRTC looks elsewhere for that"
    assert not Path("near").exists()
