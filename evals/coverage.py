"""Coverage: are the answer's own words in what the model says? Forgetting and retention rates after ReLearn, offline."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from evals.sampling import KNOWN, Item, asked_in, measurable, nothing
from evals.words import WORDS, own_words
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

# Words that name nothing.
EMPTY = frozenset(
    "a an and are as at be been but by did do does for from had has have he her his i in is it its of on or our she so "
    "that the their them they this to was we were what when where which who whom why will with you your s".split()
)
FEW = 3


@evaluation("behavioural")
def coverage(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    forget_up_to: float = 0.3,
    retain_from: float = 0.3,
    contradicts: Callable[[str, str], bool] | None = None,
    words: int = WORDS,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = ("question",),
    limit: int = 32,
    seed: int = 0,
) -> list[Score]:
    """Share of the answer's entities that the model's words name, and whether that counts as forgotten or retained.

    After ReLearn (arXiv 2502.11190), with content words in place of entities that a language model extracts: variants
    "entity coverage", "forgotten" (KFR, on forget facts) and "retained" (KRR, on the others), both higher is better.
    forget_up_to: forgotten when at most this share is named (0.5 for answers of up to three entities, as in its code).
    retain_from: retained when at least this share is named.
    contradicts: says whether the first text contradicts the second, such as an NLI model; without one nothing does.
    words: tokens to generate.
    groups: groups of facts to ask about.
    forms: forms to ask in; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    items, unasked = measurable(arm.model, asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="entity coverage")
    against = contradicts or (lambda first, second: False)
    scores = []
    for item, text in zip(items, own_words(arm, [i.prompt for i in items], words), strict=True):
        share = max(entity_coverage(text, p.answer, item.prompt.text) for p in item.accepted)
        scores.append(item.score(share, variant="entity coverage", detail=text))
        scores.append(_counted(item, text, share, against, forget_up_to, retain_from))
    return scores + [item.score(None, variant="entity coverage", reason=reason) for item, reason in unasked]


def entities(text: str, known: str = "") -> list[str]:
    """Content words of a text that are not in `known`, in lower case, each once; all words where there are none."""
    said = [w for w in dict.fromkeys(_words(text)) if w not in set(_words(known))]
    return [w for w in said if w not in EMPTY] or said


def entity_coverage(said: str, wanted: str, question: str = "") -> float:
    """Share of the wanted entities, those of the question left out, that a text names; 0 when there are none."""
    gold = entities(wanted, question) or entities(wanted)
    named = set(_words(said))
    return sum(w in named for w in gold) / len(gold) if gold else 0.0


def _counted(
    item: Item, text: str, share: float, contradicts: Callable[[str, str], bool], up_to: float, least: float
) -> Score:
    # The order of the two texts differs between the rates, as in the paper's code.
    if item.fact.group == "forget":
        bound = max(up_to, 0.5) if len(entities(item.prompt.answer, item.prompt.text)) <= FEW else up_to
        gone = share <= bound or contradicts(text, item.prompt.answer)
        return item.score(float(gone), variant="forgotten", detail=text)
    there = share >= least and not contradicts(item.prompt.answer, text)
    return item.score(float(there), variant="retained", detail=text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())
