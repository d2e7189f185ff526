"""bench/compare.py: a process for each round, fair turns, true ratios, peers that are missing or fail, and weights
converted without a loss."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench import (
    compare,
    contest,
    contestant,
    frame,
    llama_bench,
    mlx_lm_check,
    mlx_lm_peer,
    plot,
    script,
    subject,
    synthetic,
)
from bench.contest import ALONE, OURS, OwnProcess, Turn, UnavailableError
from bench.contestant import Ours
from bench.decode import WARM_UP
from bench.mlx_lm_peer import MlxLm, convert
from bench.subject import Subject
from glm_mlx.cache import LatentCache, row_format
from glm_mlx.config import Config
from glm_mlx.engine import Engine
from glm_mlx.errors import InputError
from glm_mlx.model import Model
from glm_mlx.small import SMALL_MODEL
from kernels.planes import GROUP, QUANT_TYPES, QuantizedTensor, dequantize_ops, group_scales

ROOT = Path(__file__).parents[1]
COPY = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}
SMALL = Namespace(model=None, synthetic=None, layers=None, mix="q4_0", kv_bits=16)
AFFINE = [name for name in QUANT_TYPES if name not in ("Q6_K", "IQ4_NL")]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without seconds of copying."""
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: {**COPY})


@pytest.fixture(scope="module")
def small() -> Subject:
    return subject.open_subject(SMALL)


class Fake:
    """A contestant that takes a millisecond for everything, and remembers its rounds."""

    def __init__(self, name: str = "mlx-lm", fails: Callable[[Turn], BaseException | None] = lambda turn: None):
        self.name, self.fails = name, fails
        self.details: dict[str, Any] = {"version": "0"}
        self.notes = [f"a note by {name}"]
        self.rounds: list[list[tuple[int, int]]] = []

    def take(self, blank: Sequence[Turn], count: int) -> Iterator[Turn]:
        self.rounds.append([(turn.number, turn.depth) for turn in blank])
        for turn in blank:
            if error := self.fails(turn):
                raise error
            turn.time_to_first_token = 0.001 if turn.fill == "prefill" else None
            turn.warm_up, turn.seconds = [0.001] * WARM_UP, [0.001] * count
            yield turn


def enter(monkeypatch: pytest.MonkeyPatch, *peers: Any, ours: Any = None) -> None:
    """These are the only contestants, of a model that nobody loads. An exception instead of a peer is raised when it is
    opened."""

    def opener(peer: Any) -> compare.Peer:
        def opened(args: Namespace, found: compare.Found) -> Any:
            if isinstance(peer, Exception):
                raise peer
            return peer

        return opened

    def check(args: Namespace) -> dict[str, Any]:
        return FOUND | {"depths": args.depths}

    monkeypatch.setattr(compare, "check", check)
    monkeypatch.setattr(compare, "ours", lambda args, found: ours or Fake(OURS))
    monkeypatch.setattr(compare, "PEERS", dict(zip(("mlx-lm", "llama.cpp"), map(opener, peers), strict=False)))


FOUND = {
    "model": {"name": "small.gguf", "mix": "6 Q4_0", "layers": 6, "activations": "float32", "cache": "float32"},
    "described": "a small model",
    "notes": [],
    "details": {},
    "parity": {"path": "twins", "checked": 0, "agree": None, "differ": []},
    "peers": {},
}


