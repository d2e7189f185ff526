"""GGUF blocks to planes (`kernels.planes` describes those), in numpy, straight into the arrays that MLX will read.

Block layouts: llama.cpp `ggml-common.h`; the same in Python in `gguf.quants`.
"""

import math
from collections.abc import Callable, Iterator
from typing import TypeAlias

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from kernels.planes import QUANT_TYPES, QuantizedTensor, Weight

Bytes: TypeAlias = npt.NDArray[np.uint8]
Read: TypeAlias = Callable[[int, int], Bytes]  # the bytes of a tensor from one place to another, (n,) uint8
# Values that are packed at a time: the passes over them stay in a core's cache, and their temporaries, of a byte a
# value, small enough that malloc does not ask the system for new memory each time, which costs more than the packing.
CHUNK_VALUES = 96 << 10


def pack(raw: Bytes, kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Weight:
    """The bytes of a tensor, (..., bytes of a row) uint8, as a weight of `shape`. See `pack_read`."""
    flat = raw.reshape(-1)
    return pack_read(lambda start, stop: flat[start:stop], kind, shape)


def pack_read(
    read: Read, kind: GGMLQuantizationType, shape: tuple[int, ...], on_bytes: Callable[[int], None] = lambda done: None
) -> Weight:
    """A weight of `shape` from bytes that `read` gives in pieces. Exact for every type.

    No more than one piece stands beside the weight. `on_bytes` gets the number of bytes that are done, after each.
    Types without planes are expanded to float32; NotImplementedError where `gguf` can't expand one either.
    """
    if kind.name in QUANT_TYPES:
        return _pack_planes(read, kind, shape, on_bytes)
    if kind == GGMLQuantizationType.BF16:
        return _convert(read, kind, mx.uint16, shape, on_bytes).view(mx.bfloat16)
    if kind == GGMLQuantizationType.F16:
        return _convert(read, kind, mx.float16, shape, on_bytes)
    return _convert(read, kind, mx.float32, shape, on_bytes)


def part_of_each(read: Read, whole: int, start: int, size: int) -> Read:
    """Bytes `start` to `start + size` of every `whole` bytes, one behind the other."""

    def part(begin: int, end: int) -> Bytes:
        pieces = []
        while begin < end:
            number, within = divmod(begin, size)
            length = min(end - begin, size - within)
            at = number * whole + start + within
            pieces.append(read(at, at + length))
            begin += length
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    return part


def _pieces(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First and last-but-one block of each piece that is packed at a time."""
    block = GGML_QUANT_SIZES[kind][0]
    blocks, step = math.prod(shape) // block, CHUNK_VALUES // block
    return ((start, min(start + step, blocks)) for start in range(0, blocks, step))


def packed_nbytes(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> int:
    """Bytes that `pack` will hold."""
    block, block_bytes = GGML_QUANT_SIZES[kind]
    values = int(np.prod(shape, dtype=object))
    has_planes = kind.name in QUANT_TYPES or kind.name in ("F32", "F16", "BF16")
    return values // block * block_bytes if has_planes else 4 * values


def _pack_planes(
    read: Read, kind: GGMLQuantizationType, shape: tuple[int, ...], on_bytes: Callable[[int], None]
) -> QuantizedTensor:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = math.prod(shape) // block
    quant_type, split = QUANT_TYPES[kind.name], _SPLITTERS[kind.name]
    names = ["quants", "scales", *["mins"] * quant_type.has_mins, *["sub_scales"] * quant_type.is_super]
    dtypes = {
        "quants": mx.uint32,
        "scales": mx.float16,
        "mins": mx.float16,
        "sub_scales": mx.uint8 if quant_type.has_mins else mx.int8,
    }
    arrays, views = {}, []
    for name, part in zip(names, split(np.zeros((1, block_bytes), np.uint8)), strict=True):
        row_bytes = blocks * part.shape[1] // math.prod(shape[:-1])
        arrays[name], view = _allocate((*shape[:-1], row_bytes // dtypes[name].size), dtypes[name])
        views.append(view.reshape(blocks, part.shape[1]))
    for start, stop in _pieces(kind, shape):
        piece = read(start * block_bytes, stop * block_bytes).reshape(-1, block_bytes)
        for view, part in zip(views, split(piece), strict=True):
            view[start:stop] = part
        on_bytes(stop * block_bytes)
    return QuantizedTensor(
        quant_type, shape, arrays["quants"], arrays["scales"], arrays.get("mins"), arrays.get("sub_scales")
    )


def _convert(
    read: Read, kind: GGMLQuantizationType, dtype: mx.Dtype, shape: tuple[int, ...], on_bytes: Callable[[int], None]
) -> mx.array:
    """Values of 16 or 32 bits as they stand, and those of types without planes as float32."""
    array, view = _allocate(shape, dtype)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    for start, stop in _pieces(kind, shape):
        piece = read(start * block_bytes, stop * block_bytes)
        if block > 1:
            with np.errstate(all="ignore"):  # infinite scales give what they give, without a warning to the user
                piece = gguf.quants.dequantize(piece[None], kind).reshape(-1).view(np.uint8)
        view[start * block * dtype.size : stop * block * dtype.size] = piece
        on_bytes(stop * block_bytes)
    return array


def _allocate(shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, Bytes]:
    """An MLX array and its bytes as a flat numpy view: what is written there is in the array, with no second copy.

    https://ml-explore.github.io/mlx/build/html/usage/numpy.html. Every thread has a CPU stream of its own, so threads
    allocate side by side: touching new memory takes longer than packing.
    """
    array = mx.zeros(shape, dtype, stream=mx.cpu)
    mx.eval(array)
    return array, np.array(array, copy=False).reshape(-1).view(np.uint8)


def _columns(blocks: Bytes, start: int, stop: int) -> Bytes:
    """A contiguous copy of some columns, moved as whole items: several times faster than byte by byte."""
    item = np.dtype({"names": ["x"], "formats": [f"V{stop - start}"], "offsets": [start], "itemsize": blocks.shape[1]})
    return np.ascontiguousarray(blocks.view(item)["x"]).view(np.uint8)


def _repack_nibbles(qs: Bytes) -> Bytes:
    """(n, w) bytes that hold value i (low half) and value i + w (high) -> values 0 .. 2w-1 in order."""
    pairs = qs.view(np.uint16)
    halves = np.empty((len(qs), 2, qs.shape[1] // 16), np.uint64)
    for half in range(2):
        nibbles = (pairs >> 4 if half else pairs) & 0x0F0F
        nibbles |= nibbles >> 4
        halves[:, half] = nibbles.astype(np.uint8).view(np.uint64)
    return halves.reshape(len(qs), -1).view(np.uint8)


def _nibbles(qs: Bytes) -> Bytes:
    """(n, w) bytes -> (n, 2w) values: the low halves, then the high halves."""
    values = np.empty((len(qs), 2, qs.shape[1]), np.uint8)
    np.bitwise_and(qs, 0x0F, out=values[:, 0])
    np.right_shift(qs, 4, out=values[:, 1])
    return values.reshape(len(qs), -1)


def _add_high_bits(values: Bytes, high: Bytes) -> Bytes:
    """values | high << 4, in the place of both."""
    high <<= np.uint8(4)
    values |= high
    return values


def _pack_bits(values: Bytes, bits: int) -> Bytes:
    """(n, 8m) values below 2**bits, 5 or 6 -> (n, m * bits) bytes, one little-endian stream a row. Spoils `values`."""
    word = values.view(np.uint64)
    upper = np.empty_like(word)
    for width in (8, 16, 32):  # join neighbours: 2, then 4, then 8 values stand together
        used = bits * width // 8
        low = np.uint64(sum(((1 << used) - 1) << at for at in range(0, 64, 2 * width)))
        np.right_shift(word, np.uint64(width - used), out=upper)
        upper &= low << np.uint64(used)
        word &= low
        word |= upper
    return _columns(word.reshape(-1, 1).view(np.uint8), 0, bits).reshape(len(values), -1)


def _split_q4_0(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, qs 16; IQ4_NL too
    return _repack_nibbles(_columns(blocks, 2, 18)), _columns(blocks, 0, 2)


def _split_q4_1(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, m 2, qs 16
    return _repack_nibbles(_columns(blocks, 4, 20)), _columns(blocks, 0, 2), _columns(blocks, 2, 4)


def _split_q5_0(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, qh 4, qs 16
    high = np.unpackbits(_columns(blocks, 2, 6), axis=1, bitorder="little")
    quants = _pack_bits(_add_high_bits(_nibbles(_columns(blocks, 6, 22)), high), 5)
    return quants, _columns(blocks, 0, 2)


def _split_q5_1(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, m 2, qh 4, qs 16
    high = np.unpackbits(_columns(blocks, 4, 8), axis=1, bitorder="little")
    quants = _pack_bits(_add_high_bits(_nibbles(_columns(blocks, 8, 24)), high), 5)
    return quants, _columns(blocks, 0, 2), _columns(blocks, 2, 4)


def _split_q8_0(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, qs 32 signed
    return _columns(blocks, 2, 34) ^ np.uint8(0x80), _columns(blocks, 0, 2)


def _split_q4_k(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, dmin 2, scales 12, qs 4 * 32
    quants = _repack_nibbles(_columns(blocks, 16, 144).reshape(-1, 32))
    return quants.reshape(len(blocks), -1), _columns(blocks, 0, 2), _columns(blocks, 2, 4), _columns(blocks, 4, 16)


def _split_q5_k(blocks: Bytes) -> tuple[Bytes, ...]:  # d 2, dmin 2, scales 12, qh 32, qs 4 * 32
    values = _nibbles(_columns(blocks, 48, 176).reshape(-1, 32)).reshape(-1, 8, 32)
    high = _columns(blocks, 16, 48)[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]
    high &= np.uint8(1)
    quants = _pack_bits(_add_high_bits(values, high).reshape(len(blocks), -1), 5)
    return quants, _columns(blocks, 0, 2), _columns(blocks, 2, 4), _columns(blocks, 4, 16)


def _split_q6_k(blocks: Bytes) -> tuple[Bytes, ...]:  # ql 2 * 64, qh 2 * 32, scales 16, d 2
    values = _nibbles(_columns(blocks, 0, 128).reshape(-1, 64)).reshape(-1, 2, 4, 32)
    high = _columns(blocks, 128, 192).reshape(-1, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high &= np.uint8(3)
    quants = _pack_bits(_add_high_bits(values, high).reshape(len(blocks), -1), 6)
    return quants, _columns(blocks, 208, 210), _columns(blocks, 192, 208)


_SPLITTERS: dict[str, Callable[[Bytes], tuple[Bytes, ...]]] = {
    "Q4_0": _split_q4_0,
    "IQ4_NL": _split_q4_0,
    "Q4_1": _split_q4_1,
    "Q5_0": _split_q5_0,
    "Q5_1": _split_q5_1,
    "Q8_0": _split_q8_0,
    "Q4_K": _split_q4_k,
    "Q5_K": _split_q5_k,
    "Q6_K": _split_q6_k,
}
