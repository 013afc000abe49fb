"""SAE clamping: bits where nothing fires, gates that agree with themselves however a text arrives, planted features."""

import functools

import pytest
import torch
from dictionaries import HOOK, TEXTS, axes, of_tokens, random_sae, tiny

from edit.sae_clamp import sae_clamp
from excise.apply import applied
from excise.edits import Change, Edit
from excise.errors import ExciseError, FingerprintMismatch
from excise.facts import Fact, Prompt
from excise.gates import GateState
from excise.model import Model
from excise.scores import Localization
from excise.sites import Site
from excise.verification import verify
from sae.detect import quantile_above, share_gate
from sae.load import of_sae
from tiny import tiny_model

CHOSEN = [3, 17, 40]


def edit_of(book, features=CHOSEN, value=-4.0, *, share=None, mask="feature", **gate):
    opened = None if share is None else book.share(features, share, **gate)
    return Edit((Change(Site(book.hook, "after_bos"), book.clamp(features, value, mask=mask), opened),))


def gated(book, kind, features=CHOSEN, value=-4.0, *, mask="feature", **options):
    """The clamp behind a share gate or a quorum of one group, each at a share that some texts reach."""
    if kind == "share":
        opened = book.share(features, 0.35, **options)
    else:
        opened = book.quorum(features, [0] * len(features), torch.linspace(0.1, 0.6, len(features)), 0.6, **options)
    return Edit((Change(Site(book.hook, "after_bos"), book.clamp(features, value, mask=mask), opened),))


def silent():
    sae = random_sae("jumprelu")
    with torch.no_grad():
        sae.b_enc[CHOSEN] = -1e3
    return of_sae(sae)


def logits(model, texts=TEXTS):
    return model.logits(model.encode(texts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_keep_their_bits_when_no_chosen_feature_is_active(dtype):
    hf, tokenizer = tiny_model("llama", layers=3)
    model = Model(hf.to(dtype), tokenizer, "tiny")
    plain = logits(model)
    for edit in (edit_of(silent()), edit_of(silent(), share=0.0), edit_of(silent(), mask="token")):
        with applied(model, edit):
            assert torch.equal(logits(model), plain)
    with applied(model, edit_of(of_sae(random_sae("jumprelu")))):
        assert not torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "layer_norm"])
def test_file_needs_no_dictionary(kind, tmp_path):
    edit = edit_of(of_sae(random_sae(kind)), share=0.1, window=4, sticky=True)
    again = Edit.load(edit.save(tmp_path / "edit.safetensors"))
    with applied(tiny(), edit):
        first = logits(tiny())
    with applied(tiny(), again):
        assert torch.equal(logits(tiny()), first)
    assert not torch.equal(logits(tiny()), first)


