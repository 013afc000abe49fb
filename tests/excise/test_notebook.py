"""Objects show themselves in a notebook: what they are on top, everything escaped, nothing that needs a script."""

import numpy as np
import pytest
import torch

from excise.actions import LowRank
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.scores import Localization, Results, Score
from excise.sites import Site

HOSTILE = "<script>alert(1)</script>"


def fact(i: int) -> Fact:
    asked = (Prompt(f"{HOSTILE} {i} was born in", "Rome"), Prompt("Born in?", "Rome", form="question", held_out=True))
    return Fact(f"f{i}", HOSTILE, "Rome", asked, relation="birthplace")


def results() -> Results:
    def scores(forget: float) -> tuple[Score, ...]:
        return tuple(
            Score(f"f{i}", f"s{i}", group, value, form="statement")
            for group, value in (("forget", forget), ("retain", 1.0))
            for i in range(60)
        )

    arms = {"before": 1.0, HOSTILE: 0.0, "oracle": 0.0}
    return Results({(arm, "recall"): scores(v) for arm, v in arms.items()}, dict.fromkeys(arms, "weight"))


EDIT = Edit((Change(Site("blocks.1.mlp.W_out"), LowRank(torch.ones(4, 1), torch.ones(1, 4))),), {"method": HOSTILE})
WHERE = Localization.of([f"blocks.{i}.mlp.W_out" for i in range(20)])
SHOWN = {
    "facts": (Facts([fact(i) for i in range(20)]), "Facts(20: 20 forget; 1 subjects)", "and 8 more"),
    "fact": (fact(0), "Fact f0", "held out"),
    "localization": (WHERE, "by hand: 1 facts x 20 sites", "blocks.0.mlp.W_out"),
    "edit": (EDIT, "1 changes, weight", "low rank"),
    "results": (results(), "recall; 360 scores", "n 60"),
    "verdict": (
        results().verdict({"roles": {"edited": HOSTILE}}),
        "The model no longer says the facts",
        "Does it last?",
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_what_it_is_stands_on_top_and_nothing_is_executed(name: str) -> None:
    shown, head, inside = SHOWN[name]
    html = shown._repr_html_()
    assert head in html.split("<table")[0] and inside in html
    assert "<script" not in html and "<button" not in html
    assert html.count("<div") == html.count("</div>")
    assert all(html[i - 1] == " " for i in range(len(html)) if html.startswith("<small", i))


def test_results_answer_for_themselves() -> None:
    found, recipe = results(), {"roles": {"edited": HOSTILE}}
    said = found.verdict(recipe)
    assert str(said).startswith(said.headline) and all(f.question in str(said) for f in said.findings)
    assert {f.word for f in found.fates(recipe) if f.group == "forget"} == {"no longer stated"}
    assert found.plot_forms().axes[0].get_title() == "recall on forget facts"
    with pytest.raises(ValueError, match="recall has no measure '' by layer"):
        found.plot_layers("recall")


def test_a_localization_of_nothing_shows_itself() -> None:
    assert "0 sites" in Localization((), np.zeros((1, 0)), ("f",))._repr_html_()
