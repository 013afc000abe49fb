"""Trials: what one try of an edit is, and how it is judged by three cheap figures. Which are best is a Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from excise.arms import Arm
from excise.attacks import worst_of
from excise.edits import Edit
from excise.facts import Facts
from excise.findings import CHANCE, FOUND
from excise.model import Model
from excise.registry import method
from excise.scores import Score

# Prompts per side that judge a trial; of each form those that the lens looks at: its share jumps from few.
JUDGED, LOOKED = 96, 64
FIGURES = ("forget", "damage", "residual")


@dataclass(frozen=True)
class Trial:
    """One try: an editor, its options, the block (None: its own choice), the strength, and how it was judged.

    forget: mean probability of the answers to forget. damage: mean probability that answers to keep have lost. residual:
    what is still inside, the worse of two: the share of the answers to forget that the logit lens finds in some layer,
    beyond what it finds of other subjects' answers, and the share that is said again as soon as the edited parts are left
    out. All in [0, 1], less is better; None where no edit was made, for the reason given.
    """

    key: str
    number: int
    editor: str
    options: Mapping[str, Any]
    block: int | None
    strength: float
    forget: float | None = None
    damage: float | None = None
    residual: float | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def figures(self) -> tuple[float, float, float] | None:
        """The three figures, or None where no edit was made."""
        return None if self.forget is None else (self.forget, self.damage or 0.0, self.residual or 0.0)

    @property
    def kind(self) -> tuple[Any, ...]:
        """All that tells the trial from others but for strengths and other numbers on a scale."""
        return self.editor, self.block, *(str(v) for v in self.options.values() if not isinstance(v, float))

    @property
    def name(self) -> str:
        """The trial in a few words."""
        if self.editor == "sum":
            return " + ".join(self.options["of"])
        said = [f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.options.items()]
        said += [f"block {self.block}"] if self.block is not None else []
        said += [f"strength {self.strength:.2f}"] if self.strength != 1 else []
        listed = ", ".join(said)
        return f"{self.editor} ({listed})" if said else self.editor


@dataclass(frozen=True)
class Judge:
    """Judges edits by forms that were taught; held-out forms and people are for the audit.

    target: the figures of a model that never learned the facts, where there is one; else zero.
    """

    model: Model
    before: Arm
    facts: Facts
    seed: int
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __call__(self, edit: Edit) -> tuple[float, float, float]:
        """forget, damage, residual."""
        return self.figures(Arm("trial", self.model, edit))

    def figures(self, arm: Arm) -> tuple[float, float, float]:
        """The three figures of an arm."""
        now = self._probabilities(arm)
        then = self._then
        forget = [v for k, v in now.items() if k[0] == "forget"]
        lost = [max(0.0, then[k] - v) for k, v in now.items() if k[0] != "forget"]
        seen = method("evaluation", "lens").function(
            arm, self.facts.group("forget"), before=self.before, groups=("forget",), limit=LOOKED, seed=self.seed
        )
        hits, others = ([s.value for s in seen if s.variant == v and s.value is not None] for v in (FOUND, CHANCE))
        return _mean(forget), _mean(lost), max(0.0, _mean(hits) - _mean(others), self._back(arm))

    @cached_property
    def _then(self) -> dict[tuple[Any, ...], float]:
        return self._probabilities(self.before)

    def _back(self, arm: Arm) -> float:
        """Share of some facts to forget that is said without the edit's hooks, or when an edited layer is skipped."""
        sites = [c.site for c in arm.edit.changes] if arm.edit is not None else []
        layers = tuple(sorted({s.layer for s in sites if s.layer is not None}))
        parts = tuple(dict.fromkeys("attention" if ".attn" in s.point else "mlp" for s in sites))
        asked: dict[str, Any] = {"groups": ("forget",), "limit": JUDGED // 8, "seed": self.seed}
        found: list[Sequence[Score]] = []
        if arm.mode == "hook":
            found.append(method("evaluation", "hook_removal").function(arm, self.facts, **asked))
        if layers:
            found.append(
                method("evaluation", "layer_skip").function(arm, self.facts, layers=layers, parts=parts, **asked)
            )
        return max((_mean([s.value for s in worst_of(scores) if s.value is not None]) for scores in found), default=0.0)

    def _probabilities(self, arm: Arm) -> dict[tuple[Any, ...], float]:
        scores: Sequence[Score] = method("evaluation", "probability").function(
            arm, self.facts, groups=("forget", "retain", "neighbour"), limit=JUDGED // 4, seed=self.seed
        )
        known = [s for s in scores if s.value is not None and not s.held_out]
        return {(s.group, s.fact, s.form, i): float(s.value or 0.0) for i, s in enumerate(known)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def distance(figures: Sequence[float], target: Sequence[float]) -> float:
    """Euclidean distance of the figures to those of the target."""
    return math.dist(figures, target)


def front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials that no other beats in one figure without being beaten in another, by what they still say."""
    made = [t for t in trials if t.figures]
    best = [t for t in made if not any(_beats(o, t) for o in made)]
    return sorted(best, key=lambda t: t.figures or ())


def best_of_each(trials: Sequence[Trial], kind: Callable[[Trial], Any], target: Sequence[float]) -> list[Trial]:
    """The trials of the front, nearest to the target first, but behind them all that resemble a nearer one: first stands
    the best of each kind.
    """
    ranked = sorted(front(trials), key=lambda t: distance(t.figures or (), target))
    first = {kind(t): t for t in reversed(ranked)}.values()
    return sorted(ranked, key=lambda t: t not in first)


def _beats(a: Trial, b: Trial) -> bool:
    x, y = a.figures or (), b.figures or ()
    return x != y and all(p <= q for p, q in zip(x, y, strict=True))
