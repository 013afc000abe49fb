"""Probes: does a linear classifier still find the answer in the state at the subject's last token?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.sampling import Item, measurable, nothing, ranked
from excise.arms import Arm
from excise.facts import Fact
from excise.probes import FEWEST, cross_predict, shuffled_by_subject, subject_folds
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import read

GROUPS = ("forget", "retain", "neighbour")


@dataclass(frozen=True)
class Task:
    """One relation as a classification of its subjects.

    items: one prompt per fact; labels: class of each answer [n]; rows: place of each item among the states that were
        read.
    folds: fold of each item [n]; all items of a subject share one.
    """

    items: tuple[Item, ...]
    labels: np.ndarray
    rows: np.ndarray
    folds: np.ndarray


@evaluation("intrinsic")
def probe(
    arm: Arm, facts: Sequence[Fact], *, before: Arm, limit: int = 160, folds: int = 5, ridge: float = 0.1, seed: int = 0
) -> list[Score]:
    """1 where a linear probe names the answer of a subject that it never saw, from its last token's state.

    For each relation and layer a ridge classifier is trained on the subjects of the other folds, facts to forget and to
    keep together, and asked about those of this fold. "refit, layer i" trains on this arm's own states: is the
    knowledge linearly there at all? "transfer, layer i" trains on those of `before`: is it still where it was? "best
    layer" is the layer at which facts to keep are read best, so that it is not chosen on what it is reported for.
    "shuffled" repeats the refit there with answers dealt anew among the subjects: what the probe gets by chance
    (Hewitt and Liang 2019, arXiv 1909.03368). Read against the oracle.
    limit: most subjects per relation and group; 0 for all.
    folds: parts that the subjects are dealt into.
    ridge: penalty relative to the mean squared norm of the standardised states.
    seed: order of the subjects and the shuffling.
    """
    items, tasks, left_out = _tasks(arm, facts, limit, folds, seed)
    if not tasks:
        return [_left_out(i, r) for i, r in left_out] or nothing(
            "no facts with a relation and a prompt that names the subject"
        )
    states = _states(arm, items)
    source = states if arm is before else _states(before, items)
    scores = []
    for task in tasks:
        scores += _of_task(task, [s[task.rows] for s in states], [s[task.rows] for s in source], ridge, seed)
    return scores + [_left_out(item, reason) for item, reason in left_out]


def _tasks(
    arm: Arm, facts: Sequence[Fact], limit: int, folds: int, seed: int
) -> tuple[list[Item], list[Task], list[tuple[Item, str]]]:
    """The prompts to read, the relations to classify, and the facts that had to be left out."""
    asked: dict[tuple[str, str], list[Item]] = {}
    for fact in ranked([f for f in facts if f.group in GROUPS and f.relation], seed):
        chosen = asked.setdefault((fact.relation, fact.group), [])
        prompt = next((p for p in fact.prompts if p.subject == fact.subject and p.answer == fact.answer), None)
        if (
            prompt is not None
            and (not limit or len(chosen) < limit)
            and all(fact.subject != i.fact.subject for i in chosen)
        ):
            chosen.append(Item(fact, prompt))
    items, left_out = measurable(arm.model, [item for group in asked.values() for item in group])
    by_relation: dict[str, list[int]] = {}
    for row, item in enumerate(items):
        by_relation.setdefault(item.fact.relation, []).append(row)
    tasks = []
    for rows in by_relation.values():
        members = [items[r] for r in rows]
        classes = sorted({m.fact.answer for m in members})
        subjects = [m.fact.subject for m in members]
        if len(set(subjects)) < FEWEST or 2 * len(classes) > len(members):
            found = f"{len(set(subjects))} subjects with {len(classes)} answers"
            why = f"{found}: a probe needs {FEWEST} subjects that share answers"
            left_out += [(m, why) for m in members if m.fact.group == "forget"]
            continue
        labels = np.array([classes.index(m.fact.answer) for m in members])
        dealt = subject_folds(subjects, [m.fact.group for m in members], folds, seed)
        tasks.append(Task(tuple(members), labels, np.array(rows), dealt))
    return items, tasks, left_out


def _states(arm: Arm, items: Sequence[Item]) -> list[np.ndarray]:
    """States after each block at the subject's last token: one array [n, d_model] per layer."""
    with arm.running() as model:
        sites = [f"blocks.{i}.hook_resid_post@subject_last" for i in range(model.n_layers)]
        seen = read(model, [i.prompt for i in items], sites)
    return [seen[site].double().numpy() for site in sites]


def _of_task(task: Task, states: list[np.ndarray], source: list[np.ndarray], ridge: float, seed: int) -> list[Score]:
    groups = np.array([item.fact.group for item in task.items])
    forget = [i for i, g in enumerate(groups) if g == "forget"]
    # A value that no subject outside the fold has cannot be named by any probe.
    seen = [bool(np.any(task.labels[task.folds != task.folds[i]] == task.labels[i])) for i in range(len(groups))]
    refit = [cross_predict(s, task.labels, task.folds, ridge=ridge) == task.labels for s in states]
    moved = [
        cross_predict(s, task.labels, task.folds, source=b, ridge=ridge) for s, b in zip(states, source, strict=True)
    ]
    transfer = [found == task.labels for found in moved]
    scores = []
    for name, hits in (("refit", refit), ("transfer", transfer)):
        scores += [
            _score(task.items[i], hit[i], seen[i], f"{name}, layer {layer}")
            for layer, hit in enumerate(hits)
            for i in forget
        ]
    kept = groups != "forget"
    if not kept.any():
        return scores + [
            task.items[i].score(None, variant="refit, best layer", reason="no facts to keep to choose the layer by")
            for i in forget
        ]
    best = int(np.argmax([hit[kept].mean() for hit in refit]))
    for name, hits in (("refit", refit), ("transfer", transfer)):
        scores += [
            _score(item, hits[best][i], seen[i], f"{name}, best layer", best) for i, item in enumerate(task.items)
        ]
    labels = shuffled_by_subject(task.labels, seed)
    by_chance = cross_predict(states[best], labels, task.folds, ridge=ridge) == labels
    return scores + [_score(task.items[i], by_chance[i], True, "shuffled, best layer", best) for i in forget]


def _left_out(item: Item, reason: str) -> Score:
    return item.score(None, variant="refit, best layer", reason=reason, form="", held_out=False)


def _score(item: Item, hit: bool, seen: bool, variant: str, layer: int | None = None) -> Score:
    if not seen:
        return item.score(
            None,
            variant=variant,
            reason=f"no other subject has the answer {item.fact.answer!r}",
            form="",
            held_out=False,
        )
    return item.score(
        float(hit), variant=variant, detail="" if layer is None else f"layer {layer}", form="", held_out=False
    )
