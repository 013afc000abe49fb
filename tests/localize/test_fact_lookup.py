"""Paths that end at the subject: equal to patching by hand, and true to a lookup that was planted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_units import FACTS, FAMILIES, keys_of, kinds, largest, model_of, question
from torch import nn

from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model, load
from excise.restore import Runs
from excise.scores import Localization
from excise.sites import Site
from excise.testbed import facts as people_of
from excise.trace import patched
from localize import fact_lookup
from localize.fact_lookup import Lookup, receivers, smallest_set
from localize.knowledge_neurons import line_points
from localize.paths import Pair, head_paths, mlp_paths, output_paths, pair_of, reach, receiver_gradient
from localize.questions import Question, at_columns, columns, token_rows
from tiny import N_HEADS

START, TOKENS = 2, 7
# Subjects and answers of one token; what the one is answered is the other's foil.
PAIR = Facts(
    Fact(f"f{i}", name, answer, (Prompt(f"{name} was born in", answer, name),), "birthplace", foils=(foil,))
    for i, (name, answer, foil) in enumerate([("Q", "Rome", "The"), ("Z", "The", "Rome")])
)


def runs_of(facts: int = 2, draws: int = 1) -> Runs:
    """Prompts whose tokens START and START + 1 are swapped for others, or noisy in some draws."""
    dice = torch.Generator().manual_seed(3)
    clean = torch.randint(3, 300, (facts, TOKENS), generator=dice)
    corrupt = clean[:, None].repeat(1, draws, 1)
    corrupt[..., START : START + 2] = torch.randint(3, 300, (facts, draws, 2), generator=dice)
    answer, foil = torch.randint(3, 300, (2, facts), generator=dice)
    return Runs(clean, corrupt, answer, foil)


def subject(width: int = 2, facts: int = 2) -> torch.Tensor:
    """Mask of the last `width` tokens of the subject."""
    at = torch.zeros(facts, TOKENS, dtype=torch.bool)
    at[:, START + 2 - width : START + 2] = True
    return at


def patched_metric(model: Model, pair: Pair, patches: dict) -> torch.Tensor:
    """The metric [n_facts] of the corrupted run under patches, by a plain forward pass."""
    with torch.no_grad(), patched(model, patches):
        logits = model.hf(input_ids=pair.runs.corrupt.flatten(0, 1)).logits[:, -1]
    return pair.metric(logits)[0]


@pytest.mark.parametrize("draws", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_equal_patching_by_hand(family: str, draws: int) -> None:
    model = model_of(family)
    pair = pair_of(model, runs_of(draws=draws), subject(), heads=True)
    low, high = pair.ends
    at = pair.at[..., None]
    assert torch.allclose(low, patched_metric(model, pair, {})) and not torch.allclose(low, high)
    for layer, found in enumerate(reach(pair)):
        clean = pair.clean.inputs[layer].repeat_interleave(draws, 0)
        right = patched_metric(
            model, pair, {f"blocks.{layer}.hook_resid_pre": lambda x, c=clean: torch.where(at, c, x)}
        )
        torch.testing.assert_close(found, right)
    for sender, found in enumerate(mlp_paths(pair, 2)):
        shift = pair.shift("mlp", sender) * at
        right = patched_metric(model, pair, {"blocks.2.hook_resid_pre": lambda x, s=shift: x + s})
        torch.testing.assert_close(found, right)
    shifts = _head_shifts(model, pair)
    for i, found in enumerate(head_paths(pair, shifts)):
        layer, head = divmod(i, N_HEADS)
        frozen = {f"blocks.{k}.hook_attn_out": pair.corrupt.taps["attn", k].clone() for k in range(model.n_layers)}
        frozen[f"blocks.{layer}.hook_attn_out"][:, -1] += shifts[layer][head]
        right = patched_metric(model, pair, {n: lambda x, v=v: v.view_as(x) for n, v in frozen.items()})
        torch.testing.assert_close(found, right)


def _head_shifts(model: Model, pair: Pair) -> list[torch.Tensor]:
    from localize.fact_lookup import _head_shifts

    return _head_shifts(model, pair)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_direct_effects_of_all_senders_are_the_whole_where_the_rest_is_linear(family: str) -> None:
    model = model_of(family)
    setattr(*((model.hf.transformer, "ln_f") if family == "gpt2" else (model.hf.model, "norm")), nn.Identity())
    pair = pair_of(model, runs_of(), subject())
    low, high = pair.ends
    senders = [pair.shift(c, i) for c in ("attn", "mlp") for i in range(model.n_layers)]
    senders.append(pair.clean.inputs[0] - pair.corrupt.inputs[0])
    effects = (output_paths(pair, senders) - low) / (high - low)
    torch.testing.assert_close(effects.sum(0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ends_of_the_scale_and_a_silent_sender(family: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        for name in (n for n in model.names.weights(0) if n.endswith("W_out")):
            model.weight(name).zero_()
    lookup = Lookup(pair_of(model, runs_of(), subject(), keys=True), 2, 0.9)
    assert np.allclose(lookup.reached[0], 1)  # all that was broken is mended before the first block
    found = lookup.scores(model, kinds(family, "mlp", "neuron", "expert"), "subject")
    silent = [x for s, x in found.items() if s.layer == 0]
    loud = [x for s, x in found.items() if s.layer == 1]
    late = [x for s, x in found.items() if s.layer == 2]
    assert all(x.abs().max() < 1e-9 for x in silent + late) and all(x.abs().max() > 1e-6 for x in loud)


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_and_experts_add_up(family: str) -> None:
    model = model_of(family)
    pair, points = pair_of(model, runs_of(draws=2), subject(), keys=True), line_points(8, "gauss")
    found = Lookup(pair, 2, 0.9)
    gradient = receiver_gradient(pair, 2, *points)
    whole = (gradient * pair.gap(2)).sum((1, 2)).view(2, 2).sum(1).numpy() / found.total
    if family != "qwen3-moe":  # a router above that changes its mind makes a jump that no gradient shows
        assert np.allclose(whole, found.reached[2], rtol=0.05, atol=0.02)
    scores = found.scores(model, kinds(family, "neuron", "expert"), "subject")
    for layer in range(2):
        first_order = (gradient * pair.cut(pair.shift("mlp", layer))).sum((1, 2)).view(2, 2).sum(1).numpy()
        neurons = sum(x.sum(1) for s, x in scores.items() if s.layer == layer and not s.is_weight)
        assert np.allclose(neurons, first_order / found.total)
        if family == "qwen3-moe":
            assert np.allclose(sum(x for s, x in scores.items() if s.layer == layer and s.is_weight), neurons)


def test_receivers_and_smallest_sets() -> None:
    reached = np.array([[0.8, 1.0], [0.95, 0.97], [1.0, 0.5], [0.2, 0.95]])
    assert receivers(reached, 0.9).tolist() == [2, 3] and receivers(reached, 1.0).tolist() == [2, 0]
    assert smallest_set(np.array([0.1, 0.5, -3.0, 0.4, np.nan])) == [1, 3]
    assert smallest_set(np.array([-1.0, 0.0])) == [] and smallest_set(np.array([])) == []


@torch.no_grad()
def reading_model(family: str, seed: int) -> Model:
    """A random model of four blocks in which only the last block's attention looks at other tokens, and closely.

    Its MLPs write little: what a later one makes of a planted attribute is looked up there too, and rightly found; next to
    a corrupted state, which lacks the planted attribute and is small, even a little of it counts.
    """
    model = model_of(family, layers=4, seed=seed)
    for name in (n for n in model.names.weights() if n.endswith("W_out")):
        model.weight(name).mul_(0.03)
    for layer in range(4):
        model.weight(f"blocks.{layer}.attn.W_O").mul_(5.0 * (layer == 3))
    return model


def readable(model: Model, asked: Question, column: int) -> torch.Tensor:
    """What the last block's attention reads at the subject as the answer and not the foil, [d_model], of length 1."""
    held = {}

    def hold(x: torch.Tensor) -> torch.Tensor:
        return held.setdefault("x", x.detach().requires_grad_())

    with torch.enable_grad(), patched(model, {"blocks.3.hook_resid_pre": hold}):
        logits = model.hf(input_ids=token_rows(model, [asked])).logits[0, -1]
        gradient = torch.autograd.grad(logits[asked.answer] - logits[asked.foil], held["x"])[0][0, column]
    return gradient / gradient.norm()


