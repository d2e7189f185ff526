"""The frame of a benchmark: what was measured is kept, and the host's times are taken before CUPTI is used."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import block, compare, conditions, contest, decode, frame, gpu_time, op_timing, ops_speed, script, trace
from bench.frame import Frame

COPY = {"gb_s": 2.0, "bytes": 1, "seconds": {}, "by": "nothing"}
SHORT = ["--count", "1", "--rounds", "2"]


@pytest.mark.parametrize(
    ("module", "timed", "arguments"),
    [
        (decode, (decode, "measure"), ["--depths", "0,20", *SHORT]),
        (compare, (contest, "child"), ["--depths", "0,20", "--peers", "llama.cpp", *SHORT]),
        (block, (block, "measure"), ["--depths", "20,30", *SHORT]),
        (ops_speed, (op_timing.Timer, "sample"), ["--op", "router,heads", "--rounds", "1"]),
        (trace, (trace, "decode"), ["--depth", "20", "--count", "1"]),
    ],
    ids=["decode", "compare", "block", "ops_speed", "trace"],
)
def test_the_hosts_times_come_first_and_a_copy_last(
    module: Any, timed: tuple[Any, str], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured is written, though the copy fails."""
    order: list[str] = []

    def told(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: order.append(name) or work(*args)

    def full() -> None:
        raise RuntimeError("[malloc] Unable to allocate 99 bytes.")

    monkeypatch.setattr(block, "BEYOND_CACHES", {"cpu": 1})
    monkeypatch.setattr(*timed, told("host", getattr(*timed)))
    monkeypatch.setattr(gpu_time, "available", lambda: True)
    monkeypatch.setattr(gpu_time, "record", told("GPU", lambda work: gpu_time.Timeline([], 0)))
    monkeypatch.setattr(gpu_time, "busy_seconds", told("GPU", lambda work: 1e-3))
    monkeypatch.setattr(conditions, "copy_bandwidth", told("too early", lambda: COPY))
    monkeypatch.setattr(frame, "copy_bandwidth", told("copy", full))
    path = tmp_path / "out.json"
    assert script.run(lambda: module.main([*arguments, "--json", str(path)])) == 0
    assert order == sorted(order, key=["host", "GPU", "copy"].index)
    assert order.count("host") >= 3
    assert order.count("copy") == 1
    assert ("GPU" in order) == (module in (block, ops_speed, trace))
    report = json.loads(path.read_text())
    assert report["script"] == module.__name__.removeprefix("bench.")
    assert report["conditions"]["copy"] is None
    assert "how fast memory is copied is not known: [malloc] Unable to allocate 99 bytes." in report["notes"]
    assert all(row.get("of_copy") is None for row in report.get("rows", []))
    assert report["rows" if module is not trace else "phases"]


def run(tmp_path: Path, work: Callable[[], object]) -> tuple[int, dict[str, Any]]:
    def main() -> int:
        made = Frame("test", tmp_path / "out.json")
        measured: list[int] = []
        with made.measuring():
            measured.append(1)
            work()
            measured.append(2)
        return made.finish([f"{len(measured)} measured"], [], {"measured": measured})

    code = script.run(main)
    return code, json.loads((tmp_path / "out.json").read_text())


def raising(error: BaseException) -> Callable[[], Any]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code", "notes"),
    [
        (KeyboardInterrupt(), 130, ["interrupted: this is what was measured until then"]),
        (RuntimeError("CUPTI failed"), 0, ["how fast memory is copied is not known: CUPTI failed"]),
    ],
)
def test_a_copy_that_is_not_timed_costs_nothing_else(
    error: BaseException,
    code: int,
    notes: Sequence[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(frame, "copy_bandwidth", raising(error))
    ended, report = run(tmp_path, lambda: None)
    assert ended == code
    assert (report["measured"], report["notes"], report["interrupted"]) == ([1, 2], notes, code == 130)
    shown = capsys.readouterr().out
    assert "2 measured" in shown
    assert "memory bandwidth not measured" in shown


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(KeyboardInterrupt(), 130, ""), (MemoryError("too much"), 2, "error: out of memory: too much; measure less")],
)
def test_what_was_measured_before_the_end_is_kept(
    error: BaseException,
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: COPY)
    ended, report = run(tmp_path, raising(error))
    assert (ended, report["measured"], report["interrupted"]) == (code, [1], True)
    assert report["conditions"]["copy"] == COPY
    done = capsys.readouterr()
    assert "this is what was measured until then" in done.out
    assert says in done.err


def test_a_fault_is_told_with_its_traceback_and_behind_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(frame, "copy_bandwidth", lambda: COPY)
    with pytest.raises(ValueError, match="a fault of the program"):
        run(tmp_path, raising(ValueError("a fault of the program")))
    assert "1 measured" in capsys.readouterr().out


@pytest.mark.parametrize(("room", "seconds"), [(0, {4: 1.0, 16: 2.0}), (1 << 20, {4: 2.0, 16: 2.0})])
def test_no_speed_of_a_copy_is_0_or_less(room: int, seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is short, or more copies took no longer."""
    times = iter([end for copies in (16, 16, 4, 4, 4, 16, 16, 16) for end in (0.0, seconds[copies])])
    monkeypatch.setattr(conditions, "available_memory", lambda: room)
    monkeypatch.setattr(conditions.time, "perf_counter", lambda: next(times))
    assert conditions.copy_bandwidth() is None
