"""Quantised weights: exact values for every type, and every op that reads them against float64."""

from collections.abc import Callable

import gguf
import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glm_mlx.make_tiny import random_blocks
from glm_mlx.packing import CHUNK_VALUES, pack, packed_nbytes
from glm_mlx.weights import EXPANDED_TYPES
from kernels.embed import embed_ops
from kernels.experts_down import experts_down_ops
from kernels.experts_gate_up import experts_gate_up_ops
from kernels.planes import IQ4_NL_VALUES, QUANT_TYPES, QuantizedTensor, Weight, dequantize_ops, unpack_quants
from kernels.qmv import SMALL, gather_qmv_ops, head_qmv_ops, qmv_ops, with_affine, with_values
from kernels.route import Router
from kernels.small_experts import small_experts, small_moe
from parity_tests.budgets import check
from parity_tests.compare import Array, to_numpy

PLANAR = tuple(QUANT_TYPES)
EVERY = (*PLANAR, "F16", "BF16", "F32")
HALVES = np.array([0.0, -0.0, 65504, -65504, 6e-8, -6e-8, 6.1e-5, 1.0, -1.0, np.inf, -np.inf, np.nan], np.float16)
SCALES_AT = {"Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}


def raw_blocks(kind: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Bytes that take every value, scales too: (rows, bytes of a row)."""
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return np.random.default_rng(seed).integers(0, 256, (rows, cols // block * nbytes), np.uint8)


def expected(raw: np.ndarray, kind: str) -> Array:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw, GGMLQuantizationType[kind])


def weight(kind: str, shape: tuple[int, ...], seed: int = 0) -> tuple[Weight, np.ndarray]:
    """A random weight of sane scale, and its values in float64."""
    data = random_blocks(np.random.default_rng(seed), kind, shape, shape[-1] ** -0.5)
    raw = data.view(np.uint8).reshape(*shape[:-1], -1)
    packed = pack(raw, GGMLQuantizationType[kind], shape)
    return packed, expected(raw, kind).reshape(shape).astype(np.float64)


@pytest.mark.parametrize("kind", [*EVERY, *EXPANDED_TYPES])
def test_values_equal_ggufs_bit_for_bit_for_any_bytes(kind: str) -> None:
    """Random bytes hold every quant and sub-scale, and scales of every size, sign, subnormal, infinite and NaN."""
    raw = raw_blocks(kind, rows=64, cols=1024)
    assert_same_bits(pack(raw, GGMLQuantizationType[kind], (64, 1024)), expected(raw, kind))


@pytest.mark.parametrize("kind", PLANAR)
def test_values_equal_ggufs_at_extreme_scales(kind: str) -> None:
    cols = 256 * len(HALVES)
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = raw_blocks(kind, len(HALVES), cols, seed=1).reshape(len(HALVES), -1, nbytes)
    for n, at in enumerate(SCALES_AT.get(kind, (0,))):
        # each row one minimum, each block of it one scale: all pairs
        values = HALVES[np.arange(blocks.shape[1]) % len(HALVES)] if n == 0 else HALVES[:, None]
        blocks[:, :, at : at + 2] = np.broadcast_to(values, blocks.shape[:2])[..., None].copy().view(np.uint8)
    raw = blocks.reshape(len(HALVES), -1)
    assert_same_bits(pack(raw, GGMLQuantizationType[kind], (len(HALVES), cols)), expected(raw, kind))


def assert_same_bits(got: Weight, want: Array) -> None:
    values = np.array(dequantize_ops(got))
    same = (values.view(np.uint32) == want.view(np.uint32)) | (np.isnan(values) & np.isnan(want))
    check("dequantize", ~same, np.zeros_like(same))


@pytest.mark.parametrize("kind", PLANAR)
def test_packing_in_chunks_joins_at_every_seam(kind: str) -> None:
    """A tensor of more than two chunks, the last one ragged."""
    rows = 2 * CHUNK_VALUES // 1024 + 3
    raw = raw_blocks(kind, rows, 1024)
    packed = pack(raw, GGMLQuantizationType[kind], (rows, 1024))
    assert isinstance(packed, QuantizedTensor)
    at = np.random.default_rng(2).integers(0, rows, 200)
    assert_same_bits(packed[mx.array(at)], expected(raw[at], kind))
    assert_same_bits(packed[-3:], expected(raw[-3:], kind))


@pytest.mark.parametrize("kind", EVERY)
def test_weights_keep_the_files_own_size(kind: str) -> None:
    raw = raw_blocks(kind, 32, 512)
    packed = pack(raw, GGMLQuantizationType[kind], (32, 512))
    assert packed.nbytes == raw.nbytes == packed_nbytes(GGMLQuantizationType[kind], (32, 512))


@pytest.mark.parametrize("kind", PLANAR)
def test_quants_stand_in_the_order_of_mlx_affine_quantisation(kind: str) -> None:
    """MLX's own dequantize reads our plane: scale 1 and bias 0 give the quants."""
    packed, _ = weight(kind, (8, 512))
    assert isinstance(packed, QuantizedTensor)
    ones = mx.ones((8, 512 // 32))
    mine = mx.dequantize(packed.quants, ones, 0 * ones, 32, packed.type.bits)
    np.testing.assert_array_equal(np.array(mine), np.array(unpack_quants(packed)))


def test_the_iq4_nl_table_is_ggufs() -> None:
    assert tuple(gguf.quants.IQ4_NL.kvalues) == IQ4_NL_VALUES


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", EVERY)
def test_matmul_agrees_with_float64(kind: str, rows: int) -> None:
    w, values = weight(kind, (48, 768))
    x = np.random.default_rng(1).standard_normal((rows, 768)).astype(np.float32)
    check("matmul", np.array(qmv_ops(mx.array(x), w)), x.astype(np.float64) @ values.T, f"{kind}, {rows} rows")


@pytest.mark.parametrize("kind", EVERY)
def test_matmul_per_head_takes_each_heads_own_matrix(kind: str) -> None:
    w, values = weight(kind, (5, 16, 256))
    x = np.random.default_rng(1).standard_normal((2, 5, 3, 256)).astype(np.float32)
    want = np.einsum("bhlk,hrk->bhlr", x.astype(np.float64), values)
    check("matmul", np.array(head_qmv_ops(mx.array(x), w)), want, f"{kind} per head")


@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("shared_x", [True, False])
@pytest.mark.parametrize("kind", EVERY)
def test_gathered_matmul_takes_each_tokens_own_experts(kind: str, shared_x: bool, tokens: int) -> None:
    """Fewer and more choices than experts: both ways through the op. Expert 6 is chosen twice by one token."""
    w, values = weight(kind, (7, 16, 256))
    rng = np.random.default_rng(tokens)
    experts = rng.integers(0, 7, (tokens, 3))
    experts[0, :2] = 6
    x = rng.standard_normal((tokens, 1 if shared_x else 3, 256)).astype(np.float32)
    want = np.einsum("tkc,tkrc->tkr", np.broadcast_to(x, (tokens, 3, 256)).astype(np.float64), values[experts])
    check("matmul", np.array(gather_qmv_ops(mx.array(x), w, mx.array(experts))), want, f"{kind} gathered")


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("kind", EVERY)
def test_a_small_weight_multiplies_the_same_with_its_affine_form_kept(kind: str, tokens: int) -> None:
    """Fewer and more choices than experts. What is kept is the reason for it: float32 scales, and no dense copy."""
    w, values = weight(kind, (7, 16, 256))
    kept = with_affine(w)
    kept_nbytes = sum(array.nbytes for form in getattr(kept, "affine", ()) for array in form)
    assert kept_nbytes == {"Q6_K": 0.5, "IQ4_NL": 0}.get(kind, 0.25 if kind in PLANAR else 0) * values.size
    x = np.random.default_rng(1).standard_normal((tokens, 2, 256)).astype(np.float32)
    assert mx.array_equal(qmv_ops(mx.array(x[:1]), kept), qmv_ops(mx.array(x[:1]), w))
    experts = np.random.default_rng(2).integers(0, 7, (tokens, 2))
    want = np.einsum("tkc,tkrc->tkr", x.astype(np.float64), values[experts])
    check("matmul", np.array(gather_qmv_ops(mx.array(x), kept, mx.array(experts))), want, f"{kind} gathered, kept")


@pytest.mark.parametrize("kind", EVERY)
def test_a_small_weight_multiplies_and_is_looked_up_the_same_with_its_values_kept(kind: str) -> None:
    w, values = weight(kind, (48, 256))
    kept = with_values(w)
    x = np.random.default_rng(1).standard_normal((3, 256)).astype(np.float32)
    check("matmul", np.array(qmv_ops(mx.array(x), kept)), x.astype(np.float64) @ values.T, f"{kind}, values kept")
    ids = mx.array([[0, 47, 7]])
    assert mx.array_equal(embed_ops(kept, ids, mx.float32), embed_ops(w, ids, mx.float32))


@pytest.mark.parametrize("keep", [with_affine, with_values])
def test_nothing_is_kept_beside_a_large_weight(keep: Callable[[Weight], Weight]) -> None:
    w, _ = weight("Q4_0", (SMALL // 256 + 1, 256))
    assert keep(w) is w


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_1", "Q5_K"])
@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_small_experts_are_what_both_halves_are(kind: str, shared: int, dtype: mx.Dtype) -> None:
    """Also with two shared experts, which stand side by side, and with none; 3 tokens."""
    experts, width, cols = 7, 256, 512
    shapes = [(experts, width, cols)] * 2 + [(experts, cols, width)]
    shapes += ([(shared * width, cols)] * 2 + [(cols, shared * width)]) if shared else []
    loaded = [with_affine(weight(kind, shape, seed)[0]) for seed, shape in enumerate(shapes)]
    gate, up, down, shared_gate, shared_up, shared_down = [*loaded, *[None] * (6 - len(loaded))]
    x, residual, logits = (
        mx.random.normal((1, 3, n), key=mx.random.key(i)).astype(dtype) for i, n in enumerate((cols, cols, experts))
    )
    logits, router = logits.astype(mx.float32), Router(None, 3, "sigmoid", True, 1.8)
    small = small_experts(gate, up, down, shared_gate, shared_up, shared_down)
    assert small is not None
    got, choice = small_moe(x, logits, router, small, residual)
    hidden, want_choice = experts_gate_up_ops(x, logits, router, gate, up, shared_gate, shared_up)
    want = experts_down_ops(hidden, want_choice, down, shared_down, residual)
    assert mx.array_equal(choice, want_choice)
    error = mx.abs(got.astype(mx.float32) - want.astype(mx.float32)).max() / mx.abs(want).max()
    assert float(error) < (1e-6 if dtype == mx.float32 else 2e-2)


def test_experts_of_two_types_or_without_their_affine_form_are_not_small_experts() -> None:
    q4, q8 = (with_affine(weight(kind, (7, 256, 256))[0]) for kind in ("Q4_0", "Q8_0"))
    plain = weight("Q4_0", (7, 256, 256))[0]
    assert small_experts(q4, q4, q8, None, None, None) is not None
    assert small_experts(q4, q8, q4, None, None, None) is None
    assert small_experts(q4, q4, plain, None, None, None) is None


@pytest.mark.parametrize("kind", EVERY)
def test_embedding_rows_are_the_weights_own(kind: str) -> None:
    w, values = weight(kind, (50, 256))
    ids = np.array([[0, 49, 7], [7, 7, 3]])
    check("embed", np.array(embed_ops(w, mx.array(ids), mx.float32)), values[ids].astype(np.float32), kind)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("kind", EVERY)
def test_16_bit_inputs_are_summed_in_float32(kind: str, dtype: mx.Dtype) -> None:
    """The only errors are the roundings of x and y: the result is the rounded float32 result."""
    w, values = weight(kind, (48, 768))
    x = mx.random.normal((3, 768), key=mx.random.key(0)).astype(dtype)
    got = qmv_ops(x, w)
    assert got.dtype == dtype
    want = mx.array((to_numpy(x).astype(np.float64) @ values.T).astype(np.float32)).astype(dtype)
    ulps = np.abs(to_numpy(got) - to_numpy(want)) / np.maximum(np.abs(to_numpy(want)), 1e-3)
    assert ulps.max() <= (2**-7 if dtype == mx.bfloat16 else 2**-9)
