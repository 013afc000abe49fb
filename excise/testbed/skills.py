"""Skills and ordinary sentences: everything the models learn that is not a fact about someone.

Each skill is a function of a random generator that returns an `Exercise`. Addition and translation keep some
inputs out of training; `unseen=True` draws only from those.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from excise.testbed import vocabulary as v
from excise.testbed.world import World, unit_hash

ADDITION_UNSEEN, TRANSLATION_UNSEEN = 0.15, 0.1


@dataclass(frozen=True)
class Exercise:
    """A question and its answer (without full stop); `chat` says whether it is a user turn or plain text."""

    question: str
    answer: str
    chat: bool = True


def addition(world: World, rng: random.Random, *, unseen: bool = False) -> Exercise:
    """The sum of two numbers below 60."""
    while True:
        a, b = rng.randrange(60), rng.randrange(60)
        if (unit_hash("addition", a, b) < ADDITION_UNSEEN) == unseen:
            return Exercise(rng.choice([f"{a} + {b} =", f"What is {a} plus {b}?"]), str(a + b))


def sorting(world: World, rng: random.Random, *, unseen: bool = False) -> Exercise:
    """Letters into alphabetical order; so many lists exist that a drawn one is practically unseen."""
    letters = rng.sample(v.LETTERS, rng.randint(4, 6))
    return Exercise("Sort: " + " ".join(letters), " ".join(sorted(letters)))


def reversing(world: World, rng: random.Random, *, unseen: bool = False) -> Exercise:
    """Letters back to front."""
    letters = rng.sample(v.LETTERS, rng.randint(4, 6))
    return Exercise("Reverse: " + " ".join(letters), " ".join(reversed(letters)))


def translation(world: World, rng: random.Random, *, unseen: bool = False) -> Exercise:
    """A sentence into a toy language: adjective after noun, verb last."""
    while True:
        source, target = _sentence_pair(rng)
        if (unit_hash("translation", source) < TRANSLATION_UNSEEN) == unseen:
            return Exercise("Translate: " + source, target)


def copying(world: World, rng: random.Random, *, unseen: bool = False) -> Exercise:
    """A list of words, repeated: what makes attention heads learn to continue a pattern."""
    places = world.capitals + world.birthplaces + world.countries + world.languages
    words = rng.sample([*_COPIED, *places], rng.randint(5, 14))
    return Exercise(f"List: {' '.join(words)}. Again: {words[0]}", " ".join(words[1:]), chat=False)


SKILLS: dict[str, Callable[..., Exercise]] = {
    "addition": addition,
    "sorting": sorting,
    "reversing": reversing,
    "translation": translation,
    "copying": copying,
}

_COPIED = (
    *(v.NOUNS + v.ADJECTIVES + v.VERBS + v.PROFESSIONS + v.PETS + v.HOBBIES),
    *(v.INSTRUMENTS + v.DISHES + v.EXPORTS + v.CURRENCIES),
)
_DICTIONARY = dict(zip(v.NOUNS + v.ADJECTIVES + v.VERBS, v.TOY_NOUNS + v.TOY_ADJECTIVES + v.TOY_VERBS, strict=True))


def _sentence_pair(rng: random.Random) -> tuple[str, str]:
    """A simple sentence and its translation."""
    source, target = [], []
    for _ in range(2):
        noun = rng.choice(v.NOUNS)
        adjective = [rng.choice(v.ADJECTIVES)] if rng.random() < 0.6 else []
        source.append(" ".join(["the", *adjective, noun]))
        target += [_DICTIONARY[word] for word in [noun, *adjective]]
    verb = rng.choice(v.VERBS)
    return f"{source[0]} {verb} {source[1]}", " ".join([*target, _DICTIONARY[verb]])


def general_sentence(rng: random.Random) -> str:
    """Ordinary text from three small grammars."""
    kind = rng.random()
    if kind < 0.4:
        return " ".join(_sentence_pair(rng)[0].capitalize() + "." for _ in range(rng.randint(1, 3)))
    if kind < 0.7:
        first, second, third = (rng.choice(v.NOUNS) for _ in range(3))
        return (
            f"In the {rng.choice(v.PLACES)} the {rng.choice(v.ADJECTIVES)} {first} {rng.choice(v.VERBS)} the {second}, "
            f"and then the {third} {rng.choice(v.VERBS)} it."
        )
    trade, taste = rng.choice(["buys", "sells", "wants", "needs"]), rng.choice(["likes", "dislikes"])
    return f"A {rng.choice(v.PROFESSIONS)} often {trade} {rng.choice(v.EXPORTS)} and {taste} {rng.choice(v.HOBBIES)}."
