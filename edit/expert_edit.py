"""Expert edits of a Mixture-of-Experts model: the experts that serve a name are rewritten, silenced, or no longer chosen.

Rewriting acts on the down-projection slices of the chosen experts alone. Silencing removes what they write and leaves the
router's choice. Steering is a rank-one-per-expert change of the router's matrix, solved so that the tokens of the names
fall out of the chosen experts' reach and ordinary tokens stay (after SteerMoE, arXiv 2509.09660, whose shift of the logits
knows no token). One or few experts by traffic is SEUF's choice (arXiv 2411.18797); whoever serves a name is not always who
knows it, and silencing alone hardly forgets. How the routing moved is part of the recipe: knowledge behind a mere
re-route comes back with the old route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from excise.actions import LowRank, Scale
from excise.apply import applied
from excise.checks import fingerprints
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys
from excise.mentions import Mention, mentions
from excise.model import Model
from excise.redirection import name_aware, name_prompts
from excise.registry import editor
from excise.requests import ordinary_text
from excise.rewriting import Cost, Names, names_of, write
from excise.routers import expert_layers, routes
from excise.scores import Localization
from excise.sites import Site
from excise.solve import Covariance, Metric, solve_edit
from excise.trace import read
from excise.values import wanted_change

HOW = ("rewrite", "silence", "steer")
# Names read at most, of each sort, to choose experts and to report the routing.
READ = 128
# Made-up name-sharers per word of each name, and the wordings they are read in, that rewriting and steering spare.
RELATIVES, WORDINGS = 24, 2
# How far below the last chosen expert a steered one must fall, in units of the router logits' spread.
MARGIN = 0.25
# Relative ridge of the covariances: enough to invert them when text is short.
FLOOR = 1e-3


@editor
def expert_edit(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    how: Literal["rewrite", "silence", "steer"] = "rewrite",
    experts: int = 4,
    ridge: float = 0.5,
    contexts: int = 8,
    texts: Sequence[str] | None = None,
    budget: int = 20_000,
    seed: int = 0,
) -> Edit:
    """An edit of the `experts` experts that `where` holds most responsible.

    how: "rewrite" gives names the state of made-up ones as far as these experts' down-projections can, "silence" takes
        away what the experts write, at every token, "steer" keeps the router from sending the names' tokens to them.
    experts: how many experts.
    ridge: of "rewrite" and "steer": weight of ordinary text and of other names against the names, per dimension of the
        key (soft, as in memit), so that an expert which sees little of the names is hardly written; larger writes less.
    contexts: wordings in which each name is read.
    texts: ordinary text for the covariances; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws the made-up names.

    Where `where` names no expert (blocks.3.mlp.experts.5.W_out), those of its blocks are taken (without it, of the first
    half, where the model learns whom it is asked about) that write more at the names to forget than at the names to keep.
    A silenced expert keeps the bias of its down-projection where it has one. Raises ExciseError for a model without
    experts, when there is nothing to forget, and when too few experts would be left to choose from.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r}: expert edits are {', '.join(HOW)}")
    blocks = _expert_blocks(model)
    kept = Facts(retain)
    names = names_of(forget, target="foil", contexts=contexts, prompts=1, seed=seed)
    others = mentions(kept, limit=1)[:READ]
    chosen = _named(where, experts) or _busiest(model, names, others, where, blocks, experts)
    text = ordinary_text(texts, kept)
    strangers = name_prompts(names.mentions, others, each=RELATIVES, wordings=WORDINGS, seed=seed + 1)
    if how == "rewrite":

        def cost(block: int) -> dict[str, Metric]:
            return name_aware(model, block, text, strangers, budget=budget, weight=1.0, ridge=FLOOR)

        edit = _rewrite(model, names, kept, chosen, cost, ridge, seed)
    elif how == "silence":
        edit = Edit(tuple(_silenced(model, name) for name in chosen))
    else:
        flat = [p for prompts in strangers for p in prompts]
        blocks_of = _by_block(chosen).items()
        edit = Edit(tuple(_steered(model, names, block, own, text, flat, budget, ridge) for block, own in blocks_of))
    edit = replace(edit, fingerprints=fingerprints(model, edit.changes))
    moved = _routing(model, edit, names, others, chosen)
    return replace(edit, recipe={**edit.recipe, "model": model.name, "chosen": chosen, "routing": moved})


# which experts


def _expert_blocks(model: Model) -> list[int]:
    found = expert_layers(model)
    if not found:
        raise ExciseError(f"{model.name} has no experts: it is no Mixture-of-Experts model; use rocr or memit")
    return found


def _named(where: Localization | None, count: int) -> list[str]:
    """The matrices of the best experts that the localization names."""
    if where is None:
        return []
    named = where.where(lambda s: s.expert is not None)
    found = [s.point.rsplit(".", 1)[0] + ".W_out" for s in named.top(len(named.sites)).sites]
    return list(dict.fromkeys(found))[:count]


