"""Absorbed multi-head latent attention: every head attends to one shared latent row per position.

mla_decode(q_latent, q, kv_a, norm, wavelengths, cache, position, scale, v_b) -> (y, cache), and the same with `_ops`
    q_latent     (1, H, L, R)         q_nope absorbed through k_b
    q            (1, L, H * (N + P))  of each head the last P columns are rotated and used
    kv_a         (1, L, R + P)        [latent | k_pe] of the new tokens, to be normed and rotated, then cached; of more
                                      columns the last are used
    norm         `Norm` of the latent
    wavelengths  (P / 2,) float32     RoPE's angles are positions over these
    cache        (1, S, R + P)        rows [latent | k_pe], of which `position` are valid, with room for L more; or in
                                      8 bits, (1, S, bytes) uint8 as `kernels.rows` says
    position     (1,) int32           of the first new token
    scale        1 / sqrt(qk_head_dim), times YaRN's mscale squared
    v_b          (H, V, R)            `Weight`: from the latent space to each head's values
    y            (1, L, H * V)        dtype of q_latent; softmax and sums in float32
    cache        with the new rows: the kernel writes them in place and returns the array that it was given

attend_ops(q_latent, q_pe, rows, scale, context) -> (B, H, L, R): the attention alone, with q_pe (B, H, L, P) rotated
and rows as in the cache (B sequences), all valid, or the first `context`; the last L of them are those of the queries.
It goes through the rows in blocks, so that what it needs beside them is bounded at any depth and for any number of
queries.

Query i sees the rows before its own and its own. The value is a view of the key: the first R columns of the cache.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C, with k_b absorbed into the query.

The kernels take up to 8 queries and latents of up to 2,048, or of 512 in 8 bits, which they read as they stand. The
context is split among threadgroups, each of which reads its rows once for a few heads (S * (R + P) values for every
group of heads, from the device's cache after the first). Where a cache of 16 bits has room for `MATRIX_ROWS`,
`mla_matrix` does the same with products of 8 x 8 matrices, a row's weight rounded to 16 bits. A second launch
(`mla_merge`) adds up the splits and multiplies by v_b. The new rows are made by whoever needs them and stored by one.
MLX does not know of the write: later readers must depend on `y`, as the next token does. A full cache must be refused
by the caller, before.
"""

import math
from dataclasses import dataclass
from functools import cache as memoised
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from kernels import launcher, wide
from kernels.planes import Weight
from kernels.qmv import Norm, merge_heads_ops
from kernels.rows import RowFormat
from kernels.shapes import launch_shape

HEADS_AT_ONCE, SIMDGROUPS = 4, 4  # heads of a threadgroup, simdgroups of a threadgroup
ROWS_AT_ONCE = 2  # rows that a lane loads in one go
# Rows that are worth a threadgroup of their own, and splits: for 20 heads 260 threadgroups, which an H200 has room for.
ROWS_OF_SPLIT, MAX_SPLITS = 32, 52
MERGE_ROWS, MERGE_SIMDGROUPS = 4, 8  # rows of v_b of a simdgroup, simdgroups of a threadgroup
# In long contexts, where products of matrices take over: rows of the cache from which on, heads of a threadgroup, turns
# that rows are asked for ahead; the same for very long ones; threadgroups for all heads, which an H200 has room for.
MATRIX_ROWS, MATRIX_HEADS, MATRIX_AHEAD = 2048, 8, 2
MANY_ROWS, MANY_HEADS, MANY_AHEAD = 16384, 24, 1
MATRIX_THREADGROUPS = 132
MATRIX_SIMDGROUPS = 8
MAX_LATENT = 2048  # a lane holds whole rows of v_b
MAX_PACKED = 512  # the same of rows in 8 bits: 16 values a lane, under one scale

# Of attention without a kernel.
QUERIES = 512  # of each head and sequence, at once
SCORES = 16 << 20  # of a block, 4 bytes each: 1,536 rows of the cache for 512 queries of 20 heads
UNPACKED = 4096  # rows of a block that is in 8 bits, at most: 9 MB each time that 576 values of each stand in float32
ALIGNED = 128  # rows: blocks are multiples of it, where they are not shorter
LEAST = mx.finfo(mx.float32).min  # score of a row that is not seen; of infinities, a block of nothing else makes NaN


