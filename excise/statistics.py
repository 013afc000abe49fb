"""Intervals, tests and the results table: arrays in, numbers out. No model and no drawing here.

Scores about one subject are not independent, so intervals resample subjects with all their scores. Every random
procedure takes a seed and gives the same numbers twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from scipy import stats

if TYPE_CHECKING:
    from excise.scores import Results, Row, Score

Values = Sequence[float] | np.ndarray
Labels = Sequence[Any] | np.ndarray
RESAMPLES = 9999
# Below this many units all sign patterns are tried: at most 4,096.
EXACT = 12
# Cells of one block of resampling counts; larger ones are drawn block by block and not kept.
_BLOCK = 1_500_000
KEYS = ("group", "form", "held_out", "variant")


class Interval(NamedTuple):
    """An estimate and its interval [low, high]."""

    value: float
    low: float
    high: float


# --- intervals


def wilson(successes: int, n: int, *, level: float = 0.95) -> Interval:
    """Share of successes with its Wilson score interval; NaN without observations."""
    if n == 0:
        return Interval(np.nan, np.nan, np.nan)
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return Interval(successes / n, float(interval.low), float(interval.high))


def resampled_means(values: Values, clusters: Labels | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means [resamples] of data in which whole clusters were drawn with replacement.

    values: [n]; clusters: [n] labels, or None when every value stands for itself. With one cluster only, its values are
    resampled: there is nothing else to vary.
    """
    values = np.asarray(values, dtype=float)
    sums, sizes = _per_cluster(values, clusters)
    if len(sums) == 1:
        sums, sizes = values, np.ones(len(values))
    return np.concatenate([(c @ sums) / (c @ sizes) for c in _counts(len(sums), resamples, seed)])