def _busiest(
    model: Model, names: Names, others: Sequence[Mention], where: Localization | None, blocks: Sequence[int], count: int
) -> list[str]:
    """The experts that write most at names to forget, less what they write at names to keep; a block's total counts 1."""
    half = blocks[: max(1, len(blocks) // 2)]
    wanted = [b for b in where.layers() if b in blocks] if where is not None else half
    if not wanted:
        raise ExciseError("the localization names no block with experts; run expert_attribution")
    score: dict[str, float] = {}
    for sign, prompts in ((1.0, names.prompts[:READ]), (-1.0, [m.prompt for m in others])):
        keys = read_keys(model, prompts, wanted)[0] if prompts else {}
        for block in keys.values():
            own = {n: k for n, k in block.items() if ".experts." in n}
            sizes = {n: float((k.to(w.device) @ w).norm(dim=1).sum()) for n, k, w in _weighted(model, own)}
            for name, size in sizes.items():
                score[name] = score.get(name, 0.0) + sign * size / max(sum(sizes.values()), 1e-30)
    return sorted(score, key=lambda n: -score[n])[:count]


def _weighted(model: Model, keys: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    return [(n, k, model.weight(n).detach().float()) for n, k in keys.items()]


def _by_block(chosen: Sequence[str]) -> dict[int, list[int]]:
    """The chosen experts of each block, ascending."""
    found: dict[int, list[int]] = {}
    for site in sorted(map(Site, chosen)):
        found.setdefault(site.layer or 0, []).append(site.expert or 0)
    return dict(sorted(found.items()))


# what is done to them


def _rewrite(
    model: Model, names: Names, retain: Facts, chosen: Sequence[str], cost: Cost, ridge: float, seed: int
) -> Edit:
    """The blocks of the chosen experts share the way to the made-up names' state after the last of them."""
    blocks = list(_by_block(chosen))
    change, _ = wanted_change(model, names, retain, blocks[-1], value="fictitious", steps=0, clamp=0.0, seed=seed)
    edit = write(model, names, change, blocks, cost, mode="soft", ridge=ridge, only=chosen)
    if not edit.changes:
        raise ExciseError(f"no name to forget is ever sent to {', '.join(chosen)}; choose others by expert_attribution")
    return edit


def _silenced(model: Model, name: str) -> Change:
    width = model.weight(name).shape[0]
    return Change(Site(name), Scale(torch.arange(width), torch.zeros(width)))


def _steered(
    model: Model,
    names: Names,
    block: int,
    experts: Sequence[int],
    text: Sequence[Any],
    strangers: Sequence[Prompt],
    budget: int,
    ridge: float,
) -> Change:
    """The change of a block's router that takes the names' tokens away from some experts."""
    router = f"blocks.{block}.mlp.W_router"
    point = str(model.names.weight(router).reads)
    name, word = Site(point, "subject"), Site(point, "after_bos")
    inputs = _read(model, names.prompts, name, len(names.prompts) * 64)
    wanted = steering(inputs @ model.weight(router).detach().float().cpu(), experts, model.names.experts_per_token)
    rows = _read(model, text, word, budget)
    second = rows.mT @ rows / len(rows)
    if strangers:  # they count as much as text, as in `name_aware`
        others = _read(model, strangers, name, budget)
        second = torch.addmm(second, others.mT, others, alpha=float(second.trace() / (others * others).sum()))
    metric = {router: Covariance(second, FLOOR)}
    found = solve_edit({router: inputs}, wanted, metric, mode="soft", ridge=ridge, rank=len(experts))
    return Change(Site(router), LowRank(found.left[router].float().contiguous(), found.right.float().contiguous()))


def steering(logits: Tensor, experts: Sequence[int], k: int) -> Tensor:
    """The change of router logits [n, n_experts] after which none of `experts` is among the k best, zero elsewhere.

    They fall to MARGIN standard deviations below the k-th best of the others, and where they lie lower they stay. Raises
    ExciseError when fewer than k others are left.
    """
    others = [e for e in range(logits.shape[1]) if e not in set(experts)]
    if len(others) < k:
        raise ExciseError(
            f"steering away from {len(experts)} of {logits.shape[1]} experts leaves fewer than {k} to choose"
        )
    bound = logits[:, others].topk(k, dim=1).values[:, -1:] - MARGIN * logits.std()
    change = torch.zeros_like(logits)
    change[:, list(experts)] = (bound - logits[:, list(experts)]).clamp_max(0)
    return change


def _read(model: Model, prompts: Sequence[Any], site: Site, most: int) -> Tensor:
    """About `most` rows [n, d] of an activation."""
    found, rows = [], 0
    for start in range(0, len(prompts), READ):
        found.append(read(model, prompts[start : start + READ], [site])[site])
        rows += len(found[-1])
        if rows >= most:
            break
    return torch.cat(found)


# how the routing moved


def _routing(
    model: Model, edit: Edit, names: Names, others: Sequence[Mention], chosen: Sequence[str]
) -> dict[str, float]:
    """Per sort of names: share of the choices at their last token that stay as they were, and how often the chosen experts
    are still among them (before, after)."""
    report = {}
    own = _by_block(chosen)
    for sort, prompts in (("forget", names.prompts[:READ]), ("retain", [m.prompt for m in others])):
        if not prompts:
            continue
        plain = routes(model, prompts)
        with applied(model, edit):
            edited = routes(model, prompts)
        kept = [_overlap(plain[b], edited[b]) for b in plain]
        report[f"{sort} overlap"] = sum(kept) / len(kept)
        for when, found in (("before", plain), ("after", edited)):
            hits = [torch.isin(found[b], torch.tensor(e)).float().sum(1).mean().item() for b, e in own.items()]
            report[f"{sort} chosen {when}"] = sum(hits) / len(hits)
    return report


def _overlap(a: Tensor, b: Tensor) -> float:
    """Mean share of the choices [n, k] in a that are also in b."""
    return float((a[:, :, None] == b[:, None, :]).any(2).float().mean())


__all__ = ["expert_edit", "steering"]