def rope_ops(x: mx.array, wavelengths: mx.array, position: int | mx.array) -> mx.array:
    """Rotate pairs (2i, 2i + 1) of (B, heads, L, P); `position` is that of the first row: an integer, (1,) or (B,)."""
    if x.dtype == mx.float32 and isinstance(position, int):
        # Without a kernel `mx.fast.rope` is 30 operations, among them sines and cosines in every layer anew.
        return (x.view(mx.complex64) * _turns(wavelengths, position, x.shape[2])).view(mx.float32)
    return mx.fast.rope(x, x.shape[-1], traditional=True, base=None, scale=1.0, offset=position, freqs=wavelengths)


@lru_cache(maxsize=4)  # all layers want the same
def _turns(wavelengths: mx.array, position: int, length: int) -> mx.array:
    """What pairs, as complex numbers, are multiplied by: (L, P / 2) complex64. By numpy, for MLX would compute it only
    when the step before is done."""
    angles = np.arange(position, position + length, dtype=np.float32)[:, None] * (1 / np.asarray(wavelengths))
    return mx.array(np.exp(1j * angles))


def attend_ops(
    q_latent: mx.array, q_pe: mx.array, rows: mx.array, scale: float, context: mx.array | None = None
) -> mx.array:
    """`context`, (1,) or (B,) integers: how many of the rows are valid in each sequence, if not all."""
    length, latent_dim = q_latent.shape[2:]
    if context is None and wide.applies(length, q_latent.dtype):
        return wide.attend(q_latent, q_pe, rows, scale)
    parts: list[mx.array] = []
    for begin in range(0, length, QUERIES):
        end = min(begin + QUERIES, length)
        q = mx.concatenate([q_latent[:, :, begin:end], q_pe[:, :, begin:end]], axis=-1).astype(mx.float32) * scale
        if parts:
            q = mx.depends(q, parts[-1])  # one after the other, or the scores of all would be alive together
        if context is None:
            seen = rows.shape[1] - length + end  # by the last of these queries
            part = _attend_in_blocks(q, rows[:, :seen], latent_dim, seen - (end - begin))
        else:
            part = _attend_in_blocks(q, rows, latent_dim, context.reshape(-1, 1, 1, 1) - length + begin)
        parts.append(part.astype(q_latent.dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _attend_in_blocks(q: mx.array, rows: mx.array, latent_dim: int, before: int | mx.array) -> mx.array:
    """q (B, H, L, R + P), of which query i sees `before` + i + 1 rows -> (B, H, L, R)"""
    batch, heads, length, width = q.shape
    row_format = RowFormat(latent_dim, width - latent_dim, rows.dtype)
    block = block_rows(batch * heads * length, row_format.is_packed)
    so_far: _Part | None = None
    for begin in range(0, rows.shape[1], block):
        part_of_rows = rows[:, begin : begin + block]
        if so_far is not None:
            part_of_rows = mx.depends(part_of_rows, so_far.out)  # as above
        keys = row_format.load(part_of_rows)
        end = begin + keys.shape[1]
        # All heads share the cache, so they are rows of one matmul.
        scores = (q.reshape(batch, heads * length, width) @ keys.swapaxes(-1, -2)).reshape(batch, heads, length, -1)
        if isinstance(before, mx.array) or end > before + 1:
            scores = mx.where(_visible(begin, end, before, length), scores, LEAST)
        probabilities = mx.softmax(scores, axis=-1).reshape(batch, heads * length, -1)
        out = (probabilities @ keys[..., :latent_dim]).reshape(batch, heads, length, latent_dim)
        if keys.shape[1] == rows.shape[1]:
            return out  # the only block
        part = _Part(out, mx.logsumexp(scores, axis=-1, keepdims=True))
        so_far = part if so_far is None else _merge(so_far, part)
    assert so_far is not None
    return so_far.out


class _Part(NamedTuple):
    """Attention to some of the rows alone, (B, H, L, R), and the logarithm of its sum of exponentials, (B, H, L, 1)."""

    out: mx.array
    log_sum: mx.array


def _visible(begin: int, end: int, before: int | mx.array, length: int) -> mx.array:
    """Which of the rows from `begin` to `end` each query sees: (L, rows), or (B or 1, 1, L, rows)."""
    return mx.arange(begin, end) <= before + mx.arange(length)[:, None]


def _merge(a: _Part, b: _Part) -> _Part:
    log_sum = mx.logaddexp(a.log_sum, b.log_sum)
    return _Part(a.out * mx.exp(a.log_sum - log_sum) + b.out * mx.exp(b.log_sum - log_sum), log_sum)


def block_rows(queries: int, packed: bool = False) -> int:
    """How many rows of the cache so many queries, those of all heads and sequences together, meet at a time."""
    rows = max(1, SCORES // queries)
    if packed:
        rows = min(rows, UNPACKED)
    return rows if rows < ALIGNED else rows // ALIGNED * ALIGNED


def latent_rows_ops(
    kv_a: mx.array, norm: Norm, wavelengths: mx.array, position: int | mx.array
) -> tuple[mx.array, mx.array]:
    """(B, L, R + P) -> latent (B, L, R) normed, k_pe (B, L, P) rotated: what is cached."""
    latent, k_pe = mx.split(kv_a, [norm.weight.size], axis=-1)
    return norm(latent), rope_ops(k_pe[:, None], wavelengths, position)[:, 0]


def mla_decode_ops(
    q_latent: mx.array,
    q: mx.array,
    kv_a: mx.array,
    norm: Norm,
    wavelengths: mx.array,
    cache: mx.array,
    position: mx.array,
    scale: float,
    v_b: Weight,
) -> tuple[mx.array, mx.array]:
    _, heads, length, latent_dim = q_latent.shape
    row_format = RowFormat(latent_dim, 2 * wavelengths.size, cache.dtype)
    if row_format.is_packed:
        kv_a = kv_a.astype(mx.float32)  # rounded once, to 8 bits
    q_pe = q.reshape(1, length, heads, -1)[..., -2 * wavelengths.size :].swapaxes(1, 2)
    kv_a = kv_a[..., -row_format.values :]
    new = mx.concatenate([*latent_rows_ops(kv_a, norm, wavelengths, position)], axis=-1)
    cache = mx.slice_update(cache, row_format.store(new), position, axes=(1,))
    out = attend_ops(q_latent, rope_ops(q_pe, wavelengths, position), cache, scale, position + length)
    return merge_heads_ops(out, v_b), cache


def mla_decode(
    q_latent: mx.array,
    q: mx.array,
    kv_a: mx.array,
    norm: Norm,
    wavelengths: mx.array,
    cache: mx.array,
    position: mx.array,
    scale: float,
    v_b: Weight,
) -> tuple[mx.array, mx.array]:
    back_end = launcher.back_end("mla_decode")
    _, heads, length, latent_dim = q_latent.shape
    if back_end is None or not _fits(q_latent, kv_a, cache) or not launcher.fits(v_b):
        return mla_decode_ops(q_latent, q, kv_a, norm, wavelengths, cache, position, scale, v_b)
    rows = cache.shape[1]
    norm_layout, norm_arrays = launcher.placed(norm.weight, bundle=norm.bundle)
    v_b_layout, v_b_arrays = launcher.placed(v_b)
    attend, merge = _launches(
        back_end,
        heads,
        length,
        latent_dim,
        2 * wavelengths.size,
        q.shape[-1] // heads,
        kv_a.shape[-1],
        1 << rows.bit_length() - 1,
        q_latent.dtype,
        cache.dtype,
        norm.eps,
        scale,
        norm_layout,
        launcher.kind(v_b),
        v_b_layout,
    )
    (partial,) = attend(q_latent, q, kv_a, wavelengths, cache, position, *norm_arrays)
    return merge(partial, *v_b_arrays)[0], cache


def _fits(q_latent: mx.array, kv_a: mx.array, cache: mx.array) -> bool:
    batch, _, length, latent_dim = q_latent.shape
    few = batch == 1 and length <= launcher.MAX_TOKENS and kv_a.shape[-1] % 2 == 0
    if cache.dtype == mx.uint8:
        return few and latent_dim <= MAX_PACKED
    return few and latent_dim <= MAX_LATENT and cache.dtype == q_latent.dtype


@memoised
def _launches(
    back_end: launcher.BackEnd,
    heads: int,
    length: int,
    latent_dim: int,
    rope_dim: int,
    qk_head_dim: int,
    kv_a_dim: int,
    room: int,
    dtype: mx.Dtype,
    stored: mx.Dtype,
    eps: float,
    scale: float,
    norm_layout: launcher.Layout | None,
    v_b: launcher.Kind,
    v_b_layout: launcher.Layout | None,
) -> tuple[launcher.Launch, launcher.Launch]:
    """`room`: rows of the cache, to a power of 2."""
    what = f"{heads} heads, {latent_dim} + {rope_dim}, {room} rows" + " in 8 bits" * (stored == mx.uint8)
    values = v_b[1][1]
    fits = v_b[1] == (heads, values, latent_dim)
    launcher.require("mla_decode", (fits, f"v_b of shape {v_b[1]} for {heads} heads of {latent_dim} values"))
    attention = _Attention(
        heads,
        length,
        latent_dim,
        rope_dim,
        qk_head_dim - rope_dim,
        kv_a_dim,
        room,
        dtype,
        stored,
        eps,
        scale,
        norm_layout,
        what,
    )
    attend_by = _matrices if _takes_matrices(attention) else _vectors
    split = attend_by(back_end, attention)
    groups = max(1, split.merge_simdgroups * 32 // (latent_dim // 4))  # of threads, as the text has them
    merge = launcher.prepare(
        back_end,
        "mla_merge",
        inputs=["partial"],
        weights={"V_B": v_b},
        layout=v_b_layout,
        outputs={"y": ((1, length, heads * values), dtype)},
        template={
            "T": dtype,
            "HEADS": heads,
            "QUERIES": length,
            "SPLITS": split.splits,
            "LATENT": latent_dim,
            "VALUES": values,
            "ROWS": split.merge_rows,
            "SIMDGROUPS": split.merge_simdgroups,
        },
        threadgroups=(-(-values // (split.merge_rows * split.merge_simdgroups)), heads, length),
        simdgroups=split.merge_simdgroups,
        threadgroup_bytes=(groups * latent_dim + split.splits) * 4,
    )
    return split.attend, merge


@dataclass(frozen=True)
class _Attention:
    """What the launches of attention are prepared for; `what`: their name in tables of launch shapes."""

    heads: int
    length: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    kv_a_dim: int
    room: int
    dtype: mx.Dtype
    stored: mx.Dtype
    eps: float
    scale: float
    norm_layout: launcher.Layout | None
    what: str

    @property
    def width(self) -> int:
        return self.latent_dim + self.rope_dim

    def prepare(
        self,
        back_end: launcher.BackEnd,
        op: str,
        splits: int,
        heads_at_once: int,
        simdgroups: int,
        shared: int,
        more_shared: int = 0,
        **template: int | mx.Dtype,
    ) -> launcher.Launch:
        """shared, more_shared: floats of threadgroup memory, those that the text sizes by SHARED and others."""
        return launcher.prepare(
            back_end,
            op,
            inputs=["q_latent", "q", "kv_a", "wavelengths", "cache", "position"],
            writes=["cache"],
            weights={},
            vectors=["norm_weight"],
            layout=self.norm_layout,
            # Of each split its sums, largest score and sum of exponentials, and two zeros, which align the next.
            outputs={"partial": ((self.heads, self.length, splits, self.latent_dim + 4), mx.float32)},
            template={
                "T": self.dtype,
                "HEADS": self.heads,
                "QUERIES": self.length,
                "LATENT": self.latent_dim,
                "ROPE": self.rope_dim,
                "NOPE": self.nope_dim,
                "KV_A": self.kv_a_dim,
                "HEADS_AT_ONCE": heads_at_once,
                "SIMDGROUPS": simdgroups,
                "SHARED": shared,
                **template,
            },
            # Powers of 2 are one instruction, powers of e two.
            defines={"SCALE": f"{self.scale * math.log2(math.e)!r}f", "EPS": f"{self.eps!r}f"},
            helpers="mla_decode",
            threadgroups=(splits, -(-self.heads // heads_at_once), self.length),
            simdgroups=simdgroups,
            threadgroup_bytes=(shared + more_shared) * 4,
        )


class _Split(NamedTuple):
    """The launch that attends, its number of splits, and rows and simdgroups of the one that adds them up."""

    attend: launcher.Launch
    splits: int
    merge_rows: int
    merge_simdgroups: int


def _vectors(back_end: launcher.BackEnd, a: _Attention) -> _Split:
    heads_at_once, simdgroups, rows_at_once, rows_of_split, most, *merge = launch_shape(
        "mla_decode",
        a.what,
        a.length,
        HEADS_AT_ONCE=HEADS_AT_ONCE,
        SIMDGROUPS=SIMDGROUPS,
        ROWS_AT_ONCE=ROWS_AT_ONCE,
        ROWS_OF_SPLIT=ROWS_OF_SPLIT,
        MAX_SPLITS=MAX_SPLITS,
        MERGE_ROWS=MERGE_ROWS,
        MERGE_SIMDGROUPS=MERGE_SIMDGROUPS,
    )
    # Half of the simdgroups put their sums into threadgroup memory.
    half = (simdgroups + 1) // 2
    while heads_at_once > 1 and half * heads_at_once * (a.latent_dim + 2) * 4 > launcher.MAX_THREADGROUP_BYTES:
        heads_at_once //= 2
    scores = heads_at_once * rows_at_once
    launcher.require(
        "mla_decode",
        (32 % scores == 0, f"{heads_at_once} heads and {rows_at_once} rows at once; their product must divide 32"),
    )
    splits = min(most, max(1, a.room // rows_of_split))
    half_of_them = half * heads_at_once
    # What a lane has of a row, in words of 4 bytes.
    words = 5 + -(-a.rope_dim // 64) if a.stored == mx.uint8 else -(-a.width // 64) * a.dtype.size // 2
    shared = max(half_of_them * a.latent_dim, a.length * 32 * words)  # or the new rows
    launch = a.prepare(
        back_end,
        "mla_decode",
        splits,
        heads_at_once,
        simdgroups,
        shared,
        half_of_them * 2,
        STORED=a.stored,
        ROWS_AT_ONCE=rows_at_once,
    )
    return _Split(launch, splits, *merge)


def _takes_matrices(a: _Attention) -> bool:
    """Whether `mla_matrix` reads such rows, and there may be enough of them that it is faster."""
    whole = a.latent_dim % (8 * MATRIX_SIMDGROUPS) == 0 and a.rope_dim % 8 == 0
    heads = MANY_HEADS if a.room >= MANY_ROWS else MATRIX_HEADS
    fits = 4 * _matrix_shared(a, heads) <= launcher.MAX_THREADGROUP_BYTES
    return whole and fits and a.room >= MATRIX_ROWS and a.stored == a.dtype != mx.float32


def _matrix_shared(a: _Attention, heads_at_once: int) -> int:
    """Floats of threadgroup memory: scores by simdgroup, factors and weights; or the queries, or the last rows; or the
    sums of 8 heads."""
    working = MATRIX_SIMDGROUPS * heads_at_once * 36 + heads_at_once * (8 + 40 // 2)
    return max(working, max(heads_at_once, 16) * (a.width + 8) // 2, 8 * (a.latent_dim + 4))


def _matrices(back_end: launcher.BackEnd, a: _Attention) -> _Split:
    heads, ahead = (MANY_HEADS, MANY_AHEAD) if a.room >= MANY_ROWS else (MATRIX_HEADS, MATRIX_AHEAD)
    heads_at_once, threadgroups, turns_ahead, *merge = launch_shape(
        "mla_decode",
        a.what,
        a.length,
        MATRIX_HEADS=heads,
        MATRIX_THREADGROUPS=MATRIX_THREADGROUPS,
        MATRIX_AHEAD=ahead,
        MERGE_ROWS=MERGE_ROWS,
        MERGE_SIMDGROUPS=MERGE_SIMDGROUPS,
    )
    launcher.require(
        "mla_decode", (heads_at_once % 8 == 0, f"{heads_at_once} heads at once; a multiple of 8 is possible")
    )
    heads_at_once = min(heads_at_once, -(-a.heads // 8) * 8)
    splits = max(2, threadgroups // -(-a.heads // heads_at_once))  # one is for the last rows
    shared = _matrix_shared(a, heads_at_once)
    launch = a.prepare(
        back_end, "mla_matrix", splits, heads_at_once, MATRIX_SIMDGROUPS, shared, TURNS_AHEAD=turns_ahead
    )
    return _Split(launch, splits, *merge)
