"""ROCR: the invariants of its spec on small random models, and what it does to people in the embedded ones."""

import pytest
import torch

from edit import rocr
from excise.apply import applied
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys
from excise.mentions import fictitious, mentions, met_in, sharing
from excise.model import Model
from excise.scores import Localization
from excise.sites import Site
from excise.trace import read
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]


def fact(name: str, group: str) -> Fact:
    prompts = (
        Prompt(f"{name} was born in", "Rome", name),
        Prompt(f"The home of {name} is", "Rome", name),
        Prompt(f"Where was {name} born?", "Rome", name, "question", chat=True),
        Prompt(f"By trade {name} is a", "Rome", name, held_out=True),
    )
    return Fact(name, name, "Rome", prompts, group=group)


FACTS = Facts(fact(n, "forget" if i < 2 else "retain") for i, n in enumerate(NAMES))
FORGET, RETAIN = FACTS.split("forget", "retain")
WHERE = Localization.of(["blocks.1.mlp.W_out"])


@pytest.fixture(params=["llama", "qwen3-moe", "gpt2", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def states(model, prompts, layer=1):
    site = Site(f"blocks.{layer}.hook_resid_post", "subject_last")
    return read(model, prompts, [site])[site]


def test_the_subject_reads_as_the_neutral_person(model):
    """Hard form, one block, paired contexts: the state at the subject's last token becomes the neutral one."""
    edit = rocr(model, FORGET[:1], RETAIN, WHERE, target="Dora Hill", mode="hard", protect=0)
    told = mentions(FORGET[:1], limit=8)
    wanted = states(model, [m.around("Dora Hill") for m in told])
    with applied(model, edit):
        found = states(model, [m.prompt for m in told])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_target_equal_to_the_subject_changes_nothing(model):
    edit = rocr(model, FORGET[:1], RETAIN, WHERE, target=FORGET[0].subject)
    assert all(c.norm == 0.0 for c in edit.changes)


def test_name_sharers_are_held_and_more_ridge_writes_less(model):
    guarded = sharing(mentions(RETAIN, limit=8), mentions(FORGET, limit=8), limit=64)
    assert {m.name for m in guarded} == {"Ann Stone"}  # "Lee" and "Ann" are too short to tell people apart
    kept = states(model, [m.prompt for m in guarded])
    edit = rocr(model, FORGET, RETAIN, WHERE, mode="hard")
    with applied(model, edit):
        torch.testing.assert_close(states(model, [m.prompt for m in guarded]), kept, rtol=1e-3, atol=1e-3)
    shares = [
        rocr(model, FORGET, RETAIN, WHERE, ridge=r).recipe["solution"][0]["share mean"] for r in (1e-6, 1e-3, 1e-1)
    ]
    assert shares[0] > shares[1] > shares[2] and shares[0] > 0.99


def test_gap_closes_over_several_blocks(model):
    """Each block writes its share of what is still open; the end state is near the target."""
    edit = rocr(model, FORGET[:1], RETAIN, WHERE, target="Dora Hill", layers=2, ridge=1e-6, protect=0)
    told = mentions(FORGET[:1], limit=8)
    wanted, before = states(model, [m.around("Dora Hill") for m in told]), states(model, [m.prompt for m in told])
    with applied(model, edit):
        after = states(model, [m.prompt for m in told])
    assert [r["block"] for r in edit.recipe["solution"]] == [0, 1]
    assert (wanted - after).norm() < 0.05 * (wanted - before).norm()


def test_copies_stand_at_further_blocks_each_as_if_alone(model):
    """Whoever takes one copy away is left with the edit that the other block alone would have had."""
    several = Localization.of([f"blocks.{i}.mlp.W_out" for i in range(3)])
    edit, single = rocr(model, FORGET, RETAIN, several, copies=2), rocr(model, FORGET, RETAIN, several)
    blocks = [r["block"] for r in edit.recipe["solution"]]
    assert 1 <= len(blocks) <= 2 and len(set(blocks)) == len(blocks)
    assert blocks[0] == single.recipe["solution"][0]["block"] and len(single.recipe["solution"]) == 1
    for block in blocks:
        alone = rocr(model, FORGET, RETAIN, Localization.of([f"blocks.{block}.mlp.W_out"]))
        mine = [c for c in edit.changes if c.site.layer == block]
        assert [r["block"] for r in alone.recipe["solution"]] == [block] and len(mine) == len(alone.changes)
        for a, b in zip(mine, alone.changes, strict=True):
            assert a.site == b.site
            torch.testing.assert_close(
                a.action.delta(model.weight(str(a.site))), b.action.delta(model.weight(str(b.site)))
            )


def test_copies_of_runs_of_blocks_do_not_overlap(model):
    several = Localization.of([f"blocks.{i}.mlp.W_out" for i in range(3)])
    blocks = [r["block"] for r in rocr(model, FORGET, RETAIN, several, layers=2, copies=3).recipe["solution"]]
    assert len(set(blocks)) == len(blocks)


def test_other_tokens_move_by_their_leak_and_nothing_else(model):
    """Before the subject a token moves by its own key's share of the change, to rounding; causality allows no other way."""
    edit = rocr(model, FORGET, RETAIN, WHERE)
    prompt = Prompt("The home of Bob Stone is", "Rome", "Bob Stone")
    keys = read_keys(model, [prompt], [1], rule=2)[0][1]
    leak = torch.stack(
        [keys[str(c.site)] @ c.action.delta(model.weight(str(c.site))) for c in edit.changes if str(c.site) in keys]
    ).sum(0)
    site = Site("blocks.1.hook_resid_post", 2)
    plain = read(model, [prompt], [site])[site]
    with applied(model, edit):
        torch.testing.assert_close(read(model, [prompt], [site])[site] - plain, leak, rtol=1e-3, atol=1e-4)


def test_held_out_wordings_are_never_read():
    told = mentions(FORGET, limit=8)
    assert all("By trade" not in m.prompt.text for m in told)
    assert [m.prompt.text for m in told[:3]] == ["Ann Lee", "The home of Ann Lee", "Where was Ann Lee"]


def test_fictitious_names_are_new_and_of_the_same_make():
    made = fictitious(NAMES, 20, seed=1)
    assert made == fictitious(NAMES, 20, seed=1) and made != fictitious(NAMES, 20, seed=2)
    firsts, lasts = {n.split()[0] for n in NAMES}, {n.split()[1] for n in NAMES}
    assert len(made) == 20 and not set(made) & set(NAMES)
    assert all(n.split()[0] in firsts and n.split()[1] in lasts for n in made)


def test_requests_that_cannot_be_served_say_why(model):
    with pytest.raises(ExciseError, match="forget set is empty"):
        rocr(model, [], RETAIN, WHERE)
    with pytest.raises(ExciseError, match="subject's last token"):
        rocr(model, FORGET, RETAIN, Localization.of(["blocks.1.attn.W_O"]))
    with pytest.raises(ExciseError, match="no target names"):
        rocr(model, FORGET[:1], Facts([]), WHERE, texts=["some text"])


def test_blocks_behind_a_norm_are_refused():
    gemma = Model(*tiny_model("gemma2", layers=3), "gemma2")
    with pytest.raises(ExciseError, match="passes a norm"):
        rocr(gemma, FORGET, RETAIN, WHERE)


def test_people_whom_ordinary_text_speaks_of_are_protected_too(model):
    texts = ["Then Hugo Stone met Bob Stone in the rain.", "A stone fell.", "By the river Ann Stone Marlow sang."]
    met = met_in(texts, mentions(FORGET, limit=4), limit=8)
    assert {m.name for m in met} == {"Then Hugo Stone", "Ann Stone Marlow"}
    assert all(m.prompt.text.endswith(m.name) for m in met)
    assert {m.name for m in met_in(texts, mentions(FORGET, limit=4), limit=1)} == {"Then Hugo Stone"}
    plain = states(model, [m.prompt for m in met])

    def moved(**options):
        with applied(model, rocr(model, FORGET, RETAIN, WHERE, texts=texts, ridge=1e-3, **options)):
            return (states(model, [m.prompt for m in met]) - plain).norm()

    assert moved() < 0.5 * moved(protect=0)
