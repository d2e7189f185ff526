"""The verdict of a comparison that was made in pairs, one run of A and one of B after the other.

The test is Wilcoxon's signed-rank test on the logarithms of B's time over A's, one for each pair; the effect is the
Hodges-Lehmann estimate (the median of the means of all two of them), the interval the one that belongs to the test. It
asks for nothing but that a pair may as well come out one way as the other where nothing differs, which runs in the
order A B, B A, A B, ... see to: not for normal noise, and one run that something disturbed does not decide.

Source: Hollander, Wolfe, Chicken, Nonparametric Statistical Methods, sections 3.1 to 3.3.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import numpy as np

CONFIDENCE = 0.95
LEAST_PAIRS = 6  # with fewer, no outcome is as unlikely as 5 %

Verdict = Literal["faster", "slower", "no difference"]


@dataclass(frozen=True)
class Effect:
    """Of B against A: the change of time as a fraction, 0.03 for 3 % longer, and its interval at `CONFIDENCE`."""

    pairs: int
    change: float
    low: float
    high: float
    verdict: Verdict

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.change:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


def judge(ratios: Sequence[float], smallest: float) -> Effect:
    """`ratios`: B's time over A's of each pair; `smallest`: the least change that counts, 0.01 for 1 %.

    Faster or slower where the interval lies on one side of no change and the effect counts. Raises ValueError for fewer
    than `LEAST_PAIRS`.
    """
    if len(ratios) < LEAST_PAIRS:
        raise ValueError(f"{len(ratios)} pairs; {LEAST_PAIRS} are needed")
    logs = np.log(np.asarray(ratios, np.float64))
    first, second = np.triu_indices(len(logs))
    means = np.sort((logs[first] + logs[second]) / 2)
    off = _critical(len(logs))
    change, low, high = (math.expm1(float(x)) for x in (np.median(means), means[off], means[-1 - off]))
    verdict: Verdict = "no difference"
    if low > 0 and change >= smallest:
        verdict = "slower"
    elif high < 0 and change <= -smallest:
        verdict = "faster"
    return Effect(len(logs), change, low, high, verdict)


def enough(effect: Effect, smallest: float) -> bool:
    """Whether more pairs would tell little more: the interval reaches no further than the smallest change that counts,
    or a quarter of the effect, to either side. It looks at the width, as a look at the verdict would favour one."""
    return (effect.high - effect.low) / 2 <= max(smallest, abs(effect.change) / 4)


@cache
def _critical(pairs: int) -> int:
    """How many of the sorted means lie outside the interval, on each side."""
    ways = [1]  # in how many ways some of the ranks 1 .. n have each sum
    for rank in range(1, pairs + 1):
        ways = [
            (ways[total] if total < len(ways) else 0) + (ways[total - rank] if total >= rank else 0)
            for total in range(len(ways) + rank)
        ]
    tail, most = 0, (1 - CONFIDENCE) / 2 * 2**pairs
    for total, count in enumerate(ways):
        tail += count
        if tail > most:
            return total - 1
    raise AssertionError("the whole distribution is less than its tail")
