"""GGUF files taken apart, changed and put together again: what the tests of bad input are made with.

A file is taken apart by the `gguf` package, not by the product's reader, which is what these tests are about.
"""

import random
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

from gguf import GGUFReader
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glm_mlx.make_tiny import TinySpec, make_tiny
from glm_mlx.tiny_vocab import tiny_vocabulary

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)  # GGUF's value types
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
EXTREMES = [0, 1, 2, 3, *(n for bit in (7, 8, 15, 16, 24, 31, 32, 40, 53, 62, 63, 64) for n in (2**bit - 1, 2**bit))]


def string(text: str | bytes) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text


def value(kind: int, given: Any) -> bytes:
    """A value of a key as it stands in a file: its type, then itself."""
    return struct.pack("<I", kind) + (string(given) if kind == STRING else struct.pack("<" + CODES[kind], given))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + items


@dataclass
class Tensor:
    """One entry of the header; `dims` in GGUF's order, the contraction dimension first."""

    name: str
    dims: list[int]
    type: int
    offset: int
    n_dims: int | None = None  # a wrong one

    def pack(self) -> bytes:
        n_dims = len(self.dims) if self.n_dims is None else self.n_dims
        sizes = struct.pack(f"<{len(self.dims)}Q", *self.dims)
        return (
            string(self.name) + struct.pack("<I", n_dims) + sizes + struct.pack("<IQ", self.type, self.offset % 2**64)
        )

    @property
    def nbytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        count = 1
        for dim in self.dims:
            count *= dim
        return count // block * block_bytes


