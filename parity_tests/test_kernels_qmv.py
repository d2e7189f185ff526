"""qmv's kernel: every type, 1 to 8 rows of x, both sides of every edge, against float64 and MLX's own 16-bit matmul."""

import mlx.core as mx
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from glm_mlx.make_tiny import random_blocks
from glm_mlx.packing import pack
from kernels.planes import GROUP, QUANT_TYPES, SUPER, Weight
from kernels.qmv import ROWS, SIMDGROUPS, Norm, qmv, qmv_all, qmv_beside
from parity_tests.budgets import BUDGETS, record
from parity_tests.kernel_cases import (
    DTYPES,
    KINDS,
    Case,
    HeadQmv,
    Qmv,
    about,
    bits,
    block,
    float64,
    random_weight,
    run,
    values,
    verify,
)
from parity_tests.test_quants import HALVES, SCALES_AT

ABOUT = about(4 * ROWS * SIMDGROUPS)  # a simdgroup takes ROWS, or 2 or 4 times as many where rows are short
EDGES = (ABOUT - 1, ABOUT, ABOUT + 1)
# A lane takes 8 columns a turn. Up to 32 lanes share a row, as its length and type say, and a lane takes up to DEPTH
# turns before it goes round again: rows of 2304 and more take more than one round.
COLS = {
    1: (8, 40, 248, 256, 504, 512, 1000, 2504, 4096),
    GROUP: (32, 96, 224, 256, 480, 512, 1408, 2528, 4096),
    SUPER: (256, 512, 768, 1280, 2304, 4096),
}
EVERY = [
    Qmv((kind,) * 3, EDGES, cols, norm=bool(i % 2), tokens=1 + (3 * i + j) % 8, dtype=DTYPES[(i + j) % 3])
    for j, kind in enumerate(KINDS)
    for i, cols in enumerate(COLS[block(kind)])
]
RESIDUAL = [
    Qmv(
        (kind,),
        (EDGES[j % 3],),
        cols,
        bool(i % 2),
        residual=True,
        tokens=1 + (5 * i + j) % 8,
        dtype=DTYPES[(i + j + 1) % 3],
    )
    for j, kind in enumerate(KINDS)
    for i, cols in enumerate(COLS[block(kind)][3:5])
]
HEADS = [
    HeadQmv(kind, 3, EDGES[j % 3], cols, tokens=1 + (2 * i + j) % 8, dtype=DTYPES[(i + j) % 3], merges=bool(i % 2))
    for j, kind in enumerate(KINDS)
    for i, cols in enumerate(COLS[block(kind)][1:3])
]
F32 = mx.float32
NORMED = [
    Qmv(("F32",), (64,), 2048, normed_too=True, dtype=mx.bfloat16, out=F32),  # fewer rows than columns: a router
    Qmv(("F32",), (48,), 1000, normed_too=True, tokens=8, dtype=mx.float16, out=F32),
    Qmv(("Q4_0",), (ABOUT + 1,), 32, normed_too=True, tokens=3),  # more
    Qmv(("Q5_0",), (ABOUT - 1,), 480, normed_too=True, tokens=2, dtype=mx.bfloat16),
    Qmv(("Q6_K",), (9,), 2304, normed_too=True, tokens=4, dtype=mx.float16, out=mx.bfloat16),
    Qmv(("BF16",), (1,), 264, normed_too=True, tokens=2, dtype=mx.bfloat16),
    Qmv(("Q8_0",), (ABOUT,), 96, tokens=3, dtype=mx.bfloat16, out=F32),
    Qmv(("Q4_K",), (ABOUT,), 512, norm=True, residual=True, tokens=3, dtype=mx.float16, out=F32),
]
MIXED = [
    Qmv(("Q4_0", "Q8_0"), (ABOUT + 3, ABOUT - 3), 2048, dtype=mx.bfloat16),
    Qmv(("Q4_K", "Q5_0", "Q6_K"), (17, 3, 18), 768, norm=True, tokens=2),
    Qmv(("Q4_0", "Q4_K"), (17, 8), 256, tokens=4),  # as many lanes to a row as the second needs
    Qmv(("F32", "BF16", "IQ4_NL", "Q5_1"), (9, 1, 16, 7), 288, tokens=5, dtype=mx.float16),
    *(Qmv((kind,), (1,), 2304, tokens=3) for kind in KINDS),
]
REAL: list[Case] = [
    Qmv(("Q4_0", "Q4_0"), (768, 576), 2048, norm=True, dtype=mx.bfloat16),  # q_a, kv_a
    Qmv(("Q4_K", "Q8_0"), (768, 576), 2048, norm=True, dtype=mx.float16),
    Qmv(("Q4_0",), (5120,), 768, norm=True, tokens=8),  # q_b
    HeadQmv("Q5_0", 20, 512, 192, dtype=mx.bfloat16, beside=64),  # k_b
    HeadQmv("Q8_0", 20, 256, 512, tokens=2, merges=True),  # v_b
    Qmv(("Q4_0",), (2048,), 5120, residual=True, tokens=2, dtype=mx.bfloat16),  # output projection
    Qmv(("Q4_0", "Q4_0"), (10240, 10240), 2048, norm=True),  # gate and up of the dense layer
    Qmv(("Q4_1",), (2048,), 10240, residual=True, dtype=mx.bfloat16),  # its down
    Qmv(("F32",), (64,), 2048, normed_too=True, dtype=mx.bfloat16, out=F32),  # router
    Qmv(("Q6_K",), (15488,), 2048, norm=True, dtype=mx.bfloat16),  # a tenth of the head
]


