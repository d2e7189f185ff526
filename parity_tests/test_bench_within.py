"""The search for launch shapes within the model, where no GPU is: its times are made up, or those of a made-up GPU."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench import ab, conditions, gpu_time, script, search, tune
from bench.sides import Side
from bench.within import TOKEN, TOKENS, Key, Within
from glm_mlx.compositions import read_small
from glm_mlx.errors import InputError
from glm_mlx.make_tiny import TinySpec, make_tiny
from glm_mlx.model import Model
from kernels import launcher, shapes
from kernels.cases import Case
from parity_tests.msl import executing

CHIP = "NVIDIA Test"
DOWN = ("experts_down", "Q4_0 64x64 + Q4_0 64x64")
Times = Callable[[Key, Mapping[str, int]], float]


@pytest.fixture(autouse=True)
def _own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shapes, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(shapes, "device", lambda: (CHIP, "NVIDIA sm_0"))
    monkeypatch.setattr(search, "VALUES", {"ROWS": (1, 2, 4), "SIMDGROUPS": (1, 2)})
    forget()
    yield
    forget()


def forget() -> None:
    shapes._tables.cache_clear()
    shapes._from_tables.cache_clear()
    search.clear_launches()


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    """Of a dense layer and a MoE; its kernels are run by the executor."""
    file = make_tiny(tmp_path / "tiny.gguf", TinySpec(layers=2))
    with executing():
        yield Model(*read_small(file), mx.float32)


def timed_as(times: Times, monkeypatch: pytest.MonkeyPatch) -> list[Mapping[Key, Mapping[str, int]]]:
    """A launch takes so long by its shape, to 0.1 %; a token as long as all together. The list gets what is timed."""
    timed: list[Mapping[Key, Mapping[str, int]]] = []
    noise = np.random.default_rng(0)

    def seconds(self: Within, shape: Mapping[Key, Mapping[str, int]]) -> dict[Key, float]:
        timed.append(dict(shape))
        found = {key: times(key, values) * (1 + 1e-3 * noise.normal()) for key, values in shape.items()}
        return {**found, TOKEN: sum(found.values())}

    monkeypatch.setattr(Within, "_seconds", seconds)
    return timed


def of(found: Within, key: Key) -> search.Found:
    return found.parts[key].found


def test_each_kernel_takes_what_is_the_fastest_within_a_token(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once: ROWS 1 is the best for one, 4 for the others, and SIMDGROUPS only after that."""
    monkeypatch.setattr(search, "VALUES", {"ROWS": (1, 4), "SIMDGROUPS": (1,)})

    def times(key: Key, values: Mapping[str, int]) -> float:
        rows, simdgroups = values.get("ROWS", 0), values.get("SIMDGROUPS", 0)
        if key == DOWN:
            return 2.0 + 0.1 * rows
        return 2.0 - 0.1 * rows - (0.1 * (simdgroups == 1) if rows == 4 else -0.1 * (simdgroups == 1))

    timed_as(times, monkeypatch)
    found = Within(model, 128, launcher.OPS, 0.01)
    starts = {key: dict(values) for key, values in found.best.items()}
    whole = found.run(6)
    assert whole is not None
    assert whole.verdict == "faster"
    assert {key[0] for key in found.best} == {"qmv", "experts_gate_up", "experts_down", "mla_decode"}
    assert found.best[DOWN] == {**starts[DOWN], "ROWS": 1}
    for key, values in found.best.items():
        if key[0] in ("qmv", "experts_gate_up"):
            assert values == {**starts[key], "ROWS": 4, "SIMDGROUPS": 1}, key
            assert of(found, key).is_candidate
        elif key[0] == "mla_decode":
            assert values == starts[key], "none of its parameters was to be tried"
            assert of(found, key).effect is None


