"""The scripts of bench/ as a user meets them: help, a short run, JSON, errors of one line, Ctrl-C."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from bench import conditions, decode, frame, launches, load, op_cases, ops_speed, script, subject, synthetic
from glm_mlx import memory
from glm_mlx.cache import LatentCache
from glm_mlx.errors import InputError
from glm_mlx.model import Model
from glm_mlx.model_cases import decode_cases
from glm_mlx.small import SMALL_MODEL
from kernels import launcher
from kernels.cases import Case
from kernels.check import Result

# import-linter keeps tests and benchmarks from importing one another.
ROOT = Path(__file__).parents[1]
COPY = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "wall time"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without seconds of copying."""
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: {**COPY})


def run_script(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["decode", "ops_speed", "load"])
def test_help_says_what_the_script_does(name: str) -> None:
    done = run_script(f"bench/{name}.py", "-h")
    assert done.returncode == 0
    assert done.stderr == ""
    for words in ("examples:", f"python bench/{name}.py", "--json FILE", "How fast"):
        assert words in done.stdout


def test_three_tokens_of_the_small_model(tmp_path: Path) -> None:
    """Started as a user does; in a pipe the table is plain text, and whole."""
    path = tmp_path / "out.json"
    done = run_script("bench/decode.py", "--depths", "0,40", "--count", "3", "--rounds", "2", "--json", str(path))
    assert done.returncode == 0, done.stderr
    table = done.stdout[done.stdout.index("\ndecode") :].splitlines()
    assert [line.split()[:3] for line in table if line.strip()[:1].isdigit()] == [
        ["0", "twins", "prompt"],
        ["40", "twins", "prompt"],
    ]
    assert done.stdout.isascii() or "µ" in done.stdout
    assert "\x1b" not in done.stdout
    report = json.loads(path.read_text())
    assert [row["depth"] for row in report["rows"]] == [0, 40]
    assert [len(run["seconds"]) for run in report["runs"]] == [5 + 3] * 4
    assert [run["positions"][0] for run in report["runs"]] == [2, 41, 2, 41]
    assert report["rows"][1]["decode_seconds"]["count"] == 6
    assert report["rows"][1]["prefill_tok_s"]["count"] == 2
    cold = report["warm_up_prompts"]
    assert [(run["depth"], run["number"], run["seconds"], len(run["tokens"])) for run in cold] == [
        (0, 0, [], 1),
        (40, 0, [], 1),
    ]
    assert [row["cold_time_to_first_token"] for row in report["rows"]] == [run["time_to_first_token"] for run in cold]
    warm = [run["time_to_first_token"] for run in report["runs"] if run["depth"] == 40]
    assert report["rows"][1]["time_to_first_token"]["median"] == pytest.approx(sum(warm) / 2)
    assert report["parity"]["path"] == "twins"
    for key in ("chip", "os", "mlx", "commit", "clean", "copy", "memory_bytes", "source_sha256", "power_source"):
        assert key in report["conditions"]
    model = report["model"]
    assert model["name"] == "small.gguf"
    assert len(model["header_sha256"]) == 64
    assert sum(model["bytes_by_type"].values()) == 5749568
    assert report["primitives_a_token"]["twins"]["QuantizedMatmul"] > 30


@pytest.mark.usefixtures("quick")
def test_a_random_context_is_not_read_but_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, hidden_states = set(), Model.hidden_states

    def watched(model: Model, tokens: mx.array, cache: LatentCache) -> mx.array:
        if cache.offset:  # launches are counted on a cache of its own
            lengths.add((tokens.shape[1], cache.offset >= 299))
        return hidden_states(model, tokens, cache)

    monkeypatch.setattr(Model, "hidden_states", watched)
    path = tmp_path / "out.json"
    arguments = ["--depths", "300", "--count", "2", "--rounds", "1", "--fill", "random", "--json", str(path)]
    assert decode.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report["notes"] == ["context by random: no prompt was read, rows drawn at random stand in the cache"]
    (run,) = report["runs"]
    assert run["fill"] == "random"
    assert run["prefill_tok_s"] is None
    assert run["time_to_first_token"] is None
    assert run["positions"] == list(range(301, 308))
    assert lengths == {(1, False), (1, True)}


