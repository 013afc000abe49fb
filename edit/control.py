"""Control: a random edit of the same kind, sites, rank and norm. What it does as well is not the method's doing."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from excise.actions import Abstain, Affine, Dense, LowRank, Reflect, Scale, Sparse
from excise.edits import Change, Edit
from excise.gates import Box, Gate, Linear


def control(edit: Edit, *, seed: int = 0) -> Edit:
    """The random twin of an edit; same changes with their directions drawn anew, deterministic by seed.

    Matrix changes keep sites, rank and Frobenius norm; scaled and reflected units keep their numbers on other units,
    sparse changes their values at other places; gates and activation changes keep sites, shapes, norms and thresholds.
    Where a change declines, its gate is all there is to it: it reads the same amounts off other coordinates.
    """
    generator = torch.Generator().manual_seed(seed)
    changes = tuple(replace(c, action=_twin(c, generator), gate=_gate(c, generator)) for c in edit.changes)
    return Edit(changes, {"method": "control", "seed": seed, "of": edit.recipe}, dict(edit.fingerprints))


def _twin(change: Change, generator: torch.Generator) -> Any:
    match change.action:
        case LowRank(left=left, right=right):
            twin = LowRank(_like(left, generator), _like(right, generator))
            wanted, found = change.norm, Change(change.site, twin).norm
            return twin.scaled((wanted or 0.0) / max(found or 0.0, 1e-30))
        case Dense(change=matrix):
            return Dense(_like(matrix, generator))
        case Sparse(indices=indices, values=values):
            order = torch.randperm(len(values), generator=generator)
            return Sparse(_other_places(indices, generator), values[order])
        case Reflect(units=units) as action:
            return replace(
                action, units=_other_units(units, generator)[torch.randperm(len(units), generator=generator)]
            )
        case Scale(units=units) as action:
            return replace(action, units=_other_units(units, generator))
        case Affine(left=left, right=right, centre=centre, shift=shift):
            return Affine(_like(left, generator), _like(right, generator), centre, _like(shift, generator))
        case Abstain() as action:
            return action
        case action:
            drawn = {f.name: getattr(action, f.name) for f in fields(action)}
            turned = {n: _like(t, generator) for n, t in drawn.items() if isinstance(t, Tensor) and t.dim() == 2}
            return replace(action, **turned)


def _gate(change: Change, generator: torch.Generator) -> Gate | None:
    if not isinstance(change.action, Abstain):
        return change.gate
    match change.gate:
        case Linear(direction=direction) as gate:
            return replace(gate, direction=direction[torch.randperm(len(direction), generator=generator)])
        case Box(lower=lower, upper=upper) as gate:
            order = torch.randperm(lower.shape[-1], generator=generator)
            return replace(gate, lower=lower[..., order], upper=upper[..., order])
        case gate:
            return gate


def _like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian entries at the norm of `tensor`, column by column."""
    drawn = torch.randn(tensor.shape, generator=generator)
    return drawn * (tensor.float().norm() / drawn.norm().clamp_min(1e-30))


def _other_units(units: Tensor, generator: torch.Generator) -> Tensor:
    """As many distinct units, others before the named ones, drawn up to the largest one named: further ones need not exist."""
    width = int(units.max()) + 1 if len(units) else 0
    drawn = torch.randperm(width, generator=generator)
    named = torch.isin(drawn, units)
    return torch.cat([drawn[~named], drawn[named]])[: len(units)].sort().values


def _other_places(indices: Tensor, generator: torch.Generator) -> Tensor:
    """As many distinct places, all moved on by the same random distance, up to the last one named and round again."""
    width = max(int(indices.max()) + 1, 2) if len(indices) else 2
    return (indices + torch.randint(1, width, (1,), generator=generator)) % width