def measured(tmp_path: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    path = tmp_path / "out.json"
    assert compare.main([*arguments, "--json", str(path)]) == code
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def run_script(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "bench/compare.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_help_says_what_the_script_does() -> None:
    done = run_script("-h")
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("How fast this project is against", "examples:", "--llama-bench PATH", "--plot FILE", "--json FILE"):
        assert words in done.stdout


def test_started_by_a_user_without_any_peer(tmp_path: Path) -> None:
    """In a pipe: plain tables, whole; a row for who is missing says how to get it."""
    path = tmp_path / "out.json"
    done = run_script(
        "--depths", "0,20", "--count", "2", "--rounds", "1", "--peers", "llama.cpp", "--json", str(path), PATH="/none"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    table = done.stdout[done.stdout.index("\ncompare") : done.stdout.index("\nnot measured")].splitlines()
    assert [line.split()[:3] for line in table if line.strip()[:1].isdigit()] == [
        ["0", "glm-mlx", "prompt"],
        ["20", "glm-mlx", "prompt"],
    ]
    assert "all    llama.cpp  no llama-bench on the PATH: brew install llama.cpp" in done.stdout
    report = json.loads(path.read_text())
    assert report["script"] == "compare"
    assert [(t["number"], t["depth"], len(t["warm_up"]), len(t["seconds"])) for t in report["turns"]] == [
        (1, 0, 5, 2),
        (1, 20, 5, 2),
    ]
    assert report["rows"][1]["decode_seconds"]["count"] == 2
    assert report["rows"][1]["cold_time_to_first_token"] > 0
    assert report["conditions"]["copy"]["gb_s"] > 0
    assert len(report["model"]["header_sha256"]) == 64
    assert report["contestants"][OURS]["bytes_a_token"]["weights"] == 2_966_480


@pytest.mark.usefixtures("quick")
def test_peers_run_alone_first_and_then_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who goes first alternates. What was measured alone is in no median."""
    enter(monkeypatch, Fake(), Fake("llama.cpp"))
    report = measured(tmp_path, "--depths", "0,30", "--count", "3", "--rounds", "2")
    forth, back = [OURS, "mlx-lm", "llama.cpp"], ["llama.cpp", "mlx-lm", OURS]
    assert [(t["number"], t["by"], t["depth"]) for t in report["turns"]] == [
        *[(ALONE, name, depth) for name in back[:2] for depth in (0, 30)],
        *[(1, name, depth) for name in forth for depth in (0, 30)],
        *[(2, name, depth) for name in back for depth in (0, 30)],
    ]
    assert [(row["depth"], row["by"]) for row in report["rows"]] == [(d, name) for d in (0, 30) for name in forth]
    for row in report["rows"]:
        assert row["decode_seconds"]["count"] == 6
        assert row["seconds_by_round"] == [0.001, 0.001]
        assert row["seconds_alone"] == (None if row["by"] == OURS else 0.001)
        assert len(row["decode_ratios"]) == (0 if row["by"] == OURS else 2)
        assert len(row["prefill_ratios"]) == (2 if row["by"] != OURS and row["depth"] == 30 else 0)
    assert report["contestants"]["mlx-lm"] == {"version": "0"}
    out = capsys.readouterr().out
    assert "a note by llama.cpp" in out
    assert "not firm: mlx-lm at depth 30: 2 rounds" in out


CHILD = """
import json, os, sys, time
name, = (word for word in sys.argv[1:2])
with open({log!r}, "a") as log:
    print(json.dumps(["begins", os.getpid(), sys.argv[1:]]), file=log)
turns = sys.argv[sys.argv.index("--turns") + 1].split(",") if "--turns" in sys.argv else []
def say(**line): print(json.dumps(line), flush=True)
{body}
with open({log!r}, "a") as log:
    print(json.dumps(["ends", os.getpid(), sys.argv[1:]]), file=log)
"""
TAKES = """
for turn in turns:
    depth, fill = turn.split(":")
    say(number=1, depth=int(depth), by=name, fill=fill, seconds=[0.5], warm_up=[1.0])
"""


@pytest.fixture
def spawned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Make this text the process of a contestant, or read what such processes wrote down."""

    def spawn(body: str | None = None) -> list[Any]:
        log = tmp_path / "log"
        if body is not None:
            (tmp_path / "child.py").write_text(CHILD.format(log=str(log), body=body))
            monkeypatch.setattr(contest, "CHILD", tmp_path / "child.py")
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    return spawn


@pytest.mark.usefixtures("quick")
def test_each_round_is_a_process_of_its_own_and_none_runs_beside_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spawned: Callable[..., list[Any]]
) -> None:
    spawned(TAKES)
    model = ["--mix", "q4_0"]
    enter(monkeypatch, OwnProcess("mlx-lm", model, {}, []), ours=OwnProcess(OURS, model, {}, []))
    report = measured(tmp_path, "--depths", "0,30", "--count", "7", "--rounds", "2")
    log = spawned()
    assert [word for word, *_ in log] == ["begins", "ends"] * 6
    assert len({pid for _, pid, _ in log}) == 6
    begun = [words for word, _, words in log if word == "begins"]
    assert [words[0] for words in begun] == ["mlx-lm", "mlx-lm", OURS, "mlx-lm", "mlx-lm", OURS]
    turns = [*model, "--turns", "0:prefill,30:prefill", "--count"]
    assert [words[1:] for words in begun] == [[*turns, count] for count in "177777"]  # the first counts for nothing
    assert [(t["number"], t["by"]) for t in report["turns"][::2]] == [
        *[(ALONE, "mlx-lm"), (1, OURS), (1, "mlx-lm"), (2, "mlx-lm"), (2, OURS)]
    ]


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("say(problem='input', why='no such file; check')", InputError, "no such file; check"),
        ("say(problem='unavailable', why='not installed')", UnavailableError, "not installed"),
        ("say(problem='memory', why='no room')", MemoryError, "no room"),
        ("say(problem='fault', why='KeyError: 1')", RuntimeError, "KeyError: 1"),
        ("print('last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)", UnavailableError, "-11: last w"),
        ("sys.exit(3)", UnavailableError, "its process ended with 3: nothing on its standard error"),
        ("", UnavailableError, "its process ended before depth 30"),
    ],
)
def test_what_ends_a_process_is_raised_at_its_depth(
    spawned: Callable[..., list[Any]], body: str, error: type[Exception], message: str
) -> None:
    spawned(TAKES.replace("in turns", "in turns[:1]") + body)
    taken = OwnProcess("mlx-lm", [], {}, []).take([Turn(1, d, "mlx-lm", "prefill") for d in (0, 30)], 1)
    assert next(taken).depth == 0
    with pytest.raises(error, match=message):
        next(taken)


