"""Quantised weights as planes: what every op here reads, and the exact values they stand for.

A GGUF block mixes scales and quants. At load each tensor is split into arrays of one kind, so that a kernel reads
whole 128-byte lines and MLX's matmuls can use the quants as they are (DESIGN decision 2). With n = rows * cols:

    type            quants, bits each        scales      mins        sub_scales               value
    Q4_0 Q5_0 Q8_0  4, 5, 8 (q + 128)        f16 per 32                                       d * (q - 8 | 16 | 128)
    Q4_1 Q5_1       4, 5                     f16 per 32  f16 per 32                           d * q + m
    Q4_K Q5_K       4, 5                     f16 per 256 f16 per 256 12 bytes per 256         d * sc * q - dmin * mn
    Q6_K            6                        f16 per 256             int8 per 16              d * sc * (q - 32)
    IQ4_NL          4 (index)                f16 per 32                                       d * IQ4_NL_VALUES[q]

`quants` is uint32; value i of a row stands in bits [i*bits, (i+1)*bits) of the row read as one little-endian number,
which is the order of MLX's affine quantisation. Bits a weight are the file's own, no more.
Formulas: llama.cpp `ggml-quants.c`, `dequantize_row_*`; the same in Python in `gguf.quants`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mlx.core as mx

GROUP = 32  # values that share a scale in MLX's affine form of these types
SUPER = 256  # values of a K-quant super-block
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class QuantType:
    """bits: of one quant. zero: the quant that stands for 0 in types without minima."""

    name: str
    bits: int
    zero: int = 0
    has_mins: bool = False
    is_super: bool = False  # scales are per 256 values, refined by sub_scales


QUANT_TYPES = {
    t.name: t
    for t in (
        QuantType("Q4_0", 4, zero=8),
        QuantType("Q5_0", 5, zero=16),
        QuantType("Q8_0", 8, zero=128),
        QuantType("Q4_1", 4, has_mins=True),
        QuantType("Q5_1", 5, has_mins=True),
        QuantType("Q4_K", 4, has_mins=True, is_super=True),
        QuantType("Q5_K", 5, has_mins=True, is_super=True),
        QuantType("Q6_K", 6, zero=32, is_super=True),
        QuantType("IQ4_NL", 4),
    )
}


# Scales and biases of an affine matmul of MLX over the quants, (..., rows, cols / 32) float32.
Affine: TypeAlias = tuple[mx.array, mx.array]


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight (..., rows, cols): contraction over `cols`. Indexing works on the leading dimensions."""

    type: QuantType
    shape: tuple[int, ...]
    quants: mx.array  # (..., rows, cols * bits / 32) uint32
    scales: mx.array  # (..., rows, cols / 32 or 256) float16
    mins: mx.array | None = None  # as scales
    sub_scales: mx.array | None = None  # (..., rows, cols / 256 * 12) uint8, or (..., rows, cols / 16) int8 for Q6_K
    bundle: "Bundle | None" = None  # in which these planes stand
    begins: tuple[int, ...] = ()  # where in it each plane begins, in words
    affine: tuple[Affine, ...] = ()  # where it is kept: see `kernels.qmv.with_affine`
    values: mx.array | None = None  # the same in float32, where they are kept: see `kernels.qmv.with_values`

    @property
    def planes(self) -> tuple[mx.array, ...]:
        return tuple(p for p in (self.quants, self.scales, self.mins, self.sub_scales) if p is not None)

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.planes)

    def __getitem__(self, index: Any) -> "QuantizedTensor":
        quants = self.quants[index]
        return QuantizedTensor(
            self.type,
            (*quants.shape[:-1], self.shape[-1]),
            quants,
            self.scales[index],
            None if self.mins is None else self.mins[index],
            None if self.sub_scales is None else self.sub_scales[index],
        )


Weight: TypeAlias = QuantizedTensor | mx.array
BUNDLE_WORDS = 64  # planes begin at multiples of it: 256 bytes, two lines of a cache


@dataclass(frozen=True)
class Bundle:
    """Weights in one array, words (n,) uint32. dense: those that are no `QuantizedTensor`, and the word where each
    begins."""

    words: mx.array
    dense: tuple[tuple[mx.array, int], ...]

    def begins(self, w: Weight) -> tuple[int, ...] | None:
        """Where each plane of a weight begins, in words; None if it does not stand here."""
        if isinstance(w, QuantizedTensor):
            return w.begins if w.bundle is self else None
        return next(((begin,) for array, begin in self.dense if array is w), None)


def planes(w: Weight) -> tuple[mx.array, ...]:
    return w.planes if isinstance(w, QuantizedTensor) else (w,)