@torch.no_grad()
def apart(model: Model, ids: torch.Tensor, asked: Question) -> torch.Tensor:
    """Answer minus foil of the first row less that of the second: what the wrong subject costs."""
    logits = model.hf(input_ids=ids).logits[:, -1]
    return (logits[0] - logits[1])[asked.answer] - (logits[0] - logits[1])[asked.foil]


def plant_lookup(model: Model, kind: str, seed: int) -> tuple[Site, bool]:
    """Make a random unit write the answer, as the last attention reads it, at the first subject's token, and as little as
    can be at the second's. Its site, and whether that made a fact: whether what is written, put by hand where the second
    subject stands, brings most of what the right subject brings, and no more, and whether that is more than what the two
    subjects differed by before anything was planted."""
    layer = random.Random(seed).randrange(model.n_layers - 1)
    asked = [question(model, fact) for fact in PAIR]
    name, key = largest(model, asked[0], layer, "subject_last")
    other = keys_of(model, asked[1], "subject_last").get(name, torch.zeros_like(key))
    column, end = columns(asked[:1], "subject_last"), "blocks.3.hook_resid_pre"
    state = at_columns(model, token_rows(model, asked[:1]), [end], column)[end][0]
    value = 6 * state.norm() * readable(model, asked[0], int(column))
    point = f"blocks.{layer}.hook_mlp_out"
    site = Site(name) if kind == "expert" else Site(point, "subject_last")
    ids = token_rows(model, asked)
    before = apart(model, ids, asked[0])
    with torch.no_grad():
        if kind == "neuron":
            unit = int((other.abs() / key.abs()).argmin())
            model.weight(name)[unit] = value / key[unit]
            site = Site(name.replace("W_out", "hook_post"), "subject_last", unit)
        else:
            alone = key - other * (key @ other) / (other @ other) if other.any() else key
            model.weight(name).add_(torch.outer(alone / (alone @ key), value))

    def put(x: torch.Tensor) -> torch.Tensor:
        new = x.clone()
        new.view(-1, x.shape[-1])[ids.shape[1] + column] += value
        return new

    whole = apart(model, ids, asked[0])
    with patched(model, {point: put}):
        left = apart(model, ids, asked[0])
    return site, bool(whole >= max(0.05, 2 * before.abs()) and 0.7 <= (whole - left) / whole <= 1.3)