def test_a_process_does_not_outlive_its_round(spawned: Callable[..., list[Any]]) -> None:
    spawned("say(a=1)\ntime.sleep(60)")

    def interrupted() -> None:
        with contest.child("mlx-lm") as lines:
            assert next(lines) == {"a": 1}
            raise KeyboardInterrupt

    before = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.perf_counter() - before < 30
    ((_, pid, _),) = spawned()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_what_a_peer_prints_is_no_line_of_ours(tmp_path: Path) -> None:
    """mlx-lm warns on standard output of models that hardly fit."""
    text = "import sys; from bench import contestant\nwith contestant._own_output() as out:\n"
    text += "    print('[WARNING]'); sys.stdout.flush(); contestant._say(out, {'a': 1})"
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ('{"a": 1}\n', "[WARNING]\n")


def test_a_generation_of_the_same_shape_warms_up() -> None:
    asked: list[tuple[int, str, int]] = []

    class Slow:
        def measure(self, turn: Turn, count: int) -> None:
            asked.append((turn.depth, turn.fill, count))
            turn.seconds.append(3.0 - len(asked))
            turn.time_to_first_token = 10.0 - len(asked)

    turn = contestant.warmed_up(Slow(), Turn(1, 40, "mlx-lm", "random"), 7)
    assert asked == [(40, "random", 7)] * 2
    assert (turn.seconds, turn.cold_time_to_first_token, turn.time_to_first_token) == ([1.0], 9.0, 8.0)


@pytest.mark.parametrize(
    ("error", "kind", "why"),
    [
        (InputError("a; b"), "input", "a; b"),
        (UnavailableError("not installed"), "unavailable", "not installed"),
        (RuntimeError("[malloc] Unable to allocate 5 bytes"), "memory", "[malloc] Unable to allocate 5 bytes"),
        (KeyError("n_group"), "fault", "KeyError: 'n_group'\n"),
    ],
)
def test_a_process_says_what_ended_it(error: Exception, kind: str, why: str) -> None:
    found = contestant.problem(error)
    assert found["problem"] == kind
    assert found["why"].startswith(why)
    assert kind in contest.PROBLEMS


def test_what_would_be_compared_is_checked_before(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lm_peer.importlib.util, "find_spec", lambda name: None)
    found = contestant.check(Namespace(**vars(SMALL), depths=None, count=3, peers=["mlx-lm"]))
    assert found["model"] == small.as_dict()
    assert found["depths"] == [0, 512]
    assert found["notes"] == ["not measured: depth 4,096 and more: the model's context ends at 4,096"]
    assert found["peers"] == {"mlx-lm": {"problem": "unavailable", "why": "not installed: pip install mlx-lm"}}
    with pytest.raises(UnavailableError, match="pip install mlx-lm"):
        compare.PEERS["mlx-lm"](SMALL, found)
    with pytest.raises(InputError, match="depth 4,090 and more"):
        contestant.check(Namespace(**vars(SMALL), depths=[4090], count=3, peers=[]))


def turns(by: str, seconds: Sequence[Sequence[float]], first: float | None = None, **more: Any) -> list[Turn]:
    """A turn for each round at depth 512."""
    return [
        Turn(number, 512, by, "prefill", None, first, [1.0] * 5, list(samples), **more)
        for number, samples in enumerate(seconds, start=1)
    ]


def test_a_ratio_is_of_one_round_and_its_median_of_all() -> None:
    """The machine slows down threefold in round 2: speeds say nothing then, ratios do."""
    ours = turns(OURS, [[1, 2, 3], [3, 6, 9], [1, 2, 3]], first=2.0)
    theirs = turns("mlx-lm", [[4, 8, 4], [12, 12, 24], [10, 10, 10]], first=6.0)
    rows = compare.rows_of([*theirs, *ours])
    assert [row["by"] for row in rows] == [OURS, "mlx-lm"]
    assert rows[1]["decode_ratios"] == [2.0, 2.0, 5.0]
    assert rows[1]["prefill_ratios"] == [3.0, 3.0, 3.0]
    assert rows[1]["prefill_tok_s"]["median"] == pytest.approx(512 / 6)
    assert rows[0]["decode_seconds"]["median"] == 3
    assert rows[0]["decode_ratios"] == []


def test_a_mean_is_compared_with_a_mean() -> None:
    ours = turns(OURS, [[1, 1, 7]])
    assert compare.rows_of([*ours, *turns("llama.cpp", [[6]], mean_of=3)])[1]["decode_ratios"] == [2.0]
    assert compare.rows_of([*ours, *turns("mlx-lm", [[6]])])[1]["decode_ratios"] == [6.0]


