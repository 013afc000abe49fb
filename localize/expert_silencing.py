"""Silencing experts: gates on the routing weights of a Mixture-of-Experts model, and the exact cost of closing one.

Closing the gate of an expert leaves the router's choice and the other experts' weights as they are: nothing is
renormalised, and nothing is routed elsewhere in the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise.blocks import Blocks, Unsupported, capture, refuse_states
from excise.encoding import Batch
from excise.errors import ExciseError
from excise.gradients import answer_losses
from excise.model import Model
from excise.routers import Look, expert_layers, routed
from excise.sites import Site
from excise.trace import patched

# logits [tokens, E], weights [tokens, k], indices [tokens, k] -> new weights, or None to leave them
Gate = Callable[[Tensor, Tensor, Tensor], "Tensor | None"]
# (block, expert); the number after the last routed expert stands for the shared one
Cell = tuple[int, int]


def expert_blocks(model: Model) -> list[int]:
    """The blocks that have routed experts. Raises ExciseError for a dense model."""
    found = expert_layers(model)
    if not found:
        raise ExciseError(f"{model.name} has no experts: it is no Mixture-of-Experts model; score neurons or heads")
    return found


def expert_site(model: Model, layer: int, expert: int) -> Site:
    """The site that stands for an expert: the matrix it writes with, whose removal silences it."""
    shared = expert == model.names.n_experts
    return Site(f"blocks.{layer}.mlp.{'shared_expert' if shared else f'experts.{expert}'}.W_out")


def has_shared(model: Model, layer: int) -> bool:
    """True when the block has an expert that serves every token beside the routed ones."""
    return f"blocks.{layer}.mlp.shared_expert.W_out" in model.names.weights(layer)


@contextmanager
def gated(model: Model, gates: Mapping[int, Gate], shared: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, the routing weights of a block are what its gate makes of them, and its shared expert's output likewise.

    The choice of experts and the weights of the others stay as they are: nothing is renormalised.
    """

    def look(gate: Gate) -> Look:
        def weigh(logits: Tensor, weights: Tensor, indices: Tensor) -> tuple[Tensor, Tensor] | None:
            new = gate(logits, weights, indices)
            return None if new is None else (new, indices)

        return weigh

    changes = {f"blocks.{i}.mlp.shared_expert.hook_out": f for i, f in shared.items()}
    with routed(model, {layer: look(gate) for layer, gate in gates.items()}), patched(model, changes):
        yield


def silenced(model: Model, layer: int, expert: int) -> Any:
    """A context in which one expert's routing weight is 0 at every token (or the shared expert's output is)."""
    if expert == model.names.n_experts:
        return gated(model, {}, {layer: torch.zeros_like})
    return gated(model, {layer: lambda logits, weights, indices: weights.masked_fill(indices == expert, 0)}, {})


class _Straight:
    """A cache for whole rows: hands keys and values back as they come."""

    column = 0

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def silencing(model: Model, batch: Batch, cells: Sequence[tuple[int, Cell]], *, tokens: int) -> tuple[np.ndarray, str]:
    """What the loss of a row gains when a cell is silenced for it, for (row, cell) pairs, [n]; rows of one length.

    One batch walks up the blocks and grows: a pair joins at its own block, where all below is as it was. Also returns why
    whole forward passes were needed; "" where they were not. tokens: of one batch.
    """
    try:
        refuse_states(model)
        seen = capture(model, batch.ids, (), cache=True)
        blocks = Blocks(model, seen)
        blocks.checked(0)
    except Unsupported as why:
        return _silencing_by_passes(model, batch, cells), str(why)
    blocks.prefix = _Straight()  # type: ignore[assignment]
    order = sorted(range(len(cells)), key=lambda i: cells[i][1])
    size = max(1, tokens // batch.ids.shape[1])
    found = np.zeros(len(cells))
    with torch.no_grad():
        clean = _losses(blocks, seen.inputs[-1], batch, range(len(batch)))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            rows = [cells[i][0] for i in some]
            hidden = _climb(model, blocks, rows, [cells[i][1] for i in some])
            found[some] = (_losses(blocks, hidden, batch, rows) - clean[rows]).double().cpu().numpy()
    return found, ""


def _climb(model: Model, blocks: Blocks, rows: Sequence[int], cells: Sequence[Cell]) -> Tensor:
    """The last block's output [n, width, d] for pairs of rows and cells in ascending order of blocks."""
    n, width = model.names.n_experts, blocks.n_tokens
    layers = torch.tensor([layer for layer, _ in cells])
    experts = torch.tensor([expert for _, expert in cells])
    state = {"off": experts}

    def gate(logits: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        off = state["off"].to(indices.device).repeat_interleave(width)
        return weights.masked_fill(indices == off[:, None], 0)

    def mute(x: Tensor) -> Tensor:
        on = (state["off"] != n).to(x.device, x.dtype)
        return (x.reshape(len(on), -1, x.shape[-1]) * on[:, None, None]).view_as(x)

    routed = set(expert_blocks(model))
    hidden = blocks.seen.inputs[0][:0]
    for layer in range(cells[0][0], model.n_layers):
        joining = [row for row, cell in zip(rows, cells, strict=True) if cell[0] == layer]
        hidden = torch.cat([hidden.to(blocks.seen.inputs[layer].device), blocks.seen.inputs[layer][joining]])
        here = layers[: len(hidden)] == layer
        state["off"] = torch.where(here, experts[: len(hidden)], -1)
        busy = bool(here.any()) and layer in routed
        shared = {layer: mute} if busy and has_shared(model, layer) else {}
        with gated(model, {layer: gate} if busy else {}, shared):
            hidden = blocks(layer, hidden, 0)
    return hidden


def _losses(blocks: Blocks, hidden: Tensor, batch: Batch, rows: Sequence[int]) -> Tensor:
    """Mean loss of the answers of `rows`, [n], from the last block's output [n, width, d]."""
    spans = [(batch.starts[row], batch.lengths[row]) for row in rows]
    states = torch.cat([x[a - 1 : b - 1] for x, (a, b) in zip(hidden, spans, strict=True)])
    logits = blocks.logits(states)
    targets = torch.cat([batch.answer(row) for row in rows]).to(logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return torch.stack([part.mean() for part in losses.split([b - a for a, b in spans])])


@torch.no_grad()
def _silencing_by_passes(model: Model, batch: Batch, cells: Sequence[tuple[int, Cell]]) -> np.ndarray:
    """The same by one forward pass over all rows for each cell."""
    clean, found = answer_losses(model, batch), np.zeros(len(cells))
    for cell in sorted({cell for _, cell in cells}):
        with silenced(model, *cell):
            gain = (answer_losses(model, batch) - clean).double().cpu().numpy()
        for i, (row, other) in enumerate(cells):
            if other == cell:
                found[i] = gain[row]
    return found
