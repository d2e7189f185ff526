"""Rows of the cache in 8 bits: the bytes, what they are worth, and attention that reads them."""

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGMLQuantizationType

from kernels import mla_decode
from kernels.mla_decode import attend_ops
from kernels.rows import RowFormat
from parity_tests.budgets import check
from parity_tests.test_ops import in_blocks

SHAPES = [(512, 64), (64, 16), (32, 2), (96, 10), (128, 32)]
Floats = npt.NDArray[np.float64]


def packed(latent_dim: int, rope_dim: int) -> RowFormat:
    return RowFormat(latent_dim, rope_dim, mx.uint8)


def random_values(latent_dim: int, rope_dim: int, rows: int = 33, sequences: int = 2) -> npt.NDArray[np.float32]:
    """Normal values, of which each row has its own size."""
    rng = np.random.default_rng(latent_dim + rope_dim)
    values = rng.standard_normal((sequences, rows, latent_dim + rope_dim))
    return (values * 10.0 ** rng.uniform(-2, 2, (sequences, rows, 1))).astype(np.float32)


def read_by_hand(stored: npt.NDArray[np.uint8], latent_dim: int, rope_dim: int) -> tuple[Floats, Floats, Floats]:
    """The latent, k_pe and the scales of each value, byte by byte as `kernels.rows` describes them."""
    quants = stored[..., :latent_dim].astype(np.float64) - 128
    k_pe = stored[..., latent_dim : latent_dim + 2 * rope_dim].copy().view(np.float16).astype(np.float64)
    begin = latent_dim + 2 * rope_dim
    scales = stored[..., begin : begin + latent_dim // 16].copy().view(np.float16).astype(np.float64)
    scales = np.repeat(scales, 32, axis=-1)
    return quants * scales, k_pe, scales


@pytest.mark.parametrize(("latent_dim", "rope_dim"), SHAPES)
def test_a_row_holds_the_nearest_values_and_reads_as_described(latent_dim: int, rope_dim: int) -> None:
    row_format, values = packed(latent_dim, rope_dim), random_values(latent_dim, rope_dim)
    stored = np.array(row_format.store(mx.array(values)))
    assert stored.dtype == np.uint8
    assert stored.shape[-1] == row_format.width == row_format.nbytes
    assert row_format.width % 16 == 0
    assert 0 <= row_format.width - latent_dim - latent_dim // 16 - 2 * rope_dim < 16
    assert not stored[..., latent_dim + latent_dim // 16 + 2 * rope_dim :].any()
    latent, k_pe, scales = read_by_hand(stored, latent_dim, rope_dim)
    np.testing.assert_array_equal(k_pe, values[..., latent_dim:].astype(np.float16))
    largest = np.abs(values[..., :latent_dim]).reshape(*values.shape[:2], -1, 32).max(axis=-1)
    np.testing.assert_array_equal(scales[..., ::32], (largest * np.float32(1 / 127)).astype(np.float16))
    # To the nearest; the largest value of all may be cut off by what the scale lost when it was rounded.
    assert (np.abs(latent - values[..., :latent_dim]) <= (0.5 + 127 * 2.0**-11) * scales).all()
    assert (np.abs(latent - values[..., :latent_dim]) <= 0.5001 * scales).mean() > 0.95
    loaded = np.array(row_format.load(mx.array(stored)))
    np.testing.assert_array_equal(loaded, np.concatenate([latent, k_pe], axis=-1).astype(np.float32))


def test_it_loses_no_more_than_ggufs_q8_0() -> None:
    values = random_values(512, 64)[..., :512]
    q8_0 = gguf.quants.dequantize(gguf.quants.quantize(values, GGMLQuantizationType.Q8_0), GGMLQuantizationType.Q8_0)
    row_format = packed(512, 2)
    ours = np.array(row_format.load(row_format.store(mx.array(np.pad(values, ((0, 0), (0, 0), (0, 2)))))))[..., :512]
    sizes = np.abs(values).max(axis=-1, keepdims=True)
    lost, by_q8_0 = (((a - values) / sizes).std() for a in (ours, q8_0))
    assert lost <= 1.001 * by_q8_0


def test_what_is_packed_stays_as_it_is_when_packed_again() -> None:
    """The scale is found again wherever its largest quant is 127."""
    row_format = packed(64, 16)
    once = row_format.load(row_format.store(mx.array(random_values(64, 16))))
    np.testing.assert_allclose(np.array(row_format.load(row_format.store(once))), np.array(once), rtol=1e-3)


def test_zeros_stay_zeros_and_what_is_not_finite_shows() -> None:
    values = np.ones((1, 4, 64 + 8), np.float32)
    values[0, 0] = 0
    values[0, 1, :32] = 1e-7
    values[0, 2, 5] = np.nan
    values[0, 3, 40] = np.inf
    row_format = packed(64, 8)
    latent = np.array(row_format.load(row_format.store(mx.array(values))))[0, :, :64]
    assert not latent[0].any()
    assert not latent[1, :32].any()
    assert np.isnan(latent[2, :32]).all()
    assert not np.isfinite(latent[3, 40])
    for row, others in ((1, slice(32, 64)), (2, slice(32, 64)), (3, slice(0, 32))):
        np.testing.assert_allclose(latent[row, others], 1, rtol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_rows_of_floats_are_the_values(dtype: mx.Dtype) -> None:
    row_format, values = RowFormat(64, 16, dtype), mx.array(random_values(64, 16))
    stored = row_format.store(values)
    assert (stored.dtype, stored.shape) == (dtype, values.shape)
    assert row_format.nbytes == 80 * dtype.size
    np.testing.assert_array_equal(np.array(row_format.load(stored)), np.array(values.astype(dtype).astype(mx.float32)))


@pytest.mark.parametrize("length", [1, 7, 33])
@pytest.mark.parametrize("offset", [0, 15, 16, 17, 48])
@pytest.mark.parametrize(("queries", "block"), [(8, 16), (5, 7), (64, 1000)])
def test_attention_to_packed_rows_is_that_to_what_they_hold(
    queries: int, block: int, offset: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence after another, and two of different lengths."""
    in_blocks(monkeypatch, queries, block)
    values = mx.array(random_values(64, 16, rows=offset + length))
    stored = packed(64, 16).store(values)
    held = packed(64, 16).load(stored)
    q = mx.random.normal((2, 3, length, 80), key=mx.random.key(length))
    for context in (None, mx.array([offset + length, max(length, offset)])):
        got, want = (attend_ops(q[..., :64], q[..., 64:], rows, 0.25, context) for rows in (stored, held))
        check("same path", np.array(got), np.array(want), f"{length} queries at {offset}")


def test_packed_rows_are_never_unpacked_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one block of them takes is bounded, and nothing else grows with the rows."""
    monkeypatch.setattr(mla_decode, "UNPACKED", 512)
    block = 4 * 512 * 80
    q = mx.random.normal((1, 3, 64, 80))
    taken: dict[int, int] = {}
    for rows in (4096, 32_768):
        stored = packed(64, 16).store(mx.random.normal((1, rows, 80)))
        mx.eval(q, stored)
        counts = []
        for _ in range(3):
            held = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(attend_ops(q[..., :64], q[..., 64:], stored, 0.25))
            counts.append(mx.get_peak_memory() - held)
        taken[rows] = min(counts)
    assert taken[32_768] <= taken[4096] + 2 * block
