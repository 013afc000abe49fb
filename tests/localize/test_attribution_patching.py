"""Attribution patching: exact where things are linear, first order elsewhere, complete along a path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import CARRIER, SUBJECTS, carrier_model, facts_about
from torch import nn

from excise.blocks import HOOKS
from excise.grid import restoration_grid
from excise.model import Model
from excise.restore import Runs
from excise.sites import Site
from localize import attribution_patching, causal_trace
from localize.attribution_patching import attributions
from tiny import D_FF, D_MODEL, tiny_model

FAMILIES = ("gpt2", "llama", "neox", "qwen3-moe")
ALL = list(HOOKS.values())


def model_of(family: str) -> Model:
    hf, tokenizer = tiny_model(family, layers=3)
    if family == "qwen3-moe":
        hf.set_experts_implementation("eager")
    return Model(hf.double(), tokenizer, family)


def noisy(scale: float, facts: int = 2, tokens: int = 6) -> Runs:
    draws = torch.Generator().manual_seed(4)
    clean = torch.randint(3, 300, (facts, tokens), generator=draws)
    answer, foil = torch.randint(3, 300, (2, facts), generator=draws)
    noise = scale * torch.randn(facts, 3, 2, D_MODEL, generator=draws, dtype=torch.float64)
    return Runs(clean, clean[:, None].repeat(1, 3, 1), answer, foil, noise, 1)


@pytest.mark.parametrize(
    ("family", "metric"), [*((f, "logit_diff") for f in FAMILIES), ("gpt2", "probability"), ("llama", "logprob")]
)
def test_small_breaks_are_mended_exactly(family: str, metric: str) -> None:
    # To first order the estimate is the effect itself, sign included: the error shrinks with the noise.
    model, runs = model_of(family), noisy(1e-3)
    found, exact = attributions(model, runs, ALL, metric=metric), restoration_grid(model, runs)
    assert np.allclose(found.low, exact.low[metric]) and np.allclose(found.high, exact.high[metric])
    for component, hook in HOOKS.items():
        effect = exact.values[metric][component] - exact.low[metric][:, None, None]
        assert np.abs(found.effects[hook] - effect).max() < 0.03 * np.abs(effect).max()


def test_exact_where_the_rest_is_linear() -> None:
    model = model_of("gpt2")
    model.hf.transformer.ln_f = nn.Identity()
    runs = noisy(1.0)
    found = attributions(model, runs, ALL)
    assert np.allclose(found.effects["hook_resid_post"][:, -1, -1], found.high - found.low)
    assert np.allclose(found.effects["hook_resid_post"][:, -1, :-1], 0)


def test_exact_in_a_linear_model() -> None:
    model = model_of("gpt2")
    model.hf.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        for block in model.hf.transformer.h:
            for module in (block.attn, block.mlp):
                module.c_proj.weight.zero_()
    runs = noisy(1.0)
    runs = replace(runs, noise_start=runs.shape[2] - 2)
    found, exact = attributions(model, runs, ALL), restoration_grid(model, runs)
    assert np.abs(found.high - found.low).min() > 1e-2
    for component, hook in HOOKS.items():
        assert np.allclose(
            found.effects[hook], exact.values["logit_diff"][component] - exact.low["logit_diff"][:, None, None]
        )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_integrated_gradients_are_complete(family: str) -> None:
    model, runs = model_of(family), noisy(0.3)
    gaps = []
    for steps in (1, 24):
        found = attributions(model, runs, ALL, ig_steps=steps)
        gaps.append(np.abs(found.embed.sum(1) - (found.high - found.low)).max() / np.abs(found.high - found.low).max())
    assert gaps[1] < 2e-2 and gaps[1] < gaps[0]


def test_neurons_add_up_to_their_layer() -> None:
    for family in ("gpt2", "llama"):
        model, runs = model_of(family), noisy(1.0)
        found = attributions(model, runs, ["hook_mlp_out"], units_at=torch.ones(2, 6, dtype=torch.bool))
        assert found.units.shape == (2, 3, D_FF)
        assert np.allclose(found.units.sum(2), found.effects["hook_mlp_out"].sum(2))


def test_parameters_and_hooks_are_left_as_they_were() -> None:
    model = model_of("gpt2")
    model.hf.transformer.wte.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.hf.parameters()]
    attributions(model, noisy(1.0), ALL)
    assert [p.requires_grad for p in model.hf.parameters()] == before and not all(before)
    assert all(p.grad is None for p in model.hf.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_same_sites_and_peak_as_causal_tracing() -> None:
    model, facts = carrier_model(), facts_about(*SUBJECTS)
    exact, fast = causal_trace(model, facts, known_only=False), attribution_patching(model, facts, known_only=False)
    assert fast.sites == exact.sites and fast.fact_ids == exact.fact_ids
    assert np.array_equal(np.isnan(fast.scores), np.isnan(exact.scores))
    assert fast.at(component="attn_out").top(1).sites[0] == Site(f"blocks.{CARRIER}.hook_attn_out", "last")
    assert [m.high for m in fast.maps] == pytest.approx([m.high for m in exact.maps], abs=1e-4)
    assert fast.recipe["method"] == "attribution_patching" and fast.recipe["n"] == len(fast.maps)


def test_batches_do_not_matter() -> None:
    model, facts = carrier_model(), facts_about(*SUBJECTS)
    whole = attribution_patching(model, facts, known_only=False, ig_steps=2)
    split = attribution_patching(model, facts, known_only=False, ig_steps=2, batch_tokens=1)
    assert np.allclose(whole.scores, split.scores, atol=1e-4, equal_nan=True)


def test_neurons_as_sites() -> None:
    model, facts = carrier_model(), facts_about(*SUBJECTS)
    found = attribution_patching(model, facts, known_only=False, components=("mlp",), neurons="subject_last")
    units = found.where(lambda s: s.unit is not None)
    assert len(units.sites) == 4 * D_FF and units.sites[0] == Site("blocks.0.mlp.hook_post", "subject_last", 0)
    assert np.isnan(units.scores).all(1).sum() == len(facts) - len(found.maps)


def test_experts_have_no_plain_neurons() -> None:
    hf, tokenizer = tiny_model("qwen3-moe")
    with pytest.raises(ValueError, match="hook_post"):
        attribution_patching(Model(hf, tokenizer), facts_about(*SUBJECTS), known_only=False, neurons="last")
