"""Muon for the matrices inside the blocks, AdamW for everything else.

Muon replaces the gradient momentum of a matrix by the nearest semi-orthogonal matrix, computed with a few
Newton-Schulz steps; matrices of one shape are stacked and treated together, expert tensors one expert at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (..., rows, columns) with all singular values pushed to about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Momentum with orthogonalised updates, scaled so that one learning rate serves Muon and AdamW."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95) -> None:
        self.momentum = momentum
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self.groups[tuple(parameter.shape)].append(parameter)
        self.velocity = {p: torch.zeros_like(p) for group in self.groups.values() for p in group}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its gradient and clear the gradient."""
        for shape, parameters in self.groups.items():
            wanted = []
            for parameter in parameters:
                assert parameter.grad is not None
                velocity = self.velocity[parameter].mul_(self.momentum).add_(parameter.grad)
                wanted.append(parameter.grad + self.momentum * velocity)
            scale = 0.2 * math.sqrt(max(shape[-2:]))
            for parameter, update in zip(parameters, orthogonalise(torch.stack(wanted)), strict=True):
                parameter.add_(update, alpha=-learning_rate * scale)
                parameter.grad = None


class Optimiser:
    """Both optimisers behind one `step(learning_rate)`."""

    def __init__(self, model: nn.Module) -> None:
        inside = {name: p for name, p in model.named_parameters() if _is_block_matrix(name, p)}
        rest = [p for name, p in model.named_parameters() if name not in inside]
        self.muon = Muon(inside.values())
        self.adamw = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0, fused=True)

    def step(self, learning_rate: float) -> None:
        """One update of all parameters; gradients are cleared."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.muon.step(learning_rate)


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    outside = ("embed_tokens", "lm_head", "mlp.gate.")
    return parameter.ndim >= 2 and not any(part in name for part in outside)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int, decay_share: float) -> float:
    """Linear warm-up, flat, then linear to zero over the last `decay_share` of the steps."""
    if step < warmup:
        return peak * (step + 1) / warmup
    decay = max(1, int(steps * decay_share))
    return peak * min(1.0, (steps - step) / decay)
