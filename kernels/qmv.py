"""Multiply rows by quantised matrices.

qmv(x, w, norm, residual, dtype) -> y, qmv_ops(x, w) -> y
    x         (..., L, cols)     float32, bfloat16 or float16; of more columns the first are used
    w         (rows, cols)       a `Weight`; for `qmv_ops` also (..., rows, cols) with the leading dimensions of x
    norm      `Norm` or None     x is RMS-normed first: x / sqrt(mean(x^2) + eps) * weight
    residual  (..., L, rows)     added to the result, or None
    y         (..., L, rows)     `dtype`, by default that of x; summed in float32

qmv_all(x, weights, norm) -> [y, ...]: several matrices of one x, in one launch.
qmv_beside(x, weights, norm) -> y: the same as one array, the results side by side.
norm_qmv(x, w, norm, dtype) -> (normed, y): the normed x too, in the dtype of x.

absorb(q, k_b) -> q_latent, and the same with `_ops`: every head has its own matrix
    q         (B, L, H * (N + P))  of each head the first N columns
    k_b       (H, R, N)
    q_latent  (B, H, L, R)

merge_heads(x, v_b) -> y, and the same with `_ops`
    x    (B, H, L, R)
    v_b  (H, V, R)
    y    (B, L, H * V)

head_qmv_ops(x, w): x (B, H, L, cols), w (H, rows, cols) -> (B, H, L, rows)

gather_qmv_ops(x, w, experts, sorted_indices) -> y
    x        (T, K or 1, cols)
    w        (E, rows, cols)
    experts  (T, K)  integers in [0, E), with `sorted_indices` ascending: MLX may then read each expert once for many
    y        (T, K, rows)

The kernel takes up to 8 rows of x (of each head), reads the planes of each matrix once, at the file's own bits, and
keeps the normed x in float32. A simdgroup computes a few rows of one matrix: all its lanes share a row of 512 columns
or more, 8 or 16 of them a shorter one. More rows of x go to MLX's matmul in float32, for which the weights are never
expanded, except IQ4_NL's, which its affine form cannot hold; or, where that is faster, to `kernels.wide`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import mlx.core as mx

from kernels import launcher, wide
from kernels.planes import (
    GROUP,
    Affine,
    Bundle,
    QuantizedTensor,
    Weight,
    dequantize_ops,
    group_scales,
    values_if_kept,
)
from kernels.shapes import launch_shape, matrix_names

DEPTH = 8  # chunks that a lane loads in one go, at most
ROWS, SIMDGROUPS = 1, 4  # rows that lanes take one after the other, simdgroups of a threadgroup
SMALL = 1 << 20  # values of a weight beside which `with_affine` and `with_values` keep more
MANY_ROWS = 8192  # with as many, twice the rows: norm and x are worked out once for both, and there is work enough


@dataclass(frozen=True)
class Norm:
    """RMSNorm of (..., cols): weight (cols,) float32, which may stand in a bundle."""

    weight: mx.array
    eps: float
    bundle: Bundle | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if x.dtype == mx.float32 and x.ndim == 3 and mx.default_device() == mx.Device(mx.cpu):
            # Without a kernel `mx.fast.rms_norm` is 11 operations; of one row this is 7 (bench/LOG.md).
            eps, weight = self._constants
            return x * mx.rsqrt(mx.square(x).sum(axis=-1, keepdims=True) + eps) * weight
        return mx.fast.rms_norm(x, self.weight, self.eps).astype(x.dtype)

    @cached_property
    def _constants(self) -> tuple[mx.array, mx.array]:
        cols = self.weight.size
        eps, weight = mx.full((1, 1, 1), cols * self.eps), (math.sqrt(cols) * self.weight)[None, None]
        mx.eval(eps, weight)
        return eps, weight


def qmv(
    x: mx.array,
    w: Weight,
    norm: Norm | None = None,
    residual: mx.array | None = None,
    dtype: mx.Dtype | None = None,
) -> mx.array:
    return _qmv(x, (w,), norm, residual, dtype or x.dtype)[0]


def qmv_all(x: mx.array, weights: Sequence[Weight], norm: Norm | None = None) -> list[mx.array]:
    return _qmv(x, weights, norm, None, x.dtype)


def qmv_beside(x: mx.array, weights: Sequence[Weight], norm: Norm) -> mx.array:
    ys = _qmv(x, weights, norm, None, x.dtype, beside=True)
    return ys[0] if len(ys) == 1 else mx.concatenate(ys, axis=-1)


def norm_qmv(x: mx.array, w: Weight, norm: Norm, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    y, normed = _qmv(x, (w,), norm, None, dtype, normed_too=True)
    return normed, y


def _qmv(
    x: mx.array,
    weights: Sequence[Weight],
    norm: Norm | None,
    residual: mx.array | None,
    dtype: mx.Dtype,
    normed_too: bool = False,
    beside: bool = False,
) -> list[mx.array]:
    tokens = x.size // x.shape[-1]
    back_end = launcher.back_end("qmv") if tokens <= launcher.MAX_TOKENS else None
    tiny = residual is not None and residual.size < 8  # see launcher.fits
    if back_end is None or tiny or x.shape[-1] % 8 or not launcher.fits(*weights):
        # In float32 where the result is: the router's norm is not rounded first.
        x = x[..., : weights[0].shape[-1]] if x.shape[-1] > weights[0].shape[-1] else x
        exact = x.astype(mx.float32) if dtype == mx.float32 else x
        normed = exact if norm is None else norm(exact)
        ys = [qmv_ops(normed, w).astype(dtype) for w in weights]
        ys = [y if residual is None else residual + y for y in ys]
        return [*ys, normed.astype(x.dtype)] if normed_too else ys
    kinds = tuple(launcher.kind(w) for w in weights)
    if norm is None:
        layout, arrays = launcher.placed(*weights)
    else:
        layout, arrays = launcher.placed(*weights, norm.weight, bundle=norm.bundle)
    launch = _launch(
        back_end,
        1,
        (0, x.shape[-1], 0, 0),
        tuple(x.shape[:-1]),
        x.dtype,
        dtype,
        kinds,
        layout,
        None if norm is None else norm.eps,
        normed_too,
        None if residual is None else residual.size,
        beside,
    )
    return launch(x, *([] if residual is None else [residual]), *arrays)


def absorb(q: mx.array, k_b: Weight) -> mx.array:
    heads = k_b.shape[0]
    width = q.shape[-1] // heads
    back_end = _heads_back_end(q.shape[0], q.shape[1], width, k_b)
    if back_end is None:
        return absorb_ops(q, k_b)
    strides = (width, heads * width, q.shape[1] * k_b.shape[1], 0)
    return _heads(back_end, q, k_b, (1, heads, q.shape[1]), strides)


def absorb_ops(q: mx.array, k_b: Weight) -> mx.array:
    heads, _, cols = k_b.shape
    return head_qmv_ops(mx.unflatten(q, -1, (heads, -1))[..., :cols].swapaxes(1, 2), k_b)


def merge_heads(x: mx.array, v_b: Weight) -> mx.array:
    heads, rows, cols = v_b.shape
    length = x.shape[2]
    back_end = _heads_back_end(x.shape[0], length, cols, v_b)
    if back_end is None:
        return merge_heads_ops(x, v_b)
    strides = (length * cols, cols, rows, heads * rows)
    return _heads(back_end, x, v_b, (1, length, heads), strides).reshape(1, length, heads * rows)


def merge_heads_ops(x: mx.array, v_b: Weight) -> mx.array:
    return mx.flatten(head_qmv_ops(x, v_b).swapaxes(1, 2), 2)


def _heads_back_end(batch: int, length: int, width: int, w: Weight) -> launcher.BackEnd | None:
    """`width`: from one head of x to the next, of which a lane reads eight values at a time."""
    few = batch == 1 and length <= launcher.MAX_TOKENS
    return launcher.back_end("qmv") if few and width % 8 == 0 and launcher.fits(w) else None


def _heads(
    back_end: launcher.BackEnd, x: mx.array, w: Weight, lead: tuple[int, ...], strides: tuple[int, int, int, int]
) -> mx.array:
    kind, (heads, rows, cols) = launcher.kind(w)
    layout, arrays = launcher.placed(w)
    kinds = ((kind, (rows, cols)),)
    launch = _launch(back_end, heads, strides, lead, x.dtype, x.dtype, kinds, layout, None, False, None)
    return launch(x, *arrays)[0]


def _lanes(kind: str, cols: int) -> int:
    """How many lanes share a row: so few that each has work. K-quants are read 32 chunks at a time."""
    if kind.endswith("_K"):
        return 32
    return next(lanes for lanes in (32, 16, 8) if cols // 8 >= 2 * lanes or lanes == 8)


@cache
def _launch(
    back_end: launcher.BackEnd,
    heads: int,
    strides: tuple[int, int, int, int],
    lead: tuple[int, ...],
    dtype: mx.Dtype,
    out_dtype: mx.Dtype,
    kinds: tuple[launcher.Kind, ...],
    layout: launcher.Layout | None,
    eps: float | None,
    normed_too: bool,
    residual_size: int | None,
    beside: bool = False,
) -> launcher.Launch:
    """`lead`: the dimensions of the results before the last, which is a matrix's rows, or with `beside` all rows."""
    cols = kinds[0][1][-1]
    tokens = math.prod(lead) // heads
    with_residual = residual_size is not None
    launcher.require(
        "qmv",
        launcher.floats(dtype, "x"),
        *((shape[1:] == (cols,), f"matrices of {cols} columns and of shape {shape}") for _, shape in kinds),
        (heads > 1 or strides[1] >= cols, f"x of {strides[1]} columns for matrices of {cols}"),
        (residual_size in (None, tokens * kinds[0][1][0]), f"a residual of {residual_size} values"),
    )
    lanes = max(_lanes(kind, cols) for kind, _ in kinds)
    rows_at_once, simdgroups, most = launch_shape(
        "qmv",
        matrix_names(kinds, heads),
        tokens,
        ROWS=2 * ROWS if sum(shape[0] for _, shape in kinds) >= MANY_ROWS else ROWS,
        SIMDGROUPS=SIMDGROUPS,
        DEPTH=DEPTH,
    )
    block = rows_at_once * launcher.LANES // lanes
    blocks, before, matrices = 0, 0, []
    for i, (_, (rows, _)) in enumerate(kinds):
        matrices.append(f"DO(W{i}, {f'y + {before}' if beside else f'y{i}'}, {blocks}, {rows})")
        blocks += -(-rows // block)
        before += rows
    defines = {"MATRICES(DO)": " ".join(matrices), "EPS": f"{eps or 0.0!r}f"}
    if eps is not None:
        defines["NORM"] = ""
    if with_residual:
        defines["RESIDUAL"] = ""
    if beside:
        outputs = {"y": ((*lead, before), out_dtype)}
        strides = (*strides[:3], before)
    else:
        outputs = {f"y{i}": ((*lead, shape[0]), out_dtype) for i, (_, shape) in enumerate(kinds)}
    if normed_too:
        defines["NORMED_TOO"] = ""
        outputs["normed"] = ((*lead, cols), dtype)
    return launcher.prepare(
        back_end,
        "qmv",
        inputs=["x", *["residual"] * with_residual],
        weights={f"W{i}": kind for i, kind in enumerate(kinds)},
        vectors=["norm_weight"] * (eps is not None),
        layout=layout,
        outputs=outputs,
        template={
            "T": dtype,
            "Y": out_dtype,
            "TOKENS": tokens,
            "COLS": cols,
            **dict(zip(("X_HEAD", "X_TOKEN", "Y_HEAD", "Y_TOKEN"), strides, strict=True)),
            "DEPTH": launcher.depth(cols, lanes, most),
            "LANES": lanes,
            "ROWS": rows_at_once,
            "SIMDGROUPS": simdgroups,
            "HAS_NORM": eps is not None,
            "HAS_NORMED_TOO": normed_too,
            "HAS_RESIDUAL": with_residual,
        },
        defines=defines,
        threadgroups=(-(-blocks // simdgroups), heads, 1),
        simdgroups=simdgroups,
    )


def qmv_ops(x: mx.array, w: Weight) -> mx.array:
    if wide.applies(x.shape[-2], x.dtype):
        return wide.matmul(x, w)
    w = values_if_kept(w)
    if isinstance(w, mx.array) and w.dtype == x.dtype:
        return x @ w.swapaxes(-1, -2)
    x32 = x.astype(mx.float32)
    if isinstance(w, mx.array) or w.type.name == "IQ4_NL":
        return (x32 @ dequantize_ops(w).swapaxes(-1, -2)).astype(x.dtype)
    # For eight rows MLX's CUDA back end takes a matmul that it must compile first, for 17 s; for fewer it has one.
    halve = x.shape[-2] == launcher.MAX_TOKENS and mx.cuda.is_available()
    ys = [
        _sum(
            [
                mx.quantized_matmul(part, w.quants, scales, biases, True, GROUP, w.type.bits)
                for part, scales, biases in _affine_terms(rows, w)
            ]
        )
        for rows in (mx.split(x32, 2, axis=-2) if halve else [x32])
    ]
    return (mx.concatenate(ys, axis=-2) if halve else ys[0]).astype(x.dtype)


def head_qmv_ops(x: mx.array, w: Weight) -> mx.array:
    # Without broadcasting w over the batch, for which MLX's CUDA back end has no quantized matmul.
    batch, heads, length, cols = x.shape
    y = qmv_ops(x.swapaxes(0, 1).reshape(heads, batch * length, cols), w)
    return y.reshape(heads, batch, length, -1).swapaxes(0, 1)


def gather_qmv_ops(x: mx.array, w: Weight, experts: mx.array, sorted_indices: bool = False) -> mx.array:
    if experts.size <= w.shape[0] and not (isinstance(w, QuantizedTensor) and w.affine):
        # Few rows: deriving the affine scales of the chosen experts alone is cheaper than of all.
        return qmv_ops(x[..., None, :], w[experts])[..., 0, :]
    # Not x[..., None, :]: a new axis has stride 1, which MLX's gather_mm for sorted indices takes for a row's length
    # (ml-explore/mlx#3960 for Metal).
    x32 = x.astype(mx.float32).reshape(*x.shape[:-1], 1, x.shape[-1])
    if isinstance(w, mx.array) or w.type.name == "IQ4_NL":
        w_t = dequantize_ops(w).swapaxes(-1, -2)
        y = mx.gather_mm(x32, w_t, rhs_indices=experts, sorted_indices=sorted_indices)
    else:
        y = _sum(
            [
                mx.gather_qmm(
                    part,
                    w.quants,
                    scales,
                    biases,
                    rhs_indices=experts,
                    group_size=GROUP,
                    bits=w.type.bits,
                    sorted_indices=sorted_indices,
                )
                for part, scales, biases in _affine_terms(x32, w)
            ]
        )
    return y[..., 0, :].astype(x.dtype)


def _affine_terms(x: mx.array, w: QuantizedTensor) -> list[tuple[mx.array, mx.array, mx.array]]:
    """(x, scales, biases) of MLX affine matmuls with groups of 32 whose sum is exactly x @ w.T.

    All row-contiguous where they are derived: MLX's CUDA back end has no implementation for anything else. They are
    kept on CPUs only.

    Q6_K's groups of 16 fit none of MLX's sizes: one matmul sees the first half of every 32 inputs, one the second.
    """
    affine = w.affine or _affine(w)
    if len(affine) == 1:
        return [(x if w.affine else mx.contiguous(x), *affine[0])]
    first, second = mx.split(mx.unflatten(x, -1, (-1, 2, GROUP // 2)), 2, axis=-2)
    none = mx.zeros_like(first)
    parts = mx.concatenate([first, none], axis=-2), mx.concatenate([none, second], axis=-2)
    return [(mx.flatten(part, -3), *form) for part, form in zip(parts, affine, strict=True)]


def _affine(w: QuantizedTensor) -> tuple[Affine, ...]:
    scales, mins = group_scales(w)
    biases = -w.type.zero * scales if mins is None else mins
    if w.shape[-1] // scales.shape[-1] == GROUP:
        return ((scales, biases),)
    return tuple((mx.contiguous(scales[..., half::2]), mx.contiguous(biases[..., half::2])) for half in range(2))


def with_affine(w: Weight) -> Weight:
    """The same weight with scales and biases for MLX's matmuls kept beside it, if it is small and has them.

    A quarter of a byte a value, for Q6_K half of one, which the memory plan leaves out. To derive them takes operations
    at every use: more time than the matmul itself where that is small, hardly any where it is not.
    """
    if isinstance(w, mx.array) or w.type.name == "IQ4_NL" or math.prod(w.shape) > SMALL:
        return w
    affine = _affine(w)
    mx.eval(affine)
    return replace(w, affine=affine)


def with_values(w: Weight) -> Weight:
    """The same weight with its values in float32 kept beside it, if it is small: four bytes each, which the memory plan
    leaves out. For the vocabulary's matrices, of which one is looked up and the other the largest of a small model.

    They stand by columns, as the BLAS of MLX's Linux packages multiplies them fastest.
    """
    if isinstance(w, mx.array) or math.prod(w.shape) > SMALL:
        return w
    values = mx.contiguous(dequantize_ops(w).swapaxes(-1, -2)).swapaxes(-1, -2)
    mx.eval(values)
    return replace(w, values=values)


def _sum(terms: list[mx.array]) -> mx.array:
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]