@dataclass
class File:
    """A GGUF file in parts. A test changes one and writes the whole; the counts may be set wrong."""

    keys: list[tuple[str, bytes]]  # key, and `value` or `array`
    tensors: list[Tensor]
    data: bytes
    magic: bytes = b"GGUF"
    version: bytes = field(default_factory=lambda: struct.pack("<I", 3))
    tensor_count: int | None = None
    key_count: int | None = None
    alignment: int = 32

    @classmethod
    def read(cls, path: Path) -> "File":
        reader = GGUFReader(path)
        keys = []
        for name, entry in reader.fields.items():
            if not name.startswith("GGUF."):  # those are the package's own, for what stands before the keys
                whole = b"".join(part.tobytes() for part in entry.parts)
                keys.append((name, whole[8 + len(name.encode()) :]))
        tensors = []
        for entry in (tensor.field for tensor in reader.tensors):
            _, letters, _, dims, kind, offset = entry.parts
            tensors.append(Tensor(letters.tobytes().decode(), dims.tolist(), int(kind[0]), int(offset[0])))
        return cls(keys, tensors, path.read_bytes()[reader.data_offset :])

    def header(self) -> bytes:
        tensor_count = len(self.tensors) if self.tensor_count is None else self.tensor_count
        key_count = len(self.keys) if self.key_count is None else self.key_count
        start = self.magic + self.version + struct.pack("<QQ", tensor_count, key_count)
        keys = b"".join(string(key) + packed for key, packed in self.keys)
        return start + keys + b"".join(tensor.pack() for tensor in self.tensors)

    def whole(self, header: bytes | None = None) -> bytes:
        header = self.header() if header is None else header
        return header + bytes(-len(header) % self.alignment) + self.data

    def write(self, path: Path, header: bytes | None = None) -> Path:
        """`header`: a damaged one. A file that is there is replaced, never written into: the reference may map it."""
        path.unlink(missing_ok=True)
        path.write_bytes(self.whole(header))
        return path

    def put(self, key: str, packed: bytes | None) -> "File":
        """Set the value of a key; None removes the key."""
        at = [name for name, _ in self.keys].index(key) if key in dict(self.keys) else len(self.keys)
        self.keys[at : at + 1] = [] if packed is None else [(key, packed)]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def lay_out(self) -> int:
        """Offsets anew, after a change of a shape or a type. Returns the size of the data."""
        end = 0
        for tensor in self.tensors:
            tensor.offset = end
            end += -(-tensor.nbytes // self.alignment) * self.alignment
        return end

    def with_zeros(self) -> "File":
        """Offsets anew, and zeros for data."""
        self.data = bytes(self.lay_out())
        return self

    def aligned(self, alignment: int) -> "File":
        """The same tensors on another alignment, which the header names."""
        stored = [self.data[tensor.offset : tensor.offset + tensor.nbytes] for tensor in self.tensors]
        self.alignment = alignment
        self.lay_out()
        self.data = b"".join(raw + bytes(-len(raw) % alignment) for raw in stored)
        return self.put("general.alignment", value(U32, alignment))

    def copy(self) -> "File":
        tensors = [replace(tensor, dims=list(tensor.dims)) for tensor in self.tensors]
        return replace(self, keys=list(self.keys), tensors=tensors)

    def spots(self) -> list[tuple[int, int]]:
        """Where the numbers stand that the format hangs on: (byte, width) of every length, type, count and value."""
        spots, at = [(4, 4), (8, 8), (16, 8)], 24
        for key, packed in self.keys:
            after = at + 8 + len(key.encode())
            spots += [(at, 8), (after, 4)]
            kind = struct.unpack_from("<I", packed)[0]
            if kind == ARRAY:
                item = struct.unpack_from("<I", packed, 4)[0]
                spots += [(after + 4, 4), (after + 8, 8)]
                spots += [(after + 16, 8 if item == STRING else struct.calcsize(CODES[item]))]
            else:
                spots.append((after + 4, 8 if kind == STRING else struct.calcsize(CODES[kind])))
            at = after + len(packed)
        for tensor in self.tensors:
            after = at + 8 + len(tensor.name.encode())
            dims = [(after + 4 + 8 * i, 8) for i in range(len(tensor.dims))]
            end = after + 4 + 8 * len(dims)
            spots += [(at, 8), (after, 4), *dims, (end, 4), (end + 4, 8)]
            at = end + 12
        return spots


def small_vocabulary() -> dict[str, Any]:
    """The tiny vocabulary with 16 of its 300 merges: the fewest tokens that a byte-level tokenizer can do with."""
    full = tiny_vocabulary()
    tokens: list[str] = full["tokenizer.ggml.tokens"]
    merges: list[str] = full["tokenizer.ggml.merges"]
    left_out = range(256 + 16, 256 + len(merges))

    def kept(items: list[Any]) -> list[Any]:
        return [item for i, item in enumerate(items) if i not in left_out]

    ids = {key: i - len(left_out) for key, i in full.items() if key.endswith("_token_id")}
    lists = {
        "tokenizer.ggml.tokens": kept(tokens),
        "tokenizer.ggml.token_type": kept(full["tokenizer.ggml.token_type"]),
        "tokenizer.ggml.merges": merges[:16],
    }
    return full | lists | ids


SMALL: dict[str, Any] = {
    "layers": 2,
    "hidden_size": 32,
    "num_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "intermediate_size": 32,
    "num_experts": 4,
    "moe_intermediate_size": 32,
}
SPECS = {
    "GLM": TinySpec(**SMALL, mtp=True),
    "old": TinySpec(**SMALL | {"q_lora_rank": 0}, layout="kv_b", yarn=True, gating="softmax", write_gating=False),
    "fused": TinySpec(**SMALL, type="Q8_0", layout="flat", fused_gate_up=True, tied=True),
}


def make_small(path: Path, spec: TinySpec, split_max_tensors: int = 0) -> Path:
    """A file of some 50 kB, 10 of them header."""
    with mock.patch("glm_mlx.make_tiny.tiny_vocabulary", small_vocabulary):
        return make_tiny(path, spec, split_max_tensors)


def damaged_header(file: File, rng: random.Random) -> bytes:
    """The header with one to three changes: mostly to the numbers that the format hangs on, else to any bytes."""
    spots, header = file.spots(), bytearray(file.header())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at, width = rng.choice(spots)
        if rng.random() < 0.5:  # somewhere near a field, so that the vocabulary's bytes do not take nearly all
            at = min(len(header) - 1, max(0, at + rng.randrange(-8, 40)))
        elif rng.random() < 0.3:
            at = rng.randrange(len(header))
        _change(header, min(at, len(header) - 1), width, rng)
    return bytes(header)


def _change(header: bytearray, at: int, width: int, rng: random.Random) -> None:
    old = int.from_bytes(header[at : at + width], "little")
    size = rng.choice((1, 2, 4, 8, 16, 64))
    kind = rng.randrange(9)
    if kind == 0:
        header[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        header[at] = rng.randrange(256)
    elif kind == 2:
        header[at : at + width] = (rng.choice(EXTREMES) % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == 3:
        new = rng.choice((old + 1, old - 1, 2 * old, old // 2, -old, old ^ (1 << rng.randrange(8 * width))))
        header[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")
    elif kind == 4:
        header[at : at + width] = rng.randbytes(width)
    elif kind == 5:
        del header[at : at + size]
    elif kind == 6:
        header[at:at] = header[at : at + size]
    elif kind == 7:
        header[at:at] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    else:
        other = rng.randrange(len(header))
        header[at : at + size] = header[other : other + size]


def changed(file: File, rng: random.Random) -> File:
    """A file that is well formed and says something else: gets past the reader, to what stands behind it."""
    file = file.copy()
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.6:
            _change_key(file, rng)
        else:
            _change_tensor(file, rng)
    if rng.random() < 0.8:  # else the offsets contradict the shapes
        size = file.lay_out()
        if len(file.data) != size < 1 << 20:
            file.data = bytes(size)
    return file


def _change_key(file: File, rng: random.Random) -> None:
    at = rng.randrange(len(file.keys))
    key, packed = file.keys[at]
    kind = struct.unpack_from("<I", packed)[0]
    choice = rng.randrange(6)
    if choice == 0:
        del file.keys[at]
    elif choice == 1:
        file.keys[at] = (_misspelt(key, rng), packed)
    elif choice == 2:
        file.keys[at] = (key, random_value(rng))
    elif choice == 3:
        file.keys[at] = (key, rng.choice(file.keys)[1])
    elif kind in (STRING, ARRAY):  # the text, or the items
        body = bytearray(packed)
        for _ in range(rng.choice((1, 3, 30))):
            body[rng.randrange(min(12, len(body) - 1), len(body))] ^= 1 << rng.randrange(8)
        file.keys[at] = (key, bytes(body))
    else:
        width = len(packed) - 4
        old = int.from_bytes(packed[4:], "little")
        new = rng.choice((old + 1, old - 1, 2 * old, old // 2, 0, 1, old ^ (1 << rng.randrange(8 * width))))
        file.keys[at] = (key, packed[:4] + (new % (1 << 8 * width)).to_bytes(width, "little"))


def _change_tensor(file: File, rng: random.Random) -> None:
    at = rng.randrange(len(file.tensors))
    tensor, other = file.tensors[at], rng.choice(file.tensors)
    choice = rng.randrange(7)
    if choice == 0:
        del file.tensors[at]
    elif choice == 1:
        tensor.name = _misspelt(tensor.name, rng)
    elif choice == 2:
        tensor.name, other.name = other.name, tensor.name
    elif choice == 3:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((0, 1, 2, 32, 256, 1 << 31, 1 << 63, (1 << 64) - 1))
    elif choice == 4:
        tensor.dims = rng.choice((tensor.dims[::-1], [*tensor.dims, 1], tensor.dims[1:] or [32], other.dims))
    elif choice == 5:
        tensor.type = int(rng.choice(list(GGMLQuantizationType)))
    else:
        file.tensors.insert(rng.randrange(len(file.tensors)), file.tensors.pop(at))


def _misspelt(name: str, rng: random.Random) -> str:
    at = rng.randrange(len(name))
    return name[:at] + rng.choice(("", "x", "\n", "\x1b", "\u2028", "é", name[at] * 2)) + name[at + 1 :]


def random_value(rng: random.Random) -> bytes:
    """A value of a random type, mostly an extreme one."""
    kind = rng.choice((*CODES, STRING, ARRAY))
    if kind == ARRAY:
        item = rng.choice((*CODES, STRING))
        width, count = 8 if item == STRING else struct.calcsize(CODES[item]), rng.choice((0, 1, 3))
        return array(item, count, bytes(width * count))
    if kind == STRING:
        return value(STRING, rng.choice(("", "x", "deepseek2", "a\nb", "\x00", "nan", "é" * 1000)))
    if kind in (F32, F64):
        return value(kind, rng.choice((0.0, -0.0, 0.5, -1.0, 1e38, 1e-45, float("nan"), float("inf"), float("-inf"))))
    width = struct.calcsize(CODES[kind])
    return struct.pack("<I", kind) + (rng.choice(EXTREMES) % (1 << 8 * width)).to_bytes(width, "little")


class TookTooLong(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TookTooLong in here after so much time: a hang is a failed test, not a stopped one."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TookTooLong(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
