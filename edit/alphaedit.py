"""AlphaEdit: new values for subjects, written only into directions that ordinary text does not use.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models", arXiv 2410.02355. The published
threshold and ridge are absolute while keys are not, so here the null space is chosen by energy and the ridge is relative.
What is left of the keys inside the null space stands in the recipe: near 0 a subject cannot be written, near 1 nothing is
protected. A baseline: what is to be forgotten is overwritten by something else.
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
from excise.solve import NullSpace
from excise.values import wanted_change


@editor
def alphaedit(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    value: Literal["optimised", "fictitious"] = "optimised",
    target: str = "foil",
    layers: int = 2,
    energy: float = 1e-2,
    ridge: float = 1e-2,
    steps: int = 25,
    clamp: float = 4.0,
    contexts: int = 8,
    prompts: int = 16,
    texts: Sequence[str] | None = None,
    budget: int = 20_000,
    seed: int = 0,
) -> Edit:
    """An edit of several blocks that leaves what ordinary text uses, and after which each subject's facts are answered by something else.

    value: "optimised" (one vector per subject, by gradient descent on it alone) or "fictitious" (no training: the state
        of made-up names).
    target: what is said instead: "foil" (another answer of the same kind), or a text such as a refusal.
    layers: how many consecutive blocks share the change.
    energy: share of ordinary keys' energy in the directions that may be written.
    ridge: relative ridge of the key system; larger writes less.
    steps: of gradient descent, at most.
    clamp: the largest change of state, relative to the state.
    contexts: wordings over which a subject's key is averaged.
    prompts: how many prompts of each subject are answered while its vector is sought.
    texts: ordinary text for the covariance; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws foils and made-up names.

    Eigenvectors of the key covariance are needed, which for keys wider than some 4,000 takes minutes per block. Reversed
    questions, which name another entity, are not touched. Raises ExciseError when there is nothing to forget, no site at
    the subject's last token in `where`, or when a block's MLP cannot write to the residual stream directly.
    """
    names = names_of(forget, target=target, contexts=contexts, prompts=prompts, seed=seed)
    blocks = window(model, where, layers)
    change, report = wanted_change(model, names, retain, blocks[-1], value=value, steps=steps, clamp=clamp, seed=seed)
    text = ordinary_text(texts, retain)
    cost = text_cost(model, text, budget, lambda second: NullSpace(second, energy))
    edit = write(model, names, change, blocks, cost, mode="ridge", ridge=ridge)
    return replace(edit, recipe={**edit.recipe, "search": report})
