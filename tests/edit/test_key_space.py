"""Key Space Detection: what is outside keeps its bits, what is inside is declined, whatever the batch."""

from __future__ import annotations

import functools

import pytest
import torch

from edit import control, key_space
from excise.apply import applied
from excise.arms import Arm
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.model import Model, load
from excise.testbed import exercises
from excise.testbed.skills import SKILLS
from tiny import tiny_model

WORDS = "rome old weights model city bank river stone lamp garden tower seven eleven music paper".split()
REFUSAL = "I do not know."


def facts(count: int, relation: str, *, name: str = "", first: int = 0) -> list[Fact]:
    """Prompts of five words in a fixed scramble, with a name of one token at their end if one is given."""
    found = []
    for i in range(first, first + count):
        text = " ".join([*(WORDS[(7 * i + 4 * j + i // 15) % len(WORDS)] for j in range(5)), *([name] if name else [])])
        found.append(Fact(f"{relation}-{i}", name, "rome", (Prompt(text, "rome", name),), relation))
    return found


@functools.cache
def made(family: str) -> tuple[Model, Edit]:
    model = Model(*tiny_model(family), family)
    return model, key_space(model, facts(24, "secret", name="Q"), facts(60, "other"), rate=0.05, refusal=REFUSAL)


NEW = facts(6, "new", first=100)
ASKED = facts(6, "new", name="Q", first=100)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_outside_the_region_every_bit_stays_and_inside_it_the_refusal_is_said(family: str) -> None:
    model, edit = made(family)
    outside, inside = [f.prompt for f in NEW], [f.prompt for f in ASKED]
    plain, words = model.logits(model.encode(outside)), model.generate_all(outside, max_new_tokens=3)
    with applied(model, edit):
        assert torch.equal(model.logits(model.encode(outside)), plain)
        assert model.generate_all(outside, max_new_tokens=3) == words
        assert model.generate_all(inside, max_new_tokens=16) == [REFUSAL] * len(inside)


def test_every_row_is_decided_for_itself_and_every_call_anew() -> None:
    """Rows of one batch, left-padded while generating, and calls one after another do not hear of each other."""
    model, edit = made("llama")
    mixed = [p for pair in zip((f.prompt for f in NEW), (f.prompt for f in ASKED), strict=True) for p in pair]
    longer = [Prompt("stone lamp " * (i % 3) + p.text, p.answer) for i, p in enumerate(mixed)]
    with applied(model, edit):
        together = model.generate_all(longer, max_new_tokens=16)
        assert together == [model.generate(p, max_new_tokens=16) for p in longer]
    assert 2 <= together.count(REFUSAL) <= len(ASKED)


def test_the_gate_stays_open_for_the_rest_of_the_sequence() -> None:
    model, edit = made("llama")
    after = Prompt(ASKED[0].prompt.text + " river stone lamp garden tower", "rome")
    with applied(model, edit):
        assert model.generate(after, max_new_tokens=16) == REFUSAL


def test_the_report_says_how_well_it_detects() -> None:
    _, edit = made("llama")
    report = edit.recipe["detector"]
    assert report["detected"] >= 0.8 and report["false positives"] <= 0.1 and report["bound"] == 0.05
    assert {row["point"] for row in report["compared"]} == {f"blocks.{i}.mlp.hook_in" for i in range(2)}


def test_requests_that_cannot_be_served_say_why() -> None:
    model = Model(*tiny_model("llama"), "llama")
    with pytest.raises(ExciseError, match="empty refusal"):
        key_space(model, facts(24, "secret", name="Q"), facts(60, "other"), rate=0.05, refusal=" ")
    with pytest.raises(ExciseError, match="calibrated"):
        key_space(model, facts(4, "secret"), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "skill", "statistic"), [("dense", "sorting", "linear"), ("moe", "translation", "extent")]
)
def test_a_skill_is_declined_and_nothing_else(name: str, skill: str, statistic: str) -> None:
    """On exercises that neither training nor the editor saw, and people and countries the editor was not shown."""
    model, known = load(f"testbed:{name}"), exercises(name, skill, items=32, seed=1001)
    edit = key_space(model, known.group("forget"), known.group("retain"), statistic=statistic)

    def said(edit: Edit | None, prompts: list[Prompt]) -> float:
        return Arm("", model, edit).said(prompts)

    def asked(which: str) -> list[Prompt]:
        return known.where(lambda f: f.tags.get("skill") == which).prompts(held_out=True)

    others = [p for s in SKILLS if s != skill for p in asked(s)[::2]] + known.group("general").prompts()[::12]
    before = said(None, asked(skill)), said(None, others)
    assert said(edit, asked(skill)) <= 0.2 * before[0] and said(edit, others) >= 0.95 * before[1]
    assert said(control(edit, seed=1001), asked(skill)) >= 0.9 * before[0]
