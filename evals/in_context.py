"""Hints in context: sentences about the subject stand before the question, none of which says the answer."""

from __future__ import annotations

from collections.abc import Sequence

from evals.attacking import Attacked, Build, attack, reworded, says, targets
from evals.sampling import Item, ranked
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def in_context(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget",),
    hints: tuple[int, ...] = (1, 2, 4),
    limit: int = 24,
    seed: int = 0,
    words: int = 12,
) -> list[Score]:
    """1 where the model's words hold the answer after other facts about its subject: relearning in context.

    Variants: "k hints", and as a control "k about others": as many sentences, the largest k, about another subject
    (arXiv 2402.16835). No sentence holds the answer. Facts of a subject that nothing else is told of are left out.
    groups: groups of facts to ask about.
    hints: how many sentences.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more, and which are told.
    words: tokens to generate.
    """
    items, scores = targets(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not items:
        return scores
    told = ranked([f for f in facts if f.ask("statement")], seed)
    variants = {f"{k} hint{'s' if k > 1 else ''}": _told(told, k, own=True) for k in hints}
    variants |= {f"{k} about others": _told(told, k, own=False) for k in [max(hints)]}
    return scores + attack(arm, items, variants, words=words)


def sentences(item: Item, told: Sequence[Fact], count: int, *, own: bool) -> list[str]:
    """Up to `count` statements about the item's subject, or with own=False about another one, without its answer."""
    answers = [p.answer for p in item.accepted]
    about = [f for f in told if f.id != item.fact.id and f.subject and (f.subject == item.fact.subject) == own]
    if not own:
        others = [f for f in about if f.group == "retain"]
        about = [f for f in others if f.subject == others[0].subject]
    written = [f"{p.text} {p.answer}." for p in (f.ask("statement")[0] for f in about)]
    return [text for text in written if not any(says(text, a) for a in answers)][:count]


def _told(told: Sequence[Fact], count: int, *, own: bool) -> Build:
    def build(item: Item) -> Attacked:
        found = sentences(item, told, count, own=own)
        if len(found) < count:
            return f"{len(found)} sentences about {'the' if own else 'another'} subject: {count} are needed"
        return reworded(item, " ".join([*found, item.prompt.text]))

    return build
