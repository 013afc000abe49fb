"""Forced choice: does the model still prefer the right answer among all of its kind, whatever it would say by itself?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evals.candidates import Candidates, candidate_logprobs
from evals.sampling import KNOWN, Item, asked_in, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def forced_choice(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    candidates: int = 15,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = ("statement", "question"),
    limit: int = 16,
    seed: int = 0,
) -> list[Score]:
    """Where the right answer stands among all values of its relation, by length-normalised log-probability.

    The most sensitive question to a model whose probabilities can be seen: an edit that lowers an answer below a
    refusal and leaves it above its rivals is found here. Variants: "right" (1 where it is the likeliest, 1/m in a tie
    of m), "reciprocal rank", "margin" (nats per token above the best rival), "p(right)" (its share of all their
    probabilities, TOFU's score of choices), "chance" (what "right" is by guessing).
    candidates: most wrong answers per fact; 0 for all that are known.
    groups: groups of facts to ask about.
    forms: forms to ask in; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts and candidates are taken when there are more.
    """
    items, unasked = measurable(arm.model, asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="right")
    known = Candidates(facts)
    rivals = [known.of(item, limit=candidates, seed=seed) for item in items]
    unasked += [
        (item, "no other value to choose from: give foils, or facts of the same relation")
        for item, r in zip(items, rivals, strict=True)
        if not r
    ]
    there = [(item, r) for item, r in zip(items, rivals, strict=True) if r]
    found = candidate_logprobs(arm, [i for i, _ in there], [r for _, r in there])
    scores = []
    for (item, others), (right, wrong) in zip(there, found, strict=True):
        scores += _scores(item, others, right, wrong)
    return scores + [item.score(None, variant="right", reason=reason) for item, reason in unasked]


def choice(right: float, wrong: Sequence[float]) -> tuple[float, float, float]:
    """(share of a win, reciprocal rank, margin) of a right value against wrong ones; ties count 1/m and the mean rank."""
    above, level = sum(w > right for w in wrong), sum(w == right for w in wrong)
    win = 0.0 if above else 1 / (1 + level)
    return win, 1 / (1 + above + level / 2), right - max(wrong)


def probability_share(right: float, wrong: Sequence[float]) -> float:
    """p+ / (p+ + sum of p-), from mean log-probabilities per token."""
    return float(np.exp(right - np.logaddexp.reduce([right, *wrong])))


def _scores(item: Item, others: Sequence[str], right: float, wrong: Sequence[float]) -> list[Score]:
    win, reciprocal, margin = choice(right, wrong)
    first = others[max(range(len(wrong)), key=lambda i: wrong[i])] if margin < 0 else item.prompt.answer
    return [
        item.score(win, variant="right", detail=first),
        item.score(reciprocal, variant="reciprocal rank"),
        item.score(margin, variant="margin"),
        item.score(probability_share(right, wrong), variant="p(right)"),
        item.score(1 / (1 + len(wrong)), variant="chance"),
    ]
