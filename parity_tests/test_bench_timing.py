"""The figures under every benchmark, on samples whose figures are known."""

import numpy as np
import pytest

from bench.timing import summarize


def test_summary_of_known_numbers() -> None:
    found = summarize([11, 1, 10, 2, 9, 3, 8, 4, 7, 5, 6])
    assert (found.count, found.median, found.p10, found.p90) == (11, 6, 2, 10)
    assert (found.iqr, found.mad, found.least, found.most) == (5, 3, 1, 11)


def test_percentiles_lie_between_samples() -> None:
    found = summarize([0.0, 10.0])
    assert (found.median, found.p10, found.p90, found.iqr) == (5, 1, 9, 5)


def test_one_outlier_moves_neither_median_nor_mad() -> None:
    calm = [1.0, 1.1, 0.9, 1.05, 0.95]
    found = summarize([*calm, 1000.0])
    assert abs(found.median - np.median(calm)) < 0.05
    assert found.mad < 0.1


def test_one_sample_is_its_own_summary() -> None:
    found = summarize([3.0])
    assert (found.count, found.median, found.p10, found.p90, found.iqr, found.mad) == (1, 3, 3, 3, 0, 0)


def test_no_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])
