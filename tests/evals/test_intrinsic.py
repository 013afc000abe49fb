"""The intrinsic evaluations: hand-computed values of their formulas, nothing changed where nothing was, planted truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from knowing import knows
from planted import carrier_model, facts_about

import evals
from evals.alignment import Sums
from evals.fisher_erasure import masked_excess
from evals.head_projection import candidates
from evals.patching_recovery import entry, recovery
from evals.patchscope import block_pairs
from evals.probe_selectivity import control_labels
from evals.shares import erased, halves, other_half_best, recovered_share, weighted_erasure
from evals.states import answer_mask, states
from evals.unlearning_depth import depths
from excise.actions import Affine, LowRank
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
    assert len(hits[0]) > 2 and all(a <= b <= c for a, b, c in zip(*hits, strict=True))
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


# states put into the original


def reflected(plain: Model, point: str, seed: int = 0) -> Edit:
    """A hook that turns the activation round, x -> x - 2 v v'x: nothing is lost, everything is elsewhere."""
    d = plain.names.d_model
    v = torch.nn.functional.normalize(torch.randn(d, d // 2, generator=torch.Generator().manual_seed(seed)), dim=0)
    v = torch.linalg.qr(v)[0]
    return Edit((Change(Site(point), Affine(-2 * v, v.mT.contiguous(), torch.zeros(d), torch.zeros(d))),))


def test_depths_by_hand() -> None:
    reference, found = torch.tensor([[0.5, 1.0, 0.02]]), torch.tensor([[0.25, 2.0, 5.0]])
    three = depths(reference, found)
    assert three["depth"].item() == pytest.approx(0.833333, abs=1e-6)
    assert three["depth without the last block"].item() == pytest.approx(0.833333, abs=1e-6)
    assert three["unweighted"].item() == pytest.approx(0.75)
    late = depths(torch.tensor([[0.01, 0.08, 0.08, 0.30, 1.45]]), torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.59]]))
    assert late["depth without the last block"].item() == 0.0 and late["unweighted"].item() == 0.25
    assert late["depth"].item() == pytest.approx(1.45 / 1.91)


