"""Launch shapes: how many rows, simdgroups and chunks at once a launch takes, by device, op and what it works on.

The constants of each op's module hold unless a table says better. `bench/tune.py` makes two: shapes.json beside this
file, for families of Apple's chips and NVIDIA's GPUs by name, and the user's own in their cache folder, which goes
first.

    {"Apple M3": {"experts_down": {"Q4_0 2048x1536": {"ROWS": 4, "DEPTH": 6}}}}

Device or family, op, what it works on, and then the names that the op's module has for its constants; those not named
stay. An entry with "text", the digest of a kernel's text, is for that text alone: another one is to be tuned anew.

A shape is tuned for one token and used for one; a launch for more takes the constants. One that no device could run is
refused by `launcher.prepare`.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeAlias

import mlx.core as mx

from kernels.cache_folder import cache_folder, read_own, write_whole
from kernels.shown import shown

HERE = Path(__file__).resolve().parent
SHIPPED = HERE / "shapes.json"
MOST = 1024  # that a parameter may be: no device has more threads in a threadgroup

Entry: TypeAlias = dict[str, int | str]
Table: TypeAlias = dict[str, dict[str, dict[str, Entry]]]  # by device or family, op, what


@dataclass(frozen=True)
class Asked:
    """What an op asked for. `values`: what it got, by the names of its constants."""

    op: str
    what: str
    values: Mapping[str, int]


_tried: Mapping[tuple[str, str], Mapping[str, int]] | None = None
_asked: list[Asked] | None = None


def launch_shape(op: str, what: str, tokens: int, **constants: int) -> tuple[int, ...]:
    """The parameters of a launch, in the order of `constants`, which says what holds where no table says better."""
    values = dict(constants)
    if tokens == 1:
        values |= _from_tables(op, what, tuple(constants)) if _tried is None else _tried.get((op, what), {})
        if _asked is not None:
            _asked.append(Asked(op, what, values))
    return tuple(values.values())


def matrix_names(kinds: Sequence[tuple[str, tuple[int, ...]]], heads: int = 1) -> str:
    """How tables name what a launch works on: "Q4_0 768x2048 + Q8_0 576x2048", "20 heads, Q8_0 512x192".

    kinds: as `launcher.kind` has them, (E, rows, cols) of experts, who are the same however many there are.
    """
    names = [f"{kind} {shape[-2]}x{shape[-1]}" for kind, shape in kinds]
    return (f"{heads} heads, " if heads > 1 else "") + " + ".join(names)


@contextmanager
def trying(shapes: Mapping[tuple[str, str], Mapping[str, int]]) -> Iterator[None]:
    """Within the block these hold, by (op, what), and no table. An op keeps prepared launches: they must go before."""
    global _tried
    before, _tried = _tried, shapes
    try:
        yield
    finally:
        _tried = before


@contextmanager
def asking() -> Iterator[list[Asked]]:
    """Within the block what is asked for one token comes to the list, when a launch is prepared."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before


def device() -> tuple[str, str] | None:
    """The name of the device that launches kernels and of its family; None on a CPU."""
    if mx.default_device() != mx.Device(mx.gpu):
        return None
    info = mx.device_info()
    name, architecture = str(info.get("device_name", "")), str(info.get("architecture", ""))
    generation = re.match(r"Apple M\d+", name)
    return name, generation[0] if generation else f"NVIDIA {architecture}"


def user_file() -> Path:
    return cache_folder() / "shapes.json"


def read(path: Path) -> Table:
    """Raises OSError, or ValueError that says what is wrong. The user's own must be a file in a private folder."""
    try:
        content = read_own(path) if path == user_file() else path.read_bytes()
        table: Table = json.loads(content)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    for device_name, ops in _items(table, "the table"):
        where = shown(device_name, 80)
        for op, entries in _items(ops, where):
            for what, entry in _items(entries, f"{where}, {shown(op, 80)}"):
                at = f"{where}, {shown(op, 80)}, {shown(what, 80)}"
                for name, value in _items(entry, at):
                    good = type(value) is str if name == "text" else type(value) is int and 1 <= value <= MOST
                    if not good:
                        raise ValueError(
                            f"{at}: {shown(name, 80)} is {shorten(repr(value), 40)}, not a whole number to {MOST}"
                        )
    return table


def write(path: Path, table: Table) -> None:
    """An entry a line, sorted. A reader sees the old table or the new one. Raises OSError."""
    write_whole(path, (_text(table, "\n") + "\n").encode())


def with_entry(table: Table, where: str, op: str, what: str, entry: Entry) -> Table:
    """A new table. `where`: a device or family."""
    of_device = table.get(where, {})
    return {**table, where: {**of_device, op: {**of_device.get(op, {}), what: entry}}}


def text_digest(op: str) -> str:
    """Of all that an op may launch, which begins as its own name does: mla_merge belongs to mla_decode."""
    paths = (HERE / "quants.h.metal", *sorted(HERE.glob(f"{op.partition('_')[0]}*.metal")))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:8]


@cache
def _from_tables(op: str, what: str, names: tuple[str, ...]) -> Mapping[str, int]:
    for path, table in _tables():
        for where in device() or ():
            entry = table.get(where, {}).get(op, {}).get(what)
            if entry is None:
                continue
            at = f"{path}, {where}, {op}, {what}"
            if entry.get("text", text_digest(op)) != text_digest(op):
                _note(f"{at}: found for another text of the kernel and not used; python bench/tune.py finds it anew")
                continue
            if unknown := [name for name in entry if name not in (*names, "text")]:
                _note(f"{at}: not used, as the op has {', '.join(names)} and no {', '.join(unknown)}")
                continue
            return {name: value for name, value in entry.items() if isinstance(value, int)}
    return {}


@cache
def _tables() -> list[tuple[Path, Table]]:
    tables = []
    for path in (user_file(), SHIPPED):
        try:
            tables.append((path, read(path)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            if os.path.lexists(path):  # else it is a cache folder that is not used
                _note(f"cannot use the launch shapes of {path} ({error}); mend or remove it")
    return tables


def _items(value: object, name: str) -> ItemsView[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shorten(repr(value), 40)}, no object of names and values")
    return value.items()


def _text(value: object, end: str) -> str:
    """JSON, with an entry on one line."""
    if not isinstance(value, dict) or not any(isinstance(item, dict) for item in value.values()):
        return json.dumps(value)
    inner = end + " "
    items = [f"{inner}{json.dumps(key)}: {_text(value[key], inner)}" for key in sorted(value)]
    return "{" + ",".join(items) + end + "}"


def _note(line: str) -> None:
    print(f"note: {shown(line)}", file=sys.stderr)
