"""Carrying out an edit: `applied` for a block of code, `bake` into the weights with an exact way back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from excise.actions import Abstain, ActivationAction, LowRank, WeightAction
from excise.checks import check
from excise.edits import Change, Edit
from excise.errors import ExciseError, NotBakeable
from excise.running import Running
from excise.trace import patched

if TYPE_CHECKING:
    from excise.model import Model


@contextmanager
def applied(model: Model, edit: Edit, *, force: bool = False) -> Iterator[Running]:
    """Run everything inside the block under the edit; on leaving, also by an exception, the model is as it was, to the bit.

    Weight changes run beside the untouched matrix; where no linear layer can be hooked (fused experts, embeddings) the
    slice is swapped and put back. Blocks nest. Raises FingerprintMismatch when the edit was made for other weights
    (unless `force`), UnknownName for a site this model does not have, ExciseError for offloaded weights.
    """
    check(model, edit, force=force)
    running = Running(model, len(edit.changes))
    with ExitStack() as stack:
        handle = model.hf.register_forward_pre_hook(running.begin, with_kwargs=True)
        stack.callback(handle.remove)
        for gate in {id(c.gate): c.gate for c in edit.changes if c.gate is not None}.values():
            stack.enter_context(patched(model, {gate.site.point: _judging(running, gate)}))
        for i, change in enumerate(edit.changes):
            stack.enter_context(
                _weight_change(model, running, i, change)
                if change.site.is_weight
                else _activation_change(model, running, i, change)
            )
        yield running


def _judging(running: Running, gate: Any) -> Any:
    def judge(x: Tensor) -> None:
        with _fitting(f"the gate at {gate.site}", x):
            running.judge(gate, x)

    return judge


@contextmanager
def _fitting(what: str, x: Tensor) -> Iterator[None]:
    """Say so in one line when an edit's tensors do not fit the activations that they meet."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ExciseError(
            f"{what} does not fit activations of width {x.shape[-1]} ({error}); load the model that the edit was made for"
        ) from error


# activations


@contextmanager
def _activation_change(model: Model, running: Running, index: int, change: Change) -> Iterator[None]:
    action = change.action
    assert isinstance(action, ActivationAction)

    def patch(x: Tensor, token: Tensor | None = None) -> Tensor | None:
        if token is not None:
            return _expert_rows(running, index, change, action, x, token)
        grouped = x.dim() == 2  # routers see [batch * width, experts]
        wide = x[None] if grouped else x
        where = _tokens(running, change, wide) if not grouped else None
        if where is not None and not where.any():
            return None
        with _fitting(f"the {action.kind} change at {change.site}", wide):
            new = action.force(wide, running.history(wide.shape[1])) if isinstance(action, Abstain) else action(wide)
        running.fired[index] += int(where.sum()) if where is not None else wide.shape[0] * wide.shape[1]
        if where is not None:
            new = torch.where(where[..., None], new, wide)
        return new[0] if grouped else new

    with patched(model, {change.site.point: patch}, tokens=True):
        yield


def _expert_rows(
    running: Running, index: int, change: Change, action: ActivationAction, rows: Tensor, token: Tensor
) -> Tensor | None:
    """The new neurons of one expert at the tokens routed to it; None where all of them stay."""
    where = _tokens(running, change, running.ids[..., None])
    chosen = torch.ones_like(token, dtype=torch.bool) if where is None else where.reshape(-1)[token]
    running.fired[index] += int(chosen.sum())
    if not chosen.any():
        return None
    return torch.where(chosen[:, None], action(rows), rows)


def _tokens(running: Running, change: Change, x: Tensor) -> Tensor | None:
    where = running.after_bos(x) if change.site.position == "after_bos" else None
    if change.gate is not None:
        opened = running.open(change.gate, x.shape[1])
        where = opened if where is None else where & opened
    return where


# weights


