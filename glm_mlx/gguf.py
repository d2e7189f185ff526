"""Read the header of a GGUF file (v2, v3, single or split) and hand out its tensors as views of a memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Types, sizes and constants come from the `gguf`
package. The header walk is our own because `gguf.GGUFReader` keeps four arrays for every string of the vocabulary and
does not end on a damaged array count (DECISIONS 4).

Nothing is allocated on the word of a header: every count is first held against the bytes that are left in the file,
and no header is longer than `MAX_HEADER`. What llama.cpp's reader refuses (`gguf.cpp` at 067d44f6) is refused here too:
arrays of arrays, and tensors that do not follow one another without a gap, the mark of a damaged type, shape or offset.
"""

import mmap
import os
import re
import reprlib
import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGUF_MAGIC,
    GGMLQuantizationType,
    GGUFValueType,
    Keys,
)

from glm_mlx.errors import InputError
from kernels.shown import shown

MAX_DIMS = 4  # GGML_MAX_DIMS
MAX_HEADER = 1 << 26  # bytes; GLM-4.7-Flash has 9 million, and a damaged count must not claim the weights as well
SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in numpy order: rows before columns, the contraction dimension last."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    part: int
    offset: int  # bytes from the start of the part
    nbytes: int


class _Cursor:
    """A position in the header; every read is held against the end of the file. `path` is ready to be printed."""

    def __init__(self, data: mmap.mmap, path: str):
        self.data, self.path, self.pos, self.end = data, path, 0, min(len(data), MAX_HEADER)

    def take(self, nbytes: int, what: str) -> int:
        """Move past `nbytes` and return where they begin."""
        start = self.pos
        if nbytes > self.end - start:
            if nbytes <= len(self.data) - start:
                raise InputError(
                    f"{self.path}: {what} at byte {start} claims {nbytes:,} bytes, and no header has more than "
                    f"{MAX_HEADER:,}; the file is damaged"
                )
            raise InputError(
                f"{self.path} ends inside its header: {what} at byte {start} needs {nbytes:,} bytes, "
                f"{self.end - start:,} are left; download the file again"
            )
        self.pos = start + nbytes
        return start

    def number(self, code: str, what: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        start = self.take(self.number("Q", what), what)
        return self.data[start : self.pos].decode("utf-8", errors="replace")

    def value_type(self, what: str) -> GGUFValueType:
        number = self.number("I", what)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise InputError(
                f"{self.path}: {what} has the unknown value type {number}; the file is damaged or too new"
            ) from None

    def value(self, kind: GGUFValueType, what: str) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind], what)
        if kind == GGUFValueType.STRING:
            return self.string(what)
        item, count = self.value_type(what), self.number("Q", what)
        if item == GGUFValueType.ARRAY:
            raise InputError(f"{self.path}: {what} is an array of arrays, which no model has; the file is damaged")
        if item in SCALARS:
            code = np.dtype(SCALARS[item]).newbyteorder("<")
            start = self.take(count * code.itemsize, what)
            return np.frombuffer(self.data, code, count, start).tolist()
        if count * 8 > self.end - self.pos:  # an empty string has 8 bytes
            self.take(count * 8, what)
        return self._strings(count, what)

    def _strings(self, count: int, what: str) -> list[str]:
        """An array of strings: the vocabulary and its merges, half a million of them, so without a call for each."""
        data, pos, end, length = self.data, self.pos, self.end, struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            stop = pos + 8
            if stop <= end:
                stop += length(data, pos)[0]
            if stop > end:
                self.pos = pos
                self.take(stop - pos, what)
            strings.append(data[pos + 8 : stop].decode("utf-8", errors="replace"))
            pos = stop
        self.pos = pos
        return strings


