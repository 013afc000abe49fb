"""Patching recovery: where in the edited model is the answer blocked? States of the original are put back, block by block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.alignment import Linear, carried_on, fitting_prompts, kept_maps, real_tokens
from evals.lens import kin
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import SMALLEST
from evals.states import answer_mask
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import read_batch

RULES = ("subject_last", "answer", "all")


@evaluation("intrinsic")
def patching_recovery(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    positions: tuple[str, ...] = ("subject_last", "answer"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How much of the answer's lost log-probability comes back when block i's output is that of `before` at some tokens.

    (patched - arm) / (before - arm), variants "subject_last, layer i" and so on: near 0 below a block and
    near 1 from it on means that the edit acts there and that what follows is intact (at the subject the share falls again
    where later blocks have read it). "entry, subject_last" is the first block at which half comes back, "subject_last,
    mean" the mean over blocks. Facts that lost less than 0.05 nats have nothing to recover. A model that was trained
    apart gets the states of `before` through the linear map that fits best on facts to keep.
    positions: tokens at which states are put back: subject_last, answer (where its tokens are predicted), all.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    unknown = [p for p in positions if p not in RULES]
    if unknown:
        raise ValueError(f"no position rule {unknown[0]!r} here; rules are {', '.join(RULES)}")
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    prompts = [i.prompt for i in items]
    known, left = (_means(a, items) for a in (before, arm))
    lost = known - left
    maps, reason = _maps(arm, before, facts, seed)
    scores = [item.score(None, variant=f"{positions[0]}, mean", reason=why) for item, why in unasked]
    for rule in positions:
        open_ = [i for i, p in enumerate(prompts) if lost[i] > SMALLEST and (rule != "subject_last" or p.subject)]
        patched = _patched(arm, before, [items[i] for i in open_], rule, maps) if open_ and not reason else None
        for i, item in enumerate(items):
            if patched is None or i not in open_:
                why = reason or ("the prompt names no subject" if lost[i] > SMALLEST else "nothing was lost")
                scores.append(item.score(None, variant=f"{rule}, mean", reason=why))
            else:
                scores += _of_item(item, rule, recovery(patched[open_.index(i)], known[i], left[i]))
    return scores


def recovery(patched: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """(patched - after) / (before - after): 0 nothing comes back, 1 all."""
    return (patched - after) / (before - after)


def entry(shares: Tensor) -> int | None:
    """The first block at which the share is at least one half."""
    found = (shares >= 0.5).nonzero()[:, 0].tolist()
    return found[0] if found else None


def _means(arm: Arm, items: Sequence[Item]) -> Tensor:
    answers = arm.answers([i.prompt for i in items])
    return torch.tensor([sum(a.logprobs) / len(a.logprobs) for a in answers], dtype=torch.float64)


def _maps(arm: Arm, before: Arm, facts: Sequence[Fact], seed: int) -> tuple[dict[str, Linear] | None, str]:
    """Maps from the states of `before` to the arm's; None for an edit of it. Why there are none, if there are none."""
    if kin(arm.model, before.model):
        return None, ""
    if arm.model.tokenizer_fingerprint != before.model.tokenizer_fingerprint:
        return None, "the two models have different vocabularies"
    if arm.model.n_layers != before.model.n_layers:
        return None, "the two models have different depths: no block of one stands for a block of the other"
    fitting, reason = fitting_prompts(before.model, facts, seed)
    return (None, reason) if reason else (kept_maps(before, arm, fitting), "")


def _patched(arm: Arm, before: Arm, items: Sequence[Item], rule: str, maps: dict[str, Linear] | None) -> Tensor:
    """Mean log-probability of each answer with the states of `before` after each block, [n, n_layers]."""
    points = [f"blocks.{i}.hook_resid_post" for i in range(arm.model.n_layers)]
    found = torch.zeros(len(items), len(points), dtype=torch.float64)
    prompts = [i.prompt for i in items]
    for index, batch in arm.model.batches(prompts, answers=True, tokens=max(1, arm.model.batch_tokens // 4)):
        where = _where(batch, rule, bos=maps is None)
        with before.running() as model:
            seen = read_batch(model, batch.to(model.device), points)
        with arm.running() as model:
            for layer, point in enumerate(points):
                value = seen.pop(point)
                put = {point: value if maps is None else maps[point](value)}
                found[index, layer] = carried_on(model, batch, put, where)[0]
    return found


def _where(batch: Batch, rule: str, *, bos: bool) -> Tensor:
    if rule == "answer":
        return answer_mask(batch)
    return real_tokens(batch, bos=bos) if rule == "all" else batch.where(rule).to(batch.ids.device)


def _of_item(item: Item, rule: str, shares: Tensor) -> list[Score]:
    scores = [item.score(float(x), variant=f"{rule}, layer {i}") for i, x in enumerate(shares)]
    scores.append(item.score(float(shares.clamp(0, 1).mean()), variant=f"{rule}, mean"))
    first = entry(shares)
    why = "" if first is not None else "half of it never comes back"
    return [*scores, item.score(None if first is None else float(first), variant=f"entry, {rule}", reason=why)]
