"""Training computes what the product runs; a stopped run goes on as if it had not stopped; export keeps the values."""

import json
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from glm_mlx.errors import InputError
from glm_mlx.make_tiny import TinySpec, random_blocks
from glm_mlx.small import plot, train
from glm_mlx.small.export import export, quantize, quantize_q6_k
from glm_mlx.small.network import forward, init, shapes
from glm_mlx.small.train import Recipe, Trainer, batches, rate, round_q4_0
from parity_tests.budgets import check
from parity_tests.compare import load_whole, to_numpy
from reference.model import Reference

SPEC = TinySpec(
    layers=2, hidden_size=64, num_heads=2, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16,
    v_head_dim=32, intermediate_size=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mtp=True,
)  # fmt: skip
RECIPE = Recipe(spec=SPEC, vocabulary_size=512, steps=6, rows=2, length=256, warmup=2, round_from=0.5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """One short run on this CPU, from text to checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train.train(RECIPE, folder, workers=0, checkpoint_every=3)


def test_the_trained_network_is_the_one_the_product_runs(run: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Same checkpoint: training's forward pass, the exported F32 file in the product, and the reference."""
    folder, trainer = run
    path = export(folder, tmp_path / "float.gguf", SPEC, types={"": "F32"})
    ids = np.random.default_rng(0).integers(0, 500, 20).tolist()
    tokens = mx.array([ids])
    trained = to_numpy(forward(SPEC, trainer.params, trainer.biases, tokens, mx.zeros_like(tokens)).logits)[0]
    model = load_whole(path)
    run_by_product = to_numpy(model.logits(model.hidden_states(tokens, model.new_cache())))[0]
    check("logits", run_by_product, trained, "training against the product")
    check("logits", Reference(path).forward(ids)["logits"], trained, "training against the reference")


def test_segments_of_a_row_do_not_see_each_other() -> None:
    params = init(SPEC, 100, seed=0)
    biases = {f"layers.{i}.": mx.zeros((4,)) for i in (1, 2)}
    a, b = mx.array([[1, 2, 3, 4]]), mx.array([[9, 8, 7, 6, 5]])
    both = mx.concatenate([a, b], axis=1)
    packed = forward(SPEC, params, biases, both, mx.array([[1] * 4 + [2] * 5])).logits
    for part, alone in ((packed[:, :4], a), (packed[:, 4:], b)):
        check("same path", to_numpy(part), to_numpy(forward(SPEC, params, biases, alone, mx.ones_like(alone)).logits))


def test_training_lowers_the_loss_and_keeps_every_figure_finite(run: tuple[Path, Trainer]) -> None:
    lines = [json.loads(line) for line in (run[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(run: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Stopped after 4 steps with a checkpoint at 3: step 4 is done again, and everything ends equal, bit for bit."""
    whole = run[1]
    vocabulary = json.loads((run[0] / "vocabulary.json").read_text())
    for name in ("recipe.json", "vocabulary.json"):
        (tmp_path / name).write_text((run[0] / name).read_text())
    stopped = Trainer(RECIPE, len(vocabulary["tokenizer.ggml.tokens"]))
    lines = []
    for batch in batches(RECIPE, vocabulary, 0, workers=0):
        lines.append(json.dumps({"step": stopped.step + 1, **stopped.train(batch)}))
        if stopped.step == 3:
            stopped.save(tmp_path / "checkpoint.safetensors")
        if stopped.step == 4:
            break
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    resumed = train.train(RECIPE, tmp_path, workers=0)
    assert resumed.step == whole.step == 6
    for name, value in whole.params.items():
        assert mx.array_equal(resumed.params[name], value), name
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


def test_a_folder_of_another_recipe_is_refused(run: tuple[Path, Trainer]) -> None:
    with pytest.raises(InputError, match="another recipe"):
        train.train(replace(RECIPE, seed=1), run[0], workers=0)


def test_batches_are_the_same_whatever_the_number_of_workers(run: tuple[Path, Trainer]) -> None:
    vocabulary = json.loads((run[0] / "vocabulary.json").read_text())
    recipe = replace(RECIPE, steps=2)
    alone, together = list(batches(recipe, vocabulary, 0, 0)), list(batches(recipe, vocabulary, 0, 1))
    for a, b in zip(alone, together, strict=True):
        for name in ("tokens", "segments", "weights"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (alone[0].weights == 1).mean() > 0.1, "the assistant hardly speaks"


def test_a_busy_expert_is_chosen_less_after_the_nudge() -> None:
    """The selection bias alone, on frozen weights, evens out a router that starts lopsided."""
    trainer = Trainer(replace(RECIPE, learning_rate=0.0, balance_rate=0.02, steps=60, round_from=1.0), 300)
    trainer.params["layers.1.mlp.gate"] = trainer.params["layers.1.mlp.gate"] + mx.array([[0.3], [0], [0], [-0.3]])
    rng = np.random.default_rng(0)
    batch = train.Batch(
        rng.integers(0, 300, (2, 128)).astype(np.int32), np.ones((2, 128), np.int32), np.ones((2, 128), np.float32)
    )
    loads = [trainer.train(batch)["worst_load"] for _ in range(60)]
    assert loads[-1] < loads[0]
    assert loads[-1] < 1.3


def test_rounding_in_training_is_ggufs_q4_0() -> None:
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    w[0] = 0
    kind = GGMLQuantizationType.Q4_0
    want = gguf.quants.dequantize(gguf.quants.quantize(w, kind), kind)
    np.testing.assert_allclose(np.array(round_q4_0(mx.array(w))), want, atol=1e-6)
    gradient = mx.grad(lambda x: (round_q4_0(x) * mx.array(w)).sum())(mx.array(w))
    np.testing.assert_array_equal(np.array(gradient), w)


def test_our_q6_k_is_as_near_as_its_steps_allow() -> None:
    """Against gguf's dequantisation: at most half a step and a rounded scale away; what is Q6_K already stays."""
    w = np.random.default_rng(0).standard_normal((16, 512)).astype(np.float32)
    w[3] = 0
    back = gguf.quants.dequantize(quantize_q6_k(w), GGMLQuantizationType.Q6_K)
    groups = np.abs(w).reshape(-1, 16).max(axis=1)
    assert (np.abs(back - w).reshape(-1, 16).max(axis=1) <= groups / 32 * 1.2 + 1e-6).all()
    raw = random_blocks(np.random.default_rng(1), "Q6_K", (4, 512), 1.0)
    values = gguf.quants.dequantize(raw, GGMLQuantizationType.Q6_K)
    again = gguf.quants.dequantize(quantize_q6_k(values), GGMLQuantizationType.Q6_K)
    assert np.abs(again - values).max() <= np.abs(values).max() / 32


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q6_K"])
def test_exported_blocks_have_the_files_size(kind: str) -> None:
    block, nbytes = gguf.constants.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert quantize(np.ones((3, 4, 256), np.float32), kind).shape == (3, 4, 256 // block * nbytes)


def test_the_recipe_names_every_parameter_once() -> None:
    table = shapes(Recipe().spec, 2048)
    assert len(table) == len(set(table))
    assert rate(Recipe(), 0) < rate(Recipe(), 300) > rate(Recipe(), Recipe.steps - 1) > 0


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """A folder as a run of 120 steps leaves it, as far as a curve needs it."""
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(Recipe(steps=120))))
    step = {"seconds": 1.0, "gradient_norm": 1.0, "worst_load": 2.0}
    lines = [{"step": n, "loss": 9 / n, "total": 12 / n, **step} for n in range(1, 121)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")
@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_the_curve_of_a_run_is_drawn(logged: Path) -> None:
    plot.draw(logged, logged / "curve.svg")
    text = (logged / "curve.svg").read_text()
    assert "<!-- next token -->" in text
    assert "<!-- small model: 120 steps of 64 x 512 tokens, seed 0, 1 s -->" in text
    with pytest.raises(InputError, match="make its folder first"):
        plot.draw(logged, logged / "nowhere" / "curve.png")


@pytest.mark.parametrize(
    ("out", "steps", "message"), [("c.txt", 120, "ends in .png"), ("c.png", 49, "49 steps so far")]
)
def test_a_curve_that_cannot_be_drawn_is_one_line(logged: Path, out: str, steps: int, message: str) -> None:
    log = logged / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:steps]))
    with pytest.raises(InputError, match=message):
        plot.draw(logged, logged / out)
    log.unlink()
    with pytest.raises(InputError, match="train first"):
        plot.draw(logged, logged / "c.png")


def test_a_curve_without_matplotlib_is_one_line(logged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="pip install"):
        plot.draw(logged, logged / "curve.png")
