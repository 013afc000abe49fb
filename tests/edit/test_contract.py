"""What every registered editor promises, on dense, MoE, GPT-2 and GPT-NeoX. A new editor is tested by being registered."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from edit import control
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

FAMILIES = ("llama", "qwen3-moe", "gpt2", "neox")
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


@pytest.fixture(scope="module", params=[(e, f) for e in EDITORS for f in FAMILIES], ids=lambda p: f"{p[0]}-{p[1]}")
def made(request):
    editor, family = request.param
    model = Model(*tiny_model(family, layers=3), family)
    edit = methods("editor")[editor].function(model, FACTS.group("forget"), FACTS.group("retain"), WHERE)
    return model, edit


def logits(model):
    return model.logits(model.encode(FACTS.prompts()))


def test_recipe_says_how_it_was_made(made):
    model, edit = made
    assert edit.recipe["method"] in EDITORS and edit.recipe["model"] == model.name
    assert edit.fingerprints["tokenizer"] == model.tokenizer_fingerprint
    assert all(str(c.site) in edit.fingerprints for c in edit.changes if c.site.is_weight)


def test_bits_come_back_after_leaving(made):
    model, edit = made
    plain = logits(model)
    with applied(model, edit):
        assert not torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)


def test_hooked_equals_baked_and_revert_is_exact(made):
    model, edit = made
    if not edit.bakeable:
        with pytest.raises(ExciseError):
            bake(model, edit)
        return
    plain = logits(model)
    with applied(model, edit):
        hooked = logits(model)
    baked = bake(model, edit)
    torch.testing.assert_close(logits(model), hooked, rtol=1e-5, atol=2e-5)
    baked.revert()
    assert torch.equal(logits(model), plain)


def test_zero_strength_and_sums(made):
    model, edit = made
    plain = logits(model)
    with applied(model, edit.scaled(0.0)):
        torch.testing.assert_close(logits(model), plain)
    with applied(model, edit + edit):
        both = logits(model)
    with applied(model, edit), applied(model, edit):
        torch.testing.assert_close(logits(model), both, rtol=1e-5, atol=2e-5)


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
        assert a.norm == pytest.approx(b.norm, rel=1e-3)
    assert control(edit, seed=3).changes[0].norm == twin.changes[0].norm
    if edit.bakeable:
        first, second = (c.action.delta(model.weight(str(c.site))) for c in (twin.changes[0], edit.changes[0]))
        assert torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).abs() < 0.3


def test_same_request_gives_the_same_edit(made):
    model, edit = made
    again = methods("editor")[edit.recipe["method"]].function(
        model, FACTS.group("forget"), FACTS.group("retain"), WHERE
    )
    with applied(model, edit):
        first = logits(model)
    with applied(model, again):
        torch.testing.assert_close(logits(model), first, rtol=1e-5, atol=1e-5)
