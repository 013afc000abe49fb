"""Linear recovery: if the edited model's states are a linear image of the original's, the knowledge is all there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from evals.alignment import Linear, carried_on, fitting_prompts, kept_maps, map_points, real_tokens
from evals.lens_erasure import NO_ORACLE
from evals.sampling import Item, direct, measurable, nothing
from evals.shares import halves, other_half_best, recovered_share
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import read_batch

ONE_SUBJECT = "one subject only: no other half to choose the layer by"


@dataclass(frozen=True)
class Carried:
    """probability, exact: [n, n_points]; maps: one per point."""

    probability: Tensor
    exact: Tensor
    maps: tuple[Linear, ...]


@evaluation("intrinsic")
def linear_recovery(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    oracle: Arm | None = None,
    layers: tuple[int, ...] = (),
    ridge: float = 1e-3,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """Answer probability when `before` reads on from the arm's states, translated by a linear map that saw no forget fact.

    The map is a ridge regression from the arm's states to those of `before` over all tokens of facts to keep. Feature
    mapping: the translated states of the whole text stand after block i and the blocks of `before` go on ("probability,
    layer i", "answered, layer i"). Head recovery: the final norm's output is translated and the head of `before` reads it
    ("probability, head"), which is the same as refitting the head. "probability" and "answered" are those of the point,
    out of `layers` and the head, that recovers most in the other half of the subjects; "recovered share" places that
    probability between the oracle (0) and before (1), each put through the same. Early blocks do not count: below an
    edit every state is as it was, and the blocks of `before` find the fact anew. "R2, layer i" is the fit on held-out
    texts. After OPC (arXiv 2507.07754), without training.
    oracle: the arm that never learned the facts; without it there is no recovered share.
    layers: blocks that may be chosen, after those that bring the fact in; the later half when empty.
    ridge: penalty relative to the mean eigenvalue of the states' covariance.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more, and the halves.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    if arm.model.tokenizer_fingerprint != before.model.tokenizer_fingerprint:
        return [
            i.score(None, variant="probability", reason="the two models have different vocabularies") for i in items
        ]
    fitting, reason = fitting_prompts(before.model, facts, seed)
    names = _names(arm, before)
    if reason or not names:
        why = reason or "the two models have different depths: no block of one stands for a block of the other"
        return [i.score(None, variant="probability", reason=why) for i in items]
    prompts = tuple(i.prompt for i in items)
    found = _carried(arm, before, prompts, tuple(fitting), names, ridge)
    scores = _by_point(items, found, list(names))
    for name, m in zip(names, found.maps, strict=True):
        r2, why = (m.r2, "") if isfinite(m.r2) else (None, "too few prompts to hold some out of the fit")
        scores.append(Score("", "", "", r2, variant=f"R2, {name}", reason=why))
    late = layers or range(arm.model.n_layers // 2, arm.model.n_layers)
    open_ = [i for i, name in enumerate(names) if name == "head" or i in late]
    best = other_half_best(found.probability[:, open_].numpy(), halves([i.fact.subject for i in items], seed))
    chosen = [open_[i] if i >= 0 else -1 for i in best]
    both = [] if oracle is None else [before, oracle]
    references = [_carried(a, before, prompts, tuple(fitting), names, ridge) for a in both]
    for row, (item, layer) in enumerate(zip(items, chosen, strict=True)):
        scores += _headline(item, row, layer, found, references, list(names))
    return scores + [item.score(None, variant="probability", reason=why) for item, why in unasked]


def _names(arm: Arm, before: Arm) -> dict[str, str]:
    """Variant -> point; empty when the two have no points in common."""
    if arm.model.n_layers != before.model.n_layers:
        return {}
    names = [f"layer {i}" for i in range(arm.model.n_layers)] + ["head"]
    return dict(zip(names, map_points(before.model), strict=False))


def _carried(
    source: Arm,
    before: Arm,
    prompts: tuple[Prompt, ...],
    fitting: tuple[Prompt, ...],
    names: dict[str, str],
    ridge: float,
) -> Carried:
    """What `before` says when it reads on from the source's translated states; kept, since every arm needs the references."""
    key = ("carried", source.model, source.edit, prompts, fitting, ridge)
    if key in before.kept:
        found: Carried = before.kept[key]
        return found
    points = list(names.values())
    maps = kept_maps(source, before, fitting, ridge=ridge)
    logp, exact = (torch.zeros(len(prompts), len(points), dtype=torch.float64) for _ in range(2))
    for index, batch in before.model.batches(prompts, answers=True, tokens=max(1, before.model.batch_tokens // 4)):
        where = real_tokens(batch)
        with source.running() as model:
            seen = read_batch(model, batch.to(model.device), points)
        with before.running() as model:
            for column, point in enumerate(points):
                put = {point: maps[point](seen.pop(point))}
                logp[index, column], exact[index, column] = carried_on(model, batch, put, where)
    found = before.kept[key] = Carried(logp.exp(), exact, tuple(maps[p] for p in points))
    return found


def _by_point(items: Sequence[Item], found: Carried, names: Sequence[str]) -> list[Score]:
    return [
        item.score(float(values[row, column]), variant=f"{what}, {name}")
        for row, item in enumerate(items)
        for column, name in enumerate(names)
        for what, values in (("probability", found.probability), ("answered", found.exact))
    ]


def _headline(
    item: Item, row: int, layer: int, found: Carried, references: Sequence[Carried], names: Sequence[str]
) -> list[Score]:
    if layer < 0:
        return [item.score(None, variant=v, reason=ONE_SUBJECT) for v in ("probability", "answered", "recovered share")]
    scores = [
        item.score(float(values[row, layer]), variant=what, detail=names[layer])
        for what, values in (("probability", found.probability), ("answered", found.exact))
    ]
    if not references:
        return [*scores, item.score(None, variant="recovered share", reason=NO_ORACLE)]
    known, never = (float(r.probability[row, layer]) for r in references)
    share = recovered_share(float(found.probability[row, layer]), known, never)
    why = "" if share is not None else f"before {known:.2f} and oracle {never:.2f} are too close to place it between"
    return [*scores, item.score(share, variant="recovered share", detail=names[layer], reason=why)]
