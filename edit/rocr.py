"""ROCR: rank-one concept redirection. Whatever is asked about a name, the model reads another entity instead.

The early MLPs turn the last token of a name into what later layers read about it. The key at that token is given a new
value, so that the residual stream becomes that of a name the model has never heard of (or of a neutral entity, or of the
centroid of a class). No training, no forget answers: only the names are used.

Method: Ye, Zhang, Wu, "LLM Unlearning Should Be Form-Independent", arXiv 2506.07795. Beyond it: paired contexts, one column
per name and context, all names in one solve, protected name-sharers, scale-free ridge, fictitious names as target,
layers by measured effect, experts of a Mixture-of-Experts block as one linear map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from excise.actions import LowRank
from excise.apply import applied
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys, write_matrices
from excise.model import Model
from excise.mentions import Mention, fictitious, mentions, sharing
from excise.registry import editor
from excise.scores import Localization
from excise.sites import Site
from excise.solve import Covariance, Solution, compress, solve_edit
from excise.stats import moments
from excise.trace import patched, read


@editor
def rocr(model: Model, forget: Sequence[Fact], retain: Sequence[Fact], where: Localization | None = None, *, target: str = "fictitious",
         layers: int = 1, candidates: int = 4, contexts: int = 8, names: int = 32, mode: str = "ridge", ridge: float = 1e-3,
         protect: int = 64, texts: Sequence[str] | None = None, budget: int = 20_000, seed: int = 0) -> Edit:
    """An edit after which every name in `forget` reads as a name the model does not know.

    target: "fictitious" (centroid of made-up names), "centroid" (centroid of the retain names), or a neutral subject's name.
    layers: how many consecutive blocks share the change.
    candidates: how many blocks from `where` (or from the first half of the model) are tried by patching before one is chosen.
    contexts: wordings in which each name is read.
    names: how many names make the centroid.
    mode: "ridge" or "hard", see excise.solve.solve_edit.
    ridge: relative ridge of the key system; larger writes less and bounds the change.
    protect: how many retain names that share a word with a forget name are held fixed.
    texts: ordinary text for the covariance; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws the fictitious names.

    Raises ExciseError when a name has no token of its own, the block's MLP cannot write to the residual stream directly,
    or there are no facts to forget.
    """
    facts, kept = Facts(forget), Facts(retain)
    if not len(facts):
        raise ExciseError("nothing to forget: the forget set is empty")
    told = mentions(facts, limit=contexts)
    goals = _goals(model, told, facts, kept, target, names, seed)
    last = _choose_last(model, facts, told, goals, where, candidates, layers)
    chosen = list(range(last - layers + 1, last + 1))
    guarded = sharing(mentions(kept, limit=contexts), told, limit=protect)
    ordinary = list(texts) if texts is not None else _as_texts(kept)
    cost = moments(model, chosen, ordinary, budget=budget)
    edit = Edit((), fingerprints={"tokenizer": model.tokenizer_fingerprint})
    reports = []
    for i, layer in enumerate(chosen):
        metrics = {n: Covariance(m.second) for n, m in cost.items()}
        changes, report = _one_layer(model, edit, layer, last, len(chosen) - i, told, goals, guarded, metrics, mode, ridge)
        prints = {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes}
        edit = replace(edit, changes=edit.changes + changes, fingerprints={**edit.fingerprints, **prints})
        reports.append(report)
    recipe = {"model": model.name, "layers chosen": chosen, "subjects": facts.subjects, "solution": reports, "columns": len(told), "protected": len(guarded)}
    return replace(edit, recipe=recipe)


def _as_texts(facts: Facts) -> list[Any]:
    """Every trained prompt of the facts with its answer."""
    return [replace(p, text=p.text if p.chat else f"{p.text} {p.answer}.") for f in facts for p in f.ask(held_out=False)]


# targets


def _goals(model: Model, told: Sequence[Mention], facts: Facts, kept: Facts, target: str, names: int, seed: int) -> list[list[Prompt]]:
    """For each mention, the prompts whose mean state is its target: the same context around other names."""
    kinds = sorted({m.kind for m in told})
    spoken = [*told, *mentions(kept, limit=1)]
    known = {k: list(dict.fromkeys(m.name for m in spoken if m.kind == k)) for k in kinds}
    if target == "fictitious":
        pool = {k: fictitious(known[k], names, seed=seed) for k in kinds}
    elif target == "centroid":
        forgotten = {m.name for m in told}
        pool = {k: [n for n in known[k] if n not in forgotten][:names] for k in kinds}
    else:
        pool = {k: [target] for k in kinds}
    empty = [k for k, found in pool.items() if not found]
    if empty:
        raise ExciseError(f"no target names for {', '.join(empty)} prompts: give more retain facts, or name a neutral subject as target")
    return [[m.around(name) for name in pool[m.kind]] for m in told]


def _target_states(model: Model, goals: Sequence[Sequence[Prompt]], point: str) -> Tensor:
    """Mean state [n_mentions, d] of each mention's target prompts at `point`; every distinct prompt is run once."""
    distinct = list(dict.fromkeys(p for g in goals for p in g))
    states = dict(zip(distinct, _states(model, distinct, point), strict=True))
    return torch.stack([torch.stack([states[p] for p in g]).mean(0) if len(g) > 1 else states[g[0]] for g in goals])


def _states(model: Model, prompts: Sequence[Prompt], point: str) -> Tensor:
    site = Site(point, "subject_last")
    return read(model, prompts, [site])[site]


# where


