"""Probe selectivity: does a probe read the fact, or does it learn the names by heart? Other wordings, and a control task."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.lens import kin
from evals.sampling import Item, measurable, nothing, ranked
from evals.states import states
from excise.arms import Arm
from excise.facts import Fact
from excise.model import Model
from excise.probes import cross_predict
from excise.registry import evaluation
from excise.scores import Score

GROUPS = ("forget", "retain", "neighbour")
# A relation is probed when so many subjects have it and their answers fall into at least two classes.
FEWEST = 4


@dataclass(frozen=True)
class Task:
    """One relation: items in several wordings, the class of each, a random class per subject, the wording's number."""

    items: tuple[Item, ...]
    labels: np.ndarray
    control: np.ndarray
    wording: np.ndarray


@evaluation("intrinsic")
def probe_selectivity(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    wordings: int = 2,
    relations: int = 3,
    limit: int = 40,
    ridge: float = 0.1,
    seed: int = 0,
) -> list[Score]:
    """How much better a linear probe names the answer in a wording it never saw than it names a class dealt at random.

    For each relation and layer a ridge classifier is trained on all subjects in all wordings but one, from the state where
    the answer is predicted, and asked about the last wording. The control task (Hewitt and Liang 2019, arXiv 1909.03368)
    gives each subject a fixed random class with the same marginals: what a probe gets there it gets by learning names.
    Variants, per fact, at the layer where facts to keep are read best: "accuracy", "control", "selectivity" (their
    difference); "transfer" (trained on the states of `before`, asked about the arm's); "words" (mean token embedding of
    the prompt in place of a state); "majority". Each of the first three also with ", layer i". Read with `probe`, whose
    subjects are unseen, and against the oracle.
    wordings: prompts per fact, of any generative form.
    relations: most relations that are probed; 0 for all.
    limit: most subjects per relation and group; 0 for all.
    ridge: penalty relative to the mean squared norm of the standardised states.
    seed: order of the subjects and the random classes.
    """
    tasks, left_out = _tasks(arm.model, facts, wordings, limit, seed)
    tasks = tasks[:relations] if relations else tasks
    if not tasks:
        return left_out or nothing("no relation whose facts to forget are asked in two wordings")
    scores = list(left_out)
    for task in tasks:
        now = _by_layer(arm, task)
        then = now if arm is before else _by_layer(before, task)
        scores += _of_task(task, now, then if kin(arm.model, before.model) else None, _words(before.model, task), ridge)
    return scores


def control_labels(subjects: Sequence[str], labels: np.ndarray, seed: int) -> np.ndarray:
    """A class for each row that depends on its subject alone, with the same number of subjects in each class."""
    first = {s: int(label) for s, label in zip(reversed(subjects), labels[::-1], strict=True)}
    names = sorted(first)
    dealt = [first[s] for s in names]
    random.Random(f"control|{seed}").shuffle(dealt)
    given = dict(zip(names, dealt, strict=True))
    return np.array([given[s] for s in subjects])


def _tasks(model: Model, facts: Sequence[Fact], wordings: int, limit: int, seed: int) -> tuple[list[Task], list[Score]]:
    asked: dict[str, list[Item]] = {}
    taken: dict[tuple[str, str], set[str]] = {}
    for fact in ranked([f for f in facts if f.group in GROUPS and f.relation], seed):
        met = taken.setdefault((fact.relation, fact.group), set())
        if fact.subject in met or (limit and len(met) >= limit):
            continue
        own = [p for p in fact.prompts if p.subject == fact.subject and p.answer == fact.answer and not p.choices]
        items, _ = measurable(model, [Item(fact, p) for p in own[:wordings]])
        if len(items) >= 2:
            met.add(fact.subject)
            asked.setdefault(fact.relation, []).extend(items)
    tasks, left_out = [], []
    for items in asked.values():
        classes = sorted({i.fact.answer for i in items})
        subjects = [i.fact.subject for i in items]
        n = len(set(subjects))
        if n < FEWEST or len(classes) < 2 or 2 * len(classes) > n:
            why = f"{n} subjects with {len(classes)} answers: a probe needs {FEWEST} subjects that share answers"
            lost = {i.fact.id: i for i in items if i.fact.group == "forget"}.values()
            left_out += [i.score(None, variant="selectivity", reason=why, form="", held_out=False) for i in lost]
            continue
        labels = np.array([classes.index(i.fact.answer) for i in items])
        turn: dict[str, int] = {}
        wording = []
        for item in items:
            turn[item.fact.id] = turn.get(item.fact.id, -1) + 1
            wording.append(turn[item.fact.id])
        tasks.append(Task(tuple(items), labels, control_labels(subjects, labels, seed), np.array(wording)))
    return tasks, left_out


def _by_layer(arm: Arm, task: Task) -> list[np.ndarray]:
    seen = states(arm, [i.prompt for i in task.items])
    return [np.stack([s.last[layer].double().numpy() for s in seen]) for layer in range(arm.model.n_layers)]


def _words(model: Model, task: Task) -> np.ndarray:
    """Mean token embedding of each prompt, [n, d]."""
    table = model.hf.get_input_embeddings().weight.detach()
    rows = model.tokenised([i.prompt for i in task.items], answers=False)
    return np.stack([table[r.ids].double().mean(0).cpu().numpy() for r in rows])


def _of_task(
    task: Task, now: list[np.ndarray], then: list[np.ndarray] | None, words: np.ndarray, ridge: float
) -> list[Score]:
    def hits(x: np.ndarray, labels: np.ndarray, source: np.ndarray | None = None) -> np.ndarray:
        return (cross_predict(x, labels, task.wording, source=source, ridge=ridge) == labels).astype(float)

    real, chance = ([hits(x, labels) for x in now] for labels in (task.labels, task.control))
    kept = np.array([i.fact.group != "forget" for i in task.items])
    best = int(np.argmax([h[kept].mean() for h in real])) if kept.any() else len(real) - 1
    curves = {"accuracy": real, "control": chance, "selectivity": [a - b for a, b in zip(real, chance, strict=True)]}
    scores = [
        score
        for name, rows in curves.items()
        for layer, row in enumerate(rows)
        for score in _per_fact(task, row, f"{name}, layer {layer}", forget_only=True)
    ]
    found = {name: rows[best] for name, rows in curves.items()} | {"words": hits(words, task.labels)}
    if then is not None:
        found["transfer"] = hits(now[best], task.labels, then[best])
    common = np.bincount(task.labels).argmax()
    found["majority"] = (task.labels == common).astype(float)
    return scores + [s for name, row in found.items() for s in _per_fact(task, row, name, detail=f"layer {best}")]


def _per_fact(task: Task, row: np.ndarray, variant: str, *, forget_only: bool = False, detail: str = "") -> list[Score]:
    """Means over the wordings of each fact."""
    own: dict[str, list[int]] = {}
    for i, item in enumerate(task.items):
        own.setdefault(item.fact.id, []).append(i)
    return [
        task.items[at[0]].score(float(row[at].mean()), variant=variant, form="", held_out=False, detail=detail)
        for at in own.values()
        if not forget_only or task.items[at[0]].fact.group == "forget"
    ]
