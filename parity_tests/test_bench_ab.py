"""The verdict of runs in turns: its statistics, what is compared, the rule, and the whole from a shell."""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from bench import ab, block, decode, frame, ops_speed, paired, script, sides
from bench.sides import Side
from bench.timing import summarize
from glm_mlx.errors import InputError
from kernels import launcher, shapes
from parity_tests import planted

CONDITIONS = {"chip": "Test chip", "back_end": "cpu"}


# --- statistics


@pytest.mark.parametrize("pairs", range(6, 13))
def test_the_interval_is_as_sure_as_it_says(pairs: int) -> None:
    """Over all ways in which signs can fall: the mean ranks outside are too rare by 5 %, and one more would not be."""
    ranks = np.arange(1, pairs + 1)
    sums = [ranks[list(signs)].sum() for signs in itertools.product([False, True], repeat=pairs)]
    off = paired._critical(pairs)
    assert 2 * np.mean(np.asarray(sums) <= off) <= 0.05 < 2 * np.mean(np.asarray(sums) <= off + 1)


def test_known_figures() -> None:
    effect = paired.judge([1.01, 1.02, 1.03, 1.04, 1.05, 1.06], 0.01)
    assert (effect.low, effect.high) == pytest.approx((0.01, 0.06))
    assert effect.change == pytest.approx(0.035, abs=2e-4)
    assert effect.verdict == "slower"
    assert paired.judge([1 / 1.03] * 6, 0.01).verdict == "faster"
    assert str(effect) == "+3.5% (+1.0% to +6.0%)"


@pytest.mark.parametrize(
    ("ratios", "why"),
    [
        ([1.1, 1.2, 1.3, 1.1, 1.2, 0.99], "one pair went the other way"),
        ([1.009] * 12, "too small to count"),
        ([1.0] * 6, "the same"),
    ],
)
def test_no_difference(ratios: list[float], why: str) -> None:
    assert paired.judge(ratios, 0.01).verdict == "no difference", why


def test_one_disturbed_run_does_not_decide() -> None:
    calm = [0.95, 0.951, 0.949, 0.95, 0.95, 0.952, 0.948, 0.95, 0.951, 0.95, 0.95]
    assert paired.judge([*calm, 5.0], 0.01).verdict == "faster"


def test_fewer_than_six_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="5 pairs; 6 are needed"):
        paired.judge([1.1] * 5, 0.01)


def test_pairs_are_enough_by_the_width_of_the_interval() -> None:
    def effect(change: float, half: float) -> paired.Effect:
        return paired.Effect(6, change, change - half, change + half, "no difference")

    assert paired.enough(effect(0, 0.0099), 0.01)
    assert not paired.enough(effect(0, 0.011), 0.01)
    assert paired.enough(effect(-0.2, 0.05), 0.01)
    assert not paired.enough(effect(-0.2, 0.051), 0.01)


class Machine:
    """Noise as in `results/decode-paths-h200.json`: medians of runs 1.5 % apart (3 % between two at the same depth),
    drift, and one run in twenty that something disturbed."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng, self.runs = np.random.default_rng(seed), 0
        monkeypatch.setattr(ab, "run", self.run)

    def run(self, side: Side, measure: str, options: Any) -> dict[str, Any]:
        self.runs += 1
        seconds = 9e-3 * float(side.environment["FACTOR"]) * np.exp(self.rng.normal(0, 0.015) + 0.001 * self.runs)
        if self.rng.random() < 0.05:
            seconds *= 1.1
        return report({"512": (seconds * np.exp(self.rng.normal(0, 0.02, 60))).tolist()})


def report(depths: dict[str, list[float]], tokens: list[int] | None = None) -> dict[str, Any]:
    """As `decode.py` writes it."""
    return {
        "script": "decode",
        "warm_up_tokens": 0,
        "conditions": CONDITIONS,
        "runs": [
            {"depth": int(depth), "path": "kernels", "seconds": seconds, "tokens": tokens or []}
            for depth, seconds in depths.items()
        ],
    }


def compared(a: float, b: float) -> ab.Comparison:
    made = ab.Comparison(*(Side(str(f), environment={"FACTOR": str(f)}) for f in (a, b)), "decode", [])
    for _ in ab.measure(made, rest=0):
        pass
    return made


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.03, "slower"), (1 / 1.03, "faster"), (1.0, "no difference")], ids=str
)
def test_three_percent_are_found_and_nothing_is_not(
    factor: float, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 9 of 10 trials; here of 30."""
    verdicts = []
    for seed in range(30):
        Machine(seed, monkeypatch)
        verdicts.append(compared(1.0, factor).overall().verdict)
    assert verdicts.count(verdict) >= 27


