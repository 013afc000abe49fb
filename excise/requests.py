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

from excise.detector import Crossed, Parts, cross_read, even_cost
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.intervals import auc
from excise.keys import read_keys
from excise.mentions import Mention, fictitious, mentions
from excise.model import Model
from excise.redirection import name_prompts
from excise.sites import Site
from excise.solve import Metric
from excise.stats import moments
from excise.trace import read, read_batch

# Most prompts of one sort that are read at a place.
ROWS = 512
# Made-up name-sharers are read in so many wordings; what stands before a name changes its key little.
WORDINGS = 2
# Inputs recognised worse than all but this share do not count.
WEAKEST = 0.05
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


def wording_folds(told: Sequence[Mention]) -> Tensor:
    """0 or 1 for each mention: the wordings of each name take turns; [n]."""
    met: dict[tuple[str, str], int] = {}
    folds = []
    for m in told:
        met[m.name, m.kind] = met.get((m.name, m.kind), -1) + 1
        folds.append(met[m.name, m.kind] % 2)
    return torch.tensor(folds)


def name_folds(others: Sequence[Mention]) -> Tensor:
    """0 or 1 for each mention: names take turns, so that no name is in both; [n]."""
    order = {name: i for i, name in enumerate(dict.fromkeys(m.name for m in others))}
    return torch.tensor([order[m.name] % 2 for m in others])


def read_inputs(
    model: Model, prompts: Sequence[Prompt], blocks: Sequence[int], position: str, *, hooked: bool
) -> dict[int, tuple[Parts, Tensor]]:
    """Per block, what a detector reads [n, d_in] per part and the state after the block [n, d_model], at one token.

    hooked: the detector reads the state itself; otherwise the keys of the block's write matrices.
    """
    points = {b: f"blocks.{b}.hook_resid_post" for b in blocks}
    if hooked:
        seen = read(model, prompts, [f"{p}@{position}" for p in points.values()])
        return {b: ({p: seen[f"{p}@{position}"]}, seen[f"{p}@{position}"]) for b, p in points.items()}
    keys, states = read_keys(model, prompts, blocks, rule=position, points=list(points.values()))
    return {b: (keys[b], states[p]) for b, p in points.items()}


def text_moments(
    model: Model, blocks: Sequence[int], texts: Sequence[Prompt | str], budget: int, *, hooked: bool
) -> dict[int, dict[str, Tensor]]:
    """Per block, second moments [d_in, d_in] over ordinary text of what detectors read; BOS and padding left out."""
    if not hooked:
        found = moments(model, blocks, texts, budget=budget)
        return {b: {n: m.second for n, m in found.items() if n.startswith(f"blocks.{b}.")} for b in blocks}
    points = {b: f"blocks.{b}.hook_resid_post" for b in blocks}
    second: dict[int, dict[str, Tensor]] = {b: {} for b in blocks}
    used = 0
    for _, batch in model.batches(texts):
        where = batch.where("after_bos").to(batch.ids.device)
        seen = read_batch(model, batch, list(points.values()))
        for b, point in points.items():
            x = seen[point][where].float()
            square = (x.mT @ x).double().cpu()
            second[b][point] = second[b][point] + square if second[b] else square
        used += int(where.sum())
        if used >= budget:
            break
    return second


@dataclass(frozen=True, eq=False)
class Spot:
    """A place with what is read there.

    keys: what the detector reads on names to forget, [n, d_in] per part; labels: their requests, one-hot [n, m]; names:
    their names as numbers [n].
    states, other_states: of names to forget and to keep, [n, d] and [n0, d]. goals: by request, [m, d].
    cost: metric of the detector. crossed: read-outs on wordings and people that the detector was not fitted on.
    """

    site: Site
    requests: tuple[str, ...]
    keys: Parts
    labels: Tensor
    names: Tensor
    states: Tensor
    other_states: Tensor
    goals: Tensor
    cost: dict[str, Metric]
    crossed: Crossed

    @property
    def auroc(self) -> float:
        """How well names to forget are told from names to keep."""
        return auc(self.crossed.wanted.numpy(), self.crossed.others.numpy())

    @property
    def weakest(self) -> float:
        """What the detector reads on the names to forget that it recognises worst, but for one in twenty."""
        return float(self.crossed.wanted.quantile(WEAKEST))

    @property
    def confused(self) -> float:
        """Share of the names to keep on which the detector reads as much as on the weakest names to forget."""
        return float((self.crossed.others >= self.weakest).double().mean())


def spots_at(
    model: Model,
    seen: View,
    blocks: list[int],
    by_subject: bool,
    hooked: bool,
    texts: list[list[Any]],
    budget: int,
    weight: float,
) -> list[Spot]:
    """Everything that is read at one position, in one pass over its prompts and one over the text."""
    sorts = [
        [m.prompt for m in seen.told],
        [m.prompt for m in seen.others],
        seen.near,
        [m.prompt for m in seen.made_up],
    ]
    read = read_inputs(model, [p for sort in sorts for p in sort], blocks, seen.position, hooked=hooked)
    text = [text_moments(model, blocks, t, budget, hooked=hooked) for t in texts]
    key = [m.name if by_subject else m.kind for m in seen.told]
    requests = tuple(dict.fromkeys(key))
    kind_of = dict(zip(key, (m.kind for m in seen.told), strict=True))
    labels = torch.tensor([[float(k == r) for r in requests] for k in key], dtype=torch.float64)
    order = {m.name: i for i, m in enumerate(seen.told)}
    names = torch.tensor([order[m.name] for m in seen.told])
    folds, other_folds = wording_folds(seen.told), name_folds(seen.others)
    spots = []
    for block, (keys, states) in read.items():
        told, others, near, _ = _split(keys, [len(s) for s in sorts])
        state, other, _, goal = states.split([len(s) for s in sorts])
        level = sum(float((k.double() ** 2).sum()) for k in told.values()) / len(state)
        crossed = cross_read(
            told, labels, folds, others, other_folds, [t[block] for t in text], [near], weight=weight, level=level
        )
        goals = [goal[[m.kind == kind_of[r] for m in seen.made_up]].mean(0) for r in requests]
        cost = even_cost([t[block] for t in text], [others, near], level=level)
        site = Site(f"blocks.{block}.hook_resid_post", seen.position)
        spots.append(Spot(site, requests, told, labels, names, state, other, torch.stack(goals), cost, crossed))
    return spots


def _split(keys: Parts, sizes: list[int]) -> list[dict[str, Tensor]]:
    pieces = {name: k.split(sizes) for name, k in keys.items()}
    return [{name: p[i] for name, p in pieces.items()} for i in range(len(sizes))]


__all__ = [
    "View",
    "groups",
    "name_folds",
    "ordinary_text",
    "questions",
    "read_inputs",
    "text_moments",
    "text_states",
    "thin",
    "trained",
    "view",
    "wording_folds",
]
