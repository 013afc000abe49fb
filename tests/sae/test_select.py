"""Every selection rule finds planted features; sums equal brute force."""

import functools
from dataclasses import replace

import pytest
import torch
from dictionaries import TEXTS, of_tokens, random_sae, tiny

from excise.apply import applied
from excise.edits import Change, Edit
from excise.facts import Prompt
from excise.model import Model
from excise.sites import Site
from sae.load import of_sae
from sae.match import resolve
from sae.reading import readings
from sae.select import (
    RULES,
    attribution,
    difference,
    importance,
    matched,
    ranked,
    shared_out,
    sparsity,
    top,
)
from sae.statistics import FeatureStats, activations, grouped, statistics
from tiny import tiny_model

# Every letter is a token. Q and Z stand in forget texts only, K in retain texts only, V in both; nothing has J.
FORGET = ["QVVZV", "VQVVVV", "VVZQ"]
RETAIN = ["VKVV", "KVVVK", "VVVVVV"]
PLANTED = {"Q": 3, "Z": 7, "K": 11, "V": 20, "J": 30}


def prompts(texts):
    return [Prompt(t, "w", form="statement") for t in texts]


@functools.cache
def book():
    return of_tokens({feature: word for word, feature in PLANTED.items()})


def sums(texts):
    return statistics(tiny(), book(), texts)


