"""A prompt's many tokens in 16 bits: what a GPU's matrix units multiply, with sums in float32.

matmul(x, w) -> (..., L, rows), like `qmv_ops`
    x  (..., L, cols)     bfloat16 or float16
    w  (..., rows, cols)  a `Weight`, the leading dimensions those of x; its values are rounded once, to the dtype of x

by_tile(x, w, experts) -> (tiles, rows of a tile, rows)
    x  (tiles, rows of a tile, cols), w (E, rows, cols), experts (tiles,) uint32: see tiles.py, `expand`

attend(q_latent, q_pe, rows, scale) -> (B, H, L, R), like `attend_ops`
    q_latent  (B, H, L, R), q_pe (B, H, L, P)
    rows      (B, S, width)  as a cache holds them (rows.py), all valid, the last L of them those of the queries

`qmv_ops` and `attend_ops` ask `applies` and come here where it is faster. Expanding a weight costs a few bytes a value,
which many tokens share; the values live until their matmul is done.

Attention takes so few queries at once that their scores against all rows are within a bound, and needs no merging.
Queries, keys, scores and probabilities are float16: three bits more than bfloat16 has, and a score of 16 is off by
0.008 at most. Softmax is computed in float32.

MLX allocates when it hands work over, and frees when the GPU has done it: a host that runs ahead would have the
expanded experts of many layers in memory. So the products with `TILES` experts, each turn of attention and each layer
are `start`ed, and `UNDER_WAY` of them at most are not done when more is handed over; with one the GPU would wait for
the host. What a turn made and nobody wants is freed when all of it is done, by another thread of MLX's, which is late:
so turns are kept small. It may be later still: `within` says how much memory there may be until the host waits for it.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from kernels.expand import expand
from kernels.planes import Weight
from kernels.rows import RowFormat

LEAST_TOKENS = 64  # from which on expanding a weight is cheaper than its float32 matmul
# Of a prompt: as many are faster by the kernels of decode, `launcher.MAX_TOKENS` of them at a time. Behind `FAR_ROWS`
# half as many: there each token takes about twice as long, for it reads all rows by itself.
FEW_TOKENS, FAR_ROWS = 80, 32_768
TILES = 16  # whose experts are expanded at once: two matrices of 100 MB of GLM-4.7-Flash
SCORES = 40 << 20  # values of 2 bytes
UNDER_WAY = 3  # turns at most, beside the one that is handed over
ALIVE = 5  # turns whose memory may not be free yet
SCRATCH = 1_250_000_000  # bytes beside weights and cache from which on the host waits until all is free that can be
FREEING = 0.002  # seconds that MLX may take for that when the GPU is done
QUERIES = 512  # of each head and sequence, at once
UNPACKED = 8192  # rows of the cache that are in 8 bits, at once
ALIGNED = 32  # queries: as many at once as are a multiple of it, where there are so many
_started: list[mx.array] = []  # what `start` has not waited for, the oldest first
_most: float = math.inf  # bytes of all that MLX may hold: see `within`


def applies(tokens: int, dtype: mx.Dtype) -> bool:
    """Whether so many tokens are for this module. Not on Metal, where it was never measured, nor on a CPU, where 16
    bits are slow."""
    return tokens >= LEAST_TOKENS and dtype != mx.float32 and _on_cuda()


def are_few(tokens: int, rows: int, dtype: mx.Dtype) -> bool:
    """Whether so many tokens, behind so many rows, are for the kernels of decode if nothing follows them in a prompt.
    On CUDA alone, for the same reasons."""
    return tokens * (FAR_ROWS + rows) <= FEW_TOKENS * FAR_ROWS and dtype != mx.float32 and _on_cuda()


def _on_cuda() -> bool:
    return mx.default_device() == mx.Device(mx.gpu) and mx.cuda.is_available()


def matmul(x: mx.array, w: Weight) -> mx.array:
    return mx.matmul(x, expand(w, x.dtype).swapaxes(-1, -2))


def by_tile(x: mx.array, w: Weight, experts: mx.array) -> mx.array:
    return mx.matmul(x, expand(w, x.dtype, experts).swapaxes(-1, -2))


def start(result: mx.array) -> mx.array:
    """Hands over the work for a result, and waits until no more than `UNDER_WAY` are not done."""
    mx.async_eval(result)
    _started.append(result)
    while len(_started) > UNDER_WAY:
        mx.eval(_started.pop(0))
    if mx.get_active_memory() > _most:
        _started.clear()
        mx.synchronize()
        until = time.perf_counter() + FREEING
        while mx.get_active_memory() > _most and time.perf_counter() < until:
            time.sleep(FREEING / 20)
    return result


@contextmanager
def within(held: int) -> Iterator[None]:
    """For a prompt. Within the block MLX is to hold no more than `SCRATCH` beside so many bytes, where it is `started`;
    after it nothing more is to be waited for."""
    global _most
    _most = held + SCRATCH
    try:
        yield
    finally:
        _most = math.inf
        _started.clear()


def attend(q_latent: mx.array, q_pe: mx.array, rows: mx.array, scale: float) -> mx.array:
    batch, heads, length, latent_dim = q_latent.shape
    row_format = RowFormat(latent_dim, q_pe.shape[-1], rows.dtype)
    keys = _unpacked(rows, row_format) if row_format.is_packed else rows.astype(mx.float16)
    values = start(mx.contiguous(keys[..., :latent_dim]))
    at_once = queries_at_once(batch * heads, rows.shape[1])
    own = mx.arange(at_once) <= mx.arange(at_once)[:, None]  # among the rows of these queries, those that are seen
    parts: list[mx.array] = []
    for first in range(0, length, QUERIES):
        some = slice(first, first + QUERIES)
        q = mx.concatenate([q_latent[:, :, some], q_pe[:, :, some]], axis=-1)
        q = (q.astype(mx.float32) * scale).astype(mx.float16)
        for begin in range(0, q.shape[2], at_once):
            # All heads share the cache, so they are rows of one matmul.
            q_part = q[:, :, begin : begin + at_once]
            count = q_part.shape[2]
            seen = rows.shape[1] - length + first + begin + count  # by the last of these queries
            q_rows = q_part.reshape(batch, heads * count, -1)
            scores = _scores(q_rows, keys[:, :seen], heads)
            # Only rows of these queries can be unseen. Their scores are computed once more: what else reads those of
            # all rows would keep MLX from changing them in place.
            masked = _scores(q_rows, keys[:, seen - count : seen], heads)
            scores[..., seen - count :] = mx.where(own[:count, :count], masked, mx.array(-mx.inf, mx.float16))
            probabilities = mx.softmax(scores, axis=-1, precise=True).reshape(batch, heads * count, seen)
            del scores  # the array of both
            out = mx.matmul(probabilities, values[:, :seen]).reshape(batch, heads, count, latent_dim)
            parts.append(start(out.astype(q_latent.dtype)))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)


def _unpacked(rows: mx.array, row_format: RowFormat) -> mx.array:
    """(B, S, R + P) float16. A few rows at a time where they are many: three times as much stands on the way there."""
    count = rows.shape[1]
    if count <= UNPACKED:
        return start(row_format.load(rows, mx.float16))
    keys = mx.zeros((rows.shape[0], count, row_format.values), mx.float16)
    for begin in range(0, count, UNPACKED):
        some = slice(begin, begin + UNPACKED)
        # In place: `start` holds the same object, which changes with it.
        keys[:, some] = row_format.load(rows[:, some], mx.float16)
        start(keys)
    return keys


def _scores(q: mx.array, keys: mx.array, heads: int) -> mx.array:
    """q (B, H * L, R + P), keys (B, S, R + P) -> (B, H, L, S)"""
    return mx.unflatten(mx.matmul(q, keys.swapaxes(-1, -2)), 1, (heads, -1))


def queries_at_once(heads: int, rows: int) -> int:
    """How many queries of each of so many heads, those of all sequences together, meet so many rows at a time."""
    most = max(1, min(QUERIES, SCORES // (heads * rows)))
    return most if most < ALIGNED else most // ALIGNED * ALIGNED
