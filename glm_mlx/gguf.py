"""Read the header of a GGUF file (v2, v3, single or split), and the bytes of its tensors in pieces.

Read, not mapped: a mapped file that becomes shorter, as under `rsync --inplace`, ends the process with SIGBUS.

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
import weakref
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
MAX_TENSORS = 1 << 15  # GLM-4.7-Flash has 844, with a tensor for each expert it would have 9,500
MAX_KEYS = 1 << 14  # GLM-4.7-Flash has 60
PIECE = 1 << 15  # bytes of a header that are read at a time
LFS_POINTER = b"version https://git-lfs"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
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
# Types that the `gguf` package does not know, by number: those of ik_llama.cpp, and those that llama.cpp has given up.
FORK_TYPES = {
    **{133: "Q6_0", 134: "IQ1_BN", 135: "IQ2_BN", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K", 141: "IQ6_K"},
    **{144: "IQ4_KS", 145: "IQ2_KS", 146: "IQ4_KSS", 152: "IQ5_KS", 153: "IQ2_KT", 154: "IQ3_KT", 155: "IQ4_KT"},
    **{156: "IQ3_KS", 157: "IQ2_KL", 158: "IQ1_KT"},
}
MAGIC = struct.pack("<I", GGUF_MAGIC)
FORMER_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
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


class Part:
    """One open file, closed when this object is gone. `path` is ready to be printed, `size` as it was when opened."""

    def __init__(self, path: Path):
        """Raises InputError for what is no file, is empty, or may not be read."""
        self.path = shown(path)
        try:
            mode = path.stat().st_mode
            if stat.S_ISDIR(mode):
                raise InputError(f"{self.path} is a folder; give the .gguf file in it")
            if not stat.S_ISREG(mode):  # to open a pipe would wait for ever
                raise InputError(f"{self.path} is a pipe or a device, which can't be read in pieces; give a .gguf file")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise InputError(f"no such file: {self.path}; check the path") from None
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            raise self._unreadable(error) from None
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        if self.size == 0:
            raise InputError(f"{self.path} is empty; download it again")

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`. Raises InputError where the file has become shorter. For many threads."""
        try:
            data = os.pread(self._descriptor, stop - start, start)
            while len(data) < stop - start:
                more = os.pread(self._descriptor, stop - start - len(data), start + len(data))
                if not more:
                    raise InputError(
                        f"{self.path} became shorter while it was read: it had {self.size:,} bytes, now it ends at "
                        f"{start + len(data):,}; wait until it is copied or downloaded"
                    )
                data += more
        except OSError as error:
            raise self._unreadable(error) from None
        return data

    def prefetch(self, start: int, stop: int) -> None:
        """Tell a system that listens that these bytes are read next: many threads hide that each reads in order."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)

    def _unreadable(self, error: OSError | ValueError) -> InputError:
        reason = error.strerror if isinstance(error, OSError) else error
        return InputError(f"cannot read {self.path}: {reason}; check the path, its permissions and the disk")


class _Cursor:
    """A position in the header; every read is held against the end of the file. `path` is ready to be printed."""

    def __init__(self, part: Part):
        self.part, self.path, self.pos, self.end = part, part.path, 0, min(part.size, MAX_HEADER)
        try:  # memory of its own, which the system gives as far as it is written to
            self.data = mmap.mmap(-1, self.end)
        except OSError:
            raise MemoryError(f"no room for {self.end:,} bytes of the header of {self.path}") from None
        self._filled = 0

    def fill(self, stop: int) -> int:
        """Read the header up to `stop` at least. Returns up to where it is read."""
        if stop > self._filled:
            stop = min(self.end, max(stop, self._filled + PIECE))
            self.data[self._filled : stop] = self.part.read(self._filled, stop)
            self._filled = stop
        return self._filled

    def take(self, nbytes: int, what: str) -> int:
        """Move past `nbytes` and return where they begin."""
        start = self.pos
        if nbytes > self.end - start:
            if nbytes <= self.part.size - start:
                raise InputError(
                    f"{self.path}: {what} at byte {start} claims {nbytes:,} bytes, and no header has more than "
                    f"{MAX_HEADER:,}; the file is damaged"
                )
            raise InputError(
                f"{self.path} ends inside its header: {what} at byte {start} needs {nbytes:,} bytes, "
                f"{self.end - start:,} are left; download the file again"
            )
        self.pos = start + nbytes
        self.fill(self.pos)
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
        strings, filled = [], self._filled
        for _ in range(count):
            stop = pos + 8
            if filled < stop <= end:
                filled = self.fill(stop)
            if stop <= end:
                stop += length(data, pos)[0]
            if stop > end:
                self.pos = pos
                self.take(stop - pos, what)
            if stop > filled:
                filled = self.fill(stop)
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
        self.parts: list[Part] = []
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata = self._read_part(first)
        self.path = first
        self._read_other_parts(first)
        self.size = sum(part.size for part in self.parts)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a tensor, (..., bytes of a row) uint8. Raises InputError as `read` does."""
        info = self.tensors[name]
        return self.read(name, 0, info.nbytes).reshape(*info.shape[:-1], -1)

    def read(self, name: str, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes `start` to `stop` of a tensor, (n,) uint8. Raises InputError where the file has become shorter."""
        info = self.tensors[name]
        return np.frombuffer(self.parts[info.part].read(info.offset + start, info.offset + stop), np.uint8)

    def prefetch(self, name: str, start: int, stop: int) -> None:
        """Have bytes `start` to `stop` of a tensor, as far as it has them, read from the disk in the meantime."""
        info = self.tensors[name]
        if start < info.nbytes:
            self.parts[info.part].prefetch(info.offset + start, info.offset + min(stop, info.nbytes))

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
        data = Part(path)
        cursor = _Cursor(data)
        start = data.read(0, min(data.size, len(LFS_POINTER)))
        if start == LFS_POINTER:
            raise InputError(
                f"{cursor.path} is a pointer of git-LFS, a few lines in place of the model; run 'git lfs pull' there, "
                "or download the file itself"
            )
        if start[:4] != MAGIC:
            raise InputError(f"{cursor.path} is not a GGUF file: it begins with {start[:4]!r}; give a .gguf file")
        cursor.take(4, "the magic")
        version = cursor.number("I", "the version")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in (2, 3)
            kind = "is big-endian" if swapped else f"has GGUF version {version}"
            raise InputError(f"{cursor.path} {kind}, only little-endian versions 2 and 3 can be read; convert it anew")
        tensor_count, kv_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
        for claimed, most, what in (
            (tensor_count + len(self.tensors), MAX_TENSORS, "tensors"),
            (kv_count, MAX_KEYS, "keys"),
        ):
            if claimed > most:
                raise InputError(
                    f"{cursor.path} claims {claimed:,} {what}, and no model has more than {most:,}; the file is damaged"
                )
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
            self._add(cursor.path, info, base, data.size)
        if any(
            data.read(at, at + len(MAGIC)) == MAGIC for at in _ends(infos, base, end) if at + len(MAGIC) <= data.size
        ):
            raise InputError(
                f"{cursor.path} has a second GGUF file behind the first, as parts joined with cat have; give the first "
                "of the parts as they were downloaded, or join them with llama-gguf-split --merge"
            )
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


def _ends(infos: list[TensorInfo], base: int, end: int) -> set[int]:
    """Ends that a part may have: behind the last tensor, with the padding to the alignment and without."""
    return {base + end, base + (infos[-1].offset + infos[-1].nbytes if infos else 0)}


def _check_part(path: str, metadata: Mapping[str, Any], no: int, count: int) -> None:
    """Raises InputError where a part is another one than its name says."""
    is_no, is_count = (metadata.get(key) for key in (Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT))
    if (is_no, is_count) != (no - 1, count):
        raise InputError(
            f"{path} should be part {no} of {count}, but its header says {Keys.Split.LLM_KV_SPLIT_NO} "
            f"{reprlib.repr(is_no)} (from 0) of {reprlib.repr(is_count)}; download the parts again"
        )


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
            raise InputError(f"{cursor.path}: {what} {_unknown_type(number)}") from None
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


def _unknown_type(number: int) -> str:
    if number in FORK_TYPES:
        return f"has the type {FORK_TYPES[number]} of ik_llama.cpp; use a file in one of llama.cpp's own types"
    if number in FORMER_TYPES:
        return f"has the type {FORMER_TYPES[number]}, which llama.cpp has given up; use a newer file"
    return (
        f"has the unknown quant type {number}; the file is damaged, newer than this program, or made for a fork of "
        "llama.cpp"
    )
