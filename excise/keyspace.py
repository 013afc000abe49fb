"""Key space: does what is being processed look like what is to be forgotten? A gate with a calibrated error rate.

Requests for one skill, or about one name, put a block's activations into a compact region. A detector of such regions
is fitted in one pass over forget and retain prompts, and its threshold is set so that retain prompts pass it no more
often than allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gates import Box, Gate, Linear
from excise.resampling import auc
from excise.sites import Site
from excise.streaming import RunningMoments, counted, stream

if TYPE_CHECKING:
    from excise.model import Model

STATISTICS = ("linear", "count", "extent")
# Every so many forget prompts of a region are kept to measure detection; regions with fewer are measured on themselves.
HELD_BACK = 4
# Share of forget prompts that may be missed when the threshold moves away from the retain prompts.
MISSED = 0.05
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


@dataclass(frozen=True)
class Detector:
    """A gate and how well it tells forget from retain.

    report: point, regions, detected (share of forget prompts that open it, held back where there are enough), false
    positives (share of the retain prompts it was calibrated on), bound (what new retain prompts of any kind are promised
    to stay below), auc, retain prompts, threshold, and the points that were compared.
    """

    gate: Gate
    report: dict[str, Any]


def detector(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    points: Sequence[str],
    *,
    rate: float = 0.02,
    statistic: str = "linear",
    limit: int = 256,
) -> Detector:
    """The gate, at the best of `points`, that opens for at most a share `rate` of retain prompts of any kind.

    Forget prompts are read at the last token of their subject, or of the prompt where there is none; those with one
    subject, or of one relation, make one region. Retain prompts are read at every token, answers included, because the
    gate will look at all of them. Held-out prompts are not read, the others once. The threshold is conformal: for
    exchangeable prompts of a kind (relation) the promise needs no assumption; n of them can promise 1 / (n + 1) at best.
    Where forget prompts lie further away, it is put halfway.

    statistic: "linear" reads along the direction that tells each region from ordinary tokens, fitted on one half of the
        retain prompts and calibrated on the other; "count" asks for a share of coordinates within two spreads of the
        centre, "extent" for all of them within a calibrated number of spreads (the box of Key Space Detection).
    limit: at most so many prompts of each region and of each kind.

    Raises ExciseError where there is nothing to fit or to calibrate on, and where no point tells the two apart.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"no statistic {statistic!r}; there are {', '.join(STATISTICS)}")
    wanted, kinds = _kinds(forget, limit, by_subject=True), _kinds(retain, limit, by_subject=False)
    if not wanted:
        raise ExciseError("nothing to detect: the forget set has no prompt that is not held out")
    if not kinds:
        raise ExciseError("a false-positive rate needs retain prompts to be calibrated on; give retain facts")
    fitted, measured = _split(wanted)
    ordinary: list[Prompt] = []
    if statistic == "linear":
        ordinary = [p for prompts in kinds.values() for p in prompts[1::2]]
        kinds = {kind: prompts[::2] for kind, prompts in kinds.items()}
    regions = _regions(model, fitted, ordinary, points, statistic)
    seen = _scores(model, regions, measured, answers=False)
    strange = _by_kind(_scores(model, regions, [p for k in kinds.values() for p in k]), kinds)
    rows = [_calibrated(r, seen[p], strange[p], rate) for p, r in regions.items()]
    best = max(rows, key=lambda row: (round(row["detected"], 2), round(row["auc"], 3)))
    if not best["detected"]:
        raise ExciseError(
            f"nothing at {', '.join(points)} tells these requests from retain prompts at a false-positive rate of "
            f"{best['bound']:.3g}: allow more, give more retain facts, or edit weights instead"
        )
    compared = [{k: row[k] for k in ("point", "detected", "auc")} for row in rows]
    gate = regions[best["point"]].gate(best["threshold"])
    return Detector(gate, {**best, "statistic": statistic, "regions": len(wanted), "compared": compared})


def conformal(scores: Sequence[float], rate: float) -> tuple[float, float]:
    """The value that a new, exchangeable score exceeds with probability at most the second number returned.

    That is `rate`, or 1 / (n + 1) where n scores cannot promise so little.
    """
    n = len(scores)
    rank = min(n, math.ceil((n + 1) * (1 - rate)))
    return sorted(scores)[rank - 1], max(rate, 1 / (n + 1))


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


