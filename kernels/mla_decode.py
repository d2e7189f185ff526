"""Absorbed multi-head latent attention: every head attends to one shared latent row per position.

mla_decode_ops(q, cache, offset, scale, latent_dim) -> out
    q       (B, H, L, R + P)   [q_latent | q_pe], rotated
    cache   (B, S, R + P)      [latent | k_pe], rotated; S = offset + L rows, all valid
    offset  position of the first query; query i sees rows 0 .. offset + i
    scale   1 / sqrt(qk_head_dim), times YaRN's mscale squared
    latent_dim  R
    out     (B, H, L, R)       dtype of q; softmax and sums in float32

The value is a view of the key: the first R columns of the cache. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1
and appendix C, with k_b absorbed into the query and v_b applied by the caller.
"""

import mlx.core as mx


def mla_decode_ops(q: mx.array, cache: mx.array, offset: int, scale: float, latent_dim: int) -> mx.array:
    batch, heads, length, width = q.shape
    rows = cache.astype(mx.float32)
    # All heads share the cache, so they are rows of one matmul.
    flat = q.astype(mx.float32).reshape(batch, heads * length, width) * scale
    scores = (flat @ rows.swapaxes(-1, -2)).reshape(batch, heads, length, -1)
    if length > 1:
        visible = mx.arange(rows.shape[1]) <= (offset + mx.arange(length))[:, None]
        scores = mx.where(visible, scores, -mx.inf)
    probabilities = mx.softmax(scores, axis=-1).reshape(batch, heads * length, -1)
    out = probabilities @ rows[..., :latent_dim]
    return out.reshape(batch, heads, length, latent_dim).astype(q.dtype)
