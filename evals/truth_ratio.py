"""Truth ratio: are wrong answers as likely as the right one? TOFU, arXiv 2401.06121, sections 2.2 and 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from evals.candidates import Candidates, candidate_logprobs
from evals.sampling import Item, asked_in, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

GROUPS = ("forget", "retain", "neighbour", "general")
LOG_RATIO = "log ratio"


@evaluation("behavioural")
def truth_ratio(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    wrong: int = 5,
    combine: Literal["geometric", "arithmetic"] = "geometric",
    groups: tuple[str, ...] = GROUPS,
    forms: tuple[str, ...] = ("statement", "question"),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """Ratio R of the mean probability of wrong answers to that of the right one, after the same prompt.

    Variants: "log ratio" (below 0 the right answer is preferred; what the distance to an oracle is taken on), "closer
    to 1" = min(R, 1/R) (TOFU's for forget facts, higher is less knowledge; hides which side R is on), "true better" =
    max(0, 1 - R) (for facts to keep), "knowledge" = p+ / (p+ + p-) (0.5: no preference). Probabilities are
    length-normalised. Wrong answers are the fact's foils, or what other subjects answer to the same question.
    wrong: wrong answers per fact.
    combine: mean of the wrong probabilities: geometric as in TOFU's code, or arithmetic.
    groups: groups of facts to ask about.
    forms: forms to ask in; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts and wrong answers are taken when there are more.
    """
    items, unasked = measurable(arm.model, asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant=LOG_RATIO)
    known = Candidates(facts)
    rivals = [known.of(item, limit=wrong, seed=seed) for item in items]
    comparable = [(item, others) for item, others in zip(items, rivals, strict=True) if others]
    alone = [
        (i, "no wrong answer to compare with: give foils, or facts of the same relation")
        for i, o in zip(items, rivals, strict=True)
        if not o
    ]
    found = candidate_logprobs(arm, [i for i, _ in comparable], [o for _, o in comparable])
    scores = []
    for (item, _), (right, others) in zip(comparable, found, strict=True):
        scores += _scores(item, log_ratio(right, others, combine))
    return scores + [item.score(None, variant=LOG_RATIO, reason=reason) for item, reason in unasked + alone]


def log_ratio(right: float, wrong: Sequence[float], combine: str = "geometric") -> float:
    """log R from mean log-probabilities per token of the right answer and of the wrong ones."""
    logs = np.asarray(wrong, float)
    mean = logs.mean() if combine == "geometric" else np.logaddexp.reduce(logs) - math.log(len(logs))
    return float(mean - right)


def closer_to_1(log_r: float) -> float:
    """min(R, 1/R), in (0, 1]."""
    return math.exp(-abs(log_r))


def true_better(log_r: float) -> float:
    """max(0, 1 - R), in [0, 1)."""
    return max(0.0, -math.expm1(log_r)) if log_r < 0 else 0.0


def knowledge(log_r: float) -> float:
    """p+ / (p+ + p-), in (0, 1)."""
    return 1 / (1 + math.exp(log_r)) if log_r < 700 else 0.0


def _scores(item: Item, log_r: float) -> list[Score]:
    return [
        item.score(log_r, variant=LOG_RATIO),
        item.score(closer_to_1(log_r), variant="closer to 1"),
        item.score(true_better(log_r), variant="true better"),
        item.score(knowledge(log_r), variant="knowledge"),
    ]
