"""What the scripts of this folder share: arguments, tables and JSON files."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlx.core as mx
from rich import box
from rich.measure import Measurement
from rich.table import Table

from glm_mlx import command
from glm_mlx.console import Console
from glm_mlx.errors import InputError, is_out_of_memory
from kernels.cache_folder import private_folder
from kernels.launcher import KernelRefusedError
from kernels.shapes import user_file
from kernels.shown import shown

WIDE = Console(width=1000).options
NOTES = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def parser(name: str, doc: str | None) -> command.Parser:
    """`doc`: the script's own, whose first line says what it does and whose rest is shown below the options."""
    summary, _, rest = (doc or "").partition("\n")
    made = command.Parser(
        prog=f"python bench/{name}.py",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="where every sample goes (default: a new file in the user's cache)"
    )
    return made


def whole(least: int) -> Callable[[str], int]:
    """An argument that must be a whole number from `least`; "4k" is 4096."""

    def parse(text: str) -> int:
        digits, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
        if not digits.isascii() or not digits.isdigit() or int(digits) * factor < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(digits) * factor

    return parse


def listed(items: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argument with several values, and commas between them."""

    def parse(text: str) -> list[Any]:
        return [items(item) for item in text.split(",")]

    return parse


def choice(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")
        return text

    return parse


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def results_file(name: str, given: Path | None) -> Path:
    """Where the JSON of a run goes. Raises InputError now, and not after the run, where that can't be written."""
    if given is None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        try:
            given = private_folder("bench") / f"{name}-{stamp}-{os.getpid()}.json"
        except OSError as error:
            raise InputError(f"there is no cache folder for results: {error}; name a file with --json") from None
    if given.is_dir() or not os.access(given if given.exists() else given.parent, os.W_OK):
        raise InputError(f"cannot write {shown(given)}; name another file with --json")
    return given


def write_json(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    NOTES.print(f"every sample and the conditions: {shown(path)}", style="dim", markup=False)


def table(title: str, columns: Sequence[str], words: int = 1) -> Table:
    """An empty table whose first `words` columns hold words, the others numbers. Names may have several lines."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if sys.stdout.isatty() else None)
    made.pad_edge = False
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < words else "right", no_wrap=True)
    return made


def counted(number: int, noun: str) -> str:
    """As in a sentence: 1 round, 2 rounds."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def share(part: float | None) -> str:
    """In a table."""
    return "-" if part is None else f"{part:.1%}"


def show(lines: Sequence[str], tables: Sequence[Table], notes: Sequence[str] = ()) -> None:
    """Lines, tables and notes on standard output, plain in a pipe. No number is cut off: a terminal may wrap a row."""
    console = Console(highlight=False, emoji=False)
    console.width = max(console.width, *(Measurement.get(console, WIDE, made).maximum for made in tables), 80)
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    for made in tables:
        console.print()
        console.print(made)
    if notes:
        console.print()
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)


def run(work: Callable[[], int]) -> int:
    """`glm_mlx.command.run`, with what helps a benchmark that runs out of memory."""

    def measured() -> int:
        try:
            return work()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"out of memory: {error}; measure less deep contexts, or fewer layers") from None
        except KernelRefusedError as error:
            raise InputError(f"{error}; mend the launch shapes in {user_file()}") from None

    return command.run(measured)
