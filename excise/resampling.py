"""Intervals of means, shares, differences and ratios: arrays in, numbers out.

Scores about one subject are not independent, so intervals resample subjects with all their scores. With few subjects
plain percentile intervals are too short (0.88 instead of 0.95 with eight), so percentiles are taken further out, as
much as Student's t is wider than the normal (Hesterberg 2015, arXiv 1411.5279, "expanded percentile"). Every random
procedure takes a seed and gives the same numbers twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Mean with its cluster-bootstrap interval; shares, where every value is 0 or 1, with that of `share`.

    Other constant data get a zero-width interval. NaN without values.
    counts: whether a value of 0 or 1 is a failure or a success; False where it is a quantity that happens to be 0 or 1.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        return Interval(np.nan, np.nan, np.nan)
    if counts and np.isin(values, (0.0, 1.0)).all():
        return share(values, clusters, level=level)
    if np.ptp(values) == 0:
        return Interval(*[float(values[0])] * 3)
    drawn = resampled_means(values, clusters, resamples=resamples, seed=seed)
    return interval_of(float(values.mean()), drawn, units(values, clusters), level=level)


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
    drawn = resampled_means(difference, clusters, resamples=resamples, seed=seed)
    return interval_of(float(difference.mean()), drawn, units(difference, clusters), level=level)


def auc(members: Values, others: Values) -> float:
    """Probability that a member scores above a non-member, ties counted half (area under the ROC curve)."""
    both = stats.rankdata(np.concatenate([np.asarray(members, float), np.asarray(others, float)]))
    n, m = len(members), len(others)
    return float((both[:n].sum() - n * (n + 1) / 2) / (n * m))


def bootstrap_auc(
    members: Values,
    others: Values,
    clusters: tuple[Labels, Labels] | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """AUC with a stratified bootstrap: members and non-members are drawn separately, by cluster where labels are given.

    Where one side is above the other altogether a bootstrap would claim certainty; the interval then is that of a share
    of as many successes as the smaller side has clusters.
    """
    a, b = np.asarray(members, float), np.asarray(others, float)
    if not len(a) or not len(b):
        return Interval(np.nan, np.nan, np.nan)
    few = min(len(np.unique(_index(x, c))) for x, c in zip((a, b), clusters or (None, None), strict=True))
    value = auc(a, b)
    if value in (0.0, 1.0):
        return wilson(int(value * few), few, level=level)
    return interval_of(value, resampled_aucs(a, b, clusters, resamples=resamples, seed=seed), few, level=level)


def resampled_aucs(
    members: Values,
    others: Values,
    clusters: tuple[Labels, Labels] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """AUC [resamples] of data in which members and non-members were drawn separately, by cluster where labels are given."""
    a, b = np.asarray(members, float), np.asarray(others, float)
    rows, columns = (_index(x, c) for x, c in zip((a, b), clusters or (None, None), strict=True))
    above = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    wins = np.zeros((rows.max() + 1, columns.max() + 1))
    np.add.at(wins, (rows[:, None], columns[None]), above)
    ca = np.concatenate(list(_counts(wins.shape[0], resamples, seed)))
    cb = np.concatenate(list(_counts(wins.shape[1], resamples, seed + 1)))
    drawn: np.ndarray = ((ca @ wins) * cb).sum(1) / ((ca @ np.bincount(rows)) * (cb @ np.bincount(columns)))
    return drawn


def resampled_ks(a: Values, b: Values, clusters: Labels, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Kolmogorov-Smirnov distance [resamples] of two arms on the same items, when clusters are drawn for both alike."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    index = _index(x, clusters)
    both = np.concatenate([x, y])
    order = np.argsort(both, kind="stable")
    # Only where the next value differs have both distributions taken their step.
    ends = np.append(np.diff(both[order]) > 0, True)
    owner, sign = np.concatenate([index, index])[order], np.where(order < len(x), 1.0, -1.0)
    found = []
    for drawn in _counts(int(index.max()) + 1, resamples, seed):
        for part in np.array_split(drawn, max(1, len(drawn) * len(both) // _BLOCK)):
            steps = np.cumsum(part[:, owner] * sign, axis=1)[:, ends]
            found.append(np.abs(steps).max(1) / (part @ np.bincount(index)))
    return np.concatenate(found)


def resampled_together(
    parts: Sequence[tuple[Values, Labels]], *, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means [n_parts, resamples] of several lists of scores when the same clusters are drawn for all of them.

    parts: values and their cluster labels, one pair per list; not every list needs to hold every cluster. NaN in the
    resamples where none of a list's clusters was drawn.
    """
    every, index = np.unique(np.concatenate([np.asarray(c, dtype=str) for _, c in parts]), return_inverse=True)
    ends = np.cumsum([len(v) for v, _ in parts])
    sums, sizes = [], []
    for (values, _), mine in zip(parts, np.split(index, ends[:-1]), strict=True):
        sums.append(np.bincount(mine, weights=np.asarray(values, float), minlength=len(every)))
        sizes.append(np.bincount(mine, minlength=len(every)).astype(float))
    total, count = np.stack(sums, 1), np.stack(sizes, 1)  # [clusters, parts]
    blocks = []
    for drawn in _counts(len(every), resamples, seed):
        n = drawn @ count
        blocks.append(np.divide(drawn @ total, n, out=np.full(n.shape, np.nan), where=n > 0))
    return np.concatenate(blocks).T


def bootstrap_ratio(
    above: Values,
    below: Values,
    clusters: Labels | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of `above` over mean of `below`, over the same items, with its paired cluster bootstrap.

    NaN where the interval of the denominator covers 0: such a ratio means nothing.
    """
    differences(above, below)
    labels = np.arange(len(above)) if clusters is None else clusters
    denominator = bootstrap_mean(below, labels, counts=False, level=level, resamples=resamples, seed=seed)
    if not (denominator.low > 0 or denominator.high < 0):
        return Interval(np.nan, np.nan, np.nan)
    top, bottom = resampled_together([(above, labels), (below, labels)], resamples=resamples, seed=seed)
    drawn = np.divide(top, bottom, out=np.full(resamples, np.nan), where=bottom != 0)
    return interval_of(float(np.mean(above)) / denominator.value, drawn, units(above, labels), level=level)


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
    index = _index(values, clusters)
    return np.bincount(index, weights=values), np.bincount(index).astype(float)


def _index(values: np.ndarray, clusters: Labels | None) -> np.ndarray:
    """Number of each value's cluster; without labels every value is its own."""
    if clusters is None:
        return np.arange(len(values))
    return np.unique(np.asarray(clusters, dtype=str), return_inverse=True)[1]


def _counts(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn in each resample: blocks [rows, units] that add up to `resamples` rows."""
    if units * resamples <= _BLOCK:
        yield _kept_counts(units, resamples, seed)
        return
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // units)
    for start in range(0, resamples, rows):
        yield _draw(rng, units, min(rows, resamples - start))


@lru_cache(maxsize=16)
def _kept_counts(units: int, resamples: int, seed: int) -> np.ndarray:
    """Counts are kept because a results table asks for the same number of subjects many times."""
    return _draw(np.random.default_rng(seed), units, resamples)


def _draw(rng: np.random.Generator, units: int, resamples: int) -> np.ndarray:
    drawn = rng.integers(0, units, (resamples, units), dtype=np.int64)
    drawn += np.arange(resamples)[:, None] * units
    return np.bincount(drawn.ravel(), minlength=resamples * units).reshape(resamples, units).astype(np.float64)
