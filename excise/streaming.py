"""Activations as a stream: every batch is handed over where it arises, and only running moments are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.trace import _Enough, patched

if TYPE_CHECKING:
    from excise.facts import Prompt
    from excise.model import Model

# Rows turned into float64 at a time.
ROWS = 1024
# (point, activation [batch, width, d], the batch, the index of each of its prompts)
Consumer = Callable[[str, Tensor, Batch, list[int]], None]
# What to look at, and who looks.
Look = tuple[Sequence[str], Consumer]


def stream(model: Model, prompts: Sequence[Prompt | str], looks: Sequence[Look]) -> None:
    """Hand activations to their consumers, batch by batch, prompts with their answers; nothing is kept.

    One forward pass serves all looks and ends after the last block that any of them asks for. Expert neurons come as
    [batch, width, d_expert], zero where the router sent nothing.
    """
    wanted: dict[str, list[Consumer]] = {}
    for points, consumer in looks:
        for point in points:
            wanted.setdefault(point, []).append(consumer)
    layers = [model.names.tap(p).layer for p in wanted]
    last = model.n_layers - 1 if None in layers else max(i for i in layers if i is not None)

    def stop(x: Tensor) -> None:
        raise _Enough

    for index, batch in model.batches(prompts, answers=True):
        hooks = {p: partial(_hand_over, consumers, p, batch, index) for p, consumers in wanted.items()}
        end = {f"blocks.{last}.hook_resid_post": stop} if None not in layers else {}
        with torch.no_grad(), patched(model, hooks, batch=batch), patched(model, end):
            try:
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
            except _Enough:
                pass


def _hand_over(consumers: Sequence[Consumer], point: str, batch: Batch, index: list[int], x: Tensor) -> None:
    for consumer in consumers:
        consumer(point, x.detach().reshape(*batch.ids.shape, -1), batch, index)


def counted(batch: Batch, ends: Sequence[int] | None = None) -> Tensor:
    """Real tokens other than BOS, [batch, width]; before `ends`, one per row, or all."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    stops = torch.tensor(batch.lengths if ends is None else ends, device=batch.ids.device)[:, None]
    first = torch.tensor(batch.has_bos, device=batch.ids.device).long()[:, None]
    return (columns >= first) & (columns < stops)


class RunningMoments:
    """Count, mean and spread of rows seen so far, by group, whatever the order or the chunks; float64 on the CPU.

    count [n_groups]; mean and squares (sum of squared distances from the group's mean) [n_groups, d]; with `full`,
    scatter [d, d] is the same with products of all coordinates, summed over groups. Chunks are merged by Chan's formula: a
    sum of squares minus a square of sums would lose small spreads on large means.
    """

    def __init__(self, groups: int, width: int, *, full: bool = False) -> None:
        self.count = torch.zeros(groups, dtype=torch.float64)
        self.mean = torch.zeros(groups, width, dtype=torch.float64)
        self.squares = torch.zeros(groups, width, dtype=torch.float64)
        self.scatter = torch.zeros(width, width, dtype=torch.float64) if full else None

    def add(self, rows: Tensor, group: Tensor) -> None:
        """Take in rows [n, d] and the number of the group that each belongs to, [n]."""
        for chunk, owner in zip(rows.split(ROWS), group.to(rows.device).split(ROWS), strict=True):
            if len(chunk):
                self._merge(chunk.double(), owner)

    def _merge(self, rows: Tensor, owner: Tensor) -> None:
        new = torch.bincount(owner, minlength=len(self.count)).double().cpu()[:, None]
        before = self.count[:, None]
        shape = self.mean.shape
        mean = rows.new_zeros(shape).index_add_(0, owner, rows) / new.to(rows.device).clamp_min(1)
        apart = rows - mean[owner]
        gap = torch.where(new > 0, mean.cpu() - self.mean, 0.0)
        weight = before * new / (before + new).clamp_min(1)
        self.mean += gap * (new / (before + new).clamp_min(1))
        self.squares += rows.new_zeros(shape).index_add_(0, owner, apart**2).cpu() + gap**2 * weight
        self.count += new[:, 0]
        if self.scatter is not None:
            self.scatter += (apart.mT @ apart).cpu() + (gap * weight).mT @ gap

    @property
    def std(self) -> Tensor:
        """Standard deviation of each group (n - 1), [n_groups, d]; 0 for a group of one."""
        return (self.squares / (self.count - 1).clamp_min(1)[:, None]).sqrt()

    @property
    def freedom(self) -> float:
        """Degrees of freedom within groups, at least 1."""
        return float((self.count - (self.count > 0).double()).sum().clamp_min(1))

    @property
    def pooled(self) -> Tensor:
        """Standard deviation within groups, [d]."""
        return (self.squares.sum(0) / self.freedom).sqrt()


__all__ = ["Consumer", "Look", "RunningMoments", "counted", "stream"]
