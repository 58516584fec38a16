"""What a few seeds can say: bootstrap intervals of the mean, paired tests, and the correction for many of them.

With three to five seeds none of it is certain. A percentile bootstrap of three values never leaves their range and covers
the true mean of normal ones in about three cases of four where it promises 95 of 100 (tests/study/test_statistics.py has
the figure); the sign-flip test of n pairs gives no p-value below 2^(1 - n), 0.25 for three; the t-test can, and leans on
the differences being normal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

from miras.study.config import StatisticsSection


@dataclass(frozen=True)
class Estimate:
    """The mean of some runs' values and a bootstrap interval of it; without one for fewer than two runs."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """A model's values less a baseline's on the same tasks and seeds.

    difference  their mean, with a bootstrap interval; `p` of the paired test that it is zero, `corrected` for the number of
                tests, both NaN where there is none (fewer than two pairs, or differences all the same)
    """

    difference: Estimate
    p: float
    corrected: float = math.nan


def estimate(values: Sequence[float], settings: StatisticsSection) -> Estimate:
    """The mean of at least one value, and its interval by scipy.stats.bootstrap (always the same for the same values)."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan, tuple(values))
    if np.ptp(values) == 0.0:
        return Estimate(mean, mean, mean, tuple(values))
    result = stats.bootstrap(
        (np.asarray(values, np.float64),),
        np.mean,
        n_resamples=settings.resamples,
        confidence_level=settings.confidence,
        method=settings.interval,
        rng=np.random.default_rng(0),
    )
    interval = result.confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), tuple(values))


def compare(model: Mapping[int, float], baseline: Mapping[int, float], settings: StatisticsSection) -> Comparison | None:
    """The comparison over the keys (seeds) that both have; None if there are none."""
    keys = [key for key in model if key in baseline]
    if not keys:
        return None
    differences = np.asarray([model[key] - baseline[key] for key in keys], np.float64)
    return Comparison(estimate(differences.tolist(), settings), _p_value(differences, settings.test))


def corrected(comparisons: Sequence[Comparison], settings: StatisticsSection) -> list[Comparison]:
    """The comparisons as one family, by statsmodels; those without a p-value are no tests."""
    tested = [i for i, comparison in enumerate(comparisons) if not math.isnan(comparison.p)]
    if not tested:
        return list(comparisons)
    adjusted = np.full(len(comparisons), math.nan)
    adjusted[tested] = multipletests([comparisons[i].p for i in tested], method=settings.correction)[1]
    return [replace(c, corrected=float(p)) for c, p in zip(comparisons, adjusted, strict=True)]


def smallest_p(pairs: int, settings: StatisticsSection) -> float:
    """The least p-value that the test can give, 0 if it has no bound."""
    return 2.0 ** (1 - pairs) if settings.test == "permutation" else 0.0


def _p_value(differences: np.ndarray, test: str) -> float:
    if len(differences) < 2:
        return math.nan
    if test == "permutation":
        # All sign flips where they are few: exact.
        result = stats.permutation_test(
            (differences, np.zeros_like(differences)),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=np.random.default_rng(0),
        )
        return float(result.pvalue)
    if np.ptp(differences) == 0.0:
        return 1.0 if differences[0] == 0.0 else math.nan
    return float(stats.ttest_rel(differences, np.zeros_like(differences))[1])
