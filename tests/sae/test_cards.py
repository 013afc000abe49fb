"""Feature cards: they show what was planted, in a terminal, a notebook, a page, a file and the report."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from dictionaries import TEXTS, axes, of_tokens, random_sae, tiny

from edit.sae_clamp import sae_clamp
from excise.chain import Inputs, _features
from excise.errors import DamagedFile, ExciseError, FingerprintMismatch
from excise.facts import Fact, Facts, Prompt
from excise.feature_cards import FeatureCard, FeatureCards
from excise.report import write_report
from sae.cards import cards, of_edit
from sae.load import load, of_sae
from sae.statistics import activations, statistics

# Every letter is a token. Q and Z stand in forget texts only, K in retain texts only, V in both; nothing has J.
GROUPS = {"forget": ["QVVZV", "VQVVVV", "VVZQ"], "retain": ["VKVV", "KVVVK", "VVVVVV"]}
PLANTED = {3: "Q", 7: "Z", 11: "K", 20: "V", 30: "J"}


@functools.cache
def book():
    return of_tokens(PLANTED)


@functools.cache
def made():
    return cards(tiny(), book(), [3, 20, 30], GROUPS, contexts=2)


def test_planted_firings_contexts_and_rates():
    q, v, dead = made()
    n = {name: statistics(tiny(), book(), group).tokens for name, group in GROUPS.items()}
    assert q.rates == {"forget": 3 / n["forget"], "retain": 0}
    assert v.rates == {"forget": 10 / n["forget"], "retain": 12 / n["retain"]}
    assert len(q.contexts) == 2 and all(c.tokens[c.at] == "Q" and c.group == "forget" for c in q.contexts)
    assert sum(q.counts) == 3 and len(q.edges) == len(q.counts) + 1
    assert sum(dead.counts) == 0 and dead.contexts == () and set(dead.rates.values()) == {0} and dead.strength == 0


def test_numbers_equal_brute_force_in_any_batch(monkeypatch):
    dictionary = of_sae(random_sae("topk"))
    groups, chosen = {"a": TEXTS[:2], "b": TEXTS[2:]}, [1, 8, 33]
    found = cards(tiny(), dictionary, chosen, groups)
    monkeypatch.setattr(tiny(), "batch_tokens", 8)
    for card, again in zip(found, cards(tiny(), dictionary, chosen, groups), strict=True):
        assert card.counts == again.counts and card.rates == again.rates
        assert [str(c) for c in card.contexts] == [str(c) for c in again.contexts]
    for i, card in enumerate(found):
        by_group = {
            name: [a[:, i] for a in activations(tiny(), dictionary, texts, chosen)] for name, texts in groups.items()
        }
        a = torch.cat([x for texts in by_group.values() for x in texts])
        assert card.strength == pytest.approx(float(a[a > 0].mean()), rel=1e-5)
        assert sum(card.counts) == int((a > 0).sum()) and card.edges[-1] == pytest.approx(float(a.max()))
        for name, texts in by_group.items():
            assert card.rates[name] == float((torch.cat(texts) > 0).double().mean())
        peaks = sorted((float(x.max()) for texts in by_group.values() for x in texts if x.max() > 0), reverse=True)
        assert [c.values[c.at] for c in card.contexts] == pytest.approx(peaks[:4], rel=1e-5)


def test_logit_effects_are_those_of_the_direction():
    """A decoder row that the final norm turns into the row of one token promotes that token, its opposite suppresses it."""
    model = tiny()
    gain, unembed = model.hf.model.norm.weight.detach(), model.hf.lm_head.weight.detach()
    token = int(unembed.norm(dim=1).argmax())
    decoder = torch.zeros_like(book().decoder)
    decoder[3], decoder[7] = 100 * unembed[token] / gain, -100 * unembed[token] / gain
    towards, away = cards(model, replace(book(), decoder=decoder), [3, 7], GROUPS)
    name = model.tokenizer.decode([token])
    assert (
        towards.promoted[0][0] == away.suppressed[0][0] == name and towards.promoted[0][1] > 0 > away.suppressed[0][1]
    )
    for card in (towards, away):
        assert [v for _, v in card.promoted] == sorted((v for _, v in card.promoted), reverse=True)
        assert [v for _, v in card.suppressed] == sorted(v for _, v in card.suppressed)
    inside = cards(model, axes(hook="blocks.1.mlp.hook_in"), [0], GROUPS)[0]
    assert inside.promoted == () and "promotes" not in str(inside)


def test_shown_in_terminal_notebook_and_page():
    shown = made()
    assert shown[0].site in str(shown) and "forget: " in str(shown) and "[Q]" in str(shown)
    notebook = shown._repr_html_()
    assert notebook.count("<article") == 3 and notebook.count("<svg") == 2 and "fires on none" in notebook
    assert "<script" not in notebook and shown.page("T").count("<article") == 3
    hostile = "<script>alert(1)</script>"
    bad = replace(shown[0], site=hostile, rates={hostile: 0.5}, promoted=((hostile, 1.0),), suppressed=((hostile, -1.0),),
                  contexts=(replace(shown[0].contexts[0], tokens=(hostile, "\x1b[2J"), values=(1.0, 0.0), at=0, group=hostile),))  # fmt: skip
    assert hostile not in bad._repr_html_() and "\x1b" not in bad._repr_html_()


def test_file_and_report(tmp_path):
    page = made().save(tmp_path)
    assert FeatureCards.load(tmp_path) == made() and FeatureCards.load(tmp_path / "nowhere") == []
    assert all(isinstance(c, FeatureCard) for c in FeatureCards.load(tmp_path)) and made()[0].site in page.read_text()
    report = write_report(tmp_path / "r.html", features=FeatureCards.load(tmp_path)).read_text()
    assert 'id="features"' in report and 'href="#features"' in report and report.count("<article") == 3
    assert 'id="features"' not in write_report(tmp_path / "n.html").read_text()


def test_damaged_files_say_so(tmp_path):
    made().save(tmp_path)
    file = tmp_path / "features.json"
    rows = json.loads(file.read_text())
    broken = [rows[0] | change for change in ({"site": 3}, {"rates": []}, {"counts": [1]}, {"strength": "x"}, {"edges": None},
              {"contexts": [{"tokens": ["a"], "values": [1.0], "at": 4, "group": ""}]}, {"promoted": [["a"]]})]  # fmt: skip
    for text in ("{", "7", "[1]", '{"a": 1}', *(json.dumps([b]) for b in broken)):
        file.write_text(text)
        with pytest.raises(DamagedFile, match=r"features\.json"):
            FeatureCards.load(tmp_path)


def test_of_another_model_or_no_feature():
    with pytest.raises(FingerprintMismatch, match="reads a width of 16"):
        cards(tiny(), axes(16), [0], GROUPS)
    with pytest.raises(ExciseError, match="features 0 to 39, not 40"):
        cards(tiny(), book(), [40], GROUPS)


def test_of_an_edit_while_its_dictionary_is_there(tmp_path):
    """The whole chain shows the features that its edit clamps."""
    sae = random_sae("jumprelu")
    sae.save_model(tmp_path / "book")
    names = {"forget": ("Q", "Z"), "retain": ("K", "V")}
    facts = Facts(Fact(n, n, "w", (Prompt(f"V{n}V", "w", n),), group=g) for g, ns in names.items() for n in ns)
    edit = sae_clamp(tiny(), facts.group("forget"), facts.group("retain"), None, dictionary=str(tmp_path / "book"),
                     explained=-1e9, most=1.0, gate="none", features=3)  # fmt: skip
    shown = of_edit(tiny(), edit, facts)
    sites = [str(load(tmp_path / "book").site(i)) for i in edit.recipe["chosen"]]
    assert [c.site for c in shown] == sites and set(shown[0].rates) == {"forget", "retain"}
    inputs = Inputs(tiny(), facts, tmp_path / "run")
    inputs.out.mkdir()
    assert _features(inputs, edit) == shown and (inputs.out / "features.html").is_file()
    assert of_edit(tiny(), replace(edit, recipe={}), facts) == []
    random_sae("jumprelu", seed=1).save_model(tmp_path / "book")
    assert of_edit(tiny(), edit, facts) == []
