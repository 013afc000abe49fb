"""Drift: how far the model has moved where it should not have moved at all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.sampling import measurable, nothing, sample
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def drift(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    texts: tuple[str, ...] = (),
    groups: tuple[str, ...] = ("retain", "neighbour"),
    forms: tuple[str, ...] = ("statement", "question"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """Loss on general text, its change relative to `before`, and KL(before || arm) per token on prompts to keep.

    Variants: "loss" and "kl" in nats per token; "relative change" of the loss, where 0.01 is one per cent worse; "kl
    back", KL(arm || before), large where the arm says what before never would; "kl, worst token" of each prompt, since
    a mean hides a single token that is wrecked.
    texts: general texts; when empty, the facts of group "general".
    groups: groups whose prompts the divergence is taken on.
    forms: forms of those prompts; all when empty.
    limit: most texts, and most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    return [
        *_text_loss(arm, facts, before, texts, limit, seed),
        *_divergence(arm, facts, before, groups, forms, limit, seed),
    ]


def kl(reference: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) in nats of each position, from logits [n, vocab]."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _text_loss(
    arm: Arm, facts: Sequence[Fact], before: Arm, texts: tuple[str, ...], limit: int, seed: int
) -> list[Score]:
    if texts:
        chosen = list(texts[:limit] if limit else texts)
        blank = [Score(f"text {i}", "", "general", None, form="text") for i in range(len(chosen))]
        now, then = arm.losses(chosen), before.losses(chosen)
    else:
        items, _ = measurable(arm.model, sample(facts, groups=("general",), limit=limit, seed=seed))
        blank = [item.score(None) for item in items]
        prompts = [item.prompt for item in items]
        now, then = _answer_losses(arm, prompts), _answer_losses(before, prompts)
    if not blank:
        return nothing('no general text: give `texts`, or facts of group "general"', group="general", variant="loss")
    # Relative to the mean loss: a text of nearly no loss would otherwise outweigh all others.
    scale = sum(then) / len(then)
    scores = [_filled(score, loss, "loss") for score, loss in zip(blank, now, strict=True)]
    if scale > 0:
        scores += [_filled(s, (a - b) / scale, "relative change") for s, a, b in zip(blank, now, then, strict=True)]
    return scores


def _filled(score: Score, value: float, variant: str) -> Score:
    return Score(score.fact, score.subject, score.group, value, score.form, score.held_out, variant)


def _answer_losses(arm: Arm, prompts: Sequence[Prompt]) -> list[float]:
    return [-sum(a.logprobs) / len(a.logprobs) for a in arm.answers(prompts)]


def _divergence(
    arm: Arm, facts: Sequence[Fact], before: Arm, groups: tuple[str, ...], forms: tuple[str, ...], limit: int, seed: int
) -> list[Score]:
    chosen = sample(facts, groups=groups, forms=forms, limit=limit, seed=seed)
    items, _ = measurable(arm.model, chosen or sample(facts, groups=groups, limit=limit, seed=seed))
    if not items:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="kl")
    if arm.model is not before.model and arm.model.tokenizer_fingerprint != before.model.tokenizer_fingerprint:
        return nothing("the two models have different vocabularies", variant="kl")
    scores = []
    # Two models' logits are held at once, and an edit's matrices: a third of a batch of each.
    third = max(1, before.model.batch_tokens // 3)
    for index, batch in before.model.batches([item.prompt for item in items], answers=True, tokens=third):
        for i, values in zip(index, _batch_kl(before, arm, batch), strict=True):
            scores += [items[i].score(value, variant=variant) for variant, value in values.items()]
    return scores


def _batch_kl(before: Arm, arm: Arm, batch: Batch) -> list[dict[str, float]]:
    with before.running() as model:
        reference = model.logits(batch)
    with arm.running() as model:
        other = model.logits(batch.to(model.device)).to(reference.device)
    found = []
    # Row by row: the log-softmax of whole batches would double what is held.
    for a, b, m in zip(reference, other, batch.mask.bool(), strict=True):
        there = kl(a[m], b[m])
        back = float(kl(b[m], a[m]).mean())
        found.append({"kl": float(there.mean()), "kl back": back, "kl, worst token": float(there.max())})
    return found
