"""Figures that describe repeated measurements: never one average."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Of `count` samples, in their unit. iqr: p75 - p25. mad: median distance from the median, not rescaled."""

    count: int
    median: float
    p10: float
    p90: float
    iqr: float
    mad: float
    least: float
    most: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def summarize(samples: Sequence[float]) -> Summary:
    """Percentiles lie between samples where they must (numpy's linear rule). Raises ValueError for no samples."""
    values = np.asarray(samples, np.float64)
    if not values.size:
        raise ValueError("no samples to summarize")
    p10, p25, median, p75, p90 = (float(p) for p in np.percentile(values, (10, 25, 50, 75, 90)))
    mad = float(np.median(np.abs(values - median)))
    return Summary(values.size, median, p10, p90, p75 - p25, mad, float(values.min()), float(values.max()))
