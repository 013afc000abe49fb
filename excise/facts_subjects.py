"""Whom questions are about, where a data set does not say: names that many of its questions share.

TOFU and KnowUnDo hold some twenty questions about each author and no field that names the author. Facts about one
author are not independent, so they must be one cluster of an interval, and a localizer needs the tokens of the name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from excise.facts import Fact, Prompt

# A capitalised word, with what hyphens and apostrophes join to it: "Yun-Hwa", "O'Connor".
WORD = re.compile(r"[^\W\d_a-z][^\W_]*(?:[-'\u2019.][^\W_]+)*")
# Words of a name, and the share of a file's facts that must have one for names to mean anything in it.
SHORTEST, LONGEST, ENOUGH = 2, 4, 0.8


def with_subjects(facts: Sequence[Fact]) -> list[Fact]:
    """The facts of a file in which no record says whom it is about, each with the name that it shares with others.

    A name is two to four capitalised words that stand in two questions or more; a fact gets the one of its question or
    answer that stands in most questions. A fact without such a name keeps its question as subject and is a cluster
    alone; so do all where fewer than four in five have one, as in general knowledge, where names recur by chance.
    """
    common = {w for f in facts for p in f.prompts for w in re.findall(r"[^\W\d_]+", p.text) if w.islower()}
    asked = [names(f.prompt.text, common) for f in facts]
    counts = Counter(name for found in asked for name in found)
    chosen = [_chosen(a, names(f.answer, common), counts) for f, a in zip(facts, asked, strict=True)]
    if sum(map(bool, chosen)) < ENOUGH * len(facts):
        return list(facts)
    return [_about(f, name) if name else f for f, name in zip(facts, chosen, strict=True)]


def names(text: str, common: set[str]) -> list[str]:
    """Runs of capitalised words and all parts of them that could be a name, in order of appearance.

    common: lower-case words; a first word that is one of them is capitalised for its place alone ("Which", "Can").
    """
    text = re.sub(r"['\u2019]s\b", "", text)
    first = re.match(r"\W*([^\W\d_]+)\b", text)
    begins = first.end() if first and first[1].lower() in common else 0
    runs: list[list[str]] = []
    end = -1
    for word in WORD.finditer(text, begins):
        if end >= 0 and text[end : word.start()] == " ":
            runs[-1].append(word[0])
        else:
            runs.append([word[0]])
        end = word.end()
    parts = [
        " ".join(run[i : i + n])
        for run in runs
        for i in range(len(run))
        for n in range(SHORTEST, LONGEST + 1)
        if i + n <= len(run)
    ]
    return list(dict.fromkeys(parts))


def _chosen(asked: Sequence[str], answered: Sequence[str], counts: Counter[str]) -> str:
    """The name in most questions, that of the question first where two are in as many; whole, not its first words."""
    known = [n for n in dict.fromkeys([*asked, *answered]) if counts[n] >= 2]
    if not known:
        return ""
    best = max(known, key=lambda n: counts[n])  # the first of equals
    whole = [n for n in known if f" {best} " in f" {n} " and 2 * counts[n] >= counts[best]]
    return max(whole, key=lambda n: len(n.split()))


def _about(fact: Fact, subject: str) -> Fact:
    def told(p: Prompt) -> Prompt:
        return replace(p, subject=subject) if subject in p.text and not p.subject else p

    return replace(fact, subject=subject, prompts=tuple(told(p) for p in fact.prompts))
