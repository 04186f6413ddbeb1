"""Intervals and tests of shares, means and paired differences.

bootstrap     percentile bootstrap over items (scipy); it has width 0 where all items agree, so it never stands alone
Wilson        of a share (`evaluation/report.py`)
Newcombe      of the difference of two shares of the same items: square-and-add of Wilson's limits with their correlation (Newcombe
              1998, Statistics in Medicine 17, 2635-2650, method 10); it has a width where no item changed
McNemar       exact: of the items that are right in one arm alone, is it as often the one as the other?
Holm          several p-values of one question, each raised so that all together keep the level

Every value follows from the set of items, not from their order.
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

from evaluation.report import wilson_interval


RESAMPLES = 2000
Z_POWER = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # two-sided 5 %, power 80 %
Interval = tuple[float, float, float]  # (value, low, high)
NOTHING = (float("nan"),) * 3


def mean_interval(values, seed: int = 0) -> Interval:
    """(mean, low, high): 95 % percentile bootstrap over items. For a paired difference give the differences.

    Percentiles and not BCa: its correction is undefined where all values are equal, which is what an arm that changes
    nothing gives.
    """
    values = np.asarray(values, dtype=float)
    values = np.sort(values[~np.isnan(values)])
    if len(values) == 0:
        return NOTHING
    mean = float(values.mean())
    if len(values) < 2 or (values == values[0]).all():
        return mean, mean, mean
    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    )
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def paired(values, reference, seed: int = 0) -> Interval:
    """(mean, low, high) of the difference of two measurements of the same items."""
    return mean_interval(np.asarray(values, dtype=float) - np.asarray(reference, dtype=float), seed)


def draws_interval(values, seed: int = 0, has_shared_draws: bool = False) -> Interval:
    """(mean, low, high) of (N, K) values of N items in K draws each; nan where an item has fewer.

    Args:
        has_shared_draws: draw k is the same thing for all items (a set of vectors, say), so that draws are resampled as items
            are. Otherwise every item has draws of its own, and resampling items covers them.
    """
    values = np.asarray(values, dtype=float)
    if not has_shared_draws or values.shape[1] < 2:
        kept = ~np.isnan(values).all(axis=1)
        return mean_interval(np.nanmean(values[kept], axis=1) if kept.any() else [], seed)
    values = values[~np.isnan(values).any(axis=1)]
    if not len(values):
        return NOTHING
    values = values[np.lexsort(values.T)]
    rng, (items, draws) = np.random.default_rng(seed), values.shape
    # How often a resample holds each item, and each draw: the same as picking rows and columns, at once for all resamples.
    of_items, of_draws = (rng.multinomial(size, np.full(size, 1 / size), RESAMPLES) for size in (items, draws))
    means = ((of_items @ values) * of_draws).sum(axis=1) / (items * draws)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def share_interval(values) -> Interval:
    """(share, low, high) of (N, K) truth values (nan: not asked), by Wilson, as of N items: draws of one item are alike."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values).all(axis=1)] if values.size else values
    if not len(values):
        return NOTHING
    right = float(np.sort(np.nanmean(values, axis=1)).sum())  # sorted, so that the order of items does not show
    return right / len(values), *wilson_interval(min(right, len(values)), len(values))


def newcombe_interval(both: int, lost: int, gained: int, neither: int) -> Interval:
    """(difference, low, high) of the shares that are right afterwards and before, of the same items.

    Args:
        both: right before and afterwards; `lost` before alone, `gained` afterwards alone, `neither` never.
    """
    total = both + lost + gained + neither
    before, after = (both + lost) / total, (both + gained) / total
    low_before, high_before = wilson_interval(both + lost, total)
    low_after, high_after = wilson_interval(both + gained, total)
    margins = (both + lost) * (gained + neither) * (both + gained) * (lost + neither)
    covariance = both * neither - lost * gained
    if covariance > 0:
        covariance = max(0.0, covariance - total / 2)  # Newcombe's correction for continuity
    phi = covariance / margins**0.5 if margins else 0.0

    def half(one: float, other: float) -> float:
        return max(0.0, one**2 - 2 * phi * one * other + other**2) ** 0.5

    low = half(after - low_after, high_before - before)
    high = half(high_after - after, before - low_before)
    return after - before, after - before - low, after - before + high


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided p-value of McNemar's test: under the null an item that changes gains as often as it loses."""
    return float(stats.binomtest(min(lost, gained), lost + gained).pvalue) if lost + gained else 1.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted by Holm's step-down procedure, in the order in which they were given."""
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate([(len(values) - rank) * values[place] for rank, place in enumerate(order)])
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted.tolist()


def smallest_detectable(discordant: int, total: int) -> float:
    """The smallest difference of two shares of the same items that a test would find in 80 of 100 cases.

    (z_0.975 + z_0.8) sqrt(discordant) / total, but no less than 6 items: fewer, all one way, do not reach p = 0.05.
    """
    return min(1.0, max(Z_POWER * discordant**0.5, 6) / total)


def gain_kept(values, full, nothing, seed: int = 0) -> Interval:
    """(share, low, high) of the gain of `full` over `nothing` that an arm keeps, by a bootstrap over items.

    (mean(values) - mean(nothing)) / (mean(full) - mean(nothing)); nan where that gain is not clear of zero.
    """
    rows = np.stack([np.asarray(one, dtype=float) for one in (values, full, nothing)])  # (3, N)
    rows = rows[:, np.lexsort(rows)]
    if not paired(rows[1], rows[2], seed)[1] > 0:
        return NOTHING
    items = rows.shape[1]
    of_items = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), RESAMPLES)
    resampled = of_items @ rows.T / items  # (RESAMPLES, 3)
    gains = resampled[:, 1] - resampled[:, 2]
    found = ((resampled[:, 0] - resampled[:, 2])[gains > 0]) / gains[gains > 0]
    arm, most, least = rows.mean(axis=1)
    low, high = np.percentile(found, [2.5, 97.5])
    return float((arm - least) / (most - least)), float(low), float(high)