def _calibrated(regions: Regions, seen: Tensor, strange: Mapping[str, Tensor], rate: float) -> dict[str, Any]:
    thresholds = [conformal(scores.tolist(), rate) for scores in strange.values()]
    threshold, bound = max(t for t, _ in thresholds), max(b for _, b in thresholds)
    threshold = max(threshold, (threshold + float(seen.double().quantile(MISSED))) / 2)
    everyone = torch.cat(list(strange.values()))
    return {
        "point": regions.point,
        "threshold": threshold,
        "detected": float((seen > threshold).double().mean()),
        "false positives": float((everyone > threshold).double().mean()),
        "bound": bound,
        "auc": auc(seen.tolist(), everyone.tolist()),
        "retain prompts": len(everyone),
    }


def _kinds(facts: Sequence[Fact], limit: int, *, by_subject: bool) -> dict[str, list[Prompt]]:
    """Prompts that are not held out by kind: relation, or subject where there is one and it is asked for."""
    found: dict[str, list[Prompt]] = {}
    for fact in facts:
        for prompt in fact.ask(held_out=False):
            found.setdefault((prompt.subject if by_subject else "") or fact.relation, []).append(prompt)
    return {kind: prompts[:: max(1, math.ceil(len(prompts) / limit))] for kind, prompts in found.items()}


def _split(wanted: Mapping[str, list[Prompt]]) -> tuple[dict[str, list[Prompt]], list[Prompt]]:
    """Prompts to fit on, by region, and prompts to measure on."""
    fitted, measured = {}, []
    for kind, prompts in wanted.items():
        enough = len(prompts) >= HELD_BACK
        fitted[kind] = [p for i, p in enumerate(prompts) if not enough or i % HELD_BACK != HELD_BACK - 1]
        measured += prompts[HELD_BACK - 1 :: HELD_BACK] if enough else prompts
    return fitted, measured


def _regions(
    model: Model,
    wanted: Mapping[str, list[Prompt]],
    ordinary: Sequence[Prompt],
    points: Sequence[str],
    statistic: str,
) -> dict[str, Regions]:
    """Regions at every point, from one pass over both kinds of prompts."""
    prompts = [p for kind in wanted.values() for p in kind]
    owner = [i for i, kind in enumerate(wanted.values()) for _ in kind]
    inside: dict[str, RunningMoments] = {}
    outside: dict[str, RunningMoments] = {}

    def look(point: str, x: Tensor, batch: Batch, index: list[int]) -> None:
        if point not in inside:
            inside[point] = RunningMoments(len(wanted), x.shape[-1], full=bool(ordinary))
            outside[point] = RunningMoments(1, x.shape[-1], full=bool(ordinary))
        common = torch.tensor([i >= len(owner) for i in index], device=x.device)
        outside[point].add(x[counted(batch).to(x.device) & common[:, None]])
        for row, i in enumerate(index):
            if i < len(owner):
                span = batch.subjects[row]
                at = (span[1] if span else batch.starts[row]) - 1
                inside[point].add(x[row, at : at + 1], owner[i])

    stream(model, [*prompts, *ordinary], points, look)
    return {point: _region(point, statistic, inside[point], outside[point]) for point in points}


def _region(point: str, statistic: str, inside: RunningMoments, outside: RunningMoments) -> Regions:
    spread = inside.pooled
    spread = spread.clamp_min(1e-6 + THIN * float(spread.median())).float()
    if inside.scatter is None or outside.scatter is None:
        return Regions(point, statistic, inside.mean.float(), spread)
    covariances = inside.scatter / inside.freedom, outside.scatter / outside.freedom
    direction, offset = discriminant(inside.mean, covariances[0], outside.mean[0], covariances[1])
    return Regions(point, statistic, inside.mean.float(), spread, direction.float(), offset.float())


def _scores(
    model: Model, regions: Mapping[str, Regions], prompts: Sequence[Prompt], *, answers: bool = True
) -> dict[str, Tensor]:
    """Per point, the score of each prompt's most suspicious token, [n_prompts]."""
    found = {point: torch.empty(len(prompts)) for point in regions}

    def look(point: str, x: Tensor, batch: Batch, index: list[int]) -> None:
        where = counted(batch, answers=answers).to(x.device)
        found[point][index] = regions[point].score(x).masked_fill(~where, -math.inf).amax(1).float().cpu()

    stream(model, prompts, list(regions), look)
    return found


def _by_kind(scores: Mapping[str, Tensor], kinds: Mapping[str, Sequence[Prompt]]) -> dict[str, dict[str, Tensor]]:
    sizes = [len(prompts) for prompts in kinds.values()]
    return {point: dict(zip(kinds, s.split(sizes), strict=True)) for point, s in scores.items()}


__all__ = ["STATISTICS", "Detector", "Regions", "conformal", "detector", "discriminant"]