class TestStatistics:
    def test_equal_brute_force_in_any_batch(self):
        texts = [*TEXTS, *FORGET, *RETAIN]
        rows = torch.cat([r.x[r.counts] for r in readings(tiny(), texts, of_sae(random_sae("topk")).hook)])
        dictionary = of_sae(random_sae("topk"))
        a = dictionary.encode(rows).double()
        found = statistics(tiny(), dictionary, texts)
        assert found.tokens == len(rows) and found.texts == len(texts)
        torch.testing.assert_close(found.count, (a > 0).double().sum(0))
        torch.testing.assert_close(found.total, a.sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.square, a.square().sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.largest, a.max(0).values, rtol=1e-5, atol=1e-5)

    def test_groups_add_up_whatever_the_order(self):
        texts = [*FORGET, *RETAIN]
        a, b = grouped(tiny(), book(), texts, [0, 1, 0, 1, 1, 0], 2)
        whole, other_way = sums(texts), sums(texts[::-1])
        for name in ("count", "total", "square", "largest"):
            torch.testing.assert_close(getattr(a + b, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(getattr(other_way, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
        assert (a + b).tokens == whole.tokens

    def test_special_tokens_and_padding_do_not_count(self):
        alone = [sums([t]).count for t in FORGET]
        torch.testing.assert_close(sums(FORGET).count, sum(alone))
        assert sums(["<s>QV</s>"]).tokens == sums(["QV"]).tokens == 2
        lengths = [len(a) for a in activations(tiny(), book(), [*FORGET, "Q"], [3])]
        assert lengths == [sums([t]).tokens for t in [*FORGET, "Q"]]


class TestRules:
    @pytest.mark.parametrize("rule", ["sparsity", "importance", "difference"])
    def test_planted_features_are_found_and_no_other(self, rule):
        forget, retain = prompts(FORGET), prompts(RETAIN)
        scores = ranked(rule, tiny(), book(), forget, [0] * 3, [sums(forget)], sums(retain), most=0.01)
        assert set(top(scores[0], 10)) == {PLANTED["Q"], PLANTED["Z"]}

    @pytest.mark.parametrize("rule", ["sparsity", "importance", "difference"])
    def test_nothing_tells_a_text_from_itself(self, rule):
        same = sums(prompts(FORGET))
        assert top(ranked(rule, tiny(), book(), [], [], [same], same, most=0.0)[0], 10) == []
        if rule != "sparsity":
            assert top({"importance": importance, "difference": difference}[rule](same, same), 10) == []

    def test_scores_do_not_depend_on_the_numbering(self):
        order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
        forget, retain = stats(seed=1), stats(seed=2)
        for rule in (sparsity, importance, difference):
            moved = rule(permuted(forget, order), permuted(retain, order))
            torch.testing.assert_close(moved, rule(forget, retain)[order])

    def test_formulas_by_hand(self):
        forget, retain = stats(seed=1), stats(seed=2)
        rates, others = forget.count / 100, retain.count / 100
        expected = torch.where(others < 0.3, rates, -torch.inf)
        torch.testing.assert_close(sparsity(forget, retain, most=0.3), expected)
        gap = forget.total / 100 - retain.total / 100
        torch.testing.assert_close(difference(forget, retain), torch.where(gap > 0, gap, -torch.inf))
        kept = importance(forget, retain, percentile=90) > -torch.inf
        ratio = forget.square / retain.square
        assert set(kept.nonzero()[:, 0].tolist()) <= set(ratio.argsort(descending=True)[:4].tolist()) and kept.any()

    def test_every_group_gets_its_turn(self):
        scores = torch.tensor([[9.0, 8.0, 7.0, -torch.inf], [8.5, 1.0, -torch.inf, -torch.inf]])
        assert shared_out(scores, 4) == [0, 1, 2] and shared_out(scores, 2) == [0, 1]
        assert shared_out(torch.full((2, 4), -torch.inf), 3) == []

    def test_matched_features_fire_as_often_and_are_others(self):
        found = stats(seed=4)
        chosen = [3, 17, 25]
        twins = matched(found, chosen, seed=1)
        assert not set(twins) & set(chosen) and len(set(twins)) == 3 and twins == matched(found, chosen, seed=1)


class TestAttribution:
    """Its planted features are those that the answer hangs on; others fire as exclusively and change nothing."""

    HELPS, HINDERS, EARLY, COMMON = 3, 7, 11, 20

    @functools.cached_property
    def planted(self):
        """A model whose blocks add nothing, so that an answer hangs on the last token alone, and five features of it.

        On the last token of the forget text fire one whose direction raises the answer and one whose direction lowers it;
        on its first token one that raises it but that no later token reads; one that raises it fires on kept text, too.
        """
        hf, tokenizer = tiny_model("llama", layers=3)
        with torch.no_grad():
            for block in hf.model.layers:
                block.self_attn.o_proj.weight.zero_(), block.mlp.down_proj.weight.zero_()
        model = Model(hf, tokenizer, "reader")
        asked = [Prompt("ZVQ", "w", form="statement"), Prompt("ZVK", "w", form="statement")]
        (answer,) = {int(model.encode([p], answers=True).answer(0)[0]) for p in asked}
        towards = 0.1 * hf.lm_head.weight[answer].detach() / hf.model.norm.weight.detach()
        book = of_tokens({self.HELPS: "Q", self.HINDERS: "Q", self.EARLY: "Z", self.COMMON: "K"})
        decoder = torch.zeros_like(book.decoder)
        for feature, sign in ((self.HELPS, 1), (self.HINDERS, -1), (self.EARLY, 1), (self.COMMON, 1)):
            decoder[feature] = sign * towards
        return model, replace(book, decoder=decoder), asked

    def test_the_feature_that_the_answer_hangs_on_is_found_and_no_other(self):
        model, book, asked = self.planted
        forget, retain = statistics(model, book, asked), statistics(model, book, ["VKVV", "VVV"])
        effect = attribution(model, book, asked, [0, 0])[0]
        assert effect[self.HELPS] > 0.01 and effect[self.COMMON] > 0.01
        assert effect[self.HINDERS] == pytest.approx(-effect[self.HELPS]) and effect[self.EARLY] == 0
        found = {rule: top(ranked(rule, model, book, asked, [0, 0], [forget], retain)[0], 10) for rule in RULES}
        assert found["attribution"] == [self.HELPS]
        assert set(found["sparsity"]) == {self.HELPS, self.HINDERS, self.EARLY}  # what fires is more than what is read


@pytest.mark.slow
def test_attributed_features_of_an_embedded_model_carry_the_answers():
    """Ablating them costs the answers; as many others of equal firing rate do not. People nothing was chosen on."""
    from excise.arms import Arm
    from excise.model import load as load_model
    from excise.testbed import facts
    from sae.load import load

    model, dictionary = load_model("testbed:dense"), load("testbed:dense")
    known = facts("dense", people=2, seed=8123, retain=6, neighbours=3, unknown=0, general=0)
    asked = [p for f in known.group("forget") for p in f.ask("statement", held_out=False)[:2]]
    retain = statistics(model, dictionary, known.group("retain", "neighbour").prompts("statement"))
    forget = statistics(model, dictionary, asked)
    chosen = top(ranked("attribution", model, dictionary, asked, [0] * len(asked), [forget], retain)[0], 8)
    lost = {}
    for name, features in (("chosen", chosen), ("others", matched(forget + retain, chosen, seed=0))):
        edit = Edit((Change(Site(dictionary.hook, "after_bos"), dictionary.clamp(features, 0.0, mode="scale")),))
        arms = Arm("plain", model), Arm(name, model, edit)
        before, after = ([sum(a.logprobs) for a in arm.answers(asked)] for arm in arms)
        lost[name] = sum(before) / len(asked) - sum(after) / len(asked)
    assert len(chosen) == 8 and lost["chosen"] > 0.4 > 20 * abs(lost["others"]), lost


def ablated(model, dictionary, asked, features):
    """What the answers of a batch lose in log-probability when features go out, [rows]."""
    from excise.gradients import answer_losses

    batch = model.encode(asked, answers=True)
    special = torch.isin(batch.ids, torch.tensor(model.tokenizer.all_special_ids)) & batch.mask.bool()
    assert special[:, 0].all() and not special[:, 1:].any()  # so that "after BOS" is what attribution counts
    act = dictionary.clamp(features, 0.0, mode="scale")
    edit = Edit((Change(Site(resolve(dictionary, model), "after_bos"), act),))
    with torch.no_grad():
        plain = answer_losses(model, batch).double()
        with applied(model, edit):
            return answer_losses(model, batch).double() - plain


@pytest.mark.parametrize("kind", ["jumprelu", "layer_norm"])
def test_attribution_of_one_candidate_is_what_ablating_it_takes_away(kind):
    model, dictionary = tiny(), of_sae(random_sae(kind))
    asked = prompts(["Rome is old", "Marie Curie was"])
    first = attribution(model, dictionary, asked, [0, 1])
    for feature in first.abs().sum(0).argsort(descending=True)[:2].tolist():
        alone = torch.arange(dictionary.n) == feature
        found = attribution(model, dictionary, asked, [0, 1], alone, steps=12)[:, feature]
        expected = ablated(model, dictionary, asked, [feature])
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-4)


def test_attributions_sum_to_what_ablating_all_candidates_takes_away():
    """Each group has candidates of its own."""
    model, dictionary = tiny(), of_sae(random_sae("jumprelu"))
    asked = prompts(["Rome is old", "Marie Curie was"])
    allowed = torch.rand(2, dictionary.n, generator=torch.Generator().manual_seed(0)) < 0.3
    found = attribution(model, dictionary, asked, [0, 1], allowed, steps=12)
    for row in (0, 1):
        expected = ablated(model, dictionary, asked[row : row + 1], allowed[row].nonzero()[:, 0].tolist())
        assert abs(expected) > 0.05
        torch.testing.assert_close(found[row, allowed[row]].sum()[None], expected, rtol=0.02, atol=1e-3)


def stats(*, seed, n=40, tokens=100):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 60, (n,), generator=generator).double()
    total = count * torch.rand(n, generator=generator).double()
    return FeatureStats(tokens, 5, count, total, total * 1.5, total)


def permuted(found, order):
    parts = (getattr(found, name)[order] for name in ("count", "total", "square", "largest"))
    return FeatureStats(found.tokens, found.texts, *parts)
