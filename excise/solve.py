"""The closed-form solver behind every weight edit that writes chosen outputs for chosen keys.

A linear map y = sum_b x_b @ W_b is changed so that keys K gain residuals R, at least cost tr(dW^T M dW), where M says how
expensive it is to move the output for ordinary inputs. One block is an ordinary matrix; several blocks are matrices that
write to the same output (the experts of one layer, whose keys are their weighted neurons). All systems solved are of the
size of the number of keys, never of d_in^2 beyond one Cholesky factor of M per block.

ROME (arXiv 2202.05262), MEMIT (2210.07229), EMMET (2403.14236), AlphaEdit (2410.02355), ROCR (2506.07795) and LUNAR
(2502.07218) are choices of keys, residuals and M.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from excise.actions import LowRank
from excise.edits import Change
from excise.sites import Site

MODES = ("hard", "ridge", "soft")


class Metric(Protocol):
    """How expensive it is to move the output for a given input: M in tr(dW^T M dW)."""

    def solve(self, keys: Tensor) -> Tensor:
        """M^-1 applied to the rows of keys [n, d_in], in float64."""
        ...


@dataclass(frozen=True)
class Covariance:
    """M = C + ridge * mean(diag C) * I, from the uncentred second moment C [d_in, d_in] of the matrix's input.

    The ridge is relative, so that rescaling the activations rescales nothing else.
    """

    second_moment: Tensor
    ridge: float = 1e-3

    def solve(self, keys: Tensor) -> Tensor:
        """M^-1 k by Cholesky, rows in, rows out."""
        m = self.second_moment.to(torch.float64, copy=True)
        level = m.diagonal().mean()
        if not level > 0:
            raise ValueError(
                "the second moment is zero: the matrix's input was never active; collect statistics on other text"
            )
        m.diagonal().add_(self.ridge * level)
        # In place: the factor is the largest thing held.
        return torch.cholesky_solve(keys.double().mT, torch.linalg.cholesky(m, out=m)).mT


@dataclass(frozen=True)
class NullSpace:
    """M^-1 = P, the projector onto directions that ordinary inputs use least (AlphaEdit), chosen by energy.

    energy: share of tr C that the kept directions may hold together (the published threshold is absolute, 2e-2).
    """

    second_moment: Tensor
    energy: float = 1e-3

    def basis(self) -> Tensor:
        """Orthonormal basis [d_in, m] of the directions that must not move."""
        return self._basis

    @cached_property
    def _basis(self) -> Tensor:
        # Kept: the eigenvectors are by far the slowest step, and a block asks for them again and again.
        values, vectors = torch.linalg.eigh(self.second_moment.double())
        kept = values.clamp_min(0).cumsum(0) <= self.energy * values.clamp_min(0).sum()
        return vectors[:, ~kept]

    def solve(self, keys: Tensor) -> Tensor:
        """P k = k - B (B^T k)."""
        b = self._basis
        wide = keys.double()
        return wide - (wide @ b) @ b.mT


@dataclass(frozen=True)
class Identity:
    """M = I: every direction costs the same."""

    def solve(self, keys: Tensor) -> Tensor:
        """The keys themselves."""
        return keys.double()


@dataclass(frozen=True)
class Solution:
    """Factors of the change of each block, dW_b = left[b] @ right, and how good they are.

    left: per block [d_in, r]; right: [r, d_out], shared.
    share: realised share of each wanted residual, [n], 1 when written in full.
    leak: how far each protected key's output moves, relative to the mean wanted residual, [n_protected].
    condition: condition number of the key system that was solved.
    level: what the ridge was relative to; 0 in the hard form.
    """

    left: dict[str, Tensor]
    right: Tensor
    share: Tensor
    leak: Tensor
    condition: float
    level: float = 0.0

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.right.shape[0]

    @property
    def worst_leak(self) -> float:
        """The largest leak; 0 where nothing is protected."""
        return float(self.leak.max()) if len(self.leak) else 0.0

    @property
    def report(self) -> dict[str, Any]:
        """What a recipe says of it."""
        return {
            "rank": self.rank,
            "condition": float(self.condition),
            "share min": float(self.share.min()),
            "share mean": float(self.share.mean()),
        }

    def changes(self, *, idle: bool = False) -> tuple[Change, ...]:
        """The changes of the matrices that are written; with `idle` also of those that nothing is written to."""
        right = self.right.float().contiguous()
        return tuple(
            Change(Site(name), LowRank(left.float().contiguous(), right))
            for name, left in self.left.items()
            if idle or bool(left.any())
        )


def solve_edit(
    keys: Mapping[str, Tensor],
    residuals: Tensor,
    metrics: Mapping[str, Metric],
    *,
    protect: Mapping[str, Tensor] | None = None,
    mode: str = "ridge",
    ridge: float = 1e-2,
    level: float | None = None,
    rank: int | None = None,
    max_condition: float = 1e10,
) -> Solution:
    """The cheapest change that writes `residuals` for `keys` and nothing for the protected keys.

    keys: per block [n, d_in_b]; residuals: [n, d_out]; metrics: per block; protect: per block [n0, d_in_b].
    mode: "hard" writes exactly (dW k = r; columns must be independent), "ridge" adds `ridge` * mean diagonal to the key
        system, which bounds the factors when keys are nearly parallel. "soft" adds `ridge` * d_in (summed over blocks):
        when M is the second moment of the input, d_in is what the key of an ordinary token has on the diagonal, so this
        is MEMIT's M = w C with w = ridge * d_in (published: 15,000 to 20,000, that is a ridge of 0.9 to 3).
    level: what the ridge multiplies, instead of the above. Requests that come one by one add up to the joint solution
        when all are solved at the level of the first, with earlier keys protected.
    rank: keep at most this many factors of the residuals (singular values of the change), None for all.
    Raises ValueError when keys are so nearly parallel that the hard system exceeds `max_condition`, for NaN, and for a negative
    ridge.

    dW_b = M_b^-1 K_b^T (sum_b K_b M_b^-1 K_b^T + ridge I)^-1 R   (closed_form_edits, section 2; rows are keys)
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"a ridge of {ridge} is none; give a number from 0 on")
    n = len(residuals)
    stacked = {b: torch.cat([k, protect[b]]).double() if protect is not None else k.double() for b, k in keys.items()}
    wanted = torch.cat(
        [residuals.double(), residuals.new_zeros(len(next(iter(stacked.values()))) - n, residuals.shape[1]).double()]
    )
    _refuse_nan(stacked, wanted)
    whitened = {b: metrics[b].solve(k) for b, k in stacked.items()}
    gram = torch.stack([k @ whitened[b].mT for b, k in stacked.items()]).sum(0)
    gram = (gram + gram.mT) / 2
    level = _level(mode, gram, sum(k.shape[1] for k in stacked.values()), level)
    system = gram + ridge * level * torch.eye(len(gram), dtype=gram.dtype)
    condition = _condition(system)
    if mode == "hard" and condition > max_condition:
        raise ValueError(f"two keys are nearly the same (condition {condition:.1e}): drop one, or use mode='ridge'")
    weights = torch.linalg.solve(system, wanted)  # [n + n0, d_out]
    moved = gram @ weights
    mixing, right = _factors(weights, wanted, rank)
    left = {b: w.mT @ mixing for b, w in whitened.items()}
    return Solution(left, right, _shares(moved[:n], wanted[:n]), _leaks(moved[n:], wanted[:n]), condition, level)


