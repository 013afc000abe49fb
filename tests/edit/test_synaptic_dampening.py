"""Synaptic dampening against a loop over prompts and weights, and what it does on the embedded model."""

from __future__ import annotations

import itertools

import pytest
import torch

from edit import synaptic_dampening
from edit.synaptic_dampening import FLOOR, factors, ratios
from excise.actions import Sparse
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gradients import answer_losses, block_matrices, mean_gradients
from excise.model import Model
from excise.scores import Localization
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Moor", "Dora Hill", "Eve Ford", "Finn Dale"]
FACTS = [
    Fact(n, n, t, (Prompt(f"{n} was born in", t, n), Prompt(f"Where was {n} born?", t, n)), "birthplace")
    for n, t in zip(NAMES, "Rome Oslo Bonn Bern Riga Kiev".split(), strict=True)
]
FORGET, RETAIN = FACTS[:2], FACTS[2:]


def tiny(family: str = "llama") -> Model:
    return Model(*tiny_model(family), family)


def squares(model: Model, facts: list[Fact], name: str) -> torch.Tensor:
    """The mean squared gradient of one matrix, one prompt at a time, by autograd."""
    total = torch.zeros_like(model.weight(name).detach())
    prompts = [p for f in facts for p in f.prompts]
    for prompt in prompts:
        model.hf.zero_grad()
        answer_losses(model, model.encode([prompt], answers=True), odds=True).sum().backward()
        where = model.names.weight(name)
        parameter = model.hf.get_parameter(where.parameter)
        plain, parameter.data = parameter.data, parameter.grad
        total += where.view(model.hf).detach() ** 2
        parameter.data = plain
    model.hf.zero_grad()
    return total / len(prompts)


def test_factors_by_a_loop_over_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    forget, retain = (torch.rand(6, 7, generator=draw) ** 4 for _ in range(2))
    forget[0, 0] = retain[0, 0] = 0.0
    retain[0, 1] = 0.0
    found = factors(ratios(forget, retain), 2.0, 0.5)
    floor = FLOOR * float(retain.median())
    for i in range(6):
        for j in range(7):
            ratio = float(forget[i, j]) / (float(retain[i, j]) + floor)
            assert float(found[i, j]) == pytest.approx(min(0.5 / ratio, 1.0) if ratio > 2 else 1.0, rel=1e-5)
    assert found[0, 0] == 1 and 0 < found[0, 1] < 1
    assert ((found >= 0) & (found <= 1)).all() and (factors(ratios(forget, retain), float("inf")) == 1).all()


def test_a_larger_ratio_chooses_fewer_weights() -> None:
    ratio = torch.rand(500, generator=torch.Generator().manual_seed(1)) * 20
    chosen = [factors(ratio, alpha) < 1 for alpha in (1.0, 2.0, 5.0, 10.0, 15.0)]
    assert all((b <= a).all() and b.sum() < a.sum() for a, b in itertools.pairwise(chosen))


def test_data_that_hold_the_forget_prompts_bound_the_ratio() -> None:
    """With importance of all data instead of retain data alone, alpha = 10 needs a forget set below a tenth of them."""
    model = tiny()
    name = "blocks.1.mlp.W_out"
    forget, everything = squares(model, FORGET, name), squares(model, FACTS, name)
    most = len(FACTS) / len(FORGET)
    assert float((forget / everything.clamp_min(1e-30)).max()) <= most * (1 + 1e-4)
    assert float(ratios(forget, squares(model, RETAIN, name)).max()) > most


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_an_edit_multiplies_the_weights_by_their_factors(family: str) -> None:
    model = tiny(family)
    edit = synaptic_dampening(model, FORGET, RETAIN, alpha=3.0, dampening=0.5)
    touched = {str(c.site): c.action for c in edit.changes}
    assert edit.recipe["weights dampened"] == sum(len(a.indices) for a in touched.values()) > 0
    plain = {n: model.weight(n).detach().clone() for n in block_matrices(model, range(model.n_layers))}
    assert set(touched) <= set(plain)
    prompts = [[p for f in facts for p in f.prompts] for facts in (FORGET, RETAIN)]
    truth = [mean_gradients(model, some, list(plain), square=True, odds=True) for some in prompts]
    for name, weight in plain.items():
        if name not in truth[1]:  # an expert that no retain prompt reaches
            assert name not in touched
        elif name in truth[0]:
            wanted = weight * factors(ratios(truth[0][name], truth[1][name]), 3.0, 0.5)
            found = weight + touched[name].delta(weight) if name in touched else weight
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_importance_is_that_of_prompts_one_by_one_whatever_the_batches() -> None:
    model = tiny()
    name = "blocks.0.attn.W_Q"
    prompts = [p for f in FACTS for p in f.prompts]
    for tokens in (None, 1, 60):
        found = mean_gradients(model, prompts, [name], square=True, odds=True, tokens=tokens)[name]
        torch.testing.assert_close(found, squares(model, FACTS, name), rtol=1e-3, atol=1e-9)


def test_sites_choose_matrices_or_blocks_and_a_share_chooses_as_many_of_each() -> None:
    model = tiny()
    one = synaptic_dampening(model, FORGET, RETAIN, Localization.of(["blocks.1.mlp.W_out"]), share=0.01, dampening=0.0)
    (change,) = one.changes
    assert str(change.site) == "blocks.1.mlp.W_out" and isinstance(change.action, Sparse)
    assert len(change.action.indices) == -(-model.weight("blocks.1.mlp.W_out").numel() // 100)
    block = synaptic_dampening(model, FORGET, RETAIN, Localization.of(["blocks.0.hook_resid_post"]), share=0.01)
    assert {c.site.layer for c in block.changes} == {0}


def test_without_a_ratio_the_largest_that_reaches_the_aim_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    steps = iter([1.0, 0.9, 0.8, 0.03])  # before, then on the ladder
    monkeypatch.setattr(Arm, "said", lambda arm, prompts: next(steps))
    edit = synaptic_dampening(model, FORGET, RETAIN)
    assert [t["alpha"] for t in edit.recipe["ratios tried"]] == [100.0, 30.0, 10.0]
    monkeypatch.undo()
    sizes = [len(c.action.indices) for c in edit.changes]
    assert sizes == [len(c.action.indices) for c in synaptic_dampening(model, FORGET, RETAIN, alpha=10.0).changes]


def test_requests_that_cannot_be_served_say_why() -> None:
    model = tiny()
    with pytest.raises(ExciseError, match="give forget and retain"):
        synaptic_dampening(model, FORGET, [])
    with pytest.raises(ExciseError, match="no weight matters more than 1e\\+12 times"):
        synaptic_dampening(model, FORGET, RETAIN, alpha=1e12)
    with pytest.raises(ValueError, match="losses are odds and likelihood"):
        synaptic_dampening(model, FORGET, RETAIN, loss="margin")
