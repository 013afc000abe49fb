"""The two architectures: a dense Llama and a Qwen3 mixture of experts, both from `transformers`.

Also the expert dispatch used in training only: experts get batched, equally long token lists, and tokens beyond an
expert's capacity are dropped. Outside `fast_experts` the library's exact forward runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from excise.testbed.tokenizer import CONTEXT, SPECIAL_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("dense", "moe")
SIZES: dict[str, dict[str, int]] = {
    "dense": {"layers": 8, "width": 192, "heads": 6, "mlp": 576},
    "moe": {"layers": 6, "width": 192, "heads": 4, "mlp": 192, "experts": 8, "experts_per_token": 2},
}
CAPACITY = 1.6


def build_model(arch: str, vocabulary: int, **overrides: int) -> PreTrainedModel:
    """A freshly initialised model; `overrides` replace entries of `SIZES[arch]`."""
    if arch not in ARCHITECTURES:
        raise ValueError(f"no architecture {arch!r}; there are {', '.join(ARCHITECTURES)}")
    size = SIZES[arch] | overrides
    model = _dense(vocabulary, size) if arch == "dense" else _mixture(vocabulary, size)
    initialise(model)
    return model


def _common(vocabulary: int, size: dict[str, int]) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": size["width"],
        "num_hidden_layers": size["layers"],
        "num_attention_heads": size["heads"],
        "num_key_value_heads": size["heads"],
        "head_dim": size["width"] // size["heads"],
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "pad_token_id": SPECIAL_TOKENS.index("<|pad|>"),
        "bos_token_id": SPECIAL_TOKENS.index("<|bos|>"),
        "eos_token_id": SPECIAL_TOKENS.index("<|eos|>"),
        "attn_implementation": "eager",
    }


def _dense(vocabulary: int, size: dict[str, int]) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(intermediate_size=size["mlp"], **_common(vocabulary, size)))


def _mixture(vocabulary: int, size: dict[str, int]) -> PreTrainedModel:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        intermediate_size=size["mlp"],
        moe_intermediate_size=size["mlp"],
        num_experts=size["experts"],
        num_experts_per_tok=size["experts_per_token"],
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        **_common(vocabulary, size),
    )
    return Qwen3MoeForCausalLM(config)


@torch.no_grad()
def initialise(model: PreTrainedModel) -> None:
    """Normal weights: fan-in scaled, output projections smaller with depth, embedding and router 0.02."""
    layers = model.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        std = 1 / math.sqrt(parameter.shape[-1])
        if "embed_tokens" in name or "lm_head" in name or "mlp.gate." in name:
            std = 0.02
        elif "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * layers)
        parameter.normal_(0, std)


@dataclass
class Balance:
    """Collects the load-balance terms of one forward pass."""

    terms: list[Tensor] = field(default_factory=list)

    def take(self) -> Tensor | float:
        """The mean over layers since the last call; 0 for a dense model."""
        terms, self.terms = self.terms, []
        return torch.stack(terms).mean() if terms else 0.0


@contextmanager
def fast_experts(model: PreTrainedModel, capacity: float = CAPACITY) -> Iterator[Balance]:
    """Within the block, training passes dispatch to experts in equally long batches; evaluation stays exact."""
    balance = Balance()
    blocks = [layer.mlp for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    for block in blocks:
        exact = block.forward

        def forward(self: Any, hidden: Tensor, exact: Any = exact) -> Tensor:
            return _dispatch(self, hidden, capacity, balance) if self.training else exact(hidden)

        block.forward = MethodType(forward, block)
    try:
        yield balance
    finally:
        for block in blocks:
            del block.forward


def _dispatch(block: Any, hidden: Tensor, capacity: float, balance: Balance) -> Tensor:
    """Sort token copies by expert, pad each expert's list to one length, multiply in one batch, add up again."""
    tokens = rearrange(hidden, "batch position d -> (batch position) d")
    experts, chosen = block.gate.num_experts, block.gate.top_k
    probabilities = F.linear(tokens, block.gate.weight).softmax(-1)
    weights, index = probabilities.topk(chosen, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    load = F.one_hot(index, experts).float().sum(1).mean(0) / chosen
    balance.terms.append(experts * (load.detach() * probabilities.mean(0)).sum())

    slots = max(1, int(capacity * len(tokens) * chosen / experts))
    expert_of = rearrange(index, "token choice -> (token choice)")
    order = torch.argsort(expert_of, stable=True)
    counts = F.one_hot(expert_of, experts).sum(0)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[expert_of[order]]
    overflow = experts * slots
    slot = torch.where(place < slots, expert_of[order] * slots + place, overflow)
    token_of = order // chosen

    copies = tokens.index_select(0, token_of)
    padded = tokens.new_zeros(overflow + 1, tokens.shape[1]).index_copy(0, slot, copies)
    inputs = rearrange(padded[:-1], "(expert slot) d -> expert slot d", expert=experts)
    gate, up = torch.bmm(inputs, block.experts.gate_up_proj.mT).chunk(2, dim=-1)
    outputs = torch.bmm(F.silu(gate) * up, block.experts.down_proj.mT)
    outputs = F.pad(rearrange(outputs, "expert slot d -> (expert slot) d"), (0, 0, 0, 1))
    scale = rearrange(weights, "token choice -> (token choice) 1").index_select(0, order)
    weighted = outputs.index_select(0, slot) * scale
    return torch.zeros_like(tokens).index_add(0, token_of, weighted).view_as(hidden)
