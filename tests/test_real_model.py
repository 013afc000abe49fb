"""The audit on a language model that none of us trained: facts taught to it, cut out again, and never taught."""

import pytest
import torch
from toy import stories, taught, toy_facts

from benchmarks.metric_meta import faithfulness, steady, symmetric
from edit import memit
from evals import lens, probability, recall
from excise.arms import compare
from excise.fates import counted, fates


@pytest.fixture(scope="module")
def results():
    full, oracle = taught("forget", "retain"), taught("retain")
    forget, retain = toy_facts().split("forget", "retain")
    edits = {"edited": memit(full, forget, retain)}
    return compare(full, edits, [recall, probability, lens], toy_facts(), oracle=oracle)


def share(results, arm, group, held_out=False):
    scores = results.scores[arm, "recall"]
    values = [s.value for s in scores if s.group == group and s.held_out == held_out]
    return sum(values) / len(values)


def test_robustness_and_faithfulness_of_a_metric_by_hand():
    assert symmetric((0.2, 0.1), (0.6, 0.2)) == pytest.approx(0.4) and symmetric((0.3, 0.2), (0.3, 0.2)) == 1
    assert steady(0.20, 0.25) == pytest.approx(0.888889, abs=1e-6) and steady(0.0, 0.0) == 1
    knows, never = ([{("m", ""): v} for v in values] for values in ((0.9, 0.4), (0.5, 0.1)))
    assert faithfulness(knows, never, ("m", "")) == 0.75


def test_it_learns_what_it_is_taught_and_nothing_else(results):
    assert share(results, "before", "forget") >= 0.95 and share(results, "before", "retain") >= 0.95
    assert share(results, "before", "forget", held_out=True) >= 0.6, "wordings that it was never taught"
    assert share(results, "oracle", "forget") <= 0.4, "five answers a relation: a fifth is a guess"
    assert share(results, "oracle", "retain") >= 0.95


def test_teaching_leaves_the_model_itself_alone(results):
    assert share(compare(stories(), {}, [recall], toy_facts()), "before", "forget") <= 0.2


def test_teaching_follows_from_its_seed():
    from excise.testbed.teach import teach

    prompts = toy_facts().group("forget").prompts(held_out=False)
    a, b, c = (teach(stories(), prompts, steps=3, seed=s).hf.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    teach(teach(stories(), prompts, steps=1), prompts, steps=1)  # what was taught can be taught more


def test_a_cut_is_seen_and_what_it_leaves_is_named(results):
    """MEMIT takes half of the facts from this model: names of one token are read from their embedding as well."""
    assert share(results, "edited", "forget") <= share(results, "before", "forget") - 0.3
    assert share(results, "edited", "retain") >= 0.95
    found = [f for f in fates(results) if f.group == "forget"]
    stated = [f for f in found if f.word == "still stated"]
    assert len(found) == 12 and 0 < len(stated) < 12 and all(f.by for f in stated)
    assert "still stated" in counted(found)


def test_the_oracle_is_told_from_the_model_that_knows(results):
    for evaluation in ("recall", "probability"):
        mean = {
            arm: torch.tensor([s.value for s in results.scores[arm, evaluation] if s.group == "forget"]).mean()
            for arm in ("before", "edited", "oracle")
        }
        assert mean["before"] > mean["edited"] > mean["oracle"]
