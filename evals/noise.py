"""Noise: where a little of it brings answers back, they were held down by something fragile."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from evals.attacking import questions, score, told, worst
from evals.tampering import again, matrices, parameters_of, tampered
from excise.arms import Arm
from excise.facts import Fact
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def noise(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    sigmas: tuple[float, ...] = (0.05, 0.2),
    draws: int = 2,
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """Share of draws in which the answer is said after normal noise on the matrices of all blocks.

    sigmas: standard deviation of the noise, relative to the root mean square of each matrix; one variant each.
    draws: draws of the noise.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more, and the noise.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    found = []
    with arm.held() as held:
        names = matrices(held.model)
        for sigma in sigmas:
            drawn = []
            for draw in range(draws):
                with tampered(held.model, parameters_of(held.model, names)):
                    shake(held.model, names, sigma, seed + 1000 * draw)
                    drawn.append(told(again(held), asked, ""))
            for items, *tries in zip(asked, *drawn, strict=True):
                said = [t for t in tries if t.value]
                detail = said[0].detail if said else ""
                found.append(score(items[0], len(said) / draws, variant=f"sigma {sigma:g}", detail=detail))
    return scores + found + worst(found)


@torch.no_grad()
def shake(model: Model, names: Sequence[str], sigma: float, seed: int) -> None:
    """Add normal noise of `sigma` times its root mean square to each matrix, in place; the same under the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        view = model.weight(name)
        drawn = torch.randn(view.shape, generator=generator).to(view.device)
        view.add_((sigma * view.float().square().mean().sqrt() * drawn).to(view.dtype))