def test_a_linear_image_is_recovered_exactly() -> None:
    x, m = torch.randn(200, 12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    sums, held = Sums(), Sums()
    for part in (x[:70], x[70:150]):
        sums.add(part @ m, part)
    held.add(x[150:] @ m, x[150:])
    found = sums.fit(ridge=0.0)
    assert (found(x[150:] @ m) - x[150:]).abs().max() < 1e-10
    assert held.r2(found) == pytest.approx(1.0)
    whole = sums.fit(ridge=0.1)
    y, z = x[150:], x[150:] @ m
    assert held.r2(whole) == pytest.approx(float(1 - ((y - whole(z)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()))


def test_a_constant_carries_nothing() -> None:
    sums = Sums()
    x, y = torch.full((50, 4), 1 / 3, dtype=torch.float64), torch.randn(50, 3)
    sums.add(x, y)
    found = sums.fit()
    torch.testing.assert_close(found(x), y.double().mean(0).expand(50, 3), atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_between_before_and_oracle(family: str) -> None:
    plain = model(family)
    facts = knows(plain)
    before, oracle = Arm("before", plain), Arm("oracle", plain, moved(plain, 3.0))
    for arm, value in ((before, 0.0), (oracle, 1.0), (Arm("again", plain), 0.0)):
        scores = evals.unlearning_depth(arm, facts, before=before, oracle=oracle)
        for variant in ("depth", "depth without the last block", "unweighted"):
            assert of(scores, variant) and set(of(scores, variant)) == {value}, variant
    assert set(of(evals.unlearning_depth(before, facts, before=before, positions="all"), "cost, layer 0")) == {0.0}


def test_an_edit_of_the_last_block_has_no_depth() -> None:
    plain = model()
    facts = knows(plain)
    before, oracle = Arm("before", plain), Arm("oracle", plain, moved(plain, 3.0))
    late = Arm("late", plain, reflected(plain, "blocks.2.hook_resid_post"))
    scores = evals.unlearning_depth(late, facts, before=before, oracle=oracle)
    assert np.mean(of(scores, "depth")) > 0.2
    assert set(of(scores, "depth without the last block")) == {0.0}


@pytest.mark.parametrize("family", ["llama", "neox", "qwen3-moe"])
def test_what_was_turned_round_is_recovered_and_what_is_gone_is_not(family: str) -> None:
    plain = model(family)
    facts = knows(plain)
    d, last = plain.names.d_model, "blocks.2.hook_resid_post"
    before, turned = Arm("before", plain), Arm("turned", plain, reflected(plain, last))
    # Everything goes to one point: the state no longer depends on the text.
    flat = Edit((Change(Site(last), Affine(-torch.eye(d), torch.eye(d), torch.zeros(d), torch.randn(d))),))
    gone = Arm("gone", plain, flat)
    prompts = [f.prompt for f in facts.group("forget")]
    found = {
        arm.name: np.mean(of(evals.linear_recovery(arm, facts, before=before, oracle=gone, layers=(2,)), variant))
        for arm in (before, turned, gone)
        for variant in ("recovered share",)
    }
    assert found["before"] == 1.0 and found["gone"] == 0.0 and found["turned"] > 0.9
    plainly = {arm.name: np.mean([a.probability for a in arm.answers(prompts)]) for arm in (before, turned)}
    assert plainly["turned"] < 0.7 * plainly["before"]


# states put back


def test_recovery_by_hand() -> None:
    shares = recovery(torch.tensor([-4.0, -2.0, -1.0]), torch.tensor(-1.0), torch.tensor(-4.0))
    assert shares.tolist() == pytest.approx([0.0, 2 / 3, 1.0])
    assert entry(shares) == 1 and entry(torch.tensor([0.1, 0.2])) is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_what_is_lost_comes_back_from_the_edited_block_on(family: str) -> None:
    plain = model(family)
    facts = knows(plain)
    before, edited = Arm("before", plain), Arm("edited", plain, moved(plain, 3.0))
    same = evals.patching_recovery(Arm("again", plain), facts, before=before)
    assert {s.value for s in same} == {None} and {s.reason for s in same} == {"nothing was lost"}
    scores = evals.patching_recovery(edited, facts, before=before, positions=("answer", "all"))
    assert of(scores, "all, layer 0")
    for variant, share in (("all, layer 0", 0.0), ("all, layer 2", 1.0), ("answer, layer 2", 1.0)):
        assert all(abs(x - share) < 1e-3 for x in of(scores, variant)), variant
    assert set(of(scores, "entry, all")) == {1.0}


def test_a_hidden_state_is_decoded_where_the_edit_does_not_reach() -> None:
    """Blocks that add nothing but for one attention layer, which brings the subject's token to the end."""
    plain = carrier_model()
    facts = facts_about(*"QZXV")
    taught = Facts(replace(f, prompts=(replace(f.prompt, answer=a),)) for f, a in zip(facts, "abcd", strict=True))
    arm = Arm("before", plain)
    scores = evals.patchscope(arm, taught, before=arm)
    ranks = {s.fact: s.value for s in scores if s.variant == "best rank"}
    assert len(ranks) == 4 and len(of(scores, "chance, hit@1")) == 4
    # A state put where it came from gives what the prompt itself gives.
    batch = plain.encode([f.prompt for f in taught], answers=True)
    logits = plain.logits(batch)
    for row, fact in enumerate(taught):
        own = batch.answer_logits(logits, row)[0]
        assert ranks[fact.id] <= 1 + int((own > own[batch.answer(row)[0]]).sum())


def test_pairs_of_blocks() -> None:
    assert block_pairs(3, 8) == [(s, t) for s in range(3) for t in range(3)]
    assert len(block_pairs(8, 8)) == 49
    many = block_pairs(48, 8)
    assert len(many) < 50 and (47, 47) in many and (0, 2) in many and all(t <= s + 2 for s, t in many)


# the control task, and sensitivity


def test_the_control_task_deals_classes_to_subjects() -> None:
    subjects = [f"s{i // 2}" for i in range(24)]
    labels = np.array([(i // 2) % 3 for i in range(24)])
    dealt = control_labels(subjects, labels, 0)
    assert (dealt != labels).any() and sorted(dealt) == sorted(labels)
    assert all(dealt[2 * i] == dealt[2 * i + 1] for i in range(12))


def test_a_probe_that_learns_names_has_no_selectivity() -> None:
    """A random model says nothing of the answer, yet its states tell the names: what is read is learned by heart."""
    arm = Arm("before", model())
    people = [person(i, "forget" if i < 6 else "retain") for i in range(24)]
    scores = evals.probe_selectivity(arm, people, before=arm)
    found = {v: np.array(of(scores, v)) for v in ("accuracy", "control", "selectivity", "transfer", "majority")}
    assert (found["selectivity"] == found["accuracy"] - found["control"]).all() and len(found["accuracy"]) == 24
    assert (found["transfer"] == found["accuracy"]).all() and found["majority"].mean() == pytest.approx(1 / 3)
    assert abs(found["selectivity"].mean()) < 0.35


def test_masked_excess_by_hand() -> None:
    before, after, oracle = torch.tensor([1.0, 1.0, 5.0, 1.0]), torch.tensor([2.0, 9.0, 5.0, 1.0]), torch.tensor([4.0, 3.0, 1.0, 1.0])  # fmt: skip
    assert masked_excess(before, after, oracle, 0.25) == (3.0, 2.0)
    assert masked_excess(before, before, oracle, 0.5) == (2.5, 2.5)
    assert masked_excess(before, oracle, oracle, 0.5) == (2.5, 0.0)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_fisher_erasure_between_before_and_oracle(family: str) -> None:
    plain = model(family)
    facts = knows(plain)
    before, oracle = Arm("before", plain), Arm("oracle", plain, moved(plain, 3.0))
    for arm, value in ((before, 0.0), (oracle, 1.0)):
        scores = evals.fisher_erasure(arm, facts, before=before, oracle=oracle)
        assert [s.value for s in scores] == [value] * 3
    assert {s.value for s in evals.fisher_erasure(before, facts, before=before)} == {None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_embedded_models_that_know_and_that_never_learned(name: str) -> None:
    """People that nothing was tuned on; the oracle was trained apart, so its states are translated."""
    from excise.model import load
    from excise.testbed import facts as people

    known = people(name, people=3, seed=4004, retain=24, neighbours=8)
    before, oracle = Arm("before", load(f"testbed:{name}")), Arm("oracle", load(f"testbed:{name}-oracle"))

    def mean(method, arm: Arm, variant: str) -> float:
        options = {"oracle": oracle} if method is not evals.head_projection and method is not evals.patchscope else {}
        return float(np.mean(of(method(arm, known, before=before, limit=12, **options), variant)))

    for method, variant, ends in (
        (evals.lens_erasure, "erasure", (0.0, 1.0)),
        (evals.unlearning_depth, "depth", (0.0, 1.0)),
        (evals.unlearning_depth, "depth without the last block", (0.0, 1.0)),
        (evals.linear_recovery, "recovered share", (1.0, 0.0)),
    ):
        assert (mean(method, before, variant), mean(method, oracle, variant)) == ends, variant
    for method, variant in ((evals.head_projection, "projection, 4"), (evals.patchscope, "hit@1")):
        assert mean(method, before, variant) > 0.9 and mean(method, oracle, variant) < 0.5, variant
