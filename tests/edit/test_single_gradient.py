"""One step along one gradient: the front, the search and the direction against brute force."""

from __future__ import annotations

import importlib
import math
import random

import pytest
import torch

from edit import single_gradient
from edit.single_gradient import alignment, pareto, shortest
from excise.actions import Dense
from excise.apply import applied
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gradients import answer_losses, block_matrices, mean_gradients
from excise.model import Model
from excise.scores import Localization
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Moor", "Dora Hill"]
FACTS = [
    Fact(n, n, t, (Prompt(f"{n} was born in", t, n), Prompt(f"Where was {n} born?", t, n)), "birthplace")
    for n, t in zip(NAMES, "Rome Oslo Bonn Bern".split(), strict=True)
]
FORGET, RETAIN = FACTS[:2], FACTS[2:]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_holds_what_nothing_else_beats(seed: int) -> None:
    draw = random.Random(seed)
    scores = {str(i): (round(draw.random(), 1 + seed % 2), round(draw.random(), 1 + seed % 2)) for i in range(40)}

    def beaten(name: str) -> bool:
        u, v = scores[name]
        return any(a >= u and b <= v and (a, b) != (u, v) for a, b in scores.values())

    found = pareto(scores)
    assert {scores[n] for n in found} == {scores[n] for n in scores if not beaten(n)}
    assert [scores[n][0] for n in found] == sorted((scores[n][0] for n in found), reverse=True)


@pytest.mark.parametrize("threshold", [0.013, 0.3, 1.0, 7.7])
def test_the_search_brackets_the_shortest_step(threshold: float) -> None:
    asked: list[float] = []

    def reached(length: float) -> bool:
        asked.append(length)
        return length >= threshold

    length, ok = shortest(reached, 0.1, 10)
    assert ok and length >= threshold and len(asked) == 10
    assert length - threshold <= max(0.1, threshold) / 2**3  # doubling costs log2(threshold / first) of the ten
    low, high = 0.0, math.inf
    for step in asked:
        assert low < step < high
        low, high = (low, step) if step >= threshold else (step, high)
    assert shortest(lambda _: False, 0.1, 4) == (0.8, False)


def test_alignment_by_hand() -> None:
    weight, up, keep = torch.full((2, 2), 2.0), torch.tensor([[3.0, 4.0], [0, 0]]), torch.tensor([[-4.0, -3.0], [0, 0]])
    assert alignment(weight, up, keep) == (pytest.approx(5 / 4), pytest.approx(24 / 25))
    assert alignment(weight, up, None) == (pytest.approx(5 / 4), 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_one_matrix_moves_up_the_gradient_of_the_forget_loss(family: str) -> None:
    model = Model(*tiny_model(family), family)
    prompts = [p for f in FORGET for p in f.prompts]
    edit = single_gradient(model, FORGET, RETAIN, aim=0.0, steps=2, front=2)
    (change,) = edit.changes
    name = str(change.site)
    assert isinstance(change.action, Dense) and edit.recipe["chosen"] == name in block_matrices(model, range(2))
    gradient = mean_gradients(model, prompts, [name], odds=True)[name]
    torch.testing.assert_close(change.action.change / change.action.change.norm(), gradient / gradient.norm())

    def loss() -> float:
        with torch.no_grad():
            return float(answer_losses(model, model.encode(prompts, answers=True), odds=True).mean())

    before = loss()
    short = edit.scaled(1e-3 / float(change.action.change.norm()))
    with applied(model, short):
        assert loss() - before == pytest.approx(1e-3 * float(gradient.norm()), rel=0.1)  # to first order


def test_sites_choose_matrices() -> None:
    model = Model(*tiny_model("llama"), "llama")
    where = Localization.of(["blocks.1.mlp.W_out"])
    assert single_gradient(model, FORGET, RETAIN, where, steps=1).recipe["chosen"] == "blocks.1.mlp.W_out"


def test_the_step_is_the_shortest_that_silences_and_the_matrix_the_one_that_spares(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A made-up judge: forget answers go at a tenth of a matrix's norm, retain answers with every matrix but one."""
    model = Model(*tiny_model("llama"), "llama")
    spared = "blocks.0.mlp.W_out"
    forget = {p for f in FORGET for p in f.prompts}

    def said(arm: Arm, prompts: list[Prompt]) -> float:
        if arm.edit is None:
            return 1.0
        (change,) = arm.edit.changes
        share = float(change.action.change.norm() / model.weight(str(change.site)).norm())
        return float(share < 0.08) if set(prompts) <= forget else float(str(change.site) == spared)

    monkeypatch.setattr(Arm, "said", said)
    module = importlib.import_module("edit.single_gradient")
    monkeypatch.setattr(module, "pareto", lambda scores: [n for n in sorted(scores) if "mlp.W_" in n])
    edit = single_gradient(model, FORGET, RETAIN)
    assert edit.recipe["chosen"] == spared
    chosen = next(r for r in edit.recipe["front"] if r["matrix"] == spared)
    assert chosen["forget"] == 0 and 0.08 <= chosen["step"] <= 0.0803


def test_requests_that_cannot_be_served_say_why() -> None:
    model = Model(*tiny_model("llama"), "llama")
    with pytest.raises(ExciseError, match="give forget and retain"):
        single_gradient(model, FORGET, [])
    with pytest.raises(ValueError, match="no loss"):
        single_gradient(model, FORGET, RETAIN, loss="margin")
