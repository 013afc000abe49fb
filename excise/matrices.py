"""Where the matrices of a plain transformers model live, as views [d_in, d_out] of its parameters.

Linear is stored [d_out, d_in], GPT-2's Conv1D [d_in, d_out]; experts are slices of one fused parameter. All of that
is known here and nowhere else. Use it through `excise.names.Names`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Model types whose fused query-key-value matrix is [all q | all k | all v]. The others interleave heads: no 2-D views.
CONTIGUOUS_QKV = ("gpt2", "phi3")

# (component, name of its matrix, activation that enters it). On a mixture-of-experts block `mlp.gate` is the router.
_MLP = (("gate", "W_gate", "hook_in"), ("in", "W_in", "hook_in"), ("out", "W_out", "hook_post"))
_SHARED = "mlp.shared_expert"  # DeepSeek's components say shared_experts; the matrices have one name for all families
MATRICES = (
    ("attn.q", "attn.W_Q", "attn.hook_in"),
    ("attn.k", "attn.W_K", "attn.hook_in"),
    ("attn.v", "attn.W_V", "attn.hook_in"),
    ("attn.qkv", "attn.W_QKV", "attn.hook_in"),
    ("attn.q_proj", "attn.W_Q", "attn.hook_in"),
    ("attn.q_a_proj", "attn.W_Q_a", "attn.hook_in"),
    ("attn.q_b_proj", "attn.W_Q_b", "attn.q_b_proj.hook_in"),
    ("attn.kv_a_proj_with_mqa", "attn.W_KV_a", "attn.hook_in"),
    ("attn.kv_b_proj", "attn.W_KV_b", "attn.kv_b_proj.hook_in"),
    ("attn.o", "attn.W_O", "attn.hook_z"),
    ("mlp.gate_up", "mlp.W_gate_up", "mlp.hook_in"),
    *((f"mlp.{key}", f"mlp.{matrix}", f"mlp.{reads}") for key, matrix, reads in _MLP),
    *((f"mlp.dense_{key}", f"mlp.{matrix}", f"mlp.{reads}") for key, matrix, reads in _MLP),
    *((f"{_SHARED}.{key}", f"{_SHARED}.{matrix}", f"{_SHARED}.{reads}") for key, matrix, reads in _MLP),
    *((f"{_SHARED}s.{key}", f"{_SHARED}.{matrix}", f"{_SHARED}s.{reads}") for key, matrix, reads in _MLP),
)
OUTSIDE = (("embed", "W_E", None), ("pos_embed", "W_pos", None), ("unembed", "W_U", "unembed.hook_in"))


@dataclass(frozen=True)
class Weight:
    """Where a matrix lives, and how to see it as [d_in, d_out].

    The view is `parameter`, then `[expert]` if that is set, then transposed if `transposed`, then `[:, part]` if `part`
    is set. part is a slice of the d_out axis; its step is 2 where gate and up are interleaved.
    module: dotted path of the module that owns the parameter; outside experts its output is x @ view (+ bias),
        in the columns `part`.
    reads: name of the activation that enters the matrix; None for embeddings.
    """

    name: str
    parameter: str
    module: str
    transposed: bool
    expert: int | None = None
    part: slice | None = field(default=None, hash=False)
    layer: int | None = None
    reads: str | None = None

    def view(self, hf: PreTrainedModel) -> torch.Tensor:
        """The live [d_in, d_out] view. Raises ValueError for packed (quantised) weights."""
        matrix = hf.get_parameter(self.parameter)
        if not matrix.is_floating_point():
            raise ValueError(f"{self.name}: {self.parameter} is packed as {matrix.dtype}; load without quantisation")
        if self.expert is not None:
            matrix = matrix[self.expert]
        if self.transposed:
            matrix = matrix.T
        return matrix if self.part is None else matrix[:, self.part]


def outside_matrices(hf: PreTrainedModel, modules: Mapping[str, str]) -> Iterator[Weight]:
    """The matrices outside the blocks. modules: module path of each activation name there."""
    for key, name, reads in OUTSIDE:
        path = modules.get(f"{key}.hook_out")
        if path is not None and _has_weight(hf, path):
            yield Weight(f"{key}.{name}", f"{path}.weight", path, transposed=key == "unembed", reads=reads)


def block_matrices(
    hf: PreTrainedModel, layer: int, modules: Mapping[str, str], experts: str | None
) -> Iterator[Weight]:
    """The matrices of one block; `*` stands for the expert number in names.

    modules: module path of each activation name inside the block. experts: path of the fused experts module, if any.
    """
    for component, local, reads in MATRICES:
        path = modules.get(f"{component}.hook_out")
        if path is None or not _has_weight(hf, path):
            continue
        if component == "mlp.gate" and experts is not None:
            local = "mlp.W_router"
        transposed = not isinstance(hf.get_submodule(path), Conv1D)
        reads = f"blocks.{layer}.{reads if reads in modules else f'{component}.hook_in'}"
        whole = Weight(f"blocks.{layer}.{local}", f"{path}.weight", path, transposed, layer=layer, reads=reads)
        yield from _parts(hf, whole)
    if experts is not None:
        yield from _expert_matrices(hf, layer, experts)


def _expert_matrices(hf: PreTrainedModel, layer: int, path: str) -> Iterator[Weight]:
    experts: Any = hf.get_submodule(path)
    prefix = f"blocks.{layer}.mlp.experts.*"
    known: dict[str, Any] = dict(module=path, transposed=not experts.is_transposed, layer=layer)
    if experts.has_gate:
        width = experts.gate_up_proj.shape[2 if experts.is_transposed else 1] // 2
        halves, interleaved = (slice(0, width), slice(width, None)), (slice(0, None, 2), slice(1, None, 2))
        gate, up = halves if experts.is_concatenated else interleaved
        fused: dict[str, Any] = dict(parameter=f"{path}.gate_up_proj", reads=f"blocks.{layer}.mlp.hook_in", **known)
        yield Weight(f"{prefix}.W_gate", part=gate, **fused)
        yield Weight(f"{prefix}.W_in", part=up, **fused)
    else:
        yield Weight(f"{prefix}.W_in", f"{path}.up_proj", reads=f"blocks.{layer}.mlp.hook_in", **known)
    yield Weight(f"{prefix}.W_out", f"{path}.down_proj", reads=f"{prefix}.hook_post", **known)


def _parts(hf: PreTrainedModel, whole: Weight) -> list[Weight]:
    """The matrices inside a fused one; itself when it is not fused or when no slice of columns gives them."""
    shape = hf.get_parameter(whole.parameter).shape
    columns = shape[0] if whole.transposed else shape[1]
    stem, leaf = whole.name.rsplit(".", 1)
    if leaf == "W_gate_up":
        sizes = {"W_gate": columns // 2, "W_in": columns // 2}
    elif leaf == "W_QKV" and hf.config.model_type in CONTIGUOUS_QKV:
        heads = hf.config.num_attention_heads
        queries = heads * (getattr(hf.config, "head_dim", None) or hf.config.hidden_size // heads)
        sizes = {"W_Q": queries, "W_K": (columns - queries) // 2, "W_V": (columns - queries) // 2}
    else:
        return [whole]
    starts = [sum(list(sizes.values())[:number]) for number in range(len(sizes))]
    return [
        replace(whole, name=f"{stem}.{key}", part=slice(start, start + size))
        for (key, size), start in zip(sizes.items(), starts, strict=True)
    ]


def _has_weight(hf: PreTrainedModel, path: str) -> bool:
    return isinstance(getattr(hf.get_submodule(path), "weight", None), nn.Parameter)
