"""Subtoken answers: the answer spelled one character a line, tokens that an edit of its usual tokens never touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from evals.memorisation import exact_memorisation
from evals.sampling import Item, asked_in, measurable, nothing
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score

GROUPS = ("forget", "retain", "neighbour")
INSTRUCTION = "Write the answer with one character on each line and nothing else."
EXAMPLE = "\nQuestion: What is the capital of France?\nAnswer:\nP\na\nr\ni\ns"


@evaluation("behavioural")
def subtoken(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    instruction: str = INSTRUCTION,
    example: str = EXAMPLE,
    groups: tuple[str, ...] = GROUPS,
    forms: tuple[str, ...] = ("question",),
    limit: int = 16,
    seed: int = 0,
) -> list[Score]:
    """Probability of the answer's characters, one a line without spaces (ORT, arXiv 2506.07795, form SA).

    Variants: "probability" (length-normalised), "token accuracy" (share of tokens that are the argmax) and "first
    character" (its probability: the rest is easy once a word has begun).
    instruction: what the model is asked to do.
    example: an example after the instruction; "" for none.
    groups: groups of facts to ask about.
    forms: forms to ask in; facts that have none of them are asked in all their forms.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    chosen = asked_in(facts, groups=groups, forms=forms, limit=limit, seed=seed)
    asked, unasked = measurable(arm.model, chosen)
    items, too_long = measurable(arm.model, [_spelled(item, instruction, example) for item in asked])
    if not items and not unasked and not too_long:
        return nothing(f"no facts of the groups {', '.join(groups)}", variant="probability")
    first = [replace(item.prompt, answer=item.prompt.answer[0]) for item in items]
    scores = []
    for item, answer, one in zip(items, arm.answers([i.prompt for i in items]), arm.answers(first), strict=True):
        scores.append(item.score(answer.probability, variant="probability"))
        scores.append(item.score(exact_memorisation(answer.argmax, answer.targets), variant="token accuracy"))
        scores.append(item.score(one.probability, variant="first character"))
    return scores + [item.score(None, variant="probability", reason=reason) for item, reason in unasked + too_long]


def _spelled(item: Item, instruction: str, example: str) -> Item:
    spelled = "\n".join(c for c in item.prompt.answer if not c.isspace())
    text = f"{instruction}{example}\nQuestion: {item.prompt.text}\nAnswer:\n"
    return replace(item, prompt=replace(item.prompt, text=text, answer=spelled))
