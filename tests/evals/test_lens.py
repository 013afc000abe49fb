"""The lens at the last block is the model itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evals import lens
from evals.lens import answer_rank, by_chance, decode, kin, layer_states
from evals.sampling import sample
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.model import Model
from tiny import tiny_model

FACTS = [
    Fact(f"f{i}", s, a, (Prompt(f"{s} {verb}", a, s), Prompt(f"Where is {s}?", a, s, form="question")))
    for i, (s, verb, a) in enumerate(
        [("Marie Curie", "was born in", "Warsaw"), ("The Eiffel Tower", "stands in", "Paris")]
    )
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "qwen3-moe", "gemma2", "opt"])
def test_last_block_equals_the_logits(family: str) -> None:
    arm = Arm("before", Model(*tiny_model(family, layers=3)))
    items = sample(FACTS)
    states = layer_states(arm, items)
    assert len(states) == 3
    for i, item in enumerate(items):
        batch = arm.model.encode([item.prompt], answers=True)
        logits = arm.model.logits(batch)[0, batch.starts[0] - 1]
        torch.testing.assert_close(decode(arm.model, states[-1])[i], logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(decode(arm.model, states[0])[i], logits, atol=1e-2)


def test_rank_of_a_toy_vocabulary() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]] * 2)
    logp, rank = answer_rank(logits, torch.tensor([2, 0]))
    assert rank.tolist() == [3, 1]
    assert logp[0].item() == pytest.approx(logits[0].log_softmax(-1)[2].item())


def test_scores_agree_with_the_answer() -> None:
    arm = Arm("before", Model(*tiny_model("llama", layers=3)))
    scores = lens(arm, FACTS, before=arm)
    for item, answer in zip(sample(FACTS), arm.answers([i.prompt for i in sample(FACTS)]), strict=True):
        found = {s.variant: s for s in scores if s.fact == item.fact.id and s.form == item.prompt.form}
        assert found["log-probability, layer 2"].value == pytest.approx(answer.logprobs[0], abs=1e-4)
        ranks = [found[f"rank, layer {i}"].value for i in range(3)]
        assert found["hit@1, any layer"].value == float(min(ranks) == 1)
        assert found["hit@5, any layer"].value == float(min(ranks) <= 5)
        assert [found[f"top-1, layer {i}"].value for i in range(3)] == [float(r == 1) for r in ranks]


def test_what_is_found_by_chance_is_of_others_answers() -> None:
    about = [("city", "a"), ("city", "b"), ("city", "c"), ("city", "d"), ("trade", "a"), ("", "b"), ("", "c")]
    gold = [1, 2, 2, 1, 7, 8, 9]
    found = [[1, 2], [1, 3], [2, 3], [4, 5], [1, 2], [8, 9], [8, 9]]
    # a: of b's and c's 2 both are there; d's 1 is its own. b: a's and d's 1. c: neither 1. d: neither 2. Then nobody else.
    assert by_chance(about, gold, found) == [1.0, 1.0, 0.0, 0.0, None, None, None]
    assert by_chance([("city", s) for s in "abc"], [1, 2, 3], [[2], [1], [9]]) == [0.5, 0.5, 0.0]


def test_to_a_model_that_knows_nothing_the_answer_is_one_of_the_others() -> None:
    """An untrained model finds the answers as often as those of others; one that knows them finds them more often."""
    arm = Arm("before", Model(*tiny_model("llama", layers=3)))
    words = "Rome Paris Warsaw London Berlin Vienna Madrid Oslo Athens Dublin Prague Lisbon".split()
    facts = [
        Fact(f"f{i}", f"Person {i}", w, (Prompt(f"Person {i} lives in", w, f"Person {i}"),), relation="home")
        for i, w in enumerate(words)
    ]
    scores = lens(arm, facts, before=arm, limit=0)
    hits, others = ([s.value for s in scores if s.variant == v] for v in ("hit@5, any layer", "hit@5, others' answers"))
    assert len(hits) == len(others) == len(words)
    assert np.mean(hits) == pytest.approx(np.mean(others), abs=0.15)


def test_an_edited_model_is_read_by_the_decoder_of_before() -> None:
    before, other = Arm("before", Model(*tiny_model("llama"))), Arm("new head", Model(*tiny_model("llama")))
    with torch.no_grad():
        other.model.hf.lm_head.weight.add_(0.05 * torch.randn_like(other.model.hf.lm_head.weight))
    assert lens(other, FACTS, before=before) == lens(before, FACTS, before=before)


def test_a_model_trained_apart_is_read_by_its_own_decoder() -> None:
    before, oracle = Arm("before", Model(*tiny_model("llama"))), Arm("oracle", Model(*tiny_model("llama", seed=1)))
    assert not kin(oracle.model, before.model) and kin(before.model, Model(*tiny_model("llama")))
    assert lens(oracle, FACTS, before=before) == lens(oracle, FACTS, before=oracle)
