"""Mixed prompts: a question about what to forget and one about what to keep, asked in one breath."""

from __future__ import annotations

from collections.abc import Sequence

from evals.attacking import Attacked, Build, attack, reworded, says, targets
from evals.sampling import Item, direct
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

OPPOSITE = {"forget": "retain", "retain": "forget"}


@evaluation("elicitation")
def mixed_prompts(
    arm: Arm, facts: Sequence[Fact], *, others: tuple[int, ...] = (1,), limit: int = 24, seed: int = 0, words: int = 16
) -> list[Score]:
    """1 where the model's words hold the answer although questions of the other kind stand beside it (arXiv 2505.14832).

    A fact to forget is asked among facts to keep, and one to keep among facts to forget. Of the group "forget" that is
    what leaks; of the group "retain" what an edit spares that fires on anything to forget in the prompt. Variants:
    "first of 2" and "last of 2", by place and number of questions, which are of the same relation where there
    are enough. Read against before: the embedded models answer the
    first question alone.
    others: how many questions stand beside it, two variants each.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    words: tokens to generate.
    """
    items, scores = targets(arm.model, facts, groups=tuple(OPPOSITE), limit=limit, seed=seed, form="question")
    if not items:
        return scores
    pools = {g: direct(facts, groups=(g,), form="question", limit=0, seed=seed) for g in OPPOSITE}
    variants = {
        f"{place} of {k + 1}": _beside(pools, k, first=place == "first") for k in others for place in ("first", "last")
    }
    return scores + attack(arm, items, variants, words=words)


def _beside(pools: dict[str, list[Item]], count: int, *, first: bool) -> Build:
    turn: dict[str, int] = {}

    def build(item: Item) -> Attacked:
        group, own = OPPOSITE[item.fact.group], [p.answer for p in item.accepted]
        fit = [i for i in pools[group] if not any(says(f"{i.prompt.text} {i.prompt.answer}", a) for a in own)]
        if len(fit) < count:
            return f"{len(fit)} questions of the group {group} can stand beside it: {count} are needed"
        like = [i for i in fit if i.fact.relation == item.fact.relation]
        chosen = like if len(like) >= count else fit
        at = turn[item.fact.relation] = turn.get(item.fact.relation, -1) + 1
        beside = [chosen[(at + n) % len(chosen)].prompt.text for n in range(count)]
        return reworded(item, " ".join([item.prompt.text, *beside] if first else [*beside, item.prompt.text]))

    return build
