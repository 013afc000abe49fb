"""Keys: the vectors that enter the matrices which write an MLP's output, dense and Mixture-of-Experts alike.

A block's MLP output is a sum over its write matrices of key @ W_out. In a dense block there is one, and the key is the
neuron vector. In a Mixture-of-Experts block there is one per expert, and its key is the expert's neurons times the router
weight, zero where the token is not routed to it; a shared expert's key counts as much as its gate says, where it has one.
So one linear algebra serves all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.experts import expert_neurons
from excise.memo import reading
from excise.trace import _Enough, patched

if TYPE_CHECKING:
    from excise.facts import Prompt
    from excise.model import Model

# (matrix name, keys [rows, d_in], token index [rows] into the flattened batch)
Consumer = Callable[[str, Tensor, Tensor], None]


def write_matrices(model: Model, layer: int) -> list[str]:
    """Names of the matrices that write block `layer`'s MLP output straight into the residual stream.

    Raises ExciseError for blocks whose MLP output passes another norm first (Gemma-2/3, OLMo-2): what is written there is
    not what arrives.
    """
    names = set(model.names.weights(layer))
    if _normed_after(model, layer):
        raise ExciseError(
            f"{model.name}: the MLP output of block {layer} passes a norm before it joins the residual stream; this method needs to write to it directly"
        )
    dense = f"blocks.{layer}.mlp.W_out"
    if dense in names:
        return [dense]
    written = [*(f"blocks.{layer}.mlp.experts.{e}.W_out" for e in range(model.names.n_experts)), shared_expert(layer)]
    found = [n for n in written if n in names]
    if not found:
        raise ExciseError(
            f"{model.name}: block {layer} has no MLP output matrix that excise knows; see `excise doctor`"
        )
    return found


def shared_expert(layer: int) -> str:
    """Name of the matrix that a block's shared expert writes with, in models that have one."""
    return f"blocks.{layer}.mlp.shared_expert.W_out"


def _normed_after(model: Model, layer: int) -> bool:
    """True when the tap of the MLP output is a norm's."""
    return "norm" in model.names.tap(f"blocks.{layer}.hook_mlp_out").module.rsplit(".", 1)[-1]


@contextmanager
def consumed(model: Model, layers: Sequence[int], consumer: Consumer) -> Iterator[None]:
    """Hand the keys of the given blocks to `consumer` during every forward pass inside the block."""
    dense: dict[str, Callable[[Tensor], None]] = {}
    routed: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {}
    for layer in layers:
        names = write_matrices(model, layer)
        if len(names) == 1 and ".experts." not in names[0]:
            dense[str(model.names.weight(names[0]).reads)] = _whole(names[0], consumer)
        else:
            module = model.names.tap(f"blocks.{layer}.mlp.experts.0.hook_post").module
            routed[module] = _by_expert(layer, consumer)
            if shared_expert(layer) in names:
                dense |= _shared(model, layer, consumer)
    with ExitStack() as stack:
        stack.enter_context(patched(model, dense))
        if routed:
            stack.enter_context(expert_neurons(model.hf, routed))
        yield


def _whole(name: str, consumer: Consumer) -> Callable[[Tensor], None]:
    def look(x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1])
        consumer(name, rows, torch.arange(len(rows), device=rows.device))

    return look


def _shared(model: Model, layer: int, consumer: Consumer) -> dict[str, Callable[[Tensor], None]]:
    """Hooks that hand over the keys of a shared expert: its neurons, times the gate that speaks after them (Qwen2-MoE)."""
    name, gate, held = shared_expert(layer), f"blocks.{layer}.mlp.shared_expert_gate.hook_out", []
    reads = str(model.names.weight(name).reads)
    if gate not in model.names.points(layer):
        return {reads: _whole(name, consumer)}

    def keep(x: Tensor) -> None:
        held.append(x.detach().reshape(-1, x.shape[-1]))

    def look(x: Tensor) -> None:
        rows = held.pop() * x.detach().reshape(-1, 1).sigmoid()
        consumer(name, rows, torch.arange(len(rows), device=rows.device))

    return {reads: keep, gate: look}


def _by_expert(layer: int, consumer: Consumer) -> Callable[[Tensor, Tensor, Tensor], None]:
    def look(neurons: Tensor, experts: Tensor, weights: Tensor) -> None:
        for expert in experts.unique().tolist():
            token, slot = (experts == expert).nonzero(as_tuple=True)
            keys = neurons[token, slot].detach() * weights[token, slot, None].to(neurons.dtype)
            consumer(f"blocks.{layer}.mlp.experts.{expert}.W_out", keys, token)

    return look


@reading
def read_keys(
    model: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    rule: str = "subject_last",
    points: Sequence[str] = (),
) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
    """Keys and activations at one token of each prompt, in one early-stopped pass.

    Returns, per layer, the keys of each write matrix [n_prompts, d_in] (zero where not routed; matrices that no prompt
    reaches are left out), and for each extra point the activation [n_prompts, d]; float32, on the CPU.
    rule: a position rule that picks one token.
    """
    keys: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    states = {p: torch.empty(0) for p in points}
    for index, batch in model.batches(prompts):
        flat = _token_index(batch, rule)
        seen: set[str] = set()

        def keep(name: str, rows: Tensor, token: Tensor, index: list[int] = index, flat: Tensor = flat) -> None:
            layer = int(name.split(".")[1])
            hit, at = (token[:, None] == flat.to(token.device)[None]).nonzero(as_tuple=True)
            if len(hit):
                store = keys[layer].setdefault(name, torch.zeros(len(prompts), rows.shape[-1]))
                store[[index[i] for i in at.tolist()]] = rows[hit].float().cpu()

        def look(
            point: str, index: list[int] = index, flat: Tensor = flat, seen: set[str] = seen
        ) -> Callable[[Tensor], None]:
            def inner(x: Tensor) -> None:
                if not states[point].numel():
                    states[point] = torch.zeros(len(prompts), x.shape[-1])
                states[point][index] = x.detach().reshape(-1, x.shape[-1])[flat.to(x.device)].float().cpu()
                seen.add(point)
                if len(seen) == len(states):
                    raise _Enough

            return inner

        with torch.no_grad(), consumed(model, layers, keep), patched(model, {p: look(p) for p in points}):
            try:
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
            except _Enough:
                pass
    return keys, states


def _token_index(batch: Batch, rule: str) -> Tensor:
    """Flat token index [n_rows] of the one token per row that a rule picks."""
    where = batch.where(rule)
    if not bool((where.sum(1) == 1).all()):
        raise ValueError(f"position rule {rule!r} must pick exactly one token of every prompt here")
    return where.reshape(-1).nonzero()[:, 0]


def contribution(keys: dict[str, Tensor], model: Model) -> Tensor:
    """What the keys write, sum over matrices of key @ W_out, [n, d_model] in float32 (biases left out)."""
    parts = [k.to(model.weight(name).device) @ model.weight(name).detach().float() for name, k in keys.items()]
    return torch.stack(parts).sum(0).cpu()


__all__ = ["consumed", "contribution", "read_keys", "shared_expert", "write_matrices"]
