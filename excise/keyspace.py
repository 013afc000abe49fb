"""Key space: does what is being processed look like what is to be forgotten? A gate with a calibrated error rate.

Requests for one skill, or about one name, put a block's activations into a compact region. A detector of such regions
is fitted in one pass over forget and retain prompts, and its threshold is set so that retain prompts pass it no more
often than allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gates import Gate
from excise.intervals import auc, wilson
from excise.regions import STATISTICS, Regions, fit_regions
from excise.streaming import Look, RunningMoments, counted, stream

if TYPE_CHECKING:
    from excise.model import Model

# Every so many forget prompts of a region are kept to measure detection; regions with fewer are measured on themselves.
HELD_BACK = 4
# Share of forget prompts that may be missed when the threshold moves away from the retain prompts.
MISSED = 0.05


@dataclass(frozen=True)
class Detector:
    """A gate and how well it tells forget from retain.

    report: point, statistic, regions, threshold, margin (the gap between the weakest forget prompts, but for one in twenty,
    and what retain prompts reach, as a share of the distance of their medians; the point with the largest is taken;
    minus infinity where forget prompts lie on the wrong side), detected (share of the measured forget prompts that open it), detected
    on (their number), false positives (share of the retain prompts it was calibrated on), bound (what new retain prompts
    of any kind are promised to stay below), auc, retain prompts, and the points that were compared.
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
    early: bool = False,
    beside: Sequence[Look] = (),
) -> Detector:
    """The gate, at the best of `points`, that opens for at most a share `rate` of retain prompts of any kind.

    Forget prompts are read at the last token of their subject, or of the prompt where there is none; those with one
    subject, or of one relation, make one region. Retain prompts are read at every token, answers included, because the
    gate will look at all of them. Held-out prompts are not read, the others once: some of either kind fit the regions,
    others choose the point, and those that calibrate the threshold had no say in either. The threshold is conformal: for
    exchangeable prompts of a kind (relation) the promise needs no assumption; n of them can promise 1 / (n + 1) at best.
    Where forget prompts lie further away, it is put halfway. What is detected is how requests look: behind another
    sentence a name is still seen, a skill that is known by its template often is not (benchmarks/skill_editors.py).

    statistic: "linear" reads along the direction that tells each region from ordinary tokens; "count" asks for a share
        of coordinates within two spreads of the centre, "extent" for all of them within a calibrated number of spreads
        (the box of Key Space Detection).
    limit: at most so many prompts of each region and of each kind.
    early: take the first point whose gap between forget and retain prompts is at least half as wide as the widest,
        instead of that one, for changes that have to come after the gate.
    beside: what else is to be looked at while these prompts pass.

    Raises ExciseError where there is nothing to fit or to calibrate on, and where the best point detects no more than
    what it may get wrong.
    """
    if statistic not in STATISTICS:
        raise ValueError(f"no statistic {statistic!r}; there are {', '.join(STATISTICS)}")
    if not 0 < rate < 1:
        raise ValueError(f"a false-positive rate lies between 0 and 1, not at {rate}")
    wanted, kinds = by_kind(forget, limit, by_subject=True), by_kind(retain, limit)
    shares = _shares(list(wanted.values()), list(kinds.values()), statistic == "linear")
    regions = _regions(model, shares, points, statistic, beside)
    n = 1 + len(shares.choosing)
    rows = {
        point: _calibrated(scores[0], scores[1:n], scores[n:], rate)
        for point, scores in _scores(model, regions, shares, beside).items()
    }
    widest = max(row["margin"] for row in rows.values())
    enough = widest / 2 if early and widest > 0 else widest
    best = next(point for point, row in rows.items() if row["margin"] >= enough)
    report = rows[best]
    hits = round(report["detected"] * report["detected on"])
    if wilson(hits, report["detected on"]).low <= report["bound"]:
        raise ExciseError(
            f"nothing at {', '.join(points)} tells these requests from retain prompts at a false-positive rate of "
            f"{report['bound']:.3g}: allow more, give more retain facts, or edit weights instead"
        )
    compared = [{"point": p, **{k: row[k] for k in ("margin", "detected", "auc")}} for p, row in rows.items()]
    found = {"point": best, "statistic": statistic, "regions": len(shares.regions), **report, "compared": compared}
    return Detector(regions[best].gate(report["threshold"]), found)


def by_kind(facts: Sequence[Fact], limit: int, *, by_subject: bool = False) -> dict[str, list[Prompt]]:
    """At most `limit` prompts of each kind that are not held out; a kind is a relation, or, if asked for, a subject.

    Each kind in an order of its own, drawn once and for all: every so many of its prompts are then a fair sample of it.
    """
    found: dict[str, list[Prompt]] = {}
    for fact in facts:
        for prompt in fact.ask(held_out=False):
            found.setdefault((prompt.subject if by_subject else "") or fact.relation, []).append(prompt)
    return {kind: Random(kind).sample(prompts, min(limit, len(prompts))) for kind, prompts in found.items()}


def conformal(scores: Sequence[float], rate: float) -> tuple[float, float]:
    """The value that a new, exchangeable score exceeds with probability at most the second number returned.

    That is `rate`, or 1 / (n + 1) where n scores cannot promise so little.
    """
    n = len(scores)
    rank = min(n, math.ceil((n + 1) * (1 - rate)))
    return sorted(scores)[rank - 1], max(rate, 1 / (n + 1))


