"""The values of a weight in 16 bits, for matmuls of so many rows that reading them is worth less than multiplying.

expand(w, dtype) -> y, and the same with `_ops`
    w      (..., rows, cols)  `Weight`
    dtype  bfloat16 or float16
    y      (..., rows, cols)  dtype; each value is rounded once

The kernel reads the planes once, at the file's own bits, and writes 16 bytes a thread.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import GROUP, QuantizedTensor, Weight, dequantize_ops, group_scales

SIMDGROUPS = 8  # of a threadgroup


def expand_ops(w: Weight, dtype: mx.Dtype) -> mx.array:
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


def expand(w: Weight, dtype: mx.Dtype) -> mx.array:
    back_end = launcher.back_end("expand") if isinstance(w, QuantizedTensor) else None
    if back_end is None or not launcher.fits(w):
        return expand_ops(w, dtype)
    return _launch(back_end, dtype, launcher.kind(w), launcher.layout(w))(*launcher.arrays(w))[0]


@cache
def _launch(
    back_end: launcher.BackEnd, dtype: mx.Dtype, kind: launcher.Kind, layout: launcher.Layout | None
) -> launcher.Launch:
    shape = kind[1]
    launcher.require("expand", (dtype in (mx.bfloat16, mx.float16), f"values of {dtype}; 16 bits are written"))
    chunks = math.prod(shape) // 8
    return launcher.prepare(
        back_end,
        "expand",
        inputs=[],
        weights={"W": kind},
        layout=layout,
        outputs={"y": (shape, dtype)},
        template={"T": dtype, "COLS": shape[-1], "CHUNKS": chunks, "SIMDGROUPS": SIMDGROUPS},
        threadgroups=(-(-chunks // (launcher.LANES * SIMDGROUPS)), 1, 1),
        simdgroups=SIMDGROUPS,
    )
