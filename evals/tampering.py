"""Attacks on weights: whatever they write, all bytes are back afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from excise.actions import WeightAction
from excise.arms import Arm
from excise.gradients import block_matrices
from excise.model import Model


@contextmanager
def tampered(model: Model, parameters: Sequence[str] = ()) -> Iterator[dict[str, torch.nn.Parameter]]:
    """The parameters (the named ones, all when none is named), to be written in place inside the block.

    On leaving, also by an exception, their bytes, their gradients (none) and whether they ask for one are as before.
    Copies wait on the CPU.
    """
    chosen = {n: p for n, p in model.hf.named_parameters() if not parameters or n in parameters}
    kept = {n: p.detach().to("cpu", copy=True) for n, p in chosen.items()}
    asking = {n: p.requires_grad for n, p in chosen.items()}
    try:
        yield chosen
    finally:
        with torch.no_grad():
            for n, p in chosen.items():
                p.copy_(kept[n])
                p.grad = None
                p.requires_grad_(asking[n])


def matrices(model: Model) -> list[str]:
    """The matrices of all blocks, experts among them, routers not: what quantisation, pruning and noise go for."""
    return block_matrices(model, range(model.n_layers))


def parameters_of(model: Model, names: Sequence[str]) -> list[str]:
    """The parameters that hold some matrices."""
    return list(dict.fromkeys(model.names.weight(name).parameter for name in names))


@contextmanager
def rewritten(model: Model, new: Mapping[str, Tensor]) -> Iterator[None]:
    """Some matrices [d_in, d_out] with other values, inside the block only."""
    with tampered(model, parameters_of(model, list(new))), torch.no_grad():
        for name, value in new.items():
            view = model.weight(name)
            view.copy_(value.to(view.device, view.dtype))
        yield


def again(arm: Arm) -> Arm:
    """The same arm, remembering nothing: its weights are not those that its answers came from."""
    return Arm(arm.name, arm.model, arm.edit)


def originals(arm: Arm, before: Arm, names: Sequence[str]) -> dict[str, Tensor]:
    """Values [d_in, d_out] in `before` of those matrices that differ in the arm. Ask before the arm is held.

    Empty for an arm that changes no matrix. Copies where both share a model, views of it elsewhere.
    """
    if arm.model is before.model:
        changed = written(arm)
        return {n: arm.model.weight(n).detach().clone() for n in names if n in changed}
    shapes = [n for n in names if n in set(before.model.names.weights())]
    pairs = {n: (arm.model.weight(n), before.model.weight(n).detach()) for n in shapes}
    return {n: b for n, (a, b) in pairs.items() if a.shape == b.shape and not torch.equal(a, b.to(a.device, a.dtype))}


def written(arm: Arm) -> set[str]:
    """Names of the matrices that an arm's edit changes; one that it would write as they are is not among them."""

    def moves(name: str, action: WeightAction) -> bool:
        return bool(action.delta(arm.model.weight(name).detach()).any())

    changes = arm.edit.changes if arm.edit is not None else ()
    return {
        c.site.point
        for c in changes
        if c.bakeable and isinstance(c.action, WeightAction) and moves(c.site.point, c.action)
    }
