"""ROUGE: how much of the answer's wording is in what the model says by itself."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evals.sampling import KNOWN, asked_in, measurable, nothing
from evals.words import WORDS, cut, own_words
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

REFUSAL = "I do not know."


@dataclass(frozen=True)
class Preset:
    """How a benchmark computes ROUGE.

    kind: "rougeL" or "rouge1". measure: "recall" or "fmeasure". stem: Porter stemmer. tokens: new tokens it generates.
    stops: where the generated text is cut. spaces: split at white space alone, without lower case.
    """

    kind: str
    measure: str
    stem: bool
    tokens: int
    stops: tuple[str, ...] = ()
    spaces: bool = False

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"{self.kind} {'F1' if self.measure == 'fmeasure' else self.measure}"


PRESETS = {
    "tofu": Preset("rougeL", "recall", True, 200),
    "muse_verb": Preset("rougeL", "fmeasure", False, 128),
    "muse_know": Preset("rougeL", "fmeasure", False, 32, ("\n\n", "\nQuestion")),
    "rwku": Preset("rougeL", "recall", False, 30, ("\n",), spaces=True),
    "lunar": Preset("rouge1", "recall", True, 512),
}


@evaluation("behavioural")
def rouge(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    preset: Literal["tofu", "muse_verb", "muse_know", "rwku", "lunar"] = "tofu",
    words: int = WORDS,
    refusal_text: str = REFUSAL,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = ("statement", "question"),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """ROUGE of greedy words against the answer (rouge-score 0.1.2; the best accepted answer counts), in a benchmark's way.

    One more variant, "of a refusal", is what the fixed refusal sentence gets: the floor of a model that declines. Recall
    rewards rambling: who lists every candidate scores 1. Values of different presets do not compare.
    preset: tofu (ROUGE-L recall, stemmed), muse_verb and muse_know (ROUGE-L F1), rwku (ROUGE-L recall, split at spaces),
        lunar (ROUGE-1 recall, stemmed; also PISTOL).
    words: tokens to generate; 0 for as many as the benchmark does (200, 128, 32, 30, 512).
    refusal_text: the sentence whose score is the floor.
    groups: groups of facts to ask about.
    forms: forms to ask in; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    way = PRESETS[preset]
    items, unasked = measurable(arm.model, asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant=way.label)
    said = own_words(arm, [item.prompt for item in items], words or way.tokens)
    scores = []
    for item, text in zip(items, said, strict=True):
        wanted = [p.answer for p in item.accepted]
        scores.append(item.score(max(rouge_of(text, w, way) for w in wanted), variant=way.label, detail=text))
        floor = max(rouge_of(refusal_text, w, way) for w in wanted)
        scores.append(item.score(floor, variant=f"{way.label} of a refusal"))
    return scores + [item.score(None, variant=way.label, reason=reason) for item, reason in unasked]


def rouge_of(said: str, wanted: str, way: Preset | str = "tofu") -> float:
    """ROUGE of a text against the wanted one, in [0, 1]; 0 for an empty text."""
    way = PRESETS[way] if isinstance(way, str) else way
    found = _scorer(way.kind, way.stem, way.spaces).score(wanted, cut(said, way.stops))[way.kind]
    return float(getattr(found, way.measure))


@functools.cache
def _scorer(kind: str, stem: bool, spaces: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=stem, tokenizer=_Spaces() if spaces else None)


class _Spaces:
    """Splits at white space, as the package `rouge` does."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split()
