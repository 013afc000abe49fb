"""Weights: sums over units against the gradient itself, the limits of each score, planted units, single weights."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import facts_about
from planting import keep_all_but_first, model_of, place, plant, quiet

from excise.actions import Scale
from excise.apply import applied
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Facts
from excise.gradients import answer_losses
from excise.model import Model
from excise.sites import Site
from localize import weight_attribution
from localize.weight_attribution import element_masks, unit_matrices
from localize.weight_elements import select
from localize.weight_scores import Gradients, best_rows, row_effects, row_norms, row_squares, score, threshold

FAMILIES = ("llama", "qwen3-moe", "gpt2", "neox")
FACTS = facts_about("Q", "Zuses", "X", "VJK", answers=("a", "Rome", "is old", "b"))
POOL = keep_all_but_first(FACTS)


def gradients(model: Model, facts: Facts) -> dict[str, torch.Tensor]:
    """Every matrix's gradient by plain autograd, mean over the facts."""
    model.hf.zero_grad()
    answer_losses(model, model.encode([f.prompt for f in facts], answers=True)).mean().backward()
    found = {}
    for name in unit_matrices(model, "matrix"):
        where = model.names.weight(name)
        parameter = model.hf.get_parameter(where.parameter)
        plain, parameter.data = parameter.data, parameter.grad
        found[name] = where.view(model.hf).detach().clone()
        parameter.data = plain
    model.hf.zero_grad()
    return found


