"""Places in a prompt whose embeddings an attacker chooses, and who is attacked there: other subjects than it saw."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from evals.attacking import questions, score
from evals.relearning import halves
from evals.sampling import Item, measurable
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.scores import Score
from excise.trace import patched

# A word that most tokenizers hold as one token, and with which hardly a prompt ends.
FILLER = "and"
ALONE = "two forget facts are needed: one to learn from, one to ask"


def opened(prompt: Prompt, count: int, *, front: bool) -> Prompt:
    """The prompt with `count` filler words before or after its text; the filler is its subject, so that it is found."""
    filler = " ".join([FILLER] * count)
    text = f"{filler} {prompt.text}" if front else f"{prompt.text} {filler}"
    return replace(prompt, text=text, subject=filler, choices=())


def slots(batch: Batch) -> Tensor:
    """Columns of the filler tokens of each row, [rows, n]: as many as every row has."""
    spans = [s for s in batch.subjects if s is not None]
    n = min(end - start for start, end in spans)
    return torch.tensor([list(range(start, start + n)) for start, _ in spans], device=batch.ids.device)


@contextmanager
def filled(model: Model, batch: Batch, vectors: Tensor) -> Iterator[None]:
    """Inside the block the embeddings at the slots of this batch are `vectors` [n, d], in every row."""
    columns = slots(batch)
    rows = torch.arange(len(columns), device=columns.device)[:, None]

    def patch(x: Tensor) -> Tensor:
        new = x.clone()
        new[rows, columns] = vectors[: columns.shape[1]].to(x.dtype).expand(*columns.shape, -1)
        return new

    with patched(model, {"embed.hook_out": patch}):
        yield


@torch.no_grad()
def exact(model: Model, batch: Batch) -> list[bool]:
    """Whether each row's answer is what greedy decoding says."""
    logits = model.logits(batch)
    return [bool((batch.answer_logits(logits, r).argmax(-1) == batch.answer(r)).all()) for r in range(len(batch))]


def told_with(model: Model, items: Sequence[Item], vectors: Tensor) -> list[bool]:
    """Whether an accepted answer of each item is what greedy decoding says, with `vectors` [n, d] at its slots."""
    asked = [(n, p) for n, item in enumerate(items) for p in item.accepted]
    found = [False] * len(items)
    for index, batch in model.batches([p for _, p in asked], answers=True):
        with filled(model, batch, vectors):
            for i, hit in zip(index, exact(model, batch), strict=True):
                found[asked[i][0]] |= hit
    return found


def parted(
    arm: Arm, facts: Sequence[Fact], *, count: int, front: bool, limit: int, seed: int
) -> tuple[list[Item], list[Item], list[Score]]:
    """Forget facts with free places: those to learn from, those of other subjects to ask, and scores of what cannot be.

    Places stand in front of a statement, or after a question, whose answer is a turn of its own.
    """
    asked, scores = questions(arm.model, facts, groups=("forget",), limit=limit, seed=seed)
    plain = [items[0 if front else -1] for items in asked]
    items, unasked = measurable(arm.model, [Item(i.fact, opened(i.prompt, count, front=front)) for i in plain])
    scores += [score(i, None, reason=reason) for i, reason in unasked]
    trained = halves(facts, [i.fact for i in items], seed).trained if items else frozenset()
    shown, others = [i for i in items if i.fact.id in trained], [i for i in items if i.fact.id not in trained]
    if shown and others:
        return shown, others, scores
    return [], [], scores + [score(i, None, reason=ALONE) for i in items]
