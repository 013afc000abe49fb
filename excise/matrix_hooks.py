"""Hooks on matrices: the rows that enter each, and the gradients that come back, handed over as they pass.

Fused experts included, whose rows are told apart by the router's choice. Nothing is kept here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.experts import expert_neurons
from excise.matrices import Weight
from excise.trace import patched

if TYPE_CHECKING:
    from excise.model import Model

# (matrix name, x [rows, n, d_in], dy [rows, n, d_out]); n counts tokens, or for an expert the tokens it got. Padding is
# zero in dy, and in a forward pass alone, where dy is None, in x.
Consumer = Callable[[str, Tensor, "Tensor | None"], None]


@contextmanager
def passing(
    model: Model, batch: Batch, names: Sequence[str], consumer: Consumer, where: Tensor | None
) -> Iterator[None]:
    """Hooks for a backward pass, or, with the tokens that count in `where`, for a forward pass alone."""
    modules: dict[str, list[Weight]] = {}
    experts: dict[int, list[Weight]] = {}
    for weight in map(model.names.weight, names):
        if weight.name.endswith("W_router"):
            raise ExciseError(f"{weight.name}: routers choose by rank, and the gradient of a choice says little of it")
        if weight.expert is None:
            modules.setdefault(weight.module, []).append(weight)
        else:
            experts.setdefault(weight.layer or 0, []).append(weight)
    with ExitStack() as stack:
        for path, weights in modules.items():
            hook = _linear(batch, weights, consumer, where)
            stack.callback(model.hf.get_submodule(path).register_forward_hook(hook).remove)
        for layer, weights in experts.items():
            stack.enter_context(_Experts(model, batch, weights, consumer, where).watching(layer))
        yield


def _linear(batch: Batch, weights: list[Weight], consumer: Consumer, where: Tensor | None) -> Callable[..., None]:
    shape = batch.ids.shape

    def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(*shape, -1)
        if where is not None:
            x = x * where[..., None].to(x)
            for weight in weights:
                consumer(weight.name, x, None)
            return

        def arrived(dy: Tensor) -> None:
            for weight in weights:
                part = dy if weight.part is None else dy[..., weight.part]
                consumer(weight.name, x, part.reshape(*shape, -1))

        output.register_hook(arrived)

    return hook


class _Experts:
    """The fused experts of one block: what enters each projection of each expert, and the gradient at what leaves it."""

    def __init__(
        self, model: Model, batch: Batch, weights: list[Weight], consumer: Consumer, where: Tensor | None
    ) -> None:
        self.model, self.consumer, self.backward = model, consumer, where is None
        self.kept = batch.mask.bool() if where is None else where
        self.path = weights[0].module
        self.up = [w for w in weights if not w.name.endswith("W_out")]
        self.down = [w for w in weights if w.name.endswith("W_out")]
        self.hidden = torch.empty(0)

    @contextmanager
    def watching(self, layer: int) -> Iterator[None]:
        module: Any = self.model.hf.get_submodule(self.path)
        if self.down and self.backward and getattr(module, "has_post_expert_norm", False):
            raise ExciseError(f"{self.model.name}: a norm follows every expert, so its W_out does not write directly")
        with ExitStack() as stack:
            if self.up:
                stack.enter_context(patched(self.model, {f"blocks.{layer}.mlp.hook_in": self._enter}))
                stack.enter_context(expert_neurons(self.model.hf, {self.path: self._pre}, before_activation=True))
            if self.down:
                stack.enter_context(expert_neurons(self.model.hf, {self.path: self._neurons}))
                stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, x: Tensor) -> None:
        self.hidden = x.detach().reshape(-1, x.shape[-1])

    def _pre(self, pre: Tensor, index: Tensor, weights: Tensor) -> None:
        hidden = self.hidden
        if self.backward:
            pre.register_hook(lambda dy: self._hand_over(self.up, lambda t, s: hidden[t], lambda t, s: dy[t, s], index))
        else:
            self._hand_over(self.up, lambda t, s: hidden[t], None, index)

    def _neurons(self, neurons: Tensor, index: Tensor, weights: Tensor) -> None:
        self.shown = neurons.detach(), index, weights.detach()
        if not self.backward:
            # An expert's output counts as much as the router says, and so does what goes in.
            self._hand_over(self.down, lambda t, s: neurons[t, s] * weights[t, s, None].to(neurons), None, index)

    def _leave(self, module: Any, args: Any, output: Tensor) -> None:
        if not self.backward:
            return
        neurons, index, weights = self.shown

        def arrived(dy: Tensor) -> None:
            rows = dy.reshape(-1, dy.shape[-1])
            self._hand_over(
                self.down,
                lambda t, s: neurons[t, s],
                lambda t, s: rows[t] * weights[t, s, None].to(rows),
                index,
            )

        output.register_hook(arrived)

    def _hand_over(
        self,
        wanted: list[Weight],
        x_of: Callable[[Tensor, Tensor], Tensor],
        dy_of: Callable[[Tensor, Tensor], Tensor] | None,
        index: Tensor,
    ) -> None:
        rows, width = self.kept.shape
        by_expert: dict[int, list[Weight]] = {}
        for weight in wanted:
            by_expert.setdefault(int(weight.expert or 0), []).append(weight)
        real = self.kept.reshape(-1).to(index.device)
        for expert, weights in by_expert.items():
            token, slot = ((index == expert) & real[:, None]).nonzero(as_tuple=True)
            if not len(token):
                continue
            place = _places(token // width, rows)
            x = _packed(x_of(token, slot).detach(), place, rows)
            dy = None if dy_of is None else _packed(dy_of(token, slot), place, rows)
            for weight in weights:
                part = dy if dy is None or weight.part is None else dy[..., weight.part]
                self.consumer(weight.name, x, part)


def _places(owner: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row and column of each of n ascending owners [n] in a table with one line per row."""
    counts = torch.bincount(owner, minlength=rows)
    starts = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=owner.device) - starts[owner]


def _packed(x: Tensor, place: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """Rows [n, d] as [rows, most, d], zeros where a row has fewer."""
    out = x.new_zeros(rows, int(place[1].max()) + 1, x.shape[-1])
    out[place] = x
    return out
