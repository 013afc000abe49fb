"""Intervals of means, shares and differences: arrays in, numbers out.

Scores about one subject are not independent, so intervals resample subjects with all their scores. Every random
procedure takes a seed and gives the same numbers twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
Labels = Sequence[Any] | np.ndarray
RESAMPLES = 9999
# Cells of one block of resampling counts; larger ones are drawn block by block and not kept.
_BLOCK = 1_500_000


class Interval(NamedTuple):
    """An estimate and its interval [low, high]."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Share of successes with its Wilson score interval; NaN without observations."""
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high))


def resampled_means(
    values: Values, clusters: Labels | None = None, *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means [resamples] of data in which whole clusters were drawn with replacement.

    values: [n]; clusters: [n] labels, or None when every value stands for itself. With one cluster only, its values are
    resampled: there is nothing else to vary.
    """
    values = np.asarray(values, dtype=float)
    sums, sizes = per_cluster(values, clusters)
    if len(sums) == 1:
        sums, sizes = values, np.ones(len(values))
    return np.concatenate([(c @ sums) / (c @ sizes) for c in _counts(len(sums), resamples, seed)])


def bootstrap_mean(
    values: Values,
    clusters: Labels | None = None,
    *,
    counts: bool = True,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean with its percentile cluster-bootstrap interval.

    Where all values are equal a bootstrap would claim certainty. Zeros only or ones only get the Wilson interval of
    their count instead (0 of 64 is [0, 0.057]; it counts values, since equal ones say nothing about clusters); other
    constant data get a zero-width interval. NaN without values.
    counts: whether a value of 0 or 1 is a failure or a success; False where it is a quantity that happens to be 0 or 1.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if np.ptp(values) == 0:
        first = float(values[0])
        if counts and first in (0.0, 1.0):
            return wilson(int(first) * len(values), len(values), level=level)
        return Interval(first, first, first)
    low, high = _percentiles(resampled_means(values, clusters, resamples=resamples, seed=seed), level)
    return Interval(float(values.mean()), low, high)


def bootstrap_difference(
    after: Values,
    before: Values,
    clusters: Labels | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of after - before over the same items, with its paired cluster bootstrap; no width where constant."""
    difference = differences(after, before)
    if len(difference) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if np.ptp(difference) == 0:
        return Interval(*[float(difference[0])] * 3)
    low, high = _percentiles(resampled_means(difference, clusters, resamples=resamples, seed=seed), level)
    return Interval(float(difference.mean()), low, high)


def auc(members: Values, others: Values) -> float:
    """Probability that a member scores above a non-member, ties counted half (area under the ROC curve)."""
    both = stats.rankdata(np.concatenate([np.asarray(members, float), np.asarray(others, float)]))
    n, m = len(members), len(others)
    return float((both[:n].sum() - n * (n + 1) / 2) / (n * m))


def bootstrap_auc(
    members: Values, others: Values, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """AUC with a stratified percentile bootstrap: members and non-members are drawn separately."""
    a, b = np.asarray(members, float), np.asarray(others, float)
    above = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    ca = np.concatenate(list(_counts(len(a), resamples, seed)))
    cb = np.concatenate(list(_counts(len(b), resamples, seed + 1)))
    drawn = np.einsum("rn,rn->r", ca @ above, cb) / (len(a) * len(b))
    return Interval(float(above.mean()), *_percentiles(drawn, level))


def differences(after: Values, before: Values) -> np.ndarray:
    """after - before, item by item; raises ValueError when the two differ in length."""
    a, b = np.asarray(after, float), np.asarray(before, float)
    if a.shape != b.shape:
        raise ValueError(
            f"paired statistics need the same items on both sides: got {a.shape[0]} and {b.shape[0]} values"
        )
    return a - b


def per_cluster(values: np.ndarray, clusters: Labels | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each cluster; without labels every value is its own."""
    if clusters is None:
        return values, np.ones(len(values))
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values but {len(clusters)} cluster labels: give one label per value")
    _, index = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _percentiles(drawn: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _counts(units: int, resamples: int, seed: int) -> list[np.ndarray]:
    """How often each unit is drawn in each resample: blocks [rows, units] that add up to `resamples` rows."""
    if units * resamples <= _BLOCK:
        return [_kept_counts(units, resamples, seed)]
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // units)
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return [_draw(rng, units, size) for size in sizes]


@lru_cache(maxsize=16)
def _kept_counts(units: int, resamples: int, seed: int) -> np.ndarray:
    """Counts are kept because a results table asks for the same number of subjects many times."""
    return _draw(np.random.default_rng(seed), units, resamples)


def _draw(rng: np.random.Generator, units: int, resamples: int) -> np.ndarray:
    drawn = rng.integers(0, units, (resamples, units), dtype=np.int64)
    drawn += np.arange(resamples)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(np.float64)