def lookups(family: str, kind: str, count: int, *, alone: bool = False) -> Iterator[tuple[int, Model, Site]]:
    """Seeds, models and sites of the first planted look-ups that made a fact; alone: no other MLP writes at all."""
    for seed in range(24):
        model = reading_model(family, seed)
        for name in (n for n in model.names.weights() if alone and n.endswith("W_out")):
            model.weight(name).detach().zero_()
        site, made = plant_lookup(model, kind, seed)
        if made:
            yield seed, model, site
            count -= 1
        if not count:
            return
    raise AssertionError(f"{count} look-ups too few could be planted")


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_lookups_are_found_first_and_only_where_they_are_planted(family: str) -> None:
    without = []
    for kind in kinds(family, "mlp", "neuron", "expert"):
        for seed, model, site in lookups(family, kind, 4):
            options = dict(units=(kind,), pool=PAIR, known_only=False)
            found = fact_lookup(model, PAIR[:1], least=0.05, **options)
            assert found.top(1).sites == (site,), (kind, seed, found.top(3))
            assert found.recipe["receivers"]["f0"] > site.layer
            before = fact_lookup(reading_model(family, seed), PAIR[:1], least=-np.inf, **options)
            without.append(before.top(1).sites == (site,))
    assert sum(without) <= len(without) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_where_one_mlp_alone_writes_exactly_that_one_is_chosen(family: str) -> None:
    for _, model, site in lookups(family, "mlp", 2, alone=True):
        found = fact_lookup(model, PAIR[:1], pool=PAIR, known_only=False, least=0.01)
        assert found.recipe["layers"] == [site.layer] and found.recipe["receivers"]["f0"] > site.layer
        names = found.recipe["matrices"]
        assert all(f"blocks.{site.layer}.mlp" in n and "router" not in n for n in names)
        assert found.recipe["parameters"] == sum(model.weight(n).numel() for n in names) > 0


