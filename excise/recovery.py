"""What attacks bring back: which facts by which attack, and how much after how many steps. Results in, values out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from excise.attacks import is_attack, worst_variants
from excise.comparison import roles
from excise.fates import FOUND
from excise.scores import Results, Row
from excise.statistics import aggregate

STEP = re.compile(r"^(?P<measure>.*), step (?P<step>\d+)$")
# Whether an attack drew a fact from the edited model, from one that never knew it, from both, or from neither.
Drawn = Literal["edited", "oracle", "both", "neither"]


@dataclass(frozen=True)
class Curve:
    """How much of what was never shown comes back as an attack goes on: by arm the rows by step, in order."""

    evaluation: str
    measure: str
    rows: Mapping[str, tuple[tuple[int, Row], ...]]


def step_curves(results: Results, *, group: str = "forget") -> list[Curve]:
    """Every attack that was followed over its steps."""
    found: dict[tuple[str, str], dict[str, list[tuple[int, Row]]]] = {}
    for row in aggregate(results, by=("group", "variant")):
        match = STEP.match(row.variant) if row.n and row.group == group and is_attack(row.evaluation) else None
        if match:
            arms = found.setdefault((row.evaluation, match["measure"]), {})
            arms.setdefault(row.arm, []).append((int(match["step"]), row))
    return [
        Curve(*key, {a: tuple(sorted(r, key=lambda x: x[0])) for a, r in arms.items()}) for key, arms in found.items()
    ]


def drawn_facts(results: Results) -> dict[str, dict[str, Drawn]]:
    """By forget fact and attack, in the attack's worst case: who answered. Only facts that were asked, by what asked them."""
    who = roles(results)
    if "edited" not in who:
        return {}
    table: dict[str, dict[str, Drawn]] = {}
    for name in filter(is_attack, results.evaluations):
        variants = worst_variants(results, who["edited"], name)
        hit = {role: _best(results, who[role], name, variants) for role in ("edited", "oracle") if role in who}
        for fact, value in hit["edited"].items():
            there = hit.get("oracle", {}).get(fact, 0.0) >= FOUND
            table.setdefault(fact, {})[name] = _word(value >= FOUND, there)
    return table


def _word(here: bool, there: bool) -> Drawn:
    return "both" if here and there else "edited" if here else "oracle" if there else "neither"


def _best(results: Results, arm: str, name: str, variants: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for s in results.scores.get((arm, name), ()):
        if s.group == "forget" and s.fact and s.value is not None and s.variant in variants:
            found[s.fact] = max(found.get(s.fact, s.value), s.value)
    return found
