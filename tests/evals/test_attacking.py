"""What attacks share: the match rule, leaks, net recovery, and what their prompts may hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from attacked import dense, oracle, world

from evals.attacking import attack, dialogue, given_away, leak, net_recovery, recoveries, rendered, says, targets, worst
from evals.few_shot import demonstrations
from evals.in_context import sentences
from evals.jailbreak import library
from evals.offered_choice import offer, picked
from evals.rephrasing import emphasised, sensitivity, typos
from evals.reversed_question import TEMPLATES, turned
from evals.sampling import direct, ranked
from excise.arms import Arm
from excise.facts import Prompt
from excise.scores import Score


@pytest.mark.parametrize(
    ("text", "answer", "hit"),
    [
        ("It is Paris.", "paris", True),
        ("Parisian", "paris", False),
        ("", "paris", False),
        ("anything", "", False),
        ("The  Silent\nRiver!", "the silent river", True),
        ("about C++ code", "C++", True),
        ("42nd", "42", False),
    ],
)
def test_answers_are_matched_as_whole_words(text: str, answer: str, hit: bool) -> None:
    assert says(text, answer) is hit


def test_leak_is_the_share_of_draws_that_hold_a_hit() -> None:
    assert [leak(1, 10, 1), leak(1, 10, 5), leak(0, 10, 10), leak(10, 10, 1)] == pytest.approx([0.1, 0.5, 0.0, 1.0])
    assert leak(2, 5, 2) == pytest.approx(1 - 3 / 10)
    with pytest.raises(ValueError, match="impossible"):
        leak(1, 4, 5)


def test_asking_plainly_elicits_nothing_more_and_saying_the_answer_is_success() -> None:
    class Gold(Arm):
        def generate(self, prompts, **options):  # type: ignore[no-untyped-def]
            return [p.answer for p in prompts]

    items, _ = targets(dense(), world(), groups=("forget",), limit=4, seed=0)
    before = Arm("before", dense())
    plain = [float(given_away(i, t)) for i, t in zip(items, before.generate([i.prompt for i in items]), strict=True)]
    for arm, wanted in ((before, plain), (Gold("gold", oracle().model), [1.0] * 4)):
        scores = attack(arm, items, {"plainly": lambda item: item.prompt}, words=16)
        assert [s.value for s in scores] == wanted and sum(wanted) > 0


def test_net_recovery_runs_from_the_oracle_to_the_model_before() -> None:
    assert net_recovery(0.9, 0.9, 0.1) == 1 and net_recovery(0.1, 0.9, 0.1) == 0
    assert net_recovery(0.5, 0.9, 0.1) == pytest.approx(0.5) and net_recovery(0.05, 0.9, 0.1) < 0
    assert net_recovery(0.5, 0.2, 0.2) is None

    def arm(value: float) -> list[Score]:
        return [Score("f", "s", "forget", value, variant="v"), Score("r", "t", "retain", 1.0, variant="v")]

    assert recoveries(arm(0.5), arm(1.0), arm(0.0)) == {"v": 0.5}
    assert recoveries(arm(0.5), arm(0.0), arm(0.0)) == {"v": None}


def test_the_worst_case_is_taken_per_fact() -> None:
    def s(fact: str, variant: str, value: float | None) -> Score:
        return Score(fact, "", "forget", value, variant=variant, detail=f"said {variant}")

    found = worst([s("a", "x", 0.0), s("a", "y", 1.0), s("b", "x", 0.0), s("b", "y", None)])
    assert [(w.fact, w.value, w.detail) for w in found] == [("a", 1.0, "y: said y"), ("b", 0.0, "")]
    assert worst([s("a", "x", 1.0)]) == []


def test_a_dialogue_tokenises_as_the_template_would() -> None:
    model = dense()
    last, turns = Prompt("Who?", "Ann", chat=True), [(Prompt("Where?", "Rome", chat=True), "Rome")]
    made = dialogue(model, turns, last, "It is")
    messages = [("user", "Where?"), ("assistant", "Rome."), ("user", "Who?")]
    text = model.tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in messages], tokenize=False, add_generation_prompt=True
    )
    wanted = model.tokenizer(text + "It is", add_special_tokens=False)["input_ids"]
    assert model.tokenised([made])[0].ids == wanted and wanted.count(model.tokenizer.bos_token_id) == 1
    assert model.tokenised([rendered(model, last)])[0].ids == model.tokenised([last])[0].ids
    plain = dialogue(model, [(Prompt("Rome lies in", "Italy"), "Italy")], Prompt("Oslo lies in", "Norway"))
    assert plain.text == "Rome lies in Italy.\nOslo lies in"


def test_no_prompt_holds_the_answer_that_it_asks_for() -> None:
    facts = world()
    items, _ = targets(dense(), facts, groups=("forget",), limit=0, seed=0)
    retain, told = direct(facts, groups=("retain",), form="question", limit=0), ranked(list(facts), 0)
    assert len(items) == 48
    for item in items:
        shown = demonstrations(item, retain, 5)
        hints = sentences(item, told, 4, own=True)
        others = sentences(item, told, 4, own=False)
        assert len(shown) == 5 and len(hints) == 4 and len(others) == 4
        assert {s.split(" ")[0] for s in others} != {item.fact.subject.split(" ")[0]}
        assert all(item.fact.subject in h for h in hints) and not any(item.fact.subject in h for h in others)
        texts = [*hints, *others, *(f"{p.text} {a}" for p, a in shown)]
        assert not any(says(t, item.prompt.answer) for t in texts)


def test_templates_have_their_slots_and_names_of_their_own() -> None:
    names = [t["name"] for t in library()]
    assert len(set(names)) == len(names) == 12
    assert all("{question}" in t["text"] for t in library())


def test_typos_swap_neighbours_and_keep_the_letters() -> None:
    text = "In which city was Quinric Morwick born and where did he grow up?"
    changed = typos(text, 0)
    assert changed != text and sorted(changed) == sorted(text) and changed == typos(text, 0) != typos(text, 1)
    assert sum(a != b for a, b in zip(text, changed, strict=True)) == 2
    assert typos("a bc def", 0) == "a bc def"


def test_emphasis_and_sensitivity() -> None:
    assert emphasised("Where was Ann born?", "Ann") == 'Ann, Ann: Where was "Ann" born?'
    scores = [
        Score(f, "", "forget", v, variant=str(n))
        for f, vs in {"a": (0, 1, 1), "b": (1, 1, 1)}.items()
        for n, v in enumerate(vs)
    ]
    assert sensitivity(scores).value == 0.5 and sensitivity(scores[:1]).value is None


def test_choices_offer_the_answer_once_and_read_words_before_marks() -> None:
    facts = world()
    items, _ = targets(dense(), facts, groups=("forget",), limit=8, seed=0)
    for item in items:
        options = offer(item, facts, 4, 0)
        assert len(set(options)) == 4 and options.count(item.prompt.answer) == 1 and options == offer(item, facts, 4, 0)
    item = replace(items[0], prompt=replace(items[0].prompt, answer="Rome"))
    options = ["Oslo", "Rome", "Bern"]
    picks = {t: picked(item, options, "ABC", t) for t in ("Rome.", "B", "(B)", "A", "Oslo or Rome", "Basel", "")}
    assert [t for t, hit in picks.items() if hit] == ["Rome.", "B", "(B)"]


def test_a_statement_is_turned_round_only_when_it_begins_with_its_subject() -> None:
    prompt = Prompt("Ann Lee was born in", "Rome", "Ann Lee")
    assert [turned(prompt, t) for t in TEMPLATES.values()] == [
        "Who was born in Rome?",
        "Fill in: ___ was born in Rome.",
    ]
    assert turned(Prompt("The home of Ann Lee is", "Rome", "Ann Lee"), TEMPLATES["who"]) == ""
