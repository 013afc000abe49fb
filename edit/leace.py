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
from excise.edits import Change, Edit
from excise.erasure import fit_eraser
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.redirection import candidate_blocks
from excise.registry import editor
from excise.requests import as_texts, text_states, view
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
    facts, kept = Facts(forget), Facts(retain)
    if not len(facts):
        raise ExciseError("nothing to forget: the forget set is empty")
    if concept not in CONCEPTS:
        raise ExciseError(f"concept={concept!r}: choose {' or '.join(CONCEPTS)}")
    seen = view(facts, kept, "subject_last", contexts=contexts, names=0, relatives=relatives, seed=seed)
    names = [m.name if concept == "subject" else "" for m in seen.told]
    classes = list(dict.fromkeys(names))
    told = [m.prompt for m in seen.told]
    others = [[m.prompt for m in seen.others], seen.near]
    plain = list(texts) if texts is not None else as_texts(kept)
    blocks = candidate_blocks(model, where, layers)
    edit = Edit((), fingerprints={"model": model.fingerprint, "tokenizer": model.tokenizer_fingerprint})
    reports = []
    for block in blocks:
        point = f"blocks.{block}.hook_resid_post"
        with applied(model, edit):
            x, z, weights = _rows(
                model, point, told, [classes.index(n) for n in names], len(classes), others, plain, budget
            )
        eraser = fit_eraser(x, z, weights, shrink=shrink)
        change = Change(Site(point, "after_bos"), eraser.action().scaled(strength))
        edit = replace(edit, changes=(*edit.changes, change))
        moved = (eraser(x) - x).norm(dim=1) / x.norm(dim=1).clamp_min(1e-30)
        reports.append(
            {
                "block": block,
                "rank": eraser.rank,
                "moved forget": float(moved[: len(told)].mean()),
                "moved others": float(moved[len(told) :].mean()),
            }
        )
    recipe = {"model": model.name, "subjects": facts.subjects, "rows": len(x), "blocks": reports}
    return replace(edit, recipe=recipe)


def _rows(
    model: Model,
    point: str,
    told: list[Prompt],
    labels: list[int],
    classes: int,
    others: list[list[Prompt]],
    texts: list[Any],
    budget: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """States [n, d], one-hot labels [n, classes] and weights [n]: the names to forget weigh as much as all the rest."""
    at_name = Site(point, "subject_last")
    rest = [read(model, prompts, [at_name])[at_name] for prompts in others if prompts]
    rest += [text_states(model, texts, point, budget)] if texts else []
    mine = read(model, told, [at_name])[at_name]
    z = torch.zeros(len(mine) + sum(map(len, rest)), classes)
    z[torch.arange(len(mine)), torch.tensor(labels)] = 1
    weights = [torch.full((len(mine),), 1 / len(mine))] + [torch.full((len(r),), 1 / len(r) / len(rest)) for r in rest]
    return torch.cat([mine, *rest]), z, torch.cat(weights)
