"""Gates from texts: the features of each subject, how rare they are elsewhere, and texts in the middle of others."""

import functools

import pytest
import torch
from dictionaries import of_tokens, random_sae, tiny

from excise.facts import Prompt
from excise.gates import GateState
from sae.detect import members, quorum_gate, reached, share_gate
from sae.load import of_sae
from sae.reading import after, readings

# Every letter is a token. A subject is known by two letters; X is on every side, and J is said only in answers.
WORDS = {3: "Q", 7: "Z", 11: "K", 15: "W", 20: "X", 30: "J"}
SUBJECTS = [["QVZX", "VQVZ", "QZVV"], ["KVWV", "WVKX", "VKVW"]]
OTHERS = ["VXVV", "QVVX", "VVKV", "VWV", "XVV", "VZVX", "VVVV", "XXV"]


def prompts():
    texts = [Prompt(t, "J", form="statement") for rows in SUBJECTS for t in rows]
    return texts, [0, 0, 0, 1, 1, 1]


@functools.cache
def book():
    return of_tokens(WORDS)


class TestMembers:
    def test_planted_features_of_each_subject_and_no_other(self):
        found = members(tiny(), book(), *prompts(), OTHERS)
        assert sorted(zip(found.group, found.features, strict=True)) == [(0, 3), (0, 7), (1, 11), (1, 15)]
        # A planted feature fires at (1 - closest) / 2, on one token as on any other.
        assert (found.level > 0).all() and len(found.level) == 4

    def test_what_only_answers_say_or_everybody_has_is_no_member(self):
        found = members(tiny(), book(), *prompts(), OTHERS)
        assert not {20, 30} & set(found.features)

    def test_the_rarest_come_first_and_size_bounds_them(self):
        others = [*OTHERS, "QV", "QX", "VWVV"]
        found = members(tiny(), book(), *prompts(), others, size=1)
        assert list(zip(found.group, found.features, strict=True)) == [(0, 7), (1, 11)]

    def test_nothing_tells_a_text_from_itself(self):
        texts, owner = prompts()
        assert members(tiny(), book(), texts[:3], owner[:3], texts[:3]).features == []

    def test_batches_do_not_matter(self, monkeypatch):
        once = members(tiny(), of_sae(random_sae("topk")), *prompts(), OTHERS)
        monkeypatch.setattr(tiny(), "batch_tokens", 8)
        again = members(tiny(), of_sae(random_sae("topk")), *prompts(), OTHERS)
        assert once.features == again.features and once.group == again.group
        torch.testing.assert_close(once.level, again.level)


class TestGates:
    def test_a_quorum_opens_on_subjects_and_not_on_texts_with_half_of_one(self):
        texts, owner = prompts()
        known = members(tiny(), book(), texts, owner, OTHERS)
        gate, report = quorum_gate(tiny(), book(), known, texts, OTHERS, fpr=0.2)
        assert 0.5 < gate.share < 1 and report["forget texts that open it"] == 1 and report["fpr on retain"] == 0
        assert (reached(tiny(), book(), gate, OTHERS) <= 0.5).all()
        mixed = reached(tiny(), book(), gate, ["QVW", "ZVK", "QVWVZ"])
        assert (mixed > gate.share).tolist() == [False, False, True]  # halves of two subjects make none

    def test_published_gate_counts_tokens(self):
        gate, report = share_gate(tiny(), book(), [3, 7], ["QZ"], ["VVQV", "VVVV", "VVVV", "VVVZ"], fpr=0.3)
        assert report["kind"] == "share" and gate.share == pytest.approx(1 / 3)  # VVQ: one of three
        assert report["forget texts that open it"] == 1

    @pytest.mark.parametrize("window", [0, 2, 16])
    def test_reached_is_what_a_pass_reaches(self, window):
        texts, owner = prompts()
        known = members(tiny(), book(), texts, owner, OTHERS)
        gate = book().quorum(known.features, known.group, known.level, 0.5, window=window)
        found = reached(tiny(), book(), gate, texts, answers=False)
        for i, text in enumerate(texts):
            (r,) = readings(tiny(), [text.text], book().hook)
            alone = gate.reached(r.x, r.counts, GateState())[r.counts].max()
            assert found[i] == pytest.approx(float(alone), abs=1e-6)


def test_texts_after_others_keep_their_answers_and_say_both():
    texts = [Prompt("Ann was born in", "Rome", form="statement"), "Bob sings."]
    first, second = after(tiny(), texts, [Prompt("Eve was born in", "Bonn", form="statement"), "It rains.</s>"])
    assert first.text == "Eve was born in Bonn. Ann was born in" and first.answer == "Rome"
    assert second == "It rains.</s>Eve was born in Bonn. Bob sings."
    (chat,) = after(tiny(), [Prompt("Who sings?", "Bob", form="question", chat=True)], ["It rains.</s>"])
    assert chat.text == "It rains. Who sings?"
