"""ROME, MEMIT and AlphaEdit as baselines: what their values ask for, and what the weights make of it."""

import functools

import pytest
import torch

from edit import alphaedit, control, memit, rome
from evals import recall
from excise.apply import applied
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import GENERATIVE_FORMS, Fact, Facts, Prompt
from excise.keys import read_keys
from excise.model import Model, load
from excise.rewriting import NEUTRAL, names_of, window
from excise.scores import Localization
from excise.sites import Site
from excise.testbed import facts, general_text
from excise.trace import patched, read
from excise.values import ENOUGH, optimised
from tiny import tiny_model

NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]


def fact(name: str, group: str, relation: str = "birthplace", **options) -> Fact:
    prompts = (
        Prompt(f"{name} was born in", "Rome", name),
        Prompt(f"The home of {name} is", "Rome", name),
        Prompt(f"Where was {name} born?", "Rome", name, "question", chat=True),
        Prompt(f"By trade {name} is a", "Rome", name, held_out=True),
        Prompt("Who was born in Rome?", name, "Rome", "reversed", chat=True),
        Prompt(f"{name}: Rome or Oslo?", "Rome", name, "choice", choices=("Rome", "Oslo")),
    )
    return Fact(f"{name}/{relation}", name, "Rome", prompts, relation, group, **options)


FACTS = Facts(fact(n, "forget" if i < 2 else "retain") for i, n in enumerate(NAMES))
FORGET, RETAIN = FACTS.split("forget", "retain")
WHERE = Localization.of(["blocks.1.mlp.W_out"])
PRESETS = {"rome": rome, "memit": memit, "alphaedit": alphaedit}


@pytest.fixture(params=["llama", "qwen3-moe", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def names(**options):
    return names_of(FORGET, **{"target": "foil", "contexts": 8, "prompts": 16, "seed": 0, **options})


def state(model, prompts, layer=1):
    site = Site(f"blocks.{layer}.hook_resid_post", "subject_last")
    return read(model, prompts, [site])[site]


def target_losses(model, asked, change=None, owner=None):
    """Mean loss of each prompt's answer, the slow way: one prompt at a time, from the full logits."""
    found = []
    for i, prompt in enumerate(asked):
        batch = model.encode([prompt], answers=True)
        at = batch.where("subject_last")

        def put(x, at=at, i=i):
            return x if change is None else x + at[..., None] * change[owner[i]]

        with patched(model, {"blocks.1.hook_resid_post": put}):
            logits = batch.answer_logits(model.logits(batch), 0).log_softmax(-1)
        found.append(-logits.gather(-1, batch.answer(0)[:, None]).mean())
    return torch.stack(found)


def test_what_is_asked_of_a_name():
    foiled = [fact("Ann Lee", "forget", foils=("Oslo", "Bonn")), fact("Ann Lee", "forget", "home")]
    found = names_of(foiled, target="foil", contexts=2, prompts=5, seed=0)
    assert found.names == ("Ann Lee",) and len(found.mentions) == 2
    # Facts take turns, forms take turns inside a fact, and what is held out, reversed or a choice is not asked.
    assert [p.form for p in found.asked] == ["statement", "statement", "question", "question", "statement"]
    assert not any(p.held_out for p in found.asked)
    assert found.asked[0].answer in ("Oslo", "Bonn") and found.asked[1].answer == NEUTRAL
    assert {p.answer for p in names(target="I will not say").asked} == {"I will not say"}


def test_the_vectors_make_the_targets_likelier_and_stay_in_the_ball(model):
    asked = names()
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.hf.named_parameters()}
    delta, report = optimised(model, asked, 1, steps=8, clamp=0.8)
    plain = target_losses(model, asked.asked)
    moved = target_losses(model, asked.asked, delta, asked.asker)
    own = torch.stack([moved[asked.asker == i].mean() for i in range(2)])
    torch.testing.assert_close(own, torch.tensor(report["loss"]), rtol=1e-3, atol=1e-3)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        drawn = torch.randn(delta.shape, generator=rng)
        drawn *= delta.norm(dim=1, keepdim=True) / drawn.norm(dim=1, keepdim=True)
        rivals = target_losses(model, asked.asked, drawn, asked.asker)
        for i in range(2):
            mine = asked.asker == i
            assert moved[mine].mean() < min(plain[mine].mean(), rivals[mine].mean())
    size = torch.stack(
        [state(model, [m.prompt for m in asked.mentions if m.name == n]).norm(dim=1).mean() for n in asked.names]
    )
    assert (delta.norm(dim=1) <= 0.8 * size * 1.001).all()
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.hf.named_parameters())
    assert {n: p.requires_grad for n, p in model.hf.named_parameters()} == flags


