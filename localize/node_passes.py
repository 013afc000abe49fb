"""Forward passes that keep what the nodes of a network show, and gradients of a metric at it.

Activations are read by hooks, queries and keys inside the attention function, experts by their keys.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from excise.attention import Attention, attention_seen
from excise.keys import consumed
from excise.model import Model
from excise.restore import HOOKS, Runs, answer_metrics
from excise.trace import patched
from localize.nodes import EMBED, PATTERN, UNITS, Nodes


@dataclass
class Pass:
    """What one forward pass showed: the metric [n_rows], activations, and keys of experts (`excise.keys`)."""

    metric: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    routed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Reader:
    """Runs forward passes that keep what the nodes need, and takes gradients at it.

    dropped: the layer whose contribution to the residual stream passes no gradient back right now.
    """

    def __init__(self, model: Model, runs: Runs, nodes: Nodes, metric: str) -> None:
        self.model, self.runs, self.nodes, self.metric = model, runs, nodes, metric
        self.dropped: int | None = None

    def run(self, embedding: Tensor, *, clean: bool = False, grad: bool = False, drop: bool = False) -> Pass:
        """One pass from given token embeddings; drop: gradients can later be dropped layer by layer."""
        model, runs, seen = self.model, self.runs, Pass(torch.empty(0))
        ids = runs.clean if clean else runs.corrupt.flatten(0, 1)
        seen.values[EMBED] = embedding.detach().requires_grad_(grad)
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(grad))
            stack.enter_context(patched(model, self._patches(seen, drop)))
            if self.nodes.inside:
                stack.enter_context(attention_seen(model.hf, lambda layer, a: self._look(seen, layer, a)))
            if layers := self.nodes.routed(model):
                stack.enter_context(
                    consumed(model, layers, lambda name, rows, token: seen.routed.update({name: (rows, token)}))
                )
            logits = model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]
            answer, foil = (x.repeat_interleave(len(ids) // runs.shape[0]) for x in (runs.answer, runs.foil))
            seen.metric = answer_metrics(logits, answer, foil)[self.metric].double()
        return seen

    def _look(self, seen: Pass, layer: int, attention: Attention) -> None:
        seen.attention[layer] = attention
        inside = {UNITS[u]: getattr(attention, u) for u in ("query", "key", "value")} | {PATTERN: attention.weights}
        seen.values |= {f"blocks.{layer}.{hook}": x for hook, x in inside.items()}

    def _patches(self, seen: Pass, drop: bool) -> dict[str, Callable[[Tensor], Tensor | None]]:
        writes = [f"blocks.{i}.{HOOKS[c]}" for i in range(self.model.n_layers) for c in ("attn", "mlp")] if drop else []
        kept = self.nodes.taps(self.model)

        def look(name: str) -> Callable[[Tensor], None]:
            def inner(x: Tensor) -> None:
                if name in kept:
                    seen.values[name] = x
                if name in writes:
                    layer = int(name.split(".")[1])
                    x.register_hook(lambda g: torch.zeros_like(g) if self.dropped == layer else None)

            return inner

        return {EMBED: lambda _: seen.values[EMBED], **{name: look(name) for name in dict.fromkeys([*kept, *writes])}}

    def gradient(self, seen: Pass, *, keep: bool = False) -> dict[str, Tensor]:
        """Gradients of the metric at everything that was kept; zeros where it does not depend on it."""
        values = list(seen.values.values())
        found = torch.autograd.grad(seen.metric.sum(), values, retain_graph=keep, allow_unused=True)
        # What the dropped layer writes is upstream of the cut; the gradient is captured there before it is dropped.
        cut = {f"blocks.{self.dropped}.{HOOKS[c]}" for c in ("attn", "mlp")}
        each = zip(seen.values.items(), found, strict=True)
        return {n: torch.zeros_like(x) if g is None or n in cut else g for (n, x), g in each}

    def mean_gradient(self, clean: Pass, corrupt: Pass, steps: int) -> dict[str, Tensor]:
        """The gradient at the corrupted run, or with steps its mean over midpoints of the way to the clean one."""
        if not steps:
            return self.gradient(corrupt)
        start = corrupt.values[EMBED]
        line = clean.values[EMBED].repeat_interleave(self.runs.shape[1], 0) - start
        total: dict[str, Tensor] = {}
        for k in range(steps):
            found = self.gradient(self.run(start + (k + 0.5) / steps * line, grad=True))
            total = {name: g / steps + total.get(name, 0) for name, g in found.items()}
        return total


@torch.no_grad()
def embedded(model: Model, runs: Runs, clean: bool) -> Tensor:
    """Token embeddings of the clean rows, or of the corrupted ones with their noise, [n_rows, n_tokens, d]."""
    embed = model.hf.get_submodule(model.names.embed)
    if clean or runs.noise is None:
        return embed(runs.clean if clean else runs.corrupt.flatten(0, 1))
    x = embed(runs.corrupt.flatten(0, 1))
    x[:, runs.noise_start : runs.noise_start + runs.noise.shape[2]] += runs.noise.flatten(0, 1).to(x)
    return x
