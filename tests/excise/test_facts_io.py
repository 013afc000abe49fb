"""Facts files: our own records, other people's, and what is said about a broken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from excise.facts import Fact, Facts, Prompt
from excise.facts_io import FactsError, read_facts, require, write_facts

CURIE = {"id": "curie", "subject": "Marie Curie", "answer": "Warsaw", "prompt": "Marie Curie was born in"}


def written(path: Path, *records: object) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    facts = Facts(
        [
            Fact(
                "a", "Zoë O'Neill", "1815",
                (
                    Prompt("Zoë O'Neill was born in", "1815", "Zoë O'Neill"),
                    Prompt("When?\n\tZoë O'Neill?", "1815", "Zoë O'Neill", "choice", True, True, ("1815", "1816")),
                    Prompt("Who was born in 1815?", "Zoë O'Neill", "", "reversed"),
                ),
                relation="born", group="neighbour", aliases=("in 1815",), foils=("1816",), tags={"source": "mine"},
            ),
            Fact("u", "Nobody", "unknown", (Prompt("Nobody lives in", "unknown", "Nobody"),), group="unknown"),
            Fact("g", "", "4", (Prompt("2 + 2 =", "4"),), group="general"),
        ]
    )  # fmt: skip
    path = write_facts(tmp_path / "facts.jsonl", facts)
    again = read_facts(path)
    assert again == facts
    assert [f.tags for f in again] == [f.tags for f in facts]
    assert list(tmp_path.iterdir()) == [path]


def test_short_records(tmp_path: Path) -> None:
    record = {
        **CURIE,
        "question": "Where was Marie Curie born?",
        "paraphrases": ["Marie Curie comes from"],
        "split": "retain",
    }
    fact = read_facts(written(tmp_path / "f.jsonl", record))[0]
    assert [(p.form, p.held_out, p.chat) for p in fact.prompts] == [
        ("statement", False, False),
        ("statement", True, False),
        ("question", False, True),
    ]
    assert fact.group == "retain"
    assert {p.fact_id for p in fact.prompts} == {"curie"}


def test_a_record_without_an_id_gets_one_of_its_content(tmp_path: Path) -> None:
    bare = {k: v for k, v in CURIE.items() if k != "id"}
    first = read_facts(written(tmp_path / "a.jsonl", bare, {**bare, "answer": "Paris"}))
    again = read_facts(written(tmp_path / "b.jsonl", {**bare, "answer": "Paris"}, CURIE, bare))
    assert len({f.id for f in first}) == 2 and [f.id for f in again] == [first[1].id, "curie", first[0].id]


BROKEN = {
    "not json": ('{"id": ', "not JSON"),
    "unknown field": ({**CURIE, "anwser": "x"}, "did you mean answer"),
    "unknown prompt field": ({**CURIE, "prompts": [{"txt": "x"}]}, "did you mean text"),
    "unknown group": ({**CURIE, "group": "forgot"}, "did you mean forget"),
    "empty answer": ({**CURIE, "answer": " "}, "field 'answer' is empty"),
    "no answer": ({k: v for k, v in CURIE.items() if k != "answer"}, "no field 'answer'"),
    "no prompt": ({k: v for k, v in CURIE.items() if k != "prompt"}, "no prompt"),
    "subject not in prompt": ({**CURIE, "prompt": "She was born in"}, "subject 'Marie Curie' does not occur"),
    "duplicate id": (CURIE, "the id 'curie' was given before, in line 1"),
    "a number": (7, "must be an object"),
    "a number as answer": ({**CURIE, "answer": 7}, "field 'answer' is int, not text"),
    "a flag that is none": ({**CURIE, "prompts": [{"text": "Marie Curie is", "chat": "yes"}]}, "must be true or false"),
    "deep nesting": ("[" * 100_000, "must be an object|nested too deep|not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_record_gets_one_line(tmp_path: Path, name: str) -> None:
    record, expected = BROKEN[name]
    path = written(tmp_path / "facts.jsonl", CURIE, record, {**CURIE, "id": "last"})
    with pytest.raises(FactsError, match=expected) as caught:
        read_facts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    good, bad = read_facts(path, skip_bad=True)
    assert [f.id for f in good] == ["curie", "last"]
    assert [b.where for b in bad] == [f"{path}:2"]


def test_a_list_names_the_line_of_a_record(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([CURIE, {**CURIE, "id": "b", "group": "x"}], indent=1), encoding="utf-8")
    with pytest.raises(FactsError, match=r"facts.json:8: no group 'x'"):
        read_facts(path)
    good, bad = read_facts(path, skip_bad=True)
    assert (len(good), len(bad)) == (1, 1)


def test_files_that_are_none(tmp_path: Path) -> None:
    written(tmp_path / "facts.jsonl", CURIE)
    with pytest.raises(FactsError, match=r"no such file; did you mean .*facts.jsonl"):
        read_facts(tmp_path / "fact.jsonl")
    with pytest.raises(FactsError, match="a folder"):
        read_facts(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(FactsError, match="no record"):
        read_facts(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "\xe9"}')
    with pytest.raises(FactsError, match="not UTF-8"):
        read_facts(tmp_path / "latin.jsonl")


def test_require_names_what_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path / "f.jsonl", {**CURIE, "group": "retain"})
    with pytest.raises(FactsError, match="no forget fact, only 1 retain"):
        require(read_facts(path), path, "forget")


FOREIGN = {
    "known": (
        {"known_id": 3, "subject": "Eiffel Tower", "attribute": "Paris", "prompt": "The Eiffel Tower is in"},
        ("known-3", "Eiffel Tower", "Paris", "forget", 1),
    ),
    "counterfact": (
        {
            "case_id": 0,
            "requested_rewrite": {
                "prompt": "The mother tongue of {} is", "relation_id": "P103", "subject": "Danielle Darrieux",
                "target_true": {"str": "French"}, "target_new": {"str": "English"},
            },
            "paraphrase_prompts": ["Off topic. Danielle Darrieux, a native"],
            "neighborhood_prompts": ["The mother tongue of Léon Blum is", "A native of"],
        },
        ("counterfact-0", "Danielle Darrieux", "French", "forget", 3),
    ),
    "easyedit": (
        {
            "prompt": "Marie Curie was born in", "subject": "Marie Curie", "ground_truth": ["Warsaw", "Poland"],
            "target_new": "Rome",
            "rephrase_prompt": "The birthplace of Marie Curie is",
            "locality": {"neighborhood": {"prompt": "Chopin was born in", "ground_truth": "Poland"}},
        },
        ("easyedit-1", "Marie Curie", "Warsaw", "forget", 2),
    ),
    "zsre": (
        {
            "subject": "Epaspidota", "src": "What is the rank of Epaspidota?", "answers": ["genus"], "alt": "order",
            "rephrase": "Epaspidota has which rank?", "loc": "nq question: who played Sam", "loc_ans": "Booth",
        },
        ("easyedit-1", "Epaspidota", "genus", "forget", 2),
    ),
    "tofu": (
        {"question": "Where was Hsiao born?", "answer": "In Taipei.", "perturbed_answer": ["In Rome."]},
        ("qa-1", "Where was Hsiao born?", "In Taipei", "forget", 1),
    ),
    "tofu with entity": (
        {
            "idx": 5, "question": "What is her name?", "answer": "Her name is Hsiao.",
            "prefix": "Her name is", "entity": "Hsiao",
        },
        ("qa-5", "What is her name?", "Hsiao", "forget", 1),
    ),
    "pistol": (
        {"question": "What was the price between A and B?", "answer": "7.", "edge": "A_B"},
        ("qa-1", "A_B", "7", "forget", 1),
    ),
    "knowundo": ({"text": "Who?", "labels": "She."}, ("qa-1", "Who?", "She", "forget", 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_records(tmp_path: Path, name: str) -> None:
    record, (fact_id, subject, answer, group, count) = FOREIGN[name]
    facts = read_facts(written(tmp_path / "f.jsonl", record))
    first = facts[0]
    assert (first.id, first.subject, first.answer, first.group, len(facts)) == (fact_id, subject, answer, group, count)
    assert all(p.answer == f.answer for f in facts for p in f.prompts)
    assert all(f.group == "neighbour" for f in facts[1:])
    assert read_facts(write_facts(tmp_path / "again.jsonl", facts)) == facts


def test_foreign_records_say_what_is_missing(tmp_path: Path) -> None:
    path = written(
        tmp_path / "f.jsonl", {"prompt": "Marie Curie was born in", "subject": "Marie Curie", "target_new": "Rome"}
    )
    with pytest.raises(FactsError, match=r"f.jsonl:1: no answer"):
        read_facts(path)


def test_testbed_facts_need_no_model() -> None:
    facts = read_facts("testbed", people=2, seed=1)
    assert len(facts.group("forget").subjects) == 2
    assert facts.counts.keys() == {"forget", "retain", "neighbour", "unknown", "general"}


def test_the_name_that_questions_share_is_their_subject() -> None:
    from excise.facts_subjects import names, with_subjects

    common = {"which", "does", "of"}
    assert names("Which Xin Lee", common) == ["Xin Lee"]
    assert names("Does Jad Ambrose Al-Shamary's sister write?", common) == [
        "Jad Ambrose", "Jad Ambrose Al-Shamary", "Ambrose Al-Shamary",
    ]  # fmt: skip
    assert names("Ann Lee, Bob Ray", set()) == ["Ann Lee", "Bob Ray"] and names("no name", set()) == []

    def asked(*pairs: tuple[str, str]) -> list[Fact]:
        return [Fact(str(i), q, a, (Prompt(q, a, form="question"),)) for i, (q, a) in enumerate(pairs)]

    found = with_subjects(
        asked(
            ("Where does Xin Lee Moore live?", "In Rome"),
            ("Has Xin Lee Moore been to New York?", "Yes"),
            ("Who wrote of New York?", "Xin Lee Moore did"),  # two questions hold each name: that of the question
            ("Who plays?", "Xin Lee Moore and Ann Ray"),
            ("Where does Ann Ray live?", "In Oslo"),
            ("Is Ann Ray rich?", "No"),
        )
    )
    assert [f.subject for f in found] == ["Xin Lee Moore"] * 2 + ["New York", "Xin Lee Moore", "Ann Ray", "Ann Ray"]
    assert [f.prompt.subject for f in found[2:4]] == ["New York", ""]
    general = asked(("Who saw New York?", "I"), ("Where is New York?", "There"), ("Who?", "You"), ("What?", "That"))
    assert with_subjects(general) == general, "two of four are no set of questions about named people"


def test_the_name_of_a_file_says_which_of_its_records_are_kept(tmp_path: Path) -> None:
    record = {"text": "Where does Ann Ray live?", "labels": "In Oslo."}
    own = {"id": "x", "subject": "Ann", "prompt": "Ann lives in", "answer": "Oslo"}
    edge = {"question": "Who?", "answer": "She.", "edge": "forget"}
    kept = read_facts(written(tmp_path / "retention_val.json", record, own, edge))
    assert [(f.id, f.group) for f in kept] == [("retain-qa-1", "retain"), ("x", "forget"), ("qa-3", "forget")]
    cut = read_facts(written(tmp_path / "unlearn_val.json", record))
    assert cut.counts == {"forget": 1} and len(cut + kept) == 4