@pytest.mark.parametrize("case", [*EVERY, *RESIDUAL, *NORMED, *HEADS, *MIXED], ids=str)
def test_agrees_with_float64(case: Case) -> None:
    verify(case)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_agrees_with_float64_at_real_shapes(case: Case) -> None:
    verify(case, "fast")


def with_row_scales(kind: str, scales: np.ndarray, cols: int) -> Weight:
    """A weight of which every row has one scale, and one minimum from the other end of `scales`."""
    rng = np.random.default_rng(1)
    if block(kind) == 1:
        data = (rng.uniform(-1, 1, (len(scales), cols)) * scales[:, None]).astype(np.float32)
        return mx.array(data).astype({"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[kind])
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = random_blocks(rng, kind, (len(scales), cols), 1.0).reshape(len(scales), -1, nbytes).view(np.uint8)
    for at, halves in zip(SCALES_AT.get(kind, (0,)), (scales, scales[::-1]), strict=False):
        blocks[:, :, at : at + 2] = halves.astype(np.float16)[:, None, None].view(np.uint8)
    return pack(blocks.reshape(len(scales), -1), GGMLQuantizationType[kind], (len(scales), cols))


@pytest.mark.parametrize("kind", KINDS)
def test_scales_of_any_size_are_exact(kind: str) -> None:
    """The largest, the smallest, zero and negative ones. Errors are held against the row's own sum of magnitudes."""
    scales = HALVES[np.isfinite(HALVES)].astype(np.float64)
    if kind in ("F32", "BF16"):
        scales = np.array([0.0, 1e30, -1e30, 1e-30, -1e-30, 1.0, 65504.0, 1e-10])
    w = with_row_scales(kind, scales, 768)
    x = mx.array(np.random.default_rng(2).standard_normal((2, 768)).astype(np.float32))
    (y,) = run(lambda: [qmv(x, w)])
    magnitude = np.abs(float64(x)) @ np.abs(values(w)).T
    error = np.abs(float64(y) - float64(x) @ values(w).T)
    assert np.isfinite(error).all()
    record("kernel", float((error / np.maximum(magnitude, 1e-300)).max()), f"scales of {kind}")
    assert (error <= BUDGETS["kernel"].most * magnitude).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so_and_in_its_row(kind: str, bad: float) -> None:
    w = random_weight(kind, (ABOUT, 512), 0)
    x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    (clean,) = run(lambda: [qmv(mx.array(x), w)])
    x[1, 300] = bad
    (y,) = run(lambda: [qmv(mx.array(x), w)])
    assert not np.isfinite(float64(y[1])).any()
    assert np.isnan(float64(y[1])).all() or not np.isnan(bad)
    assert bits(y[::2]) == bits(clean[::2])


def test_keeps_the_leading_dimensions_of_x() -> None:
    w = random_weight("Q5_1", (24, 64), 0)
    x = mx.array(np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32))
    (y,) = run(lambda: [qmv(x, w)])
    (flat,) = run(lambda: [qmv(x.reshape(6, 64), w)])
    (one,) = run(lambda: [qmv(x[1, 2], w)])
    assert (y.shape, one.shape) == ((2, 3, 24), (24,))
    assert bits(y.reshape(6, 24)) == bits(flat)
    assert bits(y[1, 2]) == bits(one)


@pytest.mark.parametrize("tokens", [1, 3])
def test_results_side_by_side_are_the_same_and_the_next_matrix_reads_the_first_columns(tokens: int) -> None:
    a, b, c = (random_weight("Q4_0", shape, i) for i, shape in enumerate(((64, 96), (24, 96), (16, 64))))
    norm = Norm(mx.full((96,), 1.5), 1e-5)
    x = mx.array(np.random.default_rng(0).standard_normal((tokens, 96)).astype(np.float32))
    apart = run(lambda: qmv_all(x, [a, b], norm))
    (beside,) = run(lambda: [qmv_beside(x, [a, b], norm)])
    assert bits(beside) == bits(mx.concatenate(apart, axis=-1))
    (first,) = run(lambda: [qmv(beside, c)])
    assert bits(first) == bits(run(lambda: [qmv(apart[0], c)])[0])


def test_reads_x_that_is_not_contiguous() -> None:
    w = random_weight("Q4_0", (24, 64), 0)
    x = mx.array(np.random.default_rng(0).standard_normal((64, 3)).astype(np.float32)).T
    assert bits(run(lambda: [qmv(x, w)])[0]) == bits(run(lambda: [qmv(mx.contiguous(x), w)])[0])


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_a_row_is_the_same_whatever_is_computed_beside_it(kind: str) -> None:
    """Each row of x by each matrix gives the same bits alone as in the largest launch."""
    a, b = random_weight(kind, (ABOUT + 1, 768), 0), random_weight("Q8_0", (ABOUT - 1, 768), 1)
    x = mx.array(np.random.default_rng(0).standard_normal((8, 768)).astype(np.float32)).astype(mx.float16)
    both = run(lambda: qmv_all(x, [a, b]))
    assert bits(run(lambda: [qmv(x[5:6], b)])[0]) == bits(both[1][5:6])
    assert bits(run(lambda: [qmv(x[7:], a)])[0]) == bits(both[0][7:])
