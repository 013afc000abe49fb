"""First-order effects of every node of a network from one backward pass: states, heads, queries, neurons, experts.

What is read is `localize.node_passes`, the formulas are `localize.first_order`. What is scored for which fact is
`localize.attribution_patching`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from excise.features import scaling
from excise.gradients import frozen
from excise.keys import write_matrices
from excise.model import Model
from excise.restore import HOOKS, Runs
from localize.first_order import contracted, first_order, key_effects, query_effects, routed_gain
from localize.node_passes import Pass, Reader, embedded
from localize.nodes import EMBED, PATTERN, UNITS, Nodes
from sae.dictionary import ACTS


@dataclass(frozen=True)
class Attribution:
    """First-order effects, as means over the draws; magnitudes, averaged over dropped layers, with grad_drop.

    effects: state -> [n_facts, n_layers, n_tokens]. embed: of the token embeddings, [n_facts, n_tokens].
    units: (unit, activation), such as ("head", "blocks.3.attn.hook_z") -> [n_facts, n_rules, n_units].
    low, high: the metric of the corrupted and of the clean run, [n_facts]. clean: what the clean run showed,
    activation -> [n_facts, n_tokens, d]; routed: keys of experts in it, matrix -> (rows [n, f], token [n]).
    """

    effects: dict[str, np.ndarray]
    embed: np.ndarray
    units: dict[tuple[str, str], np.ndarray]
    low: np.ndarray
    high: np.ndarray
    clean: dict[str, Tensor]
    routed: dict[str, tuple[Tensor, Tensor]]


def attributions(
    model: Model,
    runs: Runs,
    nodes: Nodes | None = None,
    *,
    metric: str = "logit_diff",
    ig_steps: int = 0,
    grad_drop: bool = False,
) -> Attribution:
    """Effects of restoring every node, denoising direction (arXiv 2403.00745, section 2).

    ig_steps: 0 takes the gradient at the corrupted run; m > 0 its mean over m midpoints of the straight line between
        the corrupted and the clean token embeddings (EAP-IG, arXiv 2403.17806, section 3).
    grad_drop: one more backward pass per layer, through which that layer passes nothing back; means of magnitudes
        (section 3.1.2).
    """
    if grad_drop and ig_steps:
        raise ValueError("gradients are either dropped (grad_drop) or integrated (ig_steps), not both")
    nodes = nodes or Nodes()
    reader = Reader(model, runs, nodes, metric)
    with frozen(model):
        clean = reader.run(embedded(model, runs, True), clean=True)
        corrupt = reader.run(embedded(model, runs, False), grad=not ig_steps, drop=grad_drop)
        gains = _Gains(model, runs, nodes, clean, corrupt)
        if grad_drop:
            for layer in range(model.n_layers):
                reader.dropped = layer
                gains.add(reader.gradient(corrupt, keep=layer + 1 < model.n_layers), magnitudes=True)
        else:
            gains.add(reader.mean_gradient(clean, corrupt, ig_steps))
    return gains.means()


class _Gains:
    """What restoring each node brings back, summed over the gradients that are added."""

    def __init__(self, model: Model, runs: Runs, nodes: Nodes, clean: Pass, corrupt: Pass) -> None:
        self.model, self.runs, self.nodes, self.clean, self.corrupt = model, runs, nodes, clean, corrupt
        self.sums: dict[tuple[str, str], np.ndarray] = {}
        self.added: list[bool] = []

    def add(self, gradient: dict[str, Tensor], *, magnitudes: bool = False) -> None:
        """Add the gains under one gradient, or their magnitudes."""
        with torch.no_grad():
            for key, gain in self._gains(gradient):
                gain = gain.abs() if magnitudes else gain  # [facts, draws, ...]
                self.sums[key] = self.sums.get(key, 0) + gain.double().mean(1).cpu().numpy()
        self.added.append(magnitudes)

    def means(self) -> Attribution:
        """The effects. A layer's own contribution is not counted among the gradients dropped on its way (section 3.1.2)."""
        layers = len(self.added) if any(self.added) else 1

        def mean(unit: str, name: str) -> np.ndarray:
            own = not name.endswith((HOOKS["resid"], EMBED)) and layers > 1
            return self.sums[unit, name] / (layers - own)

        each = {c: [f"blocks.{i}.{HOOKS[c]}" for i in range(self.model.n_layers)] for c in self.nodes.states}
        effects = {c: np.stack([mean(c, name) for name in names], 1) for c, names in each.items()}
        units = {key: mean(*key) for key in self.sums if key[0] in UNITS}
        facts, taps = self.runs.shape[0], self.nodes.taps(self.model)
        low, high = (x.metric.detach().view(facts, -1).mean(1).cpu().numpy() for x in (self.corrupt, self.clean))
        clean = {
            name: x.detach().reshape(facts, self.runs.shape[2], -1)
            for name, x in self.clean.values.items()
            if name in taps
        }
        return Attribution(effects, mean(EMBED, EMBED), units, low, high, clean, self.clean.routed)

    def _gains(self, gradient: dict[str, Tensor]) -> Iterator[tuple[tuple[str, str], Tensor]]:
        yield (EMBED, EMBED), self._whole(EMBED, gradient).sum(-1)
        layers = range(self.model.n_layers)
        for state in self.nodes.states:
            for name in (f"blocks.{i}.{HOOKS[state]}" for i in layers):
                yield (state, name), self._whole(name, gradient).sum(-1)
        at = self.nodes.at
        if at is None:
            return
        for unit in self.nodes.units:
            for name, gain in self._units(unit, gradient):
                yield (unit, name), contracted(gain, at)
        yield from self._experts(gradient, at)

    def _units(self, unit: str, gradient: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Gains of units that every token has, [facts, draws, tokens, units]."""
        if unit == "feature":
            assert self.nodes.dictionary is not None
            hook = self.nodes.dictionary.hook
            yield f"{hook}.{ACTS}", self._features(gradient[hook])
            return
        for layer in range(self.model.n_layers):
            name = f"blocks.{layer}.{UNITS[unit]}"
            if name not in self.clean.values or unit == "expert":
                continue
            if unit == "neuron":
                yield name, self._whole(name, gradient)
            elif unit == "head":
                yield name, self._whole(name, gradient).unflatten(-1, (self.model.names.n_heads, -1)).sum(-1)
            elif unit == "value" or not self.nodes.exact_attention:
                yield name, self._by_draw(self._inside(name, gradient).sum(-1))
            else:
                yield name, self._by_draw(self._attended(unit, layer, gradient))

    def _whole(self, name: str, gradient: dict[str, Tensor]) -> Tensor:
        """First-order gain of every unit of an activation, [facts, draws, tokens, d]."""
        facts, draws, tokens = self.runs.shape
        clean = self.clean.values[name].reshape(facts, 1, tokens, -1)
        corrupt, slope = (x[name].detach().reshape(facts, draws, tokens, -1) for x in (self.corrupt.values, gradient))
        return first_order(clean, corrupt, slope)

    def _inside(self, name: str, gradient: dict[str, Tensor]) -> Tensor:
        """The same inside attention, [rows, heads, tokens, d_head]."""
        clean = self.clean.values[name].repeat_interleave(self.runs.shape[1], 0)
        return first_order(clean, self.corrupt.values[name].detach(), gradient[name])

    def _attended(self, unit: str, layer: int, gradient: dict[str, Tensor]) -> Tensor:
        """Gains of queries [rows, heads, tokens] or keys [rows, kv_heads, tokens], attention weights recomputed."""
        broken, slope = self.corrupt.attention[layer], gradient[f"blocks.{layer}.{PATTERN}"].double()
        whole = getattr(self.clean.attention[layer], unit).repeat_interleave(self.runs.shape[1], 0)
        weights = broken.weights.detach().double()
        if unit == "query":
            return query_effects(weights, broken.weights_of(whole, broken.key).double(), slope)
        change = (broken.scores(broken.query, whole) - broken.scores(broken.query, broken.key)).double()
        found = key_effects(weights, change, slope)
        return found.unflatten(1, (broken.key.shape[1], -1)).sum(2)

    def _by_draw(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(0, self.runs.shape[:2])

    def _features(self, slope: Tensor) -> Tensor:
        """Gains of features, decoder units being those of each corrupted token where the dictionary normalises tokens."""
        assert self.nodes.dictionary is not None
        book, (facts, draws, tokens) = self.nodes.dictionary, self.runs.shape
        seen = [x.values[book.hook].detach().reshape(-1, tokens, slope.shape[-1]) for x in (self.clean, self.corrupt)]
        clean, corrupt = (book.encode(x).unflatten(0, (facts, -1)) for x in seen)
        towards = slope.reshape(facts, draws, tokens, -1).to(clean) @ book.decoder.to(clean).T
        scale = scaling(seen[1].float(), book.norm)[1]
        if scale is not None:
            towards = towards * scale.unflatten(0, (facts, -1)).to(towards)
        return first_order(clean, corrupt, towards)

    def _experts(self, gradient: dict[str, Tensor], at: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Gains of experts, shared ones too, and of their neurons, [facts, draws, rules, units]."""
        for layer in self.nodes.routed(self.model):
            slope = gradient[f"blocks.{layer}.{HOOKS['mlp']}"].reshape(*self.runs.shape, -1)
            for name in write_matrices(self.model, layer):
                matrix, point = self.model.weight(name).detach(), name.replace("W_out", "hook_post")
                none = (slope.new_zeros(0, len(matrix)), torch.zeros(0, dtype=torch.long, device=slope.device))
                clean, corrupt = (x.routed.get(name, none) for x in (self.clean, self.corrupt))
                gain = routed_gain(clean, corrupt, slope, matrix, at)
                if "neuron" in self.nodes.units:
                    yield ("neuron", point), gain
                if "expert" in self.nodes.units:
                    yield ("expert", point), gain.sum(-1, keepdim=True)


__all__ = ["Attribution", "Nodes", "attributions"]
