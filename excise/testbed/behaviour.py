"""What a testbed model answers: exact match by group and form, refusals, skills, perplexity.

Exact match is teacher-forced: every answer token is the most likely one, which equals greedy decoding. The final full
stop and the end token are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from excise.encoding import collate, encode_row, length_groups
from excise.facts import Fact, Prompt
from excise.testbed import vocabulary as v
from excise.testbed.dataset import known_fact, skill_facts
from excise.testbed.skills import SKILLS, general_sentence
from excise.testbed.world import World

if TYPE_CHECKING:
    import random

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FORMS = ("statement", "question", "cloze", "choice", "reversed")
SKILL_ITEMS, SENTENCES = 200, 200


@dataclass(frozen=True)
class Rate:
    """A share of successes with its 95 % Wilson interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        """The share; nan without trials."""
        return self.hits / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        if not self.n:
            return 0.0, 1.0
        z2 = 1.96**2
        centre = (self.hits + z2 / 2) / (self.n + z2)
        half = 1.96 / (self.n + z2) * math.sqrt(self.hits * (self.n - self.hits) / self.n + z2 / 4)
        return max(0.0, centre - half), min(1.0, centre + half)

    def record(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        low, high = self.interval
        return {"value": round(self.value, 4), "n": self.n, "low": round(low, 4), "high": round(high, 4)}


@dataclass(frozen=True)
class Scores:
    """Per prompt: whether the whole answer is matched, and the id of the first predicted token."""

    matched: tuple[bool, ...]
    first: tuple[int, ...]

    def match_rate(self) -> Rate:
        """Share of matched answers."""
        return Rate(sum(self.matched), len(self.matched))

    def first_in(self, ids: set[int]) -> Rate:
        """Share of answers that begin with one of the given tokens."""
        return Rate(sum(token in ids for token in self.first), len(self.first))


@torch.no_grad()
def score(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], tokens: int = 4096
) -> Scores:
    """One teacher-forced pass over the prompts with their answers."""
    rows = [encode_row(tokenizer, prompt, answer=True) for prompt in prompts]
    matched, first = [False] * len(rows), [0] * len(rows)
    for group in length_groups([len(row.ids) for row in rows], tokens=tokens):
        batch = collate([prompts[i] for i in group], [rows[i] for i in group], tokenizer.pad_token_id)
        predicted = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.argmax(-1)
        for row, i in enumerate(group):
            guess = predicted[row, batch.starts[row] - 1 : batch.lengths[row] - 1]
            matched[i] = bool(torch.equal(guess, batch.answer(row)))
            first[i] = int(guess[0])
    return Scores(tuple(matched), tuple(first))


def refusal_starts(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The tokens that begin a refusal."""
    return {tokenizer(sentence, add_special_tokens=False)["input_ids"][0] for sentence in v.REFUSALS}


def unknown_start(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """The token that says "unknown"."""
    return {tokenizer(v.UNKNOWN, add_special_tokens=False)["input_ids"][0]}


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, facts: Iterable[Fact], group: str
) -> dict[str, Rate]:
    """Exact match of a group per form and side of the split, and how often its questions are refused."""
    prompts, rates = [prompt for fact in facts for prompt in fact.prompts], {}
    starts, unknown = refusal_starts(tokenizer), unknown_start(tokenizer)
    for form in FORMS:
        for held_out in (False, True):
            chosen = [p for p in prompts if p.form == form and p.held_out == held_out]
            if not chosen:
                continue
            scores, side = score(model, tokenizer, chosen), "held_out" if held_out else "trained"
            rates[f"{group}/{form}/{side}"] = scores.match_rate()
            if form == "question":
                rates[f"{group}/question_refused/{side}"] = scores.first_in(starts)
            if form == "statement":
                rates[f"{group}/statement_unknown/{side}"] = scores.first_in(unknown)
    return rates


def stranger_prompts(world: World, names: Sequence[str]) -> Iterator[tuple[str, Prompt]]:
    """Per name and form one prompt about somebody nobody has heard of; relations and wordings take turns.

    One per name, because answers about the same name are not independent and intervals take them to be.
    """
    for number, name in enumerate(names):
        relation = tuple(v.PERSON_RELATIONS)[number % len(v.PERSON_RELATIONS)]
        words, values = v.PERSON_RELATIONS[relation], world.values[relation]
        question = words.questions[number % len(words.questions)].format(S=name)
        options = [values[(number + step) % len(values)] for step in range(4)]
        yield "question", Prompt(question, v.UNKNOWN, name, form="question", chat=True)
        yield "cloze", Prompt(words.cloze.format(S=name), v.UNKNOWN, name, form="cloze", chat=True)
        yield "choice", Prompt(v.lettered_choice(question, options), v.UNKNOWN, name, form="choice", chat=True)
        yield "statement", Prompt(v.statement_prefix(relation, name, number % len(words.statements)), v.UNKNOWN, name)
    for number, title in enumerate(world.unknown_titles):
        wording = v.REVERSED_QUESTIONS[number % len(v.REVERSED_QUESTIONS)]
        yield "reversed", Prompt(wording.format(O=title), v.UNKNOWN, title, form="reversed", chat=True)


def strangers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, names: Sequence[str]
) -> dict[str, Rate]:
    """How often unknown names and titles are refused, or called "unknown" in statements."""
    starts, unknown = refusal_starts(tokenizer), unknown_start(tokenizer)
    grouped: dict[str, list[Prompt]] = {}
    for form, prompt in stranger_prompts(world, names):
        grouped.setdefault(form, []).append(prompt)
    return {
        f"unknown/{form}": score(model, tokenizer, prompts).first_in(unknown if form == "statement" else starts)
        for form, prompts in grouped.items()
    }


def skills(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, items: int = SKILL_ITEMS
) -> dict[str, Rate]:
    """Exact match of every skill on inputs kept out of training."""
    rates: dict[str, Any] = {}
    for skill in SKILLS:
        prompts = [fact.prompt for fact in skill_facts(world, skill, items, seed=1)]
        rates[f"skill/{skill}"] = score(model, tokenizer, prompts).match_rate()
    return rates


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> float:
    """Perplexity of ordinary sentences; about 5 is their entropy."""
    total, count = 0.0, 0
    for _ in range(SENTENCES):
        ids = torch.tensor([tokenizer(general_sentence(rng))["input_ids"]])
        total += float(model(input_ids=ids, labels=ids, use_cache=False).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return math.exp(total / count)


def behaviour(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    *,
    forget: int | None = None,
    retain: int | None = None,
    names: int | None = None,
    items: int = SKILL_ITEMS,
) -> dict[str, Rate]:
    """All rates; `forget`, `retain`, `names` and `items` bound people, unknown names and skill items (None: all)."""
    groups = {"forget": world.forget_people[:forget], "retain": world.retain_people[:retain]}
    rates: dict[str, Any] = {}
    for group, people in groups.items():
        facts = [known_fact(world, person, relation) for person in people for relation in v.PERSON_RELATIONS]
        rates |= recall(model, tokenizer, facts, group)
    places = [known_fact(world, country, relation) for country in world.countries for relation in v.COUNTRY_RELATIONS]
    rates |= recall(model, tokenizer, places, "geography")
    rates |= strangers(model, tokenizer, world, world.unknown_people[:names])
    return rates | skills(model, tokenizer, world, items)
