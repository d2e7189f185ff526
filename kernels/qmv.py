"""Multiply rows by quantised matrices.

qmv_ops(x, w) -> y
    x  (..., L, cols)     float32, bfloat16 or float16
    w  (rows, cols)       a `Weight`, or (..., rows, cols) with the leading dimensions of x
    y  (..., L, rows)     dtype of x; summed in float32

head_qmv_ops(x, w) -> y
    x  (B, H, L, cols)
    w  (H, rows, cols)    every head its own
    y  (B, H, L, rows)

gather_qmv_ops(x, w, experts) -> y
    x        (T, K or 1, cols)
    w        (E, rows, cols)
    experts  (T, K)  integers in [0, E)
    y        (T, K, rows)

The weights are never expanded, except IQ4_NL's, which MLX's affine matmul cannot hold.
"""

import mlx.core as mx

from kernels.planes import GROUP, QuantizedTensor, Weight, dequantize_ops, group_scales


def qmv_ops(x: mx.array, w: Weight) -> mx.array:
    if isinstance(w, mx.array) and w.dtype == x.dtype:
        return x @ w.swapaxes(-1, -2)
    x32 = x.astype(mx.float32)
    if isinstance(w, mx.array) or w.type.name == "IQ4_NL":
        return (x32 @ dequantize_ops(w).swapaxes(-1, -2)).astype(x.dtype)
    terms = [
        mx.quantized_matmul(part, w.quants, scales, biases, True, GROUP, w.type.bits)
        for part, scales, biases in _affine_terms(x32, w)
    ]
    return _sum(terms).astype(x.dtype)


def head_qmv_ops(x: mx.array, w: Weight) -> mx.array:
    # Without broadcasting w over the batch, for which MLX's CUDA back end has no quantized matmul.
    batch, heads, length, cols = x.shape
    y = qmv_ops(x.swapaxes(0, 1).reshape(heads, batch * length, cols), w)
    return y.reshape(heads, batch, length, -1).swapaxes(0, 1)


def gather_qmv_ops(x: mx.array, w: Weight, experts: mx.array) -> mx.array:
    if experts.size <= w.shape[0]:
        # Few rows: deriving the affine scales of the chosen experts alone is cheaper than of all.
        return qmv_ops(x[..., None, :], w[experts])[..., 0, :]
    x32 = x.astype(mx.float32)[..., None, :]
    if isinstance(w, mx.array) or w.type.name == "IQ4_NL":
        y = mx.gather_mm(x32, dequantize_ops(w).swapaxes(-1, -2), rhs_indices=experts)
    else:
        y = _sum(
            [
                mx.gather_qmm(part, w.quants, scales, biases, None, experts, True, GROUP, w.type.bits)
                for part, scales, biases in _affine_terms(x32, w)
            ]
        )
    return y[..., 0, :].astype(x.dtype)


def _affine_terms(x: mx.array, w: QuantizedTensor) -> list[tuple[mx.array, mx.array, mx.array]]:
    """(x, scales, biases) of MLX affine matmuls with groups of 32 whose sum is exactly x @ w.T.

    All row-contiguous: MLX's CUDA back end has no implementation for anything else.

    Q6_K's groups of 16 fit none of MLX's sizes: one matmul sees the first half of every 32 inputs, one the second.
    """
    scales, mins = group_scales(w)
    biases = -w.type.zero * scales if mins is None else mins
    if w.shape[-1] // scales.shape[-1] == GROUP:
        return [(mx.contiguous(x), scales, biases)]
    halves = mx.unflatten(x, -1, (-1, 2, GROUP // 2))
    terms = []
    for half in range(2):
        keep = mx.arange(2)[:, None] == half
        part = mx.flatten(mx.where(keep, halves, 0), -3)
        terms.append((part, mx.contiguous(scales[..., half::2]), mx.contiguous(biases[..., half::2])))
    return terms


def _sum(terms: list[mx.array]) -> mx.array:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def embed_ops(w: Weight, tokens: mx.array) -> mx.array:
    """Rows of the embedding: tokens (B, L) -> (B, L, D) float32."""
    return dequantize_ops(w[tokens])
