"""Expert rollback: does one expert's old weight, or another way through the experts, bring the answer back?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from evals.router_shift import refusal
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import SMALLEST
from evals.weight_anatomy import changed
from excise.arms import Arm
from excise.facts import Fact
from excise.gradients import answer_losses
from excise.model import Model
from excise.registry import evaluation
from excise.routers import expert_layers, routed
from excise.scores import Score

# (block, expert); expert -1 is the router.
Place = tuple[int, int]


@evaluation("intrinsic")
def expert_rollback(
    arm: Arm, facts: Sequence[Fact], *, before: Arm, most: int = 32, limit: int = 16, seed: int = 0
) -> list[Score]:
    """What comes back of the answer with one expert's weights as they were, and with all tokens sent to one expert.

    Mixture-of-Experts models only. Variants: "best rollback", the largest share of the lost log-probability that the old
    weights of one changed expert (or router) bring back, and "rollback, layer i, expert e" each; "forced routing", the
    answer's log-probability under the best single expert of a single block, where every token of that block goes to it,
    less the plain one: what a mere change of route hides. Read the latter against before and the oracle: some route is
    always better than the plain one by chance.
    most: changed experts that are put back, those of most energy first.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    if not expert_layers(arm.model):
        return [i.score(None, variant="best rollback", reason="a dense model: it has no experts") for i in items]
    plain = _answers(arm.model, arm, items)
    scores = [item.score(None, variant="best rollback", reason=why) for item, why in unasked]
    with arm.running() as model:
        best = torch.stack([_forced(model, layer, e, items) for layer in expert_layers(model) for e in range(model.names.n_experts)])  # fmt: skip
    scores += [
        i.score(float(x), variant="forced routing") for i, x in zip(items, best.max(0).values - plain, strict=True)
    ]
    return scores + _rollbacks(arm, before, items, plain, most)


def _rollbacks(arm: Arm, before: Arm, items: Sequence[Item], plain: Tensor, most: int) -> list[Score]:
    variant = "best rollback"
    reason = refusal(arm, before) or (
        "the edit lives in hooks: every expert is as it was" if arm.mode == "hook" else ""
    )
    if reason:
        return [i.score(None, variant=variant, reason=reason) for i in items]
    known = _answers(before.model, before, items)
    lost = known - plain
    places = _places(arm, before, most)
    if not places or not bool((lost > SMALLEST).any()):
        why = "nothing was lost" if places else "no expert was changed"
        return [i.score(None, variant=variant, reason=why) for i in items]
    shares = {}
    for place, found in _put_back(arm, places, items):
        shares[place] = (found - plain) / lost
    scores = []
    for row, item in enumerate(items):
        if lost[row] <= SMALLEST:
            scores.append(item.score(None, variant=variant, reason="nothing was lost"))
            continue
        own = {_named(place): float(x[row]) for place, x in shares.items()}
        winner = max(own, key=lambda name: own[name])
        scores.append(item.score(own[winner], variant=variant, detail=winner))
        scores += [item.score(x, variant=f"rollback, {name}") for name, x in own.items()]
    return scores


def _places(arm: Arm, before: Arm, most: int) -> dict[Place, dict[str, Tensor]]:
    """The old weights of each changed expert or router, those of most energy first."""
    deltas = changed(arm, before)
    with before.held() as held:
        old = {n: held.model.weight(n).detach().clone() for n in deltas}
    found: dict[Place, dict[str, Tensor]] = {}
    for name in deltas:
        weight = before.model.names.weight(name)
        if weight.layer is not None and (weight.expert is not None or name.endswith("W_router")):
            place = (weight.layer, -1 if weight.expert is None else weight.expert)
            found.setdefault(place, {})[name] = old[name]
    order = sorted(found, key=lambda p: -sum(float(deltas[n].square().sum()) for n in found[p]))
    return {place: found[place] for place in order[:most]}


def _put_back(
    arm: Arm, places: dict[Place, dict[str, Tensor]], items: Sequence[Item]
) -> Iterator[tuple[Place, Tensor]]:
    """Mean log-probability of each answer with the old weights of one place at a time; all are restored to the bit."""
    with arm.held() as held:
        for place, old in places.items():
            edited = {n: held.model.weight(n).detach().clone() for n in old}
            try:
                _write(held.model, old)
                yield place, _means(held.model, items)
            finally:
                _write(held.model, edited)


@torch.no_grad()
def _write(model: Model, weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        model.weight(name).copy_(value)


def _forced(model: Model, layer: int, expert: int, items: Sequence[Item]) -> Tensor:
    with forced(model, layer, expert):
        return _means(model, items)


def forced(model: Model, layer: int, expert: int) -> AbstractContextManager[None]:
    """A context in which every token of a block goes to one expert, with the weight that all its experts had together."""

    def look(logits: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        new, index = torch.zeros_like(weights), chosen.clone()
        new[..., 0], index[..., 0] = weights.sum(-1), expert
        return new, index

    return routed(model, {layer: look})


def _answers(model: Model, arm: Arm, items: Sequence[Item]) -> Tensor:
    with arm.running():
        return _means(model, items)


@torch.no_grad()
def _means(model: Model, items: Sequence[Item]) -> Tensor:
    """Mean log-probability of each answer's tokens, [n] in float64."""
    found = torch.zeros(len(items), dtype=torch.float64)
    for index, batch in model.batches([i.prompt for i in items], answers=True):
        found[index] = -answer_losses(model, batch).double().cpu()
    return found


def _named(place: Place) -> str:
    return f"layer {place[0]}, {'router' if place[1] < 0 else f'expert {place[1]}'}"
