"""The benchmark of a block: the chain is the model's layers, its weights rotate, its bytes are the model's."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import glm_mlx.model
from bench import block, frame, gpu_time, script, subject, synthetic
from glm_mlx.model import decode_bytes
from kernels.planes import QuantizedTensor, Weight
from parity_tests.compare import memory_held

ROOT = Path(__file__).parents[1]
COPY = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}
SHORT = ["--depths", "20,300", "--count", "2", "--rounds", "2"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without seconds of copying, and no copies of layers."""
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: {**COPY})
    monkeypatch.setattr(block, "BEYOND_CACHES", {"cpu": 1, "gpu": 1})


def small(kv_bits: int = 16) -> subject.Subject:
    return subject.open_subject(Namespace(model=None, synthetic=None, layers=None, mix="q4_0", kv_bits=kv_bits))


def plane(weight: Weight) -> mx.array:
    return weight.quants if isinstance(weight, QuantizedTensor) else weight


def address(weight: Weight) -> int:
    found: int = np.asarray(plane(weight)).__array_interface__["data"][0]
    return found


def seconds_by_run(report: Mapping[str, Any]) -> dict[tuple[str, str, int], list[int]]:
    found: dict[tuple[str, str, int], list[int]] = {}
    for run in report["runs"]:
        found.setdefault((run["kind"], run["part"], run["depth"]), []).append(len(run["seconds"]))
    return found


