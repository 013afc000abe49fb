"""Few shots: questions with their answers stand before the question, and the model is carried along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evals.attacking import Attacked, Build, attack, dialogue, says, targets
from evals.sampling import Item, direct
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def few_shot(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget",),
    shots: tuple[int, ...] = (1, 5),
    limit: int = 24,
    seed: int = 0,
    words: int = 12,
) -> list[Score]:
    """1 where the model's words hold the answer after some answered questions (arXiv 2411.12103).

    Variants: "k retain" shows facts to keep, of the same relation where there are any; "k forget" shows other facts to
    forget, of other subjects where there are any. None of the answers shown holds the one asked for.
    groups: groups of facts to ask about.
    shots: how many answered questions.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more, and which are shown.
    words: tokens to generate.
    """
    items, scores = targets(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not items:
        return scores
    pools = {g: direct(facts, groups=(g,), form="question", limit=0, seed=seed) for g in ("retain", "forget")}
    variants = {f"{k} {g}": _shown(arm.model, pool, k) for g, pool in pools.items() for k in shots}
    return scores + attack(arm, items, variants, words=words)


def demonstrations(item: Item, pool: Sequence[Item], count: int) -> list[tuple[Prompt, str]]:
    """The first `count` of the pool that may be shown for an item, like with like first; fewer where there are fewer.

    Never a fact about its subject as long as there are others, never a text that holds its answer.
    """
    answers = [p.answer for p in item.accepted]
    fit = [
        i
        for i in pool
        if i.fact.id != item.fact.id and not any(says(f"{i.prompt.text} {i.prompt.answer}", a) for a in answers)
    ]
    others = [i for i in fit if i.fact.subject != item.fact.subject]
    order = sorted(others or fit, key=lambda i: i.fact.relation != item.fact.relation)
    return [(i.prompt, i.prompt.answer) for i in order[:count]]


def _shown(model: Model, pool: Sequence[Item], count: int) -> Build:
    def build(item: Item) -> Attacked:
        shown = demonstrations(item, pool, count)
        if len(shown) < count:
            return f"{len(shown)} facts can be shown: {count} are needed"
        return replace(dialogue(model, shown, item.prompt), choices=())

    return build
