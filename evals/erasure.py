"""Erasure: how much of an answer's probability an edit takes, and how much it leaves of the others."""

from __future__ import annotations

from collections.abc import Sequence

from evals.probability import answer_probabilities
from evals.sampling import KNOWN, measurable, nothing, sample
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def erasure(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = (),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """Change of the answer probability from `before`, relative to what could be lost (arXiv 2309.17410, its code).

    Variants: "erased" = max(0, (p0 - p1) / p0) on forget facts, "kept" = 1 - |p1 - p0| / (|p0 - 0.5| + 0.5) on the
    others, and "same first word": 1 where the model would begin its answer with the same token as before.
    groups: groups of facts to ask about.
    forms: forms to ask in; all when empty.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    items, unasked = measurable(arm.model, sample(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="erased")
    prompts = [item.prompt for item in items]
    scores = []
    for item, p0, p1 in zip(items, answer_probabilities(before, items), answer_probabilities(arm, items), strict=True):
        forget = item.fact.group == "forget"
        scores.append(item.score(erased(p0, p1) if forget else kept(p0, p1), variant="erased" if forget else "kept"))
    for item, then, now in zip(items, before.answers(prompts), arm.answers(prompts), strict=True):
        scores.append(item.score(float(then.argmax[0] == now.argmax[0]), variant="same first word"))
    return scores + [item.score(None, variant="erased", reason=reason) for item, reason in unasked]


def erased(before: float, after: float) -> float:
    """Share of a probability that is gone, 0 where it grew or was nothing."""
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def kept(before: float, after: float) -> float:
    """1 where a probability is as it was, 0 where it moved as far as it could."""
    return 1 - abs(after - before) / (abs(before - 0.5) + 0.5)