def _level(mode: str, gram: Tensor, dimensions: int, given: float | None) -> float:
    """What the ridge is relative to; the hard form has none."""
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r}; modes are {', '.join(MODES)}")
    if mode == "hard":
        return 0.0
    if given is not None:
        return given
    return float(dimensions) if mode == "soft" else float(gram.diagonal().mean())


def _factors(weights: Tensor, wanted: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """weights [N, d_out] as mixing [N, r] @ right [r, d_out]; r is the rank of the residuals, or the cap."""
    u, s, v = torch.linalg.svd(weights, full_matrices=False)
    true = int((s > s[0] * 1e-12).sum()) if s.numel() and s[0] > 0 else 0
    keep = max(1, true if rank is None else min(rank, true))
    return u[:, :keep] * s[:keep], v[:keep]


def _shares(moved: Tensor, wanted: Tensor) -> Tensor:
    square = (wanted * wanted).sum(1)
    # A column that asks for nothing is fully served by nothing.
    return torch.where(square > 0, (moved * wanted).sum(1) / square.clamp_min(1e-300), torch.ones_like(square))


def _leaks(moved: Tensor, wanted: Tensor) -> Tensor:
    return moved.norm(dim=1) / wanted.norm(dim=1).mean().clamp_min(1e-300)


def _condition(system: Tensor) -> float:
    values = torch.linalg.eigvalsh(system)
    return float(values[-1] / values[0]) if values[0] > 0 else float("inf")


def _refuse_nan(keys: Mapping[str, Tensor], residuals: Tensor) -> None:
    for name, tensor in [*keys.items(), ("residuals", residuals)]:
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: keys or residuals hold NaN or infinity; the model overflows on these prompts")


def compress(rows: Tensor, *, tolerance: float = 1e-3, limit: int | None = None) -> Tensor:
    """Fewest orthogonal rows [r, d] whose span holds all but `tolerance` of the energy of `rows` [n, d].

    Protecting the span is protecting every row; many near-copies of a key become one column.
    """
    if len(rows) == 0:
        return rows
    _, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    left_over = 1 - (s**2).cumsum(0) / (s**2).sum().clamp_min(1e-300)
    keep = int((left_over > tolerance).sum()) + 1
    keep = min(keep, limit) if limit else keep
    return s[:keep, None] * v[:keep]
