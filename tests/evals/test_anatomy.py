"""What was changed and what it looks like: weights, geometry, experts, dictionaries. Values by hand, and planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dictionaries import axes

import evals
from evals.concept_residual import jaccard, residual
from evals.sae_residual import residual_share
from evals.similarity import _erasure, linear_cka, neighbours_kept, principal
from evals.weight_anatomy import anatomy, leak
from excise.actions import Affine, Dense, LowRank
from excise.arms import Arm
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Score
from excise.sites import Site
from tiny import tiny_model

torch.set_num_threads(1)


def model(family: str = "llama", seed: int = 0) -> Model:
    return Model(*tiny_model(family, layers=3, seed=seed))


def person(i: int, group: str) -> Fact:
    name, answer = f"{'QZXVJK'[i % 6]}{'abcdef'[i // 6]} Lee", ("Rome", "Paris", "Warsaw")[i % 3]
    prompts = (Prompt(f"{name} was born in", answer, name), Prompt(f"The birthplace of {name} is", answer, name))
    return Fact(f"{group}-{i}", name, answer, prompts, relation="birthplace", group=group)


FACTS = Facts([person(i, "forget") for i in range(6)] + [person(i, "retain") for i in range(6, 24)])


def low_rank(plain: Model, site: str, rank: int = 1, size: float = 1.0, seed: int = 0) -> Edit:
    d_in, d_out = plain.weight(site).shape
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(d_in, rank, generator=draw), size * torch.randn(rank, d_out, generator=draw)
    return Edit((Change(Site(site), LowRank(left, right)),))


def hook(plain: Model, point: str = "blocks.1.hook_resid_post") -> Edit:
    d = plain.names.d_model
    return Edit((Change(Site(point), Affine(torch.zeros(d, 1), torch.zeros(1, d), torch.zeros(d), torch.ones(d))),))


def of(scores: list[Score], variant: str, group: str | None = None) -> list[float]:
    chosen = (s for s in scores if s.variant == variant and group in (None, s.group))
    return [s.value for s in chosen if s.value is not None]


# weights


def test_anatomy_by_hand() -> None:
    w = torch.eye(4)
    assert anatomy(w, torch.eye(4)) == pytest.approx({"relative norm": 1.0, "rank": 4.0, "stable rank": 4.0})
    found = anatomy(w, torch.outer(torch.randn(4), torch.randn(4)))
    assert found["stable rank"] == pytest.approx(1.0) and found["rank"] == 1.0


def test_a_change_in_the_null_space_of_the_keys_does_not_leak() -> None:
    keys, change = torch.randn(5, 12), torch.randn(12, 7)
    q = torch.linalg.qr(keys.mT)[0]
    assert leak(change - q @ (q.mT @ change), keys) < 1e-6
    assert leak(torch.outer(torch.eye(3)[0], torch.ones(2)), torch.eye(3)[:1]) == pytest.approx(1.0)
    assert 0 < leak(change, keys) < 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_the_anatomy_of_a_known_change(family: str) -> None:
    plain = model(family)
    site = "blocks.1.mlp.experts.1.W_out" if family == "qwen3-moe" else "blocks.1.mlp.W_out"
    before, edited = Arm("before", plain), Arm("edited", plain, low_rank(plain, site, rank=2, size=0.5))
    kept = plain.weight(site).detach().clone()
    same = evals.weight_anatomy(Arm("again", plain), FACTS, before=before)
    assert [(s.variant, s.value) for s in same] == [("changed matrices", 0.0)]
    scores = evals.weight_anatomy(edited, FACTS, before=before)
    assert torch.equal(plain.weight(site), kept)
    assert of(scores, "changed matrices") == [1.0] and of(scores, "energy share, layer 1") == pytest.approx([1.0])
    assert of(scores, "rank") == [2.0] and {s.fact for s in scores if s.variant == "rank"} == {site}
    delta = edited.edit.changes[0].action.delta(kept)
    assert of(scores, "relative norm") == pytest.approx([float(delta.norm() / kept.norm())], rel=1e-4)
    # Two checkpoints, found without knowing the edit.
    other = model(family)
    with torch.no_grad():
        other.weight(site).add_(delta)
    twice = evals.weight_anatomy(Arm("checkpoint", other), FACTS, before=before)
    assert [(s.fact, s.variant) for s in twice] == [(s.fact, s.variant) for s in scores]
    assert [s.value for s in twice] == pytest.approx([s.value for s in scores], rel=1e-3, abs=1e-4)


def test_there_is_no_anatomy_of_hooks_or_of_strangers() -> None:
    plain = model()
    before = Arm("before", plain)
    for arm, why in ((Arm("h", plain, hook(plain)), "hooks"), (Arm("o", model(seed=1)), "trained apart")):
        (score,) = evals.weight_anatomy(arm, FACTS, before=before)
        assert score.value is None and why in score.reason


# geometry


def test_cka_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert linear_cka(x, 3 * x @ turn + 7) == pytest.approx(1.0)
    assert linear_cka(x, x[:, :1]) == pytest.approx(0.707107, abs=1e-6)
    assert linear_cka(x, torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])) == pytest.approx(0.0)
    assert np.isnan(linear_cka(x, torch.ones(4, 1)))
    assert [s.value for s in _erasure([(0.6, 0.9), (1.0, 0.2)], "forget")] == pytest.approx([0.75])


def test_few_rows_look_alike_only_without_the_correction() -> None:
    draws = [torch.randn(2, 20, 100, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    assert np.mean([linear_cka(x, y) for x, y in draws]) > 0.7
    assert abs(np.mean([linear_cka(x, y, debiased=True) for x, y in draws])) < 0.03
    assert linear_cka(draws[0][0], 2 * draws[0][0] + 1, debiased=True) == pytest.approx(1.0)


def test_principal_direction_and_neighbours_by_hand() -> None:
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    first = principal(x)
    assert first.abs().tolist() == pytest.approx([1.0, 0.0])
    moved = x + torch.tensor([3.0, 0.0])
    assert float((first @ principal(moved)).abs()) == pytest.approx(1.0)
    assert abs(float(((moved - x).double() @ first).mean())) == pytest.approx(3.0)
    line = torch.tensor([[0.0], [1.0], [5.0], [6.0]])
    assert neighbours_kept(line, 2 * line + 1, 1).tolist() == [1.0] * 4
    assert neighbours_kept(line, line[[0, 2, 1, 3]], 1).tolist() == [0.0] * 4


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_similarity_of_the_same_and_of_the_oracle(family: str) -> None:
    plain = model(family)
    before, oracle = Arm("before", plain), Arm("oracle", plain, low_rank(plain, "blocks.0.attn.W_O"))
    same = evals.similarity(before, FACTS, before=before, oracle=oracle)
    for variant, value in (("cka to before", 1), ("cosine", 1), ("norm ratio", 1), ("neighbours kept", 1), ("move", 0)):
        found = of(same, f"{variant}, layer 1")
        assert found and found == pytest.approx([value] * len(found), abs=1e-6), variant
    assert of(same, "principal shift, layer 1") == pytest.approx([0.0, 0.0])
    assert of(same, "cka erasure") == [0.0, 0.0]
    aimed = evals.similarity(oracle, FACTS, before=before, oracle=oracle)
    assert of(aimed, "cka erasure") == pytest.approx([1.0, 1.0]) and min(of(aimed, "move, layer 1")) > 0


# value vectors


def test_residual_by_hand() -> None:
    head, v = torch.eye(6), torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    same = residual(v, v, head, [0, 5], 3)
    assert same == {
        "cosine": 1, "distance": 0, "jaccard": 1, "concept retention": 1, "related rate": 1, "logit change": 0,
    }  # fmt: skip
    assert residual(v, -v, head, [0], 3)["cosine"] == pytest.approx(-1.0)
    assert residual(v, 0 * v, head, [0], 3)["cosine"] == 0.0
    assert jaccard({1, 2, 3}, {2, 3, 4}) == 0.5
    assert residual(v, v, head, [5], 3)["concept retention"] is None
    shifted = residual(v, v.flip(0), head, [0, 1, 4, 5], 3)
    assert shifted["concept retention"] == 1.0 and shifted["related rate"] == 0.0
    assert shifted["logit change"] == pytest.approx(0.0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_value_vectors_before_and_after(family: str) -> None:
    plain = model(family)
    before = Arm("before", plain)
    names = [n for i in range(3) for n in plain.names.weights(i) if n.endswith("W_out")]
    off = Edit(tuple(Change(Site(n), Dense(-plain.weight(n).detach().clone())) for n in names))
    same = evals.concept_residual(Arm("again", plain), FACTS, before=before)
    for variant, value in (("cosine", 1.0), ("distance", 0.0), ("jaccard", 1.0), ("logit change", 0.0)):
        assert of(same, variant) == [value] * 6, variant
    gone = evals.concept_residual(Arm("off", plain, off), FACTS, before=before)
    assert of(gone, "cosine") == [0.0] * 6 and of(gone, "distance") == pytest.approx([1.0] * 6)
    (why,) = {s.reason for s in evals.concept_residual(Arm("h", plain, hook(plain)), FACTS, before=before)}
    assert "hooks" in why


# dictionaries


def test_residual_share_by_hand() -> None:
    """Identity dictionary, activations (2, 0) and (0, 3), unit 0 zeroed afterwards."""
    old, new = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    of_one, of_both = (residual_share(old[:, f].sum()[None], new[:, f].sum()[None]) for f in ([0], [0, 1]))
    assert of_one.tolist() == [0.0] and of_both.tolist() == pytest.approx([3 / 5])
    assert residual_share(torch.zeros(1), torch.ones(1)).isnan().all()


def test_features_before_and_after_a_clamp() -> None:
    plain, book = model(), axes(hook="blocks.1.hook_resid_post")
    before = Arm("before", plain)
    options = {"before": before, "dictionary": book, "most": 1.1}
    same = evals.sae_residual(Arm("again", plain), FACTS, **options)
    for variant, value in (("activity", 1.0), ("firing", 1.0), ("attribution", 1.0), ("newcomers", 0.0)):
        assert of(same, variant) == [value] * 6, variant
    assert of(same, "unexplained", "forget") == pytest.approx([0.0] * 6, abs=1e-6)
    assert of(same, "reconstruction alone") == pytest.approx([0.0] * 6, abs=1e-4)
    assert max(map(abs, of(same, "error alone"))) > 0.01
    silent = Edit((Change(Site(book.hook), book.clamp(list(range(book.n)), 0.0)),))
    gone = evals.sae_residual(Arm("clamped", plain, silent), FACTS, **options)
    assert of(gone, "activity") == pytest.approx([0.0] * 6, abs=1e-5)
    assert {s.detail for s in gone if s.variant == "activity"} == {"clamped here: what the edit set"}
    (why,) = {s.reason for s in evals.sae_residual(Arm("o", model(seed=1)), FACTS, **options)}
    assert "trained apart" in why
