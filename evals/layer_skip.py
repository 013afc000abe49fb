"""Layer skip: an attacker who leaves out the edited layer leaves out the edit (the threat LUNAR names)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from evals.attacking import questions, told, worst
from evals.tampering import again
from excise.arms import Arm
from excise.facts import Fact
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import patched

PARTS = {"mlp": "hook_mlp_out", "attention": "hook_attn_out"}


@evaluation("elicitation")
def layer_skip(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    layers: tuple[int, ...] = (),
    parts: tuple[str, ...] = ("mlp",),
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said with one layer left out: what it adds to the residual stream counts as zero.

    Variants: "no mlp 3", "no attention 3", "no block 3"; "any" is the worst case over what was left out. What a layer
    adds is zeroed, not replaced by its input. Read beside the model before under the same skip.
    layers: layers to leave out, one at a time; all when empty.
    parts: out of "mlp", "attention", "block".
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    found = []
    with arm.held() as held:
        for part in parts:
            for layer in layers or range(arm.model.n_layers):
                with skipped(held.model, layer, part):
                    found += told(again(held), asked, f"no {part} {layer}")
    return scores + found + worst(found)


@contextmanager
def skipped(model: Model, layer: int, part: str) -> Iterator[None]:
    """Inside the block, what a layer's "mlp", its "attention" or the whole "block" adds to the residual stream is zero."""
    if part not in (*PARTS, "block"):
        raise ValueError(f"no part {part!r} to skip; parts are {', '.join(PARTS)}, block")
    patches = {f"blocks.{layer}.{PARTS[part]}": torch.zeros_like} if part in PARTS else _identity(layer)
    with patched(model, patches):
        yield


def _identity(layer: int) -> dict[str, Callable[[Tensor], Tensor | None]]:
    entered: list[Tensor] = []

    def keep(x: Tensor) -> None:
        entered[:] = [x]

    return {f"blocks.{layer}.hook_resid_pre": keep, f"blocks.{layer}.hook_resid_post": lambda x: entered[0]}