def test_the_ratio_to_quote_is_to_the_fastest_run_of_the_peer() -> None:
    """Be it alone or in a round; of ours it is the median."""
    ours = turns(OURS, [[1], [2], [6]], first=2.0)
    theirs = turns("mlx-lm", [[8], [12], [30]], first=9.0)
    row = compare.rows_of([*ours, *theirs])[1]
    assert (row["decode_ratio_to_fastest"], row["decode_ratios"]) == (4.0, [8.0, 6.0, 5.0])
    assert row["prefill_ratio_to_fastest"] == 4.5
    alone = Turn(ALONE, 512, "mlx-lm", "prefill", None, 5.0, [1.0], [6, 6, 7])
    row = compare.rows_of([alone, *ours, *theirs])[1]
    assert (row["decode_ratio_to_fastest"], row["prefill_ratio_to_fastest"]) == (3.0, 2.5)
    assert (row["seconds_alone"], row["against_alone"]) == (6, 1.0)
    assert row["decode_seconds"]["count"] == 3


@pytest.mark.parametrize(
    ("rounds", "alone", "why"),
    [
        ([10, 10, 10], 10, []),
        ([10, 10.4, 10.6], 10, []),
        ([10, 10.6, 10.7], 10, ["6% slower than alone"]),
        ([5, 6, 7], 10, []),
        ([10, 10], 10, ["2 rounds"]),
        ([10, 10, 10], None, ["no run alone"]),
        ([20], 10, ["1 round", "100% slower than alone"]),
    ],
)
def test_few_rounds_or_a_peer_that_was_slowed_down_are_not_firm(
    rounds: list[float], alone: float | None, why: list[str]
) -> None:
    ours, theirs = turns(OURS, [[1]] * len(rounds)), turns("mlx-lm", [[s] for s in rounds])
    lone = [Turn(ALONE, 512, "mlx-lm", "prefill", seconds=[alone])] if alone else []
    rows = compare.rows_of([*lone, *ours, *theirs])
    assert [row["not_firm"] for row in rows] == [[], why]


def test_rounds_that_one_did_not_take_are_in_no_ratio() -> None:
    ours, theirs = turns(OURS, [[1], [1], [2]]), turns("mlx-lm", [[4], [4], [4]])
    assert compare.rows_of([*ours[1:], *theirs[:1], *theirs[2:]])[1]["decode_ratios"] == [2.0]


@pytest.mark.usefixtures("quick")
def test_a_peer_that_fails_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Fake(fails=lambda turn: ValueError("bad\nworse") if turn.depth == 20 and turn.number > 1 else None)
    full = Fake("llama.cpp", lambda turn: RuntimeError("[malloc] Unable to allocate") if turn.depth == 30 else None)
    enter(monkeypatch, broken, full)
    report = measured(tmp_path, "--depths", "0,20,30", "--count", "1", "--rounds", "3")
    assert report["problems"] == [
        {"by": "llama.cpp", "depth": 30, "why": "out of memory: [malloc] Unable to allocate"},
        {"by": "mlx-lm", "depth": 20, "why": "failed: ValueError: bad"},
    ]
    assert [(row["depth"], row["by"]) for row in report["rows"]] == [
        *[(0, name) for name in (OURS, "mlx-lm", "llama.cpp")],
        *[(20, name) for name in (OURS, "mlx-lm", "llama.cpp")],
        *[(30, name) for name in (OURS, "mlx-lm")],
    ]
    assert broken.rounds == [[(n, 0), (n, 20), (n, 30)] for n in (0, 0, 1, 2)] + [[(3, 0)]]
    assert full.rounds == [[(0, 0), (0, 20), (0, 30)]] * 2 + [[(n, 0), (n, 20)] for n in (1, 2, 3)]
    out = capsys.readouterr().out
    assert "from 30  llama.cpp  out of memory: [malloc] Unable to allocate" in out
    assert "from 20  mlx-lm     failed: ValueError: bad" in out


@pytest.mark.usefixtures("quick")
def test_peers_that_cannot_be_opened_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, UnavailableError("not installed: pip install it"), KeyError("n_group"))
    report = measured(tmp_path, "--depths", "0", "--count", "1", "--rounds", "1")
    assert report["problems"] == [
        {"by": "mlx-lm", "depth": None, "why": "not installed: pip install it"},
        {"by": "llama.cpp", "depth": None, "why": "failed: KeyError: 'n_group'"},
    ]
    assert [row["by"] for row in report["rows"]] == [OURS]


