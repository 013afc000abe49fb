"""What an editor is given: the two groups of facts, and ordinary text. And what an edit that makes a model decline has to
tell apart: names to forget, names to keep, names nobody has.

Every name is read in its wordings at one token: its own last one, or the last of the whole question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.mentions import Mention, fictitious, mentions
from excise.model import Model
from excise.redirection import name_prompts
from excise.sites import Site
from excise.trace import read

# Most prompts of one sort that are read at a place.
ROWS = 512
# Made-up name-sharers are read in so many wordings; what stands before a name changes its key little.
WORDINGS = 2
# Texts read in one go.
TEXTS = 64


@dataclass(frozen=True)
class View:
    """The prompts of all sorts as they are read at one position.

    told: names to forget; others: names to keep; near: made-up names that share words with forget names; made_up: per
    mention of a made-up name, what the model should decline.
    """

    position: str
    told: list[Mention]
    others: list[Mention]
    near: list[Prompt]
    made_up: list[Mention]


def view(facts: Facts, kept: Facts, position: str, *, contexts: int, names: int, relatives: int, seed: int) -> View:
    """The prompts to read at "subject_last" (cut after the name) or "last" (whole questions).

    Raises ExciseError when there is no name to forget, or none to keep.
    """
    told, others = (
        mentions(f, limit=contexts) if position == "subject_last" else thin(questions(f), ROWS) for f in (facts, kept)
    )
    gone = {(m.name, m.kind) for m in told}
    others = [m for m in others if (m.name, m.kind) not in gone]
    if not told or not others:
        raise ExciseError("a detector needs prompts that name their subject, of facts to forget and of facts to keep")
    lists = name_prompts(told, others, each=relatives, wordings=WORDINGS, seed=seed + 1) if relatives else []
    made_up = []
    for kind in dict.fromkeys(m.kind for m in told):
        frames = [m for m in told if m.kind == kind]
        known = list(dict.fromkeys(m.name for m in (*told, *others) if m.kind == kind))
        drawn = fictitious(known, names, seed=seed) if names else []
        made_up += [Mention(name, kind, f.around(name)) for name in drawn for f in thin(frames, contexts)]
    return View(position, told, thin(others, ROWS), thin([p for found in lists for p in found], ROWS), made_up)


def questions(facts: Facts) -> list[Mention]:
    """What is asked about names in so many words, held-out wordings left out; statements where there are no questions."""
    named = [p for f in facts for p in f.ask(held_out=False) if p.span is not None]
    asked = [p for p in named if p.form not in ("statement", "choice")] or named
    return [Mention(p.subject, "reversed" if p.form == "reversed" else "direct", p) for p in asked]


def thin(items: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the items, evenly taken."""
    return list(items[:: max(1, -(-len(items) // limit))])


def groups(forget: Sequence[Fact], retain: Sequence[Fact]) -> tuple[Facts, Facts]:
    """What to forget and what to keep. Raises ExciseError when there is nothing to forget."""
    facts = Facts(forget)
    if not len(facts):
        raise ExciseError("nothing to forget: the forget set is empty")
    return facts, Facts(retain)


def trained(facts: Sequence[Fact], limit: int) -> list[Prompt]:
    """At most `limit` prompts of the facts, evenly taken, held-out ones left out."""
    return thin([p for f in facts for p in f.ask(held_out=False)], limit)


def ordinary_text(texts: Sequence[str] | None, kept: Sequence[Fact]) -> list[Any]:
    """The given texts; without them every trained prompt of what to keep, plain ones with their answers."""
    if texts is not None:
        return list(texts)
    return [p if p.chat else replace(p, text=f"{p.text} {p.answer}.") for p in Facts(kept).prompts(held_out=False)]


def text_states(model: Model, texts: Sequence[Prompt | str], point: str, budget: int) -> Tensor:
    """States [n_tokens, d] at `point` of about `budget` tokens of the texts, taken in order, BOS left out."""
    site, found, used = Site(point, "after_bos"), [], 0
    for start in range(0, len(texts), TEXTS):
        if used >= budget:
            break
        found.append(read(model, texts[start : start + TEXTS], [site])[site])
        used += len(found[-1])
    return torch.cat(found)


__all__ = ["View", "groups", "ordinary_text", "questions", "text_states", "thin", "trained", "view"]
