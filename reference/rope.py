"""Rotary positions: the angle of every pair at every position, and the softmax scale that YaRN changes.

Sources: YaRN (arXiv 2309.00071); llama.cpp `ggml_rope_yarn_corr_dims` and `rope_yarn` in `ggml/src/ggml-cpu/ops.cpp`,
and `src/models/deepseek2.cpp` for the scale. T positions, P rope dimensions, P/2 pairs. Float64 until the result.
"""

import math

import numpy as np

from .config import Config, Yarn


def cos_sin(config: Config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of position * frequency, each (T, P/2) float32."""
    angles = np.arange(length)[:, None] * frequencies(config)  # (T, P/2)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def frequencies(config: Config) -> np.ndarray:
    """Radians a position turns each pair by, (P/2,): rope_theta^(-2i/P), slowed down where YaRN says so."""
    pair = np.arange(config.qk_rope_head_dim // 2)
    plain = config.rope_theta ** (-2.0 * pair / config.qk_rope_head_dim)
    if config.yarn is None:
        return plain
    slowed = plain / config.yarn.factor
    low, high = correction_range(config, config.yarn)
    ramp = np.clip((pair - low) / max(0.001, high - low), 0, 1)  # 0: a fast pair, kept; 1: a slow pair, stretched
    return plain * (1 - ramp) + slowed * ramp


def correction_range(config: Config, yarn: Yarn) -> tuple[int, int]:
    """First and last pair of the ramp: those that turn beta_fast and beta_slow times in the original context."""

    def pair_turning(times: float) -> float:
        wavelength = yarn.original_context_length / (times * 2 * math.pi)
        return config.qk_rope_head_dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(0, math.floor(pair_turning(yarn.beta_fast)))
    high = min(config.qk_rope_head_dim - 1, math.ceil(pair_turning(yarn.beta_slow)))
    return low, high


def softmax_scale(config: Config) -> float:
    """mscale^2 / sqrt(qk_head_dim). YaRN sharpens the softmax and, in deepseek2, leaves cosine and sine at length 1."""
    mscale = 1 + config.yarn.log_multiplier * math.log(config.yarn.factor) if config.yarn else 1.0
    return mscale**2 / math.sqrt(config.qk_head_dim)
