"""Public benchmarks through lm-eval, where that package is installed: what an edit costs in tasks that others know."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from evals.sampling import nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

MISSING = "lm-eval is not installed: pip install lm-eval"


@evaluation("behavioural")
def lm_eval(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    tasks: tuple[str, ...] = (),
    task_folder: str = "",
    few_shot: int | None = None,
    limit: int = 100,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Score]:
    """Each metric of each task, document by document, as lm-eval (0.4) scores it; the edit is in force throughout.

    The variant is the metric (such as "acc"), the form is the task, the group is "general". The facts are not asked.
    tasks: names of lm-eval tasks or task groups, such as mmlu or wikitext; most of them download data.
    task_folder: a folder with one's own task files.
    few_shot: examples before each question; the task's own number when not given.
    limit: most documents per task; 0 for all.
    batch_size: documents in one forward pass.
    seed: which examples are shown.
    """
    if not tasks:
        return nothing("no tasks: give `tasks`, such as mmlu", group="general")
    if importlib.util.find_spec("lm_eval") is None:
        return nothing(MISSING, group="general")
    package, models, manager = (importlib.import_module(f"lm_eval{m}") for m in ("", ".models.huggingface", ".tasks"))
    with arm.running() as model:
        language_model = models.HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=batch_size)
        found = package.simple_evaluate(
            model=language_model, tasks=list(tasks), num_fewshot=few_shot, limit=limit or None, log_samples=True,
            bootstrap_iters=0, task_manager=manager.TaskManager(include_path=task_folder or None),
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    return scores_of(found) or nothing(f"lm-eval scored no document of {', '.join(tasks)}", group="general")


def scores_of(found: Mapping[str, Any]) -> list[Score]:
    """The per-document metrics in what lm-eval gives back; metrics that are no numbers of their own are left out."""
    scores = []
    for task, documents in found.get("samples", {}).items():
        for document in documents:
            for metric in document["metrics"]:
                value = document.get(metric)
                fact = f"{task}/{document['doc_id']}"
                if isinstance(value, (bool, int, float)):
                    filtered = document.get("filter", "none")
                    name = metric if filtered == "none" else f"{metric}, {filtered}"
                    scores.append(Score(fact, fact, "general", float(value), form=task, variant=name))
    return scores
