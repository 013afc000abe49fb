"""MEMIT: the new values of many subjects, written softly and spread over several blocks.

Meng, Sen Sharma, Andonian, Belinkov, Bau, "Mass-Editing Memory in a Transformer", arXiv 2210.07229. Each block writes its
share of what is still open, its keys read again under the blocks before it. The weight of ordinary text, 15,000 or 20,000
in the published settings, is given in units of the key's width, so that it means the same on every model. A baseline:
what is to be forgotten is overwritten by something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from excise.edits import Edit
from excise.facts import Fact
from excise.model import Model
from excise.registry import editor
from excise.requests import ordinary_text
from excise.rewriting import names_of, text_cost, window, write
from excise.scores import Localization
from excise.values import wanted_change


@editor
def memit(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    value: Literal["optimised", "fictitious"] = "optimised",
    target: str = "foil",
    layers: int = 2,
    weight: float = 1.0,
    steps: int = 25,
    clamp: float = 4.0,
    contexts: int = 8,
    prompts: int = 16,
    texts: Sequence[str] | None = None,
    budget: int = 20_000,
    seed: int = 0,
) -> Edit:
    """An edit of several blocks after which each subject's facts are answered by something else.

    value: "optimised" (one vector per subject, by gradient descent on it alone) or "fictitious" (no training: the state
        of made-up names).
    target: what is said instead: "foil" (another answer of the same kind), or a text such as a refusal.
    layers: how many consecutive blocks share the change.
    weight: of ordinary text against a subject, per dimension of the key; published settings lie between 0.9 and 3.
    steps: of gradient descent, at most.
    clamp: the largest change of state, relative to the state.
    contexts: wordings over which a subject's key is averaged.
    prompts: how many prompts of each subject are answered while its vector is sought.
    texts: ordinary text for the covariance; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws foils and made-up names.

    Reversed questions, which name another entity, are not touched. Raises ExciseError when there is nothing to forget, no
    site at the subject's last token in `where`, or when a block's MLP cannot write to the residual stream directly.
    """
    names = names_of(forget, target=target, contexts=contexts, prompts=prompts, seed=seed)
    blocks = window(model, where, layers)
    change, report = wanted_change(model, names, retain, blocks[-1], value=value, steps=steps, clamp=clamp, seed=seed)
    cost = text_cost(model, ordinary_text(texts, retain), budget)
    edit = write(model, names, change, blocks, cost, mode="soft", ridge=weight)
    return replace(edit, recipe={**edit.recipe, "search": report})
