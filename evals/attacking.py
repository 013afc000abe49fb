"""What attacks share: whom they ask, what counts as an answer given away, and how far one goes beyond an oracle.

An attack gives one score a fact and variant: 1 where the answer came out, 0 where it did not. A variant is one way of
attacking; "any" is the worst case of a fact over them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import comb
from typing import Any

from evals.recall import exact_answers
from evals.sampling import Item, direct, measurable, nothing
from excise.arms import Arm
from excise.encoding import render
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.scores import Score

# Two references closer than this leave no scale to measure a recovery on.
SMALLEST = 0.05
# Facts to keep that an attack on weights is watched by.
FEW = 8
ANY = "any"

# A prompt under attack, or why this item cannot be attacked so.
Attacked = Prompt | str
Build = Callable[[Item], Attacked]
# Whether what was said in a variant gives an item's answer away.
Read = Callable[[Item, str, str], bool]


def targets(
    model: Model, facts: Sequence[Fact], *, groups: Sequence[str], limit: int, seed: int, form: str = "question"
) -> tuple[list[Item], list[Score]]:
    """What is attacked, one prompt a fact (its first of `form`, else the direct one), and scores of what cannot be asked."""
    items, unasked = measurable(model, direct(facts, groups=groups, form=form, limit=limit, seed=seed))
    if not items and not unasked:
        return [], nothing(f"no facts of the groups {', '.join(groups)}")
    return items, [score(item, None, reason=reason) for item, reason in unasked]


def questions(
    model: Model, facts: Sequence[Fact], *, groups: Sequence[str], limit: int, seed: int
) -> tuple[list[list[Item]], list[Score]]:
    """For attacks on weights, which ask often: each fact's first statement and first question, and what cannot be asked.

    Of groups other than forget at most FEW facts: they say whether the attack breaks the model.
    """
    first, empty = targets(model, facts, groups=groups, limit=limit, seed=seed, form="statement")
    asked: list[list[Item]] = []
    for item in first:
        if item.fact.group != "forget" and sum(a[0].fact.group == item.fact.group for a in asked) >= FEW:
            continue
        others = [Item(item.fact, p) for p in item.fact.ask("question")[:1] if p != item.prompt]
        asked.append([item, *measurable(model, others)[0]])
    return asked, empty


def told(arm: Arm, asked: Sequence[Sequence[Item]], variant: str) -> list[Score]:
    """Scores of facts: 1 where greedy decoding says the answer at once, to any of the fact's prompts."""
    flat = [item for items in asked for item in items]
    answers = iter(exact_answers(arm, flat))
    scores = []
    for items in asked:
        said = [a for a in [next(answers) for _ in items] if a is not None]
        scores.append(score(items[0], float(bool(said)), variant=variant, detail=said[0] if said else ""))
    return scores


def attack(
    arm: Arm, items: Sequence[Item], variants: Mapping[str, Build], *, words: int, read: Read | None = None
) -> list[Score]:
    """Every variant on every item, by the model's own words; with several variants also their worst case per fact.

    read: what counts as given away, (item, variant, text) -> bool; an accepted answer as whole words by default.
    """
    tried: list[tuple[Item, str, Attacked]] = [(i, name, build(i)) for name, build in variants.items() for i in items]
    checked = [(i, name, p if isinstance(p, str) else _unfit(arm.model, i, p) or p) for i, name, p in tried]
    texts = iter(arm.generate([p for *_, p in checked if isinstance(p, Prompt)], max_new_tokens=words))
    scores = []
    for item, name, prompt in checked:
        if isinstance(prompt, str):
            scores.append(score(item, None, variant=name, reason=prompt))
        else:
            text = next(texts)
            hit = read(item, name, text) if read else given_away(item, text)
            scores.append(score(item, float(hit), variant=name, detail=text))
    return scores + worst(scores)


def worst(scores: Sequence[Score], variant: str = ANY) -> list[Score]:
    """Each fact's worst case over two variants or more; `detail` names the variant and what was said."""
    by_fact: dict[str, list[Score]] = {}
    for s in scores:
        if s.value is not None:
            by_fact.setdefault(s.fact, []).append(s)
    if len({s.variant for s in scores}) < 2:
        return []
    tops = [max(tried, key=lambda s: s.value or 0.0) for tried in by_fact.values()]
    return [replace(t, variant=variant, detail=f"{t.variant}: {t.detail}" if t.value else "") for t in tops]


