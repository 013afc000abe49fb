"""Lens erasure: how much of what the inner layers say of the answer is gone, measured from knowing to never having known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.lens import kin
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import SMALLEST, erased, weighted_erasure
from evals.states import states
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.lens import decode
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

NO_ORACLE = "needs an oracle: a model that never learned the facts is the zero of this scale"


@evaluation("intrinsic")
def lens_erasure(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    oracle: Arm | None = None,
    groups: tuple[str, ...] = ("forget",),
    tau: float = SMALLEST,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How far each layer's reading of the answer has fallen, as a share of how far it is lower in the oracle.

    k(l) is the mean log-probability of the answer's tokens read from block l through the final norm and head of
    `before` (a model trained apart from it is read by its own, see `lens`). Variants: "erasure", the shares weighted by
    k_before - k_oracle over the layers where that exceeds `tau` (0 intact, 1 as the oracle; arXiv 2605.24614, code);
    "erased, layer i"; "drop, layer i", k_before - k_arm in nats, and "mean drop" over layers, which need no oracle.
    oracle: the arm that never learned the facts; without it only the drops are measured.
    groups: groups of facts to ask about.
    tau: smallest difference in nats for which a layer counts.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=groups, limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else f"no facts of the groups {', '.join(groups)}")
    prompts = [i.prompt for i in items]
    known = answer_curves(before, prompts, before.model)
    drop = known - answer_curves(arm, prompts, before.model)
    scores = [s for i, item in enumerate(items) for s in _drops(item, drop[i])]
    if oracle is None:
        return scores + [item.score(None, variant="erasure", reason=NO_ORACLE) for item in items]
    reference = known - answer_curves(oracle, prompts, before.model)
    share, whole = erased(reference, drop, tau), weighted_erasure(reference, drop, tau)
    for i, item in enumerate(items):
        scores.append(scored(item, whole[i], "erasure", "the oracle's layers read the answer as well as before"))
        scores += [scored(item, x, f"erased, layer {layer}") for layer, x in enumerate(share[i]) if not x.isnan()]
    return scores + [item.score(None, variant="erasure", reason=reason) for item, reason in unasked]


def answer_curves(arm: Arm, prompts: Sequence[Prompt], decoder: Model) -> Tensor:
    """Mean log-probability of each prompt's answer tokens read from every block, [n, n_layers] in float64.

    decoder: whose norm and head read the states; a model that is not of its kin is read by its own.
    """
    reader = decoder if kin(arm.model, decoder) else arm.model
    found = []
    rows = arm.model.tokenised(prompts, answers=True)
    for row, seen in zip(rows, states(arm, prompts), strict=True):
        gold = torch.tensor(row.ids[row.start :]).repeat(len(seen.answer))
        logp = decode(reader, seen.answer.flatten(0, 1)).double().log_softmax(-1)
        found.append(logp.gather(-1, gold[:, None])[:, 0].view(seen.answer.shape[:2]).mean(1))
    return torch.stack(found)


def scored(item: Item, value: Tensor | float, variant: str, reason: str = "") -> Score:
    """The item's score; NaN becomes no value with the reason."""
    number = float(value)
    return item.score(None, variant=variant, reason=reason) if number != number else item.score(number, variant=variant)


def _drops(item: Item, drop: Tensor) -> list[Score]:
    layers = [item.score(float(x), variant=f"drop, layer {layer}") for layer, x in enumerate(drop)]
    return [*layers, item.score(float(drop.mean()), variant="mean drop")]
