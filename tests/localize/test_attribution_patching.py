"""Attribution patching: exact where things are linear, first order elsewhere, complete along a path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import CARRIER, SUBJECTS, carrier_model, facts_about
from torch import Tensor, nn

from excise.blocks import HOOKS
from excise.grid import restoration_grid
from excise.model import Model
from excise.restore import Runs, mean_metrics, noisy_embedding
from excise.sites import Site
from excise.trace import patched
from excise.units import restored_unit
from localize import attribution_patching, causal_trace
from localize.first_order import key_effects, query_effects
from localize.node_effects import Nodes, attributions
from sae.dictionary import ACTS, Dictionary
from tiny import D_FF, D_MODEL, N_HEADS, N_KV, tiny_model

FAMILIES = ("gpt2", "llama", "neox", "qwen3-moe")
# The last two have shared experts, with a gate and without; the first block of the last is dense.
ROUTED = ("qwen3-moe", "qwen2-moe", "deepseek-v2")
LAYERS = 3


def model_of(family: str) -> Model:
    hf, tokenizer = tiny_model(family, layers=LAYERS)
    if family in ROUTED:
        hf.set_experts_implementation("eager")
    return Model(hf.double(), tokenizer, family)


def noisy(scale: float, facts: int = 2, tokens: int = 6) -> Runs:
    draws = torch.Generator().manual_seed(4)
    clean = torch.randint(3, 300, (facts, tokens), generator=draws)
    answer, foil = torch.randint(3, 300, (2, facts), generator=draws)
    noise = scale * torch.randn(facts, 3, 2, D_MODEL, generator=draws, dtype=torch.float64)
    return Runs(clean, clean[:, None].repeat(1, 3, 1), answer, foil, noise, 1)


def at(*columns: int, facts: int = 2, tokens: int = 6) -> Tensor:
    """One rule that picks these tokens of every fact."""
    mask = torch.zeros(1, facts, tokens, dtype=torch.bool)
    mask[..., list(columns)] = True
    return mask


@pytest.mark.parametrize(
    ("family", "metric"), [*((f, "logit_diff") for f in FAMILIES), ("gpt2", "probability"), ("llama", "logprob")]
)
def test_small_breaks_are_mended_exactly(family: str, metric: str) -> None:
    # To first order the estimate is the effect itself, sign included: the error shrinks with the noise.
    model, runs = model_of(family), noisy(1e-3)
    found, exact = attributions(model, runs, metric=metric), restoration_grid(model, runs)
    assert np.allclose(found.low, exact.low[metric]) and np.allclose(found.high, exact.high[metric])
    for component in HOOKS:
        effect = exact.values[metric][component] - exact.low[metric][:, None, None]
        assert np.abs(found.effects[component] - effect).max() < 0.03 * np.abs(effect).max()


def test_exact_where_the_rest_is_linear() -> None:
    model = model_of("gpt2")
    model.hf.transformer.ln_f = nn.Identity()
    runs = noisy(1.0)
    found = attributions(model, runs)
    assert np.allclose(found.effects["resid"][:, -1, -1], found.high - found.low)
    assert np.allclose(found.effects["resid"][:, -1, :-1], 0)


def test_exact_in_a_linear_model() -> None:
    model = model_of("gpt2")
    model.hf.transformer.ln_f = nn.Identity()
    with torch.no_grad():
        for block in model.hf.transformer.h:
            for module in (block.attn, block.mlp):
                module.c_proj.weight.zero_()
    runs = noisy(1.0)
    runs = replace(runs, noise_start=runs.shape[2] - 2)
    found, exact = attributions(model, runs), restoration_grid(model, runs)
    assert np.abs(found.high - found.low).min() > 1e-2
    for component in HOOKS:
        assert np.allclose(
            found.effects[component], exact.values["logit_diff"][component] - exact.low["logit_diff"][:, None, None]
        )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_integrated_gradients_are_complete(family: str) -> None:
    model, runs = model_of(family), noisy(0.3)
    gaps = []
    for steps in (1, 24):
        found = attributions(model, runs, ig_steps=steps)
        gaps.append(np.abs(found.embed.sum(1) - (found.high - found.low)).max() / np.abs(found.high - found.low).max())
    assert gaps[1] < 2e-2 and gaps[1] < gaps[0]


def book_of(encoder: Tensor, decoder: Tensor, norm: str = "none") -> Dictionary:
    nothing = torch.zeros(len(decoder))
    return Dictionary(encoder, nothing, nothing, decoder, torch.zeros(D_MODEL), "blocks.1.hook_resid_post", norm=norm)


def mended_feature(model: Model, runs: Runs, book: Dictionary, feature: int, column: int) -> np.ndarray:
    """What restoring one feature at one token brings back, by hand, [facts]."""
    seen = []

    def put(x: Tensor) -> Tensor:
        new, here = x.clone(), x[:, column : column + 1]
        new[:, column : column + 1] = book.delta(here, [feature], seen[0])
        return new

    with torch.no_grad():
        keep = {book.hook: lambda x: seen.append(book.encode(x)[:, column : column + 1, [feature]])}
        with patched(model, keep):
            model.hf(input_ids=runs.clean.repeat_interleave(3, 0))
        values = []
        for patches in ({}, {book.hook: put}):
            with noisy_embedding(model, runs), patched(model, patches):
                logits = model.hf(input_ids=runs.corrupt.flatten(0, 1)).logits[:, -1]
            values.append(mean_metrics(logits, runs)["logit_diff"][0])
    return values[1] - values[0]


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_small_breaks_of_features_are_mended_exactly(norm: str) -> None:
    model, runs, dice = model_of("llama"), noisy(1e-4), torch.Generator().manual_seed(0)
    book = book_of(*torch.randn(2, D_MODEL, D_MODEL, generator=dice), norm=norm)
    effects = attributions(model, runs, Nodes((), ("feature",), at(2), book)).units["feature", f"{book.hook}.{ACTS}"]
    for feature in np.abs(effects).sum((0, 1)).argsort()[-3:].tolist():
        exact = mended_feature(model, runs, book, feature, 2)
        assert np.abs(effects[:, 0, feature] - exact).max() < 0.05 * np.abs(exact).max(), (norm, feature)


@pytest.mark.parametrize("family", [*FAMILIES, *ROUTED[1:]])
def test_parts_add_up_to_the_whole(family: str) -> None:
    model, runs, columns = model_of(family), noisy(1.0), (1, 2, 5)
    units = ("head", "neuron", *(("expert",) if family in ROUTED else ()))
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    book = book_of(both.mT, both)
    found = attributions(model, runs, Nodes(units=(*units, "feature"), at=at(*columns), dictionary=book))
    whole = {c: found.effects[c][..., list(columns)].sum(-1) for c in HOOKS}  # [facts, layers]
    for unit, component in (("head", "attn"), ("neuron", "mlp"), ("expert", "mlp")):
        parts = {name: x for (kind, name), x in found.units.items() if kind == unit}
        dense = family == "deepseek-v2" and unit == "expert"
        for layer in range(int(dense), LAYERS if parts else 0):
            total = sum(x.sum((1, 2)) for name, x in parts.items() if name.startswith(f"blocks.{layer}."))
            assert np.allclose(total, whole[component][:, layer])
    features = found.units["feature", f"{book.hook}.{ACTS}"]
    assert features.shape == (2, 1, 2 * D_MODEL)
    assert np.allclose(features.sum((1, 2)), whole["resid"][:, 1], atol=1e-5)  # dictionaries count in float32
    assert found.units["head", "blocks.0.attn.hook_z"].shape == (2, 1, N_HEADS)
    if family in ROUTED:
        assert found.units["expert", "blocks.1.mlp.experts.1.hook_post"].shape == (2, 1, 1)
        shared = {name for kind, name in found.units if kind == "expert" and "shared" in name}
        assert len(shared) == {"qwen3-moe": 0, "qwen2-moe": LAYERS, "deepseek-v2": LAYERS - 1}[family]


@pytest.mark.parametrize(
    ("family", "units"),
    [("llama", ("head", "query", "key", "value", "neuron")), *((f, ("neuron", "expert")) for f in ROUTED)],
)
def test_small_breaks_of_units_are_mended_exactly(family: str, units: tuple[str, ...]) -> None:
    model, runs, mask = model_of(family), noisy(1e-4), at(2)
    found = attributions(model, runs, Nodes(units=units, at=mask))
    total = np.abs(found.high - found.low).max()
    for (unit, name), effects in found.units.items():
        if "experts" in name and not effects.any():
            continue
        u = int(np.abs(effects).sum((0, 1)).argmax())
        site = Site(name, None, None if unit == "expert" else u)
        exact = restored_unit(model, runs, site, mask[0])["logit_diff"] - found.low
        assert np.abs(effects[:, 0, u] - exact).max() < 0.03 * np.abs(exact).max() + 1e-3 * total, (unit, name)


def test_experts_that_only_one_run_reaches_are_restored() -> None:
    # Swapped subjects are routed elsewhere; at the last block's last token, norm apart, the estimate is exact.
    model = model_of("qwen3-moe")
    model.hf.model.norm = nn.Identity()
    draws = torch.Generator().manual_seed(4)
    clean, other = torch.randint(3, 300, (2, 4, 3), generator=draws)
    answer, foil = torch.randint(3, 300, (2, 4), generator=draws)
    runs, mask = Runs(clean, other[:, None], answer, foil), at(2, facts=4, tokens=3)
    found = attributions(model, runs, Nodes((), ("expert",), mask))
    for expert in range(model.names.n_experts):
        name = f"blocks.{LAYERS - 1}.mlp.experts.{expert}.hook_post"
        exact = restored_unit(model, runs, Site(name), mask[0])["logit_diff"] - found.low
        assert np.allclose(found.units["expert", name][:, 0, 0], exact)


def test_attention_weights_are_recomputed() -> None:
    rng = torch.Generator().manual_seed(0)
    scores, other, slope = 3 * torch.randn(3, 4, 5, 5, generator=rng, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)
    weights, restored = (scores + mask).softmax(-1), (other + mask).softmax(-1)
    assert torch.allclose(query_effects(weights, restored, slope), ((restored - weights) * slope).sum(-1))
    found = key_effects(weights, other - scores, slope)
    for key in range(5):
        moved = scores.clone()
        moved[..., key] = other[..., key]
        exact = (((moved + mask).softmax(-1) - weights) * slope).sum((-2, -1))
        assert torch.allclose(found[..., key], exact)
    assert torch.isfinite(key_effects(weights, torch.full_like(scores, 1e6), slope)).all()


def test_saturated_attention_is_not_missed() -> None:
    # What follows the last attention is made linear, so the softmax is all that can be missed; its slopes are near zero.
    model = model_of("llama")
    model.hf.model.norm = nn.Identity()
    model.hf.model.layers[-1].mlp.down_proj.weight.data.zero_()
    model.hf.model.layers[-1].self_attn.q_proj.weight.data.mul_(6)
    runs, mask = noisy(1.0), at(5)
    runs = replace(runs, noise_start=4)
    gaps = {}
    for repaired in (True, False):
        found = attributions(model, runs, Nodes((), ("query", "key"), mask, exact_attention=repaired))
        for unit, hook, heads in (("query", "hook_q", N_HEADS), ("key", "hook_k", N_KV)):
            name = f"blocks.{LAYERS - 1}.attn.{hook}"
            exact = [
                restored_unit(model, runs, Site(name, None, h), mask[0])["logit_diff"] - found.low for h in range(heads)
            ]
            gap = np.abs(found.units[unit, name][:, 0] - np.stack(exact, 1))
            gaps[unit, repaired] = gap.max() / np.abs(exact).max()
    assert gaps["query", True] < 1e-6 and gaps["key", True] < 1e-6
    assert gaps["query", False] > 0.1 and gaps["key", False] > 0.1


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_dropped_gradients_are_those_of_a_network_without_that_path(family: str) -> None:
    model, runs, mask = model_of(family), noisy(1.0), at(2, 5)
    nodes = Nodes(units=("head", "query", "neuron"), at=mask)
    found = attributions(model, runs, nodes, grad_drop=True)
    total: dict[str, np.ndarray] = {c: np.zeros_like(found.effects[c]) for c in HOOKS}
    units = {key: np.zeros_like(x) for key, x in found.units.items()}
    one = replace(runs, corrupt=runs.corrupt[:, :1], noise=runs.noise[:, :1])
    for layer in range(LAYERS):
        cut = {f"blocks.{layer}.{HOOKS[c]}": lambda x: x.detach().requires_grad_(True) for c in ("attn", "mlp")}
        for draw in range(3):
            single = replace(one, noise=runs.noise[:, draw : draw + 1])
            with patched(model, cut):
                alone = attributions(model, single, nodes)
            for c in HOOKS:
                own = np.arange(LAYERS) == layer if c != "resid" else np.zeros(LAYERS, bool)
                effect = np.where(own[None, :, None], 0, np.abs(alone.effects[c]))
                total[c] += effect / 3 / (LAYERS if c == "resid" else LAYERS - 1)
            for key, x in alone.units.items():
                units[key] += np.abs(x) / 3 / (LAYERS - 1)
    assert all(np.allclose(found.effects[c], total[c]) for c in HOOKS)
    assert all(np.allclose(found.units[key], x) for key, x in units.items())


def test_what_cannot_be_asked() -> None:
    model, runs = model_of("gpt2"), noisy(1.0)
    for nodes, message in (
        (dict(states=("head",)), "no component head"),
        (dict(states=(), units=()), "no component given"),
        (dict(units=("feature",)), "dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            Nodes(**nodes)
    with pytest.raises(ValueError, match="has no experts"):
        attributions(model, runs, Nodes(units=("expert",), at=at(1)))
    with pytest.raises(ValueError, match="not both"):
        attributions(model, runs, grad_drop=True, ig_steps=2)


def test_parameters_and_hooks_are_left_as_they_were() -> None:
    model = model_of("gpt2")
    model.hf.transformer.wte.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.hf.parameters()]
    attributions(model, noisy(1.0))
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


@torch.no_grad()
def planted_head(head: int) -> Model:
    """The carrier of `planted`, all of whose heads but one write next to nothing."""
    model = carrier_model()
    weight = model.hf.transformer.h[CARRIER].attn.c_proj.weight.view(N_HEADS, -1, D_MODEL)
    weight[[h for h in range(N_HEADS) if h != head]] *= 1e-4
    return model


def test_the_planted_head_is_found() -> None:
    facts, best = facts_about(*SUBJECTS), []
    for head in range(N_HEADS):
        found = attribution_patching(
            planted_head(head), facts, known_only=False, components=("head",), units_at=["last"]
        )
        sizes = replace(found, scores=np.abs(found.scores))
        assert sizes.top(1).sites[0] == Site(f"blocks.{CARRIER}.attn.hook_z", "last", head)
        plain = attribution_patching(carrier_model(), facts, known_only=False, components=("head",), units_at=["last"])
        best.append(replace(plain, scores=np.abs(plain.scores)).top(1).sites[0].unit == head)
    assert sum(best) == 1  # without a planted one, the best head is right for one of them


def test_the_planted_neuron_is_found() -> None:
    model, (layer, unit) = carrier_model(), (1, 7)
    rng = torch.Generator().manual_seed(0)
    for i in (0, 1):
        model.hf.transformer.h[i].mlp.c_proj.weight.data.copy_(torch.randn(D_FF, D_MODEL, generator=rng) * 1e-3)
    model.hf.transformer.h[layer].mlp.c_proj.weight.data[unit] *= 1e3
    found = attribution_patching(model, facts_about(*SUBJECTS), known_only=False, components=("mlp", "neuron"))
    units = found.where(lambda s: s.unit is not None)
    assert len(units.sites) == 2 * 4 * D_FF and units.sites[0] == Site("blocks.0.mlp.hook_post", "subject_last", 0)
    assert np.isnan(units.scores).all(1).sum() == len(found.fact_ids) - len(found.maps)
    sizes = replace(units, scores=np.abs(units.scores))
    assert sizes.top(1).sites[0] == Site(f"blocks.{layer}.mlp.hook_post", "subject_last", unit)


def test_the_planted_expert_is_found() -> None:
    hf, tokenizer = tiny_model("qwen3-moe", layers=2)
    # One expert of the first block writes, and only what it writes is moved on to the last token.
    block = hf.model.layers[0].mlp
    block.gate.weight.data[2] *= 4
    block.experts.down_proj.data[[0, 1, 3]] *= 1e-3
    hf.model.layers[1].mlp.experts.down_proj.data.mul_(1e-3)
    found = attribution_patching(
        Model(hf, tokenizer),
        facts_about(*SUBJECTS),
        known_only=False,
        components=("expert",),
        units_at=["subject_last"],
    )
    sizes = replace(found, scores=np.abs(found.scores))
    assert sizes.top(1).sites[0] == Site("blocks.0.mlp.experts.2.hook_post", "subject_last")


def test_a_rule_that_picks_nothing_gives_no_score() -> None:
    found = attribution_patching(
        carrier_model(),
        facts_about(*SUBJECTS),
        known_only=False,
        components=("head",),
        units_at=["subject_middle", "last"],
    )
    middle = found.at(position="subject_middle")
    assert np.isnan(middle.scores).all() and not np.isnan(found.at(position="last").average).any()
