"""Records of public data sets go through the readers and a behavioural audit; the model is random and knows none of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import evals
from excise.arms import Arm, compare
from excise.facts import Facts
from excise.facts_io import read_facts
from excise.model import Model
from excise.scores import Results, Score
from tiny import tiny_model

DATA = Path(__file__).parents[1] / "data"
# The whole sets, where a checkout has them beside it.
WHOLE = Path(__file__).parents[3] / "shared" / "data"
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
        ("tofu", "Hsiao Yun-Hwa", "LGBTQ+ community"),
        ("knowundo", "Isabella Marquez", "Isabella Marquez's father is a renowned"),
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


def whole(name: str) -> Facts:
    if not (WHOLE / name).is_file():
        pytest.skip(f"{WHOLE / name} is not there")
    return read_facts(WHOLE / name)


def test_questions_about_one_author_are_one_cluster() -> None:
    tofu = whole("tofu_forget10_entities/forget10_filtered.json")
    by_author: dict[int, Counter[str]] = {}
    for fact in tofu:  # TOFU asks twenty questions about one author after another
        by_author.setdefault(int(fact.id.removeprefix("qa-")) // 20, Counter())[fact.subject] += 1
    authors = {number: found.most_common(1)[0] for number, found in by_author.items()}
    assert len({name for name, _ in authors.values()}) == len(authors) == 20
    assert sum(n for _, n in authors.values()) >= len(tofu) - 1
    assert sum(f.prompt.span is None for f in tofu) <= 20, "the name stands in the question, where it can be found"


def test_authors_of_what_is_forgotten_and_kept_are_the_same() -> None:
    forget, retain = (whole(f"knowundo_privacy/{n}_train.json") for n in ("unlearn", "retention"))
    assert forget.counts == {"forget": 400} and retain.counts == {"retain": 441}
    assert len(forget + retain) == 841, "no id is given twice"
    assert set(forget.subjects) >= set(retain.subjects) and len(forget.subjects) == 55
    assert all(f.prompt.span for f in forget + retain)
    assert min(Counter(f.subject for f in forget).values()) >= 4


def test_contracts_stay_contracts_and_general_questions_stay_alone() -> None:
    pistol = whole("pistol/pistol_sample1.json")
    assert set(Counter(f.subject for f in pistol).values()) == {20}
    general = whole("pistol/factual_data.json")
    assert general.subjects == [f.prompt.text for f in general] and general.counts == {"forget": 1, "retain": 168}


def test_intervals_of_one_authors_questions_are_as_wide_as_their_number_allows() -> None:
    """Ten authors, each known or not as a whole: 200 answers say no more than ten do."""
    tofu = whole("tofu_forget10_entities/forget10_filtered.json")
    known = {name: float(n % 2) for n, name in enumerate(tofu.subjects)}
    scores = tuple(Score(f.id, f.subject, "forget", known[f.subject]) for f in tofu)
    row = Results({("a", "recall"): scores}).table()[0]
    assert row.high - row.low > 0.35
