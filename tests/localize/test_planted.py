"""Localizers that compare two runs find a planted unit first, in dense and Mixture-of-Experts models, and else at chance."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from planted_units import keys_of, kinds, largest, model_of, question, says_answer

from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Localization
from excise.sites import Site
from localize import attribution_patching, causal_trace, scan
from localize.questions import Question, at_columns, columns, token_rows

# Two subjects of one token; the answer to one is the foil of the other.
PAIR = Facts(
    Fact(f"f{i}", name, answer, (Prompt(f"{name} was born in", answer, name),), "birthplace", foils=(foil,))
    for i, (name, answer, foil) in enumerate([("Q", "Rome", "The"), ("Z", "The", "Rome")])
)
KINDS = ("mlp", "neuron", "expert", "head")
SEEDS = 2


def apart(key: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A row vector that reads 1 off `key` and 0 off `other`."""
    alone = key - other * (key @ other) / (other @ other) if other.any() else key
    return alone / (alone @ key)


@torch.no_grad()
def plant(model: Model, kind: str, seed: int) -> Site:
    """Make a random unit write the first fact's answer at its last token and nothing at the second's; its site."""
    rng = random.Random(seed)
    asked, layer = [question(model, fact) for fact in PAIR], rng.randrange(model.n_layers)
    value = says_answer(model, asked[0])
    if kind == "head":
        return _plant_head(model, asked, layer, rng.randrange(model.names.n_heads), value)
    name, key = largest(model, asked[0], layer, "last")
    other = keys_of(model, asked[1], "last").get(name, torch.zeros_like(key))
    if kind == "neuron":
        unit = int((other.abs() / key.abs()).argmin())
        model.weight(name)[unit] = value / key[unit]
        return Site(name.replace("W_out", "hook_post"), "last", unit)
    model.weight(name).add_(torch.outer(apart(key, other), value))
    whole = Site(f"blocks.{layer}.hook_mlp_out", "last")
    return Site(name.replace("W_out", "hook_post"), "last") if kind == "expert" else whole


def _plant_head(model: Model, asked: list[Question], layer: int, head: int, value: torch.Tensor) -> Site:
    point, rows = f"blocks.{layer}.attn.hook_z", []
    for one in asked:
        z = at_columns(model, token_rows(model, [one]), [point], columns([one], "last"))[point][0]
        rows.append(z.unflatten(0, (model.names.n_heads, -1))[head])
    width = len(rows[0])
    model.weight(f"blocks.{layer}.attn.W_O")[head * width : (head + 1) * width] += torch.outer(apart(*rows), value)
    return Site(point, "last", head)


def traced(model: Model, kind: str) -> Localization:
    return causal_trace(model, PAIR[:1], components=("mlp",), pool=PAIR, known_only=False)


def patched(model: Model, kind: str) -> Localization:
    return attribution_patching(model, PAIR[:1], components=(kind,), pool=PAIR, known_only=False)


def scanned(model: Model, kind: str) -> Localization:
    return scan(model, PAIR[:1], kinds=(kind,), pool=PAIR, known_only=False, verify=0)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("localize", [traced, patched, scanned])
def test_planted_units_are_found_first_and_only_where_they_are_planted(
    localize: Callable[[Model, str], Localization], family: str
) -> None:
    without, wanted = [], kinds(family, *KINDS) if localize is not traced else ("mlp",)
    for kind in wanted:
        for seed in range(SEEDS):
            model = model_of(family, seed=seed)
            site = plant(model, kind, seed)
            found = localize(model, kind)
            assert found.top(1).sites == (site,), (kind, seed, site, found.top(3))
            before = localize(model_of(family, seed=seed), kind).top(1).sites
            without.append(before == (site,))
    assert np.mean(without) <= 0.5
