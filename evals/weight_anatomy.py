"""Weight-change anatomy: what an edit wrote, matrix by matrix: how much, of what rank, where, and through which keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.lens import kin
from evals.sampling import direct, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.gradients import inflow
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

# Singular values below this share of the first are rounding.
RANK = 1e-6


@evaluation("intrinsic")
def weight_anatomy(
    arm: Arm, facts: Sequence[Fact], *, before: Arm, most: int = 64, limit: int = 24, seed: int = 0
) -> list[Score]:
    """How each changed matrix differs from that of `before`; one score per matrix, whose name stands in place of a fact.

    Variants: "relative norm" |dW| / |W|; "rank" (singular values above 1e-6 of the first); "stable rank" |dW|^2 / s1^2;
    "energy share" of all that was written, and "energy share, layer i"; "leak" |K dW| / (|dW| |K|_2) with K what enters
    the matrix on facts to keep, 0 for a change that they do not reach, and "reach" the same on facts to forget;
    "alignment", |cos| of the change's first left singular vector with the mean difference of what enters on the two;
    "changed matrices", their number. Nothing for an edit that lives in hooks, or a model that was trained apart.
    most: matrices looked at, those of most energy first.
    limit: facts of each group whose prompts are read.
    seed: which facts are taken when there are more.
    """
    if not measurable(arm.model, direct(facts, groups=("forget", "retain"), limit=limit, seed=seed))[0]:
        return nothing("no facts to forget or to keep")
    if not kin(arm.model, before.model):
        return nothing("trained apart: there is no change to take apart")
    if arm.mode == "hook":
        return nothing("the edit lives in hooks: it writes no weight")
    changes = changed(arm, before)
    scores = [Score("", "", "", float(len(changes)), variant="changed matrices")]
    energy = {name: float(dw.double().square().sum()) for name, dw in changes.items()}
    chosen = sorted(changes, key=lambda name: -energy[name])[:most]
    forget, retain = (_entering(before, facts, chosen, g, limit, seed) for g in ("forget", "retain"))
    whole = sum(energy.values())
    for name in chosen:
        found = anatomy(before.model.weight(name).detach(), changes[name]) | {"energy share": energy[name] / whole}
        found |= _reached(changes[name], forget.get(name), retain.get(name))
        scores += [Score(name, name, "", value, variant=variant) for variant, value in found.items()]
    return scores + _by_layer(before.model, energy, whole)


def anatomy(weight: Tensor, change: Tensor) -> dict[str, float]:
    """Relative norm, numerical rank and stable rank of a change of a matrix."""
    s = torch.linalg.svdvals(change.double())
    norm = float(weight.double().norm())
    return {
        "relative norm": float(change.double().norm()) / norm if norm else float("inf"),
        "rank": float((s > RANK * s[0]).sum()),
        "stable rank": float((s**2).sum() / s[0] ** 2),
    }


def leak(change: Tensor, keys: Tensor) -> float:
    """|K dW|_F / (|dW|_F |K|_2) of dW [d_in, d_out] and rows K [n, d_in]: 0 where no key reaches the change, at most 1."""
    dw, k = change.double(), keys.double()
    largest = torch.linalg.matrix_norm(k, 2)
    return float((k @ dw).norm() / (dw.norm() * largest)) if largest > 0 else 0.0


def changed(arm: Arm, before: Arm) -> dict[str, Tensor]:
    """The change of every matrix that differs from that of `before`, [d_in, d_out] in float32, by name."""
    model = before.model
    names = model.names.weights()
    if arm.model is model:
        # Another edit of the same weights touches only what the edits name.
        edits = [a.edit for a in (arm, before) if a.edit is not None]
        names = list(dict.fromkeys(c.site.point for e in edits for c in e.changes if c.site.is_weight))
    with before.held() as held:
        old = {n: held.model.weight(n).detach().clone() if arm.model is model else held.model.weight(n) for n in names}
    with arm.held() as held:
        new = {n: held.model.weight(n).detach() for n in names}
        return {n: new[n].float() - old[n].detach().float().to(new[n].device) for n in names if _differ(new[n], old[n])}


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and not torch.equal(a, b.to(a.device))


def _entering(
    arm: Arm, facts: Sequence[Fact], names: Sequence[str], group: str, limit: int, seed: int
) -> dict[str, Tensor]:
    """What enters each matrix of a block on the prompts and answers of a group, rows [n, d_in]."""
    items, _ = measurable(arm.model, direct(facts, groups=(group,), limit=limit, seed=seed))
    inside = [n for n in names if n.startswith("blocks.") and not n.endswith("W_router")]
    rows: dict[str, list[Tensor]] = {}

    def keep(name: str, x: Tensor, _: Tensor | None) -> None:
        flat = x.flatten(0, -2).float().cpu()
        rows.setdefault(name, []).append(flat[flat.abs().sum(-1) > 0])

    if items and inside:
        with arm.running() as model:
            for _, batch in model.batches([i.prompt for i in items], answers=True):
                inflow(model, batch, inside, batch.mask.bool(), keep)
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _reached(change: Tensor, forget: Tensor | None, retain: Tensor | None) -> dict[str, float]:
    found = {name: leak(change, k) for name, k in (("leak", retain), ("reach", forget)) if k is not None and len(k)}
    if len(found) == 2 and forget is not None and retain is not None:
        apart = forget.double().mean(0) - retain.double().mean(0)
        first = torch.linalg.svd(change.double().cpu(), full_matrices=False)[0][:, 0]
        found["alignment"] = float((first @ apart).abs() / apart.norm())
    return found


def _by_layer(model: Model, energy: dict[str, float], whole: float) -> list[Score]:
    layers: dict[int, float] = {}
    for name, value in energy.items():
        layer = model.names.weight(name).layer
        if layer is not None:
            layers[layer] = layers.get(layer, 0.0) + value / whole
    return [Score("", "", "", x, variant=f"energy share, layer {i}") for i, x in sorted(layers.items())]
