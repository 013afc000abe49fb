"""Recall: does the model still say the answer, in every form it is asked in?"""

from __future__ import annotations

from collections.abc import Sequence

from evals.sampling import KNOWN, Item, measurable, nothing, sample
from excise.arms import Arm
from excise.facts import Fact
from excise.registry import evaluation
from excise.scores import Score


@evaluation("behavioural")
def recall(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    groups: tuple[str, ...] = KNOWN,
    forms: tuple[str, ...] = (),
    limit: int = 32,
    seed: int = 0,
    words: int = 8,
) -> list[Score]:
    """1 where greedy decoding says the whole answer (or an alias), else 0; one score per prompt.

    `detail` holds what the model says: the answer, or its own words where they differ.
    groups: groups of facts to ask about.
    forms: forms to ask in; all when empty.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    words: tokens to generate where the answer was not said, for reading; 0 for none.
    """
    items, unasked = measurable(arm.model, sample(facts, groups=groups, forms=forms, limit=limit, seed=seed))
    if not items and not unasked:
        return nothing(f"no facts of the groups {', '.join(groups)}")
    said = exact_answers(arm, items)
    wrong = [item for item, answer in zip(items, said, strict=True) if answer is None]
    own = (
        dict(zip(wrong, arm.generate([i.prompt for i in wrong], max_new_tokens=words), strict=True))
        if words and wrong
        else {}
    )
    scores = [
        item.score(float(answer is not None), detail=own.get(item, "") if answer is None else answer)
        for item, answer in zip(items, said, strict=True)
    ]
    return scores + [item.score(None, reason=reason) for item, reason in unasked]


def exact_answers(arm: Arm, items: Sequence[Item]) -> list[str | None]:
    """The accepted answer that greedy decoding says, or None; read from one teacher-forced pass.

    Every answer token being the argmax given the right prefix is the same as greedy decoding saying the answer.
    """
    asked = [(i, prompt) for i, item in enumerate(items) for prompt in item.accepted]
    said: list[str | None] = [None] * len(items)
    for (i, prompt), answer in zip(asked, arm.answers([p for _, p in asked]), strict=True):
        if answer.exact and said[i] is None:
            said[i] = prompt.answer
    return said