@contextmanager
def _weight_change(model: Model, running: Running, index: int, change: Change) -> Iterator[None]:
    name, action = change.site.point, change.action
    assert isinstance(action, WeightAction)
    module = linear_module(model, name)
    pending = model.active.setdefault(name, [])
    if module is not None:
        delta = None if isinstance(action, LowRank) else action.delta(current(model, name))
        handle = module.register_forward_hook(_side_path(model, running, index, change, delta))
        undo = handle.remove
    elif change.gate is not None:
        raise ExciseError(
            f"{change.site}: a gated change needs a linear layer of its own, and this matrix is part of a fused one; use it without gate"
        )
    else:
        undo = _swap(model, name, action)
        running.fired[index] = -1
    pending.append(change)
    try:
        yield
    finally:
        pending.remove(change)
        undo()


def _side_path(model: Model, running: Running, index: int, change: Change, delta: Tensor | None) -> Any:
    part = model.names.weight(change.site.point).part
    weight = model.weight(change.site.point)
    parts = (change.action.left, change.action.right) if isinstance(change.action, LowRank) else (delta,)
    factors = [t.to(weight.device, weight.dtype) for t in parts if t is not None]

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        gain = args[0]
        for factor in factors:
            gain = gain @ factor.to(gain.dtype)
        if change.gate is not None:
            where = running.open(change.gate, gain.shape[1])
            running.fired[index] += int(where.sum())
            gain = torch.where(where[..., None], gain, torch.zeros_like(gain))
        else:
            running.fired[index] += gain[..., 0].numel()
        if part is None:
            return output + gain
        new = output.clone()
        new[..., part] += gain
        return new

    return hook


def linear_module(model: Model, name: str) -> nn.Module | None:
    """The linear layer whose output is x @ W for this matrix alone; None for experts, routers and (tied) embeddings."""
    weight = model.names.weight(name)
    module = model.hf.get_submodule(weight.module)
    if weight.expert is not None or not isinstance(module, (nn.Linear, Conv1D)):
        return None
    tied = model.hf.get_input_embeddings().weight is getattr(module, "weight", None)
    return None if tied else module


def current(model: Model, name: str) -> Tensor:
    """The matrix [d_in, d_out] with all weight changes that run as hooks right now, in float32."""
    weight = model.weight(name).detach().float()
    for change in model.active.get(name, []) if linear_module(model, name) is not None else []:
        weight = weight + change.action.delta(weight)
    return weight


def _swap(model: Model, name: str, action: WeightAction) -> Any:
    view = model.weight(name)
    kept = view.detach().clone()
    first = name not in model.originals
    if first:
        model.originals[name] = model.matrix_fingerprint(name)

    def undo() -> None:
        with torch.no_grad():
            view.copy_(kept)
        if first:
            del model.originals[name]

    _write(view, action)
    return undo


def _write(view: Tensor, action: WeightAction) -> None:
    with torch.no_grad():
        view.copy_((view.float() + action.delta(view).float()).to(view.dtype))


@dataclass
class Baked:
    """A baked edit. Keeps the exact old bytes of every touched matrix; dropping the object leaves the edit in place."""

    model: Model
    edit: Edit
    _kept: dict[str, Tensor]

    def revert(self) -> None:
        """Put the old bytes back. A second call does nothing."""
        with torch.no_grad():
            for name, old in self._kept.items():
                self.model.weight(name).copy_(old)
        self._kept = {}


def bake(model: Model, edit: Edit, *, force: bool = False) -> Baked:
    """Write the edit into the weights; `Baked.revert()` undoes it exactly.

    Raises NotBakeable, naming the sites, when a change lives in activations or behind a gate; then nothing is written.
    """
    stuck = [str(c.site) for c in edit.changes if not c.bakeable]
    if stuck:
        raise NotBakeable(
            f"{len(stuck)} changes live in activations or behind a gate and cannot be baked: {', '.join(stuck)}; use applied()"
        )
    check(model, edit, force=force)
    kept = {name: model.weight(name).detach().clone() for name in dict.fromkeys(c.site.point for c in edit.changes)}
    baked = Baked(model, edit, kept)
    try:
        for change in edit.changes:
            assert isinstance(change.action, WeightAction)
            _write(model.weight(change.site.point), change.action)
    except BaseException:
        baked.revert()
        raise
    return baked
