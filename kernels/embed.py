"""Rows of the embedding.

embed(w, tokens, dtype) -> y, and the same with `_ops`
    w       (V, D)     `Weight`
    tokens  (B, L)     int32 in [0, V); the kernel clamps others
    y       (B, L, D)  dtype

The kernel reads the rows of the tokens at the file's own bits and nothing else.
"""

import math
from functools import cache

import mlx.core as mx

from kernels import launcher
from kernels.planes import Weight, dequantize_ops, planes, values_if_kept

SIMDGROUPS = 4  # of a threadgroup


def embed_ops(w: Weight, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    return dequantize_ops(values_if_kept(w)[tokens]).astype(dtype)


def embed(w: Weight, tokens: mx.array, dtype: mx.Dtype) -> mx.array:
    back_end = launcher.back_end("embed") if tokens.size <= launcher.MAX_TOKENS else None
    if back_end is None or not launcher.fits(w):
        return embed_ops(w, tokens, dtype)
    launch = _launch(back_end, tuple(tokens.shape), tokens.dtype, dtype, launcher.kind(w))
    return launch(tokens, *planes(w))[0]


@cache
def _launch(
    back_end: launcher.BackEnd, shape: tuple[int, ...], index: mx.Dtype, dtype: mx.Dtype, kind: launcher.Kind
) -> launcher.Launch:
    rows, cols = kind[1]
    launcher.require("embed", launcher.floats(dtype, "y"), (index == mx.int32, f"tokens of {index}; int32 is read"))
    return launcher.prepare(
        back_end,
        "embed",
        inputs=["tokens"],
        weights={"W": kind},
        outputs={"y": ((*shape, cols), dtype)},
        template={"T": dtype, "ROWS": rows, "COLS": cols, "SIMDGROUPS": SIMDGROUPS},
        threadgroups=(-(-cols // (8 * launcher.LANES * SIMDGROUPS)), math.prod(shape), 1),
        simdgroups=SIMDGROUPS,
    )
