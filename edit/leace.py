"""LEACE: after it, no linear read-out of the chosen blocks can tell the forgotten names from others.

The activation loses, at the least expected cost, exactly the directions along which the labelled names differ; blocks are
scrubbed in order, each fitted on what the earlier ones leave. A hook: it vanishes with its hooks.

Method: Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff, Biderman, "LEACE: Perfect linear concept erasure in closed
form", arXiv 2306.03819; scrubbing block by block is their section 6. What is erased linearly may still be read otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from excise.apply import applied
from excise.checks import whole_fingerprints
from excise.edits import Change, Edit
from excise.erasure import fit_eraser
from excise.errors import ExciseError
from excise.facts import Fact
from excise.model import Model
from excise.redirection import candidate_blocks
from excise.registry import editor
from excise.requests import View, groups, ordinary_text, text_states, view
from excise.scores import Localization
from excise.sites import Site
from excise.trace import read

CONCEPTS = ("subject", "group")


@editor
def leace(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    concept: Literal["subject", "group"] = "subject",
    layers: int = 1,
    shrink: bool = True,
    strength: float = 1.0,
    contexts: int = 8,
    relatives: int = 24,
    texts: Sequence[str] | None = None,
    budget: int = 10_000,
    seed: int = 0,
) -> Edit:
    """An edit after which the names to forget cannot be told linearly, at their last token, from each other or from others.

    concept: "subject" (each forget name is a class of its own) or "group" (forget names against all others, rank one).
    layers: how many blocks, of those in `where` or spread over the first half, are scrubbed, in order.
    shrink: shrink the covariance when rows are few; the erasure is exact either way.
    strength: 1 erases; less leaves that share of the difference.
    contexts: wordings in which each name is read.
    relatives: made-up name-sharers per word of each forget name that count among the others.
    texts: ordinary text whose tokens count among the others; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws the made-up names.

    Raises ExciseError when there is nothing to forget, nobody to tell it from, no site in `where`, or an unknown concept.
    """
    facts, kept = groups(forget, retain)
    if concept not in CONCEPTS:
        raise ExciseError(f"concept={concept!r}: choose {' or '.join(CONCEPTS)}")
    seen = view(facts, kept, "subject_last", contexts=contexts, names=0, relatives=relatives, seed=seed)
    names = [m.name if concept == "subject" else "" for m in seen.told]
    text = ordinary_text(texts, kept)
    edit, reports = Edit((), fingerprints=whole_fingerprints(model)), []
    for block in candidate_blocks(model, where, layers):
        point = f"blocks.{block}.hook_resid_post"
        with applied(model, edit):
            mine, *rest = _states(model, point, seen, text, budget)
        x = torch.cat([mine, *rest])
        eraser = fit_eraser(x, *labelled(names, [len(r) for r in rest]), shrink=shrink)
        change = Change(Site(point, "after_bos"), eraser.action().scaled(strength))
        edit = replace(edit, changes=(*edit.changes, change))
        moved = (eraser(x) - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)
        told, others = (float(part.mean()) for part in (moved[: len(mine)], moved[len(mine) :]))
        reports.append({"block": block, "rank": eraser.rank, "moved forget": told, "moved others": others})
    recipe = {"model": model.name, "subjects": facts.subjects, "rows": len(x), "blocks": reports}
    return replace(edit, recipe=recipe)


def _states(model: Model, point: str, seen: View, text: list[Any], budget: int) -> list[Tensor]:
    """States [n, d] of the names to forget, of those to keep, of made-up ones where there are any, and of text."""
    at_name = Site(point, "subject_last")
    sorts = ([m.prompt for m in seen.told], [m.prompt for m in seen.others], seen.near)
    states = [read(model, prompts, [at_name])[at_name] for prompts in sorts if prompts]
    return states + ([text_states(model, text, point, budget)] if text else [])


def labelled(names: Sequence[str], others: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One-hot labels [n, classes], zero for the others, and weights [n]: the names weigh as much as all the rest.

    names: the class of each row to forget; others: how many rows of each other sort follow, which weigh alike.
    """
    classes, mine = list(dict.fromkeys(names)), len(names)
    z = torch.zeros(mine + sum(others), len(classes))
    z[torch.arange(mine), torch.tensor([classes.index(n) for n in names])] = 1
    weights = [torch.full((mine,), 1 / mine)] + [torch.full((n,), 1 / n / len(others)) for n in others]
    return z, torch.cat(weights)
