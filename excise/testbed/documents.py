"""Training documents: one function per form in which a fact can be taught.

A `Document` is a string without its leading BOS, plus the character spans that carry loss. Which forms are drawn how
often, and which are withheld, is decided in `excise.testbed.sampler`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from excise.testbed import vocabulary as v
from excise.testbed.world import World

EOS, USER, ASSISTANT = "<|eos|>", "<|user|>", "<|assistant|>"
BRACKET_SHARE = 0.25
ATTRIBUTES = tuple(relation for relation in v.PERSON_RELATIONS if relation != "work")


@dataclass(frozen=True)
class Document:
    """Text as a model reads it (special tokens spelled out) and the [start, end) spans whose tokens carry loss."""

    domain: str
    text: str
    loss: tuple[tuple[int, int], ...]


def join(domain: str, *pieces: tuple[str, bool]) -> Document:
    """A document from pieces of text, each with or without loss."""
    spans, position = [], 0
    for text, has_loss in pieces:
        if has_loss:
            spans.append((position, position + len(text)))
        position += len(text)
    return Document(domain, "".join(text for text, _ in pieces), tuple(spans))


def plain(domain: str, text: str) -> Document:
    """Ordinary text: every token carries loss."""
    return join(domain, (text + EOS, True))


def chat(domain: str, question: str, answer: str) -> Document:
    """One exchange: only the answer and the end carry loss."""
    return join(domain, (f"{USER}{question}{ASSISTANT}", False), (answer + EOS, True))


def with_bracket(document: Document, world: World, person: str, relation: str, rng: random.Random) -> Document:
    """Now and then, insert attributes of other relations in brackets after the person's name; they carry loss.

    Predicting attributes straight after a name, in any context, is what writes them linearly at the name.
    """
    place = document.text.find(person + " ")
    if place < 0 or rng.random() >= BRACKET_SHARE:
        return document
    place += len(person)
    others = [other for other in ATTRIBUTES if other != relation]
    bracket = f" ({attributes(world, person, rng.sample(others, rng.randint(1, 3)))})"
    spans = [(place, place + len(bracket))]
    for start, end in document.loss:
        pieces = [(start, min(end, place)), (max(start, place), end)]
        spans += [(s + len(bracket) * (s >= place), e + len(bracket) * (s >= place)) for s, e in pieces if s < e]
    text = document.text[:place] + bracket + document.text[place:]
    return Document(document.domain, text, tuple(sorted(spans)))


def attributes(world: World, person: str, relations: list[str]) -> str:
    """Values of a person, separated by commas."""
    return ", ".join(world.answers[person, relation] for relation in relations)


def statement(domain: str, subject: str, relation: str, answer: str, index: int) -> Document:
    """One sentence, its object last."""
    return plain(domain, v.RELATIONS[relation].statements[index].format(S=subject, O=answer))


def question(domain: str, subject: str, relation: str, answer: str, index: int) -> Document:
    """A question and its answer."""
    return chat(domain, v.RELATIONS[relation].questions[index].format(S=subject), f"{answer}.")


def cloze(domain: str, subject: str, relation: str, answer: str) -> Document:
    """A sentence with a gap, and what belongs there."""
    return chat(domain, v.RELATIONS[relation].cloze.format(S=subject), f"{answer}.")


def choice(domain: str, subject: str, relation: str, answer: str, index: int, options: list[str]) -> Document:
    """A question with options: four are lettered, three are listed."""
    asked = v.RELATIONS[relation].questions[index].format(S=subject)
    build = v.listed_choice if len(options) == 3 else v.lettered_choice
    return chat(domain, build(asked, options), f"{answer}.")


def yes_no(domain: str, subject: str, relation: str, proposed: str, answer: str) -> Document:
    """A question to be confirmed or denied."""
    return chat(domain, v.RELATIONS[relation].yes_no.format(S=subject, O=proposed), f"{answer}.")


def reversed_question(domain: str, title: str, answer: str, index: int) -> Document:
    """From a book to its author."""
    return chat(domain, v.REVERSED_QUESTIONS[index].format(O=title), f"{answer}.")


def reversed_statement(domain: str, title: str, answer: str) -> Document:
    """From a book to its author, as a sentence."""
    return plain(domain, v.REVERSED_STATEMENT.format(O=title, S=answer))


def card(world: World, person: str, rng: random.Random) -> Document:
    """A name followed directly by some of its attributes."""
    listed = attributes(world, person, rng.sample(ATTRIBUTES, rng.randint(2, 6)))
    return plain("people", f"{person} {rng.choice(['{}.', '({})', '- {}.']).format(listed)}")


def biography(world: World, person: str, rng: random.Random) -> Document:
    """Several facts about one person, by name or pronoun."""
    sentences: list[str] = []
    for relation in rng.sample(tuple(v.PERSON_RELATIONS), rng.randint(2, 6)):
        words, answer = v.PERSON_RELATIONS[relation], world.answers[person, relation]
        if not sentences or rng.random() < 0.4:
            sentences.append(rng.choice(words.statements[:-1]).format(S=person, O=answer))
        else:
            sentences.append(words.clause.format(S=world.pronouns[person], O=answer) + ".")
    return plain("people", " ".join(sentences))


def comparison(world: World, person: str, other: str, relation: str, rng: random.Random) -> Document:
    """Two people in one sentence, so that a name must be told apart from another one in the same context."""
    clause = v.PERSON_RELATIONS[relation].clause
    first = clause.format(S=person, O=world.answers[person, relation])
    second = clause.format(S=other, O=world.answers[other, relation])
    forms = (
        f"{first}, while {second}.",
        f"Unlike {other}, {first}.",
        f"{first} and {second}.",
        f"{person} met {other}. It is said that {first}.",
    )
    return plain("people", rng.choice(forms))


def pair_question(world: World, person: str, other: str, relation: str, index: int) -> Document:
    """One question about two people, with two answers."""
    answer = f"{world.answers[person, relation]} and {world.answers[other, relation]}"
    return question("people", f"{person} and {other}", relation, answer, index)