def test_heads_and_output_are_sites_beside_the_lookup(tmp_path) -> None:
    model = model_of("llama")
    units = ("mlp", "neuron", "head", "output")
    found = fact_lookup(model, FACTS, units=units, known_only=False, least=-np.inf)
    assert {(s.position, s.point.split(".", 2)[2], s.unit is None) for s in found.sites} == {
        ("subject_last", "hook_mlp_out", True),
        ("subject_last", "mlp.hook_post", False),
        ("last", "attn.hook_z", False),
        ("last", "hook_mlp_out", True),
    }
    assert not np.isnan(found.scores).any() and len(set(found.sites)) == len(found.sites)
    split = fact_lookup(model, FACTS, units=units, known_only=False, least=-np.inf, batch_tokens=1)
    assert np.allclose(found.scores, split.scores, atol=1e-6)
    again = Localization.load(found.save(tmp_path / "found.safetensors"))
    assert again.sites == found.sites and np.array_equal(again.scores, found.scores) and again.recipe == found.recipe


def test_facts_that_a_wrong_subject_hardly_costs_anything_are_left_out() -> None:
    model = model_of("gpt2")
    with pytest.warns(UserWarning, match="fewer than 1000"):
        found = fact_lookup(model, FACTS, known_only=False, least=1000.0)
    assert found.recipe["n"] == 0 and len(found.recipe["skipped"]) == len(FACTS) == len(found.scores)


def test_what_does_not_apply_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for family, units, message in (
        ("gemma2", ("head",), "pass a norm"),
        ("gemma2", ("neuron",), "passes a norm"),
        ("llama", ("expert",), "has no experts"),
    ):
        with pytest.raises(ExciseError, match=message) as caught:
            fact_lookup(model_of(family), FACTS, units=units, known_only=False)
        assert "\n" not in str(caught.value)
    for wrong, message in (
        (dict(units=("layer",)), "no unit"),
        (dict(receiver=9), "no block 9"),
        (dict(route="guess"), "no route"),
        (dict(units=("mlp", "output"), position="last"), "same sites"),
    ):
        with pytest.raises(ValueError, match=message):
            fact_lookup(model_of("gpt2"), FACTS, known_only=False, **wrong)
    model = model_of("llama")
    monkeypatch.setattr(model.hf.config, "layer_types", ["linear_attention"] * model.n_layers, raising=False)
    with pytest.raises(ExciseError, match="linear_attention"):
        fact_lookup(model, FACTS, known_only=False)


# --- the probing route

NAMES = [a + b for a in "QZXVJK" for b in "QZXVJK"]