def rows_of(found, row: int = 0) -> dict[str, float]:
    return dict(zip(map(str, found.sites), found.scores[row], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_sums_of_weight_times_gradient(family: str) -> None:
    model = model_of(family, layers=2)
    keep, g = gradients(model, FACTS[1:]), gradients(model, FACTS[:1])
    for unit in ("neuron", "head", "matrix", *(["expert"] if family == "qwen3-moe" else [])):
        taylor = rows_of(weight_attribution(model, FACTS[:1], unit=unit, pool=POOL, penalty=0.5))
        squares = rows_of(weight_attribution(model, FACTS[:1], unit=unit, measure="gradient"))
        for name in unit_matrices(model, unit):
            theta = model.weight(name).detach()
            effect, kept, norm = ((theta * g[name]).sum(1), (theta * keep[name]).sum(1), g[name].square().sum(1))
            if unit == "head":
                effect, kept, norm = (x.unflatten(0, (4, -1)).sum(1) for x in (effect, kept, norm))
            if unit in ("matrix", "expert"):
                effect, kept, norm = (x.sum()[None] for x in (effect, kept, norm))
            for i in range(len(effect)):
                site = name if unit in ("matrix", "expert") else f"{name}#{i}"
                truth = -effect[i] - 0.5 * kept[i].abs()
                assert taylor[site] == pytest.approx(truth.item(), rel=1e-3, abs=1e-6)
                assert squares[site] == pytest.approx(norm[i].sqrt().item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_taylor_is_the_slope_of_the_loss_as_the_unit_is_turned_down(family: str) -> None:
    model, step = model_of(family, layers=2), 1e-2
    batch = model.encode([FACTS[0].prompt], answers=True)
    plain = answer_losses(model, batch).item()
    found = weight_attribution(model, FACTS[:1], penalty=0).top(3)
    for site, value in zip(found.sites, found.scores[0], strict=True):
        losses = []
        for factor in (1 - step, 1 + step):
            edit = Edit((Change(Site(site.point), Scale(torch.tensor([site.unit]), torch.tensor([factor]))),))
            with applied(model, edit), torch.no_grad():
                losses.append(answer_losses(model, batch).item())
        assert value == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=2e-2)
        assert plain != losses[0]


def test_limits_of_wagle() -> None:
    model = model_of("llama", layers=2)
    snip = weight_attribution(model, FACTS[:1], measure="snip", unit="head")
    wide = weight_attribution(model, FACTS[:1], measure="wagle", unit="head", gamma=1e9, pool=POOL)
    assert np.allclose(snip.scores, wide.scores, rtol=1e-5)
    keep, g = gradients(model, FACTS[1:]), gradients(model, FACTS[:1])
    narrow = element_masks(model, FACTS[:1], measure="wagle", gamma=1e-12, share=0.05, pool=POOL).masks
    product = {n: (g[n] * keep[n]).abs() for n in g}
    limit = torch.cat([x.flatten() for x in product.values()]).quantile(0.95)
    same = sum(int((narrow[n] == (product[n] >= limit)).sum()) for n in g) / sum(x.numel() for x in g.values())
    assert same > 0.999
    middle = weight_attribution(model, FACTS[:1], measure="wagle", unit="head", pool=POOL)
    slopes = torch.cat([keep[n].abs().flatten() for n in unit_matrices(model, "head")]).median()
    sizes = torch.cat([model.weight(n).abs().flatten() for n in unit_matrices(model, "head")]).median()
    assert middle.recipe["gamma found"] == pytest.approx((slopes / sizes).item(), rel=1e-2)


def test_scores_of_sums() -> None:
    f, r = torch.tensor([-3.0, 2.0]), torch.tensor([1.0, -4.0])
    common = dict(penalty=0.5, floor=1.0)
    assert score("taylor", f, r, **common).tolist() == [2.5, -4.0]
    assert score("taylor", f, None, **common).tolist() == [3.0, -2.0]
    assert score("snip", f, None, **common).tolist() == score("wagle", f, r, **common).tolist() == [3.0, 2.0]
    assert score("fisher", f.abs(), r.abs(), **common).tolist() == pytest.approx([1.5, 0.4])
    assert score("magnitude", f.abs(), None, **common).tolist() == pytest.approx([3**0.5, 2**0.5])


def test_rows_without_the_gradient() -> None:
    x, dy, w = torch.randn(3, 5, 7), torch.randn(3, 5, 11), torch.randn(7, 11)
    g = x.mT @ dy
    torch.testing.assert_close(row_effects(x, w, dy), (g * w).sum(2))
    torch.testing.assert_close(row_squares(x, dy), g.square().sum(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(row_norms(x, w), (x.norm(dim=1)[..., None] * w.abs()).sum(2))
    for square in (False, True):
        kept, few = Gradients(6, square=square), Gradients(6, square=square)
        for _ in range(2):
            kept.add("W", x, dy)  # 270 numbers: more than the matrix holds
        few.add("W", x[:, :1], dy[:, :1])
        assert "W" in kept._dense and "W" not in few._dense
        each = (g.square() if square else g).sum(0) / 3
        torch.testing.assert_close(kept.mean("W", w), each)
        one = x[:, :1].mT @ dy[:, :1]
        torch.testing.assert_close(few.mean("W", w), (one.square() if square else one).sum(0) / 6)
        assert not kept.mean("other", w).any()


def test_threshold_is_that_of_a_sort() -> None:
    parts = [torch.randn(400, 50).pow(5), torch.randn(333), torch.full((7,), 0.25)]
    every = torch.cat([p.flatten() for p in parts])
    for count in (1, 17, 2000, len(every) - 3):
        limit = threshold(lambda: iter(parts), count)
        assert int((every.double() >= limit).sum()) == pytest.approx(count, abs=1)
    assert threshold(lambda: iter([torch.ones(9)]), 4) == 1.0  # equal ones stay together
    mask = best_rows(torch.randn(40, 6), 0.1)
    assert mask.sum(0).tolist() == [4] * 6


def test_the_best_share_is_that_of_a_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    dice, streamed = torch.Generator().manual_seed(0), []
    monkeypatch.setattr("localize.weight_elements.threshold", lambda *a: streamed.append(1) or threshold(*a))
    heavy = {"a": (400, 500), "b": (30, 70), "c": (600, 300)}
    parts = {n: torch.randn(*shape, generator=dice).pow(3) for n, shape in heavy.items()}
    parts["c"] = parts["c"].mT  # as stored matrices often are
    every = torch.cat([p.flatten() for p in parts.values()]).sort(descending=True).values
    weighing = SimpleNamespace(measure="taylor", names=tuple(parts), model=SimpleNamespace(weight=parts.__getitem__))

    def scores(name: str, at: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        return parts[name] if at is None else parts[name][at]

    for share in (1e-5, 1e-3, 0.03, 0.5, 0.99):
        chosen = select(weighing, scores, share)
        count = round(share * len(every))
        assert chosen.threshold == every[count - 1] and not streamed
        assert all(torch.equal(chosen.masks[n], p >= every[count - 1]) for n, p in parts.items())
    parts = {n: (p * 0.3).round() for n, p in parts.items()}  # ties: the ones that are equal stay together
    chosen = select(weighing, scores, 0.3)
    assert streamed and sum(int(m.sum()) for m in chosen.masks.values()) >= 0.3 * len(every)
    assert all(torch.equal(chosen.masks[n], p >= chosen.threshold) for n, p in parts.items())


def test_places_of_a_gradient_are_those_of_the_whole() -> None:
    for square in (False, True):
        kept, dice = Gradients(4, square=square), torch.Generator().manual_seed(0)
        at = torch.tensor([0, 5, 7]), torch.tensor([2, 0, 8])
        for rows in (3, 12):  # kept as factors, then summed up
            x, dy = torch.randn(2, rows, 8, generator=dice), torch.randn(2, rows, 9, generator=dice)
            dy[:, 1] = 0  # padding
            kept.add("W", x, dy)
            torch.testing.assert_close(kept.mean_at("W", at), kept.mean("W", torch.zeros(8, 9))[at])
    assert not kept.mean_at("other", at).any()


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("measure", ["taylor", "wagle", "fisher", "snip", "gradient", "wanda", "magnitude"])
def test_single_weights(family: str, measure: str) -> None:
    model = model_of(family, layers=2)
    options = dict(measure=measure, pool=POOL)
    large, small = (element_masks(model, FACTS[:1], share=s, **options) for s in (0.02, 0.005))
    total = sum(m.numel() for m in large.masks.values())
    assert all(bool((small.masks[n] <= large.masks[n]).all()) for n in large.masks)
    count = sum(int(m.sum()) for m in large.masks.values())
    if measure != "wanda":
        assert count == pytest.approx(0.02 * total, rel=0.01)
        assert sum(large.density[n] * m.numel() for n, m in large.masks.items()) == pytest.approx(count)
    found = weight_attribution(model, FACTS[:1], unit="element", share=0.005, **options)
    assert len(found.sites) == sum(int(m.sum()) for m in small.masks.values())
    assert all(bool(small.masks[s.point][s.unit, s.column]) for s in found.sites)
    if measure not in ("wanda", "magnitude"):
        assert found.scores.min() >= small.threshold - 1e-6 * abs(small.threshold)  # one fact: its scores are the set's
    best = found.top(1).sites[0]
    assert Site.parse(str(best)) == best and best.column is not None
    keep, g = gradients(model, FACTS[1:]), gradients(model, FACTS[:1])
    theta = model.weight(best.point).detach()[best.unit, best.column]
    one, other = (x[best.point][best.unit, best.column] for x in (g, keep))
    truth = {"taylor": -theta * one - (theta * other).abs(), "snip": (theta * one).abs(), "gradient": one.abs()}
    if measure in truth:
        assert found.top(1).scores[0, 0] == pytest.approx(truth[measure].item(), rel=1e-3)


def test_batches_and_company_do_not_matter() -> None:
    model = model_of("qwen3-moe", layers=2)
    pool = Facts(replace(f, id=f"kept {f.id}", group="retain") for f in facts_about("J", "KK", answers="cf"))
    for unit in ("neuron", "expert", "matrix", "element"):
        whole = weight_attribution(model, FACTS, pool=pool, unit=unit)
        split = weight_attribution(model, FACTS, pool=pool, unit=unit, batch_tokens=1)
        assert whole.recipe["facts to keep"] == 2
        assert whole.sites == split.sites and np.allclose(whole.scores, split.scores, atol=1e-5)
        if unit != "element":
            alone = weight_attribution(model, FACTS[1:2], pool=pool, unit=unit)
            assert np.allclose(alone.scores[0], whole.scores[1], atol=1e-5)
    some = weight_attribution(model, FACTS, pool=pool, layers=[1])
    part = weight_attribution(model, FACTS, pool=pool).at(layer=1)
    assert some.sites == part.sites and np.allclose(some.scores, part.scores, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_planted_units_are_first(family: str) -> None:
    facts = facts_about(*"QZXV", answers="cfli")  # answers of one token
    for kind in ("matrix", "neuron", "head", *(["expert"] if family == "qwen3-moe" else [])):
        told = quiet(model_of(family))
        site = plant(told, facts[0], facts[1:], kind)
        for measure in ("taylor", *(["snip"] if kind in ("neuron", "head") else [])):
            found = weight_attribution(told, facts[:1], unit=kind, measure=measure)
            if kind == "matrix":  # what a neuron reads with has the same sum as what it writes with
                found = found.where(lambda s: s.point.endswith("W_out"))
            assert place(found, site) == 0, (kind, measure)


def test_at_chance_where_nothing_is_planted() -> None:
    facts, shares = facts_about(*"QZXV", answers="cfli"), []
    for family in FAMILIES:
        for seed in range(2):
            told, untold = (quiet(model_of(family, seed=seed)) for _ in range(2))
            site = plant(told, facts[0], facts[1:], "neuron")
            found = weight_attribution(untold, facts[:1])
            shares.append(place(found, site) / len(found.sites))
    assert 0.2 < np.mean(shares) < 0.8


def test_where_it_does_not_apply() -> None:
    with pytest.raises(ExciseError, match="no experts"):
        weight_attribution(model_of("llama"), FACTS, unit="expert")
    for measure in ("wagle", "fisher"):
        with pytest.raises(ExciseError, match="facts to keep"):
            weight_attribution(model_of("llama"), FACTS, measure=measure)
    for wrong in (dict(measure="l2"), dict(unit="row"), dict(layers=[7]), dict(unit="element", share=0.0)):
        with pytest.raises(ValueError):
            weight_attribution(model_of("llama"), FACTS, **wrong)
