"""llama.cpp as a contestant, through its own `llama-bench`, on the same file.

Facts are from llama.cpp `tools/llama-bench` (its README and `llama-bench.cpp` of 2026): prompts and contexts are made
up of its own random tokens; a test warms up with a prompt of its size or one token; `-d` reads a context first, outside
of the time; a repetition gives one figure, without sampling.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.contest import Turn, UnavailableError
from kernels.shown import shown

TOLD = (
    "build_commit",
    "build_number",
    "backends",
    "gpu_info",
    "cpu_info",
    "model_type",
    "n_threads",
    "flash_attn",
    "type_k",
)


class LlamaBench:
    """Each turn starts the program anew, which loads the model; the time of loading counts nowhere."""

    name = "llama.cpp"

    def __init__(self, model: Path | None, given: Path | None):
        """`model`: the file, None for random weights. `given`: the program, else it is looked up on the PATH.

        Raises UnavailableError where one of them is missing.
        """
        if model is None:
            raise UnavailableError("it needs a file, and random weights have none: compare with --model FILE.gguf")
        program = shutil.which(str(given or "llama-bench"))
        if program is None:
            raise UnavailableError(
                "no llama-bench on the PATH: brew install llama.cpp, or build github.com/ggml-org/llama.cpp and name "
                "it with --llama-bench PATH"
            )
        self.command = [program, "-m", str(model), "-o", "json", "-fa", "1"]
        self.details: dict[str, Any] = {"command": " ".join(["llama-bench", *self.command[3:]])}
        self.notes = [
            "llama.cpp reads random tokens of its own, and tells the mean of a round instead of every token; what it "
            "computes was not compared with ours"
        ]

    def take(self, blank: Sequence[Turn], count: int) -> Iterator[Turn]:
        for turn in blank:
            self._measure(turn, count)
            yield turn

    def _measure(self, turn: Turn, count: int) -> None:
        if turn.fill == "prefill" and turn.depth > 1:
            (prompt,) = self._run("-p", turn.depth, "-n", 0, "-r", 1)
            turn.time_to_first_token = prompt
        # The first repetition is what the others' first tokens are: kernels and graphs are made in it.
        first, second = self._run("-p", 0, "-n", count, "-d", turn.depth, "-r", 2)
        turn.warm_up, turn.seconds, turn.mean_of = [first / count], [second / count], count

    def _run(self, *options: str | int) -> list[float]:
        """Seconds of each repetition of the one test that these options ask for.

        Raises UnavailableError where the program fails.
        """
        done = subprocess.run([*self.command, *map(str, options)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            telling = [line for line in lines if re.search("error|fail|assert", line, re.IGNORECASE)]
            said = (telling or lines or ["nothing on its standard error"])[-1]
            raise UnavailableError(
                f"llama-bench {' '.join(map(str, options))} ended with {done.returncode}: {shown(said, 300)}"
            )
        try:
            (test,) = json.loads(done.stdout)
            seconds = [ns / 1e9 for ns in test["samples_ns"]]
            self.details |= {key: test[key] for key in TOLD if key in test}
        except (ValueError, TypeError, KeyError):
            raise UnavailableError(
                f"llama-bench gave no JSON with samples_ns but {shown(done.stdout, 100)}; take a newer llama.cpp"
            ) from None
        if len(seconds) != options[-1] or not all(s > 0 for s in seconds):
            raise UnavailableError(f"llama-bench gave the times {seconds} for {options[-1]} repetitions")
        return seconds
