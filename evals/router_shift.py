"""Router shift: did the edit send the tokens of what is to be forgotten to other experts, rather than change an expert?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from evals.alignment import real_tokens
from evals.lens import kin
from evals.sampling import Item, direct, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.routers import expert_layers, routed
from excise.scores import Score

DENSE = "a dense model: it routes nothing"
# Per block: mean probability of each expert, and how often it is chosen, both [n, n_experts].
Routing = dict[int, tuple[Tensor, Tensor]]


@evaluation("intrinsic")
def router_shift(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How differently each fact's tokens are routed than before. Mixture-of-Experts models only.

    Variants, means over the blocks and each with ", layer i": "divergence", Jensen-Shannon in bits between the mean
    expert distributions of a prompt and its answer (0 same, 1 disjoint); "overlap", the share of choices that go to the
    same experts; "load entropy" in bits of where the tokens go. A divergence that is high on facts to forget alone, with
    experts unchanged, means that the knowledge still lies in the old expert: see `expert_rollback`.
    groups: groups whose facts are read.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=groups, limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else f"no facts of the groups {', '.join(groups)}")
    reason = refusal(arm, before)
    if reason:
        return [item.score(None, variant="divergence", reason=reason) for item in items]
    then, now = (routing(a, items) for a in (before, arm))
    found: dict[str, list[Tensor]] = {"divergence": [], "overlap": [], "load entropy": []}
    for layer in then:
        (p, chosen), (q, others) = then[layer], now[layer]
        found["divergence"].append(divergence(p, q))
        found["overlap"].append(overlap(chosen, others))
        found["load entropy"].append(entropy(others))
    scores = [item.score(None, variant="divergence", reason=why) for item, why in unasked]
    for variant, rows in found.items():
        for layer, values in zip(then, rows, strict=True):
            scores += [
                i.score(float(x), variant=f"{variant}, layer {layer}") for i, x in zip(items, values, strict=True)
            ]
        means = torch.stack(rows).mean(0)
        scores += [i.score(float(x), variant=variant) for i, x in zip(items, means, strict=True)]
    return scores


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in bits of distributions in the last axis: 0 equal, 1 disjoint."""
    middle = (p + q) / 2
    return ((_relative(p, middle) + _relative(q, middle)) / 2).clamp(0, 1)


def overlap(chosen: Tensor, others: Tensor) -> Tensor:
    """Share of choices that go to the same experts, from counts [.., n_experts]."""
    return torch.minimum(chosen, others).sum(-1) / chosen.sum(-1)


def entropy(counts: Tensor) -> Tensor:
    """Entropy in bits of counts [.., n_experts]."""
    p = counts / counts.sum(-1, keepdim=True)
    return -torch.where(p > 0, p * p.clamp_min(1e-300).log2(), torch.zeros_like(p)).sum(-1)


def refusal(arm: Arm, before: Arm) -> str:
    """Why routing cannot be compared; "" when it can."""
    if not expert_layers(arm.model):
        return DENSE
    return "" if kin(arm.model, before.model) else "trained apart: expert i of one model is not expert i of the other"


def routing(arm: Arm, items: Sequence[Item]) -> Routing:
    """Where the tokens of each prompt and its answer go."""
    model, n = arm.model, len(items)
    layers, experts = expert_layers(model), model.names.n_experts
    found = {layer: tuple(torch.zeros(n, experts, dtype=torch.float64) for _ in range(2)) for layer in layers}
    with arm.running(), torch.no_grad():
        for index, batch in model.batches([i.prompt for i in items], answers=True):
            real = real_tokens(batch).cpu()
            with routed(model, {layer: partial(_add, into, index, real) for layer, into in found.items()}):
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
    return {layer: (a, b) for layer, (a, b) in found.items()}


def _add(
    into: tuple[Tensor, ...], rows: list[int], real: Tensor, logits: Tensor, weights: Tensor, chosen: Tensor
) -> None:
    """Put in mean probabilities and counts of choices over the real tokens of some rows; real: [n_rows, width]."""
    odds = logits.detach().double().softmax(-1).view(*real.shape, -1).cpu()
    picks = torch.zeros_like(odds).flatten(0, 1).scatter_(1, chosen.detach().cpu().long(), 1.0).view_as(odds)
    counted = real[..., None].double()
    into[0][rows] = (odds * counted).sum(1) / counted.sum(1)
    into[1][rows] = (picks * counted).sum(1)


def _relative(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q.clamp_min(1e-300)).clamp_min(1e-300).log2(), torch.zeros_like(p)).sum(-1)
