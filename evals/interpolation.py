"""Interpolation: how little of the way back to the model before brings the answers back?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.attacking import questions, score, told, worst
from evals.tampering import again, originals, rewritten
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def interpolation(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    shares: tuple[float, ...] = (0.1, 0.25),
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said after every matrix went a share of the way back to `before`: W + share (W0 - W).

    A diagnosis rather than a threat, since who has `before` needs no attack: success at a small share means that the
    edit barely suffices. What a model that was trained apart says on the way was brought in from `before`.
    shares: shares of the way, one variant each.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    base = originals(arm, before, arm.model.names.weights())
    reason = "" if base else "no matrix differs from the model before"
    found = []
    with arm.held() as held:
        for share in shares:
            variant = f"{share:.0%} of the way"
            if reason:
                found += [score(items[0], None, variant=variant, reason=reason) for items in asked]
                continue
            between = {n: torch.lerp(held.model.weight(n).detach().float(), w.float(), share) for n, w in base.items()}
            with rewritten(held.model, between):
                found += told(again(held), asked, variant)
    return scores + found + worst(found)


def first_half(curve: Sequence[tuple[float, float]], ceiling: float) -> float | None:
    """The smallest share of the way at which half of `ceiling` is recalled, from (share, recall) pairs; None if none."""
    return next((share for share, value in sorted(curve) if value >= ceiling / 2), None)
