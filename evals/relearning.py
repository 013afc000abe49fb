"""Relearning: a few gradient steps on some facts bring back others that were never shown, if these were still there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from evals.attacking import questions, score, told
from evals.sampling import Item, measurable, ranked
from evals.tampering import again, tampered
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.finetuning import descend, draws, stepper
from excise.gradients import answer_losses
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

REGIMES = ("forget", "retain", "general")


@evaluation("elicitation")
def relearning(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    methods: tuple[str, ...] = ("full", "lora"),
    regimes: tuple[str, ...] = ("forget",),
    steps: tuple[int, ...] = (1, 2, 5, 10),
    examples: int = 0,
    batch: int = 16,
    rate: float = 0.0,
    rank: int = 8,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer to a fact that was not trained on is said after some steps of fine-tuning on others.

    The forget facts are split by subject into halves; what one half is trained on never mentions the other
    (arXiv 2410.08827). Variants: "full, step 5"; "full, best" at the step where most comes back, on average over the
    facts; "full, area" the mean over steps from 0 on. A model can recover early and forget again as it over-fits: compare
    the best with the best of the oracle, which was taught. Group "retain" says whether the model still works.
    methods: "full" moves all weights, "lora" low-rank factors.
    regimes: what is trained on: "forget" (other forget facts), "retain" (other entities), "general" (unrelated text).
    steps: after how many steps it is asked.
    examples: facts trained on, at most; 0 for all.
    batch: prompts per step.
    rate: learning rate; 0 for the usual one of the model's size.
    rank: rank of "lora".
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more, the split and the batches.
    """
    asked, scores = questions(arm.model, facts, groups=("forget", "retain"), limit=limit, seed=seed)
    forget = [items for items in asked if items[0].fact.group == "forget"]
    if not forget:
        return scores or questions(arm.model, facts, groups=("forget",), limit=limit, seed=seed)[1]
    split = halves(facts, [items[0].fact for items in forget], seed)
    held_out = [i for i in asked if i[0].fact.id not in split.trained]
    for regime in regimes:
        shown = material(arm.model, facts, regime, split, examples, seed)
        for method in methods:
            name = method if regimes == ("forget",) else f"{method} on {regime}"
            if not shown or not any(i in held_out for i in forget):
                why = (
                    "no other fact to train on: give two forget facts or more"
                    if regime == "forget"
                    else "no such facts to train on"
                )
                scores += [score(i[0], None, variant=f"{name}, best", reason=why) for i in forget]
                continue
            with arm.held() as held:
                curve = _curve(held, held_out, shown, method, steps, batch, rate, rank, seed)
            scores += _named(curve, held_out, name)
    return scores


@dataclass(frozen=True)
class Split:
    """Ids of the forget facts that may be trained on; `subjects` are theirs."""

    trained: frozenset[str]
    subjects: frozenset[str]


def halves(facts: Sequence[Fact], forget: Sequence[Fact], seed: int) -> Split:
    """Half of the subjects of the forget facts, in an order that follows from the seed; of one subject half of its facts."""
    order = list(dict.fromkeys(f.subject or f.id for f in ranked(list(forget), seed)))
    if len(order) == 1:
        chosen = ranked(list(forget), seed)[: len(forget) // 2]
        return Split(frozenset(f.id for f in chosen), frozenset(order))
    first = set(order[: len(order) // 2])
    chosen = [f for f in facts if f.group == "forget" and (f.subject or f.id) in first]
    return Split(frozenset(f.id for f in chosen), frozenset(first))


def material(model: Model, facts: Sequence[Fact], regime: str, split: Split, examples: int, seed: int) -> list[Prompt]:
    """The prompts that are trained on: statements and questions of at most `examples` facts."""
    if regime not in REGIMES:
        raise ValueError(f"no regime {regime!r}; regimes are {', '.join(REGIMES)}")
    fit = [f for f in facts if f.group == regime and (regime != "forget" or f.id in split.trained)]
    chosen = ranked(fit, seed)[: examples or None]
    prompts = [p for f in chosen for p in (f.ask("statement", "question") or [f.prompt])]
    items, _ = measurable(model, [Item(chosen[0], p) for p in prompts]) if chosen else ([], [])
    return [i.prompt for i in items]


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Mean height of a curve of (step, value) pairs, by trapezoids from the first step to the last."""
    points = sorted(curve)
    if len(points) == 1:
        return points[0][1]
    whole = sum((b - a) * (u + v) / 2 for (a, u), (b, v) in pairwise(points))
    return whole / (points[-1][0] - points[0][0])


def steps_to(curve: Sequence[tuple[int, float]], level: float) -> int | None:
    """The first step at which a curve of (step, value) pairs reaches a level; None when it never does."""
    return next((step for step, value in sorted(curve) if value >= level), None)


def _curve(
    held: Arm,
    asked: Sequence[Sequence[Item]],
    shown: Sequence[Prompt],
    method: str,
    steps: Sequence[int],
    batch: int,
    rate: float,
    rank: int,
    seed: int,
) -> dict[int, list[Score]]:
    """Scores by step, 0 included."""
    model = held.model
    prompts = draws(shown, batch, seed)

    def loss(step: int) -> Tensor:
        return answer_losses(model, model.encode(prompts(step), answers=True)).mean()

    found = {0: told(again(held), asked, "")}
    with tampered(model):
        by = stepper(model, method, rate=rate, rank=rank, seed=seed)
        for step in descend(model, loss, by, max(steps)):
            if step in steps:
                found[step] = told(again(held), asked, "")
    return found


def _named(curve: dict[int, list[Score]], asked: Sequence[Sequence[Item]], name: str) -> list[Score]:
    items = [i[0] for i in asked]
    after = {step: scores for step, scores in curve.items() if step}
    found = [
        score(item, s.value, variant=f"{name}, step {step}", detail=s.detail)
        for step, scores in after.items()
        for item, s in zip(items, scores, strict=True)
    ]

    def recalled(step: int) -> float:
        return sum(s.value or 0.0 for s in after[step] if s.group == "forget")

    best = max(after, key=lambda step: (recalled(step), -step))
    for n, item in enumerate(items):
        s = after[best][n]
        found.append(
            score(item, s.value, variant=f"{name}, best", detail=f"step {best}: {s.detail}" if s.value else "")
        )
        height = area([(step, scores[n].value or 0.0) for step, scores in curve.items()])
        found.append(score(item, height, variant=f"{name}, area"))
    return found