@pytest.mark.usefixtures("quick")
def test_a_synthetic_model_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = synthetic
    keys = made.metadata
    monkeypatch.setattr(
        made,
        "metadata",
        lambda layers: (
            keys(layers)
            | {"tokenizer.ggml.tokens": [""] * 256, "deepseek2.expert_count": 4, "deepseek2.feed_forward_length": 256}
        ),
    )
    path = tmp_path / "out.json"
    arguments = ["--layers", "2", "--mix", "q8_0", "--depths", "0", "--count", "1", "--rounds", "1"]
    assert decode.main([*arguments, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["model"]["mix"] == "q8_0"
    assert report["model"]["layers"] == 2
    assert "GLM-4.7-Flash, random weights: 2 layers" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = decode.measure

    def interrupted(model: Any, run: decode.Run, tokens: int) -> None:
        if run.number == 2:
            raise KeyboardInterrupt
        measure(model, run, tokens)

    monkeypatch.setattr(decode, "measure", interrupted)
    path = tmp_path / "out.json"
    assert decode.main(["--depths", "0,20", "--count", "2", "--rounds", "9", "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert [run["depth"] for run in report["runs"]] == [0, 20]
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_ctrl_c_in_the_ops_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def two_then_stop(quant: str, dtype: mx.Dtype, sizes: Any) -> Any:
        yield from op_cases.router_cases(quant, dtype, sizes)
        yield from op_cases.router_cases(quant, dtype, sizes)
        raise KeyboardInterrupt

    monkeypatch.setitem(op_cases.OPS, "router", two_then_stop)
    path = tmp_path / "out.json"
    assert ops_speed.main(["--op", "router,qmv", "--rounds", "2", "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert [row["op"] for row in report["rows"]] == ["qmv", "qmv"]
    assert {name: len(values) for name, values in report["rows"][0]["seconds"].items()} == {
        "chain": 2,
        "link": 2,
        "independent": 2,
        "gpu": 0,  # known on NVIDIA only
    }


@pytest.mark.usefixtures("quick")
def test_paths_take_turns_and_twins_avoid_the_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(subject, "has_kernels", lambda: True)
    measure, order = decode.measure, []

    def watched(model: Any, run: Any, tokens: int) -> None:
        order.append((run.number, run.path, bool(launcher._avoided)))
        measure(model, run, tokens)

    monkeypatch.setattr(decode, "measure", watched)
    arguments = ["--depths", "0", "--count", "2", "--rounds", "3", "--paths", "twins,kernels"]
    assert decode.main([*arguments, "--json", str(tmp_path / "out.json")]) == 0
    forth = [("twins", True), ("kernels", False)]
    assert order == [(number, *way) for number in range(4) for way in (forth if number % 2 else forth[::-1])]
    assert "depth 0: kernels and twins give the same first 9 of 9 tokens" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_a_depth_that_runs_out_of_memory_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = decode.measure

    def full(model: Any, run: Any, tokens: int) -> None:
        if run.depth > 0:
            raise RuntimeError("[malloc] Unable to allocate 99 bytes.")
        measure(model, run, tokens)

    monkeypatch.setattr(decode, "measure", full)
    path = tmp_path / "out.json"
    assert decode.main(["--depths", "0,20,30", "--count", "2", "--rounds", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [run["depth"] for run in report["runs"]] == [0, 0]
    assert report["notes"] == ["not measured: depth 20 and more: out of memory by twins"]


@pytest.mark.usefixtures("quick")
def test_a_file_is_read_and_loaded_in_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert load.main([str(SMALL_MODEL), "--rounds", "1", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    names = [f"{way}, {state}" for state in ("cold", "warm") for way in load.WAYS]
    assert {name: len(seconds) for name, seconds in report["seconds"].items()} == dict.fromkeys(names, 1)
    assert min(min(seconds) for seconds in report["seconds"].values()) > 0
    assert (report["file"], report["bytes"]) == ("small.gguf", SMALL_MODEL.stat().st_size)
    assert report["conditions"]["copy"]["gb_s"] > 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table if "cold" in line or "warm" in line] == names


@pytest.mark.usefixtures("quick")
def test_ctrl_c_while_loading_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0])

    def interrupted(*_: Any) -> float:
        try:
            return next(seconds)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(load, "measure", interrupted)
    path = tmp_path / "out.json"
    assert load.main([str(SMALL_MODEL), "--json", str(path)]) == 130
    report = json.loads(path.read_text())
    assert {name: s["median"] for name, s in report["summary"].items()} == {
        "read, new memory, cold": 1.0,
        "read, one buffer, cold": 2.0,
    }


@pytest.mark.usefixtures("quick")
def test_a_file_that_does_not_load_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too large for this machine, seen before anything is read; or the process that loads it fails."""
    monkeypatch.setattr(memory, "machine_memory", lambda: (1_000_000, "a test"))
    arguments = [str(SMALL_MODEL), "--rounds", "1", "--json", str(tmp_path / "out.json")]
    assert script.run(lambda: load.main(arguments)) == 2
    error = capsys.readouterr().err
    assert "small.gguf needs 5.7 MB of memory, this machine has 1.0 MB to give" in error
    assert error.count("\n") == 1
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"cannot load .*small.gguf: ZeroDivisionError: division by zero"):
        load.measure(SMALL_MODEL, "1 / 0", False)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("decode", ["--depths", "0,4090"], "depth 4,090 and more: the model's context ends at 4,096; give less"),
        ("decode", ["--model", "missing.gguf"], "no such file: missing.gguf"),
        ("decode", ["--model", "a.gguf", "--layers", "2"], "--layers takes layers of a synthetic model"),
        ("decode", ["--layers", "48"], "48 layers can't be made; take 1 to 47"),
        ("decode", ["--paths", "twins,kernels"], "this device launches no kernels; leave --paths out"),
        ("decode", ["--json", "/"], "cannot write /; name another file with --json"),
        ("ops_speed", ["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json"),
        ("load", ["--json", "/no/such/folder/x.json"], "cannot write /no/such/folder/x.json"),
        ("load", ["missing.gguf"], "no such file: missing.gguf"),
        ("load", [__file__], "is not a GGUF file"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_bad_input_is_one_line(
    name: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main = {"decode": decode, "ops_speed": ops_speed, "load": load}[name].main
    assert script.run(lambda: main(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "router,rout"], "'rout' is none of embed, "),
        (["--quant", "Q3_K"], "'Q3_K' is none of Q4_0, "),
        (["--rounds", "0"], "'0' is not a whole number from 1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        ops_speed.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("words", ["[malloc] Unable to allocate 9 bytes.", "cudaMalloc failed: out of memory"])
def test_too_little_memory_is_one_line(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> int:
        raise RuntimeError(words)

    assert script.run(full) == 2
    expected = f"error: out of memory: {words}; measure less deep contexts, or fewer layers\n"
    assert capsys.readouterr().err == expected


def test_other_faults_are_not_hidden() -> None:
    def wrong() -> int:
        raise RuntimeError("a fault of the program")

    with pytest.raises(RuntimeError, match="a fault"):
        script.run(wrong)


def test_k_stands_for_1024() -> None:
    assert script.listed(script.whole(0))("0,512,4k,128K") == [0, 512, 4096, 131072]


def test_a_cache_that_memory_has_no_room_for_is_refused() -> None:
    small = subject.open_subject(Namespace(model=None, synthetic=None, layers=None, mix="q4_0", kv_bits=16))
    tight = type(small)(**{**vars(small), "room": 6 * 160 * 4 * 2000})
    depths, notes = subject.usable_depths(tight, None, 37)
    assert depths == [0, 512]
    assert "the model's context ends at" in subject.usable_depths(small, None, 37)[1][0]
    assert len(notes) == 1
    with pytest.raises(InputError, match=r"cannot measure depth 1,900 and more: .* of memory are left for a cache"):
        subject.usable_depths(tight, [0, 1900], 37)


def test_paths_that_give_other_tokens_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [decode.Run(7, path, "prefill", tokens=ids) for path, ids in (("kernels", [1, 2, 3]), ("twins", [1, 2, 4]))]
    assert list(decode.agreement(runs)) == ["depth 7: kernels and twins give the same first 2 of 3 tokens"]


def test_a_table_is_never_cut_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    made = script.table("title", ["word", "number\nMB"])
    made.add_row("a" * 150, "1234567.89")
    script.show(["line " * 50], [made], ["note"])
    assert "a" * 150 + "  1234567.89" in capsys.readouterr().out


def test_primitives_of_a_graph_are_counted() -> None:
    x = mx.ones((4, 4))
    mx.eval(x)
    y = (x @ x + 1).reshape(16)
    found = launches.primitives(y)
    assert found == {"Matmul": 1, "Add": 1, "Reshape": 1, "Broadcast": 1}
    assert launches.launches(found) == 2


def test_parity_is_that_of_the_kernels_here_and_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of a decoded token that has a kernel is checked once; one that differs is named."""
    model = subject.open_subject(Namespace(model=None, synthetic=None, layers=None, mix="q4_0", kv_bits=16)).model
    nothing = conditions.parity(model)
    assert nothing == {"path": "twins", "checked": 0, "agree": None, "differ": []}
    assert "their twins, which define what is right, are the path" in conditions.describe_parity(nothing)

    asked: list[Case] = []

    def checked(case: Case, timed: bool) -> Result:
        asked.append(case)
        return Result(True, case.op in fine, None if case.op in fine else "5 values differ")

    monkeypatch.setattr(conditions, "has_kernels", lambda: True)
    monkeypatch.setattr(conditions, "check", checked)
    fine = set(launcher.OPS)
    found = conditions.parity(model)
    assert (found["path"], found["agree"], found["differ"]) == ("kernels", True, [])
    assert found["checked"] == len(asked) == len([case for case in decode_cases(model) if case.has_kernel]) > 8
    assert (
        conditions.describe_parity(found)
        == f"parity: {len(asked)} of {len(asked)} calls of kernels agree with their twins"
    )

    fine.remove("experts_down")
    found = conditions.parity(model)
    assert found["agree"] is False
    assert [one["error"] for one in found["differ"]] == ["5 values differ"]
    assert found["differ"][0]["call"].startswith("experts_down: 2 x Q4_0, 16x256x96")
    assert "experts_down" in conditions.describe_parity(found)
    assert "WRONG RESULT" in conditions.describe_parity(found)


def test_a_wrong_kernel_is_the_parity_state_of_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "has_kernels", lambda: True)
    wrong = conditions.parity_state(3, [{"call": "qmv, o", "error": "wrong result, off by 0.1"}])
    assert (wrong["agree"], wrong["checked"]) == (False, 3)
    assert "2 of 3 calls of kernels agree with their twins; qmv, o: wrong result" in conditions.describe_parity(wrong)


def test_a_commit_says_whether_the_files_are_those_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    status = {"rev-parse": "0123456789", "status": " M kernels/qmv.py"}
    monkeypatch.setattr(conditions, "_output", lambda *command: status[command[3]])
    assert (conditions.commit(), conditions.is_clean()) == ("0123456789+", False)
    status["status"] = ""
    assert (conditions.commit(), conditions.is_clean()) == ("0123456789", True)
    monkeypatch.setattr(conditions, "_output", lambda *command: None)
    assert (conditions.commit(), conditions.is_clean()) == (None, None)


@pytest.mark.parametrize(
    ("shown", "source"),
    [
        ("Now drawing from 'AC Power'", "AC power"),
        ("Now drawing from 'Battery Power'\n -InternalBattery-0", "battery"),
        ("Now drawing from 'UPS Power'", "UPS Power"),
        ("nothing", None),
        (None, None),
    ],
)
def test_a_mac_tells_its_power_source(shown: str | None, source: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(conditions, "_output", lambda *command: shown)
    assert conditions._power_source() == source


def test_conditions_can_be_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditions, "COPIES", (1, 8))
    monkeypatch.setattr(conditions, "available_memory", lambda: 1 << 26)
    found = conditions.conditions()
    assert json.loads(json.dumps(found, allow_nan=False))["copy"]["gb_s"] == found["copy"]["gb_s"]
    assert len(conditions.describe(found)) == 3
    assert found["copy"]["gb_s"] > 0.1
