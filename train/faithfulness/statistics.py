"""Intervals of means and of paired differences, by scipy's bootstrap."""

import numpy as np
from scipy import stats


RESAMPLES = 2000


def mean_interval(values, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95 % percentile bootstrap over items. For a paired difference give the differences.

    Percentiles and not BCa: its correction is undefined where all values are equal, which is what an arm that changes
    nothing gives.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    mean = float(values.mean())
    if len(values) < 2 or (values == values[0]).all():
        return mean, mean, mean
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired(values, reference, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the difference of two measurements of the same items."""
    return mean_interval(np.asarray(values, dtype=float) - np.asarray(reference, dtype=float), seed)
