"""Directional ablation: nothing in the model writes along the chosen directions any more.

The directions are the difference of means between names to forget and names to keep, at the block and token where taking
them away costs most on what to forget and little on the rest; or given ones, from a localization. Removed from every
matrix that writes to the residual stream, or from what is written.

Method: Arditi, Obeso, Syed, Paleka, Panickssery, Gurnee, Nanda, "Refusal in Language Models Is Mediated by a Single
Direction", arXiv 2406.11717. Beyond it: a direction per name, partial strength per component, the embedding left alone
(it is often tied to the unembedding), candidates reported with effect and side effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from excise.actions import Affine, LowRank
from excise.apply import applied
from excise.arms import Arm
from excise.checks import fingerprints, whole_fingerprints
from excise.declining import first_logprobs
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import write_matrices
from excise.model import Model
from excise.registry import editor
from excise.requests import groups, thin, trained, view
from excise.scores import Localization
from excise.sites import Site
from excise.trace import read

POSITIONS = ("subject_last", "last")
# Directions of the last blocks are the answer's words, not the knowledge.
DEPTH = 0.8
# Prompts asked per candidate on each side; an answer below this log-probability is gone.
ASKED, GONE = 64, -9.21


@editor
def directional_ablation(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    mode: Literal["weight", "hook"] = "weight",
    per: Literal["subject", "all"] = "subject",
    position: Literal["auto", "subject_last", "last"] = "auto",
    candidates: int = 4,
    limit: float = 0.25,
    projected: bool = False,
    attn: float = 1.0,
    mlp: float = 1.0,
    contexts: int = 8,
) -> Edit:
    """An edit after which attention and MLPs write nothing along the directions of what is to be forgotten.

    mode: "weight" (W' = W - W r r'; can be baked) or "hook" (removed from what is written, the embedding's share too).
    per: "subject" (a direction per name, made orthonormal) or "all" (one direction).
    position: token where the means are taken: "subject_last", "last", or "auto", both. Unused with given directions.
    candidates: how many blocks per position are compared.
    limit: KL divergence of the first answer token on retain prompts, in nats, that a candidate may cost; where all
        cost more, the one that forgets most per nat is taken, and the recipe says so.
    projected: first take away the component along the mean of what to keep.
    attn: share of the directions removed from attention outputs.
    mlp: share of the directions removed from MLP outputs.
    contexts: wordings in which each name is read.

    Directions in `where` are used as they are, together. Raises ExciseError when there is nothing to forget, nobody to
    tell it from, when the directions vanish, or, in weight mode, for blocks that pass a norm before they join the stream.
    """
    facts, kept = groups(forget, retain)
    if mode not in ("weight", "hook") or per not in ("all", "subject"):
        raise ExciseError(f"mode={mode!r}, per={per!r}: choose weight or hook, and all or subject")
    if mode == "weight":
        for block in range(model.n_layers):
            write_matrices(model, block)  # fails before the long part
    if where is not None and where.directions is not None:
        found = {"given": orthonormal(torch.as_tensor(where.directions))}
    else:
        found = _candidates(model, facts, kept, where, per, position, candidates, projected, contexts)
    built = {name: _ablation(model, basis, mode == "hook", attn, mlp) for name, basis in found.items()}
    scores = {name: _score(model, edit, facts, kept) for name, edit in built.items()} if len(built) > 1 else {}
    within = {n: s for n, s in scores.items() if s["kl"] <= limit}
    name = _best(scores, within) if scores else next(iter(built))
    recipe = {
        "model": model.name,
        "subjects": facts.subjects,
        "direction": name,
        "rank": len(found[name]),
        "within limit": bool(within) or not scores,
        "compared": [{"direction": n, **s} for n, s in scores.items()],
    }
    return replace(built[name], recipe=recipe)


def _best(scores: dict[str, dict[str, float]], within: dict[str, dict[str, float]]) -> str:
    """What forgets most of those within the limit; where all cost more, what forgets most per nat."""
    if within:
        return max(within, key=lambda n: within[n]["drop"])
    return max(scores, key=lambda n: scores[n]["drop"] / scores[n]["kl"])


def orthonormal(directions: Tensor) -> Tensor:
    """Orthonormal rows [k, d] that span the given directions [n, d], in float64. Raises ExciseError when they vanish."""
    _, s, v = torch.linalg.svd(directions.double().reshape(-1, directions.shape[-1]), full_matrices=False)
    kept = s > 1e-6 * s.max().clamp_min(1e-300)
    if not bool(s.max() > 1e-9):
        raise ExciseError("the directions are zero: what to forget and what to keep have the same mean")
    return v[kept]


def _stands_at(position: str, site: Site) -> bool:
    return site.position in (position, None)


def _candidates(
    model: Model,
    facts: Facts,
    kept: Facts,
    where: Localization | None,
    per: str,
    position: str,
    count: int,
    projected: bool,
    contexts: int,
) -> dict[str, Tensor]:
    """Differences of means at every candidate place, as orthonormal rows."""
    wanted = POSITIONS if position == "auto" else (position,)
    if not set(wanted) <= set(POSITIONS):
        raise ExciseError(f"position={position!r}: choose auto, {' or '.join(POSITIONS)}")
    deepest = max(1, int(DEPTH * model.n_layers))
    found = {}
    for at in wanted:
        blocks = where.where(partial(_stands_at, at)).layers() if where is not None else list(range(deepest))
        blocks = thin(blocks, count)
        if not blocks:
            continue
        seen = view(facts, kept, at, contexts=contexts, names=0, relatives=0, seed=0)
        prompts = [m.prompt for m in (*seen.told, *seen.others)]
        sites = [Site(f"blocks.{b}.hook_resid_post", at) for b in blocks]
        trace = read(model, prompts, sites)
        names = [m.name if per == "subject" else "" for m in seen.told]
        for site in sites:
            told, others = trace[site].double().split([len(seen.told), len(seen.others)])
            found[str(site)] = orthonormal(differences(told, names, others.mean(0), projected=projected))
    if not found:
        raise ExciseError(f"the localization names no site at {' or '.join(wanted)}")
    return found


def differences(told: Tensor, names: Sequence[str], mean: Tensor, *, projected: bool) -> Tensor:
    """The mean of each name's rows of `told` [n, d], less `mean` [d]; with `projected` also without what lies along it."""
    means = torch.stack([told[[n == name for n in names]].mean(0) for name in dict.fromkeys(names)])
    difference = means - mean
    if not projected:
        return difference
    unit = mean / mean.norm().clamp_min(1e-30)
    return difference - (difference @ unit)[:, None] * unit


def _ablation(model: Model, basis: Tensor, hooked: bool, attn: float, mlp: float) -> Edit:
    """The edit that takes the span of `basis` [k, d] out of everything that blocks write."""
    right = basis.float().contiguous()
    if hooked:
        zero = torch.zeros(right.shape[1])
        whole = Affine(right.mT.contiguous(), -right, zero, zero)
        points = [("blocks.0.hook_in", 1.0)]
        points += [
            (f"blocks.{b}.{p}", s)
            for b in range(model.n_layers)
            for p, s in (("hook_attn_out", attn), ("hook_mlp_out", mlp))
        ]
        changes = [Change(Site(p, "all"), whole.scaled(s)) for p, s in points if s]
        return Edit(tuple(changes), {}, whole_fingerprints(model))
    changes = []
    for name in (n for b in range(model.n_layers) for n in writers(model, b)):
        share = attn if name.endswith("W_O") else mlp
        left = -share * (model.weight(name).detach().cpu().double() @ basis.mT)
        if share:
            changes.append(Change(Site(name), LowRank(left.float().contiguous(), right)))
    return Edit(tuple(changes), {}, fingerprints(model, changes))


def writers(model: Model, block: int) -> list[str]:
    """Names of the matrices with which a block writes to the residual stream."""
    return [n for n in model.names.weights(block) if n.endswith((".W_O", ".W_out"))]


def _score(model: Model, edit: Edit, facts: Facts, kept: Facts) -> dict[str, float]:
    """What an ablation does: drop of forget and retain answers in nats per token, KL of the first token on retain prompts."""
    forget, retain = (trained(fs, ASKED) for fs in (facts, kept))
    plain, edited = Arm("plain", model), Arm("edited", model, edit)
    before = first_logprobs(model, retain)
    with applied(model, edit):
        after = first_logprobs(model, retain)
    kl = kl_div(after, before, log_target=True, reduction="batchmean")
    return {
        "drop": _mean(plain, forget) - _mean(edited, forget),
        "drop retain": _mean(plain, retain) - _mean(edited, retain),
        "kl": float(kl),
    }


def _mean(arm: Arm, prompts: list[Prompt]) -> float:
    """Mean log-probability of the answers, per token; gone is gone."""
    return sum(max(GONE, sum(a.logprobs) / len(a.logprobs)) for a in arm.answers(prompts)) / len(prompts)


__all__ = ["directional_ablation", "orthonormal", "writers"]