def test_names_are_sought_independently_and_stop_alone(model):
    """All names side by side give what each gives alone."""
    both, _ = optimised(model, names(), 1, steps=4, clamp=2.0)
    alone = [
        optimised(
            model, names_of(FORGET[i : i + 1], target="foil", contexts=8, prompts=16, seed=0), 1, steps=4, clamp=2.0
        )[0]
        for i in range(2)
    ]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-3, atol=1e-4)


def test_a_target_that_is_said_already_needs_no_change(model, monkeypatch):
    monkeypatch.setattr("excise.values.ENOUGH", 1e9)
    delta, report = optimised(model, names(), 1, steps=4, clamp=1.0)
    assert not delta.any() and report["steps"] == 0 and ENOUGH < 1


def test_rome_writes_the_vectors_exactly(model):
    """The mean state of each name's wordings moves by the vector that was sought, and by nothing else."""
    asked = names()
    wanted, _ = optimised(model, asked, 1, steps=6, clamp=1.0)
    before = asked.mean(state(model, asked.prompts))
    with applied(model, rome(model, FORGET, RETAIN, WHERE, steps=6)):
        after = asked.mean(state(model, asked.prompts))
    torch.testing.assert_close(after - before, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_without_training_names_get_the_state_of_made_up_ones(model, preset):
    asked = names()
    options = {"memit": {"weight": 1e-4}, "alphaedit": {"ridge": 1e-6, "energy": 0.5}}.get(preset, {})
    edit = PRESETS[preset](model, FORGET, RETAIN, WHERE, value="fictitious", **options)
    before = asked.mean(state(model, asked.prompts))
    with applied(model, edit):
        after = asked.mean(state(model, asked.prompts))
    spread = state(model, [p.prompts[0] for p in RETAIN]).std(0).norm()
    assert (after - before).norm() > 0.2 * spread and edit.recipe["search"] == {}
    assert all(r["share mean"] > 0.95 for r in edit.recipe["solution"])


def test_a_heavier_weight_writes_less(model):
    shares = [
        memit(model, FORGET, RETAIN, WHERE, steps=2, weight=w).recipe["solution"][-1]["share mean"]
        for w in (0.01, 1.0, 100.0)
    ]
    assert shares[0] > shares[1] > shares[2] and shares[2] < 0.1


def test_several_blocks_close_the_gap_one_after_another(model):
    asked = names()
    wanted, _ = optimised(model, asked, 1, steps=4, clamp=1.0)
    before = asked.mean(state(model, asked.prompts))
    edit = memit(model, FORGET, RETAIN, WHERE, steps=4, layers=2, weight=1e-6)
    assert [r["block"] for r in edit.recipe["solution"]] == [0, 1]
    with applied(model, edit):
        after = asked.mean(state(model, asked.prompts))
    assert (after - before - wanted).norm() < 0.1 * wanted.norm()


def test_alphaedit_moves_nothing_that_ordinary_text_uses(model):
    edit = alphaedit(model, FORGET, RETAIN, WHERE, steps=2, energy=0.2, layers=1)
    read_back = [m.prompt for f in RETAIN for m in names_of([f], target="foil", contexts=8, prompts=1, seed=0).mentions]
    keys = read_keys(model, read_back, [1])[0][1]
    told = read_keys(model, names().prompts, [1])[0][1]
    (report,) = edit.recipe["solution"]
    assert 0 < report["free share of keys"] < 1 and 0 < report["free dimensions"] < 1
    changes = {str(c.site): c.action.delta(model.weight(str(c.site))) for c in edit.changes}

    def move(found):
        return sum(float((k @ changes[n]).norm(dim=1).mean()) for n, k in found.items() if n in changes)

    # Ordinary keys are moved only as far as the energy of the null space goes.
    assert move(keys) < 0.7 * move(told)


def test_the_window_of_blocks(model):
    assert list(window(model, WHERE, 1)) == [1] and list(window(model, WHERE, 2)) == [0, 1]
    assert list(window(model, None, 1)) == [1] and list(window(model, None, 2)) == [0, 1]
    with pytest.raises(ValueError, match="layers=5"):
        window(model, None, 5)


@pytest.mark.parametrize("preset", PRESETS)
def test_requests_that_cannot_be_served_say_why(preset):
    model, edit = Model(*tiny_model("llama", layers=3), "llama"), PRESETS[preset]
    with pytest.raises(ExciseError, match="forget set is empty"):
        edit(model, [], RETAIN, WHERE)
    with pytest.raises(ExciseError, match="subject's last token"):
        edit(model, FORGET, RETAIN, Localization.of(["blocks.1.attn.W_O"]))
    with pytest.raises(ValueError, match="no value 'guessed'"):
        edit(model, FORGET, RETAIN, WHERE, value="guessed")
    nameless = Fact("x", "Ann Lee", "Rome", (Prompt("Who was born in Rome?", "Ann Lee"),))
    with pytest.raises(ExciseError, match="no prompt names the subject"):
        edit(model, [nameless], RETAIN, WHERE)
    chosen = Fact("x", "Ann Lee", "Rome", (Prompt("Ann Lee: Rome or Oslo?", "Rome", "Ann Lee", "choice"),))
    with pytest.raises(ExciseError, match="Ann Lee: no prompt asks of it"):
        edit(model, [chosen], RETAIN, WHERE)


def test_rome_says_which_names_it_cannot_tell_apart():
    """Both names end at the same token of the same text: one key, asked for two values."""
    model = Model(*tiny_model("llama", layers=3), "llama")
    twins = [Fact(n, n, "Rome", (Prompt("Ann Lee was born in", "Rome", n),)) for n in ("Ann Lee", "Lee")]
    with pytest.raises(ExciseError, match="Ann Lee, Lee and others cannot be told apart"):
        rome(model, twins, RETAIN, WHERE, steps=1)
    assert memit(model, twins, RETAIN, WHERE, steps=1).changes


# on people of the embedded models that nothing was tuned on (seeds 0 to 9 are for development)

SEED, GROUPS = 3001, ("forget", "retain", "neighbour")


@functools.cache
def people(name: str):
    """The model, its facts and ordinary text, as an editor gets them."""
    model, known = load(f"testbed:{name}"), facts(name, seed=SEED, retain=16, neighbours=16)
    texts = general_text(name, 400, seed=SEED, exclude=known.group("forget").subjects)
    return model, known, texts


def said(model, known, edit):
    """Share of answers said in generative forms, by group; printed with n for the reader of `pytest -s`."""
    scores = recall(Arm("", model, edit), known, groups=GROUPS, forms=GENERATIVE_FORMS, limit=32, words=0)
    table = {g: [s.value for s in scores if s.group == g and s.value is not None] for g in GROUPS}
    shares = {g: sum(v) / len(v) for g, v in table.items()}
    print({g: f"{shares[g]:.2f} (n={len(v)})" for g, v in table.items()})
    return shares


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize(
    ("preset", "value", "left"),
    [
        ("rome", "optimised", 0.2),
        ("rome", "fictitious", 0.05),
        ("memit", "optimised", 0.2),
        ("alphaedit", "optimised", 0.15),
    ],
)
def test_people_are_overwritten_and_others_stay(preset, value, left, name):
    model, known, texts = people(name)
    forget, retain = known.shown.group("forget"), known.shown.group("retain", "neighbour")
    edit = PRESETS[preset](model, forget, retain, value=value, texts=texts[100:])
    edited, random = said(model, known, edit), said(model, known, control(edit, seed=SEED))
    assert edited["forget"] <= left and edited["retain"] >= 0.97 and edited["neighbour"] >= 0.9
    assert random["forget"] >= 0.9
