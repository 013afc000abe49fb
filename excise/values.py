"""The change of state that each name is to get: by gradient descent on one vector per name, or from made-up names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.gradients import answer_losses, frozen
from excise.mentions import mentions
from excise.model import Model
from excise.redirection import redirect
from excise.rewriting import Names, name_states
from excise.trace import patched

# A name whose mean loss is below this says its target; it is not trained further (ROME).
ENOUGH = 0.05
# Weight of |delta|^2 / |state|^2 in the loss.
DECAY = 0.02
# Made-up names whose mean state is the training-free target.
NAMES = 32


def wanted_change(
    model: Model, names: Names, retain: Sequence[Fact], block: int, *, value: str, steps: int, clamp: float, seed: int
) -> tuple[Tensor, dict[str, Any]]:
    """What the state after `block` at the last token of each name shall gain, [n_names, d], and a report.

    value: "optimised" (see `optimised`) or "fictitious" (the mean state of made-up names, without training).
    """
    if value == "optimised":
        return optimised(model, names, block, steps=steps, clamp=clamp)
    if value != "fictitious":
        raise ValueError(f"no value {value!r}; values are optimised, fictitious")
    others = mentions(Facts(retain), limit=1)
    redirection = redirect(names.mentions, others, target="fictitious", names=NAMES, seed=seed)
    point = f"blocks.{block}.hook_resid_post"
    return names.mean(redirection.targets(model, point) - name_states(model, names, point)), {}


def optimised(
    model: Model, names: Names, block: int, *, steps: int, clamp: float, rate: float = 0.1
) -> tuple[Tensor, dict[str, Any]]:
    """The change [n_names, d] of the state after `block` under which each name's prompts are answered by their targets.

    Adam on the vectors alone, all names side by side (their losses have nothing in common); mean negative
    log-likelihood of the targets plus DECAY * |delta|^2 / |state|^2. A name that says its targets stops.
    steps: of Adam at most. clamp: bound of |delta| / |state|. rate: of Adam, relative to the state's mean coordinate.
    Raises ExciseError for a name that is asked nothing.
    """
    unasked = set(range(len(names.names))) - set(names.asker.tolist())
    if unasked:
        raise ExciseError(f"{names.names[min(unasked)]}: no prompt asks of it; give prompts, or use value='fictitious'")
    point, device = f"blocks.{block}.hook_resid_post", model.device
    size = names.mean(name_states(model, names, point).norm(dim=1, keepdim=True)).to(device)
    unit = size / model.names.d_model**0.5
    free = torch.zeros(len(size), model.names.d_model, device=device, requires_grad=True)  # in units of `unit`
    adam, live = torch.optim.Adam([free], lr=rate), torch.ones(len(size), dtype=torch.bool)
    loss = torch.full((len(size),), torch.inf)
    with frozen(model), torch.enable_grad():
        for step in range(steps + 1):
            adam.zero_grad()
            found = _backward(model, names, point, free * unit, live)
            loss = torch.where(live, found, loss)
            live = live & (loss >= ENOUGH)
            if step == steps or not bool(live.any()):
                break
            (DECAY * (free / model.names.d_model**0.5).square().sum()).backward()
            _step(adam, free, live.to(device), clamp * model.names.d_model**0.5)
    delta = (free * unit).detach().float().cpu()
    report = {"loss": [round(x, 4) for x in loss.tolist()], "steps": step, "clamped": _clamped(delta, size, clamp)}
    return delta, report


def _backward(model: Model, names: Names, point: str, delta: Tensor, live: Tensor) -> Tensor:
    """Mean loss of each live name's prompts [n_names] on the CPU; their sum's gradient is left in what delta came from."""
    rows = [i for i in range(len(names.asked)) if live[names.asker[i]]]
    counts = torch.bincount(names.asker, minlength=len(delta)).clamp_min(1)
    loss = torch.zeros(len(delta))
    gradient = torch.zeros_like(delta)
    leaf = delta.detach().requires_grad_(True)
    for index, batch in model.batches([names.asked[i] for i in rows], answers=True):
        owner = names.asker[[rows[i] for i in index]]
        with patched(model, {point: _adding(batch, leaf[owner.to(leaf.device)])}):
            losses = answer_losses(model, batch)
            losses = losses / counts[owner].to(losses.device)
        gradient += torch.autograd.grad(losses.sum(), leaf)[0]
        loss.index_add_(0, owner, losses.detach().float().cpu())
    delta.backward(gradient)
    return loss


def _adding(batch: Batch, rows: Tensor) -> Callable[[Tensor], Tensor]:
    at = batch.where("subject_last").to(rows.device)
    return lambda x: x + (at[..., None] * rows[:, None]).to(x)


def _step(adam: torch.optim.Adam, free: Tensor, live: Tensor, bound: float) -> None:
    """One step of the live rows, and back into the ball of radius `bound`."""
    before = free.detach().clone()
    adam.step()
    with torch.no_grad():
        free.mul_((bound / free.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp_max(1))
        free.copy_(torch.where(live[:, None], free, before))


def _clamped(delta: Tensor, size: Tensor, clamp: float) -> int:
    return int((delta.norm(dim=1) >= 0.999 * clamp * size[:, 0].cpu()).sum())
