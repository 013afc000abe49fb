"""Fluency: does the model still write text, or does it repeat itself, fall silent or fall apart?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from evals.candidates import mean_logprob
from evals.sampling import Item, measurable, nothing, sample
from evals.words import own_words
from excise.arms import Arm
from excise.facts import GROUPS, Fact, Prompt
from excise.registry import evaluation
from excise.scores import Score

LOSS = "loss under before"


@evaluation("behavioural")
def fluency(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    prompts: tuple[str, ...] = (),
    words: int = 48,
    groups: tuple[str, ...] = GROUPS,
    limit: int = 16,
    seed: int = 0,
) -> list[Score]:
    """What the model writes by itself, measured without a reference text; words are what stands between spaces.

    Variants: "entropy" of its word pairs and triples in bits (RWKU, arXiv 2406.10890, from ROME), "repetition-4" (share
    of 4-grams said before), "distinct-2" (share of pairs that are new), "top word" (share of the most frequent word),
    "empty" (nothing said), "loss under before" (nats per token: high where the text is not what the model wrote once),
    "Brunet" and "Honore" (ReLearn, arXiv 2502.11190). High entropy is also what random words have: read it beside the
    loss. Facts are begun at their subject ("Marie Curie"), so that whole sentences follow.
    prompts: openings to continue, instead of the facts' subjects.
    words: tokens to generate.
    groups: groups of facts whose subjects are written about.
    limit: most subjects per group; 0 for all.
    seed: which subjects are taken when there are more.
    """
    items = _openings(facts, prompts, groups, limit, seed)
    if not items:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="entropy")
    items, unasked = measurable(arm.model, items)
    said = own_words(arm, [item.prompt for item in items], words)
    scores = [score for item, text in zip(items, said, strict=True) for score in _scores(item, text)]
    scores += _losses(before, [(item, text) for item, text in zip(items, said, strict=True)])
    return scores + [item.score(None, variant="entropy", reason=reason) for item, reason in unasked]


def ngram_entropy(words: Sequence[str]) -> float:
    """Mean of 2/3 of the pairs' and 4/3 of the triples' entropy in bits; 0 for fewer than three words."""
    if len(words) < 3:
        return 0.0
    return (2 / 3 * _entropy(_ngrams(words, 2)) + 4 / 3 * _entropy(_ngrams(words, 3))) / 2


def repetition(words: Sequence[str], n: int = 4) -> float:
    """Share of n-grams that were said before in the same text."""
    found = _ngrams(words, n)
    return 1 - len(set(found)) / len(found) if found else 0.0


def brunet(words: Sequence[str]) -> float:
    """Brunet's index N^(V^-0.165): N words, V different ones; lower is richer."""
    return float(len(words) ** (len(set(words)) ** -0.165)) if words else 0.0


def honore(words: Sequence[str]) -> float:
    """Honore's statistic 100 ln N / (1 - V1/V + 0.1), V1 words used once, at most 1e6; higher is richer."""
    if not words:
        return 0.0
    counts = Counter(words)
    once = sum(n == 1 for n in counts.values())
    return min(1e6, 100 * math.log(len(words)) / (1 - once / len(counts) + 0.1))


def _openings(
    facts: Sequence[Fact], prompts: tuple[str, ...], groups: tuple[str, ...], limit: int, seed: int
) -> list[Item]:
    if prompts:
        return [
            Item(Fact(f"opening {i}", "", "", (Prompt(p, "."),), group="general"), Prompt(p, ".", form="opening"))
            for i, p in enumerate(prompts)
        ]
    first: dict[tuple[str, str], Item] = {}
    for item in sample(facts, groups=groups, limit=0, seed=seed):
        subject = item.fact.subject or item.fact.id
        first.setdefault((item.fact.group, subject), item)
    taken: Counter[str] = Counter()
    chosen = []
    for (group, _), item in first.items():
        if not limit or taken[group] < limit:
            taken[group] += 1
            chosen.append(replace(item, prompt=_opening(item)))
    return chosen


def _opening(item: Item) -> Prompt:
    """The prompt up to the end of its subject; the whole prompt where it names none."""
    prompt = replace(item.prompt, form="opening", held_out=False)
    if not prompt.subject or prompt.subject not in prompt.text or prompt.chat:
        return prompt
    end = prompt.text.index(prompt.subject) + len(prompt.subject)
    return replace(prompt, text=prompt.text[:end])


def _scores(item: Item, text: str) -> list[Score]:
    words = text.split()
    pairs = _ngrams(words, 2)
    top = max(Counter(words).values()) / len(words) if words else 0.0
    values = {
        "entropy": ngram_entropy(words), "repetition-4": repetition(words), "empty": float(not words),
        "distinct-2": len(set(pairs)) / len(pairs) if pairs else 1.0, "top word": top, "Brunet": brunet(words),
        "Honore": honore(words),
    }  # fmt: skip
    return [item.score(v, variant=k, detail=text if k == "entropy" else "") for k, v in values.items()]


def _losses(before: Arm, said: Sequence[tuple[Item, str]]) -> list[Score]:
    """How surprising the model before finds each text."""
    written = [replace(item, prompt=replace(item.prompt, answer=text)) for item, text in said]
    there, not_there = measurable(before.model, written)
    answers = before.answers([item.prompt for item in there])
    scores = [item.score(-mean_logprob(a), variant=LOSS) for item, a in zip(there, answers, strict=True)]
    return scores + [item.score(None, variant=LOSS, reason=f"nothing to read: {reason}") for item, reason in not_there]


def _ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _entropy(found: Sequence[tuple[str, ...]]) -> float:
    counts = Counter(found).values()
    return -sum(c / len(found) * math.log2(c / len(found)) for c in counts)
