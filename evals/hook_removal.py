"""Hook removal: an edit that lives in hooks is gone as soon as somebody else loads the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evals.attacking import questions, told
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def hook_removal(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said by the weights alone: all hooks gone, what is written into weights still there.

    An edit made of hooks alone loses everything by definition: it is a guard for a service, not unlearning.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    return scores + told(without_hooks(arm), asked, "")


def without_hooks(arm: Arm) -> Arm:
    """The arm with those changes alone that can be written into weights."""
    if arm.edit is None or arm.edit.bakeable:
        return arm
    kept = tuple(c for c in arm.edit.changes if c.bakeable)
    return Arm(arm.name, arm.model, replace(arm.edit, changes=kept) if kept else None)
