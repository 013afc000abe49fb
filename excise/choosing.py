"""Choosing an edit: a search, then the full audit of the best few, on wordings and people that the search never saw."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from excise.arms import Arm
from excise.attacks import is_attack, worst_of
from excise.edits import Edit
from excise.files import write_text
from excise.findings import CHANCE, FOUND
from excise.progress import say
from excise.scores import Results, Score
from excise.search import Search
from excise.trials import Trial, best_of_each, distance, front

# So many of the front are audited; as far as there are so many, they differ in more than their strengths.
FINALISTS = 5
# Which scores make which figure of an audit: evaluation, groups, variant.
FIGURES = {
    "forget": ("recall", ("forget",), ""),
    "kept": ("recall", ("retain", "neighbour", "general"), ""),
    "lens": ("lens", ("forget",), FOUND),
    "probe": ("probe", ("forget",), "refit, best layer"),
}
# Shares of the time after which the search ends, and the audit of the finalists.
SEARCHED, AUDITED = 0.5, 0.75


@dataclass(frozen=True)
class Choice:
    """What was chosen and why.

    trials: all that was tried; front: names of those that no other beats; audited: by finalist, its figures in the audit
    and their distance to those of the target.
    """

    edit: Edit
    trial: Trial
    trials: tuple[Trial, ...]
    audited: Mapping[str, Mapping[str, float]]

    def record(self) -> dict[str, Any]:
        """The choice as plain values."""
        names = {t.key for t in front(self.trials)}
        tried = [{**asdict(t), "name": t.name, "front": t.key in names, "chosen": t is self.trial} for t in self.trials]
        return {"chosen": self.trial.name, "audited": self.audited, "trials": tried}


def choose(search: Search, measured: Any, out: Path, *, trials: int, ends: float) -> Choice:
    """Search, audit the finalists, and keep the one nearest to a model that never learned the facts.

    measured: arms -> Results, the audit; ends: when the search must stop (time.monotonic). The choice is written to
    search.json as well.
    """
    done = search.run(trials, ends)
    ranked = best_of_each(done, lambda t: t.kind, search.judge.target)[:FINALISTS]
    arms = {f"finalist {i + 1}": search.edit(t) for i, t in enumerate(ranked)}
    say(f"{len(done)} tries, {len(front(done))} on the front; auditing {', '.join(t.name for t in ranked)}")
    results = measured([Arm(name, search.model, edit) for name, edit in arms.items()])
    figures = {arm: audit_figures(results, arm) for arm in results.arms}
    audited = {}
    for t, arm in zip(ranked, arms, strict=True):
        target = figures.get("oracle") or ideal(figures["before"], by_chance(results, arm))
        audited[t.name] = {**figures[arm], "distance": audit_distance(figures[arm], target)}
    best = min(range(len(ranked)), key=lambda i: audited[ranked[i].name]["distance"])
    chosen = Choice(list(arms.values())[best], ranked[best], tuple(done), audited)
    write_text(out / "search.json", json.dumps(chosen.record(), indent=1, ensure_ascii=False) + "\n")
    return chosen


def audit_figures(results: Results, arm: str) -> dict[str, float]:
    """Of an arm: recall of what is to be forgotten, over all forms; recall of what is to be kept; what lens and probe find;
    what attacks draw, on average over attacks. What was not measured is left out.
    """
    found: dict[str, float] = {}
    for name, of in FIGURES.items():
        if (value := _mean(results, arm, *of)) is not None:
            found[name] = value
    drawn = [v for name in results.evaluations if (v := _drawn(results.scores.get((arm, name), ()), name)) is not None]
    return found | ({"attacked": sum(drawn) / len(drawn)} if drawn else {})


def _mean(results: Results, arm: str, evaluation: str, groups: Sequence[str], variant: str) -> float | None:
    """Mean of what was measured of some groups in one variant; None where nothing was."""
    scores = results.scores.get((arm, evaluation), ())
    values = [s.value for s in scores if s.group in groups and s.variant == variant and s.value is not None]
    return sum(values) / len(values) if values else None


def _drawn(scores: Sequence[Score], evaluation: str) -> float | None:
    """Mean of an attack over the facts to forget, of its worst case where it has one; None for what is no attack."""
    if not is_attack(evaluation):
        return None
    mine = [s for s in scores if s.group == "forget" and s.value is not None]
    worst = worst_of(mine)
    return sum(s.value or 0.0 for s in worst) / len(worst) if worst else None


def by_chance(results: Results, arm: str) -> float:
    """What the lens finds in an arm of answers that are not the subject's; 0 where that was not measured."""
    return _mean(results, arm, "lens", ("forget",), CHANCE) or 0.0


def ideal(before: Mapping[str, float], chance: float = 0.0) -> dict[str, float]:
    """What an edit should reach where no model that never learned the facts is at hand: nothing said or lost, and found
    no more than by chance.
    """
    return {k: {"kept": v, "lens": chance}.get(k, 0.0) for k, v in before.items()}


def audit_distance(figures: Mapping[str, float], target: Mapping[str, float]) -> float:
    """Euclidean distance over the figures that both have."""
    common = [k for k in figures if k in target]
    return distance([figures[k] for k in common], [target[k] for k in common])
