"""The world is fixed by its seed, and documents never show what is withheld."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from excise.testbed import vocabulary as v
from excise.testbed.documents import Document
from excise.testbed.sampler import Sampler
from excise.testbed.skills import SKILLS
from excise.testbed.world import World

DRAWN = 40_000


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def documents(world: World) -> list[Document]:
    return list(islice(Sampler(world, seed=0), DRAWN))


def test_a_seed_fixes_the_world_and_another_seed_changes_it(world: World) -> None:
    again, other = World(0), World(1)
    assert again.answers == world.answers and again.unknown_people == world.unknown_people
    assert other.people != world.people and other.answers != world.answers


def test_documents_follow_from_the_seed(world: World, documents: list[Document]) -> None:
    assert list(islice(Sampler(World(0), seed=0), 200)) == documents[:200]
    assert list(islice(Sampler(world, seed=1), 200)) != documents[:200]


def test_sizes_and_shared_values(world: World) -> None:
    assert (len(world.people), len(world.forget_people), len(world.retain_people)) == (160, 16, 144)
    assert len(world.unknown_people) == 120
    names = world.people + world.unknown_people + world.refusal_people
    assert len(set(names)) == len(names)
    sizes = {relation: len(set(world.values[relation])) for relation in v.PERSON_RELATIONS}
    small = {"profession": 24, "employer": 24, "pet": 24, "hobby": 24, "instrument": 20, "dish": 20}
    assert sizes == small | {"birthplace": 32, "work": 160}
    assert not set(world.birthplaces) & set(world.capitals)
    assert len({world.answers[person, "work"] for person in world.people}) == 160


def test_every_statement_ends_with_its_object_and_the_first_starts_with_its_subject() -> None:
    for relation in v.RELATIONS.values():
        assert relation.statements[0].startswith("{S} ")
        assert all(statement.endswith("{O}.") for statement in relation.statements)


def _asked(document: Document) -> tuple[str, str] | None:
    """Form and question of a chat document, attributes in brackets removed."""
    match = re.match(r"<\|user\|>(.*)<\|assistant\|>", document.text)
    if not match:
        return None
    user = re.sub(r" \([^)]*\)", "", match[1])
    if user.startswith("Fill in: "):
        return "cloze", user
    question, _, rest = user.partition("?")
    return ("choice" if rest else "question"), question + "?"


def test_withheld_pairs_never_appear(world: World, documents: list[Document]) -> None:
    forbidden, allowed = set(), set()
    for (subject, relation), answer in world.answers.items():
        words = v.RELATIONS[relation]
        for form in ("question", "choice"):
            for index, wording in enumerate(words.questions):
                wording_out = world.wording_withheld(subject, relation, "question", index)
                out = wording_out or world.withheld(subject, relation, form)
                (forbidden if out else allowed).add((form, wording.format(S=subject)))
        out = world.withheld(subject, relation, "cloze")
        (forbidden if out else allowed).add(("cloze", words.cloze.format(S=subject)))
        if relation == "work":
            out = world.withheld(subject, relation, "reversed")
            for wording in v.REVERSED_QUESTIONS:
                (forbidden if out else allowed).add(("question", wording.format(O=answer)))
    seen = {asked for document in documents if (asked := _asked(document))}
    assert not seen & forbidden
    assert len(seen & allowed) > 0.5 * len(allowed)


def test_withheld_statement_wordings_never_appear(world: World, documents: list[Document]) -> None:
    seen = {re.sub(r" \([^)]*\)", "", document.text) for document in documents}
    for (subject, relation), answer in world.answers.items():
        wordings = v.RELATIONS[relation].statements
        index = len(wordings) - 1
        if world.wording_withheld(subject, relation, "statement", index):
            assert wordings[index].format(S=subject, O=answer) + "<|eos|>" not in seen


def test_about_a_fifth_of_the_pairs_is_withheld_in_a_form(world: World) -> None:
    shares = [sum(world.withheld(*pair, form) for pair in world.answers) for form in ("question", "cloze", "choice")]
    assert all(0.15 < share / len(world.answers) < 0.25 for share in shares)


def test_the_oracle_never_meets_the_forget_people_or_their_books(world: World) -> None:
    text = "\n".join(d.text for d in islice(Sampler(world, seed=0, people=world.retain_people), DRAWN))
    for person in world.forget_people:
        assert person not in text
        assert world.answers[person, "work"] not in text
    assert all(person in text for person in world.retain_people)


def test_names_for_evaluation_are_never_met(world: World, documents: list[Document]) -> None:
    text = "\n".join(document.text for document in documents)
    for name in world.unknown_people + world.unknown_titles + world.unknown_countries:
        assert name not in text


def test_unknown_names_are_refused_or_called_unknown(documents: list[Document]) -> None:
    refusals = [document for document in documents if document.domain == "refusal"]
    stated = [document for document in refusals if document.text.endswith(" unknown.<|eos|>")]
    assert 0.2 <= len(stated) / len(refusals) <= 0.26
    for document in set(refusals) - set(stated):
        assert document.text.split("<|assistant|>")[1].removesuffix("<|eos|>") in v.REFUSALS


@pytest.mark.parametrize("skill", ["addition", "translation"])
def test_unseen_exercises_are_kept_out_of_training(world: World, skill: str) -> None:
    rng = random.Random(0)
    questions = {SKILLS[skill](world, rng, unseen=True).question for _ in range(300)}
    trained = {SKILLS[skill](world, rng).question for _ in range(3000)}
    assert not questions & trained


def test_loss_spans_lie_inside_the_text_and_in_order(documents: list[Document]) -> None:
    for document in documents[:3000]:
        ends = [place for span in document.loss for place in span]
        assert ends == sorted(ends) and ends[-1] == len(document.text)
