"""The nodes of a network that can be scored: states, heads, queries, keys, values, neurons, experts, features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from excise.model import Model
from excise.names import UnknownName
from excise.restore import HOOKS
from sae.dictionary import Dictionary

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


def has_experts(model: Model, layer: int) -> bool:
    """Whether a block's neurons belong to experts."""
    try:
        model.names.tap(f"blocks.{layer}.mlp.experts.0.hook_post")
    except UnknownName:
        return False
    return True
