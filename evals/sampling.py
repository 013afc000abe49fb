"""Which prompts an evaluation asks: a bounded choice that follows from the facts and a seed, the same for every arm."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from excise.facts import GROUPS, Fact, Prompt
from excise.model import Model
from excise.scores import Score

# Groups whose facts a model should know. What is never taught is measured by refusal.
KNOWN = ("forget", "retain", "neighbour", "general")


@dataclass(frozen=True)
class Item:
    """One prompt and the fact that it asks for."""

    fact: Fact
    prompt: Prompt

    def score(self, value: float | None, **keys: Any) -> Score:
        """A score of this item."""
        form, held_out = self.prompt.form, self.prompt.held_out
        return Score(
            self.fact.id, self.fact.subject, self.fact.group, value, **{"form": form, "held_out": held_out, **keys}
        )

    @property
    def accepted(self) -> list[Prompt]:
        """The prompt with every accepted answer; aliases name the fact's answer, not that of a reversed prompt."""
        aliases = self.fact.aliases if self.prompt.answer == self.fact.answer else ()
        return [self.prompt, *(replace(self.prompt, answer=a) for a in aliases)]


def sample(
    facts: Sequence[Fact], *, groups: Sequence[str] = KNOWN, forms: Sequence[str] = (), limit: int = 32, seed: int = 0
) -> list[Item]:
    """At most `limit` prompts per group, form and side of the held-out split (0: all of them).

    Facts are ranked by a hash, subjects taken in turn, so that every subject is met before one is met twice and the
    same facts are asked in every form. All evaluations with the same limit and seed ask the same prompts.
    """
    strata: dict[tuple[str, str, bool], list[Item]] = {}
    for fact in ranked([f for f in facts if f.group in groups], seed):
        for prompt in fact.ask(*forms):
            stratum = strata.setdefault((fact.group, prompt.form, prompt.held_out), [])
            if not limit or len(stratum) < limit:
                stratum.append(Item(fact, prompt))
    met = list(dict.fromkeys(p.form for f in facts for p in f.prompts))
    order = sorted(strata, key=lambda key: (GROUPS.index(key[0]), met.index(key[1]), key[2]))
    return [item for key in order for item in strata[key]]


def asked_in(
    facts: Sequence[Fact], *, groups: Sequence[str], forms: Sequence[str], limit: int = 32, seed: int = 0
) -> list[Item]:
    """As `sample`, and facts that have none of the forms are asked in all of theirs."""
    usual = [f for f in facts if f.ask(*forms)]
    other = [f for f in facts if not f.ask(*forms)]
    chosen = sample(usual, groups=groups, forms=forms, limit=limit, seed=seed)
    return chosen + sample(other, groups=groups, limit=limit, seed=seed)


def direct(
    facts: Sequence[Fact], *, groups: Sequence[str], form: str = "statement", limit: int = 24, seed: int = 0
) -> list[Item]:
    """One item a fact, its first prompt of the form (the direct one where it has none); at most `limit` per group."""
    items = []
    for group in groups:
        members = ranked([f for f in facts if f.group == group], seed)
        items += [Item(f, (f.ask(form) or [f.prompt])[0]) for f in (members[:limit] if limit else members)]
    return items


def ranked(facts: Sequence[Fact], seed: int) -> list[Fact]:
    """The facts in an order that follows from ids and seed: the first of each subject, the second of each, ..."""
    turn: dict[str, int] = {}
    order = []
    for fact in sorted(facts, key=lambda f: _hash(seed, f.id)):
        round_ = turn[fact.subject] = turn.get(fact.subject, -1) + 1 if fact.subject else 0
        order.append((round_, _hash(seed, fact.id), fact))
    return [fact for *_, fact in sorted(order, key=lambda entry: entry[:2])]


def measurable(model: Model, items: Sequence[Item]) -> tuple[list[Item], list[tuple[Item, str]]]:
    """The items that the model can be asked, and the others with the reason why not."""
    good, bad = [], []
    for item in items:
        asked = _asked(model, item.prompt)
        if asked.reason:
            bad.append((item, asked.reason))
        else:
            good.append(item)
    return good, bad


def first_answer_token(model: Model, prompt: Prompt) -> int:
    """Id of the first token of the prompt's answer, as it stands after the prompt."""
    return _asked(model, prompt).token


@dataclass(frozen=True)
class _Asked:
    """The first token of a prompt's answer, or why the prompt cannot be asked."""

    token: int = -1
    reason: str = ""


def _asked(model: Model, prompt: Prompt) -> _Asked:
    if not prompt.answer.strip():
        return _Asked(reason=f"fact {prompt.fact_id or '?'}: the prompt has no answer")
    try:
        (row,) = model.tokenised([prompt], answers=True)
    except ValueError as error:
        return _Asked(reason=str(error))
    if row.start == 0:
        return _Asked(reason="nothing stands before the answer, so that no position predicts its first token")
    return _Asked(row.ids[row.start])


def nothing(reason: str, *, fact: str = "", group: str = "", **keys: Any) -> list[Score]:
    """One empty score that says why nothing was measured."""
    return [Score(fact, "", group, None, reason=reason, **keys)]


def _hash(seed: int, text: str) -> str:
    return hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).hexdigest()
