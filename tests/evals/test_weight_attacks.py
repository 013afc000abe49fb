"""Attacks on weights: each undoes the edit built to be undone by it, draws nothing from the oracle, leaves no trace."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attacked import asked_prompts, dense, digest, hidden, louder, masked, mean, oracle, world
from knowing import knows

import evals
from evals.attacking import questions, told
from evals.interpolation import first_half
from evals.layer_skip import skipped
from evals.pruning import set_difference, smallest, wanda
from evals.quantisation import bin_survival, bins, rounded
from evals.relearning import _curve, area, halves, material, steps_to
from evals.tampering import matrices, originals, tampered
from evals.weight_diff import leading_part
from excise.actions import Affine, Dense, LowRank
from excise.arms import Arm
from excise.edits import Change, Edit
from excise.gradients import mean_gradients
from excise.model import Model
from excise.sites import Site
from tiny import tiny_model

OUT = "blocks.7.mlp.W_out"


def arm(edit: Edit | None = None) -> Arm:
    return Arm("edited" if edit else "before", dense(), edit)


# formulas


def test_rounding_by_hand() -> None:
    w = torch.tensor([-1, -0.5, 0.1, 0.7])[:, None]
    q, scale = bins(w, 4)
    assert q[:, 0].tolist() == [-7, -4, 1, 5] and scale[:, 0].tolist() == pytest.approx([1 / 7] * 4)
    assert rounded(w, 4)[:, 0].tolist() == pytest.approx([-1, -0.571429, 0.142857, 0.714286], abs=1e-6)
    assert float((rounded(w, 4) - w).abs().max()) <= 1 / 14 + 1e-7
    assert bin_survival(w + torch.tensor([0.02, -0.02, 0.02, -0.02])[:, None], w, 4) == (0, 4)
    assert bin_survival(w + torch.tensor([0.0, 0.0, 0.15, 0.0])[:, None], w, 4) == (1, 1)


def test_rounding_goes_output_by_output_and_group_by_group() -> None:
    w = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10.0, 0.1])
    for column in range(3):
        assert torch.equal(rounded(w, 4)[:, column], rounded(w[:, column : column + 1], 4)[:, 0])
    assert torch.equal(rounded(w, 4, 4)[:4], rounded(w[:4], 4)) and not torch.equal(rounded(w, 4, 4), rounded(w, 4))
    assert torch.equal(rounded(torch.zeros(4, 2), 4), torch.zeros(4, 2))


def test_pruning_by_hand() -> None:
    w = torch.tensor([[-1, -0.5], [0.1, 0.7]])
    assert w.masked_fill(smallest(w.abs(), 0.5), 0).flatten().tolist() == pytest.approx([-1, 0, 0, 0.7])
    assert not smallest(w.abs(), 0.0).any()
    # |w| times the input's norm: [[2, 1], [0.3, 2.1]] with norms (2, 3); the smaller input of each output goes.
    assert wanda(w, torch.tensor([2.0, 3.0]), 0.5).tolist() == [[False, True], [True, False]]
    hides, helps = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[9.0, 1, 1, 8]])
    assert set_difference(hides, helps, 0.5).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_the_library(bits: int) -> None:
    w = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    scale, top = bins(w, bits)[1][0].contiguous(), 2 ** (bits - 1)
    of_torch = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(24, dtype=torch.int32), 1, -top, top - 1)
    assert torch.equal(rounded(w, bits), of_torch)


def test_curves_by_hand() -> None:
    curve = [(0, 0.0), (1, 0.5), (2, 1.0), (4, 0.0)]
    assert area(curve) == pytest.approx((0.25 + 0.75 + 1.0) / 4) and area([(0, 0.3)]) == 0.3
    assert steps_to(curve, 0.5) == 1 and steps_to(curve, 2.0) is None
    assert first_half([(0.5, 0.9), (0.1, 0.2), (0.25, 0.45)], 0.9) == 0.25 and first_half([(0.5, 0.1)], 0.9) is None


def test_the_leading_part_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (160, 120)):
        low = torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
        left, right = leading_part(low, 2)
        assert torch.allclose(left @ right, low, atol=1e-3)
        noisy = low + 0.01 * torch.randn(*shape, generator=generator)
        u, s, v = torch.linalg.svd(noisy)
        left, right = leading_part(noisy, 1)
        assert torch.allclose(left @ right, s[0] * u[:, :1] @ v[:1], atol=1e-2 * float(s[0]))


# the weights come back


@pytest.mark.parametrize("family", ["gpt2", "qwen3-moe"])
def test_tampering_is_undone_to_the_bit_also_after_an_exception(family: str) -> None:
    model = Model(*tiny_model(family))
    was = digest(model)
    with pytest.raises(KeyError), tampered(model) as parameters, torch.no_grad():
        for p in parameters.values():
            p.add_(torch.randn_like(p)).requires_grad_(False)
            p.grad = torch.zeros_like(p)
        assert digest(model) != was
        raise KeyError
    assert digest(model) == was and all(p.requires_grad and p.grad is None for p in model.hf.parameters())
    with tampered(model, [name := next(iter(dict(model.hf.named_parameters())))]) as chosen:
        assert list(chosen) == [name]


WEIGHT_ATTACKS = (
    "quantisation", "pruning", "layer_skip", "hook_removal", "noise", "interpolation", "weight_diff", "relearning",
    "direction_reversal",
)  # fmt: skip


@pytest.mark.parametrize("name", WEIGHT_ATTACKS)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_no_attack_leaves_a_trace(name: str, family: str, small_facts: list) -> None:  # type: ignore[type-arg]
    model = Model(*tiny_model(family))
    matrix = next(n for n in matrices(model) if n.endswith("W_out"))
    d_in, d_out = model.weight(matrix).shape
    generator = torch.Generator().manual_seed(0)
    change = LowRank(0.1 * torch.randn(d_in, 1, generator=generator), torch.randn(1, d_out, generator=generator))
    edit = Edit((Change(Site(matrix), change),))
    before, was = Arm("before", model), digest(model)
    attack = getattr(evals, name)
    takes = {"before": before} if name in ("quantisation", "interpolation", "weight_diff", "direction_reversal") else {}
    first = attack(Arm("edited", model, edit), small_facts, **takes)
    assert digest(model) == was and not any(model.active.values())
    assert all(p.requires_grad and p.grad is None for p in model.hf.parameters())
    assert first == attack(Arm("edited", model, edit), small_facts, **takes)
    assert [s for s in first if s.value is not None and s.group == "forget"]


def test_before_the_first_step_of_relearning_it_is_the_plain_score() -> None:
    model = Model(*tiny_model("llama"))
    facts = knows(model, 8)
    asked, _ = questions(model, facts, groups=("forget", "retain"), limit=0, seed=0)
    plain = told(Arm("before", model), asked, "")
    curve = _curve(Arm("before", model), asked, [f.prompt for f in facts], "full", (1,), 4, 0.1, 8, 0)
    assert curve[0] == plain != curve[1] and any(s.value for s in plain)


@pytest.fixture(scope="module")
def small_facts() -> list:  # type: ignore[type-arg]
    from excise.facts import Fact, Prompt

    def fact(n: int, group: str) -> Fact:
        subject, answer = f"Marie {chr(65 + n)}urie", ("Rome", "Paris", "Warsaw")[n % 3]
        prompts = (
            Prompt(f"{subject} was born in", answer, subject),
            Prompt(f"Where was {subject} born?", answer, subject, form="question"),
        )
        return Fact(f"{group}{n}", subject, answer, prompts, relation="birthplace", group=group)

    return [fact(n, "forget") for n in range(4)] + [fact(n, "retain") for n in range(3)]


# each edit is undone by the attack that it was built for


def test_a_rank_one_mask_hides_and_is_undone_by_skipping_it_and_by_its_difference() -> None:
    edited, facts = arm(masked()), world()
    assert hidden(edited) <= 0.05 and hidden(edited, "retain") >= 0.9 and hidden(arm()) == 1.0
    for scores, never, variant in (
        (*(evals.layer_skip(a, facts, layers=(7,), limit=12) for a in (edited, oracle())), "no mlp 7"),
        (*(evals.weight_diff(a, facts, before=arm(), limit=12) for a in (edited, oracle())), "rank 1 undone"),
    ):
        assert mean(scores, variant) >= 0.9 and mean(never, variant) <= 0.1
    put_back = evals.weight_diff(edited, facts, before=arm(), modules=3, limit=4)
    assert {s.variant for s in put_back if "put back" in s.variant} == {f"{OUT} put back"}
    zero = arm(masked().scaled(0.0))
    for same in (arm(), zero):
        for attack in (evals.weight_diff, evals.interpolation):
            unchanged = attack(same, facts, before=arm(), limit=4)
            assert {s.reason for s in unchanged} == {"no matrix differs from the model before"}


def test_a_mask_is_trained_away_on_facts_about_others() -> None:
    facts = world()
    scores, never = (
        evals.relearning(a, facts, methods=("full",), steps=(1, 2, 5), limit=0) for a in (arm(masked()), oracle())
    )
    assert mean(scores, "full, best") >= 0.6 and mean(never, "full, best") <= 0.1
    trained = halves(facts, [f for f in facts if f.group == "forget"], 0)
    shown = {f.subject for f in facts if f.id in trained.trained}
    asked = {s.subject for s in scores if s.group == "forget"}
    assert len(shown) == len(asked) == 3 and not shown & asked
    low = evals.relearning(arm(masked()), facts, methods=("lora",), steps=(1, 2, 4), limit=16)
    assert mean(low, "lora, best") >= 0.5 and mean(low, "lora, area") > 0


def test_facts_about_a_single_subject_are_split_and_one_fact_cannot_be() -> None:
    facts = world()
    one = facts.where(lambda f: f.subject == facts.group("forget")[0].subject or f.group == "retain")
    scores = evals.relearning(arm(masked()), one, methods=("full",), steps=(1,))
    assert len({s.fact for s in scores if s.group == "forget"}) == 4
    single = evals.relearning(arm(), [facts[0]], steps=(1,))
    assert {s.reason for s in single} == {"no other fact to train on: give two forget facts or more"}


def test_each_regime_trains_on_its_own_facts() -> None:
    facts = world()
    forget = [f for f in facts if f.group == "forget"]
    split, by_id = halves(facts, forget, 0), {f.id: f for f in facts}
    for regime in ("forget", "retain", "general"):
        prompts = material(dense(), facts, regime, split, 0, 0)
        assert prompts and {by_id[p.fact_id].group for p in prompts} == {regime}
        assert len({p.fact_id for p in material(dense(), facts, regime, split, 1, 0)}) == 1
    assert {by_id[p.fact_id].subject for p in material(dense(), facts, "forget", split, 0, 0)} == split.subjects
    scores = evals.relearning(arm(), facts, methods=("full",), regimes=("retain",), steps=(1,), limit=4)
    assert {s.variant for s in scores} == {f"full on retain, {k}" for k in ("step 1", "best", "area")}


def test_hooks_alone_are_lost_with_their_hooks() -> None:
    edited = arm(louder(dense(), 60.0))
    assert hidden(edited) == 0
    assert mean(evals.hook_removal(edited, world()), "") == 1.0
    both = arm(masked() + louder(dense(), 60.0))
    assert mean(evals.hook_removal(both, world()), "") <= 0.1, "what is written into weights stays"
    assert mean(evals.hook_removal(oracle(), world(), limit=12), "") <= 0.1


@functools.cache
def fragile(within: str) -> Edit:
    """Steps up the loss of the forget answers that stay in the 4-bit bins of the weights, or among those to be pruned."""
    model = Model(copy.deepcopy(dense().hf), dense().tokenizer)
    names = matrices(model)
    base = {n: model.weight(n).detach().clone() for n in names}
    room = {n: _room(base[n], within) for n in names}
    prompts = asked_prompts(world())[::4]
    for _ in range(3):
        gradients = mean_gradients(model, prompts, names)
        with torch.no_grad():
            for n in names:
                low, high = room[n]
                w = model.weight(n)
                w.copy_((w + 0.7 * (high - low) * gradients[n].sign()).maximum(low).minimum(high))
    return Edit(tuple(Change(Site(n), Dense(model.weight(n).detach() - base[n])) for n in names))


def _room(w: torch.Tensor, within: str) -> tuple[torch.Tensor, torch.Tensor]:
    if within == "bins":
        q, scale = bins(w, 4)
        free = q.abs() < 7
        return torch.where(free, (q - 0.49) * scale, w), torch.where(free, (q + 0.49) * scale, w)
    small = smallest(w.abs(), 0.3)
    top = 0.999 * w.abs()[small].max()
    return torch.where(small, -top, w), torch.where(small, top, w)


@pytest.mark.parametrize(
    ("within", "attack", "variant", "other"),
    [
        ("bins", functools.partial(evals.quantisation, before=arm()), "int4", "int8"),
        ("smallest", evals.pruning, "magnitude, 30%", None),
    ],
)
def test_what_is_smaller_than_the_grain_is_lost_with_it(
    within: str,
    attack: Callable[..., list],
    variant: str,
    other: str | None,  # type: ignore[type-arg]
) -> None:
    edited = arm(fragile(within))
    hides = hidden(edited)
    assert hides <= 0.1, hides
    scores = attack(edited, world(), limit=12)
    assert mean(scores, variant) >= 0.9 and mean(attack(oracle(), world(), limit=12), variant) <= 0.1
    if other:
        assert mean(scores, other) <= 0.6
        survival = {s.variant: s.value for s in scores if not s.group}
        assert survival["bin survival, int4"] == 0 and survival["bin survival, int8"] > 0.5


def test_a_mask_that_barely_hides_yields_to_noise_and_to_part_of_the_way_back() -> None:
    edited = arm(masked(0.75))
    assert hidden(edited) <= 0.25
    keys: dict[str, Any] = {"limit": 8}
    back = evals.interpolation(edited, world(), before=arm(), shares=(0.05, 0.5), **keys)
    assert mean(back, "50% of the way") >= 0.8 > 0.5 > mean(back, "5% of the way")
    shaken = evals.noise(edited, world(), sigmas=(0.0, 0.3), draws=2, limit=16)
    assert mean(shaken, "sigma 0.3") > mean(shaken, "sigma 0")
    assert mean(evals.noise(oracle(), world(), **keys), "any") <= 0.1
    assert mean(evals.interpolation(oracle(), world(), before=arm(), shares=(0.25,), **keys), "25% of the way") <= 0.1


def test_set_difference_prunes_what_suppresses() -> None:
    scores, never = (evals.pruning(a, world(), shares=(), limit=16) for a in (arm(masked()), oracle()))
    assert mean(scores, "set difference, 5%") > mean(never, "set difference, 5%") + 0.1


# mechanics


def test_skipping_every_block_leaves_the_head_of_the_embedding() -> None:
    from contextlib import ExitStack

    for family in ("gpt2", "llama", "neox", "qwen3-moe"):
        model = Model(*tiny_model(family))
        batch = model.encode(["Marie Curie was born in"])
        with ExitStack() as stack:
            for layer in range(model.n_layers):
                stack.enter_context(skipped(model, layer, "block"))
            logits = model.logits(batch)
        embedded = model.hf.get_submodule(model.names.embed)(batch.ids)
        if "pos_embed.hook_out" in model.names.points():
            embedded = embedded + model.weight("pos_embed.W_pos")[: batch.ids.shape[1]]
        wanted = model.hf.get_submodule(model.names.unembed)(model.hf.get_submodule(model.names.final_norm)(embedded))
        assert torch.allclose(logits, wanted, atol=1e-5), family


def test_skipping_a_part_takes_away_what_it_adds() -> None:
    from excise.trace import read_batch

    model = Model(*tiny_model("llama"))
    batch = model.encode(["Marie Curie was born in"])
    for part, point in (("mlp", "hook_resid_mid"), ("attention", "hook_resid_pre")):
        with skipped(model, 1, part):
            names = [f"blocks.1.{p}" for p in ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out")]
            seen = read_batch(model, batch, names)
        added = seen["blocks.1.hook_resid_post"] - seen["blocks.1.hook_resid_pre"]
        left = seen["blocks.1.hook_attn_out" if part == "mlp" else "blocks.1.hook_mlp_out"]
        assert torch.allclose(added, left, atol=1e-5), point
    with pytest.raises(ValueError, match="no part"), skipped(model, 0, "head"):
        pass


def test_the_originals_are_those_of_the_matrices_that_differ() -> None:
    model, other = Model(*tiny_model("llama")), Model(*tiny_model("llama"))
    name = "blocks.0.mlp.W_out"
    was = model.weight(name).detach().clone()
    with torch.no_grad():
        other.weight(name).add_(1.0)
    found = originals(Arm("b", other), Arm("a", model), matrices(model))
    assert list(found) == [name] and torch.equal(found[name], was)
    edit = Edit((Change(Site(name), Dense(torch.ones_like(was))),))
    assert torch.equal(originals(Arm("e", model, edit), Arm("a", model), matrices(model))[name], was)
    assert originals(Arm("a", model), Arm("a", model), matrices(model)) == {}


def test_prompts_of_the_mask_are_the_facts_own() -> None:
    assert len(asked_prompts(world())) == sum(len(f.ask("statement", "question")) for f in world().group("forget"))


def test_an_added_direction_is_found_and_taken_back() -> None:
    from evals.direction_reversal import moved, orthogonal, projected_out, subtracted

    model, facts = dense(), world()
    size = 40.0
    shift = torch.randn(model.names.d_model, generator=torch.Generator().manual_seed(3)) * size
    zero = torch.zeros(model.names.d_model)
    steer = Affine(zero[:, None], zero[None], zero, shift)
    edited = arm(Edit((Change(Site("blocks.4.hook_resid_post", "after_bos"), steer),)))
    assert hidden(edited) <= 0.1
    asked, _ = questions(model, facts, groups=("forget",), limit=6, seed=0)
    found = moved(edited, arm(), [i for items in asked for i in items])
    assert found is not None and found[0] == 4 and torch.allclose(found[1], shift, atol=1e-3)
    scores = evals.direction_reversal(edited, facts, before=arm(), limit=12)
    assert mean(scores, "1 r subtracted") == 1.0 and mean(scores, "2 r subtracted") <= 0.2
    assert mean(evals.direction_reversal(oracle(), facts, before=arm(), limit=8), "any") <= 0.1
    assert {s.reason for s in evals.direction_reversal(arm(), facts, before=arm(), limit=4) if s.value is None} == {
        "the states are those of the model before: there is nothing to reverse"
    }
    batch = model.encode(["Marie Curie was born in"])
    with edited.running(), subtracted(model, 4, shift):
        logits = model.logits(batch)
    assert torch.allclose(logits, model.logits(batch), atol=1e-3)
    w = torch.randn(5, model.names.d_model)
    assert torch.allclose(orthogonal(w, shift) @ shift, torch.zeros(5), atol=1e-2)
    assert torch.allclose(orthogonal(orthogonal(w, shift), shift), orthogonal(w, shift), atol=1e-5)
    with projected_out(model, shift):
        seen = arm().trace(["Marie Curie"], ["blocks.7.hook_resid_post@last"])
    assert abs(float(seen["blocks.7.hook_resid_post@last"][0] @ shift / shift.norm())) < 1e-2
