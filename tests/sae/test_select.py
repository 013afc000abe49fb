"""Every selection rule finds planted features; sums equal brute force."""

import functools

import pytest
import torch
from dictionaries import TEXTS, of_tokens, random_sae, tiny

from excise.apply import applied
from excise.edits import Change, Edit
from excise.facts import Prompt
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
    @pytest.mark.parametrize("rule", RULES)
    def test_planted_features_are_found_and_no_other(self, rule):
        forget, retain = prompts(FORGET), prompts(RETAIN)
        scores = ranked(rule, tiny(), book(), forget, [0] * 3, [sums(forget)], sums(retain), most=0.01)
        expected = {PLANTED["Q"], PLANTED["Z"]}
        if rule == "attribution":  # only where they help the answer, which for a random model is a matter of luck
            effect = attribution(tiny(), book(), forget, [0] * 3)[0]
            expected = {i for i in expected if effect[i] > 0}
        assert set(top(scores[0], 10)) == expected and expected

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


def test_attribution_is_the_slope_of_scaling_a_feature():
    """First order: scaling a feature by 1 - h changes the answer's log-probability by -h times its attribution."""
    from excise.gradients import answer_losses

    model, dictionary = tiny(), of_sae(random_sae("jumprelu"))
    asked = prompts(["Rome is old", "Marie Curie was"])
    found = attribution(model, dictionary, asked, [0, 1])
    step = 1e-3
    batch = model.encode(asked, answers=True)
    special = torch.isin(batch.ids, torch.tensor(model.tokenizer.all_special_ids)) & batch.mask.bool()
    assert special[:, 0].all() and not special[:, 1:].any()  # so that "after BOS" is what attribution counts
    for feature in found.abs().sum(0).argsort(descending=True)[:4].tolist():
        losses = []
        for factor in (1 - step, 1 + step):
            act = dictionary.clamp([feature], factor, mode="scale")
            edit = Edit((Change(Site(resolve(dictionary, model), "after_bos"), act),))
            with torch.no_grad(), applied(model, edit):
                losses.append(-answer_losses(model, batch).double())
        slope = (losses[1] - losses[0]) / (2 * step)
        torch.testing.assert_close(found[:, feature], slope, rtol=0.02, atol=2e-3)


def stats(*, seed, n=40, tokens=100):
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 60, (n,), generator=generator).double()
    total = count * torch.rand(n, generator=generator).double()
    return FeatureStats(tokens, 5, count, total, total * 1.5, total)


def permuted(found, order):
    parts = (getattr(found, name)[order] for name in ("count", "total", "square", "largest"))
    return FeatureStats(found.tokens, found.texts, *parts)
