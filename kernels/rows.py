"""How a cache holds its rows: [latent | k_pe] of a token and layer, R + P values.

An array of floats holds just those. An array of uint8 holds them in 8 bits, in bytes of this order:

    R        uint8    the latent over the scale of its 32, plus 128
    2 P      float16  k_pe
    R / 16   float16  scales: the largest absolute value of 32 over 127
    0 to 15           nothing, so that every row begins at a multiple of 16

GLM-4.7-Flash's 576 values take 672 bytes, 1,152 in 16 bits. A scale and its quants are those of GGUF's Q8_0, but for
what the rounding of the scale to float16 changes: each value is divided by the scale as it is stored.
What is not finite makes its 32 values infinite or NaN; a latent whose largest value is below 4e-6 becomes 0.
"""

from dataclasses import dataclass

import mlx.core as mx

GROUP, ZERO = 32, 128  # values of the latent that share a scale; the quant that stands for 0
ALIGNED = 16  # bytes


@dataclass(frozen=True)
class RowFormat:
    """`latent_dim` R and `rope_dim` P values, in an array of `dtype`; uint8 takes an R that is a multiple of 32."""

    latent_dim: int
    rope_dim: int
    dtype: mx.Dtype

    @property
    def is_packed(self) -> bool:
        return self.dtype == mx.uint8

    @property
    def values(self) -> int:
        """Of a row."""
        return self.latent_dim + self.rope_dim

    @property
    def width(self) -> int:
        """Elements of a row's array."""
        if not self.is_packed:
            return self.values
        nbytes = self.latent_dim + 2 * self.rope_dim + self.latent_dim // GROUP * 2
        return -(-nbytes // ALIGNED) * ALIGNED

    @property
    def nbytes(self) -> int:
        return self.width * self.dtype.size

    def zeros(self, batch: int, rows: int) -> mx.array:
        return mx.zeros((batch, rows, self.width), self.dtype)

    def store(self, values: mx.array) -> mx.array:
        """(B, L, R + P) -> (B, L, width)"""
        if not self.is_packed:
            return values.astype(self.dtype)
        latent, k_pe = mx.split(values.astype(mx.float32), [self.latent_dim], axis=-1)
        groups = mx.unflatten(latent, -1, (-1, GROUP))
        scales = (mx.abs(groups).max(axis=-1) * (1 / 127)).astype(mx.float16)
        divisors = scales[..., None].astype(mx.float32)
        quants = mx.where(divisors == 0, 0, mx.clip(mx.round(groups / divisors), -127, 127)) + ZERO
        parts = [quants.flatten(-2).astype(mx.uint8), k_pe.astype(mx.float16), scales]
        stored = mx.concatenate([part.view(mx.uint8) for part in parts], axis=-1)
        return mx.pad(stored, [(0, 0), (0, 0), (0, self.width - stored.shape[-1])])

    def load(self, rows: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
        """(B, S, width) -> (B, S, R + P) float32, or rounded once to float16"""
        if not self.is_packed:
            return rows.astype(dtype)
        ends = [self.latent_dim, self.latent_dim + 2 * self.rope_dim]
        ends.append(ends[1] + self.latent_dim // GROUP * 2)
        latent, k_pe, scales, _ = mx.split(rows, ends, axis=-1)
        groups = mx.unflatten(latent.astype(dtype) - ZERO, -1, (-1, GROUP))
        groups = groups * scales.view(mx.float16)[..., None].astype(dtype)
        return mx.concatenate([groups.flatten(-2), k_pe.view(mx.float16).astype(dtype)], axis=-1)