def _choose_last(model: Model, facts: Facts, told: Sequence[Mention], goals: Sequence[Sequence[Prompt]], where: Localization | None,
                 candidates: int, layers: int) -> int:
    """The last edited block: of the candidates, the one where patching the target state in silences the answers most."""
    ranked = _ranked_layers(model, where, candidates)
    ranked = [layer for layer in ranked if layer - layers + 1 >= 0] or [layers - 1]
    for layer in ranked:
        write_matrices(model, layer)  # fail before the long part
    if len(ranked) == 1:
        return ranked[0]
    asked = [p for f in facts for p in f.ask(held_out=False) if p.subject and p.form != "choice"]
    asked = asked[:: max(1, len(asked) // 128)]
    effect = {layer: _patch_effect(model, asked, told, goals, layer) for layer in ranked}
    best = max(effect.values())
    # Among blocks that silence about equally, the earliest leaves attention the least to read around it.
    return min(layer for layer, e in effect.items() if e >= best - 0.05 * abs(best))


def _ranked_layers(model: Model, where: Localization | None, candidates: int) -> list[int]:
    if where is None:
        return list(range(1, max(2, model.n_layers // 2)))[:: max(1, model.n_layers // 2 // candidates)][:candidates]
    at_subject = where.where(lambda s: s.layer is not None and s.position in ("subject_last", None) and "attn" not in s.point)
    if not at_subject.sites:
        raise ExciseError("the localization names no MLP or residual site at the subject's last token; run causal_trace, or name sites such as blocks.2.mlp.W_out")
    best: dict[int, float] = {}
    for site, score in zip(at_subject.sites, at_subject.average, strict=True):
        assert site.layer is not None
        best[site.layer] = max(best.get(site.layer, float("-inf")), float(score))
    return sorted(sorted(best, key=lambda layer: -best[layer])[:candidates])


def _patch_effect(model: Model, asked: Sequence[Prompt], told: Sequence[Mention], goals: Sequence[Sequence[Prompt]], layer: int) -> float:
    """Mean drop of the answer's log-probability when the subject's last token gets its target state after block `layer`."""
    point = f"blocks.{layer}.hook_resid_post"
    states = _target_states(model, goals, point)
    by_name: dict[str, list[int]] = {}
    for i, m in enumerate(told):
        by_name.setdefault(m.name, []).append(i)
    drop = 0.0
    for index, batch in model.batches(asked, answers=True):
        goal = torch.stack([states[by_name[asked[i].subject]].mean(0) for i in index]).to(batch.ids.device)
        at = batch.where("subject_last").to(batch.ids.device)

        def put(x: Tensor, goal: Tensor = goal, at: Tensor = at) -> Tensor:
            return torch.where(at[..., None], goal[:, None].to(x.dtype), x)

        plain = _answer_logprobs(model, batch)
        with patched(model, {point: put}):
            drop += float((plain - _answer_logprobs(model, batch)).sum())
    return drop / max(1, len(asked))


def _answer_logprobs(model: Model, batch: Any) -> Tensor:
    """Mean answer log-probability of each row, floored at log 1e-4 so that one sunk token does not decide."""
    logp = model.logits(batch).log_softmax(-1)
    rows = []
    for row in range(len(batch)):
        a, b = batch.starts[row], batch.lengths[row]
        rows.append(logp[row, a - 1 : b - 1].gather(-1, batch.ids[row, a:b, None]).mean().clamp_min(-9.21))
    return torch.stack(rows)


# one block


def _one_layer(model: Model, so_far: Edit, layer: int, last: int, remaining: int, told: Sequence[Mention], goals: Sequence[Sequence[Prompt]],
               guarded: Sequence[Mention], metrics: Mapping[str, Covariance], mode: str, ridge: float) -> tuple[tuple[Change, ...], dict[str, Any]]:
    """Changes of one block, with all earlier blocks' changes in force; it writes 1/remaining of the open gap."""
    point = f"blocks.{last}.hook_resid_post"
    goal = _target_states(model, goals, point)
    with applied(model, so_far):
        keys, states = read_keys(model, [m.prompt for m in told], [layer], points=[point])
        kept = read_keys(model, [m.prompt for m in guarded], [layer])[0][layer] if guarded else {}
    gap = (goal - states[point]) / remaining
    blocks = {n: k for n, k in keys[layer].items() if n in metrics}
    walls = {n: kept.get(n, torch.zeros(len(guarded), k.shape[1])) for n, k in blocks.items()}
    solution = solve_edit(blocks, gap, metrics, protect=_thin(walls) if guarded else None, mode=mode, ridge=ridge)
    changes = tuple(
        Change(Site(name), LowRank(left.float().contiguous(), solution.right.float().contiguous()))
        for name, left in solution.left.items()
        if bool(left.any()) or not bool(gap.any())
    )
    return changes, _report(layer, solution)


def _thin(walls: dict[str, Tensor]) -> dict[str, Tensor]:
    """Protected columns with near-copies merged, jointly over the blocks."""
    names = list(walls)
    joint = compress(torch.cat([walls[n] for n in names], dim=1), tolerance=1e-3)
    return dict(zip(names, joint.split([walls[n].shape[1] for n in names], dim=1), strict=True))


def _report(layer: int, solution: Solution) -> dict[str, Any]:
    share, leak = solution.share, solution.leak
    return {
        "layer": layer, "rank": solution.rank, "condition": float(solution.condition),
        "share min": float(share.min()), "share mean": float(share.mean()),
        "leak max": float(leak.max()) if len(leak) else 0.0,
    }

