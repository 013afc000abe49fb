"""The intrinsic evaluations: hand-computed values of their formulas, nothing changed where nothing was, planted truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import evals
from evals.head_projection import candidates
from evals.shares import erased, halves, other_half_best, recovered_share, weighted_erasure
from evals.states import answer_mask, states
from excise.actions import LowRank
from excise.arms import Arm
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Score
from excise.sites import Site
from excise.trace import read
from tiny import tiny_model

FAMILIES = ("gpt2", "llama", "neox", "qwen3-moe")


def person(i: int, group: str) -> Fact:
    name, answer = f"{'QZXVJK'[i % 6]}{'abcdef'[i // 6]} Lee", ("Rome", "Paris", "Warsaw")[i % 3]
    prompts = (
        Prompt(f"{name} was born in", answer, name),
        Prompt(f"The birthplace of {name} is", answer, name),
        Prompt(f"Where was {name} born?", answer, name, form="question"),
    )
    return Fact(f"{group}-{i}", name, answer, prompts, relation="birthplace", group=group)


FACTS = Facts([person(i, "forget") for i in range(4)] + [person(i, "retain") for i in range(4, 20)])


def model(family: str = "llama", layers: int = 3, seed: int = 0) -> Model:
    return Model(*tiny_model(family, layers=layers, seed=seed))


def moved(plain: Model, size: float = 0.3, seed: int = 0) -> Edit:
    """A random rank-one change of the attention output of block 1."""
    d = plain.weight("blocks.1.attn.W_O").shape
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(d[0], 1, generator=draw), size * torch.randn(1, d[1], generator=draw)
    return Edit((Change(Site("blocks.1.attn.W_O"), LowRank(left, right)),))


def knows(plain: Model, n: int = 6) -> Facts:
    """Facts whose answers are what the random model says: half to forget, half to keep."""
    names = [f"{a}{b} Lee" for a in "QZXVJKWM" for b in "abcdefghij"]
    asked = [Prompt(f"{name} was born in\n", "", name) for name in names]  # a newline needs no space after it
    said = plain.generate_all(asked, max_new_tokens=1)
    good = [replace(p, answer=w) for p, w in zip(asked, said, strict=True) if w.isascii() and w.isprintable() and w]
    exact = [p for p, a in zip(good, Arm("", plain).answers(good), strict=True) if a.exact]
    assert len(exact) >= n, "the random model says nothing that is text"
    groups = ("forget", "retain")
    return Facts(
        Fact(f"f{i}", p.subject, p.answer, (p,), "x", groups[i % 2]) for i, p in enumerate(exact[: max(n, 24)])
    )


def of(scores: list[Score], variant: str) -> list[float]:
    return [s.value for s in scores if s.variant == variant and s.value is not None]


# shared parts


def test_weighted_erasure_by_hand() -> None:
    reference, found = torch.tensor([0.5, 1.0, 0.02]), torch.tensor([0.25, 2.0, 5.0])
    assert weighted_erasure(reference, found).item() == pytest.approx((0.25 + 1) / 1.5)
    assert erased(reference, found)[:2].tolist() == [0.5, 1.0] and erased(reference, found)[2].isnan()
    assert weighted_erasure(torch.full((3,), 0.01), found).isnan()
    assert weighted_erasure(reference, reference).item() == 1.0 and weighted_erasure(reference, 0 * found).item() == 0.0


def test_recovered_share_by_hand() -> None:
    assert recovered_share(0.6, 1.0, 0.2) == pytest.approx(0.5)
    assert recovered_share(0.6, 0.2, 0.21) is None


def test_no_row_chooses_its_own_layer() -> None:
    half = halves(["a", "a", "b", "c", "d"])
    assert half[0] == half[1] and set(half) == {0, 1}
    values = np.array([[9.0, 0.0], [0.0, 1.0]])
    assert other_half_best(values, np.array([0, 1])).tolist() == [1, 0]
    assert other_half_best(values, np.array([0, 0])).tolist() == [-1, -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_a_plain_reading(family: str) -> None:
    plain = model(family)
    arm, prompts = Arm("before", plain), [f.prompt for f in FACTS][:5]
    found = states(arm, prompts)
    sites = [f"blocks.{i}.hook_resid_post@{rule}" for rule in ("last", "subject_last") for i in range(plain.n_layers)]
    seen = read(plain, prompts, sites, answers=True)
    for i, one in enumerate(found):
        rows = torch.stack([seen[s][i] for s in sites])
        torch.testing.assert_close(torch.cat([one.last, one.subject]), rows)
        batch = plain.encode([prompts[i]], answers=True)
        assert one.answer.shape[1] == len(batch.answer(0)) == int(answer_mask(batch).sum())
        assert int(answer_mask(batch)[0].nonzero()[0]) == batch.starts[0] - 1
    assert states(arm, prompts[:1])[0] is found[0]


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evals.states.MOST", 1000)
    arm = Arm("before", model())
    assert len(states(arm, [f.prompt for f in FACTS])) == len(FACTS)
    assert sum(s.size for s in arm.kept["states"].values()) <= 1000


# the lens, measured and attacked


def test_candidates_by_hand() -> None:
    rows = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert candidates(rows, 2) == ({0, 1}, {5, 4})
    assert candidates(torch.zeros(1, 4), 2) == ({0, 1}, {0, 1})
    top, bottom = candidates(torch.cat([rows, rows.flip(1)]), 1)
    assert top == {0, 5} and bottom == {0, 5}


def test_head_projection_is_monotone_and_finds_what_the_model_says() -> None:
    plain = model()
    arm = Arm("before", plain)
    known = knows(plain)
    scores = evals.head_projection(arm, known, before=arm, layers=(1, 2), ks=(1, 2, 10))
    hits = [of(scores, f"projection, {k}") for k in (1, 2, 10)]
    assert hits[0] and all(a <= b <= c for a, b, c in zip(*hits, strict=True))
    assert all(h == 1.0 for h in hits[0]), "the last layer's first choice is the answer"
    assert all(0 < c <= 2 * 2 * 2 / plain.weight("unembed.W_U").shape[1] for c in of(scores, "projection, 2, chance"))
    alone = evals.head_projection(arm, known, before=arm, layers=(2,))
    assert {s.reason for s in alone if s.variant.startswith("delta")} <= {"a delta needs two layers", ""}


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_lens_erasure_between_before_and_oracle(family: str) -> None:
    plain = model(family)
    facts = knows(plain)
    before, oracle = Arm("before", plain), Arm("oracle", plain, moved(plain, 3.0))
    edited = Arm("edited", plain, moved(plain, 1.0))
    for arm, value in ((before, 0.0), (oracle, 1.0)):
        scores = evals.lens_erasure(arm, facts, before=before, oracle=oracle)
        assert of(scores, "erasure") and set(of(scores, "erasure")) == {value}
    between = evals.lens_erasure(edited, facts, before=before, oracle=oracle)
    assert all(0 <= x <= 1 for x in of(between, "erasure"))
    alone = evals.lens_erasure(edited, facts, before=before)
    assert {s.value for s in alone if s.variant == "erasure"} == {None}
    assert of(alone, "mean drop") == of(between, "mean drop") and set(of(alone, "drop, layer 0")) == {0.0}