def bootstrap_mean(
    values: Values, clusters: Labels | None = None, *, counts: bool = True, level: float = 0.95, resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:  # fmt: skip
    """Mean with its percentile cluster-bootstrap interval.

    Where all values are equal a bootstrap would claim certainty. Zeros only or ones only get the Wilson interval of their
    count instead (0 of 64 is [0, 0.057]; it counts values, since equal ones say nothing about clusters); other constant
    data get a zero-width interval. NaN without values.
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
    after: Values, before: Values, clusters: Labels | None = None, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of after - before over the same items with its paired cluster-bootstrap interval; constant differences give zero width."""
    difference = _differences(after, before)
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


def bootstrap_auc(members: Values, others: Values, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """AUC with a stratified percentile bootstrap: members and non-members are drawn separately."""
    a, b = np.asarray(members, float), np.asarray(others, float)
    above = (a[:, None] > b[None]) + 0.5 * (a[:, None] == b[None])
    ca = np.concatenate(list(_counts(len(a), resamples, seed)))
    cb = np.concatenate(list(_counts(len(b), resamples, seed + 1)))
    drawn = np.einsum("rn,rn->r", ca @ above, cb) / (len(a) * len(b))
    return Interval(float(above.mean()), *_percentiles(drawn, level))


# --- tests


def sign_flip(differences: Values, clusters: Labels | None = None, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of the paired permutation test: signs of whole clusters are flipped, exactly for at most 12 of them."""
    sums, _ = _per_cluster(np.asarray(differences, float), clusters)
    n = len(sums)
    if n == 0:
        return np.nan
    observed = abs(sums.sum()) - 1e-12
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ sums) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (resamples, n))
    return float((1 + (np.abs(signs @ sums) >= observed).sum()) / (1 + resamples))


def ks(a: Values, b: Values) -> tuple[float, float]:
    """Largest distance D between two empirical distributions and its two-sided p (Kolmogorov-Smirnov)."""
    found = stats.ks_2samp(a, b)
    return float(found.statistic), float(found.pvalue)


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p for paired right/wrong answers, from the two discordant counts."""
    return 1.0 if lost + gained == 0 else float(stats.binomtest(min(lost, gained), lost + gained, 0.5).pvalue)


def above_chance(successes: int, n: int, chance: float) -> float:
    """One-sided exact p that the success rate exceeds `chance`."""
    return float(stats.binomtest(successes, n, chance, alternative="greater").pvalue)


class Verdict(NamedTuple):
    """Outcome of an equivalence test: mean difference, its (1 - 2 alpha) interval, both one-sided p, and the three-way verdict."""

    value: float
    low: float
    high: float
    p_above: float
    p_below: float
    verdict: Literal["equivalent", "higher", "lower", "inconclusive"]


def equivalence(after: Values, before: Values, margin: float, clusters: Labels | None = None, *, alpha: float = 0.05) -> Verdict:
    """Two one-sided t tests (TOST) that the mean paired difference lies within +-margin, with cluster-robust errors.

    "equivalent" when both reject; "higher" or "lower" when the (1 - 2 alpha) interval leaves the margin out altogether
    or excludes zero without being equivalent; "inconclusive" when the data are too few to say.
    """
    difference = _differences(after, before)
    n, mean = len(difference), float(np.mean(difference)) if len(difference) else np.nan
    sums, _ = _per_cluster(difference - mean, clusters)
    k = len(sums)
    if k < 2:
        return Verdict(mean, np.nan, np.nan, np.nan, np.nan, "inconclusive")
    error = float(np.sqrt(k / (k - 1) * np.sum(sums**2)) / n)
    if error == 0:
        # No spread at all: the difference is what it is.
        p_above, p_below = float(mean <= -margin), float(mean >= margin)
        half = 0.0
    else:
        p_above = float(stats.t.sf((mean + margin) / error, k - 1))
        p_below = float(stats.t.sf((margin - mean) / error, k - 1))
        half = float(stats.t.isf(alpha, k - 1)) * error
    low, high = mean - half, mean + half
    verdict: Literal["equivalent", "higher", "lower", "inconclusive"] = "inconclusive"
    if max(p_above, p_below) < alpha:
        verdict = "equivalent"
    elif low > 0 or high < 0:
        verdict = "higher" if mean > 0 else "lower"
    return Verdict(mean, low, high, p_above, p_below, verdict)


def holm(p: Values) -> np.ndarray:
    """Adjusted p values [n] that hold the family-wise error rate (Holm), for confirmatory families."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def benjamini_hochberg(p: Values) -> np.ndarray:
    """Adjusted p values [n] that hold the false discovery rate, for exploratory maps."""
    return np.asarray(stats.false_discovery_control(np.asarray(p, float)))


# --- the results table


@dataclass(frozen=True)
class _Cell:
    """The scores of one row of the table."""

    key: tuple[Any, ...]
    scores: tuple[Score, ...]


def aggregate(results: Results, *, seed: int = 0, by: Sequence[str] = KEYS) -> list[Row]:
    """One `Row` per arm, evaluation and distinct combination of `by`, in order of first appearance.

    by: the keys that tell rows apart, out of group, form, held_out, variant; a key left out is pooled over and stays
    empty in the row. Scores without a value are counted in `n_skipped`. Clusters are subjects (the fact, when it names none).
    """
    from excise.scores import Row

    quantities = _quantities(results)
    rows = []
    for (arm, evaluation), scores in results.scores.items():
        for cell in _cells(scores, by):
            measured = [s for s in cell.scores if s.value is not None and np.isfinite(s.value)]
            values, clusters = [float(s.value or 0.0) for s in measured], [s.subject or s.fact for s in measured]
            counts = not any((evaluation, s.variant) in quantities for s in measured)
            interval = bootstrap_mean(values, clusters, counts=counts, seed=seed)
            named = dict.fromkeys(KEYS, "") | {"held_out": False} | dict(zip(by, cell.key, strict=True))
            skipped = len(cell.scores) - len(measured)
            mode = results.modes.get(arm, "")
            rows.append(Row(arm, evaluation, **named, **interval._asdict(), n=len(measured), n_skipped=skipped, mode=mode))
    return rows


def _quantities(results: Results) -> set[tuple[str, str]]:
    """Evaluations and variants that measure a quantity: some arm has a value other than 0 and 1."""
    return {
        (evaluation, s.variant)
        for (_, evaluation), scores in results.scores.items()
        for s in scores
        if s.value is not None and s.value not in (0.0, 1.0)
    }


def _cells(scores: Sequence[Score], by: Sequence[str]) -> list[_Cell]:
    found: dict[tuple[Any, ...], list[Score]] = {}
    for score in scores:
        found.setdefault(tuple(getattr(score, k) for k in by), []).append(score)
    return [_Cell(key, tuple(group)) for key, group in found.items()]


# --- shared arithmetic


def _differences(after: Values, before: Values) -> np.ndarray:
    a, b = np.asarray(after, float), np.asarray(before, float)
    if a.shape != b.shape:
        raise ValueError(f"paired statistics need the same items on both sides: got {a.shape[0]} and {b.shape[0]} values")
    return a - b


def _per_cluster(values: np.ndarray, clusters: Labels | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each cluster."""
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