def test_runs_alternate_and_every_other_pair_begins_with_b(monkeypatch: pytest.MonkeyPatch) -> None:
    order, rests = [], []

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        order.append(side.name)
        return report({"0": [1.0 + 0.01 * len(order)]})

    monkeypatch.setattr(ab, "run", run)
    monkeypatch.setattr(ab.time, "sleep", rests.append)
    comparison = ab.Comparison(Side("a"), Side("b"), "decode", [])
    assert [text[:6] for text in ab.measure(comparison, 8, 1.5)][:4] == ["pair 1", "pair 1", "pair 2", "pair 2"]
    assert "".join(order).startswith("abbaabbaabba")
    assert len(order) == 2 * len(comparison.pairs)
    assert rests == [1.5] * len(order)
    assert comparison.pairs[1][0] == {"depth 0, kernels": [1.04]}, "the second pair began with b"


def test_more_pairs_where_noise_is_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    calm = np.random.default_rng(0)
    monkeypatch.setattr(ab, "run", lambda *_: report({"0": [calm.normal(1, 0.001)]}))
    assert len(compared(1, 1).pairs) == 6
    monkeypatch.setattr(ab, "run", lambda *_: report({"0": [calm.normal(1, 0.1)]}))
    assert len(compared(1, 1).pairs) == 20


# --- rows, and the rule


def comparison(measure: str = "decode", **rows: float) -> ab.Comparison:
    """Whose rows take so many times as long in B."""
    made = ab.Comparison(Side("old"), Side("new"), measure, ["--x"])
    noise = 1 + 0.001 * np.random.default_rng(0).normal(size=8)
    made.pairs = [({row: [1e-3] for row in rows}, {row: [1e-3 * f * n] for row, f in rows.items()}) for n in noise]
    made.first = (report({}), report({}))
    return made


@pytest.mark.parametrize(
    ("measure", "then", "kept"),
    [
        ("ops_speed", "a candidate: a block of the model must be faster too", "candidate"),
        ("block", "passes to the whole model, which must be faster too", "to the whole model"),
        ("decode", "accepted", "yes"),
    ],
)
def test_only_a_faster_whole_model_is_accepted(measure: str, then: str, kept: str) -> None:
    won = ab.Outcome.of(comparison(measure, one=0.9, two=0.95))
    assert (won.passes, won.kept) == (True, kept)
    assert str(won).startswith("B is faster: -7.")
    assert str(won).endswith(f"8 pairs; {then}")
    for factor, verdict in ((1.0, "no difference: "), (1.05, "B is slower: +5.")):
        lost = ab.Outcome.of(comparison(measure, one=factor))
        assert (lost.passes, lost.kept) == (False, "no")
        assert str(lost).startswith(verdict)
        assert str(lost).endswith("; rejected")


def test_what_makes_a_row_slower_is_rejected() -> None:
    outcome = ab.Outcome.of(comparison(short=0.8, long=1.02))
    assert outcome.overall.verdict == "faster"
    assert not outcome.passes
    assert str(outcome).endswith("rejected, as long is slower")


def test_rows_that_a_run_lacks_or_that_took_no_time_are_left_out() -> None:
    made = comparison(good=1.0, lacking=1.0, negative=1.0, empty=1.0)
    del made.pairs[3][1]["lacking"]
    made.pairs[4][0]["negative"] = [-1e-6]
    made.pairs[5][1]["empty"] = []
    assert list(made.medians()) == ["good"]
    assert "left out, as not every run has a time for it: empty; lacking; negative" in list(ab._notes(made))


