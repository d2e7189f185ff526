"""What the commands share: arguments, streams, exit codes, and errors of one line.

Exit codes: 0 done, also where the reader of a pipe has enough; 2 something that was given cannot be used; 129, 130 and
143 stopped by SIGHUP, Ctrl-C and SIGTERM; a command may add others.
"""

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, NoReturn

from glm_mlx.errors import InputError, is_out_of_memory
from glm_mlx.signals import Stopped, answered
from kernels.shown import shown

LONGEST_SHOWN = 100  # characters of an argument in a complaint


class Parser(argparse.ArgumentParser):
    """Complains in one line, in which a long argument stands shortened."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(rf"\S{{{LONGEST_SHOWN + 1},}}", lambda found: f"{found[0][:LONGEST_SHOWN]}...", message)
        print(f"error: {shown(message)}; see -h", file=sys.stderr)
        sys.exit(2)

    def print_help(self, file: Any = None) -> None:
        """Print it, or raise OSError, which argparse would hide."""
        print(self.format_help(), end="", flush=True, file=file)


def whole(least: int) -> Callable[[str], int]:
    """An argument that must be a whole number from `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:  # no number, or one of more digits than Python reads
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return number

    return parse


def context(text: str) -> int | None:
    """The value of --context; None is auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor auto") from None


def run(work: Callable[[], int]) -> int:
    """The exit code of a command whose work is `work()`. What it raises for a user to know becomes one line.

    What cannot be written to standard error is lost, and nothing else: see `_open_streams`.
    """
    with _open_streams():
        try:
            with answered():
                return _outcome(work)
        except KeyboardInterrupt:
            code = 130
            print(file=sys.stderr)
        except Stopped as stopped:
            code = stopped.code
        if sys.stderr.isatty():  # the signal may have come while a progress bar was about to do this
            print("\x1b[?25h", end="", file=sys.stderr)  # show the cursor
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return code


def _outcome(work: Callable[[], int]) -> int:
    try:
        code = _named_errors(work)
        sys.stdout.flush()  # here, where what fails gets its line
        return code
    except BrokenPipeError:  # the reader of a pipe has enough
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        return _error(f"cannot go on: {error}; check the disk that the output goes to")


def _named_errors(work: Callable[[], int]) -> int:
    try:
        return work()
    except InputError as error:
        return _error(str(error))
    except ImportError as error:  # mlx itself installs on Linux without anything to run on
        return _error(f"MLX does not start: {error}; on Linux install one back end: pip install '.[cpu]'")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = f": {error}" if str(error) else ""
        return _error(f"out of memory{said}; use a shorter prompt, close other programs, or take a smaller file")


def _error(line: str) -> int:
    print(f"error: {shown(line, 10_000)}", file=sys.stderr)  # whatever it quotes
    return 2


def _drop_output() -> None:
    """Make standard output the null device, so that no second complaint follows at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Lossy(io.RawIOBase):
    """A raw stream that passes on what `stream` takes and forgets the rest: its reader may be gone, its disk full."""

    def __init__(self, stream: Any):
        self.stream = stream

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        try:
            written: int | None = self.stream.write(data)
        except OSError:
            written = None
        return len(data) if written is None else written

    def fileno(self) -> int:
        return int(self.stream.fileno())

    def isatty(self) -> bool:
        return bool(self.stream.isatty())


@contextmanager
def _open_streams() -> Iterator[None]:
    """Standard streams that can take any text; a closed one becomes the null device.

    Notes, bars and reasoning on standard error may not cost the answer on standard output. So until the end nothing
    that is written there raises.
    """
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    if not isinstance(sys.stderr, io.TextIOWrapper):
        yield
        return
    # Past the buffer, which would try again at exit what could not be written.
    raw: Any = getattr(sys.stderr.buffer, "raw", sys.stderr.buffer)
    lossy = io.TextIOWrapper(io.BufferedWriter(_Lossy(raw)), sys.stderr.encoding, "replace", line_buffering=True)
    with redirect_stderr(lossy):
        try:
            yield
        finally:
            lossy.flush()
