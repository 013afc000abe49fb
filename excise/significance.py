"""Tests: differences, equivalence, chance, many comparisons. Arrays in, p values and verdicts out."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from excise.intervals import Labels, Values, differences, per_cluster
from excise.resampling import RESAMPLES

# Up to this many units all sign patterns are tried: at most 4,096.
EXACT = 12


def sign_flip(
    changes: Values,
    clusters: Labels | None = None,
    *,
    greater: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """p of the paired permutation test: signs of whole clusters are flipped, exactly for at most 12.

    Two-sided, or with `greater` the p of changes that are not above zero.
    """
    sums, _ = per_cluster(np.asarray(changes, float), clusters)
    n = len(sums)
    if n == 0:
        return np.nan
    side = (lambda x: x) if greater else np.abs
    observed = side(sums.sum()) - 1e-12
    if n <= EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((side(signs @ sums) >= observed).mean())
    signs = 1 - 2 * np.random.default_rng(seed).integers(0, 2, (resamples, n))
    return float((1 + (side(signs @ sums) >= observed).sum()) / (1 + resamples))


def permutation(a: Values, b: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of the difference of means of two separate samples; exact where there are few ways to split them."""
    rng = np.random.default_rng(seed)
    found = stats.permutation_test(
        (np.asarray(a, float), np.asarray(b, float)), lambda x, y, axis: x.mean(axis) - y.mean(axis),
        vectorized=True, n_resamples=resamples, rng=rng,
    )  # fmt: skip
    return float(found.pvalue)


class Trend(NamedTuple):
    """Rank correlations of a series with its order, and the two-sided permutation p of the first."""

    rho: float
    tau: float
    p: float


def trend(x: Values, y: Values, *, resamples: int = RESAMPLES, seed: int = 0) -> Trend:
    """Spearman's rho and Kendall's tau of y along x (layers, strengths, steps), p by permutation; NaN where constant."""
    a, b = stats.rankdata(np.asarray(x, float)), stats.rankdata(np.asarray(y, float))
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return Trend(np.nan, np.nan, np.nan)
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    rho = float(a @ b) / len(a)
    if len(a) <= 7:  # at most 5,040 orders: all of them
        orders = np.array(list(itertools.permutations(b)))
        p = float((np.abs(orders @ a) / len(a) >= abs(rho) - 1e-12).mean())
    else:
        rng = np.random.default_rng(seed)
        hits = np.abs(rng.permuted(np.tile(b, (resamples, 1)), axis=1) @ a) / len(a) >= abs(rho) - 1e-12
        p = float((1 + hits.sum()) / (1 + resamples))
    return Trend(rho, float(stats.kendalltau(x, y).statistic), p)


def ks(a: Values, b: Values) -> tuple[float, float]:
    """Largest distance D between two empirical distributions and its two-sided p (Kolmogorov-Smirnov)."""
    found = stats.ks_2samp(a, b)
    return float(found.statistic), float(found.pvalue)


def wasserstein(a: Values, b: Values) -> float:
    """How far one empirical distribution has to be moved to become the other, in the units of the values."""
    return float(stats.wasserstein_distance(a, b))


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p for paired right/wrong answers, from the two discordant counts."""
    return 1.0 if lost + gained == 0 else float(stats.binomtest(min(lost, gained), lost + gained, 0.5).pvalue)


def above_chance(successes: int, n: int, chance: float) -> float:
    """One-sided exact p that the success rate exceeds `chance`."""
    return float(stats.binomtest(successes, n, chance, alternative="greater").pvalue)


class Verdict(NamedTuple):
    """An equivalence test: mean difference, its (1 - 2 alpha) interval, both one-sided p, the three-way verdict."""

    value: float
    low: float
    high: float
    p_above: float
    p_below: float
    verdict: Literal["equivalent", "higher", "lower", "inconclusive"]


def equivalence(
    after: Values, before: Values, margin: float, clusters: Labels | None = None, *, alpha: float = 0.05
) -> Verdict:
    """Two one-sided t tests (TOST) that the mean paired difference lies within +-margin, with cluster-robust errors.

    "equivalent" when both reject; "higher" or "lower" when the (1 - 2 alpha) interval leaves the margin out altogether
    or excludes zero without being equivalent; "inconclusive" when the data are too few to say.
    """
    difference = differences(after, before)
    n, mean = len(difference), float(np.mean(difference)) if len(difference) else np.nan
    sums, _ = per_cluster(difference - mean, clusters)
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