def test_the_log_gets_a_line_for_each_verdict_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ab, "LOG", tmp_path / "LOG.md")
    ab.LOG.write_text("# Log\n\n| a | b | c | d | e |\n|---|---|---|---|---|\n| old | 1 | 2 | 3 | 4 |\n")
    for what, factor in (("first|try", 1.0), ("second", 0.9)):
        ab.add_to_log(ab.log_line(ab.Outcome.of(comparison(row=factor, b=1, c=1, d=1, e=1)), what))
    *_, second, first, old = ab.LOG.read_text().splitlines()
    assert old == "| old | 1 | 2 | 3 | 4 |"
    assert second.count(" | ") == 4
    assert " | second: `new` against `old`, `decode --x` | faster, -2.0% (-2." in second
    assert "; row: 1 ms → 0.9" in second
    assert second.endswith("; 1 rows more | Test chip (cpu) | yes |")
    assert "first\\|try" in first
    assert first.endswith("| no |")
    ab.LOG.write_text("nothing\n")
    with pytest.raises(InputError, match=r"no table with five columns; add the line by hand: \| x \|"):
        ab.add_to_log("| x |")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: copy)
    monkeypatch.setattr(block, "BEYOND_CACHES", {"cpu": 1, "gpu": 1})


@pytest.mark.usefixtures("quick")
def test_what_the_benchmarks_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert decode.main(["--depths", "0,20", "--count", "2", "--rounds", "3", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = sides.rows_of(written)
    assert {row: len(seconds) for row, seconds in rows.items()} == {"depth 0, twins": 6, "depth 20, twins": 6}
    assert rows["depth 0, twins"][:2] == written["runs"][0]["seconds"][5:]
    assert block.main(["--depths", "20", "--count", "2", "--rounds", "3", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    rows = sides.rows_of(written)
    assert {row: len(seconds) for row, seconds in rows.items()} == {"MoE block, depth 20, twins": 6}
    of_row = next(row for row in written["rows"] if (row["kind"], row["part"]) == ("MoE", "block"))
    assert summarize(rows["MoE block, depth 20, twins"]).median == pytest.approx(of_row["seconds"]["median"])
    assert ops_speed.main(["--op", "router", "--rounds", "2", "--json", str(path)]) == 0
    written = json.loads(path.read_text())
    assert sides.rows_of(written) == {"qmv, router: 2048 -> 64, F32": written["rows"][0]["seconds"]["chain"]}
    kernel = {**written["rows"][0], "by": "kernel", "seconds": {"chain": [2.0], "gpu": [1.0]}}
    assert sides.rows_of({**written, "rows": [*written["rows"], kernel]}) == {"qmv, router: 2048 -> 64, F32": [1.0]}
    wrong = {**kernel, "problem": "wrong result, off by 0.1"}
    assert sides.rows_of({**written, "rows": [*written["rows"], wrong]}) == {}


def block_report(*runs: tuple[str, str, int, list[float], list[float]]) -> dict[str, Any]:
    """As `block.py` writes it."""
    made = [dict(zip(("kind", "part", "depth", "seconds", "gpu"), run, strict=True), path="kernels") for run in runs]
    rows = [{"kind": kind, "path": "kernels", "blocks_a_step": n} for kind, n in (("MoE", 4), ("dense", 2))]
    return {"script": "block", "warm_up_steps": 1, "conditions": CONDITIONS, "rows": rows, "runs": made}


def test_of_a_block_the_whole_counts_and_the_gpus_own_time() -> None:
    runs: list[tuple[str, str, int, list[float], list[float]]] = [
        ("MoE", "block", 512, [9.0, 4.0, 8.0], []),
        ("MoE", "attention", 512, [9.0, 2.0], []),
        ("MoE", "block", 512, [9.0, 12.0], []),
        ("dense", "block", 512, [9.0, 3.0], []),
        ("MoE", "block", 4096, [9.0, 5.0], [16.0, 20.0]),
    ]
    assert sides.rows_of(block_report(*runs)) == {
        "MoE block, depth 512, kernels": [1.0, 2.0, 3.0],
        "MoE block, depth 4,096, kernels": [4.0, 5.0],
    }
    assert sides.rows_of(block_report(runs[3])) == {"dense block, depth 512, kernels": [1.5]}


@pytest.mark.parametrize("agree", [True, False, None])
def test_what_is_faster_and_wrong_is_rejected(agree: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        slow = side.name == "a"
        return {**report({"0": [1.0 if slow else 0.5]}), "parity": {"agree": True if slow else agree}}

    monkeypatch.setattr(ab, "run", run)
    made = ab.Comparison(Side("a"), Side("b"), "decode", [])
    assert list(ab.measure(made, rest=0))
    outcome = ab.Outcome.of(made)
    assert outcome.overall.verdict == "faster"
    assert outcome.passes is (agree is not False)
    assert str(outcome).endswith("rejected, as its kernels compute something else than their twins") is (agree is False)
    said = "B: kernels disagree with their twins, so these are speeds of a wrong result"
    assert (said in list(ab._notes(made))) is (agree is False)


# --- what is compared

STUB = """
import json, os, sys, time
FACTOR = {factor}
def work():
    start = time.process_time()  # which others on this machine do not add to
    sum(i * i for i in range(int(40_000 * FACTOR)))
    return time.process_time() - start
if "--fail" in sys.argv:
    sys.exit("error: no such thing")
runs = [{{"depth": 7, "path": "twins", "seconds": [work() for _ in range(9)], "tokens": [1, FACTOR]}}]
conditions = {{"chip": "Test chip", "back_end": "cpu"}}
report = {{"script": "decode", "warm_up_tokens": 2, "conditions": conditions, "runs": runs, "argv": sys.argv}}
report["environment"] = dict(os.environ)
json.dump(report, open(sys.argv[sys.argv.index("--json") + 1], "w"))
"""
Git = Callable[..., str]


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Git:
    """A project of two commits, of which the second takes twice as long."""
    root = tmp_path / "project"
    (root / "bench").mkdir(parents=True)
    monkeypatch.setattr(sides, "ROOT", root)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", "-c", "core.hooksPath=/")
        return subprocess.run(["git", "-C", str(root), *own, *words], check=True, capture_output=True, text=True).stdout

    run("init", "--quiet", "--initial-branch", "main")
    for factor in (1, 2):
        (root / "bench" / "decode.py").write_text(STUB.format(factor=factor))
        run("add", ".")
        run("commit", "--quiet", "-m", str(factor))
    return run


def test_two_commits_from_the_shell_to_the_log(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ab, "LOG", tmp_path / "LOG.md")
    ab.LOG.write_text("|---|---|---|---|---|\n")
    path = tmp_path / "out.json"
    own = ["--rest", "0", "--pairs", "8", "--log", "--what", "doubled", "--json", str(path)]
    assert ab.main(["HEAD~1", "main", *own, "--", "--some", "option"]) == 0
    out = capsys.readouterr().out
    made = json.loads(path.read_text())
    assert made["verdict"] == "slower"
    assert made["overall"]["change"] > 0.5
    assert "B is slower: +" in out
    assert "; rejected" in out
    assert "A and B are not measured by the same scripts: bench/ differs in decode.py" in out
    assert "depth 7: A and B give the same first 1 of 2 tokens" in out
    assert [pair["began"] for pair in made["pairs"][:4]] == ["a", "b", "a", "b"]
    assert [len(made["pairs"][0][side]["depth 7, twins"]) for side in "ab"] == [7, 7]
    (_, line) = ab.LOG.read_text().splitlines()
    commits = git("rev-parse", "HEAD~1", "HEAD").split()
    assert (
        f" | doubled: `main ({commits[1][:10]})` against `HEAD~1 ({commits[0][:10]})`, `decode --some option` | "
        in line
    )
    assert line.endswith(" | Test chip (cpu) | no |")
    assert git("worktree", "list").count("\n") == 1, "what was written for the runs is gone"


def test_each_side_is_run_as_it_says(git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HOME", raising=False)
    table: shapes.Table = {"Chip": {"qmv": {"Q4_0 1x2": {"ROWS": 2}}}}
    shapes.write(tmp_path / "table.json", table)
    copy = tmp_path / "copy"
    (copy / "bench").mkdir(parents=True)
    (copy / "bench" / "decode.py").write_text("x = 1")
    quoted = tmp_path / "it's"
    quoted.symlink_to(copy)
    git("branch", "it's")
    long = f"--model {'x' * 5000}"
    given = ["--mix q8_0 --layers=4", "A=1 B_2=x=y", str(tmp_path / "table.json"), str(copy), "HEAD~1"]
    with sides.opened([*given, str(quoted), "it's", long], "decode") as opened:
        options, environment, tuned, folder, commit, same_folder, branch, long_option = opened
        assert same_folder.tree == copy
        assert branch.name.startswith("it's (")
        assert long_option.options == ("--model", "x" * 5000)
        assert (options.options, options.tree) == (("--mix", "q8_0", "--layers=4"), sides.ROOT)
        assert environment.environment == {"A": "1", "B_2": "x=y"}
        assert tuned.environment["HF_HOME"] == str(tmp_path / "cache" / "huggingface")
        cache = Path(tuned.environment["XDG_CACHE_HOME"])
        assert shapes.read(cache / "glm-mlx" / "shapes.json") == table
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        assert shapes.read(shapes.user_file()) == table, "where the product looks"
        assert folder.tree == copy
        assert (commit.tree / "bench" / "decode.py").read_text() == STUB.format(factor=1)
        said = sides.run(Side("x", commit.tree, ("--own", "1"), {"A": "1"}), "decode", ["--both"])
        assert said["argv"][1:4] == ["--both", "--own", "1"]
        assert (said["environment"]["A"], said["environment"]["XDG_CACHE_HOME"]) == ("1", str(cache))
    assert not cache.exists()
    assert not commit.tree.exists()


def test_without_a_home_results_need_a_name_and_tables_have_a_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a user of a container who has neither HOME nor an entry in passwd."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", none)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"no home folder.*; name a file with --json"):
        script.results_file("ab", None)
    assert list(tmp_path.iterdir()) == []
    side = sides.with_table("a table", {}, tmp_path / "side")
    assert side.environment["HF_HOME"] == "~/.cache/huggingface", "where the hub's library has it too"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such", "."], "'no-such' is no commit here, no folder of this project, no table"),
        (["it's", "."], '"it\'s" is no commit here, no folder of this project, no table of launch shapes'),
        (["HEAD", '--mix "x'], "no NAME=VALUE and no option of decode.py (no closing quotation)\n"),
        (["HEAD", 'A="x'], "no NAME=VALUE and no option of decode.py (no closing quotation)\n"),
        (["HEAD", "x" * 5000], "is no commit here"),
        (["HEAD", "--fail x"], "decode.py failed with --fail x: no such thing"),
        (["HEAD", "HEAD~1", "--measure", "block"], "HEAD has no bench/block.py; choose another --measure or a later"),
        (["HEAD", "/no/table.json"], "cannot use the launch shapes of /no/table.json: No such file or directory"),
        (["HEAD", "bad.json"], "cannot use the launch shapes of bad.json: Chip, qmv, x: ROWS is 0, not a whole number"),
        (["HEAD", "HEAD", "--json", "/"], "cannot write /; name another file with --json"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    git: Git,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.json").write_text('{"Chip": {"qmv": {"x": {"ROWS": 0}}}}')
    monkeypatch.chdir(tmp_path)
    assert script.run(lambda: ab.main([*arguments, "--rest", "0"])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert git("worktree", "list").count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([".", ".", "--pairs", "5"], "'5' is not a whole number from 6"),
        ([".", ".", "--smallest", "-1%"], "expected one argument"),
        ([".", ".", "--smallest", "few"], "'few' is no number from 0"),
        (["."], "the following arguments are required: B"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ab.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "note"),
    [
        (KeyboardInterrupt(), 130, "interrupted: this is what was measured until then"),
        (InputError("decode.py failed with b: gone"), 2, "stopped: decode.py failed with b: gone"),
    ],
)
def test_what_was_measured_before_an_end_is_kept(
    error: BaseException, code: int, note: str, git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        ran.append(side)
        if len(ran) == 16:
            raise error
        return report({"0": [1.0 + 0.5 * (len(ran) % 3)]})

    monkeypatch.setattr(ab, "run", run)
    path = tmp_path / "out.json"
    assert ab.main(["HEAD", "HEAD", "--rest", "0", "--json", str(path)]) == code
    made = json.loads(path.read_text())
    assert len(made["pairs"]) == 7
    assert made["verdict"] == "no difference"
    assert note in made["notes"]
    assert git("worktree", "list").count("\n") == 1


def test_a_pair_without_the_rows_of_the_others_leaves_them_good(
    git: Git, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        ran.append(side)
        return report({"0" if len(ran) < 15 else "1": [1.0 + 0.5 * (len(ran) % 3)]})

    monkeypatch.setattr(ab, "run", run)
    path = tmp_path / "out.json"
    assert ab.main(["HEAD", "HEAD", "--rest", "0", "--json", str(path)]) == 2
    made = json.loads(path.read_text())
    assert (len(made["pairs"]), made["verdict"]) == (7, "no difference")
    assert "stopped: A and B have no row in common that decode.py could measure" in made["notes"]


# --- the trial on a GPU


def test_planted_work_is_done_and_nothing_else_changes(tmp_path: Path) -> None:
    """In a copy every fifth launch of an op is made twice, the second after the first."""
    planted.copy(tmp_path / "copy", planted.REPEAT.format(every=5))
    code = """
import mlx.core as mx
from kernels import launcher
assert launcher.__file__.startswith({root!r}), launcher.__file__
made = []
def kernel(inputs, **_):
    made.append(inputs[0].tolist())
    return [inputs[0] + inputs[1]]
def launch(op):
    return launcher.Launch(op, op, (), (), {{}}, {{}}, kernel, [], (1, 1, 1), (32, 1, 1), [(2,)], [mx.float32])
for _ in range(20):
    for op in ("a", "b"):
        (y,) = launch(op)(mx.array([1.0, 2.0]), mx.array([3.0, 4.0]))
        assert y.tolist() == [4, 6]
print(len(made), made.count([1, 2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format(root=str(tmp_path))],
        cwd=tmp_path / "copy",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "copy")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["48", "48"]


def test_a_trial_finds_its_dose_and_counts_what_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a tree is read from what is planted in it: a launch made twice takes 0.6 of a launch more."""
    noise = np.random.default_rng(0)

    def run(side: Side, measure: str, options: Any) -> dict[str, Any]:
        planted_text = re.search(r"_EVERY = .*, (\d+)\n", (side.tree / "kernels" / "launcher.py").read_text())
        more = 0.6 / int(planted_text[1]) if planted_text else 0.0
        return report({"0": [(1 + more) * np.exp(noise.normal(0, 0.002))]})

    monkeypatch.setattr(ab, "run", run)
    monkeypatch.setattr(planted, "run", run)
    monkeypatch.setattr(launcher, "back_end", lambda op: mx.fast.metal_kernel)
    path = tmp_path / "out.json"
    arguments = ["planted", "--trials", "10", "--measure", "decode", "--json", str(path), "--", "--x"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert planted.main() == 0
    made = json.loads(path.read_text())
    assert made["every"] == pytest.approx(20, abs=2)
    assert [t["right"] for t in made["trials"]].count(True) >= 19
    assert {(t["of"], t["verdict"]) for t in made["trials"] if t["right"]} == {
        ("slower", "slower"),
        ("same", "no difference"),
    }
    assert all(t["options"] == ["--x"] for t in made["trials"])
    monkeypatch.setattr(sys, "argv", [*arguments[:5], "--smallest", "90%", "--json", str(path)])
    assert planted.main() == 1, "3 % never count where 90 % are asked for"


def test_trees_of_a_trial_are_measured_alike(tmp_path: Path) -> None:
    base, slower = planted.copy(tmp_path / "base"), planted.copy(tmp_path / "slower", "\nx = 1\n")
    assert ab._differing_scripts(base, slower) == []
    assert (slower / "kernels" / "launcher.py").read_text().endswith("\nx = 1\n")
    for name in planted.ALIKE:
        compile((base / name).read_text(), name, "exec")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({10: 0.036}, 10),
        ({10: 0.06, 20: 0.031}, 20),
        ({10: 0.185, 20: 0.008, 15: 0.008, 12: 0.014, 11: 0.022}, 11),
        ({10: -0.001, 5: 0.18, 7: 0.0, 6: 0.03}, 6),
        ({10: 0.001, 5: 0.002, 3: 0.1, 4: 0.2}, None),
    ],
    ids=lambda value: str(value),
)
def test_the_planted_slowdown_is_searched_for(changes: dict[int, float], found: int | None) -> None:
    """Of a time that is not in proportion to the launches made twice."""
    tried: list[int] = []

    def slowdown(every: int) -> float:
        tried.append(every)
        return changes[every]

    if found is None:
        with pytest.raises(InputError, match="changes the time by 3%"):
            planted.dose(slowdown)
    else:
        assert planted.dose(slowdown) == found
    assert tried == list(changes)
