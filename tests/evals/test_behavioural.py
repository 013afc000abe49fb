"""Behavioural evaluations: the formulas by hand, and on the embedded models the oracle best and before worst."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import sys
import zlib
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import evals
from evals.candidates import Candidates
from evals.coverage import entities, entity_coverage
from evals.erasure import erased, kept
from evals.fluency import brunet, honore, ngram_entropy, repetition
from evals.forced_choice import choice, probability_share
from evals.lm_eval import scores_of
from evals.memorisation import exact_memorisation, extraction_strength, reciprocal_rank
from evals.multiple_choice import Question, entropy, wins
from evals.privacy import Read, membership, min_k, standardised, twins
from evals.privacy import reads as privacy_reads
from evals.refusal_quality import closest, on_topic
from evals.rouge import PRESETS, rouge_of
from evals.sampling import Item
from evals.truth_ratio import closer_to_1, knowledge, log_ratio, true_better
from evals.verbatim import _in_context as in_context
from evals.words import cut, own_words
from excise.arms import Arm
from excise.facts import Fact, Facts, Prompt
from excise.model import Model, load
from excise.scores import Results, Score
from excise.testbed import facts as world_facts
from excise.testbed import refusals as refusals_of
from tiny import tiny_model

# Development seeds are 0 to 9.
SEED = 4004


@functools.cache
def arms(kind: str = "dense") -> tuple[Arm, Arm, Arm]:
    before = load(f"testbed:{kind}")
    return Arm("before", before), Arm("again", before), Arm("oracle", load(f"testbed:{kind}-oracle"))


@functools.cache
def people(kind: str = "dense") -> Facts:
    return world_facts(kind, seed=SEED, people=6, retain=5, neighbours=4, unknown=12, general=1)


@functools.cache
def measured(name: str, kind: str = "dense", **options: object) -> dict[str, list[Score]]:
    """The scores of an evaluation on before, on before once more, and on the oracle."""
    before, again, oracle = arms(kind)
    function = getattr(evals, name)
    keys = dict(options) | (
        {"before": before} if name in ("erasure", "drift", "fluency", "form_spread", "lens") else {}
    )
    return {a.name: function(a, people(kind), **keys) for a in (before, again, oracle)}


def mean(scores: list[Score], variant: str, *groups: str) -> float:
    values = [
        s.value for s in scores if s.variant == variant and s.group in (groups or ("forget",)) and s.value is not None
    ]
    assert len(values) >= 6, f"{variant}: {len(values)} values"
    return float(np.mean(values))


def orders(
    name: str, variant: str, before: tuple[float, float], oracle: tuple[float, float], **options: object
) -> None:
    """On facts to forget the means lie in these ranges; what before says twice is the same."""
    found = measured(name, **options)
    assert found["before"] == found["again"]
    assert before[0] <= mean(found["before"], variant) <= before[1]
    assert oracle[0] <= mean(found["oracle"], variant) <= oracle[1]


def test_truth_ratio_by_hand() -> None:
    right, wrong = math.log(0.5), [math.log(p) for p in (0.25, 0.125, 0.5)]
    r = log_ratio(right, wrong)
    assert math.exp(r) == pytest.approx(0.5)
    assert (closer_to_1(r), true_better(r), knowledge(r)) == pytest.approx((0.5, 0.5, 2 / 3))
    assert math.exp(log_ratio(right, wrong, "arithmetic")) == pytest.approx(0.58333, abs=1e-5)
    assert (closer_to_1(-r), true_better(-r)) == pytest.approx((0.5, 0.0))
    assert knowledge(1000.0) == 0.0 and knowledge(-1000.0) == 1.0 and true_better(-1000.0) == 1.0


def test_memorisation_by_hand() -> None:
    assert exact_memorisation((1, 2, 9, 4), (1, 2, 3, 4)) == 0.75
    assert extraction_strength((1, 2, 9, 4), (1, 2, 3, 4)) == 0.25
    assert extraction_strength((1, 2, 3, 4), (1, 2, 3, 4)) == 1.0
    assert extraction_strength((1, 2, 3, 9), (1, 2, 3, 4)) == 0.0
    assert extraction_strength((1, 2, 3, 9), (1, 2, 3, 4), compat=True) == 0.25
    assert reciprocal_rank((1, 2, 4)) == pytest.approx(0.583333, abs=1e-6)


def test_extraction_strength_is_what_free_generation_gives() -> None:
    """From each beginning of the answer, greedy decoding says the rest exactly from k tokens on."""
    arm = Arm("before", Model(*tiny_model("llama", seed=3)))
    text = "Rome keeps\n"
    (said,) = arm.model.generate_all([text], max_new_tokens=6)
    for wanted in (said, said[: len(said) // 2] + " zq", "qq " + said):
        (answer,) = arm.answers([Prompt(text, wanted)])
        batch = arm.model.encode([Prompt(text, wanted)], answers=True)
        ids, start, n = batch.ids, batch.starts[0], len(answer.targets)
        rest = [
            arm.model.hf.generate(ids[:, : start + k], max_new_tokens=n - k, do_sample=False, pad_token_id=0)
            if k < n
            else ids
            for k in range(n + 1)
        ]
        k = next(k for k, out in enumerate(rest) if out[0].tolist() == ids[0].tolist())
        assert extraction_strength(answer.argmax, answer.targets) == pytest.approx(1 - k / n)


def test_forced_choice_by_hand() -> None:
    assert choice(-1.0, [-2.0, -3.0]) == (1.0, 1.0, 1.0)
    assert choice(-2.0, [-1.0, -3.0]) == (0.0, 0.5, -1.0)
    assert choice(-1.0, [-1.0] * 3) == (0.25, 1 / 2.5, 0.0)
    wrong = [math.log(p) for p in (0.25, 0.125, 0.5)]
    assert probability_share(math.log(0.5), wrong) == pytest.approx(0.363636, abs=1e-6)
    assert probability_share(-2000.0, [0.0]) == 0.0 and probability_share(0.0, [-2000.0]) == 1.0


def test_refusal_quality_by_hand() -> None:
    said = ["I do not know.", "I do not know that", "Paris", ""]
    assert closest(said, ["Never.", "I do not know."]) == pytest.approx([1.0, 4 / 20**0.5, 0.0, 0.0])
    places = {"no": (1.0, 0.0), "hm": (0.6, 0.8), "yes": (-1.0, 0.0)}
    assert closest(["hm", "yes"], ["no"], lambda texts: [places[t] for t in texts]) == pytest.approx([0.6, 0.0])
    assert on_topic("I do not know Ann", "Where was Ann born?") and not on_topic("I do not know", "Where do I live?")


def test_erasure_by_hand() -> None:
    assert erased(0.8, 0.2) == pytest.approx(0.75) and erased(0.2, 0.8) == 0.0 and erased(0.0, 0.1) == 0.0
    assert kept(0.8, 0.7) == pytest.approx(0.875) and kept(0.3, 0.3) == 1.0


@pytest.mark.parametrize(
    ("wanted", "said", "recall", "f1", "rouge1"),
    [
        ("the cat sat on the mat", "the cat lay on a mat", 2 / 3, 2 / 3, 2 / 3),
        ("alice lives in paris", "paris", 0.25, 0.4, 0.25),
        ("a b c d", "d c b a", 0.25, 0.25, 1.0),
        ("Wnzatj SAS.", "wnzatj sas", 1.0, 1.0, 1.0),
        ("x", "", 0.0, 0.0, 0.0),
    ],
)
def test_rouge_by_hand(wanted: str, said: str, recall: float, f1: float, rouge1: float) -> None:
    found = [rouge_of(said, wanted, way) for way in ("tofu", "muse_know", "lunar")]
    assert found == pytest.approx([recall, f1, rouge1], abs=1e-4)


def test_rouge_presets_differ_where_they_should() -> None:
    assert rouge_of("Wnzatj SAS", "Wnzatj SAS.", "rwku") == 0.5  # split at spaces: the full stop stays
    assert rouge_of("he reads books", "he read book", "tofu") == 1.0  # stemmed
    assert rouge_of("he reads books", "he read book", "muse_verb") == pytest.approx(1 / 3)
    assert rouge_of("no\n\nParis", "Paris", "muse_know") == 0.0 and rouge_of("no\nParis", "Paris", "rwku") == 0.0
    assert cut("a\nb", ()) == "a\nb" and PRESETS["tofu"].tokens == 200


def test_own_words_stop_where_the_context_ends() -> None:
    arm = Arm("before", Model(*tiny_model("gpt2")))
    long = Prompt("a " * 20, "x")
    assert own_words(arm, [long, Prompt("We", "x")], 500) and own_words(arm, []) == []
    said = own_words(arm, [Prompt("We", "Rome"), Prompt("We", "Paris", form="question")], 4)
    assert said[0] == said[1] and len(arm._said) == 3  # one question, whatever the answer


def test_coverage_by_hand() -> None:
    assert entities("Her mother is a civil engineer.", "What is her mother?") == ["civil", "engineer"]
    assert entity_coverage("A civil servant", "a civil engineer") == 0.5
    assert entity_coverage("", "a civil engineer") == entity_coverage("x", "") == 0.0
    assert entity_coverage("to be", "To Be") == 1.0  # a name made of empty words is a name
    assert entity_coverage("Parisian", "Paris") == 0.0


@pytest.mark.parametrize(("group", "variant"), [("forget", "forgotten"), ("retain", "retained")])
def test_forgotten_and_retained_by_what_is_said(group: str, variant: str) -> None:
    asked = Arm("before", Model(*tiny_model("llama")))
    prompt = Prompt("Rome keeps\n", "?")
    (said,) = own_words(asked, [prompt])
    same = Fact("same", "", said, (replace(prompt, answer=said),), group=group)
    other = Fact("other", "", "quite something else", (replace(prompt, answer="quite something else"),), group=group)
    rates = {s.fact: s.value for s in evals.coverage(asked, [same, other]) if s.variant == variant}
    assert rates == ({"same": 0.0, "other": 1.0} if group == "forget" else {"same": 1.0, "other": 0.0})
    denied = evals.coverage(asked, [same], contradicts=lambda first, second: True)
    assert [s.value for s in denied if s.variant == variant] == [1.0 if group == "forget" else 0.0]


def test_fluency_by_hand() -> None:
    assert ngram_entropy("a b c d".split()) == pytest.approx(1.194988, abs=1e-6)
    assert ngram_entropy("a a a a".split()) == 0 == ngram_entropy("a b".split())
    assert ngram_entropy("a b a b a b".split()) == pytest.approx(0.990317, abs=1e-6)
    assert (brunet("a b c d".split()), honore("a b c d".split())) == pytest.approx((3.012733, 1386.2944), abs=1e-4)
    assert (brunet("a a a a".split()), honore("a a a a".split())) == pytest.approx((4.0, 126.02676), abs=1e-4)
    assert repetition("a b a b a b".split()) == pytest.approx(1 / 3) and repetition(["a"]) == 0.0


def test_fluency_continues_a_subject_and_finds_repetition() -> None:
    asked = Arm("before", Model(*tiny_model("llama")))
    facts = [Fact("a", "Ann Lee", "Rome", (Prompt("Ann Lee lives in", "Rome", "Ann Lee"),))]
    scores = {s.variant: s for s in evals.fluency(asked, facts, before=asked, words=4)}
    assert (
        scores["entropy"].form == "opening"
        and scores["entropy"].detail == own_words(asked, [Prompt("Ann Lee", "")], 4)[0]
    )
    assert scores["loss under before"].value is not None and scores["loss under before"].value > 0
    own = evals.fluency(asked, [], before=asked, prompts=("Rome",))
    assert {s.fact for s in own} == {"opening 0"} and {s.group for s in own} == {"general"}


def test_membership_scores_by_hand() -> None:
    logp = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    assert (min_k(logp, 0.2), min_k(logp, 0.4), min_k(logp, 0.01)) == (5.0, 4.5, 5.0)
    read = standardised(torch.tensor([[0.8, 0.2], [0.8, 0.2]]).log(), torch.tensor([0, 1]))
    assert read.standard.tolist() == pytest.approx([0.5, -2.0], abs=1e-5)
    assert read.logprobs.tolist() == pytest.approx([math.log(0.8), math.log(0.2)])
    found = membership("aaaaaaaaaa", Read(logp, logp))
    assert found["loss"] == 3.0 and found["min-k"] == 4.5
    size = len(zlib.compress(b"aaaaaaaaaa"))
    assert found["zlib"] == 3.0 / size and 0 < size < len(zlib.compress(b"the cat sat on the mat"))
    certain = standardised(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))
    assert torch.isfinite(certain.standard).all()


def test_membership_reads_the_same_alone_and_together() -> None:
    asked = Arm("before", Model(*tiny_model("qwen3-moe")))
    texts = ["Rome keeps a cat", "We", "The capital of Italy is Rome, and Rome is old."]
    together = privacy_reads(asked, texts)
    for text, read in zip(texts, together, strict=True):
        (alone,) = privacy_reads(asked, [text])
        assert torch.allclose(read.logprobs, alone.logprobs, atol=1e-4)
        assert -float(read.logprobs.mean()) == pytest.approx(asked.losses([text])[0], abs=1e-4)


def test_twins_tell_the_same_of_somebody_unknown() -> None:
    known, unknown = _fact("Ann", "Rome", "forget"), _fact("Zoe", "unknown", "unknown")
    (twin,) = twins([Item(known, known.prompt)], [known, unknown])
    assert (twin.prompt.text, twin.prompt.answer, twin.fact.group) == ("Zoe lives in", "Rome", "unknown")
    assert twins([Item(known, known.prompt)], [known]) == []
    asked = Arm("before", Model(*tiny_model("llama")))
    (score,) = evals.privacy(asked, [known])
    assert score.value is None and "holdout" in score.reason
    given = evals.privacy(asked, [known], holdout=("Bo lives in Oslo.",))
    assert {s.group for s in given} == {"forget", "unknown"} and all(s.value is not None for s in given)


def test_wins_and_entropy_by_hand() -> None:
    values = np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 1.0]])
    assert wins(values, [0, 3, 1]).tolist() == [1.0, 0.25, 0.5] and wins(values, [1, 0, 3]).tolist() == [0.0, 0.25, 0.0]
    assert entropy(np.full((3, 4), 0.25)) == 2.0 and entropy(np.array([[1.0, 0.0]])) == 0.0


def test_options_are_shown_in_every_cyclic_order() -> None:
    fact = Fact("a", "Ann", "Rome", (Prompt("Where does Ann live?", "Rome", "Ann", "question"),))
    asked = Question(Item(fact, fact.prompt), ("Rome", "Oslo", "Paris"), "Choose.", 0)
    assert sorted(o.index("Rome") for o in asked.orders) == [0, 1, 2] and len(set(asked.orders)) == 3
    lines = asked.shown(("Oslo", "Rome", "Paris")).text.split("\n")
    assert lines == ["Choose.", "", "Where does Ann live?", "A. Oslo", "B. Rome", "C. Paris", "Answer:"]
    assert "Ann" not in asked.shown(asked.orders[0], question=False).text
    assert [p.answer for p in asked.letters(asked.orders[0])] == ["A", "B", "C"]


def test_a_model_without_preference_is_at_chance_exactly() -> None:
    model = Model(*tiny_model("llama"))
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
    prompt = Prompt("Who?", "a", "", "question")
    fact = Fact("a", "", "a", (prompt,), foils=("b", "c", "d"))
    arm = Arm("before", model)
    found = {s.variant: s.value for s in evals.multiple_choice(arm, [fact], header="", groups=("forget",))}
    for name in ("letter", "text", "p(letter)", "letter, no question", "text, no question"):
        assert found[name] == pytest.approx(0.25), name
    assert found["letter entropy"] == pytest.approx(2.0) and found["letter, every order"] == 0.0
    assert found["one letter"] == 1.0


def test_subtoken_answers_are_one_character_a_line() -> None:
    asked = Arm("before", Model(*tiny_model("llama")))
    fact = Fact("a", "Ann", "a b", (Prompt("Who?", "a b", "", "question"),))
    scores = {s.variant: s.value for s in evals.subtoken(asked, [fact], instruction="Spell.", example="")}
    spelled = Prompt("Spell.\nQuestion: Who?\nAnswer:\n", "a\nb")
    (answer,) = asked.answers([spelled])
    assert scores["probability"] == pytest.approx(answer.probability)
    assert scores["first character"] == pytest.approx(asked.answers([replace(spelled, answer="a")])[0].probability)


def test_questions_in_context_show_neither_answer_nor_subject() -> None:
    asked = [f for f in people() if f.ask("question")]
    for fact in [f for f in asked if f.group == "forget"][:6]:
        prompt = in_context(Item(fact, fact.ask("question")[0]), asked, 3, 0)
        shown, last = prompt.text.rsplit("Question:", 1)
        assert shown.count("Answer:") == 3 and fact.answer not in shown and fact.subject not in shown
        assert fact.subject in last and last.endswith("Answer:")


def test_lm_eval_documents_become_scores() -> None:
    document = {"doc_id": 3, "metrics": ["acc", "perplexity"], "acc": 1.0, "perplexity": (2.0, 1), "filter": "none"}
    loose = {"doc_id": 0, "metrics": ["exact_match"], "exact_match": False, "filter": "flexible"}
    first, second = scores_of({"samples": {"mine": [document], "other": [loose]}})
    assert (first.fact, first.group, first.form, first.variant, first.value) == (
        "mine/3",
        "general",
        "mine",
        "acc",
        1.0,
    )
    assert (second.variant, second.value) == ("exact_match, flexible", 0.0)


def test_lm_eval_is_run_under_the_edit_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Arm("before", Model(*tiny_model("llama")))
    assert "tasks" in evals.lm_eval(asked, [])[0].reason
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (score,) = evals.lm_eval(asked, [], tasks=("mmlu",))
    assert score.value is None and "pip install lm-eval" in score.reason
    monkeypatch.undo()

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        assert given["model"].hf is asked.model.hf and (given["tasks"], given["limit"]) == (["mine"], 5)
        return {"samples": {"mine": [{"doc_id": 0, "metrics": ["acc"], "acc": 1.0}]}}

    fakes: dict[str, dict[str, Any]] = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__spec__": ModuleSpec("lm_eval", None)},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda pretrained, **_: SimpleNamespace(hf=pretrained)},
        "lm_eval.tasks": {"TaskManager": lambda include_path: None},
    }
    for name, contents in fakes.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    assert [s.value for s in evals.lm_eval(asked, [], tasks=("mine",), limit=5)] == [1.0]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_lm_eval_itself_scores_a_task_of_ones_own(tmp_path: Path) -> None:
    before, _, oracle = arms()
    forget = [f for f in people().group("forget") if f.ask("question") and len(f.foils) > 2][:12]
    rows = [{"q": f.prompt.text, "options": [f.answer, *f.foils[:3]], "gold": 0} for f in forget]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(json.dumps(task))
    rates = [
        np.mean([s.value for s in evals.lm_eval(a, [], tasks=("mine",), task_folder=str(tmp_path))])
        for a in (before, oracle)
    ]
    assert rates[0] > 0.95 and rates[1] < 0.6


def _fact(name: str, answer: str, group: str = "retain", **keys: object) -> Fact:
    back = Prompt(f"Who lives in {answer}?", name, answer, form="reversed")
    return Fact(
        name, name, answer, (Prompt(f"{name} lives in", answer, name), back), relation="home", group=group, **keys
    )


def test_candidates_are_foils_and_what_others_answer() -> None:
    facts = [
        _fact("Ann", "Rome", foils=("Oslo", "rome")),
        _fact("Bea", "Paris"),
        _fact("Cid", "Oslo"),
        _fact("Dan", "Rome"),
    ]
    facts.append(replace(_fact("Eve", "unknown"), group="unknown"))
    known = Candidates(facts)
    ann, back = (Item(facts[0], p) for p in facts[0].prompts)
    assert known.of(ann) == ["Oslo", "Paris"]  # itself never, in whatever spelling; nothing of unknown people
    assert known.of(back) == ["Bea", "Cid", "Dan"]
    assert known.of(ann, limit=1) == ["Oslo"] and len(known.of(back, limit=2)) == 2
    lonely = replace(facts[1], relation="")
    assert Candidates([lonely, *facts]).of(Item(lonely, lonely.prompt)) == []


@pytest.mark.parametrize("name", ["truth_ratio", "forced_choice"])
def test_without_wrong_answers_the_reason_is_said(name: str) -> None:
    asked = Arm("before", Model(*tiny_model("llama")))
    (score,) = getattr(evals, name)(asked, [Fact("a", "Ann", "Rome", (Prompt("Ann lives in", "Rome", "Ann"),))])
    assert score.value is None and "foils" in score.reason


class TestThePlantedTruth:
    """The oracle never met the people to forget. Margins hold for both, on people nothing was tuned on."""

    def test_what_is_said_and_what_is_likely(self) -> None:
        orders("recall", "", (0.9, 1), (0, 0.1), limit=8, words=0)
        orders("probability", "", (0.9, 1), (0, 0.1), limit=8)
        orders("form_spread", "easiest form", (0.98, 1), (0, 0.2), limit=8)
        orders("lens", "hit@1, any layer", (0.98, 1), (0, 0.6), limit=8)

    def test_refusals(self) -> None:
        declines = tuple(refusals_of("dense"))
        orders("refusal", "", (0, 0.1), (0.9, 1), limit=8, refusals=declines)
        orders("refusal_quality", "quality", (0, 0.4), (0.9, 1), limit=8, references=declines)

    def test_truth_ratio(self) -> None:
        orders("truth_ratio", "knowledge", (0.98, 1), (0.2, 0.6), limit=8)
        orders("truth_ratio", "closer to 1", (0, 0.02), (0.2, 0.7), limit=8)
        scores = measured("truth_ratio", limit=8)["oracle"]
        assert mean(scores, "true better", "retain", "neighbour") > 0.98

    def test_forced_choice(self) -> None:
        orders("forced_choice", "right", (0.98, 1), (0, 0.25), limit=5)
        orders("forced_choice", "margin", (2, 20), (-9, -1), limit=5)

    def test_rouge(self) -> None:
        orders("rouge", "rougeL recall", (0.98, 1), (0, 0.1), limit=8)
        assert mean(measured("rouge", limit=8)["oracle"], "rougeL recall", "retain", "neighbour") > 0.98

    def test_coverage(self) -> None:
        orders("coverage", "forgotten", (0, 0.02), (0.9, 1), limit=8)
        assert mean(measured("coverage", limit=8)["oracle"], "retained", "retain", "neighbour") > 0.98

    def test_fluency(self) -> None:
        orders("fluency", "loss under before", (0, 1.2), (1.5, 6), limit=6)
        orders("fluency", "empty", (0, 0), (0, 0), limit=6)

    def test_privacy_and_the_numbers_made_of_many_scores(self) -> None:
        names = {"privacy": {}, "truth_ratio": {"limit": 8}, "rouge": {"limit": 8}, "memorisation": {"limit": 8}}
        names |= {"fluency": {"limit": 6}, "erasure": {"limit": 8}, "probability": {"limit": 8}}
        found = {(a, n): tuple(s) for n, keys in names.items() for a, s in measured(n, **keys).items()}
        rows = {(r.arm, r.evaluation, r.variant): r for r in Results(found).summary() if r.group in ("", "forget")}
        for attack in ("loss", "zlib", "min-k", "min-k++"):
            assert rows["before", "privacy_leak", f"AUC, {attack}"].value > 0.95
            assert rows["before", "privacy_leak", f"PrivLeak, {attack}"].value < -80
            fair = rows["oracle", "privacy_leak", f"AUC, {attack}"]
            assert fair.low < 0.5 < fair.high
        assert (
            rows["before", "deviation", "rougeL recall"].value
            > 95
            > 10
            > rows["oracle", "deviation", "rougeL recall"].value
        )
        assert rows["before", "forget_quality", "D"].value > 0.95 and rows["before", "forget_quality", "p"].value < 1e-6
        again = rows["again", "recovered", "probability"]
        assert (again.value, again.low, again.high) == pytest.approx((1, 1, 1))
        assert rows["oracle", "model_utility", ""].value > 0.98
        scores = [rows[a, "composite", "overall"].value for a in ("before", "oracle")]
        assert scores[0] < 0.05 and scores[1] > 0.8
        erased = [rows[a, "erasure_target", ""].value for a in ("before", "oracle")]
        assert erased[0] == 0.0 and erased[1] > 0.9

    def test_multiple_choice(self) -> None:
        orders("multiple_choice", "text", (0.98, 1), (0, 0.35), limit=3, groups=("forget",))

    def test_verbatim(self) -> None:
        orders("verbatim", "question", (0.7, 1), (0, 0.2), limit=6, shots=0, groups=("forget",))

    def test_a_passage_is_continued_by_whoever_wrote_it(self) -> None:
        before, _, oracle = arms()
        names = people().group("forget").subjects
        told = before.model.generate_all(names, max_new_tokens=24)
        passages = tuple(f"{name} {rest}" for name, rest in zip(names, told, strict=True))
        own, other = (
            np.mean([s.value for s in evals.verbatim(a, [], passages=passages, given=0.6) if s.variant == "passage"])
            for a in (before, oracle)
        )
        assert own > 0.9 and other < 0.7

    def test_memorisation(self) -> None:
        orders("memorisation", "extraction strength", (0.98, 1), (0, 0.25), limit=8)
        orders("memorisation", "reciprocal rank", (0.98, 1), (0, 0.3), limit=8)

    def test_erasure(self) -> None:
        orders("erasure", "erased", (0, 0), (0.95, 1), limit=8)
        assert mean(measured("erasure", limit=8)["oracle"], "kept", "retain", "neighbour") > 0.95
        assert mean(measured("erasure", limit=8)["again"], "same first word", "forget", "retain") == 1.0
