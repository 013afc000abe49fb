"""Unlearning depth score (UDS): do the edited model's inner states still make the original say the answer?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from evals.alignment import Linear, carried_on, fitting_prompts, kept_maps, real_tokens
from evals.lens import kin
from evals.lens_erasure import NO_ORACLE, scored
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import SMALLEST, erased, weighted_erasure
from evals.states import answer_mask
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import read_batch

Positions = Literal["answer", "all"]


@evaluation("intrinsic")
def unlearning_depth(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    oracle: Arm | None = None,
    positions: Positions = "answer",
    tau: float = SMALLEST,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """0 where the arm's states serve the original as well as its own, 1 where they serve it as badly as the oracle's.

    Block by block the states of `before` are replaced by those of the arm from the same text; D2(l) is what the answer
    loses in mean log-probability. D1(l) is the same with the oracle's states. Only blocks with D1 > tau count. UDS,
    arXiv 2605.24614. An edit of the last block alone scores high, so three numbers: "depth", weighted by D1; "depth
    without the last block"; "unweighted". "cost, layer i" is D2, "reference, layer i" is D1.
    An oracle that was trained apart has another basis: its states are first translated by the linear map that fits best
    on facts to keep ("R2 of the map, layer i"), and a block counts only where D1 also exceeds what the translation costs
    such facts on average.
    oracle: the arm that never learned the facts; without it there is no score, only the costs.
    positions: replace states where the answer is predicted, or at all tokens.
    tau: smallest D1 in nats for which a block counts.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    prompts = tuple(i.prompt for i in items)
    others, reason = translation(arm, before, facts, seed)
    if reason:
        return [item.score(None, variant="depth", reason=reason) for item in items]
    found = costs(before, arm, prompts, positions, others)
    scores = _curves(items, found, "cost")
    if oracle is not None:
        others, reason = translation(oracle, before, facts, seed)
    if oracle is None or reason:
        return scores + [item.score(None, variant="depth", reason=reason or NO_ORACLE) for item in items]
    scores += [Score("", "", "", m.r2, variant=f"R2 of the map, layer {i}") for i, m in enumerate(others or ())]
    reference = costs(before, oracle, prompts, positions, others)
    scores += _depths(items, reference, found, _floor(before, oracle, facts, positions, others, tau, limit, seed))
    return scores + [item.score(None, variant="depth", reason=why) for item, why in unasked]


def depths(reference: Tensor, found: Tensor, tau: float | Tensor = SMALLEST) -> dict[str, Tensor]:
    """The three depth scores [n] from D1 and D2 [n, L]; NaN where no block counts."""
    cut = tau[..., :-1] if isinstance(tau, Tensor) else tau
    share = erased(reference, found, tau)
    return {
        "depth": weighted_erasure(reference, found, tau),
        "depth without the last block": weighted_erasure(reference[..., :-1], found[..., :-1], cut),
        "unweighted": share.nanmean(-1),
    }


def translation(source: Arm, before: Arm, facts: Sequence[Fact], seed: int) -> tuple[tuple[Linear, ...] | None, str]:
    """Maps from the source's states after each block to those of `before`: None for an edit of it; why not, if not."""
    if kin(source.model, before.model):
        return None, ""
    if source.model.tokenizer_fingerprint != before.model.tokenizer_fingerprint:
        return None, "the two models have different vocabularies"
    if source.model.n_layers != before.model.n_layers:
        return None, "the two models have different depths: no block of one stands for a block of the other"
    prompts, reason = fitting_prompts(before.model, facts, seed)
    if reason:
        return None, reason
    maps = kept_maps(source, before, prompts)
    return tuple(maps[p] for p in _points(before)), ""


def costs(
    before: Arm, source: Arm, prompts: tuple[Prompt, ...], positions: Positions, maps: Sequence[Linear] | None
) -> Tensor:
    """What each prompt's answer loses with the source's states after each block, [n, n_layers] in nats; kept."""
    key = ("costs", source.model, source.edit, prompts, positions)
    if key not in before.kept:
        found = torch.zeros(len(prompts), before.model.n_layers, dtype=torch.float64)
        points = _points(before)
        for index, batch in before.model.batches(prompts, answers=True, tokens=max(1, before.model.batch_tokens // 4)):
            where = answer_mask(batch) if positions == "answer" else real_tokens(batch, bos=maps is None)
            with source.running() as model:
                seen = read_batch(model, batch.to(model.device), points)
            with before.running() as model:
                plain, _ = carried_on(model, batch, {}, where)
                for layer, point in enumerate(points):
                    value = seen.pop(point)
                    given = {point: value if maps is None else maps[layer](value)}
                    found[index, layer] = plain - carried_on(model, batch, given, where)[0]
        before.kept[key] = found
    return before.kept[key]


def _floor(
    before: Arm,
    oracle: Arm,
    facts: Sequence[Fact],
    positions: Positions,
    maps: Sequence[Linear] | None,
    tau: float,
    limit: int,
    seed: int,
) -> Tensor:
    """tau [n_layers], raised to what the translation costs facts that the oracle knows, where there is one."""
    least = torch.full((before.model.n_layers,), tau, dtype=torch.float64)
    if maps is None:
        return least
    items, _ = measurable(before.model, direct(facts, groups=("retain",), limit=limit, seed=seed))
    kept = costs(before, oracle, tuple(i.prompt for i in items), positions, maps)
    return torch.maximum(least, kept.mean(0)) if items else least


def _points(arm: Arm) -> list[str]:
    return [f"blocks.{i}.hook_resid_post" for i in range(arm.model.n_layers)]


def _depths(items: Sequence[Item], reference: Tensor, found: Tensor, tau: Tensor) -> list[Score]:
    scores = []
    for name, values in depths(reference, found, tau).items():
        why = "the oracle's states carry the answer as well as before"
        scores += [scored(item, x, name, why) for item, x in zip(items, values, strict=True)]
    return scores + _curves(items, reference, "reference")


def _curves(items: Sequence[Item], rows: Tensor, name: str) -> list[Score]:
    return [
        item.score(float(x), variant=f"{name}, layer {i}")
        for item, row in zip(items, rows, strict=True)
        for i, x in enumerate(row)
    ]
