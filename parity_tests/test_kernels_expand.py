"""expand's kernel: every type and both dtypes, each value rounded once, and one text for all shapes."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.expand import SIMDGROUPS, expand, expand_ops
from kernels.planes import QUANT_TYPES, bundled, dequantize_ops
from parity_tests.kernel_cases import Expand, about, block, counting, expert_weight, on_gpu, random_weight, run
from parity_tests.msl.capture import KernelError

AT_ONCE = 8 * 32 * SIMDGROUPS  # values of a threadgroup
DTYPES = (mx.bfloat16, mx.float16)
CASES = [
    Expand(kind, shape, DTYPES[(i + j) % 2])
    for i, kind in enumerate(QUANT_TYPES)
    for j, shape in enumerate(
        [
            (about(8), block(kind)),  # less than a threadgroup
            (3, 5, max(256, block(kind))),  # a tail
            (AT_ONCE // 256 * 2, 256),  # whole threadgroups
            (2 * AT_ONCE // 256 + 1, 256),
        ]
    )
]


def rounded_once(case: Expand, got: mx.array) -> bool:
    """Bit for bit but for the sign of zero."""
    return bool((got == dequantize_ops(case.weight).astype(case.dtype)).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_is_rounded_once(case: Expand) -> None:
    (got,) = run(case.kernel)
    assert (got.shape, got.dtype) == (case.shape, case.dtype)
    assert rounded_once(case, got)


@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_types_agree_in_both_dtypes(kind: str) -> None:
    for dtype in DTYPES:
        case = Expand(kind, (9, 256), dtype)
        (got,) = run(case.kernel, "fast")
        assert rounded_once(case, got)


@pytest.mark.parametrize("experts", [[3], [1, 4], [4, 1, 1, 3, 4, 3, 1, 4, 4]], ids=str)
@pytest.mark.parametrize("kind", QUANT_TYPES)
def test_a_tile_has_the_values_of_its_expert(kind: str, experts: list[int]) -> None:
    """All others are poison, as is what stands before and after. A tile ends within a threadgroup."""
    w = expert_weight(kind, 6, (9, max(256, block(kind))), 0, np.unique(experts))
    ids = mx.array(experts, mx.uint32)
    for dtype in DTYPES:
        (got,) = run(lambda dtype=dtype: [expand(w, dtype, ids)])
        assert (got.shape, got.dtype) == ((len(experts), *w.shape[1:]), dtype)
        assert bool((got == expand_ops(w, dtype, ids)).all())
        assert bool((got == dequantize_ops(w[ids]).astype(dtype)).all())


def test_a_tile_of_no_expert_is_left_as_it_is() -> None:
    """The executor counts the bytes that were not written: those of three tiles, from the second on."""
    w = random_weight("Q4_0", (3, 8, 64), 0)
    ids, written = mx.array([1, 3, 2, 3, 3], mx.uint32), mx.array([0, 2])

    def call() -> list[mx.array]:
        return [expand(w, mx.bfloat16, ids)[written]]

    if on_gpu():
        assert bool((run(call)[0] == expand_ops(w, mx.bfloat16, ids[written])).all())
    else:
        with pytest.raises(KernelError, match="not written: 3072 of 5120 bytes of 'y', from byte 1024 on"):
            run(call)


def test_planes_that_stand_in_one_array_are_read_from_there() -> None:
    case = Expand("Q4_K", (9, 256))
    other = random_weight("Q4_K", (24, 256), 1)
    (_, w), _ = bundled([other, case.weight])
    (got,) = run(lambda: [expand(w, case.dtype)])
    assert rounded_once(case, got)


def test_all_shapes_of_a_type_share_what_is_compiled() -> None:
    """Compiling takes seconds."""
    with counting() as launches:
        for shape in ((16, 32), (3, 40, 64), (2, 24, 256)):
            run(Expand("Q4_0", shape).kernel, "fast")
        for ids in ([0], list(range(3)) * 4):
            run(
                lambda ids=ids: [expand(random_weight("Q4_0", (3, 8, 64), 0), mx.bfloat16, mx.array(ids, mx.uint32))],
                "fast",
            )
    assert len({str(launch.template) for launch in launches}) == 1
    assert len({str(sorted(launch.defines)) for launch in launches}) == 1
    # On a GPU each is launched more often.
    assert len(launches) >= 5
    assert {launch.weights["W"] for launch in launches} == {("Q4_0", (256,))}
