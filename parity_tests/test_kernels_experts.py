"""The experts' kernels: every type, shape and choice, against float64 and MLX's own 16-bit operations."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kernels import experts_down as down
from kernels import experts_gate_up as gate_up
from kernels import launcher
from kernels.planes import GROUP, SUPER
from kernels.route import Router
from parity_tests.kernel_cases import (
    DTYPES,
    KINDS,
    Case,
    Down,
    GateUp,
    about,
    bits,
    block,
    float64,
    random_weight,
    run,
    verify,
)

ABOUT = about(gate_up.ROWS * gate_up.SIMDGROUPS)
EDGES = (ABOUT - 1, ABOUT, ABOUT + 1)
ROWS = about(down.ROWS)
SLOTS = down.MAX_SIMDGROUPS


def beside(number: int, cols: int) -> str:
    """A type for the shared experts, another than the routed ones have, whose blocks fill `cols`."""
    kinds = [kind for kind in KINDS if cols % block(kind) == 0]
    return kinds[(3 * number + 1) % len(kinds)]


# A lane takes 8 columns a turn, a simdgroup 256, and up to DEPTH turns before it goes round again: 2528 and 2304 take
# more than one round.
COLS = {
    1: (8, 2504, 256, 40, 1000, 2304),
    GROUP: (32, 288, 256, 96, 1408, 2528),
    SUPER: (256, 512, 2304, 768, 2560, 256),
}


def gate_up_cases(number: int, kind: str) -> list[GateUp]:
    """Shared experts narrower, equally wide, wider, twice as wide, and none."""
    cols = COLS[block(kind)]
    low, at, above = EDGES
    dtype = [DTYPES[(number + i) % 3] for i in range(6)]
    shared = [beside(number + i, cols[i]) for i in range(6)]
    return [
        GateUp(kind, 8, 1, 24, cols[0], shared[0], 24, tokens=1, dtype=dtype[0]),
        GateUp(kind, 10, 4, low, cols[1], shared[1], low, tokens=1, dtype=dtype[1]),
        GateUp(kind, 9, 4, at, cols[2], shared[2], 2 * at, tokens=2, dtype=dtype[2]),
        GateUp(kind, 9, 1, above, cols[3], tokens=7, dtype=dtype[3]),
        GateUp(kind, 33, 3, above, cols[4], shared[4], above // 2 + 1, tokens=3, dtype=dtype[4]),
        GateUp(kind, 9, 2, low, cols[5], shared[5], low + 5, tokens=8, dtype=dtype[5]),
    ]


def down_cases(number: int, kind: str) -> list[Down]:
    """Fewer than eight ids, eight, more, the same ones, and none of an expert; fewer, as many and more slots than
    simdgroups. Shared experts are as wide as others."""
    width = COLS[block(kind)]
    dtype = [DTYPES[(number + i) % 3] for i in range(6)]
    same = [beside(number + i, width[i]) for i in range(6)]
    return [
        Down(kind, 8, 1, width[0], ROWS - 1, same[0], width[0], tokens=1, dtype=dtype[0]),
        Down(kind, 6, 4, width[1], ROWS, same[1], width[1], tokens=1, dtype=dtype[1], residual=False),
        Down(kind, 7, 4, width[2], ROWS + 1, same[2], 2 * width[2], tokens=2, dtype=dtype[2]),
        Down(kind, 4, 1, width[3], ROWS - 1, ids="repeated", tokens=7, dtype=dtype[3]),
        Down(kind, 9, SLOTS, width[4], ROWS + 1, same[4], width[4], ids="outside", tokens=3, dtype=dtype[4]),
        Down(kind, 9, SLOTS - 1, width[5], ROWS, same[5], 3 * width[5], ids="outside", tokens=5, dtype=dtype[5]),
    ]


GATE_UP = [case for number, kind in enumerate(KINDS) for case in gate_up_cases(number, kind)]
DOWN = [case for number, kind in enumerate(KINDS) for case in down_cases(number, kind)]
OTHERS = [
    GateUp("Q4_0", up_kind="Q5_1", width=EDGES[0], cols=96, shared="F16", shared_width=16, tokens=4),
    GateUp("Q4_K", up_kind="Q6_K", width=EDGES[2], cols=512, tokens=6, dtype=mx.bfloat16),
    GateUp("Q4_0", experts=64, top_k=6, width=EDGES[1], cols=64, shared="Q4_0", shared_width=ABOUT, tokens=8),
    GateUp("Q8_0", experts=8, top_k=8, width=1, cols=256, tokens=2),
    Down("Q4_0", experts=64, top_k=6, width=64, cols=ROWS, shared="Q4_0", shared_width=128, tokens=8),
    Down("Q8_0", experts=2, top_k=2, width=256, cols=1, tokens=2),
    Down("Q4_0", top_k=SLOTS - 1, experts=SLOTS, width=64, cols=ROWS, shared="Q4_0", shared_width=64),
    Down("Q4_0", top_k=SLOTS + 2, experts=2 * SLOTS, width=32, cols=ROWS, residual=False),
    Down("BF16", top_k=2, width=40, cols=7, shared="F32", shared_width=80, tokens=3, dtype=mx.float16),
]


@pytest.mark.parametrize("case", [*GATE_UP, *DOWN, *OTHERS], ids=str)
def test_agrees_with_float64(case: Case) -> None:
    verify(case)


GLM: dict[str, Any] = {"experts": 64, "top_k": 4, "width": 1536, "cols": 2048, "shared_width": 1536}
LITE: dict[str, Any] = {"experts": 64, "top_k": 6, "width": 1408, "cols": 2048, "shared_width": 2816}
# As published: routed gate and up, routed down, shared gate and up, shared down.
REAL = {
    "GLM Q4_0": (GLM, "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
    "GLM Q4_0 with imatrix": (GLM, "Q4_0", "Q4_1", "Q4_0", "Q4_1"),
    "GLM Q4_K_M": (GLM, "Q4_K", "Q6_K", "Q4_K", "Q6_K"),
    "GLM Unsloth Q4_0": (GLM, "Q4_0", "Q4_0", "Q5_K", "Q6_K"),
    "GLM Q8_0": (GLM, "Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "GLM IQ4_NL": (GLM, "IQ4_NL", "Q5_1", "IQ4_NL", "IQ4_NL"),
    "GLM pruned to 48": ({**GLM, "experts": 48}, "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
    "GLM without a shared expert": ({**GLM, "shared_width": 0}, "Q4_0", "Q4_0", "", ""),
    "DeepSeek-V2-Lite Q4_0": (LITE, "Q4_0", "Q4_0", "Q4_0", "Q4_0"),
    "DeepSeek-V2-Lite Q4_K_M": (LITE, "Q4_K", "Q5_0", "Q4_K", "Q6_K"),
}


@pytest.mark.parametrize("name", REAL)
def test_agrees_with_float64_at_real_shapes(name: str) -> None:
    shape, routed, routed_down, shared, shared_down = REAL[name]
    dtype = DTYPES[list(REAL).index(name) % 3]
    verify(GateUp(routed, shared=shared, dtype=dtype, **shape), "fast")
    verify(Down(routed_down, shared=shared_down, dtype=dtype, **shape), "fast")


TOKENS = 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gate_up_keeps_what_is_not_finite_with_its_token(bad: float) -> None:
    case = GateUp("Q4_0", 8, width=24, cols=288, shared="Q5_0", shared_width=48, tokens=TOKENS)
    x, gate, up, *shared = case.inputs
    spoilt = np.array(x)
    spoilt[1, 7] = bad
    clean = run(case.kernel)
    router = Router(None, case.top_k, "sigmoid", True, 1.8)
    got = run(lambda: case.parts(*gate_up.experts_gate_up(mx.array(spoilt), case.logits, router, gate, up, *shared)))
    stays_with_token_1(got[:2], clean[:2])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["hidden", "shared_hidden", "weights", "residual"])
def test_down_keeps_what_is_not_finite_with_its_token(where: str, bad: float) -> None:
    case = Down("Q5_1", width=288, cols=24, shared="Q8_0", shared_width=576, tokens=TOKENS)
    hidden, shared_hidden, w, shared_w, weights, residual = case.inputs
    inputs = {"hidden": hidden, "shared_hidden": shared_hidden, "weights": weights, "residual": residual}
    spoilt = np.array(inputs[where])
    spoilt[1] = bad
    inputs[where] = mx.array(spoilt)
    clean = run(case.kernel)
    both = case.beside(inputs["hidden"], inputs["shared_hidden"])
    choice = case.choice(case.given, inputs["weights"])
    got = run(lambda: [down.experts_down(both, choice, w, shared_w, inputs["residual"])])
    stays_with_token_1(got, clean)


def stays_with_token_1(got: list[mx.array], clean: list[mx.array]) -> None:
    for y, same in zip(got, clean, strict=True):
        assert not np.isfinite(float64(y[1])).any()
        assert bits(y[::2]) == bits(same[::2])


@pytest.mark.parametrize("sign", [1, -1])
def test_gates_far_from_zero_neither_overflow_nor_vanish(sign: int) -> None:
    """silu(g) is g, or 0, where exp(-g) leaves float32."""
    gate = mx.full((8, 16, 64), 4.0 * sign)
    up = mx.ones((8, 16, 64))
    x, logits = mx.ones((1, 64)), mx.zeros((1, 8))
    router = Router(None, 2, "sigmoid", True, 1.0)
    (hidden,) = run(lambda: [gate_up.experts_gate_up(x, logits, router, gate, up, None, None)[0]])
    assert np.array(hidden).tolist() == np.full((1, 2 * 16), 256.0 * 64 if sign > 0 else 0.0).tolist()


def test_an_id_outside_stands_for_the_last_expert() -> None:
    """To the bit. That nothing outside is read is for the executor to see, and for the NaN around the weights."""
    case = Down("Q4_0", tokens=2, ids="outside")
    clamped = mx.array(case.chosen.astype(np.uint32))
    got, same = run(case.kernel), run(lambda: case.call(down.experts_down, clamped))
    assert [bits(y) for y in got] == [bits(y) for y in same]


def test_a_residual_of_another_dtype_is_refused_by_name() -> None:
    """The kernel would round it to the dtype of hidden, or not compile."""
    bank, hidden = random_weight("Q4_0", (4, 8, 64), 0), mx.zeros((1, 2 * 64), mx.bfloat16)
    choice, residual = mx.zeros((1, 2, 2), mx.uint32), mx.zeros((1, 8), mx.bfloat16)
    with launcher.recording() as launches:
        down.experts_down(hidden, choice, bank, None, residual)
        with pytest.raises(launcher.KernelRefusedError, match=r"^experts_down: a residual of shape and .*float32"):
            down.experts_down(hidden, choice, bank, None, residual.astype(mx.float32))
    assert len(launches) == 1
