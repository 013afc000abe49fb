"""Comparing arms: which arm plays which part, changes over the same prompts, the rows a sentence is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from excise.scores import Results, Row, Score
from excise.statistics import Interval, aggregate, bootstrap_difference, wilson


def roles(results: Results, recipe: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Which arm is before, edited, control, oracle: as the recipe says, else by name; the first other one is edited."""
    found = dict((recipe or {}).get("roles", {}))
    for arm in results.arms:
        found.setdefault(arm_role(arm), arm)
    return {role: arm for role, arm in found.items() if arm in results.arms}


def arm_role(name: str) -> str:
    """What an arm stands for, by its name: "before", "control", "oracle" or "edited"."""
    lowered = name.lower()
    if lowered in ("before", "oracle"):
        return lowered
    return "control" if lowered.startswith(("control", "random")) else "edited"


class Pairs(NamedTuple):
    """The same prompts in two arms: values [n] on each side, and the cluster of each (its subject)."""

    after: list[float]
    before: list[float]
    clusters: list[str]


def pairs(
    results: Results, evaluation: str, after: str, before: str, *groups: str, variants: tuple[str, str] | None = None
) -> Pairs:
    """Values of the prompts of some groups that were measured in both arms.

    variants: the variant on each side; all, like with like, when None.
    """
    sides = []
    for i, arm in enumerate((after, before)):
        scores = [s for s in results.scores.get((arm, evaluation), ()) if s.group in groups]
        sides.append(
            by_prompt([replace(s, variant="") for s in scores if s.variant == variants[i]] if variants else scores)
        )
    common = [k for k in sides[0] if k in sides[1]]
    a, b = ([float(side[k].value or 0.0) for k in common] for side in sides)
    return Pairs(a, b, [sides[0][k].subject or k[0] for k in common])


def paired(
    results: Results, evaluation: str, after: str, before: str, *groups: str, variants: tuple[str, str] | None = None
) -> Interval | None:
    """Mean change of some groups from one arm to another over the same prompts, with its paired 95 % interval.

    Where no prompt changed, the interval is what that many unchanged prompts allow (Wilson). None without common
    prompts.
    """
    found = pairs(results, evaluation, after, before, *groups, variants=variants)
    if not found.after:
        return None
    change = bootstrap_difference(*found)
    if change.value == change.low == change.high == 0:
        bound = wilson(0, len(found.after)).high
        return Interval(0.0, -bound, bound)
    return change


def by_prompt(scores: Sequence[Score]) -> dict[tuple[Any, ...], Score]:
    """Measured scores by fact, form, split, variant and turn: wordings of one form come in the same order in every arm."""
    turn: dict[tuple[Any, ...], int] = {}
    found = {}
    for s in scores:
        key = (s.fact, s.form, s.held_out, s.variant)
        turn[key] = turn.get(key, -1) + 1
        if s.value is not None:
            found[*key, turn[key]] = s
    return found


def rows_of(results: Results, evaluation: str, group: str, by: Sequence[str] = ("group", "variant")) -> list[Row]:
    """Aggregates of one evaluation and group, single layers left out."""
    only = {
        k: tuple(s for s in v if s.group == group and "layer " not in s.variant)
        for k, v in results.scores.items()
        if k[1] == evaluation
    }
    return [r for r in aggregate(Results(only, results.modes), by=by) if r.n]
