"""Expert edits: only the chosen experts change, and what is said of the routing is what happens."""

import pytest
import torch

from edit import expert_edit
from edit.expert_edit import steering
from evals import recall
from excise.actions import LowRank, Scale
from excise.apply import applied
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import GENERATIVE_FORMS, Fact, Facts, Prompt
from excise.mentions import mentions
from excise.model import Model, load
from excise.routers import routes
from excise.scores import Localization
from excise.sites import Site
from excise.testbed import facts, general_text
from excise.trace import patched, read
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]


def fact(name: str, group: str) -> Fact:
    prompts = (Prompt(f"{name} was born in", "Rome", name), Prompt(f"The home of {name} is", "Rome", name))
    return Fact(name, name, "Rome", prompts, "birthplace", group)


FACTS = Facts(fact(n, "forget" if i < 2 else "retain") for i, n in enumerate(NAMES))
FORGET, RETAIN = FACTS.split("forget", "retain")
TOLD = [m.prompt for m in mentions(FORGET, limit=8)]


@pytest.fixture(params=["qwen3-moe", "qwen2-moe"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def experts(*numbers, block=1):
    return Localization.of([f"blocks.{block}.mlp.experts.{e}.W_out" for e in numbers])


def busiest(model, block=1):
    """The expert that most wordings of the forget names are sent to."""
    return int(routes(model, TOLD)[block].flatten().bincount().argmax())


def logits(model):
    return model.logits(model.encode(FACTS.prompts()))


def test_silencing_is_a_routing_weight_of_zero(model):
    expert = busiest(model)
    edit = expert_edit(model, FORGET, RETAIN, experts(expert), how="silence")
    assert isinstance(edit.changes[0].action, Scale) and [str(s) for s in edit.sites] == edit.recipe["chosen"]
    router = model.hf.get_submodule(model.names.tap("blocks.1.mlp.gate.hook_out").module)
    hook = router.register_forward_hook(
        lambda module, args, out: (out[0], out[1].masked_fill(out[2] == expert, 0), out[2])
    )
    wanted = logits(model)
    hook.remove()
    with applied(model, edit):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


def test_nothing_changes_before_a_token_is_sent_to_the_expert(model):
    batch, seen = model.encode(FACTS.prompts()), []
    router = model.hf.get_submodule(model.names.tap("blocks.1.mlp.gate.hook_out").module)
    hook = router.register_forward_hook(lambda module, args, out: seen.append(out[2]))
    plain = model.logits(batch)
    hook.remove()
    index = seen[0].view(*batch.ids.shape, -1)
    expert = next(e for e in range(4) if e not in index[:, 0] and e in index)
    before = ((index == expert).any(-1).long().cumsum(1) == 0)[..., None]
    with applied(model, expert_edit(model, FORGET, RETAIN, experts(expert), how="silence")):
        moved = (model.logits(batch) - plain).abs()
    assert before.any() and (moved * before).max() < 1e-4 < (moved * ~before).max()


def test_an_expert_that_no_name_is_sent_to_cannot_rewrite(model):
    told = [m.prompt for m in mentions(FORGET[:1], limit=8)]
    unused = [(b, e) for b, found in routes(model, told).items() for e in range(4) if e not in found]
    block, expert = unused[0]
    with pytest.raises(ExciseError, match=rf"is ever sent to blocks\.{block}\.mlp\.experts\.{expert}\.W_out"):
        expert_edit(model, FORGET[:1], RETAIN, experts(expert, block=block))


def test_rewriting_touches_the_chosen_experts_alone(model):
    expert = busiest(model)
    edit = expert_edit(model, FORGET, RETAIN, experts(expert), ridge=1e-6)
    assert [str(c.site) for c in edit.changes] == [f"blocks.1.mlp.experts.{expert}.W_out"]
    assert isinstance(edit.changes[0].action, LowRank)
    # A token that is not sent there keeps its state, to the bit.
    site = Site("blocks.1.hook_resid_post", "subject_last")
    prompts = [m.prompt for m in mentions(FACTS, limit=8)]
    away = ~(routes(model, prompts)[1] == expert).any(1)
    plain = read(model, prompts, [site])[site]
    with applied(model, edit):
        moved = read(model, prompts, [site])[site]
    torch.testing.assert_close(moved[away], plain[away], rtol=1e-5, atol=1e-5)
    told = ~away[: len(TOLD)]
    assert told.any() and ((moved - plain)[: len(TOLD)][told].norm(dim=1) > 1e-3).all()


def test_all_experts_of_a_block_write_the_whole_change(model):
    edit = expert_edit(model, FORGET, RETAIN, experts(0, 1, 2, 3), ridge=1e-9)
    assert edit.recipe["solution"][0]["share mean"] == pytest.approx(1, abs=0.02)
    some = expert_edit(model, FORGET, RETAIN, experts(busiest(model)), ridge=0.5)
    assert some.recipe["solution"][0]["share mean"] < 0.9


def test_the_wanted_logits_leave_none_of_the_experts_among_the_best():
    torch.manual_seed(0)
    logits = torch.randn(50, 8)
    change = steering(logits, [1, 6], 2)
    assert not torch.isin((logits + change).topk(2).indices, torch.tensor([1, 6])).any()
    assert (change <= 0).all() and not change[:, [0, 2, 3, 4, 5, 7]].any()
    # The order of the others is theirs, and what lies low stays.
    others = [0, 2, 3, 4, 5, 7]
    assert torch.equal((logits + change)[:, others], logits[:, others])
    low = logits.clone()
    low[:, [1, 6]] = -100
    assert not steering(low, [1, 6], 2).any()
    with pytest.raises(ExciseError, match="leaves fewer than 2"):
        steering(logits, [0, 1, 2, 3, 4, 5, 6], 2)


def test_steering_sends_the_names_elsewhere(model):
    expert = busiest(model)
    edit = expert_edit(model, FORGET, RETAIN, experts(expert), how="steer", ridge=1e-3)
    assert [str(c.site) for c in edit.changes] == ["blocks.1.mlp.W_router"] and edit.bakeable
    before = float((routes(model, TOLD)[1] == expert).float().sum(1).mean())
    with applied(model, edit):
        after = float((routes(model, TOLD)[1] == expert).float().sum(1).mean())
    found = edit.recipe["routing"]
    assert found["forget chosen before"] == pytest.approx(before) and found["forget chosen after"] == pytest.approx(
        after
    )
    assert after < 0.5 * before
    # Blocks below do not see it.
    plain = routes(model, TOLD)[0]
    with applied(model, edit):
        assert torch.equal(routes(model, TOLD)[0], plain)


def test_without_experts_named_the_busiest_of_the_names_are_taken(model):
    edit = expert_edit(model, FORGET, RETAIN, Localization.of(["blocks.2.hook_resid_post@subject_last"]), experts=1)
    assert edit.recipe["chosen"][0].startswith("blocks.2.mlp.experts.")
    assert len(expert_edit(model, FORGET, RETAIN, experts=3, how="silence").recipe["chosen"]) == 3


def test_requests_that_cannot_be_served_say_why(model):
    with pytest.raises(ExciseError, match="forget set is empty"):
        expert_edit(model, [], RETAIN, experts(1))
    with pytest.raises(ValueError, match="how='burn'"):
        expert_edit(model, FORGET, RETAIN, experts(1), how="burn")
    with pytest.raises(ExciseError, match="leaves fewer than 2"):
        expert_edit(model, FORGET, RETAIN, experts(0, 1, 2), how="steer")
    dense = Model(*tiny_model("llama", layers=3), "llama")
    with pytest.raises(ExciseError, match="llama has no experts"):
        expert_edit(dense, FORGET, RETAIN)


def test_routes_are_those_of_the_router(model):
    """Against the router's own choice, one prompt at a time."""
    found = routes(model, TOLD)
    for i, prompt in enumerate(TOLD[:3]):
        seen = {}
        router = model.hf.get_submodule(model.names.tap("blocks.1.mlp.gate.hook_out").module)
        hook = router.register_forward_hook(lambda module, args, out, seen=seen: seen.update(index=out[2]))
        with patched(model, {}):
            model.logits(model.encode([prompt]))
        hook.remove()
        assert set(seen["index"][-1].tolist()) == set(found[1][i].tolist())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "left", "kept"), [("rewrite", 0.05, 0.97), ("steer", 0.95, 0.97)])
