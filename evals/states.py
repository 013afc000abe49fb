"""Residual states where an answer is predicted and where its subject ends: read once per arm and prompt, then shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Prompt
from excise.model import Model
from excise.trace import patched

# Numbers kept per arm (256 MB in float32); what was read first goes first.
MOST = 2**26


@dataclass(frozen=True)
class States:
    """The residual stream after each block, in float32 on the CPU, of one prompt followed by its answer.

    answer: where each answer token is predicted, [n_layers, n_answer_tokens, d_model].
    subject: at the subject's last token, [n_layers, d_model]; None for a prompt that names no subject.
    """

    answer: Tensor
    subject: Tensor | None

    @property
    def last(self) -> Tensor:
        """Where the first answer token is predicted, [n_layers, d_model]."""
        return self.answer[:, 0]

    @property
    def size(self) -> int:
        """Numbers held."""
        return self.answer.numel() + (0 if self.subject is None else self.subject.numel())


def states(arm: Arm, prompts: Sequence[Prompt]) -> list[States]:
    """The states of each prompt under the arm's edit; one forward pass a prompt, kept (up to MOST numbers)."""
    kept: dict[Prompt, States] = arm.kept.setdefault("states", {})
    found = {p: kept[p] for p in dict.fromkeys(prompts) if p in kept}
    new = [p for p in dict.fromkeys(prompts) if p not in found]
    if new:
        with arm.running() as model:
            for index, batch in model.batches(new, answers=True):
                found |= zip([new[i] for i in index], _read(model, batch), strict=True)
        kept |= {p: found[p] for p in new}
        held = sum(s.size for s in kept.values())
        while held > MOST:
            held -= kept.pop(next(iter(kept))).size
    return [found[p] for p in prompts]


def answer_mask(batch: Batch) -> Tensor:
    """Where the answer tokens of each row are predicted: boolean [batch, width] on the batch's device."""
    columns = torch.arange(batch.ids.shape[1])
    starts, lengths = (torch.tensor(x)[:, None] for x in (batch.starts, batch.lengths))
    return ((columns >= starts - 1) & (columns < lengths - 1)).to(batch.ids.device)


def _read(model: Model, batch: Batch) -> list[States]:
    where = answer_mask(batch)
    ends = [span[1] - 1 if span is not None else None for span in batch.subjects]
    seen: list[list[tuple[Tensor, Tensor | None]]] = []

    def look(x: Tensor) -> None:
        rows = x.detach()
        seen.append(
            [
                (row[at.to(row.device)].float().cpu(), None if end is None else row[end].float().cpu())
                for row, at, end in zip(rows, where, ends, strict=True)
            ]
        )

    # Positions are picked inside the hooks: whole activations of every block would be many batches' worth of memory.
    looks: dict[str, Callable[[Tensor], None]] = {f"blocks.{i}.hook_resid_post": look for i in range(model.n_layers)}
    with torch.no_grad(), patched(model, looks):
        model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
    found = []
    for row in range(len(batch)):
        answer, subject = zip(*(layer[row] for layer in seen), strict=True)
        found.append(States(torch.stack(answer), None if ends[row] is None else torch.stack(subject)))
    return found
