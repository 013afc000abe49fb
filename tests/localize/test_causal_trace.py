"""Causal tracing: prompts, counterparts, noise, scores and the planted truth."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from planted import CARRIER, LAYERS, SUBJECTS, carrier_model, facts_about

from excise.corruption import embedding_std, prepare, runs_of
from excise.encoding import encode_row
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Localization
from excise.sites import POSITION_CLASSES, Site
from localize import causal_trace
from localize.causal_trace import class_means, indirect_effects, normalised_effects
from tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Model:
    return carrier_model()


FACTS = facts_about(*SUBJECTS)


def test_effects_of_arrays() -> None:
    values, low, high = np.arange(12.0).reshape(1, 3, 4), np.array([2.0]), np.array([6.0])
    assert np.array_equal(indirect_effects(values, low), values - 2)
    assert np.array_equal(normalised_effects(values, low, high), (values - 2) / 4)


def test_class_means() -> None:
    values = np.vstack([np.arange(8.0), np.full(8, np.nan)])
    found = dict(zip(POSITION_CLASSES, class_means(values, (1, 4)).T, strict=True))
    means = {name: x[0] for name, x in found.items()}
    assert means == {
        "prefix": 0,
        "subject_first": 1,
        "subject_middle": 2,
        "subject_last": 3,
        "after_subject": 4,
        "further": 5.5,
        "last": 7,
    }
    assert all(np.isnan(x[1]) for x in found.values())
    alone = dict(zip(POSITION_CLASSES, class_means(values, (0, 1))[0], strict=True))
    assert np.isnan(alone["prefix"]) and np.isnan(alone["subject_first"]) and alone["subject_last"] == 0


def test_scores_have_intervals_over_facts_or_people() -> None:
    site = Site.parse("blocks.0.hook_resid_post@last")
    found = Localization((site,), np.array([[0.2], [0.4], [np.nan], [0.9]]), ("a", "b", "c", "d"))
    (interval,) = found.intervals()
    assert interval.value == pytest.approx(0.5) and 0.2 <= interval.low < 0.5 < interval.high <= 0.9
    (by_person,) = found.intervals(clusters=["p", "p", "p", "q"])
    assert tuple(by_person) == pytest.approx((0.5, 0.3, 0.9))
    (same,) = Localization((site,), np.ones((4, 1)), ("a", "b", "c", "d")).intervals()
    assert tuple(same) == (1, 1, 1)
    assert np.isnan(Localization((site,), np.full((1, 1), np.nan), ("a",)).intervals()[0].value)


def test_the_planted_layer_is_found(model: Model) -> None:
    found = causal_trace(model, FACTS, known_only=False)
    traced = [m.fact_id for m in found.maps]
    assert (
        len(traced) >= 2
        and found.recipe["engine"] == "growing batch"
        and found.recipe["corruptions"] == {"swap": len(FACTS)}
    )
    score = dict(zip(found.sites, found.facts(traced).scores.T, strict=True))
    for layer in range(LAYERS):
        before = float(layer < CARRIER)
        at = {
            c: {p: score[Site(f"blocks.{layer}.hook_{c}", p)] for p in ("subject_last", "last")}
            for c in ("resid_post", "mlp_out", "attn_out")
        }
        assert np.allclose(at["resid_post"]["subject_last"], before, atol=1e-4)
        assert np.allclose(at["resid_post"]["last"], 1 - before, atol=1e-4)
        assert np.allclose(at["attn_out"]["last"], float(layer == CARRIER), atol=1e-4)
        assert np.allclose(at["mlp_out"]["last"], 0, atol=1e-4) and np.allclose(
            at["attn_out"]["subject_last"], 0, atol=1e-4
        )
    assert found.at(component="attn_out").top(1).sites[0] == Site(f"blocks.{CARRIER}.hook_attn_out", "last")


def test_noise_finds_it_too(model: Model) -> None:
    found = causal_trace(
        model, FACTS, corruption="noise", draws=3, metric="logprob", components=("attn",), known_only=False
    )
    assert found.recipe["corruptions"] == {"noise": len(FACTS)}
    assert found.top(1).sites[0] == Site(f"blocks.{CARRIER}.hook_attn_out", "last") and found.top(1).average[
        0
    ] == pytest.approx(1, abs=1e-3)


def test_scores_are_class_means_of_the_maps(model: Model) -> None:
    facts = facts_about("QZX", "VJK", "XKQ", "ZVJ")
    found = causal_trace(
        model, facts, known_only=False, components=("resid", "attn"), layers=[0, 3], metric="probability"
    )
    assert found.scores.shape == (4, 2 * 2 * len(POSITION_CLASSES)) and found.fact_ids == tuple(f.id for f in facts)
    for m in found.maps:
        row = found.scores[found.fact_ids.index(m.fact_id)].reshape(2, 2, -1)
        for i, component in enumerate(("resid", "attn")):
            means = class_means(m.effect(component), m.subject)[[0, 3]] / (m.high - m.low)
            assert np.allclose(row[i], means, equal_nan=True)
        assert m.values["resid"].shape == (LAYERS, len(m.tokens)) and "".join(m.tokens).endswith("was born in")
        assert np.isnan(m.values["resid"][[1, 2]]).all() and not np.isnan(m.values["resid"][[0, 3]]).any()


def test_chosen_positions_only(model: Model) -> None:
    whole = causal_trace(model, FACTS, known_only=False, components=("resid",))
    some = causal_trace(model, FACTS, known_only=False, components=("resid",), positions=["subject", "last"])
    kept = [s.position in ("subject_last", "last") for s in some.sites]
    assert np.allclose(some.scores[:, kept], whole.scores[:, kept], equal_nan=True, atol=1e-5)
    assert np.isnan(some.scores[:, [not k for k in kept]]).all()


def test_same_seed_same_result_and_batches_do_not_matter(model: Model) -> None:
    options = dict(known_only=False, corruption="noise", draws=2, components=("resid",))
    one = causal_trace(model, FACTS, **options)
    assert np.allclose(
        one.scores, causal_trace(model, FACTS, batch_tokens=8, **options).scores, atol=1e-3, equal_nan=True
    )
    assert np.array_equal(one.scores, causal_trace(model, FACTS, **options).scores, equal_nan=True)
    assert not np.allclose(one.scores, causal_trace(model, FACTS, seed=5, **options).scores, equal_nan=True)


def test_a_fact_alone_equals_a_fact_in_company(model: Model) -> None:
    whole = causal_trace(model, FACTS, known_only=False)
    alone = causal_trace(model, Facts([FACTS[1]]), known_only=False, pool=FACTS)
    assert np.allclose(alone.scores[0], whole.scores[1], atol=1e-4, equal_nan=True)


def test_counterparts(model: Model) -> None:
    facts = facts_about("QZX", "VJK", "XKQ")
    prepared = prepare(model, facts, known_only=False)
    for case, fact in zip(prepared.cases, facts, strict=True):
        a, b = case.subject
        assert (
            case.corrupt[:a] == case.ids[:a] and case.corrupt[b:] == case.ids[b:] and case.corrupt[a:b] != case.ids[a:b]
        )
        assert model.tokenizer.decode(case.ids[a:b]) == fact.subject
        told = model.tokenizer.decode(case.corrupt[a:b])
        owner = next(f for f in facts if f.subject == told)
        row = encode_row(model.tokenizer, Prompt(fact.prompt.text, owner.answer, fact.subject), answer=True)
        assert case.foil == row.ids[row.start] != case.answer
    assert prepare(model, facts, known_only=False).cases == prepared.cases
    assert prepared.noise_std == 0


def test_an_answer_in_common_is_no_counterpart(model: Model) -> None:
    with pytest.warns(UserWarning, match="2 of 2 facts have no counterpart"):
        prepared = prepare(model, facts_about("Q", "Z", answers="aa"), known_only=False)
    assert prepared.corruptions == {"noise": 2}


def test_noise_where_no_subject_has_as_many_tokens(model: Model) -> None:
    facts = facts_about("Q", "Zuses", "X")
    with pytest.warns(UserWarning, match="1 of 3 facts have no counterpart") as caught:
        found = causal_trace(model, facts, known_only=False, draws=2)
    assert sum("counterpart" in str(w.message) for w in caught) == 1
    assert found.recipe["corruptions"] == {"swap": 2, "noise": 1}
    assert found.recipe["noise_std"] == pytest.approx(3 * embedding_std(model, facts))


def test_noise_lies_on_the_subject_only(model: Model) -> None:
    facts = facts_about("QZX", "VJK")
    prepared = prepare(model, facts, corruption="noise", known_only=False)
    runs = runs_of(model, prepared.cases, noise_std=1.0, draws=400, seed=0)
    assert runs.noise_start == prepared.cases[0].subject[0] == 1  # behind BOS
    assert runs.noise.shape[2] == 3 and runs.start == 1
    assert runs.noise.std().item() == pytest.approx(1, abs=0.02) and not torch.equal(runs.noise[0], runs.noise[1])
    ids = model.tokenizer("QZXVJK", add_special_tokens=False)["input_ids"]
    own = model.hf.get_input_embeddings().weight[ids].double().std().item()
    assert embedding_std(model, facts) == pytest.approx(own, rel=1e-6)


def test_facts_the_model_does_not_know_are_listed(model: Model) -> None:
    nameless = Fact("nameless", "", "a", (Prompt("Water is made of", "a"),))
    with pytest.warns(UserWarning, match="none of 7 facts could be scored, the first because its prompt"):
        found = causal_trace(model, Facts([*FACTS, nameless]), corruption="noise")
    reasons = {s["fact"]: s["reason"] for s in found.recipe["skipped"]}
    assert "names no subject" in reasons["nameless"] and "the model says" in reasons["f0"]
    assert found.fact_ids[0] == "f0" and np.isnan(found.scores[0]).all() and found.recipe["n"] == len(found.maps)


def test_options_are_checked(model: Model) -> None:
    for wrong in (
        dict(metric="kl"),
        dict(components=("head",)),
        dict(window=0),
        dict(layers=[99]),
        dict(sever="mlp"),
        dict(positions=["nowhere"]),
    ):
        with pytest.raises((ValueError, KeyError)):
            causal_trace(model, FACTS, known_only=False, **wrong)


def test_severing_and_windows_reach_the_engine(model: Model) -> None:
    cut = causal_trace(model, FACTS, known_only=False, components=("resid",), sever="attn")
    score = dict(zip(cut.sites, cut.average, strict=True))
    assert score[Site(f"blocks.{CARRIER}.hook_resid_post", "last")] == pytest.approx(1, abs=1e-4)
    wide = causal_trace(model, FACTS, known_only=False, components=("attn",), window=3)
    score = dict(zip(wide.sites, wide.average, strict=True))
    assert [round(float(score[Site(f"blocks.{i}.hook_attn_out", "last")]), 3) for i in range(LAYERS)] == [0, 1, 1, 1]


def test_mixture_of_experts() -> None:
    hf, tokenizer = tiny_model("qwen3-moe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = causal_trace(Model(hf, tokenizer), FACTS, known_only=False)
    assert found.maps and found.recipe["engine"] == "growing batch"
    last = [s == Site("blocks.1.hook_resid_post", "last") for s in found.sites]
    assert found.average[last][0] == pytest.approx(1)
