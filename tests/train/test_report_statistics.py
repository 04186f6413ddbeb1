"""Intervals and tests of the faithfulness report, against published values and values worked out by hand."""

import math

import numpy as np
import pytest

from evaluation.faithfulness.outcomes import count_pairs
from evaluation.faithfulness.statistics import (
    draws_interval,
    gain_kept,
    holm,
    mcnemar,
    mean_interval,
    newcombe_interval,
    share_interval,
    smallest_detectable,
)
from evaluation.report import wilson_interval


def test_newcombe_against_the_published_table():
    """Newcombe 1998 (Statistics in Medicine 17, 2635-2650), method 10, (36, 12, 2, 0) of 50: 0.0569 to 0.3404."""
    difference, low, high = newcombe_interval(36, 2, 12, 0)  # ours is afterwards less before
    assert difference == pytest.approx(0.2) and (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)
    difference, low, high = newcombe_interval(36, 12, 2, 0)
    assert difference == pytest.approx(-0.2) and (low, high) == pytest.approx((-0.3404, -0.0569), abs=5e-5)


def test_newcombe_corrects_a_positive_correlation_for_continuity():
    """(20, 9, 3, 18) by the formula with statsmodels' Wilson limits: the covariance 333 counts as 333 - 50 / 2."""
    assert newcombe_interval(20, 9, 3, 18) == pytest.approx((-0.120000, -0.248217, 0.016731), abs=1e-6)


def test_an_interval_has_a_width_where_no_item_changed():
    """Where all are right both times it is Wilson's margin."""
    margin = 1 - wilson_interval(100, 100)[0]
    assert newcombe_interval(100, 0, 0, 0) == pytest.approx((0, -margin, margin))
    _, low, high = newcombe_interval(92, 0, 0, 8)
    assert -0.05 < low < -0.02 and high == pytest.approx(-low)
    assert mean_interval([0] * 100) == (0, 0, 0)  # which is why the bootstrap does not stand alone


def test_mcnemar_against_the_published_example():
    """The documentation of statsmodels: [[101, 121], [59, 33]] has the exact p-value 4.434e-06."""
    assert mcnemar(121, 59) == mcnemar(59, 121) == pytest.approx(4.43444926375551e-06)
    assert mcnemar(0, 0) == 1 and mcnemar(6, 0) == pytest.approx(2 / 64) and mcnemar(5, 5) == 1


def test_holm_against_r():
    """p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert (
        holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06]) and holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    )


def test_pairs_are_counted_over_items_that_were_asked():
    before, after = np.array([1, 1, 0, 0, 1.0]), np.array([1, 0, 1, 0, np.nan])
    assert count_pairs(before, after) == (1, 1, 1, 1)


def test_shares_of_several_draws_are_as_of_so_many_items():
    values = np.array([[1, 1, 1, 1], [0, 0, 0, 0]] * 10)
    assert share_interval(values) == pytest.approx((0.5, *wilson_interval(10, 20)))
    holes = np.array([[1, np.nan], [0, 1], [np.nan, np.nan]])
    assert share_interval(holes) == pytest.approx((0.75, *wilson_interval(1.5, 2)))
    assert all(math.isnan(value) for value in share_interval(np.full((2, 2), np.nan)))


def test_shared_draws_are_resampled_with_the_items():
    """All items agree in a draw and draws differ: items alone would give an interval without width."""
    values = np.tile([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0], (40, 1))
    assert draws_interval(values) == (0.5, 0.5, 0.5)
    mean, low, high = draws_interval(values, has_shared_draws=True)
    # Eight draws of a fair coin: percentiles of Binomial(8, 1/2) / 8 at 2.5 and 97.5 %.
    assert mean == 0.5 and (low, high) == (0.125, 0.875)
    own = np.random.default_rng(0).random((40, 4))
    assert draws_interval(own) == mean_interval(own.mean(axis=1))
    own[3, 2:] = np.nan
    assert draws_interval(own)[0] == pytest.approx(np.nanmean(own, axis=1).mean())


def test_nothing_depends_on_the_order_of_items():
    rng = np.random.default_rng(0)
    values = rng.random((50, 8))
    order = rng.permutation(50)
    assert mean_interval(values[:, 0]) == mean_interval(values[order, 0])
    for shared in (False, True):
        assert draws_interval(values, 0, shared) == draws_interval(values[order], 0, shared)
    right = (values > 0.3).astype(float)
    assert share_interval(right) == share_interval(right[order])
    assert gain_kept(*right[:, :3].T) == gain_kept(*right[order, :3].T)


def test_share_of_gain_kept():
    nothing, full = np.zeros(80), np.ones(80)
    half = np.array([0.0, 1.0] * 40)
    share, low, high = gain_kept(half, full, nothing)
    assert share == 0.5 and low == pytest.approx(0.39, abs=0.015) and high == pytest.approx(0.61, abs=0.015)
    assert gain_kept(full, full, nothing) == (1, 1, 1) and gain_kept(nothing, full, nothing) == (0, 0, 0)
    assert all(math.isnan(value) for value in gain_kept(half, full, full))  # no gain, so no share of it


def test_what_can_be_detected():
    """2.802 sqrt(discordant) / n, and no less than 6 items: (1/2)^5 is p = 0.03."""
    assert smallest_detectable(100, 1000) == pytest.approx(0.02802, abs=1e-5)
    assert smallest_detectable(0, 100) == 0.06 and mcnemar(6, 0) < 0.05 < mcnemar(5, 0)
    assert smallest_detectable(1, 4) == 1
