"""Which rows of a table changed between two arms, with p values that were corrected for having looked at all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from excise.comparison import by_prompt
from excise.scores import Results, Row
from excise.statistics import benjamini_hochberg, bootstrap_difference, holm, sign_flip


@dataclass(frozen=True)
class Change:
    """The mean change of one row of the table over the same prompts.

    value, low, high: change and its paired 95 % interval. p: of the paired sign-flip test over subjects; adjusted: the
    same, corrected for all changes that were looked at together. n: prompts; subjects: clusters.
    """

    evaluation: str
    group: str
    form: str
    held_out: bool
    variant: str
    value: float
    low: float
    high: float
    p: float
    adjusted: float
    n: int
    subjects: int


def changes(
    results: Results,
    after: str,
    before: str,
    *,
    evaluations: Sequence[str] = (),
    correction: Literal["holm", "bh"] = "holm",
    seed: int = 0,
) -> list[Change]:
    """Every row that both arms measured, as a change from `before` to `after`, in the order of the table.

    correction: "holm" for a family fixed beforehand, "bh" (Benjamini-Hochberg) for a map that is explored.
    With few subjects no p can be small: of n subjects the least possible is 2 / 2^n.
    """
    found = []
    for evaluation in evaluations or results.evaluations:
        sides = [by_prompt(results.scores.get((arm, evaluation), ())) for arm in (after, before)]
        rows: dict[tuple[str, str, bool, str], list[tuple[float, float, str]]] = {}
        for key, score in sides[0].items():
            if key in sides[1]:
                values = float(score.value or 0.0), float(sides[1][key].value or 0.0)
                place = (score.group, score.form, score.held_out, score.variant)
                rows.setdefault(place, []).append((*values, score.subject or score.fact))
        for place, values_of in rows.items():
            a, b, subjects = (list(column) for column in zip(*values_of, strict=True))
            interval = bootstrap_difference(a, b, subjects, seed=seed)
            p = sign_flip(np.subtract(a, b), subjects, seed=seed)
            found.append(Change(evaluation, *place, *interval, p, p, len(a), len(set(subjects))))
    correct = holm if correction == "holm" else benjamini_hochberg
    adjusted: Sequence[float] | np.ndarray = correct([c.p for c in found]) if found else []
    return [replace(c, adjusted=float(p)) for c, p in zip(found, adjusted, strict=True)]


def clearly_best(rows: Sequence[Row], *, higher: bool) -> Row | None:
    """The best of some rows if its interval meets no other's: the only one that may be set in bold."""
    there = [r for r in rows if r.n and np.isfinite([r.value, r.low, r.high]).all()]
    if len(there) < 2:
        return None
    best, *others = sorted(there, key=lambda r: r.value, reverse=higher)
    apart = all(best.low > r.high for r in others) if higher else all(best.high < r.low for r in others)
    return best if apart else None
