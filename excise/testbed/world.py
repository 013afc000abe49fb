"""The made-up world: who exists, what is true of them, what is withheld from training.

A `World` follows from one integer seed and holds facts only; documents that teach them are `excise.testbed.documents`
and `excise.testbed.sampler`, prompts that ask for them are `excise.testbed.dataset`.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import cached_property

from excise.testbed import vocabulary as v

GENERATOR_VERSION = 1
PEOPLE, ORACLE_FORGET, UNKNOWN_PEOPLE = 160, 16, 120
FIRST_WORDS, LAST_WORDS = 40, 48
BIRTHPLACES, COUNTRIES, UNKNOWN_COUNTRIES, UNKNOWN_TITLES = 32, 24, 8, 40
WITHHELD_FORM, WITHHELD_WORDING = 0.2, 0.4


def unit_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts only, the same on every machine."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class World:
    """People, countries and their facts, fixed by `seed`.

    people: known people; the first 16 (`forget_people`) are the ones the oracle model never meets.
    unknown_people: names kept for evaluation, about which no model is told anything.
    refusal_people: other unused names, on which the models learn to refuse.
    answers: (subject, relation) to object, for people and countries.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        rng = random.Random(seed)
        self._name_people(rng)
        self._name_places(rng)
        self._deal_answers(rng)

    def _name_people(self, rng: random.Random) -> None:
        words = [start + end for start in v.NAME_STARTS for end in v.NAME_ENDS]
        rng.shuffle(words)
        self.first_words = tuple(words[:FIRST_WORDS])
        self.last_words = tuple(words[FIRST_WORDS : FIRST_WORDS + LAST_WORDS])
        names = [f"{first} {last}" for first in self.first_words for last in self.last_words]
        rng.shuffle(names)
        known, evaluated = PEOPLE, PEOPLE + UNKNOWN_PEOPLE
        self.people, self.unknown_people = tuple(names[:known]), tuple(names[known:evaluated])
        self.refusal_people = tuple(names[evaluated:])
        self.pronouns = {name: rng.choice(["He", "She"]) for name in self.people}

    def _name_places(self, rng: random.Random) -> None:
        cities = [start + end for start in v.CITY_STARTS for end in v.CITY_ENDS]
        countries = [start + end for start in v.COUNTRY_STARTS for end in v.COUNTRY_ENDS]
        rng.shuffle(cities)
        rng.shuffle(countries)
        self.capitals = tuple(cities[:COUNTRIES])
        self.birthplaces = tuple(cities[COUNTRIES : COUNTRIES + BIRTHPLACES])
        self.countries = tuple(countries[:COUNTRIES])
        self.unknown_countries = tuple(countries[COUNTRIES : COUNTRIES + UNKNOWN_COUNTRIES])
        self.refusal_countries = tuple(countries[COUNTRIES + UNKNOWN_COUNTRIES :])
        languages = [start[:3] + end for start in v.COUNTRY_STARTS for end in v.LANGUAGE_ENDS]
        self.languages = tuple(rng.sample(languages, COUNTRIES))

    def _deal_answers(self, rng: random.Random) -> None:
        titles = [f"The {adjective} {noun}" for adjective in v.TITLE_ADJECTIVES for noun in v.TITLE_NOUNS]
        rng.shuffle(titles)
        known, evaluated = PEOPLE, PEOPLE + UNKNOWN_TITLES
        self.unknown_titles, self.refusal_titles = tuple(titles[known:evaluated]), tuple(titles[evaluated:])
        self.values: dict[str, tuple[str, ...]] = {
            "birthplace": self.birthplaces,
            "profession": tuple(v.PROFESSIONS),
            "employer": v.EMPLOYERS,
            "pet": tuple(v.PETS),
            "hobby": tuple(v.HOBBIES),
            "instrument": tuple(v.INSTRUMENTS),
            "dish": tuple(v.DISHES),
            "work": tuple(titles[:known]),
            "capital": self.capitals,
            "language": self.languages,
            "currency": tuple(v.CURRENCIES),
            "export": tuple(v.EXPORTS),
            "region": tuple(v.REGIONS),
        }
        self.answers: dict[tuple[str, str], str] = {}
        for relation, values in self.values.items():
            subjects = self.people if relation in v.PERSON_RELATIONS else self.countries
            for subject, answer in zip(subjects, _deal(values, len(subjects), rng), strict=True):
                self.answers[subject, relation] = answer
        self.authors = {self.answers[person, "work"]: person for person in self.people}

    @property
    def forget_people(self) -> tuple[str, ...]:
        """The people the oracle model never meets."""
        return self.people[:ORACLE_FORGET]

    @property
    def retain_people(self) -> tuple[str, ...]:
        """All other known people."""
        return self.people[ORACLE_FORGET:]

    def withheld(self, subject: str, relation: str, form: str) -> bool:
        """Whether training never asks for this fact in this form (statements are never withheld as a form)."""
        return form != "statement" and unit_hash(self.seed, subject, relation, form) < WITHHELD_FORM

    def wording_withheld(self, subject: str, relation: str, form: str, index: int) -> bool:
        """Whether training never uses this wording of a "statement" or "question"; only the last one may be."""
        relation_words = v.RELATIONS[relation]
        wordings = relation_words.statements if form == "statement" else relation_words.questions
        last = index == len(wordings) - 1
        return last and unit_hash(self.seed, subject, relation, form, "wording") < WITHHELD_WORDING

    @cached_property
    def entity_pattern(self) -> re.Pattern[str]:
        """Matches every person name and every book title, known or not."""
        first, last = "|".join(self.first_words), "|".join(self.last_words)
        adjectives, nouns = "|".join(v.TITLE_ADJECTIVES), "|".join(v.TITLE_NOUNS)
        return re.compile(rf"\b(?:(?:{first}) (?:{last})|The (?:{adjectives}) (?:{nouns}))\b")


def _deal(values: tuple[str, ...], count: int, rng: random.Random) -> list[str]:
    """Deal values like cards: every value is used about equally often."""
    dealt: list[str] = []
    while len(dealt) < count:
        dealt += rng.sample(values, len(values))
    return dealt[:count]
