"""How far an arm is from a model that never learned the facts: forget quality, privacy leakage, recovered shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from excise.comparison import by_prompt, roles
from excise.scores import Results, Row, Score
from excise.statistics import (
    Interval,
    Verdict,
    auc,
    bootstrap_auc,
    bootstrap_difference,
    bootstrap_ratio,
    equivalence,
    interval_of,
    ks,
    resampled_aucs,
    resampled_ks,
    wasserstein,
)

# Knowledge scores, of which a share can be said to have come back or never to have gone.
KNOWLEDGE = (
    ("recall", ""), ("probability", ""), ("rouge", "rougeL recall"), ("memorisation", "extraction strength"),
    ("memorisation", "exact memorisation"), ("truth_ratio", "knowledge"), ("forced_choice", "right"),
)  # fmt: skip
# Below this difference of before and oracle a share of it means nothing.
LEAST = 0.05
ATTACKS = ("loss", "zlib", "min-k", "min-k++")


def forget_quality(results: Results, *, seed: int = 0) -> list[Row]:
    """Kolmogorov-Smirnov test of each arm's truth ratios on forget facts against the oracle's (TOFU, 2401.06121).

    Rows "D" (comparable across n; its interval draws subjects for both arms alike), "p" and "log10 p" (higher is closer;
    not comparable across n, and no proof of equality), "Wasserstein" (in nats, where D is at its top of 1 already), and "log
    ratio above the oracle" (paired, which side it lies on).
    """
    oracle = roles(results).get("oracle")
    rows = []
    for arm in results.arms if oracle else ():
        a, b, subjects = pair(results, "truth_ratio", "log ratio", arm, str(oracle))
        if arm == oracle or len(a) < 2:
            continue
        distance, p = ks(a, b)
        few = len(set(subjects))
        d = interval_of(distance, resampled_ks(a, b, subjects, seed=seed), few)
        above = bootstrap_difference(a, b, subjects, seed=seed)
        log = float(np.log10(max(p, 1e-300)))
        found = {"D": d, "p": _bare(p), "log10 p": _bare(log), "Wasserstein": _bare(wasserstein(a, b))}
        found["log ratio above the oracle"] = above
        rows += [_row(results, arm, "forget_quality", name, interval, len(a)) for name, interval in found.items()]
    return rows


def like_the_oracle(
    results: Results, arm: str, evaluation: str, variant: str = "", *, margin: float = LEAST, group: str = "forget"
) -> Verdict | None:
    """Whether an arm's scores are equivalent to the oracle's within the margin (TOST over subjects), higher, lower, or
    too few to say; None without an oracle or common prompts.
    """
    oracle = roles(results).get("oracle")
    if oracle is None:
        return None
    a, b, subjects = pair(results, evaluation, variant, arm, oracle, group=group)
    return equivalence(a, b, margin, subjects) if len(a) else None


def privacy_leak(results: Results, *, seed: int = 0) -> list[Row]:
    """AUC of each membership attack, and PrivLeak in per cent (MUSE, 2407.06460): 0 best, negative under-unlearned.

    Without an oracle its AUC is taken to be 0.5, and the row says so.
    """
    rows, oracle = [], roles(results).get("oracle")
    for arm in results.arms:
        for attack in ATTACKS:
            sides = _sides(results, arm, attack)
            if sides is None:
                continue
            (a, ca), (b, cb) = sides
            found = bootstrap_auc(a, b, (ca, cb), seed=seed)
            rows.append(_row(results, arm, "privacy_leak", f"AUC, {attack}", found, len(a) + len(b)))
            rest = _sides(results, oracle, attack) if oracle else None
            target = auc(rest[0][0], rest[1][0]) if rest else 0.5
            if target == 1 or arm == oracle:
                continue
            drawn = resampled_aucs(a, b, (ca, cb), seed=seed)
            there = (
                resampled_aucs(rest[0][0], rest[1][0], (rest[0][1], rest[1][1]), seed=seed) if rest else 0.5 + 0 * drawn
            )
            with np.errstate(divide="ignore", invalid="ignore"):
                leaks = privacy_leakage(drawn, there)
            name = f"PrivLeak, {attack}" + ("" if rest else ", oracle taken as 0.5")
            interval = interval_of(float(privacy_leakage(found.value, target)), leaks, min(len(set(ca)), len(set(cb))))
            rows.append(_row(results, arm, "privacy_leak", name, interval, len(a) + len(b)))
    return rows


def privacy_leakage(found: Any, oracle: Any) -> Any:
    """100 ((1 - AUC) - (1 - AUC of the oracle)) / (1 - AUC of the oracle)."""
    return 100 * (oracle - found) / (1 - oracle)


def membership_score(found: Any, oracle: Any) -> Any:
    """1 - |AUC - AUC of the oracle| / max(AUC of the oracle, 1 - AUC of the oracle), in [0, 1]."""
    return 1 - np.abs(found - oracle) / np.maximum(oracle, 1 - oracle)


def privacy_scores(results: Results, arm: str, *, seed: int = 0) -> list[tuple[float, np.ndarray, int]]:
    """For each attack the normalised score of an arm, its resampled values, and the clusters of the smaller side."""
    found = []
    oracle = roles(results).get("oracle")
    for attack in ATTACKS:
        sides, rest = _sides(results, arm, attack), _sides(results, oracle or "", attack)
        if sides is None or rest is None:
            return []
        (a, ca), (b, cb) = sides
        value = membership_score(auc(a, b), auc(rest[0][0], rest[1][0]))
        drawn = membership_score(
            resampled_aucs(a, b, (ca, cb), seed=seed),
            resampled_aucs(rest[0][0], rest[1][0], (rest[0][1], rest[1][1]), seed=seed),
        )
        found.append((float(value), np.asarray(drawn), min(len(set(ca)), len(set(cb)))))
    return found


def recovered(results: Results, *, seed: int = 0) -> list[Row]:
    """(arm - oracle) / (before - oracle) of every knowledge score on forget facts: 0 as the oracle, 1 nothing forgotten.

    Left out where before and oracle are less than LEAST apart, or where their difference may be 0.
    """
    who = roles(results)
    rows = []
    for arm in results.arms if {"before", "oracle"} <= who.keys() else ():
        if arm in (who["before"], who["oracle"]):
            continue
        for evaluation, variant in KNOWLEDGE:
            values, subjects = together(results, evaluation, variant, (arm, who["oracle"], who["before"]))
            if not len(subjects) or abs(values[2].mean() - values[1].mean()) < LEAST:
                continue
            share = bootstrap_ratio(values[0] - values[1], values[2] - values[1], subjects, seed=seed)
            if np.isfinite(share.value):
                name = ", ".join(x for x in (evaluation, variant) if x)
                rows.append(_row(results, arm, "recovered", name, share, len(subjects)))
    return rows


def pair(
    results: Results, evaluation: str, variant: str, arm: str, other: str, *, group: str = "forget"
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Values of two arms on the same prompts of a group, and their subjects."""
    (a, b), subjects = together(results, evaluation, variant, (arm, other), group=group)
    return a, b, subjects


