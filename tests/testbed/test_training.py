"""The optimiser, the expert dispatch and a three-step run on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from excise.testbed.architectures import build_model, fast_experts
from excise.testbed.optimiser import Muon, Optimiser, learning_rate_at, orthogonalise
from excise.testbed.train import train

TINY = {
    "dense": {"layers": 2, "width": 32, "heads": 2, "mlp": 48},
    "moe": {"layers": 2, "width": 32, "heads": 2, "mlp": 16, "experts": 4},
}


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (4, 24, 32)])
def test_orthogonalise_pushes_singular_values_towards_one(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
    products = matrix.mT @ orthogonalise(matrix)
    assert torch.allclose(products, products.mT, atol=1e-3 * float(products.abs().max()))


def test_a_muon_step_changes_a_matrix_by_a_scaled_semi_orthogonal_one() -> None:
    weight = nn.Parameter(torch.zeros(24, 40))
    weight.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    Muon([weight]).step(0.1)
    values = torch.linalg.svdvals(weight.detach()) / (0.1 * 0.2 * 40**0.5)
    assert values.min() > 0.6 and values.max() < 1.3
    assert weight.grad is None


def test_every_parameter_has_exactly_one_optimiser() -> None:
    model = build_model("moe", 64, **TINY["moe"])
    optimiser = Optimiser(model)
    muon = {id(p) for group in optimiser.muon.groups.values() for p in group}
    adamw = {id(p) for group in optimiser.adamw.param_groups for p in group["params"]}
    assert not muon & adamw and len(muon | adamw) == len(list(model.parameters()))
    routers = {id(layer.mlp.gate.weight) for layer in model.model.layers}
    assert routers <= adamw and id(model.model.embed_tokens.weight) in adamw


def test_learning_rate_rises_then_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 100, 1.0, 10, 0.8) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[15] == 1.0 and rates[100] == 0.0
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_expert_dispatch_equals_the_exact_forward_when_nothing_overflows() -> None:
    torch.manual_seed(0)
    model = build_model("moe", 64, **TINY["moe"]).eval()
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data.mul_(10)
    ids = torch.randint(0, 64, (3, 17))
    exact = model(input_ids=ids).logits
    with fast_experts(model, capacity=100.0) as balance:
        fast = model.train()(input_ids=ids).logits
        assert float(balance.take().detach()) >= 0.99
        dropped_free = model.eval()(input_ids=ids).logits
    assert torch.allclose(fast, exact, atol=1e-5) and torch.equal(dropped_free, exact)
    assert torch.equal(model.train()(input_ids=ids).logits, exact)


def test_expert_dispatch_drops_what_overflows_in_training_only() -> None:
    torch.manual_seed(0)
    model = build_model("moe", 64, **TINY["moe"])
    ids = torch.randint(0, 64, (3, 17))
    exact = model.eval()(input_ids=ids).logits
    with fast_experts(model, capacity=0.3):
        assert not torch.allclose(model.train()(input_ids=ids).logits, exact)
        assert torch.equal(model.eval()(input_ids=ids).logits, exact)


@pytest.mark.parametrize("arch", ["dense", "moe"])
def test_a_short_run_writes_a_loadable_folder(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines: list[str] = []
    out = train(arch, tmp_path / "model", steps=3, seed=1, oracle=True, size=TINY[arch], log=lines.append)
    assert any("step 3/3" in line for line in lines)
    description = json.loads((out / "world.json").read_text())
    assert description["seed"] == 1 and description["oracle"] and description["recipe"]["steps"] == 3
    assert len(description["forget_people"]) == 16 and description["progress"]["tokens"] > 10_000
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.use_cache and model.dtype == torch.bfloat16
    text = tokenizer("The cat", return_tensors="pt")
    assert model.generate(**text, max_new_tokens=2).shape[1] <= text["input_ids"].shape[1] + 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        train("dense", tmp_path, steps=1, size=TINY["dense"])


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ValueError, match="dense, moe"):
        build_model("sparse", 64)
