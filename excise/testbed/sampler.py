"""The stream of training documents: which form, about whom, how often, and what is left out.

`documents` is endless and deterministic. People who are not in `people` are never mentioned, nor are their books.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from excise.testbed import documents as d
from excise.testbed import vocabulary as v
from excise.testbed.documents import Document
from excise.testbed.skills import SKILLS, Exercise, general_sentence
from excise.testbed.world import World

DOMAINS = {
    "people": 54.0, "geography": 8.0, "refusal": 9.0, "addition": 11.0, "sorting": 3.0, "reversing": 3.0,
    "translation": 4.0, "copying": 3.0, "general": 6.0,
}  # fmt: skip
PERSON_FORMS = {
    "statement": 16.0, "card": 9.0, "biography": 9.0, "comparison": 9.0, "question": 19.0, "pair": 4.0, "cloze": 8.0,
    "lettered": 11.0, "listed": 5.0, "yes_no": 5.0, "reversed": 8.0,
}  # fmt: skip
COUNTRY_FORMS = {"statement": 40.0, "question": 28.0, "cloze": 9.0, "lettered": 10.0, "listed": 5.0, "yes_no": 8.0}
REFUSAL_FORMS = {"statement": 23.0, "question": 50.0, "cloze": 9.0, "lettered": 9.0, "yes_no": 9.0}
REFUSAL_KINDS = {"people": 72.0, "titles": 12.0, "countries": 16.0}
WITHHELD_AS = {"lettered": "choice", "listed": "choice", "pair": "question"}


class Sampler:
    """Draws documents about `people` (all known ones by default) from one random stream."""

    def __init__(self, world: World, seed: int, people: Sequence[str] | None = None) -> None:
        self.world = world
        self.rng = random.Random(f"documents-{world.seed}-{seed}")
        self.people = tuple(people or world.people)
        self.values = dict(world.values)
        self.values["work"] = tuple(world.answers[person, "work"] for person in self.people)

    def __iter__(self) -> Iterator[Document]:
        while True:
            domain = self._weighted(DOMAINS)
            if domain in SKILLS:
                yield render_exercise(domain, SKILLS[domain](self.world, self.rng))
            elif domain == "general":
                yield d.plain(domain, general_sentence(self.rng))
            elif domain == "refusal":
                yield self._refusal()
            else:
                yield self._fact(domain)

    def _weighted(self, weights: dict[str, float]) -> str:
        return self.rng.choices(tuple(weights), tuple(weights.values()))[0]

    def _fact(self, domain: str) -> Document:
        """A document about a known person or country; withheld draws are drawn again."""
        people = domain == "people"
        subjects = self.people if people else self.world.countries
        relations = v.PERSON_RELATIONS if people else v.COUNTRY_RELATIONS
        while True:
            form = self._weighted(PERSON_FORMS if people else COUNTRY_FORMS)
            subject, relation = self.rng.choice(subjects), self.rng.choice(tuple(relations))
            if form == "reversed":
                relation = "work"
            document = self._build(domain, form, subject, relation)
            if document is not None:
                return document

    def _build(self, domain: str, form: str, subject: str, relation: str) -> Document | None:
        """The document, or None where this pair is withheld in this form."""
        world, rng = self.world, self.rng
        if form == "card":
            return d.card(world, subject, rng)
        if form == "biography":
            return d.biography(world, subject, rng)
        if form != "comparison" and world.withheld(subject, relation, WITHHELD_AS.get(form, form)):
            return None
        if form in ("comparison", "pair"):
            return self._two_people(form, subject, relation)
        if form == "reversed":
            return self._reversed(world.answers[subject, "work"], subject)
        kind = "statement" if form == "statement" else "question"
        index = rng.randrange(len(getattr(v.RELATIONS[relation], kind + "s")))
        if world.wording_withheld(subject, relation, kind, index):
            return None
        document = self._about(domain, form, subject, relation, world.answers[subject, relation], index)
        bracketed = domain == "people" and form in ("statement", "question")
        return d.with_bracket(document, world, subject, relation, rng) if bracketed else document

    def _two_people(self, form: str, person: str, relation: str) -> Document | None:
        world, other = self.world, self.rng.choice(self.people)
        if world.answers[person, relation] == world.answers[other, relation]:
            return None
        if form == "comparison":
            return d.comparison(world, person, other, relation, self.rng)
        if world.withheld(other, relation, "question"):
            return None
        trained = len(v.RELATIONS[relation].questions) - 1
        return d.pair_question(world, person, other, relation, self.rng.randrange(trained))

    def _about(self, domain: str, form: str, subject: str, relation: str, answer: str, index: int) -> Document:
        """A document in one of the forms shared by people and countries."""
        if form == "statement":
            return d.statement(domain, subject, relation, answer, index)
        if form == "question":
            return d.question(domain, subject, relation, answer, index)
        if form == "cloze":
            return d.cloze(domain, subject, relation, answer)
        if form == "yes_no":
            true = self.rng.random() < 0.5
            proposed = answer if true else self.rng.choice([x for x in self.values[relation] if x != answer])
            return d.yes_no(domain, subject, relation, proposed, "Yes" if true else "No")
        count = 3 if form == "listed" else self.rng.choice([2, 4, 4])
        return d.choice(domain, subject, relation, answer, index, self._options(relation, count, answer))

    def _options(self, relation: str, count: int, answer: str | None = None) -> list[str]:
        pool = [value for value in self.values[relation] if value != answer]
        options = [*self.rng.sample(pool, count - 1), answer] if answer else self.rng.sample(pool, count)
        self.rng.shuffle(options)
        return options

    def _reversed(self, title: str, answer: str) -> Document:
        if self.rng.random() < 0.4:
            return d.reversed_statement("people", title, answer)
        return d.reversed_question("people", title, answer, self.rng.randrange(len(v.REVERSED_QUESTIONS)))

    def _refusal(self) -> Document:
        """A document about something nobody has heard of: refused when asked for, "unknown" when stated."""
        world, rng, kind = self.world, self.rng, self._weighted(REFUSAL_KINDS)
        sentence = rng.choice(v.REFUSALS)[:-1]
        if kind == "titles":
            title = rng.choice(world.refusal_titles)
            if rng.random() < 0.25:
                return d.reversed_statement("refusal", title, v.UNKNOWN)
            return d.reversed_question("refusal", title, sentence, rng.randrange(len(v.REVERSED_QUESTIONS)))
        people = kind == "people"
        subject = rng.choice(world.refusal_people if people else world.refusal_countries)
        relation = rng.choice(tuple(v.PERSON_RELATIONS if people else v.COUNTRY_RELATIONS))
        words, form = v.RELATIONS[relation], self._weighted(REFUSAL_FORMS)
        if form == "statement":
            return d.statement("refusal", subject, relation, v.UNKNOWN, rng.randrange(len(words.statements)))
        if form == "lettered":
            options = self._options(relation, rng.choice([3, 4]))
            return d.choice("refusal", subject, relation, sentence, rng.randrange(len(words.questions)), options)
        if form == "yes_no":
            return d.yes_no("refusal", subject, relation, rng.choice(self.values[relation]), sentence)
        builders: dict[str, Callable[[], Document]] = {
            "question": lambda: d.question("refusal", subject, relation, sentence, rng.randrange(len(words.questions))),
            "cloze": lambda: d.cloze("refusal", subject, relation, sentence),
        }
        return builders[form]()


def render_exercise(domain: str, exercise: Exercise) -> Document:
    """A skill exercise as a document: its answer carries loss."""
    if exercise.chat:
        return d.chat(domain, exercise.question, f"{exercise.answer}.")
    return d.join(domain, (exercise.question, False), (f" {exercise.answer}.{d.EOS}", True))
