"""Absorbed multi-head latent attention: every head attends to one shared latent row per position.

mla_decode(q_latent, q_pe, cache, scale, context) -> out, and the same with `_ops`
    q_latent  (B, H, L, R)      q_nope absorbed through k_b
    q_pe      (B, H, L, P)      rotated
    cache     (B, S, R + P)     [latent | k_pe], rotated; the last L valid rows are those of the queries
    scale     1 / sqrt(qk_head_dim), times YaRN's mscale squared
    context   (1,) int32        how many rows are valid, or None: all S
    out       (B, H, L, R)      dtype of q_latent; softmax and sums in float32

Query i sees all rows but the last L - 1 - i. The value is a view of the key: the first R columns of the cache. Source:
DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C, with k_b absorbed into the query and v_b applied by the
caller.

The kernel takes B = 1 and up to 8 queries. The context is split among threadgroups, each of which reads its rows once
for a few heads (S * (R + P) values for every group of heads, from the device's cache after the first), and a second,
small launch combines the splits. Right for any S up to 2^31 rows.
"""

import math
from functools import cache as memoised

import mlx.core as mx

from kernels import launcher

HEADS_AT_ONCE, SIMDGROUPS = 4, 4  # heads of a threadgroup, simdgroups of a threadgroup
ROWS_AT_ONCE = 4  # rows that a lane loads in one go
ROWS_OF_SPLIT, MAX_SPLITS = 32, 64  # rows that are worth a threadgroup of their own; splits that are worth combining
COMBINE_THREADS = 128


def mla_decode_ops(
    q_latent: mx.array, q_pe: mx.array, cache: mx.array, scale: float, context: mx.array | None = None
) -> mx.array:
    batch, heads, length, latent_dim = q_latent.shape
    rows = cache.astype(mx.float32)
    # All heads share the cache, so they are rows of one matmul.
    q = mx.concatenate([q_latent, q_pe], axis=-1).astype(mx.float32) * scale
    scores = (q.reshape(batch, heads * length, -1) @ rows.swapaxes(-1, -2)).reshape(batch, heads, length, -1)
    if length > 1 or context is not None:
        offset = (rows.shape[1] if context is None else context) - length
        visible = mx.arange(rows.shape[1]) <= (offset + mx.arange(length))[:, None]
        scores = mx.where(visible, scores, -mx.inf)
    probabilities = mx.softmax(scores, axis=-1).reshape(batch, heads * length, -1)
    out = probabilities @ rows[..., :latent_dim]
    return out.reshape(batch, heads, length, latent_dim).astype(q_latent.dtype)


def mla_decode(
    q_latent: mx.array, q_pe: mx.array, cache: mx.array, scale: float, context: mx.array | None = None
) -> mx.array:
    batch, heads, length, latent_dim = q_latent.shape
    rope_dim = q_pe.shape[-1]
    back_end = launcher.back_end("mla_decode") if batch == 1 and length <= launcher.MAX_TOKENS else None
    tiny = min(q_latent.size, q_pe.size, cache.size) < 8  # MLX hands Metal these as `constant`
    if back_end is None or latent_dim % 2 or rope_dim % 2 or tiny:
        return mla_decode_ops(q_latent, q_pe, cache, scale, context)
    rows = cache.shape[1]
    splits = 1 << max(0, min(MAX_SPLITS, rows // ROWS_OF_SPLIT).bit_length() - 1)
    attend, combine = _launches(back_end, heads, length, latent_dim, rope_dim, splits, q_latent.dtype, scale)
    partial, state = attend(q_latent, q_pe, cache, mx.array([rows], mx.int32) if context is None else context)
    return combine(partial, state)[0].reshape(q_latent.shape)


@memoised
def _launches(
    back_end: launcher.BackEnd,
    heads: int,
    length: int,
    latent_dim: int,
    rope_dim: int,
    splits: int,
    dtype: mx.Dtype,
    scale: float,
) -> tuple[launcher.Launch, launcher.Launch]:
    half_of_them = (SIMDGROUPS + 1) // 2
    attend = launcher.prepare(
        back_end,
        "mla_decode",
        inputs=["q_latent", "q_pe", "cache", "context"],
        weights={},
        outputs={
            "partial": ((heads, length, splits, latent_dim), mx.float32),
            "state": ((heads, length, splits, 2), mx.float32),
        },
        template={
            "T": dtype,
            "HEADS": heads,
            "QUERIES": length,
            "LATENT": latent_dim,
            "ROPE": rope_dim,
            "HEADS_AT_ONCE": HEADS_AT_ONCE,
            "ROWS_AT_ONCE": ROWS_AT_ONCE,
            "SIMDGROUPS": SIMDGROUPS,
        },
        # Powers of 2 are one instruction, powers of e two.
        defines={"SCALE": f"{scale * math.log2(math.e)!r}f"},
        threadgroups=(splits, -(-heads // HEADS_AT_ONCE), length),
        simdgroups=SIMDGROUPS,
        threadgroup_bytes=half_of_them * HEADS_AT_ONCE * (latent_dim + 2) * 4,
    )
    combine = launcher.prepare(
        back_end,
        "mla_combine",
        inputs=["partial", "state"],
        weights={},
        outputs={"y": ((heads, length, latent_dim), dtype)},
        template={"T": dtype, "SPLITS": splits, "LATENT": latent_dim, "THREADS": COMBINE_THREADS},
        threadgroups=(-(-latent_dim // COMBINE_THREADS), heads * length, 1),
        simdgroups=COMBINE_THREADS // launcher.LANES,
    )
    return attend, combine
