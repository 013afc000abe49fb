"""Selective Synaptic Dampening: weights that matter far more for what is to go than for what is to stay are shrunk.

One backward sweep over forget and one over retain prompts give each weight's Fisher information for either; where their
ratio is large, the weight is multiplied by its inverse. No training, an ordinary checkpoint, and a baseline: published
evidence on language models is poor, and so is ours. On the dense model we ship, people go only with most of those who
share a name with them, and a quarter of the skill of sorting stays.

Method: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024, arXiv 2308.07707. Other than there: importance of retain prompts alone (with one of all data the ratio cannot
exceed |D| / |D_f|, and alpha = 10 often selects nothing), squares per prompt instead of per batch, a floor under the
retain importance, block matrices only, no more held at a time than the matrices of one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from excise.actions import Sparse
from excise.arms import Arm
from excise.checks import fingerprints
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gradients import both_gradients, eligible_matrices
from excise.model import Model
from excise.registry import editor
from excise.requests import thin, trained
from excise.scores import Localization
from excise.sites import Site

# Share of a matrix's median retain importance that is added to each before it divides.
FLOOR = 1e-3
# Ratios tried, and forget prompts asked at each, when no ratio is given.
LADDER = (100.0, 30.0, 10.0, 5.0, 3.0, 2.0, 1.5, 1.2, 1.0)
ASKED = 64
LOSSES = ("odds", "likelihood")
# Per matrix, the places and ratios of the weights that may be shrunk.
Candidates = dict[str, tuple[Tensor, Tensor]]


@editor
def synaptic_dampening(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    alpha: float = 0.0,
    aim: float = 0.05,
    dampening: float = 1.0,
    loss: Literal["odds", "likelihood"] = "odds",
    share: float = 0.0,
    limit: int = 512,
    at_once: int = 67_108_864,
) -> Edit:
    """An edit that shrinks the weights which matter more than `alpha` times as much for forget as for retain prompts.

    alpha: ratio of Fisher information above which a weight is shrunk; the published 10 often does next to nothing, so 0
        takes the largest of a ladder down to 1 that reaches `aim`, and 1 where none does.
    aim: share of the forget prompts answered before that may be answered still.
    dampening: such a weight is multiplied by dampening / ratio, never by more than 1.
    share: of each matrix's weights, those with the largest ratios, instead of `alpha`.
    loss: "odds" takes the log-odds of an answer, whose gradient does not vanish where the answer is certain; "likelihood"
        takes its log-likelihood, as published.
    limit: prompts read of either kind, taken evenly.
    at_once: weights whose gradients are held at a time; fewer take more sweeps over the prompts.

    Sites of `where` choose matrices, or, where they name activations, whole blocks; without it all blocks are eligible.
    An expert that no retain prompt reaches is left alone: nobody has seen what it does for others.
    Raises ExciseError when there is nothing to forget or to keep, and when no weight passes.
    """
    if alpha < 0 or not 0 <= share <= 1 or loss not in LOSSES:
        raise ValueError(
            f"alpha={alpha}, share={share}, loss={loss!r}: a ratio is not negative, a share at most 1, losses are odds and likelihood"
        )
    asked = [trained(facts, limit) for facts in (forget, retain)]
    if not all(asked):
        raise ExciseError("importance is compared: give forget and retain prompts that are not held out")
    eligible = eligible_matrices(model, where)
    importance = both_gradients(model, asked, eligible, at_once, square=True, odds=loss == "odds")
    found = {
        name: _candidates(ratios(forgotten, kept), alpha or LADDER[-1], share)
        for name, forgotten, kept in importance
        if kept is not None
    }
    found = dict(sorted(found.items()))
    if alpha or share:
        edit, tried = _shrunk(model, found, alpha, dampening), list[dict[str, float]]()
    else:
        edit, tried = _searched(model, found, thin(asked[0], ASKED), aim, dampening)
    if not edit.changes:
        raise ExciseError(
            f"no weight matters more than {alpha or 1:g} times as much for the forget prompts; lower alpha, or give a share"
        )
    recipe = {
        "model": model.name,
        "weights dampened": sum(len(c.action.indices) for c in edit.changes if isinstance(c.action, Sparse)),
        "weights eligible": sum(model.weight(name).numel() for name in eligible),
        "ratios tried": tried,
    }
    return Edit(edit.changes, recipe, fingerprints(model, edit.changes))


def ratios(forget: Tensor, retain: Tensor) -> Tensor:
    """How many times as much each weight matters for forget as for retain prompts; 0 where it matters for neither."""
    return forget / (retain + FLOOR * retain.median()).clamp_min(torch.finfo(retain.dtype).tiny)


def factors(ratio: Tensor, alpha: float, dampening: float = 1.0) -> Tensor:
    """What each weight is multiplied by, in [0, 1]: dampening / ratio, and 1 where the ratio does not exceed alpha."""
    return torch.where(ratio > alpha, (dampening / ratio.clamp_min(1e-30)).clamp_max(1.0), 1.0)


def _candidates(ratio: Tensor, alpha: float, share: float) -> tuple[Tensor, Tensor]:
    """Places and ratios [n] of the weights that may be shrunk: above `alpha`, or the `share` with the largest ratios."""
    flat = ratio.flatten()
    if share:
        places = flat.topk(math.ceil(share * len(flat))).indices.sort().values
        places = places[flat[places] > 0]
    else:
        places = (flat > alpha).nonzero()[:, 0]
    return places.cpu(), flat[places].cpu()


def _searched(
    model: Model, found: Candidates, questions: Sequence[Prompt], aim: float, dampening: float
) -> tuple[Edit, list[dict[str, float]]]:
    """The edit of the largest ratio on the ladder that reaches `aim`, and what each ratio leaves of the forget answers."""
    known, edit = max(Arm("before", model).said(questions), 1e-9), Edit(())
    tried: list[dict[str, float]] = []
    for alpha in LADDER:
        edit = _shrunk(model, found, alpha, dampening)
        tried.append({"alpha": alpha, "answered": Arm("edited", model, edit).said(questions) / known})
        if edit.changes and tried[-1]["answered"] <= aim:
            break
    return edit, tried


def _shrunk(model: Model, found: Candidates, alpha: float, dampening: float) -> Edit:
    """The candidates whose ratio exceeds `alpha`, shrunk."""
    changes = []
    for name, (places, ratio) in found.items():
        factor = factors(ratio, alpha, dampening)
        chosen = factor < 1
        if chosen.any():
            flat = model.weight(name).detach().flatten()
            weight = flat[places[chosen].to(flat.device)].float().cpu()
            changes.append(Change(Site(name), Sparse(places[chosen], weight * (factor[chosen] - 1))))
    return Edit(tuple(changes))
