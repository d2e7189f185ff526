"""Checks of kernels in a process of their own, which a kernel may take down or hang."""

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import mlx.core as mx

from glm_mlx.compositions import read_small
from glm_mlx.model import Model
from glm_mlx.model_cases import chunk_cases, decode_cases, prompt_cases
from kernels.cases import Case
from kernels.check import Result, check

LONGEST = 60.0  # seconds that an answer may take
COMPILED = "compiled"


@dataclass(frozen=True)
class Variant:
    """A row of doctor's table. Calls that differ in the shapes of their weights alone are the same variant."""

    op: str
    what: str
    activations: str


class Rows:
    """The kernels of one model after another, checked in this process."""

    def open(self, file: Path, dtype: mx.Dtype) -> list[Variant]:
        """The variants that this model has, with its cache in 16 bits and in 8; what `check` counts."""
        cfg, weights = read_small(file)
        model = Model(cfg, weights, dtype)
        in_8_bits = [case for case in decode_cases(Model(cfg, weights, dtype, kv_bits=8)) if case.op == "mla_decode"]
        found: dict[Variant, Case] = {}
        for case in [*decode_cases(model), *chunk_cases(model), *in_8_bits, *prompt_cases(model)]:
            what = case.variant if case.types else ", ".join(filter(None, (case.variant, case.shapes)))
            tokens = f"{case.tokens} token{'s' * (case.tokens > 1)}"
            if case.has_kernel:
                found.setdefault(Variant(case.op, what, f"{case.dtype}, {tokens}"), case)
        self.cases = list(found.values())
        return list(found)

    def check(self, index: int, timed: bool, on_compiled: Callable[[], None] = lambda: None) -> Result:
        return check(self.cases[index], timed, on_compiled)

    def close(self) -> None:
        self.cases = []


class LostError(Exception):
    """The process has died, or does not answer; `compiled` is whether the kernel was."""

    def __init__(self, why: str, compiled: bool = False):
        super().__init__(why)
        self.compiled = compiled


class Isolated:
    """`Rows` in another process. Whatever fails there, the next check gets a new one.

    A kernel may take its process down, leave the GPU unusable for it, or never end.
    """

    def __init__(self, serve: Callable[[Connection], None] | None = None, longest: float = LONGEST):
        self.serve, self.longest = serve or _serve, longest
        self.process: multiprocessing.process.BaseProcess | None = None

    def open(self, file: Path, dtype: mx.Dtype) -> list[Variant]:
        """Raises LostError."""
        self.opened = file, dtype
        if self.process is None:
            self._start()
        variants: list[Variant] = self._ask("open", file, str(dtype).removeprefix("mlx.core."))
        return variants

    def check(self, index: int, timed: bool) -> Result:
        try:
            if self.process is None:
                self.open(*self.opened)
            result: Result = self._ask("check", index, timed)
        except LostError as lost:
            result = Result(lost.compiled, error=str(lost))
        if result.error:
            self.close()
        return result

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a GPU's context does not survive a fork
        self.connection, theirs = context.Pipe()
        process = context.Process(target=self.serve, args=(theirs,), daemon=True)
        # Ctrl-C is the parent's to answer, from the first moment: a signal that is blocked here is blocked there. The
        # tracker, which would be started on the way, unblocks it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.process = process
        theirs.close()  # so that its end shows here

    def _ask(self, *request: Any) -> Any:
        process, compiled = self.process, False
        assert process is not None
        try:
            self.connection.send(request)
            while self.connection.poll(self.longest):
                answer = self.connection.recv()
                if isinstance(answer, LostError):
                    raise answer
                if answer != COMPILED:
                    return answer
                compiled = True
            why = f"no answer in {self.longest:g} s"
        except (EOFError, ConnectionError):
            process.join()
            why = f"the process ended with {_named(process.exitcode)}"
        self.close()
        raise LostError(why, compiled)


def _serve(connection: Connection) -> None:
    """In the other process, until it is killed: a request in, an answer out, and before it `COMPILED` of a kernel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    rows = Rows()
    while True:
        match connection.recv():
            case "open", file, dtype:
                try:
                    connection.send(rows.open(file, getattr(mx, dtype)))
                except Exception as error:  # whatever MLX or a driver raises
                    connection.send(LostError(str(error) or repr(error)))
            case "check", index, timed:
                connection.send(rows.check(index, timed, lambda: connection.send(COMPILED)))


def _named(exit_code: int | None) -> str:
    with suppress(ValueError, TypeError):
        return signal.Signals(-exit_code).name  # type: ignore[operator]
    return f"exit code {exit_code}"
