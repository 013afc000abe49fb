"""What every registered editor promises, on dense, MoE, GPT-2, GPT-NeoX and Gemma-2. A new editor is tested by being registered.

Where an editor cannot work on an architecture it must say so in one line, for a reason listed in NOT_APPLICABLE.
"""

import functools
import re

import pytest
import torch
from dictionaries import axes
from transformers import AutoModelForCausalLM

from edit import control
from excise.actions import Abstain
from excise.apply import applied, bake
from excise.checkpoint import export
from excise.edits import Edit
from excise.errors import ExciseError, FingerprintMismatch
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.registry import methods
from excise.scores import Localization
from excise.verification import verify
from tiny import tiny_model

FAMILIES = ("llama", "qwen3-moe", "gpt2", "neox", "gemma2")
# Reasons for which an editor may refuse an architecture: its MLP output passes a norm, or it has no experts.
NOT_APPLICABLE = {"gemma2": "passes a norm|no experts"} | dict.fromkeys(("llama", "gpt2", "neox"), "no experts")
# What an editor needs to be told on random models, which know nothing and decline nothing.
# Clamping gets a dictionary that rebuilds any model of this width, and no gate: random features fire on every text.
# Detectors are allowed many false positives: names that share their parts are hardly told apart by random weights.
OPTIONS = {
    "key_space": {"rate": 0.5, "statistic": "extent"},
    "neuron_adjust": {"rate": 0.4},
    "lunar": {"declined": 0.0, "least": 0.0},
    "sae_clamp": {"dictionary": axes(), "select": "difference", "most": 2.0, "gate": "none"},
}
NAMES = ["Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford"]
TOWNS = "Rome Oslo Bonn Bern Riga Kiev Lima Cairo".split()
EDITORS = sorted(methods("editor"))


def fact(name: str, town: str, group: str) -> Fact:
    def ask(text: str, **options) -> Prompt:
        return Prompt(text.format(S=name), town, name, **options)

    prompts = (
        ask("{S} was born in"),
        ask("The home of {S} is"),
        ask("Where was {S} born?", form="question", chat=True),
    )
    return Fact(name.replace(" ", "-"), name, town, prompts, "birthplace", group)


FACTS = Facts(fact(n, t, "forget" if i < 2 else "retain") for i, (n, t) in enumerate(zip(NAMES, TOWNS, strict=True)))
WHERE = Localization.of(["blocks.1.hook_resid_post@subject_last"])


@functools.cache
def built(editor: str, family: str) -> tuple[Model, Edit | ExciseError]:
    model = Model(*tiny_model(family, layers=3), family)
    untouched(model)
    try:
        return model, make(model, editor)
    except ExciseError as error:
        return model, error


def make(model: Model, editor: str) -> Edit:
    groups = FACTS.group("forget"), FACTS.group("retain")
    return methods("editor")[editor].function(model, *groups, WHERE, **OPTIONS.get(editor, {}))


@pytest.fixture(params=[(e, f) for e in EDITORS for f in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}")
def made(request):
    model, edit = built(*request.param)
    if isinstance(edit, ExciseError):
        pytest.skip(f"not applicable: {edit}")
    return model, edit


@pytest.mark.parametrize("editor", EDITORS)
def test_where_an_editor_does_not_apply_it_says_why(editor):
    refused = {f: e for f in FAMILIES if isinstance(e := built(editor, f)[1], ExciseError)}
    assert not {"llama", "qwen3-moe"} <= set(refused)
    for family, error in refused.items():
        assert family in NOT_APPLICABLE and re.search(NOT_APPLICABLE[family], str(error)), (family, error)
        assert "\n" not in str(error)


def logits(model):
    return model.logits(model.encode(FACTS.prompts()))


@functools.cache
def untouched(model):
    """The logits before any edit was made."""
    return logits(model)


def test_recipe_says_how_it_was_made(made):
    model, edit = made
    assert edit.recipe["method"] in EDITORS and edit.recipe["model"] == model.name
    assert edit.fingerprints["tokenizer"] == model.tokenizer_fingerprint
    assert all(str(c.site) in edit.fingerprints for c in edit.changes if c.site.is_weight)


def test_bits_come_back_after_leaving(made):
    model, edit = made
    plain = untouched(model)
    with applied(model, edit):
        assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


def test_bits_come_back_after_an_exception(made):
    model, edit = made
    plain = untouched(model)
    with pytest.raises(ZeroDivisionError), applied(model, edit):
        logits(model)
        raise ZeroDivisionError
    assert torch.equal(logits(model), plain)


def test_a_hundred_cycles_leave_every_bit(made):
    model, edit = made
    plain = untouched(model)
    kept = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    for _ in range(100):
        if edit.bakeable:
            bake(model, edit).revert()
        else:
            with applied(model, edit):
                pass
    assert all(torch.equal(p, kept[name]) for name, p in model.hf.named_parameters())
    assert torch.equal(logits(model), plain)


def test_generation_with_and_without_cache_agrees(made):
    model, edit = made
    prompts = FACTS.prompts()[::3]
    with applied(model, edit):
        cached = model.generate_all(prompts, max_new_tokens=6)
        assert model.generate_all(prompts, max_new_tokens=6, use_cache=False) == cached


def test_hooked_equals_baked_and_revert_is_exact(made):
    model, edit = made
    if not edit.bakeable:
        with pytest.raises(ExciseError):
            bake(model, edit)
        return
    plain = untouched(model)
    with applied(model, edit):
        hooked = logits(model)
    baked = bake(model, edit)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-5, atol=2e-5)
    baked.revert()
    assert torch.equal(logits(model), plain)