@dataclass(frozen=True)
class _Shares:
    """Which prompts do what.

    regions: forget prompts that fit, by region; measured: those on which detection is measured, the first `fresh` of
    which fit nothing. ordinary: retain prompts that fit; choosing and calibrating: the others, by kind.
    """

    regions: list[list[Prompt]]
    measured: list[Prompt]
    fresh: int
    ordinary: list[Prompt]
    choosing: list[list[Prompt]]
    calibrating: list[list[Prompt]]


def _shares(wanted: Sequence[list[Prompt]], kinds: Sequence[list[Prompt]], fits: bool) -> _Shares:
    if not wanted:
        raise ExciseError("nothing to detect: the forget set has no prompt that is not held out")
    if not kinds:
        raise ExciseError("a false-positive rate needs retain prompts to be calibrated on; give retain facts")
    if fits and max(map(len, kinds)) < 2:
        raise ExciseError("a linear read-out needs at least two retain prompts of a kind; give more retain facts")
    last = HELD_BACK - 1
    regions = [[p for i, p in enumerate(prompts) if i % HELD_BACK != last] for prompts in wanted]
    fresh = [p for prompts in wanted for p in prompts[last::HELD_BACK]]
    again = [p for prompts in wanted if len(prompts) < HELD_BACK for p in prompts]
    ordinary = [p for prompts in kinds for p in prompts[1::4]] if fits else []
    choosing = [chosen for prompts in kinds if (chosen := prompts[3::4] if fits else prompts[1::2])]
    return _Shares(regions, fresh + again, len(fresh), ordinary, choosing, [prompts[::2] for prompts in kinds])


def _calibrated(seen: Tensor, choosing: Sequence[Tensor], calibrating: Sequence[Tensor], rate: float) -> dict[str, Any]:
    """How a point does; `Detector` says what is in it."""
    choosing = choosing or calibrating
    weakest = float(seen.double().quantile(MISSED))
    threshold, bound = _threshold(calibrating, rate)
    threshold = max(threshold, (threshold + weakest) / 2)
    everyone, others = (torch.cat(list(scores)) for scores in (calibrating, choosing))
    apart = float(seen.median() - others.median())
    return {
        "threshold": threshold,
        "margin": (weakest - _threshold(choosing, rate)[0]) / apart if apart > 0 else -math.inf,
        "detected": float((seen > threshold).double().mean()),
        "detected on": len(seen),
        "false positives": float((everyone > threshold).double().mean()),
        "bound": bound,
        "auc": auc(seen.tolist(), others.tolist()),
        "retain prompts": len(everyone),
    }


def _threshold(scores: Sequence[Tensor], rate: float) -> tuple[float, float]:
    """What no kind exceeds more often than allowed, and the most that is allowed to any."""
    each = [conformal(s.tolist(), rate) for s in scores]
    return max(t for t, _ in each), max(b for _, b in each)


def _regions(
    model: Model, shares: _Shares, points: Sequence[str], statistic: str, beside: Sequence[Look]
) -> dict[str, Regions]:
    """Regions at every point, from one pass over what fits them."""
    owner = [i for i, prompts in enumerate(shares.regions) for _ in prompts]
    full = bool(shares.ordinary)
    inside: dict[str, RunningMoments] = {}
    outside: dict[str, RunningMoments] = {}

    def look(point: str, x: Tensor, batch: Batch, index: list[int]) -> None:
        if point not in inside:
            inside[point] = RunningMoments(len(shares.regions), x.shape[-1], full=full)
            outside[point] = RunningMoments(1, x.shape[-1], full=full)
        rows = [row for row, i in enumerate(index) if i < len(owner)]
        at = [(batch.subjects[row] or (0, batch.starts[row]))[1] - 1 for row in rows]
        inside[point].add(x[rows, at], torch.tensor([owner[index[row]] for row in rows], dtype=torch.long))
        common = torch.tensor([i >= len(owner) for i in index], device=x.device)
        ordinary = x[counted(batch).to(x.device) & common[:, None]]
        outside[point].add(ordinary, torch.zeros(len(ordinary), dtype=torch.long))

    prompts = [p for region in shares.regions for p in region]
    stream(model, [*prompts, *shares.ordinary], [(points, look), *beside])
    return {point: fit_regions(point, statistic, inside[point], outside[point]) for point in points}


def _scores(
    model: Model, regions: Mapping[str, Regions], shares: _Shares, beside: Sequence[Look]
) -> dict[str, list[Tensor]]:
    """Per point, the score of each prompt's most suspicious token: measured forget prompts, then retain prompts kind by
    kind, those that choose and those that calibrate."""
    kinds = [*shares.choosing, *shares.calibrating]
    prompts = [*shares.measured, *(p for some in kinds for p in some)]
    first, own = shares.fresh, len(shares.measured)
    found = {point: torch.empty(len(prompts)) for point in regions}

    def look(numbers: Sequence[int], point: str, x: Tensor, batch: Batch, index: list[int]) -> None:
        numbered = [numbers[i] for i in index]
        # A gate that opens in the middle of a forget answer comes late; in a retain answer it does harm all the same.
        ends = [batch.starts[row] if i < own else batch.lengths[row] for row, i in enumerate(numbered)]
        score = regions[point].score(x).masked_fill(~counted(batch, ends).to(x.device), -math.inf)
        found[point][numbered] = score.amax(1).float().cpu()

    new = [i for i in range(len(prompts)) if not first <= i < own]
    stream(model, [prompts[i] for i in new], [(list(regions), partial(look, new)), *beside])
    if own > first:
        stream(model, prompts[first:own], [(list(regions), partial(look, range(first, own)))])
    sizes = [own, *(len(some) for some in kinds)]
    return {point: list(scores.split(sizes)) for point, scores in found.items()}


__all__ = ["Detector", "by_kind", "conformal", "detector"]
