"""Ctrl-C, SIGTERM and SIGHUP, from a command's first moment to its last."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from glm_mlx.early import quiet_start

ENDING = (signal.SIGTERM, signal.SIGHUP)  # asked to end; the terminal is gone


class Stopped(SystemExit):
    """The process was asked to end. `code` is what a shell reports of a process that a signal ended."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.code: int = 128 + number


@contextmanager
def importing() -> Iterator[None]:
    """Let Ctrl-C end the process at once: an exception in the midst of MLX's import aborts it."""
    before = signal.getsignal(signal.SIGINT)
    quiet_start()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def answered() -> Iterator[None]:
    """Make exceptions of signals: KeyboardInterrupt of Ctrl-C, `Stopped` of SIGTERM and SIGHUP.

    What shows a bar or reads a line thereby leaves the terminal as it was. A signal that is ignored stays so, as
    SIGHUP under nohup. Main thread only.
    """
    handlers = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(ENDING, _stop)}
    before = {number: signal.getsignal(number) for number in handlers}
    mine = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number in mine:
            signal.signal(number, before[number])


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