def test_zero_strength_and_sums(made):
    model, edit = made
    plain = untouched(model)
    with applied(model, edit.scaled(0.0)):
        torch.testing.assert_close(logits(model), plain)
    with applied(model, edit + edit):
        both = logits(model)
    with applied(model, edit), applied(model, edit):
        torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=2e-5)


def test_a_sum_of_two_edits_is_one_inside_the_other(made):
    model, edit = made
    declines = any(isinstance(c.action, Abstain) for c in edit.changes)  # wholly or not at all, and once is enough
    other = control(edit, seed=5).scaled(1.0 if declines else 0.5)
    with applied(model, edit + other):
        both = logits(model)
    with applied(model, edit), applied(model, other):
        torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=5e-5)
    with applied(model, edit):
        assert declines or not torch.allclose(logits(model), both, rtol=1e-5, atol=1e-4)


def test_file_keeps_every_bit(made, tmp_path):
    model, edit = made
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with applied(model, edit):
        first = logits(model)
    with applied(model, again):
        assert torch.equal(logits(model), first)


def test_export_reloads_in_plain_transformers(made, tmp_path):
    model, edit = made
    if not edit.bakeable:
        with pytest.raises(ExciseError):
            export(model, edit, tmp_path / "out")
        return
    with applied(model, edit):
        hooked = logits(model)
    again = AutoModelForCausalLM.from_pretrained(export(model, edit, tmp_path / "out")).eval()
    batch = model.encode(FACTS.prompts())
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=batch.ids, attention_mask=batch.mask).logits.float(), hooked, rtol=1e-4, atol=1e-4
        )


def test_another_model_is_refused(made):
    model, edit = made
    other = Model(
        *tiny_model(model.hf.config.model_type.replace("_", "-").replace("gpt-neox", "neox"), layers=3, seed=1),
        "the other",
    )
    with pytest.raises(FingerprintMismatch, match="the other"), applied(other, edit):
        pass


def test_verification_sees_an_effect_and_its_absence(made):
    model, edit = made
    prompts = FACTS.group("forget").prompts()
    assert verify(model, edit, prompts, FACTS.group("retain").prompts()).ok
    assert not verify(model, edit.scaled(0.0), prompts).ok
    assert "no change" in str(verify(model, Edit(()), prompts))


def test_control_is_its_random_twin(made):
    model, edit = made
    twin = control(edit, seed=3)
    assert [c.site for c in twin.changes] == [c.site for c in edit.changes]
    for a, b in zip(twin.changes, edit.changes, strict=True):
        assert type(a.action) is type(b.action) and a.action.rank == b.action.rank
        assert a.norm == (None if b.norm is None else pytest.approx(b.norm, rel=1e-3))
    assert control(edit, seed=3).changes[0].norm == twin.changes[0].norm
    if edit.bakeable:
        first, second = (c.action.delta(model.weight(str(c.site))) for c in (twin.changes[0], edit.changes[0]))
        assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).abs() < 0.3


def test_same_request_gives_the_same_edit(made):
    model, edit = made
    again = make(model, edit.recipe["method"])
    with applied(model, edit):
        first = logits(model)
    with applied(model, again):
        torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
