"""Values computed with scipy and by hand before the code was written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from excise.scores import Results, Score
from excise.statistics import (
    above_chance,
    aggregate,
    auc,
    benjamini_hochberg,
    bootstrap_auc,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    equivalence,
    holm,
    ks,
    mcnemar,
    permutation,
    resampled_means,
    resampled_together,
    share,
    sign_flip,
    trend,
    wasserstein,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "low", "high"), [(0, 0.0, 0.161125), (10, 0.299298, 0.700702), (20, 0.838875, 1.0)]
)
def test_wilson(successes: int, low: float, high: float) -> None:
    assert wilson(successes, 20) == pytest.approx((successes / 20, low, high), abs=1e-6)


def test_what_few_observations_can_show() -> None:
    """Upper bounds of no success, and half-widths at a half."""
    assert [wilson(0, n).high for n in (12, 20, 50, 100, 200, 400)] == pytest.approx(
        [0.24, 0.16, 0.07, 0.037, 0.019, 0.010], abs=5e-3
    )
    assert [wilson(n // 2, n).high - 0.5 for n in (12, 20, 50, 100, 200, 400)] == pytest.approx(
        [0.25, 0.20, 0.13, 0.10, 0.07, 0.05], abs=5e-3
    )


def test_bootstrap_of_a_fair_coin() -> None:
    assert bootstrap_mean([0] * 50 + [1] * 50, counts=False) == pytest.approx((0.5, 0.40, 0.60), abs=1e-9)


def test_bootstrap_is_the_same_twice_and_changes_with_the_seed() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert bootstrap_mean(values) == bootstrap_mean(values)
    assert bootstrap_mean(values) != bootstrap_mean(values, seed=1)


def test_clusters_widen_the_interval() -> None:
    values, subjects = [0] * 10 + [1] * 10, [s for s in "abcd" for _ in range(5)]
    assert resampled_means(values).std() == pytest.approx(0.112, abs=0.003)
    assert resampled_means(values, subjects).std() == pytest.approx(0.25, abs=0.005)


def test_unequal_clusters_keep_the_mean_of_the_values() -> None:
    means = resampled_means([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert set(np.round(means, 6)) == {0.0, 0.75, 1.0}


def test_one_cluster_resamples_its_values() -> None:
    value, low, high = bootstrap_mean([0, 1, 1, 0, 1, 1], ["a"] * 6)
    assert low < value < high


def test_many_units_take_the_blockwise_road_and_agree() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    value, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(1000)
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.01)


def test_constant_data_never_claims_certainty_for_counts() -> None:
    assert bootstrap_mean([0.0] * 64) == wilson(0, 64)
    assert wilson(0, 64).high == pytest.approx(0.0566, abs=1e-3)
    assert bootstrap_mean([1.0] * 64).low == pytest.approx(0.9434, abs=1e-3)
    assert bootstrap_mean([0.3] * 5) == (0.3, 0.3, 0.3)
    assert all(np.isnan(bootstrap_mean([])))


def test_share_is_wilson_widened_by_the_design_effect() -> None:
    assert share([1.0] * 10 + [0.0] * 10) == wilson(10, 20)
    # four subjects who agree with themselves are four observations but for the term k / (k - 1): n = 3, t(3) = 3.182
    together = share([0.0] * 10 + [1.0] * 10, [s for s in "abcd" for _ in range(5)])
    half = 3.1824 * np.sqrt(0.25 / 3 + 3.1824**2 / 36) / (1 + 3.1824**2 / 3)
    assert together == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=1e-3)
    assert share([0.0] * 64) == wilson(0, 64) and np.isnan(share([]).value)
    assert share([1, 0, 1, 1], ["a"] * 4) == share([1, 0, 1, 1])


def _covered(draw: Callable[[np.random.Generator], tuple[np.ndarray, float]], subjects: int) -> float:
    """Share of 1,000 drawn data sets [subjects, 8] whose 95 % interval holds the true mean."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(subjects), 8)
    hits = 0
    for _ in range(1000):
        values, truth = draw(rng)
        _, low, high = bootstrap_mean(values.ravel(), labels, resamples=1999)
        hits += low <= truth <= high
    return hits / 1000


def _normal(subjects: int) -> Callable[[np.random.Generator], tuple[np.ndarray, float]]:
    return lambda rng: (rng.normal(size=(subjects, 8)) + 0.7 * rng.normal(size=(subjects, 1)), 0.0)