def test_people_of_the_embedded_model_next_to_random_experts(how, left, kept):
    """Steering is held to little: on these people it leaves most of what is known (silencing is worse on both sides)."""
    model, known = load("testbed:moe"), facts("moe", seed=3001, retain=16, neighbours=16)
    texts = general_text("moe", 400, seed=3001, exclude=known.group("forget").subjects)[100:]
    forget, retain = known.shown.group("forget"), known.shown.group("retain", "neighbour")
    edit = expert_edit(model, forget, retain, how=how, texts=texts)
    others = Localization.of(
        [f"blocks.{b}.mlp.experts.{e}.W_out" for b, e in ((1, 7), (3, 1), (5, 0), (2, 7))]  # drawn once
    )
    random = expert_edit(model, forget, retain, others, how=how, texts=texts)
    shares = {}
    for arm in (Arm("edited", model, edit), Arm("random", model, random)):
        scores = recall(arm, known, groups=("forget", "retain"), forms=GENERATIVE_FORMS, limit=32, words=0)
        for group in ("forget", "retain"):
            values = [s.value for s in scores if s.group == group and s.value is not None]
            shares[arm.name, group] = sum(values) / len(values)
    print(shares)
    assert shares["edited", "forget"] <= min(left, shares["random", "forget"]) and shares["edited", "retain"] >= kept
