"""Neuron Adjust: neurons that behave as on the forget prompts are mapped back into how they behave on retain prompts.

Neurons are shared between skills, so none is switched off: a pre-activation that is likelier under the neuron's forget
distribution than under its retain one is reflected into the latter. Weights stay; the edit is a table of statistics.

Method: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention", NAACL 2025, arXiv 2503.21730.
Beyond it: neurons by effect size (instead of the raw difference of means, which late blocks win by their scale), both
signs, no draw at inference, and a gate with a calibrated false-positive rate, so that texts of other kinds keep their
bits. Experts have statistics of their own.

What was measured (benchmarks/skill_editors.py): the small models we ship spread a skill over so many neurons that a
quarter to all of them have to be reflected. Without the gate that takes other skills along; with it nothing else is lost,
but then the same statistics on other neurons often do as well: the gate selects, the neurons only break what it lets in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from excise.actions import Reflect
from excise.arms import Arm
from excise.checks import whole_fingerprints
from excise.edits import Change, Edit
from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gates import Gate
from excise.keyspace import by_kind, detector
from excise.model import Model
from excise.registry import editor
from excise.requests import thin
from excise.scores import Localization
from excise.sites import Site
from excise.streaming import RunningMoments, counted, stream

# A spread below this share of the median spread is that of a dead neuron: it is never chosen.
DEAD = 1e-3
LADDER = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
# Forget prompts that are asked while the share is looked for.
ASKED = 64


@dataclass(frozen=True)
class Behaviour:
    """How the neurons at one point behave on forget and on retain tokens: means and standard deviations, [d]."""

    mean_forget: Tensor
    std_forget: Tensor
    mean_retain: Tensor
    std_retain: Tensor


@editor
def neuron_adjust(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    share: float = 0.0,
    aim: float = 0.05,
    select: Literal["effect", "mean"] = "effect",
    rate: float = 0.02,
    point: str = "mlp.hook_in",
    candidates: int = 8,
    limit: int = 256,
) -> Edit:
    """An edit that reflects the neurons which tell forget prompts most clearly.

    share: of all neurons that could be adjusted (those of `where`, or of all blocks), how many are; 0 takes as few as
        reach `aim`, trying 3 % (the paper's), twice as many, and so on.
    aim: share of the forget prompts answered before that may be answered still.
    select: "effect" takes the largest |difference of means| / spread, "mean" the largest signed difference (the paper's).
    rate: share of retain prompts of any kind on which anything may change, see excise.keyspace.detector; 1 adjusts
        without a gate, everywhere, as in the paper.
    point: where the gate looks, inside a block.
    candidates: how many blocks are compared for the gate.
    limit: prompts read of each region and of each kind of retain fact.

    Raises ExciseError where there is nothing to compare, and where the gate cannot tell forget from retain.
    """
    if not 0 <= share <= 1 or select not in SELECTIONS:
        raise ValueError(
            f"share={share}, select={select!r}: a share is between 0 and 1, selections are effect and mean"
        )
    told, kept = (by_kind(facts, limit) for facts in (forget, retain))
    if not told or not kept:
        raise ExciseError("neurons are compared on forget and on retain prompts that are not held out: give both")
    layers = (where.layers() if where is not None else []) or list(range(model.n_layers))
    neurons = {p: layer for layer in layers for p in neuron_points(model, layer)}
    watch = Watch({f.id for f in forget}, gated=rate < 1)
    look = (list(neurons), watch)
    gate: Gate | None = None
    report: dict[str, Any] = {}
    if rate < 1:
        points = [f"blocks.{i}.{point}" for i in thin(range(max(layers) + 1), candidates)]
        found = detector(model, forget, retain, points, rate=rate, limit=limit, early=True, beside=[look])
        gate, report = found.gate, found.report
    else:
        stream(model, [p for kinds in (told, kept) for prompts in kinds.values() for p in prompts], [look])
    first = (gate.site.layer or 0) if gate is not None else 0
    seen = {p: b for p, b in watch.behaviours().items() if neurons[p] >= first}
    # Where the gate is open, forget is likelier than retain to begin with, by the ratio of its two rates.
    margin = -math.log(report["detected"] / report["bound"]) if report else 0.0

    def adjusted(part: float) -> Edit:
        chosen = choose(seen, part, select).items()
        return Edit(tuple(Change(Site(p, "after_bos"), _reflect(seen[p], u, margin), gate) for p, u in chosen))

    asked = thin([p for prompts in told.values() for p in prompts], ASKED)
    edit, searched = _searched(model, [share] if share else LADDER, adjusted, asked, aim, layers)
    recipe = {"model": model.name, "detector": report, **searched}
    return Edit(edit.changes, recipe, whole_fingerprints(model))


def _searched(
    model: Model,
    shares: Sequence[float],
    adjusted: Callable[[float], Edit],
    asked: Sequence[Prompt],
    aim: float,
    layers: Sequence[int],
) -> tuple[Edit, dict[str, Any]]:
    """The edit of the first share that reaches `aim`, and what each share leaves of the forget answers."""
    known, edit = Arm("before", model).said(asked), Edit(())
    tried: list[dict[str, Any]] = []
    for share in shares:
        edit = adjusted(share)
        units = {c.site: len(c.action.units) for c in edit.changes if isinstance(c.action, Reflect)}
        neurons = {str(i): sum(n for site, n in units.items() if site.layer == i) for i in layers}
        tried.append({"share": share, "answered": Arm("edited", model, edit).said(asked), "neurons": neurons})
        if tried[-1]["answered"] <= aim * known:
            break
    return edit, {"answered before": known, "shares tried": tried}


def neuron_points(model: Model, layer: int) -> list[str]:
    """The pre-activations of one block: of its MLP, or of each of its experts."""
    local = set(model.names.points(layer))
    dense = f"blocks.{layer}.mlp.hook_pre"
    if dense in local:
        return [dense]
    found = [p for e in range(model.names.n_experts) if (p := f"blocks.{layer}.mlp.experts.{e}.hook_pre") in local]
    if not found:
        raise ExciseError(f"{model.name}: block {layer} shows no pre-activations (gate and up in one matrix?)")
    return found


class Watch:
    """Looks at neurons as prompts pass (see excise.streaming.stream) and keeps how they behave on either kind.

    forget: ids of the facts to forget; all others are to be kept. gated: only tokens from the last one of the subject (or
    of the prompt, where there is none) count, because a gate opens there. Experts count the tokens routed to them.
    """

    def __init__(self, forget: Collection[str], *, gated: bool) -> None:
        self.forget, self.gated = forget, gated
        self.moments: dict[str, RunningMoments] = {}

    def __call__(self, point: str, x: Tensor, batch: Batch, index: list[int]) -> None:
        if point not in self.moments:
            self.moments[point] = RunningMoments(2, x.shape[-1])
        where = counted(batch).to(x.device) & x.any(-1)
        if self.gated:
            starts = [(s[1] if s else n) - 1 for s, n in zip(batch.subjects, batch.starts, strict=True)]
            where &= torch.arange(x.shape[1], device=x.device) >= torch.tensor(starts, device=x.device)[:, None]
        group = torch.tensor([int(p.fact_id not in self.forget) for p in batch.prompts], device=x.device)
        self.moments[point].add(x[where], group[:, None].expand_as(where)[where])

    def behaviours(self) -> dict[str, Behaviour]:
        """Behaviour of the neurons at every point that either kind has reached at least twice."""
        moments = {p: m for p, m in self.moments.items() if m.count.min() > 1}
        return {p: Behaviour(m.mean[0], m.std[0], m.mean[1], m.std[1]) for p, m in moments.items()}


def effect(b: Behaviour) -> Tensor:
    """|difference of means| in units of the root mean square spread, [d]; 0 for dead neurons."""
    spread = ((b.std_forget**2 + b.std_retain**2) / 2).sqrt()
    alive = torch.minimum(b.std_forget, b.std_retain) > DEAD * spread.median()
    return torch.where(alive, (b.mean_forget - b.mean_retain).abs() / spread.clamp_min(1e-12), 0.0)


def difference(b: Behaviour) -> Tensor:
    """Forget minus retain mean, [d]; minus infinity for dead neurons."""
    return torch.where(effect(b) > 0, b.mean_forget - b.mean_retain, -math.inf)


SELECTIONS = {"effect": effect, "mean": difference}


def choose(seen: Mapping[str, Behaviour], share: float, select: str) -> dict[str, Tensor]:
    """Units of each point among the `share` of all neurons with the largest scores, over all points at once."""
    scores = {p: SELECTIONS[select](b) for p, b in seen.items()}
    every = torch.cat(list(scores.values()))
    count = len(every) - math.floor(len(every) * (1 - share))
    least = every.sort(descending=True).values[count - 1]
    found = {p: ((s >= least) & s.isfinite() & (s != 0)).nonzero()[:, 0] for p, s in scores.items()}
    return {p: units for p, units in found.items() if len(units)}


def _reflect(b: Behaviour, units: Tensor, margin: float) -> Reflect:
    moments = (b.mean_retain, b.std_retain, b.mean_forget, b.std_forget)
    mean_r, std_r, mean_f, std_f = (t[units].float() for t in moments)
    return Reflect(units, mean_r, std_r, mean_f, std_f, margin)
