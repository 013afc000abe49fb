"""How much of a difference is gone: the one weighted share behind several depth scores, and the choice of a layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# A layer whose reference difference is smaller than this says nothing (the depth score's code, arXiv 2605.24614).
SMALLEST = 0.05


def erased(reference: Tensor, found: Tensor, tau: float | Tensor = SMALLEST) -> Tensor:
    """Share of each layer's reference difference that is found, clip(found / reference, 0, 1); NaN up to `tau`."""
    share = (found / reference).clamp(0, 1)
    return torch.where(reference > tau, share, torch.full_like(share, torch.nan))


def weighted_erasure(reference: Tensor, found: Tensor, tau: float | Tensor = SMALLEST) -> Tensor:
    """Mean of `erased` over the last axis, weighted by the reference; NaN where no layer counts.

    reference [..., L]: how far a model that never knew differs from the one that knows; found [..., L]: how far the
    edited one does. 0: as the one that knows; 1: as the one that never knew.
    """
    share = erased(reference, found, tau)
    counts = ~share.isnan()
    weights = torch.where(counts, reference, torch.zeros_like(reference))
    return (weights * share.nan_to_num()).sum(-1) / torch.where(counts.any(-1), weights.sum(-1), torch.nan)


def recovered_share(found: float, before: float, oracle: float) -> float | None:
    """(found - oracle) / (before - oracle): 0 as a model that never knew, 1 nothing forgotten, below 0 over-unlearned.

    None where the two references are less than SMALLEST apart.
    """
    return None if abs(before - oracle) < SMALLEST else (found - oracle) / (before - oracle)


def halves(subjects: Sequence[str], seed: int = 0) -> np.ndarray:
    """0 or 1 for each row, the subjects dealt in turn in an order that follows from the seed."""
    order = sorted(set(subjects), key=lambda s: hashlib.blake2b(f"{seed}|{s}".encode(), digest_size=8).digest())
    place = {s: i % 2 for i, s in enumerate(order)}
    return np.array([place[s] for s in subjects])


def other_half_best(values: np.ndarray, half: np.ndarray) -> np.ndarray:
    """For each row the layer at which the rows of the other half are highest on average, [n]; -1 without another half.

    values [n, L], NaN where a row has none. So no row chooses the layer that it is reported at.
    """
    chosen = np.full(len(values), -1)
    for side in (0, 1):
        others = values[half != side]
        if len(others) and not np.isnan(others).all():
            known = ~np.isnan(others)
            means = np.where(known, others, 0.0).sum(0) / np.maximum(known.sum(0), 1)
            chosen[half == side] = int(np.argmax(np.where(known.any(0), means, -np.inf)))
    return chosen
