"""Measuring: every item once, kept as it comes; a budget leaves whole evaluations out; other arms are handed over."""

import json

import pytest

from excise.arms import Arm
from excise.facts import Fact, Facts, Prompt
from excise.measure import measure, read_results
from excise.model import Model
from excise.registry import Method, Option
from excise.rivals import PromptGuard, output_filter
from excise.scores import Score
from tiny import tiny_model

FACTS = Facts([Fact("a", "Ann Lee", "Rome", (Prompt("Ann Lee was born in", "Rome", "Ann Lee"),))])
CALLS: list[tuple] = []


@pytest.fixture
def arms():
    CALLS.clear()
    models = [Model(*tiny_model(family), family) for family in ("llama", "mistral", "gpt2")]
    return [Arm(name, model) for name, model in zip(("before", "edited", "oracle"), models, strict=True)]


def plain(arm, facts, *, limit=3):
    CALLS.append(("plain", arm.name, limit))
    return [Score("a", "Ann Lee", "forget", float(limit))]


def compared(arm, facts, *, before, oracle):
    CALLS.append(("compared", arm.name, before.name, oracle and oracle.name))
    return [Score("a", "Ann Lee", "forget", 0.5)]


def slow(arm, facts):
    CALLS.append(("slow", arm.name))
    CLOCK[0] += 40.0
    return [Score("a", "Ann Lee", "forget", 1.0)]


CLOCK = [0.0]
PLAIN = Method("evaluation", "plain", plain, (Option("limit", 3, "int", ""),), "", "behavioural")
COMPARED = Method("evaluation", "compared", compared, (), "", "intrinsic")
SLOW = Method("evaluation", "slow", slow, (), "", "elicitation")


def test_items_are_measured_once_and_settings_make_new_ones(arms, tmp_path):
    kept = tmp_path / "results.jsonl"
    first = measure(arms, [PLAIN, COMPARED], FACTS, shared={}, kept=kept)
    assert len(CALLS) == 6 and ("compared", "edited", "before", "oracle") in CALLS
    CALLS.clear()
    again = measure(arms, [PLAIN, COMPARED], FACTS, shared={}, kept=kept)
    assert not CALLS and again.scores == first.scores
    measure(arms, [PLAIN, COMPARED], FACTS, shared={"limit": 4}, kept=kept)
    assert [c[:2] for c in CALLS] == [("plain", a.name) for a in arms], "only what has the option is asked again"
    assert read_results(kept).value("edited", "plain").value == 4.0


def test_without_an_oracle_none_is_handed_over(arms):
    measure(arms[:2], [COMPARED], FACTS, shared={})
    assert CALLS == [("compared", "before", "before", None), ("compared", "edited", "before", None)]


def test_another_oracle_makes_new_items_only_where_it_is_looked_at(arms, tmp_path):
    kept = tmp_path / "results.jsonl"
    measure(arms, [PLAIN, COMPARED], FACTS, shared={}, kept=kept)
    CALLS.clear()
    other = Arm("oracle", Model(*tiny_model("neox"), "neox"))
    measure([*arms[:2], other], [PLAIN, COMPARED], FACTS, shared={}, kept=kept)
    assert sorted(c[:2] for c in CALLS) == [
        ("compared", "before"), ("compared", "edited"), ("compared", "oracle"), ("plain", "oracle"),
    ]  # fmt: skip


def test_a_budget_leaves_whole_evaluations_out_and_says_so(arms, tmp_path, monkeypatch):
    import excise.measure

    CLOCK[0] = 0.0
    monkeypatch.setattr(excise.measure.time, "monotonic", lambda: CLOCK[0])
    kept = tmp_path / "results.jsonl"
    some = measure(arms, [COMPARED, PLAIN], FACTS, shared={}, minutes=0, always=("plain",))
    assert some.evaluations == ["plain"] and some.recipe["left_out"] == {"compared": "no time was left"}
    CALLS.clear()
    found = measure(arms, [PLAIN, SLOW, COMPARED], FACTS, shared={}, kept=kept, minutes=1)
    assert found.evaluations == ["plain", "compared"] and "about 120 s" in found.recipe["left_out"]["slow"]
    assert ("slow", "edited") not in CALLS, "two more arms of 40 s did not fit into the 20 s left"
    CALLS.clear()
    whole = measure(arms, [PLAIN, SLOW, COMPARED], FACTS, shared={}, kept=kept, minutes=10)
    assert CALLS == [("slow", "edited"), ("slow", "oracle")], "the arm that was finished is not measured again"
    assert "left_out" not in whole.recipe and whole.recipe["seconds"]["slow"] == pytest.approx(120)
    records = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [r["seconds"] for r in records if r["evaluation"] == "slow" and "scores" in r] == [40.0] * 3


def test_an_arm_under_another_name_is_not_measured_again(arms, tmp_path):
    kept = tmp_path / "results.jsonl"
    measure(arms, [PLAIN], FACTS, shared={}, kept=kept)
    CALLS.clear()
    renamed = [Arm("before", arms[0].model), Arm("chosen", arms[1].model), Arm("twin", arms[1].model), arms[2]]
    found = measure(renamed, [PLAIN], FACTS, shared={}, kept=kept)
    assert not CALLS and found.arms == ["before", "chosen", "twin", "oracle"]
    assert read_results(kept).arms == found.arms


def worded(arm, facts):
    return [Score("a", "Ann Lee", "forget", float(arm.answers(facts.prompts())[0].exact), detail=arm.name)]


def test_a_guard_or_filter_around_a_model_is_not_taken_for_the_model(arms, tmp_path):
    before = arms[0]
    around = [PromptGuard("prompt_guard", before.model, instruction="Hush."), output_filter(before.model, FACTS)]
    asked = Method("evaluation", "worded", worded, (), "", "behavioural")
    results = measure([before, *around], [asked], FACTS, shared={}, kept=tmp_path / "results.jsonl")
    assert [results.scores[a, "worded"][0].detail for a in results.arms] == results.arms
    other = output_filter(before.model, Facts([Fact("b", "Bo Lim", "Oslo", (Prompt("Bo Lim was born in", "Oslo"),))]))
    again = measure([before, other], [asked], FACTS, shared={}, kept=tmp_path / "results.jsonl")
    assert again.scores["output_filter", "worded"][0].detail == "output_filter"
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len({r["key"] for r in lines if "key" in r}) == 2
