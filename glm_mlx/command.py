"""What the commands share: arguments, streams, exit codes, and errors of one line.

Exit codes: 0 done, 2 something that was given cannot be used, 130 stopped with Ctrl-C; a command may add others.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from glm_mlx.errors import InputError, is_out_of_memory
from kernels.shown import shown


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {shown(message)}; see -h", file=sys.stderr)
        sys.exit(2)


def context(text: str) -> int | None:
    """The value of --context; None is auto."""
    if text == "auto":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of tokens nor auto") from None


def run(work: Callable[[], int]) -> int:
    """The exit code of a command whose work is `work()`. What it raises for a user to know becomes one line."""
    _open_streams()
    try:
        return work()
    except InputError as error:
        return _error(str(error))
    except ImportError as error:  # mlx itself installs on Linux without anything to run on
        return _error(f"MLX does not start: {error}; on Linux install one back end: pip install '.[cpu]'")
    except KeyboardInterrupt:
        if sys.stderr.isatty():  # it may have come while a progress bar was about to do this
            print("\x1b[?25h", end="", file=sys.stderr)  # show the cursor
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has enough; a second complaint at exit must not follow
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _error(f"cannot go on: {error}; check the disk that the output goes to")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _error(f"out of memory: {error}; use a shorter prompt, close other programs, or take a smaller file")


def _error(line: str) -> int:
    print(f"error: {shown(line, 10_000)}", file=sys.stderr)  # whatever it quotes
    return 2


def _open_streams() -> None:
    """Standard streams that can take any text; a closed one becomes the null device."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
