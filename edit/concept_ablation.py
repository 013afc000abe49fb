"""Concept ablation: the value vectors that spell a concept are removed, drowned in noise, or lose what they spell.

A value vector is a row of an MLP's W_out. Hong et al., "Intrinsic Test of Unlearning Using Parametric Knowledge Traces",
arXiv 2406.11614, add noise to one such vector per concept and call it an oracle (their further training of it is left
out). Their noise is absolute and some five times the vector; here it is relative to the vector's norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from excise.actions import Affine, LowRank, Scale
from excise.checks import fingerprints, whole_fingerprints
from excise.edits import Change, Edit
from excise.encoding import encode_row
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys, write_matrices
from excise.model import Model
from excise.registry import editor
from excise.requests import groups
from excise.rewriting import mean_of
from excise.scores import Localization
from excise.sites import Site
from excise.trace import read

# Value vectors by matrix, and for each the facts (rows of the forget set) that it was chosen for.
Chosen = dict[str, dict[int, set[int]]]


@editor
def concept_ablation(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    how: Literal["zero", "noise", "project", "erase"] = "noise",
    each: int = 16,
    noise: float = 3.0,
    at: Literal["last", "subject_last"] = "subject_last",
    limit: int = 64,
    seed: int = 0,
) -> Edit:
    """An edit of the value vectors that `where` holds responsible for each fact.

    how: "zero" removes them, "noise" adds noise to them, "project" takes out of them the direction of the answers that
        they were chosen for, "erase" leaves them and takes their span out of what their block's MLP writes (a hook).
    each: vectors of each fact, those of highest score.
    noise: norm of the noise, relative to the vector's.
    at: where a search reads neurons: "last", where the answer is said, counts what they write towards it; "subject_last",
        where the model learns whom it is asked about, counts all they write.
    limit: prompts of forget and of retain facts that are read where vectors have to be searched, and for "erase".
    seed: draws the noise.

    `where` names single neurons (blocks.3.mlp.W_out#7 or blocks.3.mlp.hook_post#7, experts alike), as concept_vectors and
    knowledge_neurons do. Where it names none, the vectors of its blocks (without it, of all blocks) are searched for those
    that write most on a fact's prompts and not on retain prompts. A vector that spells an answer serves all who share the
    answer. Raises ExciseError when there is nothing to forget, and in a search when an MLP's output passes another norm.
    """
    facts, kept = groups(forget, retain)
    if how not in HOW or at not in AT:
        raise ValueError(f"how={how!r}, at={at!r}: ways are {', '.join(HOW)}; a search reads at {', '.join(AT)}")
    chosen = _named(model, facts, where, each) if where is not None else {}
    searched = not chosen
    if searched:
        blocks = where.layers() if where is not None else range(model.n_layers)
        chosen = search(model, facts, kept, blocks, each=each, limit=limit, at=at)
    rng = torch.Generator().manual_seed(seed)
    if how == "erase":
        changes = _erased(model, chosen, _prompts(kept or facts, limit))
    else:
        change = {
            "zero": lambda name, units: _zeroed(units),
            "noise": lambda name, units: _noisy(model, name, units, noise, rng),
            "project": lambda name, units: _projected(model, facts, name, units),
        }[how]
        changes = tuple(Change(Site(name), change(name, chosen[name])) for name in sorted(chosen))
    prints = whole_fingerprints(model) if how == "erase" else fingerprints(model, changes)
    recipe: dict[str, Any] = {
        "model": model.name,
        "vectors": [f"{name}#{unit}" for name in sorted(chosen) for unit in sorted(chosen[name])],
        "searched": searched,
    }
    return Edit(changes, recipe, prints)


HOW = ("zero", "noise", "project", "erase")
AT = ("last", "subject_last")


# which vectors


def _named(model: Model, facts: Sequence[Fact], where: Localization, each: int) -> Chosen:
    """The `each` best neurons of every fact among those that `where` names; by their mean score where it has other facts."""
    matrices = [_matrix(s) for s in where.sites]
    columns = [i for i, name in enumerate(matrices) if name is not None]
    if not columns:
        return {}
    rows = {id: row for row, id in enumerate(where.fact_ids)}
    chosen: Chosen = {}
    for number, fact in enumerate(facts):
        row = where.scores[rows[fact.id]] if fact.id in rows else where.average
        _choose(
            chosen,
            number,
            np.nan_to_num(row[columns], nan=-np.inf),
            [(str(matrices[i]), int(where.sites[i].unit or 0)) for i in columns],
            each,
        )
    for name, units in chosen.items():
        width = model.weight(name).shape[0]
        if max(units) >= width:
            raise ExciseError(f"{name}#{max(units)}: this matrix has {width} value vectors")
    return chosen


def _matrix(site: Site) -> str | None:
    """The W_out whose row is the neuron of a site; None where the site is no neuron."""
    stem, _, leaf = site.point.rpartition(".")
    return f"{stem}.W_out" if site.unit is not None and site.column is None and leaf in ("W_out", "hook_post") else None


def _choose(chosen: Chosen, fact: int, scores: np.ndarray, places: Sequence[tuple[str, int]], each: int) -> None:
    for i in np.argsort(-scores, kind="stable")[:each]:
        name, unit = places[i]
        chosen.setdefault(name, {}).setdefault(unit, set()).add(fact)


def search(
    model: Model,
    facts: Sequence[Fact],
    retain: Sequence[Fact],
    blocks: Sequence[int],
    *,
    each: int,
    limit: int,
    at: str = "last",
) -> Chosen:
    """The neurons that write most on each fact's prompts and not on retain prompts.

    At the last token (key - usual key) * (v . q) counts, q being the direction of the answer's first token; at the last
    token of the subject (|key| - usual |key|) * |v|.
    """
    matrices = [n for block in blocks for n in write_matrices(model, block)]
    naming = [[p for p in _trained(f) if at == "last" or p.span] for f in facts]
    prompts = [own[: max(1, limit // len(facts))] for own in naming]
    owner = torch.tensor([i for i, own in enumerate(prompts) for _ in own])
    size = (lambda k: k) if at == "last" else torch.abs
    keys = _flat(read_keys(model, [p for own in prompts for p in own], list(blocks), rule=at)[0])
    others = [p for p in _prompts(retain, limit) if at == "last" or p.span]
    usual = _flat(read_keys(model, others, list(blocks), rule=at)[0]) if others else {}
    towards = answer_directions(model, facts)
    scores, places = [], []
    for name in (n for n in matrices if n in keys):
        own = mean_of(size(keys[name]), owner, len(facts))
        own = own - size(usual[name]).mean(0) if name in usual else own
        vectors = model.weight(name).detach().float().cpu()
        scores.append(own * (towards @ vectors.mT if at == "last" else vectors.norm(dim=1)))  # [n_facts, n_vectors]
        places += [(name, i) for i in range(own.shape[1])]
    table = torch.cat(scores, dim=1).numpy()
    chosen: Chosen = {}
    for number in range(len(facts)):
        _choose(chosen, number, table[number], places, each)
    return chosen


def answer_directions(model: Model, facts: Sequence[Fact]) -> Tensor:
    """The unembedding of each answer's first token less the mean of all tokens', [n_facts, d], float32 on the CPU."""
    rows = [encode_row(model.tokenizer, f.prompt, answer=True) for f in facts]
    unembed = model.weight("unembed.W_U").detach()
    first = unembed[:, [row.ids[row.start] for row in rows]].float()
    return (first - unembed.mean(1, keepdim=True).float()).mT.cpu()


def _flat(keys: Mapping[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: k for block in keys.values() for name, k in block.items()}


def _trained(fact: Fact) -> list[Prompt]:
    own = [p for p in fact.ask(held_out=False) if p.form not in ("reversed", "choice")]
    return own or [fact.prompt]


def _prompts(facts: Sequence[Fact], limit: int) -> list[Prompt]:
    """One prompt of each of at most `limit` facts, taken evenly."""
    return [f.prompt for f in Facts(facts)][:: max(1, -(-len(facts) // limit))]


# what is done to them


def _zeroed(units: Mapping[int, set[int]]) -> Scale:
    return Scale(torch.tensor(sorted(units)), torch.zeros(len(units)))


def _noisy(model: Model, name: str, units: Mapping[int, set[int]], noise: float, generator: torch.Generator) -> LowRank:
    vectors = _vectors(model, name, units)
    drawn = torch.randn(vectors.shape, generator=generator) / vectors.shape[1] ** 0.5
    return _rows(model, name, units, noise * vectors.norm(dim=1, keepdim=True) * drawn)


def _projected(model: Model, facts: Sequence[Fact], name: str, units: Mapping[int, set[int]]) -> LowRank:
    vectors = _vectors(model, name, units)
    gains = []
    for vector, unit in zip(vectors, sorted(units), strict=True):
        basis = torch.linalg.qr(answer_directions(model, [facts[i] for i in sorted(units[unit])]).mT)[0]  # [d, r]
        gains.append(-(basis @ (basis.mT @ vector)))
    return _rows(model, name, units, torch.stack(gains))


def _vectors(model: Model, name: str, units: Mapping[int, set[int]]) -> Tensor:
    return model.weight(name).detach()[sorted(units)].float().cpu()


def _rows(model: Model, name: str, units: Mapping[int, set[int]], gains: Tensor) -> LowRank:
    """The change that adds gains [n, d] to the rows `units`."""
    left = torch.zeros(model.weight(name).shape[0], len(units))
    left[sorted(units), range(len(units))] = 1
    return LowRank(left, gains.contiguous())


def _erased(model: Model, chosen: Chosen, prompts: Sequence[Prompt]) -> tuple[Change, ...]:
    """Per block, the MLP's output less its part in the span of the chosen vectors, about the mean on retain prompts."""
    by_block: dict[int, list[Tensor]] = {}
    for name, units in chosen.items():
        by_block.setdefault(model.names.weight(name).layer or 0, []).append(_vectors(model, name, units))
    sites = {block: Site(f"blocks.{block}.hook_mlp_out", "after_bos") for block in sorted(by_block)}
    seen = read(model, prompts, list(sites.values()))
    changes = []
    for block, site in sites.items():
        _, s, basis = torch.linalg.svd(torch.cat(by_block[block]).double(), full_matrices=False)
        span = basis[s > s[0] * 1e-6].float()  # [r, d], orthonormal rows
        centre = seen[site].mean(0)
        changes.append(Change(site, Affine(span.mT.contiguous(), -span, centre, torch.zeros_like(centre))))
    return tuple(changes)


__all__ = ["answer_directions", "concept_ablation", "search"]