@torch.no_grad()
def classes_model(family: str, layer: int) -> tuple[Model, Facts]:
    """A model in which one MLP alone writes to which of two classes a name belongs, dealt at random among the names."""
    model = model_of(family, layers=3)
    rng = random.Random(0)
    sides = [i % 2 for i in range(len(NAMES))]
    rng.shuffle(sides)
    facts = Facts(
        Fact(f"f{i:02}", n, "ab"[side], (Prompt(f"{n} plays the sport of", "ab"[side], n),), relation="sport")
        for i, (n, side) in enumerate(zip(NAMES, sides, strict=True))
    )
    matrices = [[n for n in model.names.weights(i) if n.endswith("W_out")] for i in range(3)]
    for name in (n for i in range(3) for n in matrices[i]):
        model.weight(name).zero_()
    name_of = [largest(model, question(model, f), layer, "subject_last")[0] for f in facts]
    value = torch.randn(model.names.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for name in set(name_of):
        rows = [i for i, n in enumerate(name_of) if n == name]
        keys = torch.stack([keys_of(model, question(model, facts[i]), "subject_last")[name] for i in rows])
        signs = torch.tensor([2.0 * sides[i] - 1 for i in rows], dtype=torch.float64)
        weights = torch.linalg.lstsq(keys, signs[:, None], driver="gelsd").solution
        model.weight(name).add_(100 * weights @ value[None])
    return model, facts


@pytest.mark.parametrize(("family", "layer"), [("gpt2", 1), ("llama", 0), ("neox", 2), ("qwen3-moe", 1)])
def test_probes_find_the_mlp_that_writes_the_class(family: str, layer: int) -> None:
    model, facts = classes_model(family, layer)
    found = fact_lookup(model, facts, route="probe", known_only=False)
    assert found.top(1).sites == (Site(f"blocks.{layer}.hook_mlp_out", "subject_last"),)
    assert found.recipe["layers"][0] == layer or layer in found.recipe["layers"]
    after = found.recipe["probe accuracy"]["sport"]
    assert after[layer] >= 0.7 and after[layer] > max(after[:layer], default=0.5)
    assert found.recipe["probe accuracy, shuffled"]["sport"] <= 0.75  # 36 names, two classes
    some = fact_lookup(model, facts[:5], route="probe", known_only=False, pool=facts)
    assert np.allclose(some.scores, found.scores[:5])


def test_probes_without_later_attention() -> None:
    model, facts = classes_model("llama", 1)
    whole = fact_lookup(model, facts, route="probe", known_only=False)
    cut = {i: fact_lookup(model, facts, route="probe", known_only=False, attention_until=i) for i in (0, 2)}
    assert np.allclose(whole.scores[:, :2], cut[2].scores[:, :2]) and cut[2].top(1).layers() == [1]
    assert not np.allclose(whole.scores[:, 1], cut[0].scores[:, 1])


def test_relations_that_no_probe_can_learn_are_named() -> None:
    model, facts = classes_model("gpt2", 1)
    few = Facts([*facts[:4], replace(facts[5], relation="")])
    with pytest.warns(UserWarning, match="a probe needs 12 subjects"):
        found = fact_lookup(model, few, route="probe", known_only=False)
    assert found.recipe["n"] == 0 and "no relation" in found.recipe["skipped"][-1]["reason"]


# --- the embedded models


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_people_are_looked_up_before_their_answers_are_written(name: str) -> None:
    model = load(f"testbed:{name}")
    facts = people_of(name, people=2, neighbours=0, retain=0, unknown=0, general=0, seed=11).group("forget")
    found = fact_lookup(model, facts, position="subject", units=("mlp", "output"))
    receiver = list(found.recipe["receivers"].values())
    assert found.recipe["n"] >= 0.8 * len(facts)
    assert np.mean(list(found.recipe["reach"].values())) >= 0.8 and max(receiver) < model.n_layers - 1
    looked_up = np.clip(found.at(position="subject").average, 0, None)
    written = np.clip(found.at(position="last").average, 0, None)
    centre = [np.average(np.arange(model.n_layers), weights=w) for w in (looked_up, written)]
    assert centre[0] + 2 <= centre[1]
