"""The kernels of MLX that apple_oracle.py compares: names, templates, inputs, and launches as in MLX's host code.

Matrices have a multiple of 4 rows: of other numbers MLX writes some rows from two simdgroups, a race in the checked
build. For gemv with several simdgroups to a row (bn8) see apple_oracle.md.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

_Array = npt.NDArray[Any]
# By dtype: the name in metallib names of most kernels, that in names of quantised kernels, and the word in Metal.
_TYPES = {
    mx.float32: ("float32", "float", "float"),
    mx.float16: ("float16", "float16_t", "half"),
    mx.bfloat16: ("bfloat16", "bfloat16_t", "bfloat"),
}
_ABSENT = np.zeros(1, np.int64)  # for a buffer that the kernel does not read, or a stride or offset of none
_FP_HEADERS = ("fp4.h", "fp8.h", "fp_quantized.h")
_FP_MODES = {"mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}  # group size, bits


@dataclass(frozen=True)
class Case:
    """name: in the metallib. instance: the same kernel in the headers. buffers: by number; outputs: which are written.
    grid, threadgroup: in threads. constants: Metal's function constants, by number.
    expected: the first output, as MLX's CPU operations compute it in float32 from the same inputs."""

    name: str
    headers: tuple[str, ...]
    instance: str
    buffers: list[_Array]
    outputs: tuple[int, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    expected: mx.array
    constants: dict[int, int] = field(default_factory=dict)


def cases() -> Iterator[Case]:
    with mx.stream(mx.cpu):
        for dtype in _TYPES:
            yield from _rows(dtype)
            yield from _gemv(dtype)
            yield from _affine(dtype)
            yield from _quantize(dtype)
            yield from _fp(dtype)
            yield from _attention(dtype)
        yield from _conversions()


def bits(x: mx.array) -> _Array:
    """As numpy; bfloat16, which numpy has not, by its bits."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)


def _random(shape: tuple[int, ...], dtype: mx.Dtype, seed: int, scale: float = 1.0) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32) * scale
    return mx.array(values).astype(dtype)


def _ints(*values: int) -> list[_Array]:
    return [np.array([v], np.int32) for v in values]


def _f32(x: mx.array) -> mx.array:
    return x.astype(mx.float32)


def _rows(dtype: mx.Dtype) -> Iterator[Case]:
    """softmax and logsumexp of each row, with rows that fit a threadgroup and rows that do not."""
    name, _, word = _TYPES[dtype]
    sums = {"": word} if dtype == mx.float32 else {"": word, "precise_": "float"}
    for kind, columns, threads in (("block", 1000, 256), ("looped", 5000, 1024)):
        x = _random((16, columns), dtype, seed=columns, scale=3)
        x[0, ::7] = -mx.inf  # as a mask does
        launch = ((16 * threads, 1, 1), (threads, 1, 1))
        function = "softmax_single_row" if kind == "block" else "softmax_looped"
        for label, accumulator in sums.items():
            yield Case(
                f"{kind}_softmax_{label}{name}",
                *(("softmax.h",), f"{function}<{word}, {accumulator}>", [bits(x), bits(x), *_ints(columns)], (1,)),
                *(*launch, mx.softmax(_f32(x), axis=-1)),
            )
        function = "logsumexp" if kind == "block" else "logsumexp_looped"
        yield Case(
            f"{kind}_logsumexp_{name}",
            *(("logsumexp.h",), f"{function}<{word}>", [bits(x), bits(x[:, 0]), *_ints(columns)], (1,)),
            *(*launch, mx.logsumexp(_f32(x), axis=-1)),
        )


def _gemv(dtype: mx.Dtype) -> Iterator[Case]:
    name, _, word = _TYPES[dtype]
    rows, columns = 40, 2500
    w, x = _random((rows, columns), dtype, seed=1), _random((columns,), dtype, seed=2)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    sizes = [*_ints(columns, rows, columns), one, zero, *_ints(1, 1), *[_ABSENT] * 3, *_ints(1)]
    for tm in (1, 4):
        groups = -(-rows // (4 * tm))
        yield Case(
            f"gemv_{name}_bm4_bn1_sm1_sn32_tm{tm}_tn4_nc0_axpby0",
            *(("gemv.h",), f"gemv<{word}, 4, 1, 1, 32, {tm}, 4, false, false>"),
            *([bits(w), bits(x), _ABSENT, bits(w[:, 0]), *sizes], (3,), (32 * groups, 1, 4), (32, 1, 4)),
            _f32(w) @ _f32(x),
        )


def _matrix_vector(name: str, instance: str, dtype: mx.Dtype, shape: tuple[int, int, int], mode: str) -> Case:
    """A quantised (rows, columns) matrix times `count` vectors; mode: as in mx.quantize, affine with its bits."""
    rows, columns, count = shape
    affine, wide = mode.startswith("affine"), "_wide_" in name
    group, width = (64, int(mode[6:])) if affine else _FP_MODES[mode]
    options = {"group_size": group, "bits": width, "mode": mode[:6] if affine else mode}
    headers = ("quantized_utils.h", "quantized.h") if affine else ("quantized_utils.h", *_FP_HEADERS)
    w, x = _random((rows, columns), dtype, seed=4), _random((count, columns), dtype, seed=3)
    packed = mx.quantize(w, **options)
    weights = [*map(bits, packed), *([] if affine or wide else [_ABSENT])]  # the last: a global scale
    sizes = _ints(columns, rows, count) if wide else _ints(columns, rows)
    y = mx.zeros((count, rows), dtype)
    per_group, vectors = (4 if wide and not affine else 8), (4 if wide else 1)  # rows and vectors of a threadgroup
    exact = _f32(mx.dequantize(*packed, **options))
    return Case(
        *(name, headers, instance),
        [*weights, bits(x), bits(y), *sizes, *[_ABSENT] * 8],
        *((len(weights) + 1,), (32 * -(-count // vectors), 2 * -(-rows // per_group), 1), (32, 2, 1)),
        _f32(x) @ exact.T,
    )


def _affine(dtype: mx.Dtype) -> Iterator[Case]:
    _, name, word = _TYPES[dtype]
    for width in (2, 3, 4, 5, 6, 8) if dtype == mx.float16 else (4,):
        for kind, shape in (("qmv_fast", (16, 1024, 2)), ("qmv", (20, 576, 2))):
            yield _matrix_vector(
                f"affine_{kind}_{name}_gs_64_b_{width}_batch_0_pr_0_hgs_0_r_4",
                *(f"affine_{kind}<{word}, 64, {width}, false, false, false, 4>", dtype, shape, f"affine{width}"),
            )
    yield _matrix_vector(
        f"affine_qmv_wide_{name}_gs_64_b_4_nv_4_kl_8_batch_0",
        *(f"affine_qmv_wide<{word}, 64, 4, 4, 8, false>", dtype, (20, 576, 3), "affine4"),
    )


def _fp(dtype: mx.Dtype) -> Iterator[Case]:
    _, name, word = _TYPES[dtype]
    for mode, (group, width) in _FP_MODES.items():
        start, types = f"{name}_gs_{group}_b_{width}", f"{word}, {group}, {width}"
        for kind, shape, end, template in (
            ("qmv_fast", (16, 1024, 2), "batch_0_pr_0_hgs_0_r_4", "false, false, false, 4"),
            ("qmv", (20, 576, 2), "batch_0_pr_0_hgs_0_r_4", "false, false, false, 4"),
            ("qmv_wide", (20, 576, 3), "nv_4_kl_16_batch_0", "4, 16, false"),
        ):
            instance = f"fp_{kind}<{types}, {template}>"
            yield _matrix_vector(f"{mode}_{kind}_{start}_{end}", instance, dtype, shape, mode)


def _quantize(dtype: mx.Dtype) -> Iterator[Case]:
    _, name, word = _TYPES[dtype]
    w = _random((32, 256), dtype, seed=5)
    for width in (2, 4, 6, 8) if dtype == mx.float16 else (4,):
        packed, scales, biases = mx.quantize(w, group_size=64, bits=width)
        codes, values = packed.view(mx.uint8), mx.dequantize(packed, _f32(scales), _f32(biases), 64, width)
        per_thread = 4 if width == 6 else 8 // width  # values
        for kind, buffers, outputs, threads, expected in (
            ("quantize", [w, codes, scales, biases], (2, 3, 1), w.size // 2, scales),
            ("dequantize", [codes, scales, biases, w], (3,), w.size // per_thread, values),
        ):
            yield Case(
                f"affine_{kind}_{name}_gs_64_b_{width}",
                *(("quantized_utils.h", "quantized.h"), f"affine_{kind}<{word}, 64, {width}>"),
                *(list(map(bits, buffers)), outputs, (threads, 1, 1), (32, 1, 1), expected),
            )


def _attention(dtype: mx.Dtype) -> Iterator[Case]:
    _, name, word = _TYPES[dtype]
    heads, shared, length, queries = 4, 2, 70, 3
    mask, sinks = _random((1, heads, queries, length), dtype, seed=9), _random((heads,), dtype, seed=10)
    masked = [_ABSENT, bits(mask), *_ints(1, length, queries * length), bits(sinks), *_ints(heads)]
    for width, more, constants, options in (
        (64, [], {22: 1}, {"mask": "causal"}),
        (128, masked, {20: 1, 24: 1, 25: 1}, {"mask": _f32(mask), "sinks": _f32(sinks)}),
    ):
        q = _random((1, heads, queries, width), dtype, seed=6)
        k, v = (_random((1, heads // shared, length, width), dtype, seed=s) for s in (7, 8))
        strides = [np.array([n], np.int64) for n in (length * width, width)]
        sizes = [*_ints(shared, length), *strides, *strides, np.array([0.125], np.float32)]
        yield Case(
            f"sdpa_vector_{name}_{width}_{width}",
            *(("sdpa_vector.h",), f"sdpa_vector<{word}, {width}, {width}>"),
            *([*map(bits, (q, k, v, q)), *sizes, *more], (3,), (heads * 1024, queries, 1), (1024, 1, 1)),
            mx.fast.scaled_dot_product_attention(*map(_f32, (q, k, v)), scale=0.125, **options),
            constants,
        )


def _conversions() -> Iterator[Case]:
    """All 16-bit values to float32; float32 values at and around every place where rounding to 16 bits turns."""
    upper = np.arange(65536, dtype=np.uint32) << 16
    around = np.concatenate([upper | n for n in (0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001)]).view(np.float32)
    half = np.arange(65536, dtype=np.uint16)
    floats, halves = mx.array(around), mx.array(half)
    for x, target in (
        *((floats, mx.float16), (floats, mx.bfloat16)),
        *((halves.view(mx.float16), mx.float32), (halves.view(mx.bfloat16), mx.float32)),
    ):
        y = x.astype(target)
        (a, _, from_word), (b, _, to_word) = _TYPES[x.dtype], _TYPES[target]
        yield Case(
            f"vn_copy{a}{b}",
            *(("copy.h",), f"copy_v<{from_word}, {to_word}>", [bits(x), bits(y), *_ints(x.size)]),
            *((1,), (x.size * target.size // 8, 1, 1), (256, 1, 1), y),
        )
