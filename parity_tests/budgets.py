"""Every tolerance of the tests, in one table, with its reason.

An error is `max |got - want| / max |want|` over an array. Worst errors of a run are printed at its end.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Budget:
    most: float
    why: str


BUDGETS = {
    "dequantize": Budget(0.0, "same formula, same roundings as gguf.quants: bit for bit"),
    "matmul": Budget(5e-6, "float32 sums in another order than float64; worst seen 1.2e-6"),
    "attention op": Budget(5e-6, "softmax and two matmuls in float32 against float64"),
    "embed": Budget(0.0, "the same values"),
    "layer taps": Budget(2e-5, "one layer on the reference's own input; worst seen 3e-6"),
    "router weights": Budget(2e-5, "sigmoids of logits that agree to 'layer taps'"),
    "logits": Budget(1e-4, "a whole model, free-running: what the project promises in float32"),
    "same path": Budget(2e-5, "the product against itself: other chunks, other matmul shapes"),
    "8-bit cache, other chunks": Budget(1e-3, "a value at the middle of two quants goes to the one or the other"),
    "8-bit cache": Budget(
        1e-3,
        "mean KL of the next token's distributions to those with a float32 cache, in nats; worst seen 3.2e-5, and by "
        "hand, with 64 experts, 2.7e-4. There random routers send 3 to 14 % of the tokens elsewhere; of all of them "
        "together it is 9e-4 to 4.2e-3 (3 seeds), and 3e-6 to 1.4e-3 with a cache in bfloat16",
    ),
    "sampling": Budget(1e-6, "probabilities in float32"),
    "matmul, 16-bit": Budget(2**-7, "a weight's values and the result rounded to bfloat16, sums in float32"),
    "attention, 16-bit": Budget(2**-7, "scores and probabilities in float16, the result rounded to bfloat16"),
    "embed, 16-bit": Budget(2**-8, "one rounding to bfloat16"),
    "layer taps, 16-bit": Budget(4e-2, "bfloat16 between ops (2**-8 each), a dozen roundings a layer"),
    "router weights, 16-bit": Budget(4e-2, "from a bfloat16 ffn_norm"),
    "kernel": Budget(5e-6, "float32 sums in another order than float64, the device's exp; worst seen 2.4e-6"),
    "kernel, 16-bit": Budget(2.0, "its error over that of MLX's own 16-bit operations on the same input (DESIGN.md)"),
    "weights fetched": Budget(1.02, "128-byte lines that each threadgroup touches, over the weights' own bytes"),
    "weights fetched, K-quants": Budget(
        1.1, "two bytes of scale for 256 columns: a line of them serves several threadgroups; worst seen 1.093"
    ),
    "weights fetched, narrow": Budget(
        1.21,
        "rows of 768 or 1408 columns end within a line, which two threadgroups then touch; worst seen 1.204 (Q4_K)",
    ),
    "cache fetched": Budget(1.01, "lines that two splits share; worst seen 1.005"),
    "lines of weights": Budget(1 / 0.9, "lines that the loads touch, over the fewest: coalescing of 90 %"),
    "lines of weights in two loads": Budget(
        2.0,
        "what a lane has is two words or two loads, one after the other: each touches every line, the second finds it",
    ),
    "lines of weights, narrow": Budget(
        1.42, "rows of 768 or 1408 columns begin and end within a line; worst seen 1.417 (Q4_1)"
    ),
    "lines of groups' scales": Budget(
        1.3, "12 bytes a block, four at a time, from where a row begins: less than a line; worst seen 1.25"
    ),
    "groups' scales asked for": Budget(
        1.4, "by one lane for all, and for whole turns past the end of a row; by each for itself it were 2 (Q6_K)"
    ),
    "groups' scales asked for, with minima": Budget(
        3.3, "as above, and their six bits lie in 8 of 12 bytes, most of them twice; by each for itself it were 32"
    ),
    "logits, 16-bit": Budget(4e-2, "final norm and output on the reference's input, bfloat16 between them"),
}

# A router choice may differ where the reference's K-th and (K+1)-th scores are closer than this: ten times the
# resolution of float32 at the biased scores of about 9; in 16 bits, a quarter (the sigmoid's slope) of four roundings.
NEAR_TIE = 1e-5
NEAR_TIE_16 = 4e-3

worst: dict[str, tuple[float, str]] = {}  # class -> (error / budget, error, where), of this process
checks: dict[str, int] = {}


def relative_error(got: npt.ArrayLike, want: npt.ArrayLike) -> float:
    """max |got - want| / max |want|; inf where shapes differ or anything is not a finite number."""
    a, b = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    scale = np.abs(b).max(initial=0.0)
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference / scale if scale else difference)


def check(kind: str, got: npt.ArrayLike, want: npt.ArrayLike, where: str = "") -> None:
    """Assert that `got` is within the budget of its class, and remember the error for the table at the end."""
    error = relative_error(got, want)
    record(kind, error, where)
    assert error <= BUDGETS[kind].most, f"{kind}, {where}: error {error:.3g}, budget {BUDGETS[kind].most:.3g}"


def check_twice(got: npt.ArrayLike, exact: npt.ArrayLike, own: npt.ArrayLike, where: str = "") -> None:
    """Assert that `got` is at most twice as far from `exact` as MLX's `own` result is.

    Where that is closer than a float32 kernel need be, by luck or because nothing was rounded, that is the measure.
    """
    error, measure = relative_error(got, exact), max(relative_error(own, exact), BUDGETS["kernel"].most)
    assert measure < 0.1, f"{where}: MLX's own result is no measure, its error is {measure:.3g}"
    record("kernel, 16-bit", error / measure, where)
    most = BUDGETS["kernel, 16-bit"].most
    assert error <= most * measure, (
        f"kernel, {where}: error {error:.3g}, {error / measure:.2f} x MLX's own; {most:g} at most"
    )


def record(kind: str, error: float, where: str) -> None:
    checks[kind] = checks.get(kind, 0) + 1
    if kind not in worst or error > worst[kind][0]:
        worst[kind] = (error, where)
