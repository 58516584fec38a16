"""Statistics against values worked out by hand or by another way."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from miras.study.config import StatisticsSection
from miras.study.statistics import Comparison, Estimate, compare, corrected, estimate, smallest_p

SETTINGS = StatisticsSection()


def test_the_interval_is_the_bootstraps() -> None:
    values = [0.2, 0.5, 0.6, 0.9]
    found = estimate(values, SETTINGS)
    means = sorted(np.mean(draw) for draw in itertools.product(values, repeat=4))  # all 256 equally likely resamples
    assert found.mean == pytest.approx(0.55)
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)
    narrow = estimate(values, replace(SETTINGS, confidence=0.5))
    assert found.low < narrow.low < narrow.high < found.high
    assert estimate(values, replace(SETTINGS, interval="BCa")).low != found.low


def test_few_or_equal_values() -> None:
    assert math.isnan(estimate([1.0], SETTINGS).low)
    assert estimate([0.5, 0.5, 0.5], SETTINGS) == Estimate(0.5, 0.5, 0.5, (0.5, 0.5, 0.5))
    three = estimate([1.0, 2.0, 4.0], SETTINGS)
    assert (three.low, three.high) == (1.0, 4.0)  # the least and the greatest have a probability of 1 / 27 each


def test_three_seeds_cover_the_mean_less_often_than_the_name_says() -> None:
    draws = np.random.default_rng(0).standard_normal((4000, 3))
    covered = np.mean((draws.min(1) <= 0) & (draws.max(1) >= 0))  # the interval of three is their range
    assert 0.73 < covered < 0.77


def test_pairs_are_matched_by_seed() -> None:
    model, baseline = {0: 0.9, 1: 0.8, 2: 0.95, 7: 0.1}, {2: 0.7, 1: 0.65, 0: 0.6}
    found = compare(model, baseline, SETTINGS)
    assert found is not None
    differences = np.array([0.3, 0.15, 0.25])
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert found.difference.mean == pytest.approx(differences.mean())
    assert found.p == pytest.approx(2 * stats.t.sf(t, 2), rel=1e-9)
    assert compare({0: 1.0}, {1: 1.0}, SETTINGS) is None
    assert math.isnan(compare({0: 1.0}, {0: 0.5}, SETTINGS).p)
    assert compare({0: 1.0, 1: 0.5}, {0: 1.0, 1: 0.5}, SETTINGS).p == 1.0


@pytest.mark.parametrize("differences", [[0.3, 0.15, 0.25], [0.3, -0.1, 0.2, 0.4, 0.05]])
def test_the_permutation_test_counts_all_sign_flips(differences: list[float]) -> None:
    settings = replace(SETTINGS, test="permutation")
    found = compare(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0), settings)
    signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
    sums = (signs * np.array(differences)).sum(1)
    assert found is not None
    assert found.p == pytest.approx(np.mean(np.abs(sums) >= abs(sum(differences)) - 1e-12))
    assert smallest_p(len(differences), settings) == pytest.approx(0.5 ** (len(differences) - 1))
    assert found.p >= smallest_p(len(differences), settings)
    assert smallest_p(3, SETTINGS) == 0.0


def test_holm_by_hand_and_without_what_is_no_test() -> None:
    none = Estimate(0.0, 0.0, 0.0, (0.0,))
    family = [Comparison(none, p) for p in (0.03, 0.01, math.nan, 0.02, 0.5)]
    # Sorted .01 .02 .03 .5 times 4 3 2 1, never falling.
    assert [c.corrected for c in corrected(family, SETTINGS)] == pytest.approx(
        [0.06, 0.04, math.nan, 0.06, 0.5], nan_ok=True
    )
    many = corrected(family, replace(SETTINGS, correction="bonferroni"))
    assert [c.corrected for c in many] == pytest.approx([0.12, 0.04, math.nan, 0.08, 1.0], nan_ok=True)
    [alone] = corrected([Comparison(none, math.nan)], SETTINGS)
    assert math.isnan(alone.p) and math.isnan(alone.corrected)
