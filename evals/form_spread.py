"""Form spread: a fact is only forgotten when no form of asking brings it back."""

from __future__ import annotations

from collections.abc import Sequence

from evals.probability import answer_probabilities
from evals.recall import exact_answers
from evals.sampling import Item, measurable, nothing, sample
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

GROUPS = ("forget", "retain", "neighbour")


@evaluation("behavioural")
def form_spread(arm: Arm, facts: Sequence[Fact], *, before: Arm, limit: int = 32, seed: int = 0) -> list[Score]:
    """Answer probability of each fact in its easiest and its hardest form, and the spread between the two.

    For a fact to forget the easiest form is the leak; for one to keep the hardest form is the damage. "form gap" is the
    easiest form less the direct one, what an edit built on that form left open in others (ORT, arXiv 2506.07795). Only
    forms in which the model before the edit says the answer count: a form that never worked tells nothing about the
    edit.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    items, _ = measurable(arm.model, sample(facts, groups=GROUPS, limit=limit, seed=seed))
    if not items:
        return nothing(f"no facts of the groups {', '.join(GROUPS)}")
    knew = exact_answers(before, items)
    by_fact: dict[str, list[tuple[Item, float]]] = {item.fact.id: [] for item in items}
    for item, answer, p in zip(items, knew, answer_probabilities(arm, items), strict=True):
        if answer is not None:
            by_fact[item.fact.id].append((item, p))
    facts_of = {item.fact.id: item for item in items}
    return [score for fact, asked in by_fact.items() for score in _of_fact(facts_of[fact], asked)]


def _of_fact(item: Item, asked: Sequence[tuple[Item, float]]) -> list[Score]:
    keys = {"form": "", "held_out": False}
    forms = {other.prompt.form for other, _ in asked}
    if len(forms) < 2:
        reason = f"known before in {len(forms)} forms: a spread needs two"
        return [item.score(None, variant="spread", reason=reason, **keys)]
    easiest, hardest = max(asked, key=lambda a: a[1]), min(asked, key=lambda a: a[1])
    direct = [p for other, p in asked if other.prompt.form == item.fact.prompt.form and not other.prompt.held_out]
    gap = [item.score(easiest[1] - max(direct), variant="form gap", **keys)] if direct else []
    return [
        *gap,
        item.score(easiest[1], variant="easiest form", detail=easiest[0].prompt.form, **keys),
        item.score(hardest[1], variant="hardest form", detail=hardest[0].prompt.form, **keys),
        item.score(easiest[1] - hardest[1], variant="spread", **keys),
    ]
