"""Multiple choice with letters, in every order of the options, as WMDP and MMLU are asked, and by the options' own text."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from evals.candidates import Candidates, mean_logprob
from evals.sampling import Item, asked_in, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score

LETTERS = "ABCDEFGHIJ"
GROUPS = ("forget", "retain", "neighbour")


@evaluation("behavioural")
def multiple_choice(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    header: str = "The following are multiple choice questions (with answers).",
    options: int = 4,
    groups: tuple[str, ...] = GROUPS,
    forms: tuple[str, ...] = ("question",),
    limit: int = 6,
    seed: int = 0,
) -> list[Score]:
    """Accuracy among lettered options, averaged over all cyclic orders; guessing gives 1 / options, not 0.

    Below chance is a tell-tale of masking. Variants by the letter's probability: "letter" (ties count 1/m), "letter,
    every order" (right in all), "p(letter)" (of the right one among the letters), "letter entropy" (bits), "letter mass"
    (of all letters; falls when the model is broken), "one letter" (largest share of the orders answered by one letter: 1
    is collapse). By the option's text, length-normalised, with the options shown: "text" and "text, every order".
    Controls with the question left out: "letter, no question" and "text, no question".
    header: first line of the prompt, as in lm-eval's tasks.
    options: options shown, the right one included; fewer where fewer are known.
    groups: groups of facts to ask about.
    forms: forms whose wording is the question; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts and options are taken, and their first order.
    """
    chosen = [i for i in asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed) if not i.prompt.choices]
    items, unasked = measurable(arm.model, chosen)
    known, questions = Candidates(facts), []
    for item in items:
        wrong = known.of(item, limit=options - 1, seed=seed)
        question = Question(item, (item.prompt.answer, *wrong), header, seed)
        _, too_long = measurable(arm.model, [Item(item.fact, p) for p in question.prompts()])
        reason = "no other value to choose from: give foils, or facts of the same relation" if not wrong else ""
        reason = reason or (too_long[0][1] if too_long else "")
        if reason:
            unasked.append((item, reason))
        else:
            questions.append(question)
    if not questions and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="letter")
    arm.answers([p for q in questions for p in q.prompts()])
    scores = [q.item.score(value, variant=name) for q in questions for name, value in measured(arm, q).items()]
    return scores + [item.score(None, variant="letter", reason=reason) for item, reason in unasked]


@dataclass(frozen=True)
class Question:
    """A question with options, the right one first; they are shown in every cyclic order of one random order."""

    item: Item
    options: tuple[str, ...]
    header: str
    seed: int

    @property
    def orders(self) -> list[tuple[str, ...]]:
        """The cyclic orders."""
        first = random.Random(f"{self.seed}|{self.item.fact.id}").sample(self.options, len(self.options))
        return [tuple(first[i:] + first[:i]) for i in range(len(first))]

    def shown(self, order: Sequence[str], *, question: bool = True) -> Prompt:
        """The prompt in one order, without an answer."""
        listed = [f"{letter}. {option}" for letter, option in zip(LETTERS, order, strict=False)]
        asked = [self.item.prompt.text] if question else []
        text = "\n".join([self.header, "", *asked, *listed, "Answer:"])
        return replace(self.item.prompt, text=text, subject="", choices=())

    def letters(self, order: Sequence[str], *, question: bool = True) -> list[Prompt]:
        """The prompt answered by each letter."""
        return [replace(self.shown(order, question=question), answer=x) for x in LETTERS[: len(order)]]

    def texts(self, order: Sequence[str], *, question: bool = True) -> list[Prompt]:
        """The prompt answered by each option, in the order shown."""
        return [replace(self.shown(order, question=question), answer=x) for x in order]

    def prompts(self) -> list[Prompt]:
        """Every prompt of the question."""
        return [
            p
            for o in self.orders
            for q in (True, False)
            for p in (*self.letters(o, question=q), *self.texts(o, question=q))
        ]


def measured(arm: Arm, asked: Question) -> dict[str, float]:
    """The variants of one question."""
    right = [order.index(asked.options[0]) for order in asked.orders]

    def logprobs(kind: str, *, question: bool = True) -> np.ndarray:
        rows = [getattr(asked, kind)(order, question=question) for order in asked.orders]
        return np.array([[mean_logprob(a) for a in arm.answers(row)] for row in rows])

    letters, texts = logprobs("letters"), logprobs("texts")
    whole = np.array([[sum(a.logprobs) for a in arm.answers(asked.letters(o))] for o in asked.orders])
    won = {"letter": wins(letters, right), "text": wins(texts, right)}
    among = np.exp(letters - np.logaddexp.reduce(letters, axis=1, keepdims=True))
    found = {name: float(w.mean()) for name, w in won.items()}
    found |= {f"{name}, every order": float((w == 1).all()) for name, w in won.items()}
    found |= {
        "p(letter)": float(among[range(len(right)), right].mean()),
        "letter entropy": entropy(among),
        "letter mass": float(np.exp(whole).sum(1).mean()),
        "one letter": max(Counter(letters.argmax(1).tolist()).values()) / len(right),
    }
    for kind in ("letter", "text"):
        blind = logprobs(f"{kind}s", question=False)
        found[f"{kind}, no question"] = float(wins(blind, right).mean())
    return found


def wins(values: np.ndarray, right: Sequence[int]) -> np.ndarray:
    """For each row 1 where the right column is highest, 1/m in a tie of m, else 0."""
    best = values == values.max(1, keepdims=True)
    found: np.ndarray = best[range(len(right)), list(right)] / best.sum(1)
    return found


def entropy(p: np.ndarray) -> float:
    """Mean entropy of the rows in bits."""
    logs = np.log2(np.where(p > 0, p, 1.0))
    return float(-(p * logs).sum(1).mean()) if p.size else math.nan
