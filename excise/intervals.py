"""Intervals: of shares in closed form, of any statistic from its resampled values. Arrays in, numbers out.

Scores about one subject are not independent, so both count subjects, with all their scores. With few subjects plain
percentile intervals are too short (0.88 instead of 0.95 with eight), so percentiles are taken further out, as much as
Student's t is wider than the normal (Hesterberg 2015, arXiv 1411.5279, "expanded percentile").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

Values = Sequence[float] | np.ndarray
Labels = Sequence[Any] | np.ndarray


class Interval(NamedTuple):
    """An estimate and its interval [low, high]."""

    value: float
    low: float
    high: float


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Share of successes with its Wilson score interval; NaN without observations."""
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    return _wilson(int(successes), int(n), level)


@lru_cache(maxsize=4096)
def _wilson(successes: int, n: int, level: float) -> Interval:
    interval = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high))


@lru_cache(maxsize=4096)
def _student(level: float, clusters: int) -> float:
    """Two-sided quantile of Student's t with clusters - 1 degrees of freedom."""
    return float(stats.t.isf((1 - level) / 2, clusters - 1))


def share(hits: Values, clusters: Labels | None = None, *, level: float = 0.95) -> Interval:
    """Share of successes among 0s and 1s with its cluster-robust Wilson interval; NaN without observations.

    The effective n is n over the design effect (never below 1), the quantile Student's t with clusters - 1 degrees of
    freedom (Dean and Pagano 2015, doi 10.1093/jssam/smv024). The plain Wilson interval where there are no clusters or
    one, and for values that are all equal, since they say nothing about clusters (0 of 64 is [0, 0.057]).

    It covers in 0.93-0.97 where answers about one subject are little related (correlation 0.1), and no less where a rate
    is near a half. It is too short for a low rate that whole subjects share, mostly by those unanimous cases: 0.88-0.90
    with 8 subjects, rates 0.1-0.2 and correlation 0.5; 0.78 with 16 and 0.05. Were subjects wholly right or wrong, 0 of 64
    from 8 of them would be [0, 0.32].
    """
    hits = np.asarray(hits, dtype=float)
    n, p = len(hits), float(hits.mean()) if len(hits) else np.nan
    sums, _ = per_cluster(hits - p, clusters)
    k = len(sums)
    if clusters is None or k < 2 or p in (0.0, 1.0):
        return wilson(int(hits.sum()), n, level=level)
    variance = k / (k - 1) * float(np.sum(sums**2)) / n**2
    effective = n / max(1.0, variance * n / (p * (1 - p)))
    t2 = _student(level, k) ** 2
    centre, half = p + t2 / (2 * effective), np.sqrt(t2 * (p * (1 - p) / effective + t2 / (4 * effective**2)))
    whole = 1 + t2 / effective
    return Interval(p, float((centre - half) / whole), float((centre + half) / whole))


@lru_cache(maxsize=4096)
def _outer(level: float, clusters: int) -> float:
    """The share to cut off at either end, expanded for few clusters."""
    return float(stats.norm.sf(np.sqrt(clusters / (clusters - 1)) * _student(level, clusters)))


def interval_of(value: float, drawn: np.ndarray, clusters: int, *, level: float = 0.95) -> Interval:
    """The interval of a statistic from its resampled values (NaN among them are left out) and the number of clusters."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, np.nan, np.nan)
    if clusters < 2 or np.ptp(drawn) == 0:
        return Interval(value, float(drawn.min()), float(drawn.max()))
    out = _outer(level, clusters)
    low, high = np.quantile(drawn, [out, 1 - out])
    return Interval(value, float(low), float(high))


def units(values: Values, clusters: Labels | None) -> int:
    """What is resampled: clusters, or values where there is one cluster only or none is named."""
    k = len(values) if clusters is None else len(np.unique(np.asarray(clusters, dtype=str)))
    return len(values) if k == 1 else k


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
    index = numbered(values, clusters)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def numbered(values: np.ndarray, clusters: Labels | None) -> np.ndarray:
    """Number of each value's cluster; without labels every value is its own."""
    if clusters is None:
        return np.arange(len(values))
    return np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]


def auc(members: Values, others: Values) -> float:
    """Probability that a member scores above a non-member, ties counted half (area under the ROC curve)."""
    both = stats.rankdata(np.concatenate([np.asarray(members, float), np.asarray(others, float)]))
    n, m = len(members), len(others)
    return float((both[:n].sum() - n * (n + 1) / 2) / (n * m))
