"""Fisher-masked erasure: are the weights as sensitive to the facts as those of a model that never learned them?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.lens_erasure import NO_ORACLE
from evals.sampling import direct, measurable, nothing
from evals.shares import weighted_erasure
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.gradients import block_matrices, mean_gradients, sweeps
from excise.registry import evaluation
from excise.scores import Score

# Weights whose gradients are held at a time, per arm (128 MB in float32).
HELD = 2**25


@evaluation("intrinsic")
def fisher_erasure(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    oracle: Arm | None = None,
    shares: tuple[float, ...] = (1e-4, 1e-3, 1e-2),
    limit: int = 16,
    seed: int = 0,
) -> list[Score]:
    """How far the weights' sensitivity to the facts has risen from that of `before` (0) to that of the oracle (1).

    F is the mean over facts of the squared gradient of the answer's loss, prompt by prompt: a model that never learned a
    fact is more sensitive to it. In each block the mask is the top share p of the weights by F_oracle - F_before, and the
    excess of a model is how far its mean F there lies below the oracle's; the erasure is 1 - excess / excess of before,
    weighted by the latter over the blocks (arXiv 2605.24614, code). One number for all facts, variants "erasure, 0.001" and
    so on. Robust to relearning in that paper (0.945), not to quantisation (0.57). It needs backward passes: not in the
    default set.
    oracle: the arm that never learned the facts; without it there is no score.
    shares: shares p of a block's weights.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    variants = [f"erasure, {p:g}" for p in shares]
    if oracle is None:
        return [Score("", "", "forget", None, variant=v, reason=NO_ORACLE) for v in variants]
    layers = range(before.model.n_layers)
    names = block_matrices(before.model, layers)
    shapes = [[m.weight(n).shape for n in block_matrices(m, range(m.n_layers))] for m in (a.model for a in (before, arm, oracle))]  # fmt: skip
    if shapes.count(shapes[0]) < 3:
        return [Score("", "", "forget", None, variant=v, reason="the models have other shapes") for v in variants]
    prompts = [i.prompt for i in items]
    excess: dict[str, list[tuple[float, float]]] = {v: [] for v in variants}
    for layer in layers:
        own = [n for n in names if before.model.names.weight(n).layer == layer]
        known, found, never = _fisher(before, prompts, own), _fisher(arm, prompts, own), _fisher(oracle, prompts, own)
        for variant, p in zip(variants, shares, strict=True):
            excess[variant].append(masked_excess(known, found, never, p))
    return [_score(variant, rows) for variant, rows in excess.items()]


def masked_excess(before: Tensor, after: Tensor, oracle: Tensor, share: float) -> tuple[float, float]:
    """How far the mean sensitivity of before and after lies below the oracle's, on the weights where it is most so.

    All [n_weights]; share: of the weights, at least one.
    """
    gap = (oracle - before).clamp_min(0)
    at = gap.topk(max(1, round(share * len(gap)))).indices
    top = float(oracle[at].double().mean())
    return top - float(before[at].double().mean()), top - float(after[at].double().mean())


def _score(variant: str, rows: Sequence[tuple[float, float]]) -> Score:
    known, left = torch.tensor(rows, dtype=torch.float64).unbind(1)
    value = float(weighted_erasure(known, known - left, 0.0))
    if value != value:
        why = "the oracle is nowhere more sensitive than the model before"
        return Score("", "", "forget", None, variant=variant, reason=why)
    return Score("", "", "forget", value, variant=variant)


def _fisher(arm: Arm, prompts: Sequence[Prompt], names: Sequence[str]) -> Tensor:
    """Mean squared gradient of every weight of the matrices, flat; zeros where no token went."""
    parts: dict[str, Tensor] = {}
    with arm.running() as model:
        for some in sweeps(model, names, HELD):
            parts |= mean_gradients(model, prompts, some, square=True, tokens=model.batch_tokens // 4)
    flat = [
        parts.get(n, torch.zeros_like(model.weight(n).detach(), dtype=torch.float32)).flatten().cpu() for n in names
    ]
    return torch.cat(flat)