def bundled(weights: Sequence[Weight]) -> tuple[list[Weight], Bundle | None]:
    """The same weights, evaluated, as views of one array; and that array.

    For what one launch reads, or launches that follow each other: every array that a launch gets costs the host half a
    microsecond to one, the more if no launch shortly before it got the same (bench/LOG.md). A weight that is not whole
    words stays what it is. While this runs the weights stand in memory twice. Those that stand in one array already, as
    another model over the same weights has put them, stay there.
    """
    movable = [all(plane.nbytes % 4 == 0 for plane in planes(w)) for w in weights]
    if not any(movable):
        return list(weights), None
    there = next((w.bundle for w in weights if isinstance(w, QuantizedTensor) and w.bundle), None)
    if there is not None and all(there.begins(w) for w, moves in zip(weights, movable, strict=True) if moves):
        return list(weights), there
    parts, begins, end = [], [], 0
    for plane in [plane for w, moves in zip(weights, movable, strict=True) if moves for plane in planes(w)]:
        begins.append(end)
        parts += [plane.reshape(-1).view(mx.uint32), mx.zeros(-plane.nbytes // 4 % BUNDLE_WORDS, mx.uint32)]
        end += sum(part.size for part in parts[-2:])
    words = mx.concatenate(parts)
    places = iter(begins)

    def view(plane: mx.array) -> tuple[mx.array, int]:
        begin = next(places)
        return words[begin : begin + plane.nbytes // 4].view(plane.dtype).reshape(plane.shape), begin

    views = [[view(plane) for plane in planes(w)] if moves else [] for w, moves in zip(weights, movable, strict=True)]
    mx.eval(words, [array for of_one in views for array, _ in of_one])
    dense = [of_one[0] for w, of_one in zip(weights, views, strict=True) if of_one and isinstance(w, mx.array)]
    bundle = Bundle(words, tuple(dense))

    def moved(w: Weight, of_one: list[tuple[mx.array, int]]) -> Weight:
        if isinstance(w, mx.array):
            return of_one[0][0]
        arrays = iter([array for array, _ in of_one])
        return QuantizedTensor(
            w.type,
            w.shape,
            next(arrays),
            next(arrays),
            None if w.mins is None else next(arrays),
            None if w.sub_scales is None else next(arrays),
            bundle,
            tuple(begin for _, begin in of_one),
        )

    return [moved(w, of_one) if of_one else w for w, of_one in zip(weights, views, strict=True)], bundle


def _k_scales_mins(sub: mx.array) -> tuple[mx.array, mx.array]:
    """The 6-bit scales and minima of Q4_K and Q5_K: (..., 12 n) uint8 -> two (..., 8 n) float32.

    Layout: llama.cpp `get_scale_min_k4`.
    """
    d, m, high = (mx.unflatten(sub, -1, (-1, 3, 4))[..., i, :] for i in range(3))
    scales = mx.concatenate([d & 0x3F, (high & 0x0F) | ((d >> 2) & 0x30)], axis=-1)
    mins = mx.concatenate([m & 0x3F, (high >> 4) | ((m >> 2) & 0x30)], axis=-1)
    return mx.flatten(scales, -2).astype(mx.float32), mx.flatten(mins, -2).astype(mx.float32)


def group_scales(w: QuantizedTensor) -> tuple[mx.array, mx.array | None]:
    """Scales and minima per group in float32, exactly: groups of 32, of 16 for Q6_K.

    Value = scale * (q - zero) + min. A product of an 11-bit and a 6- or 8-bit number fits float32's 24 bits.
    """
    scales = w.scales.astype(mx.float32)
    if w.sub_scales is None:
        return scales, None if w.mins is None else w.mins.astype(mx.float32)
    if w.mins is None:  # Q6_K
        return mx.repeat(scales, SUPER // 16, axis=-1) * w.sub_scales.astype(mx.float32), None
    sub_scales, sub_mins = _k_scales_mins(w.sub_scales)
    mins = mx.repeat(w.mins.astype(mx.float32), SUPER // GROUP, axis=-1) * sub_mins
    return mx.repeat(scales, SUPER // GROUP, axis=-1) * sub_scales, -mins


def values_if_kept(w: Weight) -> Weight:
    return w if isinstance(w, mx.array) or w.values is None else w.values


def unpack_quants(w: QuantizedTensor) -> mx.array:
    """The quants as numbers, (..., rows, cols) uint8."""
    bits = w.type.bits
    stream = w.quants.view(mx.uint8)
    if bits == 8:
        return stream
    if bits == 4:
        return mx.flatten(mx.stack([stream & 0x0F, stream >> 4], axis=-1), -2)
    # 8 values fill `bits` bytes exactly; value i begins in byte i*bits//8 and may run into the next.
    groups = mx.unflatten(stream, -1, (-1, bits)).astype(mx.uint16)
    values = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        value = groups[..., byte] >> shift
        if shift + bits > 8:
            value = value | (groups[..., byte + 1] << (8 - shift))
        values.append(value & ((1 << bits) - 1))
    return mx.flatten(mx.stack(values, axis=-1), -2).astype(mx.uint8)


def dequantize_ops(w: Weight) -> mx.array:
    """The values of a weight, (..., rows, cols) float32, by the formula of its type."""
    if isinstance(w, mx.array):
        return w.astype(mx.float32)
    quants = unpack_quants(w)
    if w.type.name == "IQ4_NL":
        values = mx.array(IQ4_NL_VALUES, mx.float32)[quants]
    else:
        values = quants.astype(mx.float32) - w.type.zero
    scales, mins = group_scales(w)
    values = mx.unflatten(values, -1, (scales.shape[-1], -1)) * scales[..., None]
    if mins is not None:
        values = values + mins[..., None]
    return mx.flatten(values, -2)
