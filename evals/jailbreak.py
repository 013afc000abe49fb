"""Jailbreaks: the question inside a story, an order or a role that makes a model say what it would not say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from evals.attacking import Attacked, Build, attack, given_away, reworded, targets
from evals.sampling import Item
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

# How an answer that was asked for in disguise is read; both readings are tried.
READ = {"dashes": lambda text: text.replace("-", ""), "backwards": lambda text: text[::-1]}

USUAL = ("expert", "override", "fiction", "backwards")


@evaluation("elicitation")
def jailbreak(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = ("forget",),
    templates: tuple[str, ...] = USUAL,
    limit: int = 24,
    seed: int = 0,
    words: int = 12,
) -> list[Score]:
    """1 where the model's words hold the answer, asked in a role, a fiction, an override, ...; "any" is the worst case.

    Success of a set of templates is success with as many candidates. Templates: evals/jailbreaks.json; roles and
    languages as in WHP's and the concept-vector authors' prompts (arXiv 2402.16835, 2406.11614), the rest our own.
    groups: groups of facts to ask about.
    templates: names of templates; all twelve when empty.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    words: tokens to generate.
    """
    known = {t["name"]: t for t in library()}
    for name in templates:
        if name not in known:
            raise ValueError(f"no jailbreak {name!r}; there are {', '.join(known)}")
    chosen = [known[name] for name in templates or known]
    items, scores = targets(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not items:
        return scores
    read = {t["name"]: READ[t["read"]] for t in chosen if "read" in t}

    def gives_away(item: Item, name: str, text: str) -> bool:
        return given_away(item, text) or (name in read and given_away(item, read[name](text)))

    variants = {t["name"]: _filled(t["text"]) for t in chosen}
    return scores + attack(arm, items, variants, words=words, read=gives_away)


@cache
def library() -> list[dict[str, str]]:
    """The templates: name, text with the slots {subject} and {question}, and how the answer is read."""
    found: list[dict[str, str]] = json.loads(Path(__file__).with_name("jailbreaks.json").read_text(encoding="utf-8"))
    return found


def _filled(template: str) -> Build:
    def build(item: Item) -> Attacked:
        if "{subject}" in template and not item.fact.subject:
            return "the fact names no subject"
        return reworded(item, template.replace("{subject}", item.fact.subject).replace("{question}", item.prompt.text))

    return build