class TestGate:
    """Share gates against a loop over tokens, and against themselves."""

    @pytest.mark.parametrize("window", [0, 1, 3])
    @pytest.mark.parametrize("sticky", [False, True])
    def test_equals_a_loop_in_whatever_pieces_it_comes(self, window, sticky):
        generator = torch.Generator().manual_seed(7)
        hot, valid = (torch.rand(5, 24, generator=generator) < p for p in (0.35, 0.8))
        x = torch.where(hot, 1.0, -1.0)[..., None]
        gate = axes(1, HOOK).share([0], 0.4, window=window, sticky=sticky)
        expected = torch.zeros(5, 24, dtype=torch.bool)
        for row in range(5):
            counted, ever = [], False
            for t in range(24):
                if valid[row, t]:
                    counted.append(bool(hot[row, t]))
                last = counted[-window:] if window else counted
                passed = sum(last) > 0.4 * (window or max(1, len(counted)))
                ever |= passed
                expected[row, t] = ever if sticky else passed
        for pieces in ([24], [10, 14], [9, *[1] * 15], [1] * 24):
            state, seen = GateState(), []
            for a, v in zip(x.split(pieces, 1), valid.split(pieces, 1), strict=True):
                seen.append(gate.open(a, v, state))
            assert torch.equal(torch.cat(seen, 1), expected), pieces
        assert expected.any() and not expected.all()

    @pytest.mark.parametrize("window", [0, 1, 3])
    @pytest.mark.parametrize("sticky", [False, True])
    def test_quorum_equals_a_loop_in_whatever_pieces_it_comes(self, window, sticky):
        """Three groups of three, one and two features; each counts whether it has fired on one of the last tokens."""
        generator = torch.Generator().manual_seed(5)
        fires, valid = torch.rand(6, 20, 6, generator=generator) < 0.12, torch.rand(6, 20, generator=generator) < 0.8
        group = [0, 0, 0, 1, 2, 2]
        gate = axes(6, HOOK).quorum(range(6), group, torch.full((6,), 0.5), 0.6, window=window, sticky=sticky)
        x, expected = fires.float(), torch.zeros(6, 20, dtype=torch.bool)
        for row in range(6):
            seen, ever = [], False
            for t in range(20):
                if valid[row, t]:
                    seen.append(fires[row, t])
                last = (
                    torch.stack(seen[-window:] if window else seen).any(0) if seen else torch.zeros(6, dtype=torch.bool)
                )
                passed = any(last[[i for i in range(6) if group[i] == g]].float().mean() > 0.6 for g in range(3))
                ever |= passed
                expected[row, t] = ever if sticky else passed
        for pieces in ([20], [7, 13], [5, *[1] * 15], [1] * 20):
            state, opened = GateState(), []
            for a, v in zip(x.split(pieces, 1), valid.split(pieces, 1), strict=True):
                opened.append(gate.open(a, v, state))
            assert torch.equal(torch.cat(opened, 1), expected), pieces
        assert expected.any() and not expected.all()

    def test_a_level_is_more_than_firing_and_groups_do_not_add_up(self):
        x = torch.tensor([[[0.4, 0.0], [0.6, 0.0], [0.0, 0.6]]])
        valid = torch.ones(1, 3, dtype=torch.bool)
        book = axes(2, HOOK)
        for group, expected in (([0, 1], [False, True, True]), ([0, 0], [False, False, True])):
            gate = book.quorum([0, 1], group, torch.tensor([0.5, 0.5]), 0.6)
            assert gate.open(x, valid, GateState()).tolist() == [expected]

    def test_never_always_and_one_feature(self):
        book, plain = of_sae(random_sae("jumprelu")), logits(tiny())
        with applied(tiny(), edit_of(book, share=1.0)):
            assert torch.equal(logits(tiny()), plain)
        with applied(tiny(), edit_of(book)):
            static = logits(tiny())
        with applied(tiny(), edit_of(book, share=-1.0)):
            torch.testing.assert_close(logits(tiny()), static)
        with applied(tiny(), edit_of(book, [17])):
            one = logits(tiny())
        with applied(tiny(), edit_of(book, [17], mask="token")):
            assert torch.equal(logits(tiny()), one)

    @pytest.mark.parametrize("kind", ["jumprelu", "topk"])
    @pytest.mark.parametrize(
        ("gate", "options"),
        [("share", dict()), ("share", dict(window=5)), ("share", dict(sticky=True)), ("quorum", dict(window=2)),
         ("quorum", dict(sticky=True))],
    )  # fmt: skip
    def test_prompt_at_once_equals_token_by_token(self, kind, gate, options):
        """With a cache a hook sees one token at a time; its decisions must be those of the whole text."""
        book, text = of_sae(random_sae(kind)), TEXTS[3]
        edit, ids = gated(book, gate, **options), tiny().encode([text]).ids
        plain = logits(tiny(), [text])
        with applied(tiny(), edit) as running:
            whole, counted = logits(tiny(), [text]), running.fired[0]
        with applied(tiny(), edit) as running, torch.no_grad():
            cache, steps = None, []
            for piece in ids.split([6, *[1] * (ids.shape[1] - 6)], 1):
                out = tiny().hf(input_ids=piece, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                steps.append(out.logits.float())
            assert running.fired[0] == counted
        torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
        assert 0 < counted < ids.shape[1] and not torch.allclose(whole, plain, atol=1e-2)

    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("gate", ["share", "quorum"])
    def test_padded_batch_decides_as_each_text_alone(self, side, gate):
        """Right padding must not dilute the share, left padding not exempt the wrong token."""
        model, edit = tiny(), gated(of_sae(random_sae("jumprelu")), gate, window=2 if gate == "quorum" else 0)
        alone, counts = [], []
        for text in TEXTS:
            with applied(model, edit) as running:
                alone.append(logits(model, [text])[0])
                counts.append(running.fired[0])
        batch = model.encode(TEXTS)
        ids, mask, width = batch.ids.clone(), batch.mask.clone(), batch.ids.shape[1]
        if side == "left":
            for row, n in enumerate(batch.lengths):
                ids[row], mask[row] = ids[row].roll(width - n), mask[row].roll(width - n)
        with applied(model, edit) as running, torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            out = model.hf(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()
            assert running.fired[0] == sum(counts)
        for row, n in enumerate(batch.lengths):
            together = out[row, width - n :] if side == "left" else out[row, :n]
            torch.testing.assert_close(together, alone[row], rtol=1e-4, atol=1e-4)
        assert sum(counts) > 0

    @pytest.mark.parametrize("gate", ["share", "quorum"])
    def test_generation_is_the_same_alone_and_in_a_batch(self, gate):
        with applied(tiny(), gated(of_sae(random_sae("jumprelu")), gate, sticky=True, mask="all")):
            together = tiny().generate_all(TEXTS, max_new_tokens=6)
            assert together == [tiny().generate(t, max_new_tokens=6) for t in TEXTS]
        assert together != tiny().generate_all(TEXTS, max_new_tokens=6)


class TestThreshold:
    def test_a_new_text_passes_no_more_often_than_asked(self):
        """Averaged over draws: the conformal promise, ties included."""
        generator = torch.Generator().manual_seed(0)
        draws = (torch.rand(4000, 60, generator=generator) * 12).floor().double() / 12
        for rate in (0.05, 0.2):
            passed = sum(float(row[-1] > quantile_above(row[:-1], rate)) for row in draws) / len(draws)
            assert passed <= rate + 0.01
            continuous = torch.rand(4000, 60, generator=generator).double()
            found = sum(float(row[-1] > quantile_above(row[:-1], rate)) for row in continuous) / len(draws)
            assert found == pytest.approx(rate, abs=0.02)

    def test_measured_rate_holds_on_the_retain_texts(self):
        book = of_sae(random_sae("jumprelu"))
        texts = [f"{a} {b}" for a in TEXTS for b in ("and so it is", "Rome", "we look for weights", "old")]
        gate, report = share_gate(tiny(), book, CHOSEN, TEXTS, texts, fpr=0.3)
        assert report["fpr on retain"] <= 0.3 and report["retain texts"] == 16 and gate.share > 0
        opened = 0
        for text in texts:
            with applied(tiny(), edit_of(book, share=gate.share, sticky=True)) as running:
                logits(tiny(), [text])
            opened += running.fired[0] > 0
        assert opened / 16 == report["fpr on retain"]


PLANTED = {3: "Q", 7: "Z", 11: "K", 20: "V"}


class TestEditor:
    @functools.cached_property
    def facts(self):
        def fact(name, text, group):
            return Fact(name, name, "w", (Prompt(text, "w", name),), group=group)

        groups = {"forget": (("Q", "VQVV"), ("Z", "VVZ")), "retain": (("K", "VKV"), ("V", "VVV"))}
        return tuple([fact(name, text, group) for name, text in rows] for group, rows in groups.items())

    def made(self, **options):
        forget, retain = self.facts
        defaults = {"dictionary": of_tokens(PLANTED), "explained": -1e9, "fpr": 0.5}
        return sae_clamp(tiny(), forget, retain, None, **(defaults | options))

    @pytest.mark.parametrize("select", ["sparsity", "importance", "difference"])
    def test_it_clamps_the_planted_features_and_leaves_other_text_to_the_bit(self, select):
        edit = self.made(select=select)
        assert set(edit.recipe["chosen"]) == {3, 7} and edit.recipe["method"] == "sae_clamp"
        assert edit.recipe["gate"]["fpr on retain"] == 0 and edit.recipe["gate"]["forget texts that open it"] == 1
        forget, retain = (["VQVV", "VVZ"], ["VKV", "VVVVV", "KVK"])
        before = logits(tiny(), forget), logits(tiny(), retain)
        with applied(tiny(), edit):
            after = logits(tiny(), forget), logits(tiny(), retain)
        assert torch.equal(after[1], before[1])
        assert (after[0] - before[0]).abs().max() > 0.05
        assert verify(tiny(), edit, [p for f in self.facts[0] for p in f.prompts]).ok

    @pytest.mark.parametrize("gate", ["quorum", "share"])
    def test_gates_know_planted_subjects_and_keep_other_text_to_the_bit(self, gate):
        edit = self.made(gate=gate, window=0 if gate == "share" else 16)
        report = edit.recipe["gate"]
        assert report["kind"] == gate and report["fpr on retain"] == 0
        if gate == "quorum":
            assert sorted(zip(report["features"], report["group"], strict=True)) == [(3, 0), (7, 1)]
            assert report["forget texts that open it"] == 1 and report["subjects without features"] == 0
        others = ["VKV", "VVVVV", "KVK"]
        plain = logits(tiny(), others)
        with applied(tiny(), edit):
            assert torch.equal(logits(tiny(), others), plain)

    def test_subjects_without_features_of_their_own_cannot_be_known(self):
        """Forgotten and kept are the same texts: nothing is rare elsewhere."""
        same = self.facts[0]
        with pytest.raises(ExciseError, match=r"rarely elsewhere: take gate=share"):
            where = Localization.of(["blocks.0.hook_resid_pre.hook_sae_acts_post#3"])
            sae_clamp(tiny(), same[:1], same[:1], where, dictionary=of_tokens(PLANTED), explained=-1e9)

    def test_actions(self):
        clamp, ablate, scale = (self.made(action=a, value=v).changes[0].action for a, v in
                                (("clamp", 2.0), ("ablate", 9.0), ("scale", 0.5)))  # fmt: skip
        assert clamp.mode == "clamp" and (clamp.value < 0).all() and not ablate.value.any()
        torch.testing.assert_close(self.made(value=4.0).changes[0].action.value, 2 * clamp.value)
        assert scale.mode == "scale" and (scale.value == 0.5).all()

    def test_what_a_localization_names_is_what_is_clamped(self):
        where = Localization.of(["blocks.0.hook_resid_pre.hook_sae_acts_post#11"])
        forget, retain = self.facts
        options = {"dictionary": of_tokens(PLANTED), "explained": -1e9}
        assert sae_clamp(tiny(), forget, retain, where, **options).recipe["chosen"] == [11]
        with pytest.raises(ExciseError, match="the features to clamp are of"):
            sae_clamp(tiny(), forget, retain, where, dictionary=axes())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"dictionary": ""}, "no dictionary for tiny"),
            ({"explained": 0.5}, "explains"),
            ({"most": 0.0}, "no feature of .* fires on the forget facts"),
        ],
    )
    def test_what_cannot_be_done_says_why(self, options, message):
        with pytest.raises(ExciseError, match=message):
            self.made(**options)

    def test_wrong_words_and_empty_sets(self):
        for wrong in ({"action": "erase"}, {"gate": "door"}, {"mask": "some"}, {"select": "luck"}):
            with pytest.raises(ValueError, match=r"choose|rules are"):
                self.made(**wrong)
        with pytest.raises(ExciseError, match="forget set is empty"):
            sae_clamp(tiny(), [], self.facts[1], None, dictionary=axes())
        with pytest.raises(ExciseError, match="text to keep"):
            sae_clamp(tiny(), self.facts[0], [], None, dictionary=axes())

    def test_a_dictionary_of_another_model_is_refused(self):
        hf, tokenizer = tiny_model("gpt2", layers=3)
        with pytest.raises(FingerprintMismatch, match="it was trained on any"):
            sae_clamp(Model(hf, tokenizer, "other"), *self.facts, None, dictionary=axes(16))
