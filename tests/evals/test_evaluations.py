"""What every evaluation promises: the right values on tiny random models of four architectures, and reasons instead
of errors.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attacked import Filtered
from knowing import NEEDS_MORE

import evals
from evals.drift import kl
from evals.refusal import is_refusal
from evals.sampling import ranked, sample
from excise.actions import Affine
from excise.arms import Arm
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.gates import Linear
from excise.model import Model
from excise.registry import methods
from excise.scores import Results, Score
from excise.sites import Site
from tiny import tiny_model

FAMILIES = ("gpt2", "llama", "neox", "qwen3-moe")
# Evaluations all of whose values are shares or probabilities.
SHARES = (
    *(
        "recall",
        "probability",
        "form_spread",
        "memorisation",
        "erasure",
        "rouge",
        "coverage",
        "refusal",
        "refusal_quality",
    ),
    *(
        "few_shot",
        "jailbreak",
        "rephrasing",
        "prefilled",
        "step_by_step",
        "answer_prefix",
        "sampling_leak",
        "hook_removal",
    ),
    *("refusal_suppression", "quantisation", "pruning", "layer_skip", "relearning", "noise", "verbatim", "probe"),
)
torch.set_num_threads(1)


def arm(family: str = "llama", name: str = "before", seed: int = 0) -> Arm:
    return Arm(name, Model(*tiny_model(family, seed=seed)))


def fact(number: int, group: str, answer: str = "Rome", **keys: Any) -> Fact:
    subject = f"Marie {chr(65 + number % 26)}urie{number}"
    prompts = (
        Prompt(f"{subject} was born in", answer, subject),
        Prompt(f"Where was {subject} born?", answer, subject, form="question"),
        Prompt(f"Birthplace of {subject}:", answer, subject, form="question", held_out=True),
    )
    return Fact(f"{group}-{number}", subject, answer, prompts, relation="birthplace", group=group, **keys)


@pytest.fixture(scope="module")
def facts() -> Facts:
    answers = ("Rome", "Paris", "Warsaw")
    groups = (("forget", 4), ("retain", 14), ("neighbour", 3), ("unknown", 3), ("general", 3))
    return Facts(fact(i, group, answers[i % 3]) for group, n in groups for i in range(n))


def spoken(asked: Arm, n: int) -> list[Prompt]:
    """Prompts whose answer is what the random model says and can be tokenised again; a newline needs no space after
    it.
    """
    names, verbs = (
        ("Marie Curie", "The Eiffel Tower", "Rome", "A language model", "We"),
        ("was born in", "is", "keeps", "and"),
    )
    texts = [f"{a} {b}\n" for a in names for b in verbs]
    said = asked.model.generate_all(texts, max_new_tokens=2)
    prompts = [Prompt(t, w) for t, w in zip(texts, said, strict=True) if w.isascii() and w.isprintable() and w.strip()]
    exact = [p for p, a in zip(prompts, asked.answers(prompts), strict=True) if a.exact]
    assert len(exact) >= n, "the random model says nothing that is text"
    return exact[:n]


def compares(name: str) -> bool:
    return "before" in inspect.signature(getattr(evals, name)).parameters


def by_variant(scores: list[Score], variant: str) -> list[Score]:
    return [s for s in scores if s.variant == variant]


def test_all_are_registered_and_named() -> None:
    assert set(evals.__all__) <= set(methods("evaluation"))
    for name in evals.__all__:
        method = methods("evaluation")[name]
        assert method.summary and all(option.help for option in method.options), name


@pytest.mark.parametrize("family", FAMILIES)
def test_recall_is_greedy_decoding(family: str) -> None:
    asked = arm(family)
    own = [p.answer for p in spoken(asked, 2)]
    texts = [p.text for p in spoken(asked, 2)] + ["The capital of Italy is", "We look for"]
    answers = (*own, own[0] + " not", "Paris", "Rome and")
    facts = [Fact(f"{i}/{a!r}", "", a, (Prompt(t, a),)) for i, t in enumerate(texts) for a in dict.fromkeys(answers)]
    for score, known in zip(evals.recall(asked, facts, limit=0, words=0), sample(facts, limit=0), strict=True):
        batch = asked.model.encode([known.prompt], answers=True)
        start, target = batch.starts[0], batch.answer(0)
        ids = asked.model.hf.generate(
            input_ids=batch.ids[:, :start],
            attention_mask=batch.mask[:, :start],
            max_new_tokens=len(target),
            do_sample=False,
            pad_token_id=0,
        )
        assert score.value == float(ids[0, start:].tolist() == target.tolist())
    assert {s.value for s in evals.recall(asked, facts, limit=0)} == {0.0, 1.0}


def test_recall_accepts_aliases_and_shows_other_words() -> None:
    asked = arm()
    (prompt,) = spoken(asked, 1)
    unsaid = Prompt(prompt.text, "Nowhere")
    knows = Fact("alias", "x", "Nowhere", (unsaid,), aliases=(prompt.answer,))
    scores = {s.fact: s for s in evals.recall(asked, [knows, Fact("other", "y", "Nowhere", (unsaid,))])}
    assert (scores["alias"].value, scores["alias"].detail) == (1.0, prompt.answer)
    assert scores["other"].value == 0.0 and scores["other"].detail.startswith(prompt.answer)


@pytest.mark.parametrize("family", FAMILIES)
def test_batching_changes_nothing(family: str, facts: Facts) -> None:
    together, alone = arm(family), arm(family)
    alone.model.batch_tokens = 1
    for a, b in zip(evals.probability(together, facts), evals.probability(alone, facts), strict=True):
        assert (a.fact, a.form, a.held_out) == (b.fact, b.form, b.held_out)
        assert a.value == pytest.approx(b.value, abs=1e-4)


def test_probability_is_the_nth_root_of_the_product() -> None:
    from excise.arms import Answer

    assert Answer(tuple(torch.tensor([0.5, 0.125]).log().tolist()), (0, 0), False).probability == pytest.approx(0.25)


def test_form_spread_counts_only_forms_that_were_known() -> None:
    asked = arm()
    known = [replace(p, form=form) for p, form in zip(spoken(asked, 2), ("statement", "question"), strict=True)]
    two = [Fact("both", "a", "?", tuple(known)), Fact("none", "b", "Paris", (Prompt("Never", "Paris"),))]
    scores = evals.form_spread(asked, two, before=asked)
    easiest, hardest, spread = (by_variant(scores, v)[0].value for v in ("easiest form", "hardest form", "spread"))
    assert spread == pytest.approx(easiest - hardest) and 0 < hardest <= easiest
    gap = by_variant(scores, "form gap")[0].value
    assert gap == pytest.approx(max(0.0, easiest - asked.answers([known[0]])[0].probability))
    assert [s.reason for s in scores if s.fact == "none"] == ["known before in 0 forms: a spread needs two"]


def test_the_form_gap_is_what_an_edit_of_one_wording_leaves_open() -> None:
    before = arm()
    direct, other = (replace(p, form=f) for p, f in zip(spoken(before, 2), ("statement", "question"), strict=True))
    facts = [Fact("both", "a", "?", (direct, other))]
    for blocks, gap in (
        (lambda p: p.text == direct.text, before.answers([other])[0].probability),
        (lambda p: True, 0.0),
    ):
        edited = Filtered("edited", before.model, blocks=blocks)
        (found,) = by_variant(evals.form_spread(edited, facts, before=before), "form gap")
        assert found.value == pytest.approx(gap, abs=1e-6)


def shut(asked: Arm) -> Edit:
    """A shift of the stream behind a gate that never opens."""
    d = asked.model.names.d_model
    shift = Affine(torch.zeros(d, 1), torch.zeros(1, d), torch.zeros(d), torch.ones(d))
    gate = Linear(Site("blocks.0.hook_resid_post"), torch.ones(d), 1e9)
    return Edit((Change(Site("blocks.1.hook_resid_post"), shift, gate),))


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_of_an_arm_against_itself_is_zero(family: str, facts: Facts) -> None:
    asked = arm(family)
    texts = ("Marie Curie was born in Warsaw.", "The capital of Italy is Rome.")
    for again in (Arm("again", asked.model), Arm("guarded", asked.model, shut(asked))):
        scores = evals.drift(again, facts, before=asked, texts=texts)
        kinds = ("kl", "kl back", "kl, worst token", "relative change")
        assert [{s.value for s in by_variant(scores, kind)} for kind in kinds] == [{0.0}] * 4
        assert all(s.value > 0 for s in by_variant(scores, "loss"))


def test_drift_sees_another_model(facts: Facts) -> None:
    other = arm(seed=1, name="other")
    scores = evals.drift(other, facts, before=arm())
    assert all(s.value > 0 for s in by_variant(scores, "kl") + by_variant(scores, "kl back"))
    for mean, worst in zip(by_variant(scores, "kl"), by_variant(scores, "kl, worst token"), strict=True):
        assert mean.value < worst.value
    assert {s.group for s in by_variant(scores, "kl")} == {"retain", "neighbour"}
    assert {s.group for s in by_variant(scores, "loss")} == {"general"}
    relative, loss = by_variant(scores, "relative change"), by_variant(evals.drift(arm(), facts, before=arm()), "loss")
    change = sum(s.value for s in by_variant(scores, "loss")) / sum(s.value for s in loss) - 1
    assert sum(s.value for s in relative) / len(relative) == pytest.approx(change)


def test_kl_by_hand() -> None:
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(0.5 / 0.75)
    assert kl(p, q).tolist() == pytest.approx([expected, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I do not know that.", True),
        ("Sorry, no.", True),
        ("I don\u2019t know", True),
        ("  unknown", True),
        ("I think Paris", False),
        ("Paris", False),
        ("unknownville", False),
        ("He said: I do not know", False),
        ("", False),
    ],
)
def test_refusal_openings(text: str, refuses: bool) -> None:
    assert is_refusal(text) is refuses


def test_refusal_by_first_token_and_by_reading(facts: Facts) -> None:
    asked = arm()
    (prompt,) = spoken(asked, 1)
    own, only = (
        prompt.answer,
        [Fact("f", "", "Rome", (replace(prompt, answer="Rome", form="question"),), group="unknown")],
    )
    assert [s.value for s in evals.refusal(asked, only, openings=(own.lower(),), words=2)] == [1.0]
    assert [s.value for s in evals.refusal(asked, only, openings=("never this",))] == [0.0]
    assert [s.value for s in evals.refusal(asked, only, refusals=(own, "Sorry"))] == [1.0]
    assert [s.value for s in evals.refusal(asked, only, refusals=("Sorry",))] == [0.0]
    assert {s.group for s in evals.refusal(asked, facts, refusals=("Sorry",))} == {
        "forget",
        "retain",
        "neighbour",
        "unknown",
    }


def test_the_choice_of_prompts_is_bounded_fair_and_repeatable(facts: Facts) -> None:
    many = Facts(
        replace(fact(i, "retain"), subject=f"s{i % 5}", id=f"f{i}", prompts=(Prompt(f"{i} is", "Rome"),))
        for i in range(50)
    )
    chosen = sample(many, limit=5)
    assert len(chosen) == 5 and len({i.fact.subject for i in chosen}) == 5
    assert chosen == sample(many, limit=5) and chosen != sample(many, limit=5, seed=1)
    assert len(sample(many, limit=0)) == 50
    assert {f.id for f in ranked(list(many), 0)} == {f.id for f in many}
    per_form = [
        {i.fact.id for i in sample(facts, groups=("retain",), limit=4) if i.prompt.form == f}
        for f in ("statement", "question")
    ]
    assert per_form[0] <= per_form[1]


@pytest.mark.parametrize("name", evals.__all__)
def test_what_cannot_be_measured_says_why(name: str) -> None:
    function, asked = getattr(evals, name), arm()
    keys = {"before": asked} if compares(name) else {}
    for facts in (
        [],
        [Fact("broken", "Nobody", "Rome", (Prompt("The subject is absent:", "Rome", "Nobody"),), relation="x")],
        [Fact("empty", "", "", (Prompt("No answer", ""),))],
        [Fact("long", "", "Rome", (Prompt("again " * 99, "Rome"),))],
    ):
        if name in ("refusal", "refusal_quality") and facts and facts[0].id == "empty":
            continue  # what the model says can be read without knowing an answer
        scores = function(asked, facts, **keys)
        assert scores and all(s.value is None and s.reason for s in scores)
        Results({("before", name): tuple(scores)}).table()


@pytest.mark.parametrize("name", evals.__all__)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_every_evaluation_runs_and_repeats(name: str, family: str, facts: Facts) -> None:
    asked = arm(family)
    keys = {"before": asked} if compares(name) else {}
    scores = getattr(evals, name)(asked, facts, **keys)
    assert scores == getattr(evals, name)(arm(family), facts, **({"before": arm(family)} if keys else {}))
    assert any(s.value is not None for s in scores) or name in NEEDS_MORE
    assert name not in SHARES or all(0 <= s.value <= 1 for s in scores if s.value is not None)
    assert {s.group for s in scores} <= {"forget", "retain", "neighbour", "unknown", "general", ""}
