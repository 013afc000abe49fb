"""Similarity of representations: pictures of how far states have moved, not proof of what is left in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.lens import kin
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import weighted_erasure
from evals.states import states
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

# Fewer rows than this per dimension, and the plain estimate of CKA is far too high.
ENOUGH = 5


@evaluation("intrinsic")
def similarity(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    oracle: Arm | None = None,
    groups: tuple[str, ...] = ("forget", "retain"),
    neighbours: int = 10,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How like those of `before` the residual states are where answers are predicted, block by block. Descriptive only.

    Variants, each with ", layer i": "cka to before", "cka to oracle" (linear CKA; the debiased estimate where there are
    fewer than 5 rows per dimension, so it can fall a little below 0); "principal cosine" and "principal shift" (|cos| of
    the first principal directions, and the mean move along that of `before`; arXiv 2505.16831); per fact "cosine", "norm
    ratio", "neighbours kept" among the k nearest facts, "move" in standard deviations of the states of `before`.
    "cka erasure" sums up (CKA with the oracle, from before to oracle). In the published meta-evaluation CKA had next to
    no robustness to relearning (0.013): read it as a picture. A model that was trained apart has no cosines.
    oracle: the arm that never learned the facts.
    groups: groups whose facts are compared, each by itself.
    neighbours: k.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    scores = []
    for group in groups:
        items, unasked = measurable(arm.model, direct(facts, groups=(group,), limit=limit, seed=seed))
        scores += [item.score(None, variant="cka to before", reason=why) for item, why in unasked]
        if len(items) < 4:
            short = f"{len(items)} facts of the group {group}: similarity needs at least 4"
            scores += nothing(short, group=group, variant="cka to before")
            continue
        scores += _of_group(arm, before, oracle, items, group, neighbours)
    return scores or nothing(f"no facts of the groups {', '.join(groups)}")


def linear_cka(x: Tensor, y: Tensor, *, debiased: bool = False) -> float:
    """|Y'X|^2 / (|X'X| |Y'Y|), columns centred; x [n, d1], y [n, d2]. NaN where one of them does not vary.

    debiased: with the unbiased estimate of HSIC (Nguyen, Raghu, Kornblith 2021, arXiv 2010.15327), for few rows; n > 3.
    """
    a, b = (_gram(m, debiased) for m in (x.double(), y.double()))
    own = _hsic(a, a, debiased) * _hsic(b, b, debiased)
    return float(_hsic(a, b, debiased) / own.sqrt()) if own > 0 else float("nan")


def principal(x: Tensor) -> Tensor:
    """First principal direction [d] of rows [n, d]."""
    return torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)[2][0]


def neighbours_kept(x: Tensor, y: Tensor, k: int) -> Tensor:
    """For each row, the share of its k nearest rows in x [n, d1] that are so in y [n, d2]; [n]."""
    k = min(k, len(x) - 1)
    near = []
    for m in (x.double(), y.double()):
        apart = torch.cdist(m, m).fill_diagonal_(torch.inf)
        near.append(torch.zeros_like(apart).scatter_(1, apart.argsort(dim=1, stable=True)[:, :k], 1.0))
    return (near[0] * near[1]).sum(1) / k


def _gram(x: Tensor, debiased: bool) -> Tensor:
    if debiased:
        return (x @ x.mT).fill_diagonal_(0)
    centred = x - x.mean(0)
    return centred @ centred.mT


def _hsic(a: Tensor, b: Tensor, debiased: bool) -> Tensor:
    if not debiased:
        return (a * b).sum()
    n = len(a)
    left, right = a.sum(1), b.sum(1)
    return ((a * b).sum() + a.sum() * b.sum() / (n - 1) / (n - 2) - 2 * left @ right / (n - 2)) / (n * (n - 3))


def _of_group(
    arm: Arm, before: Arm, oracle: Arm | None, items: Sequence[Item], group: str, neighbours: int
) -> list[Score]:
    prompts = [i.prompt for i in items]
    then, now = states(before, prompts), states(arm, prompts)
    never = states(oracle, prompts) if oracle is not None else []
    scores, curves = [], []
    for layer in range(min(before.model.n_layers, arm.model.n_layers)):
        x, y = (torch.cat([s.answer[layer] for s in seen]) for seen in (then, now))
        z = torch.cat([s.answer[layer] for s in never]) if never and layer < len(never[0].answer) else None
        few = len(x) < ENOUGH * x.shape[1]
        kept = {"cka to before": linear_cka(x, y, debiased=few)}
        if z is not None:
            kept |= {"cka to oracle": linear_cka(y, z, debiased=few)}
            curves.append((linear_cka(x, z, debiased=few), kept["cka to oracle"]))
        kept |= _principal(x, y) if kin(arm.model, before.model) else {}
        # NaN where nothing varies, as embeddings of the last prompt token do not.
        scores += [Score("", "", group, v, variant=f"{k}, layer {layer}") for k, v in kept.items() if v == v]
        scores += _per_fact(arm, before, items, [s.last[layer] for s in then], [s.last[layer] for s in now], layer, neighbours)  # fmt: skip
    return scores + _erasure(curves, group)


def _principal(x: Tensor, y: Tensor) -> dict[str, float]:
    first = principal(x)
    shift = ((y.double() - x.double()) @ first).mean()
    return {"principal cosine": float((first @ principal(y)).abs()), "principal shift": float(shift)}


def _per_fact(
    arm: Arm, before: Arm, items: Sequence[Item], then: list[Tensor], now: list[Tensor], layer: int, neighbours: int
) -> list[Score]:
    x, y = torch.stack(then).double(), torch.stack(now).double()
    found = {"neighbours kept": neighbours_kept(x, y, neighbours)}
    if kin(arm.model, before.model):
        found["cosine"] = torch.cosine_similarity(x, y)
        found["norm ratio"] = y.norm(dim=1) / x.norm(dim=1)
        spread = (x - x.mean(0)).norm(dim=1).square().mean().sqrt()
        found["move"] = (y - x).norm(dim=1) / spread
    return [
        item.score(float(v), variant=f"{name}, layer {layer}")
        for name, values in found.items()
        for item, v in zip(items, values, strict=True)
    ]


def _erasure(curves: Sequence[tuple[float, float]], group: str) -> list[Score]:
    if not curves:
        return []
    known, found = torch.tensor(curves, dtype=torch.float64).unbind(1)
    known, found = known.nan_to_num(1.0), found.nan_to_num(1.0)
    value = float(weighted_erasure(1 - known, found - known, 0.0))
    why = "" if value == value else "before and oracle have the same geometry"
    return [Score("", "", group, value if value == value else None, variant="cka erasure", reason=why)]
