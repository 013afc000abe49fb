"""Selective Synaptic Dampening: weights that matter far more for what is to go than for what is to stay are shrunk.

One backward sweep over forget and one over retain prompts give each weight's Fisher information for either; where their
ratio is large, the weight is multiplied by its inverse. No training, an ordinary checkpoint, and a baseline: published
evidence on language models is poor.

Method: Foster, Schoepf, Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening",
AAAI 2024, arXiv 2308.07707. Other than there: importance of retain prompts alone (with one of all data the ratio cannot
exceed |D| / |D_f|, and alpha = 10 often selects nothing), squares per prompt instead of per batch, a floor under the
retain importance, block matrices only, no more held at a time than the matrices of one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from excise.actions import Sparse
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact
from excise.gradients import block_matrices, mean_gradients, sweeps
from excise.model import Model
from excise.registry import editor
from excise.requests import thin
from excise.scores import Localization
from excise.sites import Site

# Share of a matrix's median retain importance that is added to each before it divides.
FLOOR = 1e-3


@editor
def synaptic_dampening(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    alpha: float = 10.0,
    dampening: float = 1.0,
    loss: str = "odds",
    share: float = 0.0,
    limit: int = 512,
    at_once: int = 67_108_864,
) -> Edit:
    """An edit that shrinks the weights which matter more than `alpha` times as much for forget as for retain prompts.

    alpha: ratio of Fisher information above which a weight is shrunk.
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
    asked = [thin([p for f in facts for p in f.ask(held_out=False)], limit) for facts in (forget, retain)]
    if not all(asked):
        raise ExciseError("importance is compared: give forget and retain prompts that are not held out")
    changes: list[Change] = []
    eligible = 0
    for names in sweeps(model, eligible_matrices(model, where), at_once):
        for_forget, for_retain = (
            mean_gradients(model, prompts, names, square=True, odds=loss == "odds") for prompts in asked
        )
        for name in names:
            eligible += model.weight(name).numel()
            if name in for_forget and name in for_retain:
                weight = model.weight(name).detach()
                factor = factors(for_forget.pop(name), for_retain.pop(name), alpha, dampening, share)
                changes += _shrunk(name, weight, factor.to(weight.device))
    if not changes:
        raise ExciseError(
            f"no weight matters more than {alpha:g} times as much for the forget prompts; lower alpha, or give a share"
        )
    changes = sorted(changes, key=lambda change: str(change.site))
    prints = {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes}
    dampened = sum(len(c.action.indices) for c in changes if isinstance(c.action, Sparse))
    recipe = {"model": model.name, "weights dampened": dampened, "weights eligible": eligible}
    return Edit(tuple(changes), recipe, {"tokenizer": model.tokenizer_fingerprint, **prints})


def factors(forget: Tensor, retain: Tensor, alpha: float, dampening: float = 1.0, share: float = 0.0) -> Tensor:
    """What each weight is multiplied by, in [0, 1]: 1 where forget / retain importance does not exceed alpha.

    share: instead of by alpha, this share of the weights with the largest ratios is chosen.
    """
    ratio = forget / (retain + FLOOR * retain.median()).clamp_min(torch.finfo(retain.dtype).tiny)
    if share:
        count = max(1, math.ceil(share * ratio.numel()))
        chosen = torch.zeros(ratio.numel(), dtype=torch.bool, device=ratio.device)
        chosen[ratio.flatten().topk(count).indices] = True
        chosen = chosen.view_as(ratio) & (ratio > 0)
    else:
        chosen = ratio > alpha
    return torch.where(chosen, (dampening / ratio.clamp_min(1e-30)).clamp_max(1.0), 1.0)


def eligible_matrices(model: Model, where: Localization | None) -> list[str]:
    """The matrices that a localization allows: those it names, else those of its blocks; without it, of all blocks."""
    if where is None or not where.sites:
        return block_matrices(model, range(model.n_layers))
    named = list(dict.fromkeys(s.point for s in where.sites if s.is_weight and s.layer is not None))
    return named or block_matrices(model, where.layers())


def _shrunk(name: str, weight: Tensor, factor: Tensor) -> list[Change]:
    places = (factor < 1).flatten().nonzero()[:, 0]
    if not len(places):
        return []
    values = (weight.float() * (factor - 1)).flatten()[places]
    return [Change(Site(name), Sparse(places.cpu(), values.cpu()))]
