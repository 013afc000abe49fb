"""Localization after the edit, routers and experts: values by hand, and knowledge hidden by a route."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from knowing import knows

import evals
from evals.relocalized import compared
from evals.router_shift import divergence, entropy, overlap, routing
from evals.sampling import direct
from excise.actions import Affine, Dense, LowRank
from excise.arms import Arm
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.routers import expert_layers
from excise.scores import Score
from excise.sites import Site
from tiny import tiny_model

torch.set_num_threads(1)
NAMES = [f"{a}{b} Lee" for a in "QZXVJK" for b in "abc"]
FACTS = Facts(
    Fact(f"f{i}", n, w, (Prompt(f"{n} was born in", w, n),), "birthplace", ("forget", "retain")[i % 2])
    for i, (n, w) in enumerate((n, ("Rome", "Paris", "Warsaw")[i % 3]) for i, n in enumerate(NAMES))
)


def moe(seed: int = 0) -> Model:
    return Model(*tiny_model("qwen3-moe", layers=3, seed=seed))


def of(scores: list[Score], variant: str) -> list[float]:
    return [s.value for s in scores if s.variant == variant and s.value is not None]


def test_profiles_by_hand() -> None:
    before = np.array([0.0, 2.0, 4.0, 0.0])
    assert compared(before, before) == {"flattening": 1.0, "rank correlation": 1.0, "peak moved": 0.0, "peak": 2.0}
    other = compared(before, np.array([4.0, 1.0, 0.5, 0.0]))
    assert other["flattening"] == pytest.approx(0.25) and other["peak moved"] == 1.0 and other["peak"] == 0.0
    assert compared(0 * before, before)["flattening"] is None


def test_without_attention_the_subject_carries_nothing() -> None:
    plain = Model(*tiny_model("llama", layers=3))
    asked = knows(plain, 40)
    before = Arm("before", plain)
    scores = evals.relocalized(before, asked, before=before)
    assert set(of(scores, "flattening")) == {1.0} and set(of(scores, "peak moved")) == {0.0}
    names = [f"blocks.{i}.attn.W_O" for i in range(3)]
    cut = Edit(tuple(Change(Site(n), Dense(-plain.weight(n).detach().clone())) for n in names))
    gone = evals.relocalized(Arm("cut", plain, cut), asked, before=before)
    assert of(gone, "flattening") == pytest.approx([0.0] * len(of(scores, "flattening")), abs=1e-4)
    d = plain.names.d_model
    still = Edit(
        (Change(Site("blocks.1.hook_resid_post"), Affine(*(torch.zeros(x) for x in ((d, 1), (1, d), (d,), (d,))))),)
    )
    hooked = evals.relocalized(Arm("hook", plain, still), asked, before=before)
    assert of(hooked, "effect, layer 0") == pytest.approx(of(scores, "effect, layer 0"), abs=1e-4)


def test_shifts_by_hand() -> None:
    p, q = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    assert divergence(p, p).item() == 0.0 and divergence(p, q).item() == pytest.approx(1.0)
    assert overlap(torch.tensor([3.0, 1.0]), torch.tensor([3.0, 1.0])).item() == 1.0
    assert overlap(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 3.0])).item() == 0.5
    assert entropy(torch.tensor([2.0, 2.0, 2.0, 2.0])).item() == pytest.approx(2.0)
    assert entropy(torch.tensor([4.0, 0.0])).item() == 0.0


def test_a_router_that_is_as_it_was_and_one_that_is_not() -> None:
    plain = moe()
    before = Arm("before", plain)
    same = evals.router_shift(Arm("again", plain), FACTS, before=before)
    assert set(of(same, "divergence")) == {0.0} and set(of(same, "overlap")) == {1.0}
    d, e = plain.weight("blocks.1.mlp.W_router").shape
    turned = Edit((Change(Site("blocks.1.mlp.W_router"), LowRank(torch.randn(d, 1), 3 * torch.randn(1, e))),))
    scores = evals.router_shift(Arm("turned", plain, turned), FACTS, before=before)
    assert set(of(scores, "divergence, layer 0")) == {0.0} and min(of(scores, "divergence, layer 1")) > 0
    assert min(of(scores, "overlap, layer 1")) < 1 == of(scores, "overlap, layer 0")[0]
    chosen = routing(before, direct(FACTS, groups=("forget",)))
    lengths = {int(c.sum(1)[0]) for _, c in chosen.values()}
    assert len(lengths) == 1, "every block sees the same tokens, each sent to k experts"
    (why,) = {s.reason for s in evals.router_shift(Arm("d", Model(*tiny_model("llama"))), FACTS, before=before)}
    assert "dense" in why


def test_old_expert_weights_bring_back_what_the_edit_took() -> None:
    plain = moe()
    name = "blocks.1.mlp.experts.2.W_out"
    size = plain.weight(name).shape
    edit = Edit((Change(Site(name), Dense(5 * torch.randn(size, generator=torch.Generator().manual_seed(0)))),))
    before, edited = Arm("before", plain), Arm("edited", plain, edit)
    kept = plain.weight(name).detach().clone()
    scores = evals.expert_rollback(edited, FACTS, before=before)
    assert torch.equal(plain.weight(name), kept)
    found = of(scores, "best rollback")
    assert found and found == pytest.approx([1.0] * len(found), abs=1e-3)
    assert {s.detail for s in scores if s.variant == "best rollback" and s.value is not None} == {"layer 1, expert 2"}
    same = evals.expert_rollback(Arm("again", plain), FACTS, before=before)
    assert {s.reason for s in same if s.variant == "best rollback"} == {"no expert was changed"}
    assert of(same, "forced routing") and expert_layers(plain) == [0, 1, 2]
    d = plain.names.d_model
    shift = Affine(torch.zeros(d, 1), torch.zeros(1, d), torch.zeros(d), torch.ones(d))
    hook = Edit((Change(Site("blocks.1.hook_resid_post"), shift),))
    hooked = evals.expert_rollback(Arm("h", plain, hook), FACTS, before=before)
    assert any("hooks" in s.reason for s in hooked)


def test_knowledge_behind_another_route_is_found() -> None:
    """An edit that only re-routes: forcing the old route gives back what the plain model said."""
    plain = moe()
    with torch.no_grad():
        for expert in range(plain.names.n_experts):
            plain.weight(f"blocks.2.mlp.experts.{expert}.W_out").mul_(5)  # which expert it is must matter
    facts, before = knows(plain), Arm("before", plain)
    d, e = plain.weight("blocks.2.mlp.W_router").shape
    away = torch.zeros(1, e)
    away[0, 0] = 50.0
    draw = torch.Generator().manual_seed(0)
    edit = Edit((Change(Site("blocks.2.mlp.W_router"), LowRank(torch.randn(d, 1, generator=draw), away)),))
    moved = evals.expert_rollback(Arm("moved", plain, edit), facts, before=before)
    shares = of(moved, "best rollback")
    assert shares and shares == pytest.approx([1.0] * len(shares), abs=1e-3)
    assert {s.detail for s in moved if s.variant == "best rollback" and s.value is not None} == {"layer 2, router"}
    lost = {s.fact for s in moved if s.variant == "best rollback" and s.value is not None}
    gains = [s.value for s in moved if s.variant == "forced routing" and s.fact in lost]
    assert min(gains) > 0, "some single expert says more of the answer than the new route"
