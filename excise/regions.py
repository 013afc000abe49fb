"""Regions of key space: where the activations of requests lie at one point, and how much a token looks like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from excise.gates import Box, Gate, Linear
from excise.sites import Site
from excise.streaming import RunningMoments

STATISTICS = ("linear", "count", "extent")
# Spreads below this share of the median spread would make boxes infinitely thin.
THIN = 1e-3
# Ridge of the linear read-out, relative to the mean variance.
RIDGE = 1e-2
# Spreads that the boxes of "count" reach to either side.
REACH = 2.0


@dataclass(frozen=True)
class Regions:
    """Where forget prompts lie at one point, and how a token is scored: more means more like them.

    centres: [n, d], one per region; spread: [d], within regions. direction [d, n] and offset [n]: a linear read-out per
    region that is 1 at its centre and 0 at the mean of ordinary tokens; only the statistic "linear" has them.
    """

    point: str
    statistic: str
    centres: Tensor
    spread: Tensor
    direction: Tensor | None = None
    offset: Tensor | None = None

    def score(self, x: Tensor) -> Tensor:
        """[...] from x [..., d]: the linear read-out; the share of coordinates inside; or minus the extent of the box."""
        if self.direction is not None and self.offset is not None:
            return (x.float() @ self.direction.to(x.device) - self.offset.to(x.device)).amax(-1)
        if self.statistic == "count":
            return self._box(REACH, 0.0).inside(x)
        centres, spread = self.centres.to(x.device), self.spread.to(x.device)
        return -torch.stack([((x.float() - c) / spread).abs().amax(-1) for c in centres]).amin(0)

    def gate(self, threshold: float) -> Gate:
        """Opens, and stays open for the rest of the sequence, where the score exceeds `threshold`."""
        if self.direction is not None and self.offset is not None:
            return Linear(Site(self.point), self.direction, self.offset + threshold, "sequence", specials=True)
        if self.statistic == "count":
            return self._box(REACH, threshold + 0.25 / self.spread.numel())  # shares come in steps of 1 / d
        return self._box(-threshold, 1.0)

    def _box(self, width: float, quota: float) -> Box:
        reach = width * self.spread
        return Box(Site(self.point), self.centres - reach, self.centres + reach, quota)


def fit_regions(point: str, statistic: str, inside: RunningMoments, outside: RunningMoments) -> Regions:
    """Regions with the moments `inside`, one group per region, told from ordinary tokens with the moments `outside`."""
    spread = inside.pooled
    spread = spread.clamp_min(1e-6 + THIN * float(spread.median())).float()
    if inside.scatter is None or outside.scatter is None:
        return Regions(point, statistic, inside.mean.float(), spread)
    covariances = inside.scatter / inside.freedom, outside.scatter / outside.freedom
    direction, offset = discriminant(inside.mean, covariances[0], outside.mean[0], covariances[1])
    return Regions(point, statistic, inside.mean.float(), spread, direction.float(), offset.float())


def discriminant(centres: Tensor, within: Tensor, mean: Tensor, ordinary: Tensor) -> tuple[Tensor, Tensor]:
    """Read-outs x @ direction - offset, [n], that are 1 at each centre [n, d] and 0 at `mean` [d], as steady as can be.

    Fisher's: direction ~ (within + ordinary)^-1 (centre - mean), with the covariances [d, d] of tokens of a region and of
    ordinary tokens, and a ridge for directions that neither varies in. Returns direction [d, n] and offset [n].
    """
    total = within.double() + ordinary.double()
    total = total + RIDGE * total.diagonal().mean().clamp_min(1e-12) * torch.eye(len(total), dtype=torch.float64)
    gap = (centres - mean).double().mT
    direction = torch.linalg.solve(total, gap)
    direction = direction / (gap * direction).sum(0).clamp_min(1e-12)
    return direction, mean.double() @ direction
