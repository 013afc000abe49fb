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


def stream(model: Model, prompts: Sequence[Prompt | str], points: Sequence[str], consumer: Consumer) -> None:
    """Hand the activations at `points` to `consumer`, batch by batch, prompts with their answers; nothing is kept.

    Each forward pass ends after the last block that is asked for. Expert neurons come as [batch, width, d_expert],
    zero where the router sent nothing.
    """
    layers = [model.names.tap(p).layer for p in points]
    last = model.n_layers - 1 if None in layers else max(i for i in layers if i is not None)

    def stop(x: Tensor) -> None:
        raise _Enough

    for index, batch in model.batches(prompts, answers=True):
        hooks = {p: partial(_hand_over, consumer, p, batch, index) for p in points}
        end = {f"blocks.{last}.hook_resid_post": stop} if None not in layers else {}
        with torch.no_grad(), patched(model, hooks, batch=batch), patched(model, end):
            try:
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
            except _Enough:
                pass


def _hand_over(consumer: Consumer, point: str, batch: Batch, index: list[int], x: Tensor) -> None:
    consumer(point, x.detach().reshape(*batch.ids.shape, -1), batch, index)


def counted(batch: Batch, *, answers: bool = True) -> Tensor:
    """Real tokens other than BOS, [batch, width]; without `answers` only those of the prompts."""
    columns = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    ends = torch.tensor(batch.lengths if answers else batch.starts, device=batch.ids.device)[:, None]
    first = torch.tensor(batch.has_bos, device=batch.ids.device).long()[:, None]
    return (columns >= first) & (columns < ends)


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

    def add(self, rows: Tensor, group: int = 0) -> None:
        """Take in rows [n, d] of one group."""
        for chunk in rows.split(ROWS):
            if len(chunk):
                self._merge(chunk.double(), group)

    def _merge(self, rows: Tensor, group: int) -> None:
        n, mean = len(rows), rows.mean(0)
        apart = rows - mean
        before, gap = float(self.count[group]), mean.cpu() - self.mean[group]
        share = before * n / (before + n)
        self.mean[group] += gap * (n / (before + n))
        self.squares[group] += (apart**2).sum(0).cpu() + gap**2 * share
        self.count[group] += n
        if self.scatter is not None:
            self.scatter += (apart.mT @ apart).cpu() + torch.outer(gap, gap) * share

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


__all__ = ["RunningMoments", "counted", "stream"]