def test_a_shape_that_was_faster_by_luck_goes_back_and_the_rest_is_measured_without_it(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = list[Mapping[Key, Mapping[str, int]]]()

    def times(key: Key, values: Mapping[str, int]) -> float:
        if key == DOWN:
            return 1.0 + 0.1 * values["ROWS"]
        return 1.0 - 0.1 * (values["ROWS"] == 1 and len(timed) < 5)

    timed = timed_as(times, monkeypatch)
    found = Within(model, 128, ["experts_gate_up", "experts_down"], 0.01)
    (lucky,) = found.best.keys() - {DOWN}
    whole = found.run(6)
    assert whole is not None
    assert found.best[DOWN]["ROWS"] == 1
    assert of(found, lucky).best == of(found, lucky).start
    assert not of(found, lucky).is_candidate
    assert timed[-1][lucky] == timed[-2][lucky], "the last pair is without it"


def test_the_first_sample_of_a_process_counts_for_nothing(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 its launches were 0.8 µs shorter than those of all later ones."""
    timed = timed_as(lambda key, values: (0.7 if len(timed) == 1 else 1.0) - 0.1 * (values["ROWS"] == 1), monkeypatch)
    found = Within(model, 128, ["experts_down"], 0.01)
    found.run(6)
    assert found.best[DOWN]["ROWS"] == 1


def test_what_was_found_is_measured_in_turns_with_what_was_in_use(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = timed_as(lambda key, values: 1.0 + 0.1 * values["ROWS"], monkeypatch)
    found = Within(model, 128, ["experts_down"], 0.01)
    start = found.best[DOWN]["ROWS"]
    found.run(7)
    turns = [shape[DOWN]["ROWS"] for shape in timed[-14:]]
    assert turns == [start, 1, 1, start] * 3 + [start, 1]


def test_a_launch_without_a_time_is_one_line(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_time, "record", lambda work: gpu_time.Timeline([gpu_time.Kernel("copy", 0.0, 1.0)], 0))
    monkeypatch.setattr(Within, "_decode", lambda *_: None)
    with pytest.raises(InputError, match=r"tells no time of experts_down: Q4_0 64x64 .*; leave its op out with --op"):
        Within(model, 128, ["experts_down"], 0.01).run(6)


def test_nothing_better_is_no_verdict(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_as(lambda key, values: 1.0, monkeypatch)
    found = Within(model, 128, launcher.OPS, 0.01)
    assert found.run(6) is None
    assert all(part.best == part.start for part in found.found)


def test_only_the_ops_that_are_asked_for_change_and_others_keep_their_tables(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = next(key for key in Within(model, 128, ["qmv"], 0.01).parts if key[1].startswith("Q4_0 "))
    shapes.write(shapes.user_file(), {CHIP: {head[0]: {head[1]: {"ROWS": 2}}}})
    forget()
    found = Within(model, 128, ["experts_down"], 0.01)
    assert list(found.parts) == [DOWN]
    with found._using({}):
        assert shapes.launch_shape(*head, 1, ROWS=7)[0] == 2


def test_what_is_wrong_or_refused_is_never_timed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "VALUES", {"ROWS": (1, 2, 5000)})
    timed = timed_as(lambda key, values: 1.0 / values.get("ROWS", 1), monkeypatch)
    run = Case.run

    def faulty(self: Case) -> list[mx.array]:
        y = run(self)
        rows = (shapes._tried or {}).get(DOWN, {}).get("ROWS")
        if self.op == "experts_down" and rows == 2 and launcher._recorded is None and not launcher._avoided:
            return [1.01 * y[0]]
        return y

    monkeypatch.setattr(Case, "run", faulty)
    found = Within(model, 128, ["experts_down"], 0.01)
    found.run(6)
    part = of(found, DOWN)
    assert [re.search(r"ROWS (\d+)", name)[1] for name in part.wrong] == ["2"]  # type: ignore[index]
    assert "differ from the twin's" in next(iter(part.wrong.values()))
    assert [re.search(r"ROWS (\d+)", name)[1] for name in part.refused] == ["5000"]  # type: ignore[index]
    assert {shape[DOWN]["ROWS"] for shape in timed} <= {1, 4}


def test_the_gpus_time_goes_to_the_launches_that_took_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch takes a second by the number of its op; what else the GPU does belongs to the token alone."""
    of_op = {"embed": 1.0, "qmv": 2.0, "experts_gate_up": 3.0, "experts_down": 4.0, "mla_decode": 5.0, "mla_merge": 6.0}
    found = Within(model, 128, launcher.OPS, 0.01)

    def record(work: Callable[[], object]) -> gpu_time.Timeline:
        with launcher.recording() as seen:
            model.step(mx.zeros((1, 1), mx.int32), mx.array([128], mx.int32), found.rows)
        names = [launch.name for launch, _ in seen]
        kernels = [gpu_time.Kernel(f"custom_kernel_{n}<float, 4>", 0.0, of_op[n[:-13]]) for n in names]
        return gpu_time.Timeline([*kernels, gpu_time.Kernel("copy", 0.0, 100.0)] * TOKENS, 0)

    monkeypatch.setattr(gpu_time, "record", record)
    monkeypatch.setattr(Within, "_decode", lambda *_: None)
    seconds = found._seconds(found.best)
    assert seconds[DOWN] == pytest.approx(4.0)
    assert sum(s for key, s in seconds.items() if key[0] == "mla_decode") == pytest.approx(2 * 11.0), "of two layers"
    gate_up = next(key for key in seconds if key[0] == "experts_gate_up")
    assert seconds[gate_up] == pytest.approx(3.0)
    others = sum(s for key, s in seconds.items() if key != TOKEN)
    assert seconds[TOKEN] == pytest.approx(others + 100.0 + 1.0), "the embedding has no shape that a table may set"


# --- bench/tune.py --within


@pytest.fixture
def clock(model: Model, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How many times as long decode.py takes with what was found, and whether its kernels agree with their twins."""
    factor = {"decode": 1.0, "agree": 1.0}
    noise = np.random.default_rng(1)
    monkeypatch.setattr(conditions, "COPIES", (1, 2))
    monkeypatch.setattr(conditions, "available_memory", lambda: 1 << 26)
    monkeypatch.setattr(gpu_time, "available", lambda: True)
    monkeypatch.setattr(tune, "conditions", lambda: {"chip": CHIP})
    monkeypatch.setattr(tune, "describe", lambda found: [])
    monkeypatch.setattr(tune, "open_subject", lambda args: SimpleNamespace(model=model, layers=args.layers))
    monkeypatch.setattr(tune, "usable_depths", lambda *_: None)
    timed_as(lambda key, values: 1.0 + 0.1 * values["ROWS"] if key == DOWN else 1.0, monkeypatch)

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        table = shapes.read(Path(side.environment["XDG_CACHE_HOME"]) / "glm-mlx" / "shapes.json")
        seconds = (factor["decode"] if table.get(CHIP) else 1.0) * (1 + 1e-4 * noise.normal())
        runs = [{"depth": 512, "path": "kernels", "seconds": [seconds], "tokens": [], "options": options}]
        found = {"chip": CHIP, "back_end": "cuda"}
        parity = {"agree": not table.get(CHIP) or bool(factor["agree"])}
        return {"script": measure, "warm_up_tokens": 0, "conditions": found, "runs": runs, "parity": parity}

    monkeypatch.setattr(ab, "run", run)
    return factor


def tuned(tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "tune.json"
    own = ["--within", "--ship", "--rest", "0", "--pairs", "6", "--json", str(path), *options]
    assert tune.main([*own, "--", "--layers", "2"]) == 0
    made: dict[str, Any] = json.loads(path.read_text())
    return made["within"]


def test_what_wins_within_the_model_is_stored_unless_the_clock_calls_it_slower(
    clock: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for clock["decode"], stored in ((1.05, False), (1.0, True)):
        made = tuned(tmp_path)
        assert made["token"]["verdict"] == "faster"
        assert [gate["verdict"] for gate in made["gates"]] == ["no difference" if stored else "slower"]
        assert made["gates"][0]["options"][-2:] == ["--layers", "2"]
        assert made["stored"] is shapes.user_file().exists() is stored
    (entry,) = shapes.read(shapes.SHIPPED)[CHIP]["experts_down"].values()
    assert entry["ROWS"] == 1
    out = capsys.readouterr().out
    assert "a token, by the GPU's time: -" in out
    assert "by the clock: +5" in out
    assert "of the time; it is slower" in out
    assert "of the time; no objection" in out


def test_a_wrong_result_is_an_objection(
    clock: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock["agree"] = 0.0
    assert tuned(tmp_path)["stored"] is False
    assert "its kernels compute something else than their twins" in capsys.readouterr().out


def test_what_makes_no_difference_to_a_token_is_not_stored(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = Within._seconds
    monkeypatch.setattr(Within, "_seconds", lambda self, shape: {**seconds(self, shape), TOKEN: 1.0})
    made = tuned(tmp_path)
    assert [found["effect"]["verdict"] for found in made["searches"] if found["effect"]] == ["faster"]
    assert (made["token"]["verdict"], made["gates"], made["stored"]) == ("no difference", [], False)


def test_it_searches_the_ops_that_were_asked_for(
    clock: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {found["case"].partition(":")[0] for found in tuned(tmp_path, "--op", "router")["searches"]} == {"qmv"}
    path = str(tmp_path / "embed.json")
    assert tune.main(["--within", "--op", "embed", "--json", path]) == 2
    assert "no launch of a token has a shape that a table may set, of --op embed" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--nonsense"], ["--depths", "4k"], ["--json", "x"]])
def test_what_names_no_model_is_refused_before_any_work(
    options: list[str], clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "conditions", lambda: pytest.fail("work"))
    with pytest.raises(SystemExit, match="2"):
        tune.main(["--within", "--", *options])


def test_an_interrupted_search_within_the_model_shows_what_it_had(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Within, "_verdict", stop)
    path = tmp_path / "tune.json"
    assert tune.main(["--within", "--json", str(path)]) == 130
    made = json.loads(path.read_text())
    assert made["stopped"] == "interrupted"
    (found,) = [one for one in made["within"]["searches"] if one["best"] != one["start"]]
    assert found["case"] == ": ".join(DOWN)
    assert "experts_down: Q4_0 64x64" in capsys.readouterr().out
    assert not shapes.user_file().exists()


def test_without_the_gpus_own_time_there_is_no_search_within_the_model(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_time, "available", lambda: False)
    assert script.run(lambda: tune.main(["--within", "--json", str(tmp_path / "tune.json")])) == 2
    assert "--within wants an NVIDIA GPU, and PyTorch" in capsys.readouterr().err
