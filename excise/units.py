"""One unit put back exactly: the reference for first-order estimates of heads, neurons and experts.

A forward pass over clean and corrupted rows side by side, in which the unit takes its clean value in the corrupted rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from excise.keys import consumed
from excise.model import Model
from excise.restore import Runs, mean_metrics, noisy_embedding
from excise.sites import Site
from excise.trace import patched

_EXPERT = re.compile(r"^(blocks\.(\d+)\.mlp\.(?:experts\.\d+|shared_expert))\.hook_post$")
HEADS = ("attn.hook_z", "attn.hook_q", "attn.hook_k", "attn.hook_v")


def restored_unit(model: Model, runs: Runs, site: Site, where: Tensor) -> dict[str, np.ndarray]:
    """Mean metrics [n_facts] of the corrupted rows when the unit of `site` is clean at the tokens in `where`.

    where: mask [n_facts, n_tokens]. The unit is a head of `attn.hook_z` (or of queries, keys, values where a module shows
    them), a column of any other activation, the whole activation without a unit, and for
    `blocks.i.mlp.experts.e.hook_post` or `...shared_expert.hook_post` the expert's neuron or the whole expert, times its
    router weight or gate.
    """
    facts, draws, _ = runs.shape
    ids = torch.cat([runs.clean[:, None], runs.corrupt], 1).flatten(0, 1)
    places = where[:, None, :, None].to(ids.device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(noisy_embedding(model, runs, skip=1))
        routed = _EXPERT.match(site.point)
        if routed:
            name = f"{routed[1]}.W_out"
            stack.enter_context(_expert(model, int(routed[2]), name, site.unit, places, (facts, 1 + draws)))
        else:
            stack.enter_context(patched(model, {site.point: _clean(model, site, places, (facts, 1 + draws))}))
        logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    found = mean_metrics(logits.view(facts, 1 + draws, -1)[:, 1:].flatten(0, 1), runs)
    return {name: x[0] for name, x in found.items()}


def _clean(model: Model, site: Site, places: Tensor, rows: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    def write(x: Tensor) -> Tensor:
        new = x.reshape(*rows, places.shape[2], -1)
        chosen = torch.zeros(new.shape[-1], dtype=torch.bool, device=x.device)
        chosen[_columns(model, site, len(chosen))] = True
        return torch.where(places & chosen, new[:, :1], new).view_as(x)

    return write


def _columns(model: Model, site: Site, width: int) -> slice:
    if site.unit is None:
        return slice(None)
    if not site.point.endswith(HEADS):
        return slice(site.unit, site.unit + 1)
    d_head = model.weight(f"blocks.{site.layer}.attn.W_O").shape[0] // model.names.n_heads
    return slice(site.unit * d_head, (site.unit + 1) * d_head)


def _expert(model: Model, layer: int, name: str, unit: int | None, places: Tensor, rows: tuple[int, int]) -> ExitStack:
    """Hooks that add to the block's output what the expert wrote in the clean row less what it wrote in the broken one."""
    written: list[tuple[Tensor, Tensor]] = []

    def keep(matrix: str, keys: Tensor, token: Tensor) -> None:
        if matrix == name:
            units = slice(None) if unit is None else slice(unit, unit + 1)
            written.append((keys[:, units] @ model.weight(name)[units].to(keys), token))

    def write(x: Tensor) -> Tensor:
        out = x.new_zeros(x.reshape(-1, x.shape[-1]).shape)
        for value, token in written:
            out[token] = value.to(out)
        parts = out.view(*rows, places.shape[2], -1)
        return x + torch.where(places, parts[:, :1] - parts, 0).view_as(x)

    stack = ExitStack()
    stack.enter_context(consumed(model, [layer], keep))
    stack.enter_context(patched(model, {f"blocks.{layer}.hook_mlp_out": write}))
    return stack
