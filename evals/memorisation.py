"""Memorisation: how much of the answer's very wording comes back, token by token, when its beginning is given."""

from __future__ import annotations

from collections.abc import Sequence

from evals.sampling import KNOWN, Item, measurable, nothing, sample
from excise.arms import Answer, Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

NEAR = 100


@evaluation("behavioural")
def memorisation(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    compat: bool = False,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = (),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """How the answer's tokens fare under teacher forcing; one pass, shared with recall and probability.

    Variants: "exact memorisation" (share of tokens that are the argmax), "extraction strength" (1 - k/T, where k is the
    fewest answer tokens to give away before the model says the rest; arXiv 2406.09179; open-unlearning, 2506.12618),
    "reciprocal rank" (mean over tokens) and "hit@100" (share of tokens among the 100 likeliest; both as PISTOL's,
    arXiv 2406.16810, but under teacher forcing: in free generation one early divergence ruins every later rank).
    Answers of one token know only right and wrong. Function words keep these above 0 in a model that never knew.
    compat: extraction strength as in open-unlearning, 1/T where even the last token is wrong, instead of 0.
    groups: groups of facts to ask about.
    forms: forms to ask in; all when empty.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    items, unasked = measurable(arm.model, sample(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="extraction strength")
    scores = []
    for item, answer in zip(items, arm.answers([i.prompt for i in items]), strict=True):
        scores += _scores(item, answer, compat)
    return scores + [item.score(None, variant="extraction strength", reason=reason) for item, reason in unasked]


def exact_memorisation(said: Sequence[int], wanted: Sequence[int]) -> float:
    """Share of positions where the model's own token is the wanted one."""
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(wanted)


def extraction_strength(said: Sequence[int], wanted: Sequence[int], *, compat: bool = False) -> float:
    """1 - k/T: k is the smallest number of given tokens after which every later one is said; T tokens in all."""
    wrong = [t for t, (a, b) in enumerate(zip(said, wanted, strict=True)) if a != b]
    k = wrong[-1] + 1 if wrong else 0
    return 1 - min(k, len(wanted) - 1 if compat else k) / len(wanted)


def reciprocal_rank(ranks: Sequence[int]) -> float:
    """Mean over tokens of 1 / rank."""
    return sum(1 / r for r in ranks) / len(ranks)


def _scores(item: Item, answer: Answer, compat: bool) -> list[Score]:
    return [
        item.score(exact_memorisation(answer.argmax, answer.targets), variant="exact memorisation"),
        item.score(extraction_strength(answer.argmax, answer.targets, compat=compat), variant="extraction strength"),
        item.score(reciprocal_rank(answer.ranks), variant="reciprocal rank"),
        item.score(sum(r <= NEAR for r in answer.ranks) / len(answer.ranks), variant=f"hit@{NEAR}"),
    ]
