"""Records of public data sets go through the readers and a behavioural audit; the model is random and knows none of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import evals
from excise.arms import Arm, compare
from excise.facts_io import read_facts
from excise.model import Model
from tiny import tiny_model

DATA = Path(__file__).parents[1] / "data"
ASKED = (
    "recall",
    "probability",
    "rouge",
    "truth_ratio",
    "memorisation",
    "forced_choice",
    "coverage",
    "privacy",
    "fluency",
)
# Sets whose records bring wrong answers, or other values of their relation.
COMPARABLE = {"counterfact"}


@pytest.mark.parametrize(
    ("name", "subject", "answer"),
    [
        ("pistol", "A_B", "06-02-1998"),
        ("tofu", "What does Hsiao Yun-Hwa identify as in terms of gender?", "LGBTQ+ community"),
        ("knowundo", "Who are Isabella Marquez's parents?", "Isabella Marquez's father is a renowned"),
        ("counterfact", "Danielle Darrieux", "French"),
    ],
)
def test_public_records_are_read_and_audited(name: str, subject: str, answer: str) -> None:
    facts = read_facts(DATA / f"{name}.json")
    assert facts[0].subject == subject and facts[0].answer.startswith(answer)
    model = Model(*tiny_model("llama"))
    model.hf.config.max_position_embeddings = 256  # rotary positions need no table
    results = compare([Arm("before", model), Arm("again", model)], None, [getattr(evals, n) for n in ASKED], facts)
    for evaluation in ASKED:
        before, again = (results.scores[arm, evaluation] for arm in ("before", "again"))
        assert before == again, f"{evaluation} sees a change where there is none"
        assert all(s.reason if s.value is None else np.isfinite(s.value) for s in before)
        needs_rivals = evaluation in ("truth_ratio", "forced_choice") and name not in COMPARABLE
        assert any(s.value is not None for s in before) is not (needs_rivals or evaluation == "privacy"), evaluation
    assert {f.id for f in facts.group("forget")} <= {s.fact for s in results.scores["before", "probability"]}
    assert results.table() and not [r for r in results.summary() if r.evaluation in ("recovered", "forget_quality")]
