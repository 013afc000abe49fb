"""The audit: names and families, what needs an oracle, and its outcome in words and values."""

import pytest

from excise.audit import DEFAULT, FAMILIES, chosen, need_oracle, outcome, told
from excise.errors import ExciseError
from excise.registry import methods
from excise.scores import Results, Score


def test_families_and_names_are_chosen_once_in_order():
    known = methods("evaluation")
    assert [m.name for m in chosen()] == list(DEFAULT)
    intrinsic = [m.name for m in chosen(["intrinsic"])]
    assert intrinsic and all(known[n].family == "intrinsic" for n in intrinsic)
    assert [m.name for m in chosen(["drift", "intrinsic", "drift", "lens"])] == ["drift", *intrinsic]
    assert {m.name for m in chosen(["all"])} == set(known) == {m.name for m in chosen(FAMILIES)}
    with pytest.raises(ExciseError, match="no evaluation or family 'intrinsik'; did you mean intrinsic"):
        chosen(["intrinsik"])


def test_every_evaluation_has_a_family():
    assert all(m.family in FAMILIES for m in methods("evaluation").values())


def test_those_that_need_an_oracle_are_named():
    assert "recall" not in need_oracle(chosen(["all"]))


def test_the_outcome_says_what_was_left_out():
    scores = {
        (arm, "recall"): tuple(Score(f"f{i}", f"s{i}", "forget", v, "question") for i in range(60))
        for arm, v in (("before", 1.0), ("edited", 0.0))
    }
    found = Results(
        scores, {"edited": "weight"}, {"left_out": {"relearning": "no time was left"}, "seconds": {"recall": 1.0}}
    )
    values = outcome(found)
    assert values["left_out"] == {"relearning": "no time was left"} and values["fates"][0]["fate"] == "no longer stated"
    text = told(found)
    assert (
        text.startswith("The model no longer says the facts") and "Of 60 facts to forget: 60 no longer stated." in text
    )
    assert "Left out: relearning (no time was left)." in text
