"""Single Layer Unlearning Gradient: one step up the forget loss, in one matrix.

The matrix is one on which forget prompts pull hard for its size and retain prompts pull elsewhere; the step is the
shortest that silences the forget answers. A cheap baseline, and for skills a good one: on the dense model we ship nearly
all of translation goes at no cost, nearly all of sorting at the cost of a seventh of reversing. Names go only together with
many others: what is spread over many matrices cannot be cut out of one.

Method: Cai, Tan, Asif, "Targeted Unlearning with Single Layer Unlearning Gradient", ICML 2025, arXiv 2407.11867, carried
over from image models: losses are those of answers, the measure is how many forget answers are still given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from excise.actions import Dense
from excise.arms import Arm
from excise.checks import fingerprints
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gradients import both_gradients, eligible_matrices, mean_gradients
from excise.model import Model
from excise.registry import editor
from excise.requests import thin, trained
from excise.scores import Localization
from excise.sites import Site

# First step, as a share of the weights' norm.
FIRST = 0.1
# Prompts of either kind that are asked after every step.
ASKED = 64
LOSSES = ("odds", "likelihood")


@editor
def single_gradient(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    aim: float = 0.05,
    steps: int = 10,
    front: int = 6,
    loss: Literal["odds", "likelihood"] = "odds",
    limit: int = 512,
    at_once: int = 67_108_864,
) -> Edit:
    """An edit that adds a multiple of one matrix's forget gradient to it.

    aim: share of the forget prompts answered before that may be answered still; the shortest step found is taken.
    steps: step lengths tried on each matrix.
    front: matrices tried, those best in one respect or the other (the Pareto front), most important first.
    loss: "odds" takes the log-odds of an answer, whose gradient does not vanish where the answer is certain; "likelihood"
        takes its log-likelihood, as published.
    limit: prompts read of either kind, taken evenly.
    at_once: weights whose gradients are held at a time; fewer take more sweeps over the prompts.

    Sites of `where` choose matrices, or, where they name activations, whole blocks; without it all blocks are eligible.
    Raises ExciseError when there is nothing to forget or to keep.
    """
    asked = [trained(facts, limit) for facts in (forget, retain)]
    if not all(asked):
        raise ExciseError("gradients are compared: give forget and retain prompts that are not held out")
    if loss not in LOSSES:
        raise ValueError(f"no loss {loss!r}; there are {', '.join(LOSSES)}")
    gradients = both_gradients(model, asked, eligible_matrices(model, where), at_once, odds=loss == "odds")
    scores = {n: alignment(model.weight(n).detach(), up, keep) for n, up, keep in gradients if float(up.norm()) > 0}
    best = pareto(scores)[:front]
    tried = [_searched(model, name, asked, aim, steps, loss == "odds") for name in best]
    if not tried:
        raise ExciseError("the forget prompts pull at no matrix: their answers are certain to the last bit")
    change, report = min(tried, key=lambda t: (t[1]["forget"] > aim, -t[1]["retain"], t[1]["forget"]))
    recipe = {"model": model.name, "front": [r for _, r in tried], "chosen": report["matrix"]}
    return Edit((change,), recipe, fingerprints(model, [change]))


def alignment(weight: Tensor, up: Tensor, keep: Tensor | None) -> tuple[float, float]:
    """|forget gradient| / |weight|, and |cosine| of forget and retain gradients (0 where retain prompts have none)."""
    importance = up.double().norm() / weight.double().norm().clamp_min(1e-30)
    if keep is None:
        return float(importance), 0.0
    cosine = (up.double() * keep.double()).sum() / (up.double().norm() * keep.double().norm()).clamp_min(1e-30)
    return float(importance), float(cosine.abs())


def pareto(scores: dict[str, tuple[float, float]]) -> list[str]:
    """Names that no other beats in both, more importance and less alignment; most important first."""
    order = sorted(scores, key=lambda n: (-scores[n][0], scores[n][1]))
    found: list[str] = []
    least = math.inf
    for name in order:
        if scores[name][1] < least:
            found.append(name)
            least = scores[name][1]
    return found


def shortest(reached: Callable[[float], bool], first: float, steps: int) -> tuple[float, bool]:
    """The shortest length tried at which `reached`, and whether any did: doubled until one does, then halved in between."""
    low, high, length = 0.0, math.inf, first
    for _ in range(steps):
        if reached(length):
            high = length
        else:
            low = length
        length = (low + high) / 2 if high < math.inf else 2 * length
    return (high, True) if high < math.inf else (low, False)


def _searched(
    model: Model, name: str, asked: Sequence[list[Prompt]], aim: float, steps: int, odds: bool
) -> tuple[Change, dict[str, Any]]:
    """The change of one matrix, and what it leaves of forget and retain answers."""
    gradient = mean_gradients(model, asked[0], [name], odds=odds)[name]
    questions = [thin(prompts, ASKED) for prompts in asked]
    known = [max(Arm("before", model).said(prompts), 1e-9) for prompts in questions]
    seen: dict[float, float] = {}

    def left(length: float, which: int) -> float:
        edit = Edit((Change(Site(name), Dense((length * gradient).cpu())),))
        return Arm("edited", model, edit).said(questions[which]) / known[which]

    def reached(length: float) -> bool:
        seen[length] = left(length, 0)
        return seen[length] <= aim

    unit = float(model.weight(name).detach().float().norm() / gradient.norm())
    length, _ = shortest(reached, FIRST * unit, steps)
    report = {"matrix": name, "step": length / unit, "forget": seen[length], "retain": left(length, 1)}
    return Change(Site(name), Dense((length * gradient).cpu())), report
