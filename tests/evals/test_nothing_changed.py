"""Where nothing changed nothing is found: a second checkpoint with the same weights, of a model that knows its facts.

`test_every_evaluation_runs_and_repeats` does the same with a model that knows nothing; here are the evaluations that have
nothing to measure there.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Sequence
from typing import Any

import pytest
from knowing import NEEDS_MORE, knows

import evals
from excise.arms import Arm
from excise.facts import Facts
from excise.fates import fates
from excise.model import Model
from excise.scores import Results, Score
from excise.verdict import verdict
from tiny import tiny_model


@functools.cache
def arms(family: str = "llama") -> tuple[Arm, Arm, Arm, Facts]:
    """A model, its copy, one that knows nothing of the facts, and the facts."""
    model = Model(*tiny_model(family))
    facts = knows(model, 16)
    copied = Model(copy.deepcopy(model.hf), model.tokenizer)
    return Arm("before", model), Arm("after", copied), Arm("oracle", Model(*tiny_model(family, seed=1))), facts


def measured(name: str, arm: Arm, others: dict[str, Any], facts: Sequence[Any]) -> list[Score]:
    function = getattr(evals, name)
    wanted = inspect.signature(function).parameters
    return function(arm, facts, **{k: v for k, v in others.items() if k in wanted})  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", sorted(NEEDS_MORE))
def test_a_copy_scores_as_the_model_itself(name: str) -> None:
    before, after, oracle, facts = arms("qwen3-moe" if name in ("router_shift", "expert_rollback") else "llama")
    others = {"before": before, "oracle": oracle}
    then, now = measured(name, before, others, facts), measured(name, after, others, facts)
    assert then == now
    if name in ("interpolation", "weight_diff", "direction_reversal", "fisher_erasure", "patching_recovery"):
        assert not [s for s in now if s.value], "nothing to undo, to reverse or to restore"


def test_the_verdict_is_that_nothing_is_forgotten() -> None:
    before, after, oracle, facts = arms()
    found = {
        (arm.name, name): tuple(measured(name, arm, {"before": before, "oracle": oracle}, facts))
        for name in ("recall", "probability", "drift", "layer_skip", "quantisation")
        for arm in (before, after, oracle)
    }
    results = Results(found, {"before": "none", "after": "none", "oracle": "none"})
    said = verdict(results)
    assert said.state == "bad" and said.headline.startswith("Not forgotten"), said.headline
    words = [f.word for f in fates(results) if f.group == "forget"]
    assert words and set(words) <= {"still stated", "not known before"} and "still stated" in words
    assert {f.word for f in fates(results) if f.group == "retain"} <= {"kept", "not known before"}