class GGUFFile:
    """The metadata and the tensors of one model.

    `metadata`: key to plain Python value, from the first part. `tensors`: name to `TensorInfo`, in file order.
    """

    def __init__(self, path: str | os.PathLike[str]):
        first = Path(path)
        self.parts: list[mmap.mmap] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata = self._read_part(first)
        self.path = first
        self._read_other_parts(first)
        self.size = sum(len(part) for part in self.parts)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, (..., bytes of a row) uint8, as a view of the map."""
        info = self.tensors[name]
        flat = np.frombuffer(self.parts[info.part], np.uint8, info.nbytes, info.offset)
        return flat.reshape(*info.shape[:-1], -1)

    def release(self, name: str, start: int, stop: int) -> None:
        """Give the pages under some bytes of a tensor back to the system; they are read again when needed."""
        info = self.tensors[name]
        page = mmap.PAGESIZE
        first, end = (info.offset + start) // page * page, (info.offset + stop) // page * page
        if hasattr(mmap, "MADV_DONTNEED") and end > first:
            self.parts[info.part].madvise(mmap.MADV_DONTNEED, first, end - first)

    def _read_other_parts(self, first: Path) -> None:
        count = self.metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 1)
        if type(count) is not int or count < 0:
            raise InputError(
                f"{shown(first)}: {Keys.Split.LLM_KV_SPLIT_COUNT} is {reprlib.repr(count)}, not a number of parts; "
                "the file is damaged"
            )
        if count <= 1:
            return
        name = SPLIT_NAME.match(first.name)
        if name is None or int(name["count"]) != count:
            raise InputError(
                f"{shown(first)} says that it is one of {count} parts, but is not named NAME-00001-of-{count:05}.gguf; "
                "give the parts their original names"
            )
        if int(name["no"]) != 1:
            raise InputError(
                f"{shown(first)} is part {int(name['no'])} of {count}; "
                f"give {shown(name['stem'])}-00001-of-{name['count']}.gguf"
            )
        _check_part(shown(first), self.metadata, 1, count)
        for no in range(2, count + 1):
            self._read_part(first.with_name(f"{name['stem']}-{no:05}-of-{count:05}.gguf"), no, count)
        total = self.metadata.get(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT, len(self.tensors))
        if total != len(self.tensors):
            raise InputError(
                f"{shown(first)}: the {count} parts hold {len(self.tensors)} tensors, the header says "
                f"{reprlib.repr(total)}; download the parts again"
            )

    def _read_part(self, path: Path, no: int = 1, count: int = 1) -> dict[str, Any]:
        data = _map(path)
        cursor = _Cursor(data, shown(path))
        if data[:4] != struct.pack("<I", GGUF_MAGIC):
            raise InputError(f"{cursor.path} is not a GGUF file: it begins with {data[:4]!r}; give a .gguf file")
        cursor.take(4, "the magic")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in (2, 3)
            kind = "is big-endian" if swapped else f"has GGUF version {version}"
            raise InputError(f"{cursor.path} {kind}, only little-endian versions 2 and 3 can be read; convert it anew")
        tensor_count, kv_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
        metadata = dict(_key_values(cursor, kv_count))
        if no > 1:
            _check_part(cursor.path, metadata, no, count)
        alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise InputError(
                f"{cursor.path}: {Keys.General.ALIGNMENT} is {reprlib.repr(alignment)}, not a power of two; "
                "the file is damaged"
            )
        infos = list(_tensor_infos(cursor, tensor_count, part=len(self.parts)))
        base, end = _aligned(cursor.pos, alignment), 0
        for info in infos:
            if info.offset != end:
                raise InputError(
                    f"{cursor.path}: tensor {shown(info.name, 80)} begins at byte {info.offset:,} of the data, "
                    f"the one before it ends at {end:,}; the file is damaged"
                )
            end += _aligned(info.nbytes, alignment)
            self._add(cursor.path, info, base, len(data))
        self.parts.append(data)
        return metadata

    def _add(self, path: str, info: TensorInfo, base: int, size: int) -> None:
        name, start = shown(info.name, 80), base + info.offset
        if start + info.nbytes > size:
            raise InputError(
                f"{path} is truncated or damaged: tensor {name} needs bytes {start:,} to {start + info.nbytes:,}, "
                f"the file has {size:,}; download it again"
            )
        if info.name in self.tensors:
            raise InputError(f"{path} holds the tensor {name} twice; the file is damaged")
        self.tensors[info.name] = TensorInfo(info.name, info.type, info.shape, info.part, start, info.nbytes)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _check_part(path: str, metadata: Mapping[str, Any], no: int, count: int) -> None:
    """Raises InputError where a part is another one than its name says."""
    is_no, is_count = (metadata.get(key) for key in (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT))
    if (is_no, is_count) != (no - 1, count):
        raise InputError(
            f"{path} should be part {no} of {count}, but its header says {Keys.Split.LLM_KV_SPLIT_NO} "
            f"{reprlib.repr(is_no)} (from 0) of {reprlib.repr(is_count)}; download the parts again"
        )


def _map(path: Path) -> mmap.mmap:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{shown(path)} is a folder; give the .gguf file in it")
        if not stat.S_ISREG(mode):  # to open a pipe would wait for ever
            raise InputError(f"{shown(path)} is a pipe or a device, which can't be mapped; give a .gguf file")
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise InputError(f"{shown(path)} is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"no such file: {shown(path)}; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot read {shown(path)}: {reason}; check the path and its permissions") from None


def _key_values(cursor: _Cursor, count: int) -> Iterator[tuple[str, Any]]:
    seen = set()
    for _ in range(count):
        key = cursor.string("a key")
        what = shown(key, 80)
        if key in seen:
            raise InputError(f"{cursor.path} holds the key {what!r} twice; the file is damaged")
        seen.add(key)
        yield key, cursor.value(cursor.value_type(what), what)


def _tensor_infos(cursor: _Cursor, count: int, part: int) -> Iterator[TensorInfo]:
    """Yields tensors with `offset` still counted from the start of the data section."""
    for _ in range(count):
        name = cursor.string("a tensor's name")
        what = f"tensor {shown(name, 80)}"
        n_dims = cursor.number("I", what)
        if not 1 <= n_dims <= MAX_DIMS:
            raise InputError(f"{cursor.path}: {what} has {n_dims} dimensions, not 1 to {MAX_DIMS}; the file is damaged")
        dims = [cursor.number("Q", what) for _ in range(n_dims)]
        number, offset = cursor.number("I", what), cursor.number("Q", what)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise InputError(
                f"{cursor.path}: {what} has the unknown quant type {number}; the file is damaged or too new"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        values = 1
        for dim in dims:
            values *= dim
        if values == 0 or dims[0] % block:
            raise InputError(
                f"{cursor.path}: {what} has the shape {dims}, but {kind.name} needs rows of a multiple of "
                f"{block} values; the file is damaged"
            )
        yield TensorInfo(name, kind, tuple(reversed(dims)), part, offset, values // block * block_bytes)
