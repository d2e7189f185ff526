"""Shared files, and the table of worst errors at the end of a run."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest
from rich.console import Console
from rich.table import Table

from bench.conditions import commit
from glm_mlx.make_tiny import TinySpec, make_tiny
from kernels.compiled import compile_ahead
from kernels.launcher import Launch
from parity_tests import budgets

MakeModel = Callable[[TinySpec], Path]
_reports: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "gpu"), default="cpu", help="where MLX runs: cpu (what CI proves), or gpu"
    )
    parser.addoption(
        "--soak-tokens", type=int, default=0, metavar="N", help="generate so many where memory is watched (100000)"
    )
    parser.addoption("--errors-to", metavar="FILE", help="write the worst errors and the conditions as JSON")


@pytest.fixture(autouse=True, scope="session")
def _device(pytestconfig: pytest.Config) -> Iterator[None]:
    on_gpu = pytestconfig.getoption("--device") == "gpu"
    mx.set_default_device(mx.gpu if on_gpu else mx.cpu)
    with mock.patch.object(Launch, "__call__", _compiled_ahead) if on_gpu else nullcontext():
        yield


def _compiled_ahead(launch: Launch, *arrays: mx.array) -> list[mx.array]:
    """MLX on CUDA would take several times as long to compile each of a thousand kernels, in every process anew."""
    if id(launch) not in _seen:
        _seen[id(launch)] = launch
        compile_ahead([(launch, arrays)])
    return _launch(launch, *arrays)


_launch, _seen = Launch.__call__, dict[int, Launch]()


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """For what only MLX's operations on a CPU do: float32 where kernels write 16 bits, memory to the byte."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function from spec to file; each file is written once."""
    folder = tmp_path_factory.mktemp("models")
    files: dict[str, Path] = {}

    def make(spec: TinySpec) -> Path:
        key = repr(spec)
        if key not in files:
            files[key] = make_tiny(folder / f"{len(files)}.gguf", spec)
        return files[key]

    return make


def pytest_sessionfinish(session: pytest.Session) -> None:
    report = {"worst": budgets.worst, "checks": budgets.checks}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["budgets"] = report
    else:
        _reports.append(report)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    _reports.append(getattr(node, "workeroutput", {}).get("budgets", {"worst": {}, "checks": {}}))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows = []
    for kind, budget in budgets.BUDGETS.items():
        seen = [report["worst"][kind] for report in _reports if kind in report["worst"]]
        if seen:
            error, where = max(seen)
            count = sum(report["checks"].get(kind, 0) for report in _reports)
            rows.append({"class": kind, "checks": count, "worst": error, "budget": budget.most, "where": where})
    if rows:
        table = Table("class", "checks", "worst error", "budget", "where", title="worst error of each class")
        for row in rows:
            table.add_row(row["class"], str(row["checks"]), f"{row['worst']:.3g}", f"{row['budget']:.3g}", row["where"])
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        terminalreporter.write_line(capture.get())
    if (seed := config.getoption("randomly_seed", None)) is not None:
        terminalreporter.write_line(f"order of tests: --randomly-seed={seed}")
    if path := config.getoption("--errors-to"):
        counts = {outcome: len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed", "error")}
        conditions = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": {
                key: str(value) for key, value in mx.device_info().items() if key in ("device_name", "architecture")
            },
            "mlx": version("mlx"),
            "tinygrad": version("tinygrad"),
            "tests": [argument for argument in config.args if "/" in argument],
        }
        Path(path).write_text(json.dumps({"conditions": conditions, "tests": counts, "errors": rows}, indent=1) + "\n")
