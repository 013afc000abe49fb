"""Editors: one method per file, each `(model, forget, retain, where, *, options) -> Edit`."""

from edit.alphaedit import alphaedit
from edit.concept_ablation import concept_ablation
from edit.control import control
from edit.directional_ablation import directional_ablation
from edit.expert_edit import expert_edit
from edit.key_space import key_space
from edit.leace import leace
from edit.lunar import lunar
from edit.memit import memit
from edit.neuron_adjust import neuron_adjust
from edit.rocr import rocr
from edit.rome import rome
from edit.sae_clamp import sae_clamp
from edit.single_gradient import single_gradient
from edit.synaptic_dampening import synaptic_dampening

__all__ = [
    "alphaedit",
    "concept_ablation",
    "control",
    "directional_ablation",
    "expert_edit",
    "key_space",
    "leace",
    "lunar",
    "memit",
    "neuron_adjust",
    "rocr",
    "rome",
    "sae_clamp",
    "single_gradient",
    "synaptic_dampening",
]
