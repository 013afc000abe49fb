"""Answer probability: how likely the model finds the answer, also where it says something else."""

from __future__ import annotations

from collections.abc import Sequence

from evals.sampling import KNOWN, Item, measurable, nothing, sample
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def probability(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = (),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """Length-normalised probability of the answer, exp(mean log p of its tokens); the likeliest accepted answer counts.

    Zero is not the aim: a model that never knew the fact still guesses. Compare with the oracle (TOFU, arXiv
    2401.06121).
    groups: groups of facts to ask about.
    forms: forms to ask in; all when empty.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    items, unasked = measurable(arm.model, sample(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}")
    scores = [item.score(p) for item, p in zip(items, answer_probabilities(arm, items), strict=True)]
    return scores + [item.score(None, reason=reason) for item, reason in unasked]


def answer_probabilities(arm: Arm, items: Sequence[Item]) -> list[float]:
    """Probability of the likeliest accepted answer of each item."""
    asked = [(i, prompt) for i, item in enumerate(items) for prompt in item.accepted]
    best = [0.0] * len(items)
    for (i, _), answer in zip(asked, arm.answers([p for _, p in asked]), strict=True):
        best[i] = max(best[i], answer.probability)
    return best
