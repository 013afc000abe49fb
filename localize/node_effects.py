"""First-order effects of every node of a network from one backward pass: states, heads, queries, neurons, experts.

Activations are read by hooks, queries and keys inside the attention function, experts by their keys; the formulas are
`localize.first_order`. What is scored for which fact is `localize.attribution_patching`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from excise.attention import Attention, attention_seen
from excise.features import scaling
from excise.gradients import frozen
from excise.keys import consumed, write_matrices
from excise.model import Model
from excise.names import UnknownName
from excise.restore import HOOKS, Runs, answer_metrics
from excise.trace import patched
from localize.first_order import contracted, first_order, key_effects, query_effects, routed_gain
from sae.dictionary import ACTS, Dictionary

# What is scored unit by unit, and the activation whose units they are. Experts and their neurons have names of their own.
UNITS = {
    "head": "attn.hook_z",
    "query": "attn.hook_q",
    "key": "attn.hook_k",
    "value": "attn.hook_v",
    "neuron": "mlp.hook_post",
    "expert": "",
    "feature": "",
}
PATTERN = "attn.hook_pattern"
EMBED = "hook_embed"


@dataclass(frozen=True)
class Nodes:
    """What is asked for.

    states: of resid, mlp, attn, scored token by token. units: of head, query, key, value, neuron, expert, feature,
    summed over the tokens that each rule picks. at: mask [n_rules, n_facts, n_tokens]. dictionary: gives the features.
    exact_attention: recompute the attention weights of a restored query or key.
    """

    states: Sequence[str] = tuple(HOOKS)
    units: Sequence[str] = ()
    at: Tensor | None = None
    dictionary: Dictionary | None = None
    exact_attention: bool = True

    def __post_init__(self) -> None:
        unknown = [c for c in self.states if c not in HOOKS] + [c for c in self.units if c not in UNITS]
        if unknown or not (self.states or self.units):
            known = ", ".join((*HOOKS, *UNITS))
            raise ValueError(f"no component {', '.join(unknown) or 'given'}; components are {known}")
        if "feature" in self.units and self.dictionary is None:
            raise ValueError("features are those of a dictionary: give one")

    @property
    def inside(self) -> list[str]:
        """The units that only the attention function shows."""
        return [u for u in self.units if u in ("query", "key", "value")]

    def routed(self, model: Model) -> list[int]:
        """Layers whose experts are scored, whole or by neurons. Raises ValueError for experts of a model without."""
        if not {"neuron", "expert"} & set(self.units):
            return []
        found = [i for i in range(model.n_layers) if has_experts(model, i)]
        if "expert" in self.units and not found:
            raise ValueError(f"{model.name} has no experts: leave out the component expert")
        return found

    def taps(self, model: Model) -> list[str]:
        """Activations to keep, those of experts and of the inside of attention left out."""
        hooks = [HOOKS[c] for c in self.states] + [UNITS[u] for u in self.units if u == "head"]
        names = [f"blocks.{i}.{hook}" for hook in hooks for i in range(model.n_layers)]
        if "neuron" in self.units:
            names += [f"blocks.{i}.{UNITS['neuron']}" for i in range(model.n_layers) if not has_experts(model, i)]
        names += [f"blocks.{i}.{HOOKS['mlp']}" for i in self.routed(model)]
        return list(dict.fromkeys([*names, *([self.dictionary.hook] if self.dictionary is not None else [])]))


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


@dataclass
class _Pass:
    """What one forward pass showed: the metric [n_rows], activations, and keys of experts (`excise.keys`)."""

    metric: Tensor
    values: dict[str, Tensor] = field(default_factory=dict)
    attention: dict[int, Attention] = field(default_factory=dict)
    routed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def has_experts(model: Model, layer: int) -> bool:
    """Whether a block's neurons belong to experts."""
    try:
        model.names.tap(f"blocks.{layer}.mlp.experts.0.hook_post")
    except UnknownName:
        return False
    return True


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
    reader = _Reader(model, runs, nodes, metric)
    with frozen(model):
        clean = reader.run(_embedded(model, runs, True), clean=True)
        corrupt = reader.run(_embedded(model, runs, False), grad=not ig_steps, drop=grad_drop)
        gains = _Gains(model, runs, nodes, clean, corrupt)
        if grad_drop:
            for layer in range(model.n_layers):
                reader.dropped = layer
                gains.add(reader.gradient(corrupt, keep=layer + 1 < model.n_layers), magnitudes=True)
        else:
            gains.add(reader.mean_gradient(clean, corrupt, ig_steps))
    return gains.means()


class _Reader:
    """Runs forward passes that keep what the nodes need, and takes gradients at it.

    dropped: the layer whose contribution to the residual stream passes no gradient back right now.
    """

    def __init__(self, model: Model, runs: Runs, nodes: Nodes, metric: str) -> None:
        self.model, self.runs, self.nodes, self.metric = model, runs, nodes, metric
        self.dropped: int | None = None

    def run(self, embedding: Tensor, *, clean: bool = False, grad: bool = False, drop: bool = False) -> _Pass:
        """One pass from given token embeddings; drop: gradients can later be dropped layer by layer."""
        model, runs, seen = self.model, self.runs, _Pass(torch.empty(0))
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

    def _look(self, seen: _Pass, layer: int, attention: Attention) -> None:
        seen.attention[layer] = attention
        inside = {UNITS[u]: getattr(attention, u) for u in ("query", "key", "value")} | {PATTERN: attention.weights}
        seen.values |= {f"blocks.{layer}.{hook}": x for hook, x in inside.items()}

    def _patches(self, seen: _Pass, drop: bool) -> dict[str, Callable[[Tensor], Tensor | None]]:
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

    def gradient(self, seen: _Pass, *, keep: bool = False) -> dict[str, Tensor]:
        """Gradients of the metric at everything that was kept; zeros where it does not depend on it."""
        values = list(seen.values.values())
        found = torch.autograd.grad(seen.metric.sum(), values, retain_graph=keep, allow_unused=True)
        # What the dropped layer writes is upstream of the cut; the gradient is captured there before it is dropped.
        cut = {f"blocks.{self.dropped}.{HOOKS[c]}" for c in ("attn", "mlp")}
        each = zip(seen.values.items(), found, strict=True)
        return {n: torch.zeros_like(x) if g is None or n in cut else g for (n, x), g in each}

    def mean_gradient(self, clean: _Pass, corrupt: _Pass, steps: int) -> dict[str, Tensor]:
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


class _Gains:
    """What restoring each node brings back, summed over the gradients that are added."""

    def __init__(self, model: Model, runs: Runs, nodes: Nodes, clean: _Pass, corrupt: _Pass) -> None:
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


@torch.no_grad()
def _embedded(model: Model, runs: Runs, clean: bool) -> Tensor:
    """Token embeddings of the clean rows, or of the corrupted ones with their noise, [n_rows, n_tokens, d]."""
    embed = model.hf.get_submodule(model.names.embed)
    if clean or runs.noise is None:
        return embed(runs.clean if clean else runs.corrupt.flatten(0, 1))
    x = embed(runs.corrupt.flatten(0, 1))
    x[:, runs.noise_start : runs.noise_start + runs.noise.shape[2]] += runs.noise.flatten(0, 1).to(x)
    return x


__all__ = ["UNITS", "Attribution", "Nodes", "attributions", "has_experts"]
