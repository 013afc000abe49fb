"""Wrong answers of the same kind as a right one, and how likely a model finds each of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from evals.sampling import KNOWN, Item
from excise.arms import Answer, Arm
from excise.facts import Fact


class Candidates:
    """What else could be answered: a fact's foils, and the answers to the same question about other subjects.

    facts: everything at hand; only known groups lend their answers, and only facts with a relation.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self._values: dict[tuple[str, str], dict[str, None]] = {}
        for fact in facts:
            if fact.group in KNOWN and fact.relation:
                for prompt in fact.prompts:
                    self._values.setdefault(_kind(Item(fact, prompt)), {})[prompt.answer] = None

    def of(self, item: Item, *, limit: int = 0, seed: int = 0) -> list[str]:
        """Wrong answers to one prompt, foils first; at most `limit` of them, drawn by fact and seed (0: all)."""
        right = {a.answer.casefold() for a in item.accepted}
        foils = item.fact.foils if item.prompt.answer == item.fact.answer else ()
        others = self._values.get(_kind(item), {}) if item.fact.relation else {}
        found = [v for v in dict.fromkeys((*foils, *others)) if v.strip() and v.casefold() not in right]
        if not limit or len(found) <= limit:
            return found
        first = [v for v in found if v in foils] if len(foils) >= limit else found
        return random.Random(f"{seed}|{item.fact.id}").sample(first, limit)


def candidate_logprobs(
    arm: Arm, items: Sequence[Item], wrong: Sequence[Sequence[str]]
) -> list[tuple[float, list[float]]]:
    """Mean log-probability per token of the likeliest right answer of each item, and of each of its wrong ones."""
    asked = [
        [*item.accepted, *(replace(item.prompt, answer=w) for w in wrongs)]
        for item, wrongs in zip(items, wrong, strict=True)
    ]
    answers = iter(arm.answers([p for prompts in asked for p in prompts]))
    found = []
    for item, prompts in zip(items, asked, strict=True):
        values = [mean_logprob(next(answers)) for _ in prompts]
        found.append((max(values[: len(item.accepted)]), values[len(item.accepted) :]))
    return found


def mean_logprob(answer: Answer) -> float:
    """Log of the length-normalised probability of an answer, in nats per token."""
    return sum(answer.logprobs) / len(answer.logprobs)


def _kind(item: Item) -> tuple[str, str]:
    # A reversed question asks for the subject, not for the fact's answer.
    return item.fact.relation, "" if item.prompt.answer == item.fact.answer else item.prompt.form
