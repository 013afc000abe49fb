"""SAE feature residual: do the features that told what is to be forgotten still fire, and does anything read them?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evals.alignment import carried_on, real_tokens
from evals.lens import kin
from evals.sampling import Item, direct, measurable, nothing
from excise.arms import Arm
from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Fact
from excise.gradients import frozen
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import patched
from sae.dictionary import Dictionary
from sae.own import of_model
from sae.reading import content, readings
from sae.select import first_order, ranked, shared_out
from sae.statistics import grouped, statistics


@dataclass(frozen=True)
class Seen:
    """What the dictionary sees of each prompt at its content tokens.

    activity, fired: sums of activations and of firings of every feature, [n, n_features]. error, size: squared norms of
    what is left unexplained and of the state less the dictionary's centre, [n].
    """

    activity: Tensor
    fired: Tensor
    error: Tensor
    size: Tensor


@evaluation("intrinsic")
def sae_residual(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    dictionary: str = "",
    features: int = 20,
    most: float = 0.01,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How much the features of the facts to forget still say, as shares of what they said before: 1 unchanged, 0 silent.

    The features are those of `before` that fire most on facts to forget and on less than `most` of the tokens to keep,
    each subject choosing in turn. Variants, per fact: "activity" (sum of activations), "firing" (tokens on which they
    fire), "attribution" (activation times the gradient of the answer's logits, sizes
    summed: what later blocks make of them). "unexplained" is the share of
    variance that the dictionary misses on a fact: where it is far above that of `before` the rest is not to be read.
    "reconstruction alone" and "error alone" are the changes of the answer's log-probability when only that part of the
    state goes on: what is in the error no feature shows. "newcomers" is the activity of features silent before, as a share
    of all. An edit that clamps features of this dictionary at its hook shows what it set: look downstream.
    dictionary: a sae-lens folder or name; the embedded one of an embedded model when empty.
    features: how many features stand for the facts.
    most: share of the tokens to keep on which such a feature may fire.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    keep, _ = measurable(arm.model, direct(facts, groups=("retain", "neighbour"), limit=4 * limit, seed=seed))
    if not items or not keep:
        return nothing(unasked[0][1] if unasked else "it takes facts to forget and facts to keep", group="forget")
    try:
        book = of_model(before.model, dictionary)
    except ExciseError as error:
        return [item.score(None, variant="activity", reason=str(error)) for item in items]
    if not kin(arm.model, before.model):
        why = "trained apart: the dictionary explains another model"
        return [item.score(None, variant="activity", reason=why) for item in items]
    chosen = _concept_features(before, book, items, keep, features, most)
    if not chosen:
        return [
            item.score(None, variant="activity", reason="no feature belongs to these facts alone") for item in items
        ]
    then, now = (_seen(a, book, items) for a in (before, arm))
    scores = [item.score(None, variant="activity", reason=why) for item, why in unasked]
    clamped = "clamped here: what the edit set" if _clamps(arm, book) else ""
    for name in ("activity", "fired"):
        old, new = (getattr(s, name)[:, chosen].sum(1) for s in (then, now))
        scores += _shares(items, old, new, {"fired": "firing"}.get(name, name), clamped)
    scores += _attributions(arm, before, book, items, chosen)
    silent = then.activity.sum(0) == 0
    fresh = now.activity[:, silent].sum(1) / now.activity.sum(1).clamp_min(1e-12)
    scores += [i.score(float(x), variant="newcomers") for i, x in zip(items, fresh, strict=True)]
    scores += [i.score(float(x), variant="unexplained") for i, x in zip(items, now.error / now.size, strict=True)]
    return scores + _dark(arm, book, items) + _kept_unexplained(arm, book, keep)


def residual_share(old: Tensor, new: Tensor) -> Tensor:
    """new / old, NaN where nothing was there before; [n]."""
    return torch.where(old > 0, new / old, torch.full_like(old, torch.nan))


def _concept_features(
    before: Arm, book: Dictionary, items: Sequence[Item], keep: Sequence[Item], count: int, most: float
) -> list[int]:
    subjects = list(dict.fromkeys(i.fact.subject or i.fact.id for i in items))
    groups = [subjects.index(i.fact.subject or i.fact.id) for i in items]
    prompts = [i.prompt for i in items]
    with before.running() as model:
        forget = grouped(model, book, prompts, groups, len(subjects))
        retain = statistics(model, book, [i.prompt for i in keep])
        scores = ranked("sparsity", model, book, prompts, groups, forget, retain, most=most)
    return shared_out(scores, count)


def _seen(arm: Arm, book: Dictionary, items: Sequence[Item]) -> Seen:
    n = len(items)
    activity, fired = (torch.zeros(n, book.n, dtype=torch.float64) for _ in range(2))
    error, size = (torch.zeros(n, dtype=torch.float64) for _ in range(2))
    with arm.running() as model:
        for r in readings(model, [i.prompt for i in items], book.hook):
            for row, i in enumerate(r.index):
                x = r.x[row][r.counts[row]].float()
                a = book.encode(x)
                activity[i], fired[i] = a.double().sum(0).cpu(), (a > 0).double().sum(0).cpu()
                error[i] = (x - book.decode(a, x)).double().square().sum().cpu()
                size[i] = (x - book.centre).double().square().sum().cpu()
    return Seen(activity, fired, error, size)


def _shares(items: Sequence[Item], old: Tensor, new: Tensor, variant: str, detail: str = "") -> list[Score]:
    why = "none of the features spoke on this fact before"
    return [
        item.score(None, variant=variant, reason=why)
        if x.isnan()
        else item.score(float(x), variant=variant, detail=detail)
        for item, x in zip(items, residual_share(old, new), strict=True)
    ]


def _attributions(arm: Arm, before: Arm, book: Dictionary, items: Sequence[Item], chosen: Sequence[int]) -> list[Score]:
    old, new = (_pull(a, book, items)[:, list(chosen)].sum(1) for a in (before, arm))
    return _shares(items, old, new, "attribution")


def _pull(arm: Arm, book: Dictionary, items: Sequence[Item]) -> Tensor:
    """Size of activation times gradient of the answer's logits (less the mean one), summed over tokens, [n, n_features].

    Logits: the log-probability of an answer that is certain has no gradient. Sizes: sums of either sign cancel to next
    to nothing, and a share of that is noise.
    """
    found = torch.zeros(len(items), book.n, dtype=torch.float64)
    with arm.running() as model:
        for index, batch in model.batches([i.prompt for i in items], answers=True, tokens=model.batch_tokens // 4):
            x, slope = _slopes(model, book.hook, batch)
            counts = content(model, batch)
            for row, i in enumerate(index):
                at = counts[row]
                found[i] = first_order(book, x[row][at], slope[row][at]).abs().double().sum(0).cpu()
    return found


def _slopes(model: Model, hook: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The activation at the hook and the gradient there of the answers' mean logits, both [batch, width, d]."""
    kept: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        kept.append(x.detach().requires_grad_(True))
        return kept[0]

    with frozen(model), patched(model, {hook: leaf}), torch.enable_grad():
        logits = model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()
        total = logits.new_zeros(())
        for row in range(len(batch)):
            own = batch.answer_logits(logits, row)
            total = total + (own.gather(-1, batch.answer(row)[:, None])[:, 0] - own.mean(-1)).mean()
        (slope,) = torch.autograd.grad(total, kept)
    return kept[0].detach(), slope


