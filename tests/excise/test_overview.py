"""What of an audit is read first: headlines by family, attacks by what they draw beyond the oracle, facts that came back."""

from __future__ import annotations

import re

import pytest
from audited import SKIPS, audit, planted

from excise.curves import plot_attacks, plot_bargain, plot_steps
from excise.fragments import results_table, text_overview
from excise.overview import FEW, FIRST, attack_lines, overview
from excise.recovery import drawn_facts, step_curves
from excise.registry import method
from excise.scores import Results
from excise.sections import attacks


@pytest.fixture(scope="module")
def audited() -> Results:
    return audit({"1": 0.0, "5": 0.5, "10": 0.25}, SKIPS)


def test_families_say_what_came_out(audited: Results) -> None:
    asked, attacked, inside, whole = overview(audited)
    assert [p.family for p in (asked, attacked, inside, whole)] == [
        "behavioural",
        "elicitation",
        "intrinsic",
        "aggregates",
    ]
    assert "0.00 (before 1.00, oracle 0.00)" in asked.said and "to keep 1.00 (before 1.00)" in asked.said
    assert attacked.said.startswith("2 of 3 attacks are shown to bring back more") and "layer skip" in attacked.said
    assert "logit lens finds 0.00 (before 1.00, oracle 0.00)" in inside.said
    assert [x.name for x in inside.first] == ["lens: hit@5, any layer"], "single layers are left to the figures"
    # 100 sqrt(f^2 + (1 - r)^2) with f = 0 and r = 1.
    (deviation,) = [x for x in whole.first if x.name == "deviation: rougeL recall"]
    assert deviation.rows["edited"].value == 0 and deviation.rows["before"].value == pytest.approx(100)


def test_the_attack_that_draws_most_beyond_the_oracle_is_on_top(audited: Results) -> None:
    found = attack_lines(audited)
    assert [x.name for x in found] == ["layer skip: any", "relearning: lora, best", "refusal suppression"]
    assert [round(x.rows["edited"].value, 2) for x in found] == [0.75, 0.5, 0.0]
    axes = plot_attacks(found, audited.arms).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "layer skip",
        "relearning: lora, best",
        "refusal suppression",
    ]


def test_what_comes_back_step_by_step(audited: Results) -> None:
    (curve,) = step_curves(audited)
    assert (curve.evaluation, curve.measure) == ("relearning", "lora")
    assert [(step, row.value) for step, row in curve.rows["edited"]] == [(1, 0.0), (5, 0.5), (10, 0.25)]
    lines = {line.get_label(): line.get_ydata() for line in plot_steps(curve, audited.arms).axes[0].lines}
    assert list(lines["edited"]) == [0.0, 0.5, 0.25] and list(lines["before"]) == [1.0, 1.0, 1.0]


def test_which_attack_brings_back_which_fact(audited: Results) -> None:
    found = drawn_facts(audited)
    assert found["f0"] == {"relearning": "edited", "layer_skip": "edited", "refusal_suppression": "neither"}
    assert found["f11"]["layer_skip"] == "neither"
    guessed = audit({"1": 0.0}, SKIPS)
    scores = {
        **guessed.scores,
        ("oracle", "layer_skip"): tuple(planted(dict.fromkeys(("f0", "f11"), 1.0), variant="any")),
    }
    found = drawn_facts(Results(scores, guessed.modes))
    assert (found["f0"]["layer_skip"], found["f11"]["layer_skip"]) == ("both", "oracle")
    page = "".join(attacks(audited))
    assert page.count("●") == 9 + 12 + 1, "nine by skipping, twelve by relearning, one in the key"
    assert "Some attack drew 12 of the 12 facts" in page and "Nothing came of refusal suppression" in page


def test_the_bargain_shows_every_arm_once(audited: Results) -> None:
    axes = plot_bargain(audited).axes[0]
    dots = {c.get_label(): (c.lines[0].get_xdata()[0], c.lines[0].get_ydata()[0]) for c in axes.containers}
    assert dots == {"before": (0.0, 1.0), "edited": (0.0, 0.0), "oracle": (0.0, 0.0)}


def test_a_page_folds_what_a_terminal_leaves_out() -> None:
    many = {("before", f"made_up_{i}"): tuple(planted(0.5)) for i in range(FEW)}
    recall = {("before", "recall"): tuple(s for g in ("forget", "retain") for s in planted(1.0, g))}
    fluent = {("before", "fluency"): tuple(s for i in range(FEW) for s in planted(0.1 * i, variant=f"v{i}"))}
    page = results_table(Results(recall | fluent | many))
    assert page.count('<details class="family" open="open"') == 2 and f"{FEW} more measures" in page
    text = text_overview(Results(recall | fluent))
    assert f"({FEW} more)" in text and "v3" not in text and "v3" in text_overview(Results(recall | fluent), whole=True)
    assert text_overview(Results({})) == "(nothing was measured)"


@pytest.mark.parametrize(("name", "variant"), FIRST)
def test_headlines_are_what_evaluations_give(name: str, variant: str) -> None:
    """A headline that no evaluation writes would never be seen to be missing."""
    said = re.sub(r"\s+", " ", method("evaluation", name).function.__doc__ or "")
    assert not variant or variant.split(", ")[-1] in said
