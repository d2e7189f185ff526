"""Contestants of a comparison: their turns, and a contestant whose every round is a process of its own."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from bench.conditions import ROOT
from glm_mlx.errors import InputError
from kernels.shown import shown

OURS = "glm-mlx"
ALONE = 0  # number of the round in which each peer runs before this project runs at all
CHILD = ROOT / "bench" / "contestant.py"


class UnavailableError(Exception):
    """A contestant can't take part: one line with why, and what to do."""


@dataclass
class Turn:
    """One prompt, read, and the tokens after it; times in seconds.

    number: of the round, or ALONE. cold_time_to_first_token: in the generation before, which warms up and counts in no
    figure. seconds: of each counted token, or one mean of `mean_of` tokens where a program tells no more.
    """

    number: int
    depth: int
    by: str
    fill: str
    cold_time_to_first_token: float | None = None
    time_to_first_token: float | None = None
    warm_up: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    mean_of: int = 1
    tokens: list[int] = field(default_factory=list)

    @property
    def prefill_tok_s(self) -> float | None:
        """None where no prompt was read, or one of a single token."""
        if self.time_to_first_token is None or self.depth < 2:
            return None
        return self.depth / self.time_to_first_token


class Contestant(Protocol):
    """details: for the JSON file. notes: one line each, for a person. Both may grow with every turn."""

    name: str
    details: dict[str, Any]
    notes: list[str]

    def take(self, blank: Sequence[Turn], count: int) -> Iterator[Turn]:
        """Fill one turn after the other, warmed up by a generation like it, with `count` tokens.

        What it raises ends this contestant at the depth of the turn that was to come.
        """


def prompt_tokens(depth: int, vocab_size: int) -> list[int]:
    """The prompt that everybody reads who takes one: the one of `bench/decode.py`."""
    prompt: list[int] = np.random.default_rng(0).integers(0, vocab_size, max(depth, 1)).tolist()
    return prompt


class OwnProcess:
    """A contestant whose every round is a fresh process, with no other model in memory beside it.

    So each of its figures is that of a run alone, and a machine that holds one model can compare two.
    """

    def __init__(self, name: str, model: Sequence[str], details: dict[str, Any], notes: list[str]):
        """`model`: the options that name it, as `bench.subject` reads them."""
        self.name, self.model, self.details, self.notes = name, model, details, notes

    def take(self, blank: Sequence[Turn], count: int) -> Iterator[Turn]:
        wanted = [f"{turn.depth}:{turn.fill}" for turn in blank]
        with child(self.name, *self.model, "--turns", ",".join(wanted), "--count", str(count)) as lines:
            for turn in blank:
                line = next(lines, None)
                if line is None:
                    raise UnavailableError(f"its process ended before depth {turn.depth:,}")
                yield Turn(**{**line, "number": turn.number, "by": turn.by})


@contextmanager
def child(*arguments: str) -> Iterator[Iterator[dict[str, Any]]]:
    """Run bench/contestant.py and give what it says, as it comes; the process does not outlive the block.

    Reading raises what ended the work there: InputError, UnavailableError, MemoryError, or RuntimeError with the
    traceback. A process that dies without a word (a signal) is an UnavailableError.
    """
    command = [sys.executable, str(CHILD), *arguments]
    with tempfile.TemporaryFile("w+", errors="replace") as complaints:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaints, text=True)

        def said() -> Iterator[dict[str, Any]]:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if "problem" in found:
                    raise PROBLEMS[found["problem"]](found["why"])
                yield found
            if process.wait():
                complaints.seek(0)
                last = (complaints.read().strip().splitlines() or ["nothing on its standard error"])[-1]
                raise UnavailableError(f"its process ended with {process.returncode}: {shown(last, 300)}")

        try:
            yield said()
            process.wait()  # its memory is free once it is gone
        finally:
            process.terminate()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


PROBLEMS: dict[str, type[Exception]] = {
    "input": InputError,
    "unavailable": UnavailableError,
    "memory": MemoryError,
    "fault": RuntimeError,
}
