"""What is compared: a commit, a folder, options, an environment or launch shapes, run in fresh processes."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from bench.conditions import ROOT
from glm_mlx.errors import InputError
from kernels import shapes
from kernels.shown import shown

Report: TypeAlias = dict[str, Any]  # the JSON of a benchmark
Rows: TypeAlias = dict[str, list[float]]  # seconds by row


@dataclass(frozen=True)
class Side:
    """The files that run, and what differs from how they run by themselves."""

    name: str
    tree: Path = field(default_factory=lambda: ROOT)
    options: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def opened(given: Sequence[str], measure: str) -> Iterator[list[Side]]:
    """Within the block their files and tables exist. Raises InputError for what names no side."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="glm-mlx-")))
        yield [_side(text, measure, folder / str(i), stack) for i, text in enumerate(given)]


def _side(text: str, measure: str, folder: Path, stack: ExitStack) -> Side:
    tree, name = Path(text).resolve(), text
    if not os.path.isdir(tree / "bench"):  # unlike the path's own, it takes a text that could be none
        words, why = _words(text)
        if words and text.lstrip().startswith("-"):
            return Side(text.strip(), options=tuple(words))
        if words and all(re.match(r"[A-Za-z_]\w*=", word) for word in words):
            return Side(text, environment=dict(word.split("=", 1) for word in words))
        if text.endswith(".json"):
            try:
                return with_table(text, shapes.read(Path(text)), folder)
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                raise InputError(f"cannot use the launch shapes of {shown(text)}: {reason}") from None
        commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{text}^{{commit}}")
        if commit is None:
            raise InputError(
                f"{shown(text)!r} is no commit here, no folder of this project, no table of launch shapes (.json), no "
                f"NAME=VALUE and no option of {measure}.py{why}"
            )
        tree, name = folder, commit[:10] if commit.startswith(text) else f"{text} ({commit[:10]})"
        if _git("worktree", "add", "--detach", "--quiet", str(tree), commit) is None:
            raise InputError(f"git cannot write the files of {shown(text)} to {shown(tree)}; is there room?")
        stack.callback(_git, "worktree", "remove", "--force", str(tree))
    if not (tree / "bench" / f"{measure}.py").is_file():
        raise InputError(f"{shown(text)} has no bench/{measure}.py; choose another --measure or a later commit")
    return Side(name, tree)


def _words(text: str) -> tuple[list[str], str]:
    """As a shell would split it; else none, and why not, for the end of a line."""
    try:
        return shlex.split(text), ""
    except ValueError as error:
        return [], f" ({str(error).lower()})"


def with_table(name: str, table: shapes.Table, folder: Path) -> Side:
    """These files with a table in the place of the user's own. `folder` becomes their cache folder."""
    environment = {"XDG_CACHE_HOME": str(folder)}
    if "HF_HOME" not in os.environ:  # models of the hub stay where they are, by its own rule
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        environment["HF_HOME"] = os.path.expanduser(os.path.join(cache, "huggingface"))
    shapes.write(folder / "glm-mlx" / shapes.user_file().name, table)
    return Side(name, environment=environment)


def _git(*words: str) -> str | None:
    """What git says about this checkout; None where it fails or is missing."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def run(side: Side, measure: str, options: Sequence[str]) -> Report:
    """A benchmark in a process of its own. Raises InputError with the last line of one that fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        script = side.tree / "bench" / f"{measure}.py"
        done = subprocess.run(
            [sys.executable, str(script), *options, *side.options, "--json", str(path)],
            env={**os.environ, **side.environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 130:
            raise KeyboardInterrupt
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
            raise InputError(f"{measure}.py failed with {side.name}: {said.removeprefix('error: ')}")
        report: Report = json.loads(path.read_text())
        return report


def rows_of(report: Report) -> Rows:
    """Of what the product runs: of its kernels, or of their twins where there are none.

    Of the parts of a block the whole alone, and of two kinds of layers the usual one. An op's and a block's time is the
    GPU's own where that is known: whether a user feels it, who waits for the host too, the whole model must show.
    """
    found: Rows = {}
    if report["script"] == "decode":
        for run in report["runs"]:
            row = f"depth {run['depth']:,}, {run['path']}"
            found.setdefault(row, []).extend(run["seconds"][report["warm_up_tokens"] :])
    elif report["script"] == "block":
        blocks = {(row["kind"], row["path"]): row["blocks_a_step"] for row in report["rows"]}
        runs = [run for run in report["runs"] if run["part"] == "block"]
        kind = "MoE" if any(run["kind"] == "MoE" for run in runs) else "dense"
        for run in runs:
            if run["kind"] == kind:
                steps = run["gpu"] or run["seconds"][report["warm_up_steps"] :]
                row = f"{kind} block, depth {run['depth']:,}, {run['path']}"
                found.setdefault(row, []).extend(s / blocks[kind, run["path"]] for s in steps)
    elif report["script"] == "ops_speed":
        by = "kernel" if any(row["by"] == "kernel" for row in report["rows"]) else "twin"
        for row in report["rows"]:
            if row["by"] == by and row["problem"] is None:
                name = ", ".join(part for part in (row["op"], row["shape"], row["type"]) if part != "-")
                found[name] = row["seconds"]["gpu"] or row["seconds"]["chain"]
    return found
