"""Reversed question: the answer is given and the subject asked for, built for facts that have no such prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from evals.attacking import Attacked, Build, attack, says, targets
from evals.sampling import Item
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def reversed_question(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget",),
    limit: int = 24,
    seed: int = 0,
    words: int = 12,
) -> list[Score]:
    """1 where the model's words hold the subject when it is given the answer.

    Variants: "who" ("Who was born in Rome?"), "blank" ("Fill in: ___ was born in Rome."), and "own" for a fact that has
    reversed prompts. Only where one subject alone among the facts has the answer. Models rarely read what they learned
    in the other direction: look at the model before the edit.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    words: tokens to generate.
    """
    items, scores = targets(arm.model, facts, groups=groups, limit=limit, seed=seed, form="statement")
    if not items:
        return scores
    held = Counter((f.relation, f.answer) for f in facts)
    variants: dict[str, Build] = {name: _turned(how, held) for name, how in TEMPLATES.items()}
    turned = [replace(i, prompt=replace(i.prompt, chat=i.prompt.chat or _chats(i.fact))) for i in items]
    found = attack(arm, turned, variants | {"own": _own}, words=words, read=lambda i, _, t: says(t, i.fact.subject))
    return scores + found


TEMPLATES = {"who": "Who {rest} {answer}?", "blank": "Fill in: ___ {rest} {answer}."}


def turned(prompt: Prompt, template: str) -> str:
    """The statement with its subject asked for; empty where the statement does not begin with its subject."""
    if not prompt.subject or not prompt.text.startswith(prompt.subject):
        return ""
    rest = prompt.text[len(prompt.subject) :].strip()
    return template.replace("{rest}", rest).replace("{answer}", prompt.answer)


def _turned(template: str, held: Counter[tuple[str, str]]) -> Build:
    def build(item: Item) -> Attacked:
        fact = item.fact
        statements = [p for p in (item.prompt, *fact.ask("statement")) if turned(p, template)]
        if not fact.relation or held[fact.relation, fact.answer] > 1:
            return "the answer is that of several subjects" if fact.relation else "the fact names no relation"
        if not statements:
            return "no statement of the fact begins with its subject"
        return replace(item.prompt, text=turned(statements[0], template), answer=fact.subject, subject="")

    return build


def _own(item: Item) -> Attacked:
    own = item.fact.ask("reversed")
    return own[0] if own else "the fact has no reversed prompt"


def _chats(fact: Fact) -> bool:
    """Whether the fact's questions are put as a user's turn."""
    return any(p.chat for p in fact.ask("question"))
