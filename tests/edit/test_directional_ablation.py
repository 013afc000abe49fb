"""Directional ablation: nothing writes along the directions any more, in every architecture."""

import numpy as np
import pytest
import torch

from edit import control, directional_ablation
from edit.directional_ablation import orthonormal, writers
from excise.apply import applied, bake
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model, load
from excise.scores import Localization
from excise.sites import Site
from excise.testbed import facts as people_of
from excise.trace import read
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]
WHERE = Localization.of(["blocks.1.hook_resid_post@subject_last"])


def fact(name: str, group: str) -> Fact:
    wordings = ("{S} was born in", "The home of {S} is", "Where was {S} born?")
    return Fact(name, name, "Rome", tuple(Prompt(w.format(S=name), "Rome", name) for w in wordings), group=group)


FACTS = Facts(fact(n, "forget" if i < 2 else "retain") for i, n in enumerate(NAMES))
FORGET, RETAIN = FACTS.split("forget", "retain")


@pytest.fixture(params=["llama", "qwen3-moe", "gpt2", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def basis(edit):
    return edit.changes[0].action.right.double()


def test_no_matrix_writes_along_the_directions(model):
    edit = directional_ablation(model, FORGET, RETAIN, WHERE)
    names = [n for b in range(3) for n in writers(model, b)]
    assert [str(c.site) for c in edit.changes] == names and len(basis(edit)) == 2
    torch.testing.assert_close(basis(edit) @ basis(edit).mT, torch.eye(2).double(), atol=1e-5, rtol=0)
    before = {n: model.weight(n).detach().clone() for n in names}
    baked = bake(model, edit)
    for name in names:
        after = model.weight(name).double()
        assert (after @ basis(edit).mT).abs().max() < 1e-5 < (before[name].double() @ basis(edit).mT).abs().max()
        # Nothing else of the matrix is touched: what it writes elsewhere is what it wrote.
        rest = torch.eye(after.shape[1]).double() - basis(edit).mT @ basis(edit)
        torch.testing.assert_close(after @ rest, before[name].double() @ rest, rtol=1e-4, atol=1e-5)
    once = {n: model.weight(n).detach().clone() for n in names}
    again = directional_ablation(
        model,
        FORGET,
        RETAIN,
        Localization(WHERE.sites, WHERE.scores, WHERE.fact_ids, directions=basis(edit)[:1].numpy()),
    )
    bake(model, again)
    for name in names:  # a direction that is gone cannot be taken away twice
        torch.testing.assert_close(model.weight(name), once[name], rtol=1e-5, atol=1e-5)
    baked.revert()


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2", "neox", "gemma2"])
def test_behind_hooks_the_stream_has_no_such_component(family):
    """Biases, norms behind the MLP and the embedding included."""
    model = Model(*tiny_model(family, layers=3), family)
    edit = directional_ablation(model, FORGET, RETAIN, WHERE, mode="hook")
    right = -edit.changes[0].action.right.double()
    sites = [Site(f"blocks.{b}.hook_resid_post", "all") for b in range(3)]
    plain = read(model, FACTS.prompts(), sites)
    with applied(model, edit):
        bare = read(model, FACTS.prompts(), sites)
    for site in sites:
        assert (bare[site].double() @ right.mT).abs().max() < 1e-4 < (plain[site].double() @ right.mT).abs().max()


def test_shares_per_component(model):
    edit = directional_ablation(model, FORGET, RETAIN, WHERE, attn=0.5, mlp=0.0)
    assert all(str(c.site).endswith("attn.W_O") for c in edit.changes)
    for change in edit.changes:
        weight = model.weight(str(change.site)).double()
        found = (weight + change.action.delta(weight).double()) @ basis(edit).mT
        torch.testing.assert_close(found, weight @ basis(edit).mT / 2, rtol=1e-3, atol=1e-5)


def test_projected_directions_leave_the_retain_mean(model):
    edit = directional_ablation(model, FORGET, RETAIN, WHERE, per="all", projected=True)
    site = Site("blocks.1.hook_resid_post", "subject_last")
    cut = [Prompt(p.text[: p.span[1]], "", p.subject) for f in RETAIN for p in f.prompts]
    mean = read(model, cut, [site])[site].double().mean(0)
    plain = directional_ablation(model, FORGET, RETAIN, WHERE, per="all")
    assert edit.recipe["direction"] == plain.recipe["direction"] == str(site)
    assert (basis(edit) @ mean).abs().max() < 1e-4 * mean.norm() < (basis(plain) @ mean).abs().max()


def test_given_directions_are_used_as_they_are():
    model = Model(*tiny_model("llama", layers=2), "llama")
    rows = np.random.default_rng(0).normal(size=(3, 32))
    where = Localization.of([f"blocks.{b}.hook_resid_post@subject_last" for b in (0, 0, 1)])
    given = Localization(where.sites, where.scores, where.fact_ids, directions=rows)
    edit = directional_ablation(model, FORGET, RETAIN, given)
    inside = torch.as_tensor(rows) - torch.as_tensor(rows) @ basis(edit).mT @ basis(edit)
    assert edit.recipe["direction"] == "given" and inside.abs().max() < 1e-5


def test_orthonormal_drops_what_is_said_twice():
    rows = torch.randn(2, 9, dtype=torch.float64)
    found = orthonormal(torch.cat([rows, rows[:1] * 3 - rows[1:]]))
    assert found.shape == (2, 9)
    torch.testing.assert_close(found @ found.mT, torch.eye(2).double())


def test_requests_that_cannot_be_served_say_why():
    model = Model(*tiny_model("llama", layers=2), "llama")
    with pytest.raises(ExciseError, match="forget set is empty"):
        directional_ablation(model, [], RETAIN, WHERE)
    with pytest.raises(ExciseError, match="choose weight or hook"):
        directional_ablation(model, FORGET, RETAIN, WHERE, mode="bias")
    with pytest.raises(ExciseError, match="choose auto"):
        directional_ablation(model, FORGET, RETAIN, WHERE, position="middle")
    with pytest.raises(ExciseError, match="no site at"):
        directional_ablation(model, FORGET, RETAIN, Localization.of(["blocks.1.hook_resid_post@prefix"]))
    with pytest.raises(ExciseError, match="directions are zero"):
        orthonormal(torch.zeros(1, 4))
    gemma = Model(*tiny_model("gemma2", layers=2), "gemma2")
    with pytest.raises(ExciseError, match="passes a norm"):
        directional_ablation(gemma, FORGET, RETAIN, WHERE)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("dense", 1001), ("moe", 3003)])
def test_people_are_mostly_forgotten_at_a_price_and_a_random_subspace_forgets_nobody(name, seed):
    """Weaker than a redirection, as docs/editor_table.md says: others pay for it. It beats its random control all the same."""
    model, known = load(f"testbed:{name}"), people_of(name, seed=seed, retain=40, neighbours=24)
    forget, retain = known.group("forget"), known.group("retain", "neighbour")
    edit = directional_ablation(model, forget, retain)

    def said(edit, facts):
        prompts = facts.prompts("statement", "question", "cloze")[::7]
        return sum(a.exact for a in Arm("edited", model, edit).answers(prompts)) / len(prompts)

    assert said(edit, forget) <= 0.30 and said(edit, retain) >= 0.60
    assert said(control(edit, seed=seed), forget) >= 0.90
