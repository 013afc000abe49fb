"""Privacy: can one tell from the losses that a text was trained on? Membership inference on the statements of facts."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from evals.sampling import Item, measurable, nothing, sample
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

# Below this the variance of log-probabilities says nothing (as in open-unlearning's code).
SMALLEST = 1e-6


@dataclass(frozen=True)
class Read:
    """A text as a model reads it: log-probability of each token but the first, and the same in standard deviations."""

    logprobs: Tensor
    standard: Tensor


@evaluation("behavioural")
def privacy(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    holdout: tuple[str, ...] = (),
    k: float = 0.4,
    forms: tuple[str, ...] = ("statement",),
    limit: int = 64,
    seed: int = 0,
) -> list[Score]:
    """Four membership scores of each forget statement and of as many texts never trained on; larger: less a member.

    Variants "loss" (mean nats per token), "zlib" (loss per byte of the compressed text), "min-k" (mean of the share k of
    least likely tokens; arXiv 2310.16789) and "min-k++" (the same of standardised log-probabilities; 2404.02936). The
    members' group is "forget", the others' is "unknown"; AUC and PrivLeak (MUSE, 2407.06460) are made of both by
    `excise.aggregates`. Without `holdout` each statement is told again of someone unknown, word by word, so that nothing
    but the name sets the two apart and a model that never met either is at 0.5.
    holdout: texts like the statements that the model was never trained on.
    k: share of tokens; 0.4 in MUSE and TOFU, 0.2 in RWKU.
    forms: forms whose prompts, with their answers, are the statements.
    limit: most statements; 0 for all.
    seed: which statements are taken when there are more, and whom their counterparts tell of.
    """
    items, unasked = measurable(arm.model, sample(facts, groups=("forget",), forms=forms, limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else f"no forget fact has a form of {', '.join(forms)}", variant="loss")
    others = [
        Item(Fact(f"holdout {i}", "", "", (Prompt(t, ""),), group="unknown"), Prompt(t, ""))
        for i, t in enumerate(holdout)
    ]
    others = others or twins(items, facts, seed)
    if not others:
        reason = "no text that was never trained on: give `holdout`, or facts of the group unknown that name a subject"
        return [item.score(None, variant="loss", reason=reason) for item in items]
    told = [*items, *others]
    scores = []
    for item, text, read in zip(told, map(_told, told), reads(arm, [_told(i) for i in told]), strict=True):
        if not len(read.logprobs):
            scores.append(item.score(None, variant="loss", reason="a text of one token: nothing predicts it"))
            continue
        scores += [item.score(value, variant=variant) for variant, value in membership(text, read, k).items()]
    return scores + [item.score(None, variant="loss", reason=reason) for item, reason in unasked]


def membership(text: str, read: Read, k: float = 0.4) -> dict[str, float]:
    """The four scores of one text, each larger for what looks less like a member."""
    loss = -float(read.logprobs.mean())
    return {
        "loss": loss,
        "zlib": loss / len(zlib.compress(text.encode())),
        "min-k": min_k(read.logprobs, k),
        "min-k++": min_k(read.standard, k),
    }


def min_k(values: Tensor, k: float) -> float:
    """Minus the mean of the lowest share k of the values, at least one of them."""
    count = max(1, int(k * len(values)))
    return -float(values.sort().values[:count].mean())


def standardised(logits: Tensor, ids: Tensor) -> Read:
    """What a model's logits [n, vocab] say of the tokens [n] that followed.

    standard: (log p - mean) / deviation, mean and deviation of log p under the prediction itself.
    """
    logp = logits.log_softmax(-1)
    p = logp.exp()
    mean = (p * logp).nan_to_num(0.0).sum(-1)
    variance = (p * (logp - mean[:, None]) ** 2).nan_to_num(0.0).sum(-1).clamp_min(SMALLEST)
    picked = logp.gather(-1, ids[:, None])[:, 0]
    return Read(picked.cpu(), ((picked - mean) / variance.sqrt()).cpu())


def reads(arm: Arm, texts: Sequence[str]) -> list[Read]:
    """Each text under the arm's edit, one forward pass each; a text of one token alone has nothing to read."""
    found: dict[int, Read] = {}
    with arm.running() as model:
        # A row's probabilities are held beside the logits: half a batch.
        for index, batch in model.batches(list(texts), tokens=max(1, model.batch_tokens // 2)):
            found |= zip(index, _reads(model, batch), strict=True)
    return [found[i] for i in range(len(texts))]


def twins(items: Sequence[Item], facts: Sequence[Fact], seed: int = 0) -> list[Item]:
    """Each statement told of someone unknown, word by word; nothing where nobody is unknown."""
    names = sorted({f.subject for f in facts if f.group == "unknown" and f.subject}, key=lambda n: _hash(seed, n))
    found = []
    for i, item in enumerate(items):
        if names and item.prompt.subject:
            name = names[i % len(names)]
            fact = replace(item.fact, id=f"{item.fact.id} of {name}", subject=name, group="unknown")
            text = item.prompt.text.replace(item.prompt.subject, name)
            found.append(Item(fact, replace(item.prompt, text=text, subject=name)))
    return found


def _told(item: Item) -> str:
    return f"{item.prompt.text} {item.prompt.answer}.".strip() if item.prompt.answer else item.prompt.text


def _reads(model: Model, batch: Batch) -> list[Read]:
    logits = model.logits(batch)
    return [standardised(logits[row, : n - 1], batch.ids[row, 1:n]) for row, n in enumerate(batch.lengths)]


def _hash(seed: int, text: str) -> str:
    return hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).hexdigest()
