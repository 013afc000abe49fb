"""Pruning: a few weights hold a suppression up; without them the answer is back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from evals.attacking import questions, score, told, worst
from evals.sampling import Item, measurable
from evals.tampering import again, matrices, parameters_of, tampered
from excise.arms import Arm
from excise.facts import Fact, Prompt
from excise.gradients import inflow, mean_gradients, sweeps
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

# Tokens of what the model says that count as its suppression, and weights whose gradients are held at a time.
WORDS, MOST = 8, 20_000_000


@evaluation("elicitation")
def pruning(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    shares: tuple[float, ...] = (0.3,),
    differences: tuple[float, ...] = (0.05,),
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said after weights of the blocks were set to zero.

    Variants: "magnitude, 10 %" prunes the smallest of each matrix; "Wanda, 10 %" the smallest of |w| times the norm of
    its input, per output (arXiv 2306.11695); "set difference, 1 %" those that matter most, by |w gradient|, for what the
    model says now about the facts to forget and not for the facts to keep (arXiv 2402.05162, against unlearning
    2409.18025).
    shares: shares of each matrix pruned by magnitude and by Wanda.
    differences: top shares of the set difference.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    found: list[Score] = []
    with arm.held() as held:
        model = held.model
        names = matrices(model)
        norms = input_norms(model, [i.prompt for items in asked for i in items], names)
        masks: dict[str, Callable[[str], Tensor]] = {}
        for share in shares:
            masks[f"magnitude, {share:.0%}"] = partial(_magnitude, model, share)
            masks[f"Wanda, {share:.0%}"] = partial(_wanda, model, norms, share)
        chosen, reason = _differing(held, asked, names, differences)
        for share in differences:
            if reason:
                found += [score(i[0], None, variant=f"set difference, {share:.0%}", reason=reason) for i in asked]
            else:
                masks[f"set difference, {share:.0%}"] = chosen[share].__getitem__
        for variant, mask in masks.items():
            with tampered(model, parameters_of(model, names)), torch.no_grad():
                for name in names:
                    model.weight(name).masked_fill_(mask(name), 0.0)
                found += told(again(held), asked, variant)
    return scores + found + worst(found)


def smallest(importance: Tensor, share: float) -> Tensor:
    """Mask of the share of entries that are smallest, over the whole matrix [d_in, d_out]."""
    count = int(share * importance.numel())
    mask = torch.zeros(importance.numel(), dtype=torch.bool, device=importance.device)
    mask[importance.flatten().topk(count, largest=False, sorted=False).indices] = True
    return mask.view(importance.shape)


def wanda(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Mask of the share of inputs of each output that are smallest by |w| times the norm of the input [d_in]."""
    importance = weight.abs() * norms.to(weight.device, weight.dtype)[:, None]
    order = importance.topk(int(share * len(weight)), 0, largest=False, sorted=False).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter(0, order, True)


def set_difference(suppression: Tensor, utility: Tensor, share: float) -> Tensor:
    """Mask of the entries in the top share by suppression that are not in the top share by utility."""
    return smallest(-suppression, share) & ~smallest(-utility, share)


def input_norms(model: Model, prompts: Sequence[Prompt], names: Sequence[str]) -> dict[str, Tensor]:
    """Norm over all tokens of what enters each matrix, [d_in]; none for an expert that no token reaches."""
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, dy: Tensor | None) -> None:
        squares[name] = squares.get(name, 0.0) + x.detach().float().square().sum((0, 1))

    for _, batch in model.batches(prompts, answers=True):
        inflow(model, batch, names, batch.mask.bool(), add)
    return {name: s.sqrt() for name, s in squares.items()}


def _magnitude(model: Model, share: float, name: str) -> Tensor:
    return smallest(model.weight(name).detach().abs(), share)


def _wanda(model: Model, norms: dict[str, Tensor], share: float, name: str) -> Tensor:
    weight = model.weight(name).detach()
    return wanda(weight, norms[name], share) if name in norms else torch.zeros_like(weight, dtype=torch.bool)


def _differing(
    held: Arm, asked: Sequence[Sequence[Item]], names: Sequence[str], shares: Sequence[float]
) -> tuple[dict[float, dict[str, Tensor]], str]:
    """Masks of the set difference by share and matrix, or why there are none."""
    forget = [i.prompt for items in asked for i in items if i.fact.group == "forget"]
    useful = [i.prompt for items in asked for i in items if i.fact.group != "forget"]
    if not forget or not useful:
        return {}, "a difference needs facts to forget and facts to keep"
    model = held.model
    said = held.generate(forget, max_new_tokens=WORDS)
    spoken = measurable(
        model, [Item(asked[0][0].fact, replace(p, answer=t)) for p, t in zip(forget, said, strict=True)]
    )
    if not spoken[0]:
        return {}, "the model says nothing about the facts to forget"
    found: dict[float, dict[str, Tensor]] = {share: {} for share in shares}
    for group in sweeps(model, names, MOST):
        suppression = mean_gradients(model, [i.prompt for i in spoken[0]], group)
        utility = mean_gradients(model, useful, group)
        for name in group:
            weight = model.weight(name).detach()
            # A matrix that no token reached has no gradient, and stays.
            s, u = (g.get(name, torch.zeros_like(weight)).mul(weight).abs() for g in (suppression, utility))
            for share in shares:
                found[share][name] = set_difference(s, u, share) & (s > 0)
    return found, ""