def _dark(arm: Arm, book: Dictionary, items: Sequence[Item]) -> list[Score]:
    """What the answer loses when only the reconstruction, or only the error about the centre, goes on."""
    lost = {"reconstruction alone": torch.zeros(len(items)), "error alone": torch.zeros(len(items))}
    with arm.running() as model:
        for r in readings(model, [i.prompt for i in items], book.hook):
            rebuilt = book.reconstruct(r.x)
            parts = {"reconstruction alone": rebuilt, "error alone": r.x.float() - rebuilt + book.centre}
            where = real_tokens(r.batch)
            plain, _ = carried_on(model, r.batch, {}, where)
            for name, x in parts.items():
                lost[name][r.index] = (carried_on(model, r.batch, {book.hook: x}, where)[0] - plain).float()
    return [
        item.score(float(x), variant=name)
        for name, values in lost.items()
        for item, x in zip(items, values, strict=True)
    ]


def _kept_unexplained(arm: Arm, book: Dictionary, keep: Sequence[Item]) -> list[Score]:
    seen = _seen(arm, book, keep)
    return [i.score(float(x), variant="unexplained") for i, x in zip(keep, seen.error / seen.size, strict=True)]


def _clamps(arm: Arm, book: Dictionary) -> bool:
    changes = arm.edit.changes if arm.edit is not None else ()
    return any(c.site.point == book.hook for c in changes)