def _shares(subjects: int, p: float) -> Callable[[np.random.Generator], tuple[np.ndarray, float]]:
    """Right and wrong answers whose rate differs from subject to subject, with an intra-class correlation of 0.1."""
    return lambda rng: ((rng.random((subjects, 8)) < rng.beta(9 * p, 9 * (1 - p), (subjects, 1))).astype(float), p)


@pytest.mark.parametrize("subjects", [8, 16, 40])
def test_intervals_cover_what_they_promise(subjects: int) -> None:
    assert 0.93 <= _covered(_normal(subjects), subjects) <= 0.97
    assert 0.93 <= _covered(_shares(subjects, 0.5), subjects) <= 0.97
    assert 0.92 <= _covered(_shares(subjects, 0.2), subjects) <= 0.98


def test_paired_difference() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=60)
    assert bootstrap_difference(before, before) == (0.0, 0.0, 0.0)
    value, low, high = bootstrap_difference(before + 1 + 0.1 * rng.normal(size=60), before)
    assert low < value < high and high - low < 0.1  # the spread of `before` itself cancels
    with pytest.raises(ValueError, match="same items"):
        bootstrap_difference([1, 2], [1])


def test_sign_flip_exact_and_sampled() -> None:
    assert sign_flip([1, 1, 1, 1]) == 0.125
    assert sign_flip([1] * 8, list("aabbccdd")) == 0.125
    assert sign_flip([1] * 20) < 0.001
    assert sign_flip([1, -1] * 10) > 0.9


def test_sign_flip_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    p = [sign_flip(rng.normal(size=10)) for _ in range(300)]
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=0.035)


def test_permutation_of_separate_samples() -> None:
    assert permutation([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert permutation([1, 2, 3], [1, 2, 3]) == 1.0


def test_trend() -> None:
    assert trend([1, 2, 3, 4], [1, 3, 2, 4])[:2] == pytest.approx((0.8, 2 / 3))
    # of the 24 orders of four values, 8 have |rho| of 0.8 or more: 1 and 3 either way
    assert trend([1, 2, 3, 4], [1, 3, 2, 4]).p == pytest.approx(8 / 24)
    assert trend(range(20), range(20)).p < 0.001 and np.isnan(trend([1, 2], [3, 3]).rho)


def test_ratio_and_its_refusal() -> None:
    rng = np.random.default_rng(0)
    below = 1 + 0.1 * rng.normal(size=40)
    value, low, high = bootstrap_ratio(below / 2, below)
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))  # paired: what both share cancels
    assert np.isnan(bootstrap_ratio(below, rng.normal(size=40)).value)
    noisy = bootstrap_ratio(0.5 * below + 0.1 * rng.normal(size=40), below)
    assert noisy.low < 0.5 < noisy.high and noisy.high - noisy.low < 0.1


def test_parts_are_resampled_together() -> None:
    values, labels = np.arange(6.0), list("aabbcc")
    one, two, part = resampled_together([(values, labels), (2 * values, labels), (values[:2], labels[:2])])
    assert two == pytest.approx(2 * one) and one.mean() == pytest.approx(2.5, abs=0.05)
    assert np.isnan(part).mean() == pytest.approx((2 / 3) ** 3, abs=0.02) and np.nanmax(part) == 0.5


def test_ks() -> None:
    distance, p = ks([0, 1, 2, 3], [10, 11, 12, 13])
    assert distance == 1.0 and p == pytest.approx(2 / 70)
    assert ks([1, 2], [1, 2]) == (0.0, 1.0)
    assert wasserstein([0, 1], [2, 3]) == 2.0
    i = np.arange(20) / 20
    assert ks(i, i + 0.5) == pytest.approx((0.5, 0.0122986), abs=1e-6)
    for n, critical in ((20, 0.429), (40, 0.304), (100, 0.192), (400, 0.096)):  # 1.358 sqrt(2 / n)
        less = int(critical * n)
        assert ks(range(n), np.arange(n) + less)[1] > 0.05 > ks(range(n), np.arange(n) + less + 1)[1]


def test_mcnemar_and_chance() -> None:
    assert mcnemar(8, 1) == pytest.approx(0.0390625)
    assert mcnemar(0, 0) == 1.0
    assert above_chance(40, 100, 0.25) == pytest.approx(0.000687, abs=1e-6)
    assert above_chance(30, 100, 0.25) == pytest.approx(0.1495, abs=1e-4)


def _differences(n: int, mean: float, sd: float) -> np.ndarray:
    drawn = np.random.default_rng(0).normal(size=n)
    return (drawn - drawn.mean()) / drawn.std(ddof=1) * sd + mean


