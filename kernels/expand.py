"""The values of a weight in 16 bits, for matmuls of so many rows that reading them is worth less than multiplying.

expand(w, dtype, experts) -> y, and the same with `_ops`
    w        (..., rows, cols)  `Weight`
    dtype    bfloat16 or float16
    experts  (tiles,)           uint32, indices of w (E, rows, cols), of E or more where a tile may hold anything; or
                                None: all of w
    y        (..., rows, cols)  dtype; each value is rounded once. (tiles, rows, cols) with experts

The kernel reads the planes once, or once for each tile, at the file's own bits, and writes 16 bytes a thread. It is
compiled once for each type and dtype: without experts w is that of one tile.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import GROUP, SUPER, QuantizedTensor, Weight, dequantize_ops, group_scales

SIMDGROUPS = 8  # of a threadgroup


def expand_ops(w: Weight, dtype: mx.Dtype, experts: mx.array | None = None) -> mx.array:
    if experts is not None:
        return expand_ops(w[mx.minimum(experts, w.shape[0] - 1)], dtype)
    if isinstance(w, mx.array):
        return w.astype(dtype)
    if not is_affine(w):
        return dequantize_ops(w).astype(dtype)
    scales, mins = group_scales(w)
    biases = -w.type.zero * scales if mins is None else mins
    return mx.dequantize(w.quants, scales, biases, GROUP, w.type.bits).astype(dtype)


def is_affine(w: QuantizedTensor) -> bool:
    """Whether scale * q + bias with groups of 32 is what the type means."""
    return w.type.name not in ("Q6_K", "IQ4_NL")


def expand(w: Weight, dtype: mx.Dtype, experts: mx.array | None = None) -> mx.array:
    back_end = launcher.back_end("expand") if isinstance(w, QuantizedTensor) else None
    if back_end is None or not isinstance(w, QuantizedTensor) or not launcher.fits(w):
        return expand_ops(w, dtype, experts)
    launch, chunks, whole = _launch(back_end, dtype, w.type.name, w.shape, None if experts is None else experts.size)
    # Not its bundle: where that begins would be a part of the text.
    return launch(chunks, whole if experts is None else experts, *w.planes)[0]


@cache
def _launch(
    back_end: launcher.BackEnd, dtype: mx.Dtype, kind: str, shape: tuple[int, ...], tiles: int | None
) -> tuple[launcher.Launch, mx.array, mx.array]:
    """And its first input, and the second where there are no experts. Nothing that is compiled depends on the shape:
    compiling takes longer than a prompt."""
    written = shape if tiles is None else (tiles, *shape[1:])
    count, each = math.prod(written) // 8, math.prod(shape if tiles is None else shape[1:]) // 8
    launcher.require(
        "expand",
        (dtype in (mx.bfloat16, mx.float16), f"values of {dtype}; 16 bits are written"),
        (tiles is None or len(shape) == 3, f"experts of a weight of {len(shape)} dimensions; three are read"),
        (count < 1 << 32, f"{count:,} chunks of eight values; they are counted in 32 bits"),
    )
    launch = launcher.prepare(
        back_end,
        "expand",
        inputs=["chunks", "experts"],
        weights={"W": (kind, (SUPER,))},
        outputs={"y": (written, dtype)},
        template={"T": dtype, "SIMDGROUPS": SIMDGROUPS},
        threadgroups=(-(-count // (launcher.LANES * SIMDGROUPS)), 1, 1),
        simdgroups=SIMDGROUPS,
    )
    chunks = [count, each, 1 if tiles is None else shape[0]]
    return launch, mx.array(chunks, mx.uint32), mx.zeros(1, mx.uint32)
