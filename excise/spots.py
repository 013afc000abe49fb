"""Spots: places where names to forget are told from others by what a detector reads there, and how well they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excise.detector import Crossed, Parts, cross_read, even_cost
from excise.facts import Prompt
from excise.intervals import auc
from excise.keys import read_keys
from excise.mentions import Mention
from excise.model import Model
from excise.requests import View
from excise.sites import Site
from excise.solve import Metric
from excise.stats import moments
from excise.trace import read, read_batch

# Inputs recognised worse than all but this share do not count.
WEAKEST = 0.05


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