def test_help_says_what_the_script_does() -> None:
    done = subprocess.run(
        [sys.executable, "bench/block.py", "-h"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("How fast one block decodes", "examples:", "--json FILE", "--synthetic"):
        assert words in done.stdout


@pytest.mark.usefixtures("quick")
def test_every_part_at_every_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert block.main([*SHORT, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    of_context = [
        (kind, part, depth) for part in ("attention", "block") for kind in ("MoE", "dense") for depth in (20, 300)
    ]
    expected = [*of_context, ("MoE", "feed-forward", 20), ("dense", "feed-forward", 20)]
    assert seconds_by_run(report) == {key: [5 + 2] * 2 for key in expected}
    assert [(row["kind"], row["part"], row["depth"]) for row in report["rows"]] == [
        *(("MoE", "block", 20), ("MoE", "block", 300), ("MoE", "attention", 20), ("MoE", "attention", 300)),
        ("MoE", "feed-forward", None),
        *(("dense", "block", 20), ("dense", "block", 300), ("dense", "attention", 20), ("dense", "attention", 300)),
        ("dense", "feed-forward", None),
    ]
    for row in report["rows"]:
        runs = [r for r in report["runs"] if (r["kind"], r["part"]) == (row["kind"], row["part"])]
        timed = [s for r in runs if row["depth"] in (None, r["depth"]) for s in r["seconds"][5:]]
        assert row["seconds"]["count"] == len(timed) == 4
        assert row["seconds"]["median"] * row["blocks_a_step"] == pytest.approx(float(np.median(timed)))
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["seconds"]["median"] / 1e9)
        assert row["of_copy"] == pytest.approx(row["gb_s"] / report["conditions"]["copy"]["gb_s"])
        assert row["launches"] > 10
    whole, attention, feed_forward = (report["rows"][i] for i in (0, 2, 4))
    assert whole["launches"] == pytest.approx(attention["launches"] + feed_forward["launches"], abs=15)
    assert report["parity"] == {"path": "twins", "checked": 0, "agree": None, "differ": []}
    assert report["model"]["name"] == "small.gguf"
    table = capsys.readouterr().out
    assert "\x1b" not in table
    assert "parity: this device launches no kernels" in table
    assert sum("  twins  " in line for line in table.splitlines()) == 10


@pytest.mark.parametrize("kind", ["MoE", "dense"])
def test_a_chain_is_the_models_layers_by_both_ways(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's way on a CPU, and the traced one that a GPU compiles."""
    monkeypatch.setattr(block, "BEYOND_CACHES", {"cpu": 1, "gpu": 1})
    (rotation,) = (one for one in block.rotate(small()) if one.kind == kind)
    model, token = rotation.subject.model, mx.array([[5]], mx.int32)
    chains = {part: block.Chain(model, part) for part in block.PARTS}

    def cache() -> Any:
        made = model.new_cache()
        synthetic.fill_cache(made, 40)
        return made

    expected = model.hidden_states(token, cache())
    now = cache()
    got = chains["block"](model.embed(token), now)
    assert mx.array_equal(got, expected)
    assert now.offset == 40
    assert mx.array_equal(chains["block"](model.embed(token), now), expected)  # the next step is as deep

    chains["block"]._step = chains["block"]._traced
    traced = chains["block"](model.embed(token), now)
    assert mx.allclose(traced, expected, rtol=1e-4, atol=1e-4)  # of values up to 20
    assert now.offset == 40
    for row, layer in zip(now.rows, model.layers, strict=True):
        assert row is not None
        assert row.shape[1] > 40
        assert layer.self_attn.layer < len(now.rows)

    x = model.embed(token)
    attention = chains["attention"](x, cache())
    assert not mx.allclose(attention, x)
    one_by_one = x
    for layer in model.layers:
        one_by_one = layer.mlp(one_by_one)
    assert mx.array_equal(chains["feed-forward"](x, cache()), one_by_one)


def test_layers_are_copied_until_caches_cannot_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block, "MOST_LAYERS", {"cpu": 100})
    opened = small()
    alone = {one.kind: one for one in rotations_beyond(1, opened, monkeypatch)}
    assert {kind: one.subject.config.num_layers for kind, one in alone.items()} == {"MoE": 5, "dense": 1}
    least = 3 * alone["MoE"].read_bytes("attention", -1) - 1
    for one in rotations_beyond(least, opened, monkeypatch):
        cfg, weights = one.subject.config, one.subject.weights
        assert cfg.first_k_dense == (cfg.num_layers if one.kind == "dense" else 0)
        reads = {part: one.read_bytes(part, -1) for part in block.PARTS}
        assert min(reads.values()) >= least > min(reads.values()) * (1 - 1 / cfg.num_layers)
        assert reads["block"] == reads["attention"] + reads["feed-forward"]
        own, count = one.own_layers, cfg.num_layers
        for name in (name.removeprefix("layers.0.") for name in weights if name.startswith("layers.0.")):
            if ".experts." in name:
                continue  # see below
            of_layers = [weights[f"layers.{i}.{name}"] for i in range(count)]
            assert len({address(weight) for weight in of_layers}) == count
            for i in range(own, count):
                assert mx.array_equal(plane(of_layers[i]), plane(of_layers[i % own]))
    assert list(block.too_small([*alone.values()]))  # `least` is still the large one


def test_large_banks_of_experts_are_shared_by_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    (moe, _) = rotations_beyond(3_000_000, small(), monkeypatch)
    weights, count = moe.subject.weights, moe.subject.config.num_layers
    assert count > 5
    assert weights["layers.5.mlp.experts.up_proj"] is weights["layers.0.mlp.experts.up_proj"]
    assert address(weights["layers.5.mlp.gate"]) != address(weights["layers.0.mlp.gate"])


def test_without_memory_there_are_fewer_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = small()
    tight = type(opened)(**{**vars(opened), "room": 5_000_000})
    rotations = rotations_beyond(1 << 30, tight, monkeypatch)
    assert [one.subject.config.num_layers for one in rotations] < [8, 8]
    assert rotations[-1].subject.room > 2_500_000
    assert [note.split(":")[0] for note in block.too_small(rotations)] == ["MoE layers", "dense layers"]


def rotations_beyond(least: int, opened: subject.Subject, monkeypatch: pytest.MonkeyPatch) -> list[block.Rotation]:
    monkeypatch.setattr(block, "BEYOND_CACHES", {"cpu": least})
    return block.rotate(opened)


@pytest.mark.parametrize("kv_bits", [8, 16])
def test_caches_hold_the_values_that_were_asked_for(kv_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = small(kv_bits)
    for rotation in rotations_beyond(1, opened, monkeypatch):
        assert rotation.subject.model.new_cache().format == opened.model.row_format
        assert rotation.subject.cache_type == ("8-bit" if kv_bits == 8 else "float32")


@pytest.mark.parametrize("room", [1 << 30, 4_000_000])
def test_room_is_what_weights_in_memory_leave(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a model moves its weights into arrays of several: no copy of a layer shares its banks."""
    loaded, gpu, models, make = small(), mx.Device(mx.gpu), [], block.Model
    monkeypatch.setattr(mx, "default_device", lambda: gpu)
    monkeypatch.setattr(glm_mlx.model, "small_experts", lambda *_: None)
    monkeypatch.setattr(block, "BEYOND_CACHES", {"gpu": 3_000_000})
    monkeypatch.setattr(block, "Model", lambda *args: models.append(args) or make(*args))
    weights = dict(loaded.weights)
    opened = replace(loaded, weights=weights, model=make(loaded.config, weights, loaded.model.dtype), room=room)
    before = memory_held()
    rotations = block.rotate(opened)
    more = memory_held() - before
    assert opened.room - rotations[-1].subject.room == pytest.approx(more, rel=0.02)
    assert max(one.subject.config.num_layers for one in rotations) > 5
    assert len(models) == len(rotations)
    assert rotations[0].subject.room >= room // 2
    assert more > 1_000_000


def test_bytes_are_those_of_a_token_but_for_embedding_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = small()
    rotations = rotations_beyond(1, opened, monkeypatch)
    cfg, rows = opened.config, opened.model.row_format
    fixed, per_row = decode_bytes(cfg, opened.weights, rows)
    ends = {name: w for name, w in opened.weights.items() if not name.startswith("layers.")}
    assert (
        sum(one.read_bytes("block", 99) for one in rotations)
        == fixed - decode_bytes(cfg, ends, rows)[0] + 100 * per_row
    )
    assert all(one.read_bytes("feed-forward", 99) == one.read_bytes("feed-forward", 0) for one in rotations)


def test_each_step_waits_for_the_one_before_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[Any, Any]] = []
    depends = mx.depends

    def watched(inputs: list[mx.array], others: list[mx.array]) -> list[mx.array]:
        order.append((inputs[0].item(), others[0].item()))
        made: list[mx.array] = depends(inputs, others)
        return made

    monkeypatch.setattr(mx, "depends", watched)
    run = block.Run("block", "MoE", "twins", 0)
    inputs = [mx.array(float(i)) for i in range(3)]
    block.measure(lambda x, cache: x + 100, None, inputs, run, 4)  # type: ignore[arg-type]
    assert order == [(0, 0), (1, 100), (2, 101), (0, 102), (1, 100)]
    assert len(run.seconds) == 4


@pytest.mark.usefixtures("quick")
def test_where_the_gpu_tells_its_time_figures_are_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_time, "available", lambda: True)
    calls: list[object] = []

    def busy(work: Any) -> float:
        calls.append(work())
        return 4e-3 * len(calls)

    monkeypatch.setattr(gpu_time, "busy_seconds", busy)
    path = tmp_path / "out.json"
    assert block.main(["--depths", "20", "--count", "1", "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    (row,) = (r for r in report["rows"] if (r["kind"], r["part"]) == ("MoE", "block"))
    assert row["gpu_seconds"]["count"] == 3
    assert row["gpu_seconds"]["median"] == pytest.approx(2e-3 / row["blocks_a_step"])  # the second of 1, 2, 3 ms
    assert row["gb_s"] == pytest.approx(row["bytes"] / row["gpu_seconds"]["median"] / 1e9)


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, calls = block.measure, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(*args)

    monkeypatch.setattr(block, "measure", interrupted)
    path = tmp_path / "out.json"
    assert block.main([*SHORT, "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert seconds_by_run(report) == {("MoE", "block", 20): [7], ("MoE", "attention", 20): [7]}
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_depth_that_runs_out_of_memory_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill = synthetic.fill_cache

    def full(cache: Any, count: int) -> None:
        if count > 20:
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        fill(cache, count)

    monkeypatch.setattr(synthetic, "fill_cache", full)
    path = tmp_path / "out.json"
    assert block.main([*SHORT, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert {run["depth"] for run in report["runs"]} == {20}
    assert "not measured: depth 300 and more: out of memory" in report["notes"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "0,4090"], "depth 4,090 and more: the model's context ends at 4,096; give less"),
        (["--model", "missing.gguf"], "no such file: missing.gguf"),
        (["--paths", "kernels"], "this device launches no kernels; leave --paths out"),
        (["--json", "/"], "cannot write /; name another file with --json"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(lambda: block.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