def together(
    results: Results, evaluation: str, variant: str, arms: Sequence[str], *, group: str = "forget"
) -> tuple[np.ndarray, list[str]]:
    """Values [n_arms, n] of several arms on the prompts that all of them measured, and their subjects."""
    sides = [
        by_prompt([s for s in results.scores.get((a, evaluation), ()) if s.variant == variant and s.group == group])
        for a in arms
    ]
    common = [k for k in sides[0] if all(k in side for side in sides)]
    values = np.array([[float(side[k].value or 0.0) for k in common] for side in sides])
    return values.reshape(len(arms), len(common)), [_subject(sides[0][k]) for k in common]


def _sides(results: Results, arm: str, attack: str) -> tuple[tuple[list[float], list[str]], ...] | None:
    """Members and others as scores that are larger for members, with their subjects."""
    found = []
    for group in ("forget", "unknown"):
        there = [
            s
            for s in results.scores.get((arm, "privacy"), ())
            if s.variant == attack and s.group == group and s.value is not None
        ]
        found.append(([-float(s.value or 0.0) for s in there], [_subject(s) for s in there]))
    return (found[0], found[1]) if found[0][0] and found[1][0] else None


def _subject(score: Score) -> str:
    return score.subject or score.fact


def _bare(value: float) -> Interval:
    return Interval(value, np.nan, np.nan)


def _row(results: Results, arm: str, evaluation: str, variant: str, interval: Interval, n: int) -> Row:
    return Row(arm, evaluation, "forget", "", False, variant, *interval, n=n, mode=results.modes.get(arm, ""))