@pytest.mark.usefixtures("quick")
def test_a_fault_of_ours_is_not_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, Fake(), ours=Fake(OURS, lambda turn: ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        measured(tmp_path, "--depths", "0", "--count", "1", "--rounds", "1")


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(monkeypatch, Fake(fails=lambda turn: KeyboardInterrupt() if turn.number == 3 else None))
    report = measured(tmp_path, "--depths", "0", "--count", "2", "--rounds", "9", code=130)
    assert report["interrupted"] is True
    assert [(row["by"], row["decode_seconds"]["count"]) for row in report["rows"]] == [(OURS, 6), ("mlx-lm", 4)]
    assert "interrupted: this is what was measured until then" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--llama-bench", "/no/llama-bench"], "no such program: /no/llama-bench; give the path of llama-bench"),
        (["--plot", "speed.gif"], "cannot draw speed.gif; name a file that ends in .png or .svg"),
        (["--plot", "/no/folder/speed.png"], "cannot write /no/folder/speed.png: there is no such folder"),
        (["--depths", "0,4090"], "depth 4,090 and more: the model's context ends at 4,096; give less"),
        (["--model", "missing.gguf"], "no such file: missing.gguf"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(lambda: compare.main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_everybody_reads_the_same_prompt(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that our engine is given, from `bench/decode.py`, is the one that peers take."""
    prompts: list[list[int]] = []
    generate = Engine.generate

    def watched(engine: Engine, prompt: Sequence[int], *rest: Any) -> Any:
        prompts.append(list(prompt))
        return generate(engine, prompt, *rest)

    monkeypatch.setattr(Engine, "generate", watched)
    ours = Ours(small)
    for depth in (0, 7):
        turn = Turn(1, depth, OURS, "prefill")
        ours.measure(turn, 2)
        assert (len(turn.warm_up), len(turn.seconds)) == (5, 2)
        assert turn.prefill_tok_s == (None if depth < 2 else pytest.approx(7 / (turn.time_to_first_token or 0)))
    assert prompts == [contest.prompt_tokens(depth, small.config.vocab_size) for depth in (0, 7)]
    assert [len(prompt) for prompt in prompts] == [1, 7]


# mlx-lm


def random_weight(kind: str) -> QuantizedTensor:
    weight = synthetic.random_weight(kind, (3, 8, 512), 0.02, mx.random.key(0))
    assert isinstance(weight, QuantizedTensor)
    return weight


def values(held: mlx_lm_peer.Held) -> np.ndarray:
    """As MLX takes them, but in float64: the formula of its affine quantisation."""
    assert held.scales is not None
    assert held.biases is not None
    ones, zeros = mx.ones(held.scales.shape), mx.zeros(held.scales.shape)
    quants = mx.dequantize(held.weight, ones, zeros, group_size=GROUP, bits=held.bits)
    by_group = np.asarray(quants, np.float64).reshape(*held.scales.shape, GROUP)
    scales, biases = (np.asarray(a.astype(mx.float32), np.float64)[..., None] for a in (held.scales, held.biases))
    return (by_group * scales + biases).reshape(quants.shape)


def error(kind: str, dtype: mx.Dtype) -> float:
    """Largest difference of a converted weight, as a share of its largest value."""
    weight = random_weight(kind)
    exact = np.asarray(dequantize_ops(weight), np.float64)
    return float(np.abs(values(convert(weight, dtype)) - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("kind", AFFINE)
def test_mlx_holds_the_values_of_the_file(kind: str) -> None:
    """Exactly in float32 (less one rounding of our own formula), in float16 too where the file's scales are float16."""
    weight = random_weight(kind)
    held = convert(weight, mx.float32)
    assert held.weight is weight.quants  # shared
    assert held.bits == weight.type.bits
    assert held.is_exact
    assert error(kind, mx.float32) < 1e-7
    assert convert(weight, mx.float16).is_exact is not weight.type.is_super
    assert error(kind, mx.float16) < (1e-3 if weight.type.is_super else 1e-7)
    rounded = convert(weight, mx.bfloat16)
    assert "rounded to bfloat16" in rounded.how
    assert not rounded.is_exact
    assert 1e-4 < error(kind, mx.bfloat16) < 2**-7


def test_a_zero_stays_zero_where_scales_are_rounded() -> None:
    weight = random_weight("Q4_0")
    held = convert(weight, mx.bfloat16)
    assert held.scales is not None
    assert held.biases is not None
    assert mx.array_equal(held.biases, -8 * held.scales)
    assert not mx.array_equal(held.scales.astype(mx.float32), group_scales(weight)[0])


@pytest.mark.parametrize("kind", ["Q6_K", "IQ4_NL"])
def test_other_types_are_held_more_finely_and_said_to_be(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(kind)
    whole = convert(weight, mx.float32)
    assert (whole.bits, whole.is_exact) == (8, False)
    assert whole.how == "quantised anew, 8 bits, groups of 32, scales float32"
    assert 1e-4 < error(kind, mx.float32) < 0.01
    monkeypatch.setattr(mlx_lm_peer, "PIECE", 8 * 512)  # a matrix at a time
    for a, b in zip(whole.arrays.values(), convert(weight, mx.float32).arrays.values(), strict=True):
        assert mx.array_equal(a, b)


def test_dense_weights_take_the_type_of_the_activations() -> None:
    weight = mx.random.normal((4, 64))
    assert convert(weight, mx.float32).weight is weight
    held = convert(weight, mx.bfloat16)
    assert (held.weight.dtype, held.scales, held.is_exact) == (mx.bfloat16, None, False)
    assert convert(weight.astype(mx.float16), mx.float32).is_exact


class FakeCache:
    """mlx-lm's, of one layer, around ours."""

    def __init__(self, cfg: Config, layer: int):
        self.latent, self.layer = LatentCache(cfg.num_layers, row_format(cfg, mx.float32)), layer

    @property
    def state(self) -> list[mx.array]:
        return [rows for rows in self.latent.rows if rows is not None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        rows = self.latent.update(self.layer, mx.concatenate([keys, values], axis=-1)[:, 0])
        self.latent.advance(keys.shape[2])
        return rows, rows


class FakeModel:
    """mlx-lm's model, with ours inside. faults: step -> what it multiplies its result with."""

    faults: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, ours: Model):
        self.seen: list[list[int]] = []
        self.model = SimpleNamespace(
            embed_tokens=lambda tokens: ours.embed(tokens) * self.faults.get("embed_tokens", 1),
            layers=[self._layer(ours, number) for number in range(ours.cfg.num_layers)],
            norm=lambda x: x,
        )
        self.lm_head = lambda x: ours.logits(x) * self.faults.get("lm_head", 1)

    def _layer(self, ours: Model, number: int) -> Any:
        def layer(x: mx.array, mask: None, cache: FakeCache) -> mx.array:
            out = ours.layers[number](x, cache.latent)
            cache.latent.advance(x.shape[1])
            return x + (out - x) * self.faults.get(f"layers.{number}", 1)

        return layer

    def __call__(self, tokens: mx.array, cache: list[FakeCache]) -> mx.array:
        self.seen.append(tokens.reshape(-1).tolist())  # type: ignore[arg-type]
        x = self.model.embed_tokens(tokens)
        for layer, own in zip(self.model.layers, cache, strict=True):
            x = layer(x, None, cache=own)
        return self.lm_head(x) * self.faults.get("logits", 1)


CHUNK = 8


def generate_step(
    prompt: mx.array,
    model: FakeModel,
    stream: str,
    *,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array],
    prompt_cache: list[FakeCache],
    prefill_step_size: int = CHUNK,
) -> Iterator[tuple[int, mx.array]]:
    """mlx-lm's: a prompt in chunks, its last token by itself, and one step ahead."""
    assert stream == "stream"
    while len(prompt) > 1:
        count = min(prefill_step_size, len(prompt) - 1)
        model(prompt[None, :count], prompt_cache)
        prompt = prompt[count:]
    token = sampler(model(prompt[None], prompt_cache)[:, -1])
    for _ in range(max_tokens):
        ahead = sampler(model(token[None], prompt_cache)[:, -1])
        yield int(token.item()), mx.zeros(1)
        token = ahead


@pytest.fixture
def fake_mlx_lm(small: Subject, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Instead of mlx-lm and of the loading of its weights. Returns what was entered and left."""
    events: list[str] = []

    @contextmanager
    def wired_limit(model: FakeModel, streams: list[str]) -> Iterator[None]:
        events.append(f"wired for {streams}")
        yield
        events.append("not wired")

    def make_sampler(temp: float) -> Callable[[mx.array], mx.array]:
        events.append(f"temperature {temp}")
        return lambda x: mx.argmax(x, axis=-1)

    library = mlx_lm_peer.Library(
        version="0.0",
        architecture=SimpleNamespace(
            ModelArgs=SimpleNamespace(from_dict=lambda args: args), Model=lambda args: FakeModel(small.model)
        ),
        make_prompt_cache=lambda model: [FakeCache(small.config, layer) for layer in range(small.config.num_layers)],
        generate_step=generate_step,
        wired_limit=wired_limit,
        stream="stream",
        make_sampler=make_sampler,
    )
    monkeypatch.setattr(mlx_lm_peer, "import_library", lambda: library)
    monkeypatch.setattr(mlx_lm_peer, "_load", lambda model, held: None)
    return events


def mlx_lm(small: Subject, room: int | None = None) -> MlxLm:
    return MlxLm(small.config, dict(small.weights), small.model.dtype, small.room if room is None else room)


def test_the_same_model_decodes_the_same_tokens(small: Subject, fake_mlx_lm: list[str]) -> None:
    """Through mlx-lm's loop and ours, from the same context: read in chunks of its own choice, or random rows."""
    peer, ours = mlx_lm(small), Ours(small)
    for depth, fill in ((0, "prefill"), (20, "prefill"), (300, "random")):
        theirs, mine = Turn(1, depth, "mlx-lm", fill), Turn(1, depth, OURS, fill)
        peer.model.seen.clear()
        fake_mlx_lm.clear()
        peer.measure(theirs, 3)
        ours.measure(mine, 3)
        assert fake_mlx_lm == ["wired for ['stream']", "temperature 0", "not wired"]
        assert (len(theirs.warm_up), len(theirs.seconds)) == (5, 3)
        assert len(theirs.tokens) == 9
        assert theirs.tokens == mine.tokens[:9]
        prompt = contest.prompt_tokens(depth, small.config.vocab_size)
        read = [prompt[:8], prompt[8:16], prompt[16:19]] if depth == 20 else []
        assert peer.model.seen == [*read, prompt[-1:], *[[token] for token in theirs.tokens]]
        assert (theirs.time_to_first_token is None) == (fill == "random")


@pytest.mark.usefixtures("fake_mlx_lm")
def test_no_model_of_ours_stands_beside_mlx_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do our scales, of which it makes its own."""
    taken: dict[str, Any] = {}
    opened = contestant.open_source

    def watched(args: Namespace) -> subject.Source:
        source = opened(args)
        taken["weights"] = source.weights
        return source

    def made(*_: Any) -> None:
        raise AssertionError("a model of ours was made")

    monkeypatch.setattr(contestant, "open_source", watched)
    monkeypatch.setattr(subject, "Model", made)
    contestant.CONTESTANTS["mlx-lm"](SMALL)
    assert taken["weights"] == {}
    with pytest.raises(AssertionError, match="a model of ours was made"):
        contestant.CONTESTANTS[OURS](SMALL)


@pytest.mark.usefixtures("fake_mlx_lm")
def test_agreement_is_told(small: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(mlx_lm_check, "Model", lambda cfg, *more: given.append(more[0]) or Model(cfg, *more))
    peer = mlx_lm(small)
    agreement = mlx_lm_check.check(peer, small)
    assert given == [small.weights]
    assert given[0] is not small.weights  # a model may move the weights of the one that it gets
    steps = agreement.details["steps_in_float32"]
    assert list(steps) == ["embed_tokens", *[f"layers.{i}" for i in range(6)], "lm_head"]
    assert max(step["error"] for step in steps.values()) < 1e-6
    assert {step: found["budget"] for step, found in steps.items()} == dict.fromkeys(steps, mlx_lm_check.EXACT) | {
        "lm_head": mlx_lm_check.ROUNDED  # Q6_K
    }
    for what in ("prompt", "decoded token"):
        found = agreement.details["first_logits"][what]
        assert found["mlx-lm"] < 1e-6
        assert found["same_token"]
    assert any("computes what we do" in note for note in agreement.notes)
    assert "Q6_K in mlx-lm: quantised anew, 8 bits, groups of 32, scales float32" in peer.notes
    assert sum(entry["tensors"] for entry in peer.details["weights"]) == len(small.weights)
    assert peer.details["bytes_a_token"]["weights"] > 2_966_480  # scales in float32, and biases


@pytest.mark.usefixtures("fake_mlx_lm")
@pytest.mark.parametrize(
    ("step", "factor", "message"),
    [
        ("embed_tokens", 1.001, "its embed_tokens differs from ours by 0.001"),
        ("layers.3", 1.01, "its layers.3 differs from ours by 0.01 "),
        ("layers.5", float("nan"), "its layers.5 differs from ours by nan"),
        ("lm_head", 1.03, "its lm_head differs from ours by 0.03 "),
        ("logits", float("inf"), "its logits of the prompt are not finite"),
    ],
)
def test_a_model_that_computes_something_else_is_not_timed(
    small: Subject, monkeypatch: pytest.MonkeyPatch, step: str, factor: float, message: str
) -> None:
    monkeypatch.setattr(FakeModel, "faults", {step: factor})
    with pytest.raises(UnavailableError, match=message):
        mlx_lm_check.check(mlx_lm(small), small)


@pytest.mark.usefixtures("fake_mlx_lm")
def test_a_second_set_of_scales_that_does_not_fit_is_said(small: Subject) -> None:
    with pytest.raises(
        UnavailableError, match=r"its scales and biases need 2\.\d MB more memory than ours, 1.0 MB are"
    ):
        mlx_lm(small, room=1_000_000)


def test_models_that_its_class_does_not_run_are_said(small: Subject) -> None:
    with pytest.raises(UnavailableError, match="chooses experts by sigmoids, this model by softmax"):
        mlx_lm_peer.model_args(replace(small.config, gating="softmax"))


def test_without_mlx_lm_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_lm_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="not installed: pip install mlx-lm"):
        mlx_lm_peer.import_library()


def test_an_mlx_lm_without_what_it_needs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as transformers, which `pip install --no-deps` leaves out."""
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UnavailableError, match=r"No module named 'a_package_that_is_not_there'.*with what it needs"):
        mlx_lm_peer.import_library()


needs_mlx_lm = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed; nothing here needs it")


@needs_mlx_lm
@pytest.mark.filterwarnings("default")  # of what it imports
def test_the_real_mlx_lm_computes_what_we_do(small: Subject) -> None:
    peer, ours = mlx_lm(small), Ours(small)
    theirs, mine = Turn(1, 40, "mlx-lm", "prefill"), Turn(1, 40, OURS, "prefill")
    peer.measure(theirs, 20)
    ours.measure(mine, 20)
    assert theirs.tokens[:20] == mine.tokens[:20]
    assert mlx_lm_check.check(peer, small).notes[0].startswith("mlx-lm computes what we do")


@needs_mlx_lm
@pytest.mark.parametrize(
    ("one", "other", "step"),
    [
        ("layers.2.mlp.experts.gate_proj", "layers.2.mlp.experts.up_proj", "layers.2"),
        ("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0"),
        ("layers.1.input_layernorm", "layers.1.post_attention_layernorm", "layers.1"),
        ("layers.4.self_attn.k_b", "layers.5.self_attn.k_b", "layers.4"),
    ],
)
def test_weights_in_the_wrong_place_are_found(
    small: Subject, monkeypatch: pytest.MonkeyPatch, one: str, other: str, step: str
) -> None:
    swapped = {one: mlx_lm_peer.name_of(other), other: mlx_lm_peer.name_of(one)}
    name_of = mlx_lm_peer.name_of
    monkeypatch.setattr(mlx_lm_peer, "name_of", lambda name: swapped.get(name, name_of(name)))
    with pytest.raises(UnavailableError, match=rf"its {step} differs from ours"):
        mlx_lm_check.check(mlx_lm(small), small)


# llama.cpp

PROGRAM = """#!{python}
import json, sys
open({log!r}, "a").write(" ".join(sys.argv[1:]) + "\\n")
repetitions = int(sys.argv[sys.argv.index("-r") + 1])
{body}
"""
GOOD = """
ns = [3_000_000_000 * (n + 1) for n in range(repetitions)]
print(json.dumps([{"samples_ns": ns, "build_commit": "abc", "backends": "CPU", "avg_ts": 1.0}]))
"""


def program(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "llama-bench"
    path.write_text(PROGRAM.format(python=sys.executable, log=str(tmp_path / "log"), body=body))
    path.chmod(0o755)
    return path


def test_llama_bench_is_asked_for_the_same_context(tmp_path: Path) -> None:
    path = program(tmp_path, GOOD)
    peer = llama_bench.LlamaBench(SMALL_MODEL, path)
    read, filled = peer.take([Turn(1, 512, "llama.cpp", "prefill"), Turn(1, 8192, "llama.cpp", "random")], 30)
    assert (read.time_to_first_token, filled.time_to_first_token) == (3.0, None)
    for turn in (read, filled):
        assert (turn.warm_up, turn.seconds, turn.mean_of, turn.tokens) == ([0.1], [0.2], 30, [])
    always = f"-m {SMALL_MODEL} -o json -fa 1"
    assert (tmp_path / "log").read_text().splitlines() == [
        f"{always} -p 512 -n 0 -r 1",
        f"{always} -p 0 -n 30 -d 512 -r 2",
        f"{always} -p 0 -n 30 -d 8192 -r 2",
    ]
    assert peer.details == {"command": "llama-bench -o json -fa 1", "build_commit": "abc", "backends": "CPU"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "print('x.cpp:1: GGML_ASSERT(a) failed', file=sys.stderr); print('a frame', file=sys.stderr); sys.exit(6)",
            r"llama-bench -p 0 -n 2 -d 0 -r 2 ended with 6: x.cpp:1: GGML_ASSERT\(a\) failed",
        ),
        ("sys.exit(1)", "ended with 1: nothing on its standard error"),
        ("print('model, size')", "gave no JSON with samples_ns but model, size"),
        ("print('[]')", "gave no JSON with samples_ns"),
        ("print('[{\"samples_ns\": [5, 0]}]')", "gave the times"),
        ("print('[{\"samples_ns\": [5]}]')", "gave the times"),
    ],
)
def test_a_llama_bench_that_fails_says_why(tmp_path: Path, body: str, message: str) -> None:
    peer = llama_bench.LlamaBench(SMALL_MODEL, program(tmp_path, body))
    with pytest.raises(UnavailableError, match=message):
        next(peer.take([Turn(1, 0, "llama.cpp", "prefill")], 2))


def test_llama_cpp_needs_a_program_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no llama-bench on the PATH: .* name it with --llama-bench PATH"):
        llama_bench.LlamaBench(SMALL_MODEL, None)
    path = program(tmp_path, GOOD)
    assert llama_bench.LlamaBench(SMALL_MODEL, None).command[0] == str(path)
    with pytest.raises(UnavailableError, match="random weights have none: compare with --model"):
        llama_bench.LlamaBench(None, path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, SMALL_MODEL), ({"model": "a.gguf"}, Path("a.gguf")), ({"synthetic": 4}, None), ({"layers": 2}, None)],
)
def test_the_file_that_llama_cpp_reads(given: dict[str, Any], expected: Path | None) -> None:
    assert compare.model_file(Namespace(**{"model": None, "synthetic": None, "layers": None} | given)) == expected


# the picture

needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib is an extra")


@needs_matplotlib
@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("default")  # matplotlib's own
def test_a_picture_of_speed_against_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, Fake())
    picture = tmp_path / "speed.svg"
    measured(tmp_path, "--depths", "0,20", "--count", "1", "--rounds", "1", "--plot", str(picture))
    text = picture.read_text()
    for words in ("glm-mlx", "mlx-lm", "tokens in the context", "small.gguf"):
        assert f"<!-- {words}" in text


@needs_matplotlib
@pytest.mark.filterwarnings("default")
def test_a_picture_of_one_depth(tmp_path: Path) -> None:
    plot.draw(tmp_path / "one.PNG", "title", compare.rows_of([replace(turns(OURS, [[1, 2]])[0], depth=0)]))
    assert (tmp_path / "one.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_one_line_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert script.run(lambda: compare.main(["--plot", str(tmp_path / "speed.png")])) == 2
    assert capsys.readouterr().err == "error: --plot needs matplotlib: pip install -e '.[plot]', or leave --plot out\n"
