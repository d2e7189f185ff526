"""embed's kernel: every type, and tokens that are none of the vocabulary's, against float64."""

import pytest

from kernels.embed import SIMDGROUPS
from parity_tests.kernel_cases import DTYPES, KINDS, Embed, block, verify

BLOCK = 8 * 32 * SIMDGROUPS  # columns of a threadgroup
CASES = [
    Embed(kind, 17 + i, cols, tokens=1 + (3 * i) % 8, outside=i % 3 == 2, dtype=DTYPES[(i + j) % 3])
    for i, kind in enumerate(KINDS)
    for j, cols in enumerate((256, BLOCK, BLOCK + max(8, block(kind))))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_float64(case: Embed) -> None:
    verify(case)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_agrees_with_float64_at_the_real_width(kind: str) -> None:
    verify(Embed(kind, 4096, 2048, tokens=2, dtype=DTYPES[1]), "fast")