def test_equivalence() -> None:
    found = equivalence(_differences(100, 0.01, 0.1005), np.zeros(100), 0.05)
    assert found.verdict == "equivalent"
    assert (found.p_above, found.p_below) == pytest.approx((1.9e-8, 6.6e-5), rel=0.05)


@pytest.mark.parametrize(
    ("n", "mean", "sd", "verdict"),
    [
        (100, 0.3, 0.1, "higher"),
        (100, -0.3, 0.1, "lower"),
        (8, 0.01, 0.3, "inconclusive"),
        (50, 0.02, 0.0, "equivalent"),
        (50, 0.2, 0.0, "higher"),
        (1, 0.0, 0.0, "inconclusive"),
    ],
)
def test_equivalence_is_three_way(n: int, mean: float, sd: float, verdict: str) -> None:
    differences = _differences(n, mean, sd) if sd else np.full(n, mean)
    assert equivalence(differences, np.zeros(n), 0.05).verdict == verdict


def test_equivalence_counts_subjects_not_rows() -> None:
    differences = np.repeat(_differences(6, 0.01, 0.06), 20)
    assert equivalence(differences, 0 * differences, 0.05).verdict == "equivalent"
    assert equivalence(differences, 0 * differences, 0.05, np.repeat(np.arange(6), 20)).verdict == "inconclusive"


def test_multiple_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert benjamini_hochberg([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert holm([0.9, 0.8]).max() == 1.0


def test_auc() -> None:
    assert auc([0.9, 0.4], [0.5, 0.1]) == 0.75
    assert auc([1, 1], [1, 1]) == 0.5
    rng = np.random.default_rng(0)
    value, low, high = bootstrap_auc(rng.normal(size=100), rng.normal(size=100))
    assert low < value < high
    assert (high - low) / 2 == pytest.approx(0.080, abs=0.01)
    # labels that repeat each value ten times change nothing; values that are taken for independent shorten it
    many = [np.repeat(rng.normal(size=20), 10) for _ in range(2)]
    labels = np.repeat(np.arange(20), 10)
    honest, naive = bootstrap_auc(*many, clusters=(labels, labels)), bootstrap_auc(*many)
    assert honest.value == naive.value and honest.high - honest.low > 2 * (naive.high - naive.low)
    assert bootstrap_auc([3.0] * 5, [1.0] * 9) == wilson(5, 5)


def _score(subject: str, value: float | None, **keys: object) -> Score:
    return Score(f"{subject}/f", subject, "forget", value, **keys)  # type: ignore[arg-type]


def test_aggregate_clusters_by_subject_and_counts_what_is_missing() -> None:
    scores = tuple(_score(s, v, form="question") for s, v in zip("abcd", (0, 0, 1, 1), strict=True) for _ in range(5))
    skipped = (Score("e/f", "e", "forget", None, form="question", reason="no subject"),)
    (row,) = aggregate(Results({("before", "recall"): scores + skipped}, {"before": "none"}))
    assert (row.arm, row.evaluation, row.group, row.form, row.mode) == (
        "before",
        "recall",
        "forget",
        "question",
        "none",
    )
    assert (row.value, row.n, row.n_skipped) == (0.5, 20, 1)
    assert (row.low, row.high) == pytest.approx((0.0603, 0.9397), abs=1e-3)  # four subjects, not twenty answers


def test_aggregate_keeps_keys_apart_or_pools_over_them() -> None:
    scores = tuple(
        _score(s, v, form=form, held_out=held_out)
        for s in "ab"
        for form, held_out, v in (("question", False, 0.2), ("question", True, 0.4), ("cloze", False, 0.9))
    )
    results = Results({("edited", "probability"): scores})
    assert [(r.form, r.held_out, round(r.value, 6)) for r in aggregate(results)] == [
        ("question", False, 0.2),
        ("question", True, 0.4),
        ("cloze", False, 0.9),
    ]
    (pooled,) = aggregate(results, by=("group", "variant"))
    assert (pooled.form, pooled.n, round(pooled.value, 6)) == ("", 6, 0.5)


def test_aggregate_of_nothing_measured_is_nan_with_a_count() -> None:
    (row,) = aggregate(Results({("edited", "probe"): (_score("a", None, reason="no facts"),)}))
    assert np.isnan(row.value) and np.isnan(row.low) and (row.n, row.n_skipped) == (0, 1)


def test_subjects_missing_means_facts_are_the_clusters() -> None:
    scores = tuple(Score(f"f{i}", "", "general", float(i % 2)) for i in range(40))
    (row,) = aggregate(Results({("before", "drift"): scores}))
    assert 0.2 < row.low < 0.5 < row.high < 0.8
