"""The cluster bootstrap of means, differences, ratios and areas under curves: arrays in, intervals out.

Scores about one subject are not independent, so subjects are drawn, with all their scores. Every random procedure takes a
seed and gives the same numbers twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from excise.intervals import (
    Interval,
    Labels,
    Values,
    auc,
    differences,
    interval_of,
    numbered,
    per_cluster,
    share,
    units,
    wilson,
)

RESAMPLES = 9999
# Cells of one block of resampling counts; larger ones are drawn block by block and not kept.
_BLOCK = 1_500_000


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
    few = min(len(np.unique(numbered(x, c))) for x, c in zip((a, b), clusters or (None, None), strict=True))
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
    rows, columns = (numbered(x, c) for x, c in zip((a, b), clusters or (None, None), strict=True))
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
    index = numbered(x, clusters)
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