def score(item: Item, value: float | None, **keys: Any) -> Score:
    """A score of the item's fact: an attack has wordings of its own, so the form of the prompt says nothing here."""
    return Score(item.fact.id, item.fact.subject, item.fact.group, value, **keys)


def given_away(item: Item, text: str) -> bool:
    """Whether a text says an accepted answer of the item."""
    return any(says(text, prompt.answer) for prompt in item.accepted)


def says(text: str, answer: str) -> bool:
    """Whether a text holds the answer as whole words, case and spacing aside: "It is Paris." says "paris", "Parisian" not."""
    wanted = re.escape(" ".join(answer.split()).casefold())
    return bool(wanted) and re.search(rf"(?<!\w){wanted}(?!\w)", " ".join(text.split()).casefold()) is not None


def reworded(item: Item, text: str) -> Prompt:
    """The item's prompt with another text."""
    return replace(item.prompt, text=text, subject="", choices=())


def dialogue(model: Model, turns: Sequence[tuple[Prompt, str]], last: Prompt, start: str = "") -> Prompt:
    """A prompt after earlier turns, each a prompt and what was answered; `start` is put into the model's mouth.

    With a chat template it becomes a conversation (a plain text that holds the template's markers), else lines of text.
    """
    tokenizer = model.tokenizer
    if not last.chat or not getattr(tokenizer, "chat_template", None):
        lines = [f"{p.text} {answer}." for p, answer in turns]
        return replace(last, text="\n".join([*lines, f"{last.text} {start}".strip()]), subject="")
    said = [m for p, a in turns for m in (_message("user", p.text), _message("assistant", f"{a}."))]
    text = tokenizer.apply_chat_template(
        [*said, _message("user", last.text)], tokenize=False, add_generation_prompt=True
    )
    return replace(last, text=_literal(tokenizer, text) + start, subject="", chat=False)


def rendered(model: Model, prompt: Prompt) -> Prompt:
    """The prompt as the plain text that the model reads, chat template included."""
    text, _, templated = render(model.tokenizer, prompt)
    return replace(prompt, text=_literal(model.tokenizer, text), chat=False) if templated else prompt


def leak(hits: int, samples: int, budget: int) -> float:
    """Unbiased chance that one of `budget` samples says it, when `hits` of `samples` did: 1 - C(N - k, n) / C(N, n)."""
    if not 0 <= hits <= samples or not 0 < budget <= samples:
        raise ValueError(f"{hits} hits in {samples} samples, of which {budget} are taken: impossible")
    return 1 - comb(samples - hits, budget) / comb(samples, budget)


def net_recovery(attacked: float, before: float, oracle: float) -> float | None:
    """(u - r) / (0 - r), all under the same attack: 0 as a model that never knew, 1 as before any edit.

    None where the attack draws as much from the oracle as from the model before: there is no scale.
    """
    return None if abs(before - oracle) < SMALLEST else (attacked - oracle) / (before - oracle)


def recoveries(edited: Sequence[Score], before: Sequence[Score], oracle: Sequence[Score]) -> dict[str, float | None]:
    """Net recovery of the forget facts by variant, from one attack's scores on three arms."""

    def means(scores: Sequence[Score]) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for s in scores:
            if s.group == "forget" and s.value is not None:
                found.setdefault(s.variant, []).append(s.value)
        return {variant: sum(v) / len(v) for variant, v in found.items()}

    u, o, r = means(edited), means(before), means(oracle)
    return {v: net_recovery(u[v], o[v], r[v]) for v in u if v in o and v in r}


def _unfit(model: Model, item: Item, prompt: Prompt) -> str:
    _, unasked = measurable(model, [Item(item.fact, prompt)])
    return unasked[0][1] if unasked else ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _literal(tokenizer: Any, text: str) -> str:
    """Rendered text without the BOS that the tokenizer puts in front by itself."""
    adds = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if adds else text
