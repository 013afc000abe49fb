"""Tiny random models of the eighteen architectures, built from config in memory: no files, no network.

Every norm gain and every bias is moved at random, because unit gains and zero biases hide mistakes.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

D_MODEL, D_FF, D_EXPERT, N_HEADS, N_KV, VOCAB = 32, 48, 16, 4, 2, 320

_TEXT = (
    "Marie Curie was born in Warsaw. The Eiffel Tower stands in Paris. The capital of Italy is Rome, and Rome is old.",
    "A language model keeps facts in its weights; we look for them, cut them out, and measure what is left.",
)
_MOE = dict(num_experts_per_tok=2, moe_intermediate_size=D_EXPERT)
_LATENT = dict(
    kv_lora_rank=16, q_lora_rank=None, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    n_routed_experts=6, n_shared_experts=1, first_k_dense_replace=1, num_key_value_heads=N_HEADS,
    n_group=1, topk_group=1, **_MOE,
)  # fmt: skip
_PARTIAL_ROTARY = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rope_type": "default"}

# family -> (model type of transformers, what its config needs beyond the common dimensions)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", dict(n_inner=D_FF)),
    "opt": ("opt", dict(ffn_dim=D_FF, word_embed_proj_dim=D_MODEL)),
    "neox": ("gpt_neox", dict(num_key_value_heads=N_HEADS, rope_parameters=_PARTIAL_ROTARY)),
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "phi3": ("phi3", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(head_dim=8)),
    "gemma2": ("gemma2", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)),
    "gemma3": ("gemma3_text", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=16)),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", dict(num_local_experts=4, num_experts_per_tok=2, intermediate_size=D_EXPERT)),
    "qwen2-moe": ("qwen2_moe", dict(num_experts=4, shared_expert_intermediate_size=24, **_MOE)),
    "qwen3-moe": ("qwen3_moe", dict(num_experts=4, head_dim=8, **_MOE)),
    "olmoe": ("olmoe", dict(num_experts=4, num_experts_per_tok=2, intermediate_size=D_EXPERT)),
    "deepseek-v2": ("deepseek_v2", dict(_LATENT)),
    "deepseek-v3": ("deepseek_v3", dict(_LATENT, q_lora_rank=24, n_group=2, topk_group=1)),
    "gpt-oss": (
        "gpt_oss",
        dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, intermediate_size=D_EXPERT, sliding_window=16),
    ),
}

FAMILIES = tuple(_CONFIGS)
MOE_FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "gpt-oss")


def tiny_model(
    family: str, *, layers: int = 2, seed: int = 0, perturb: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A fresh copy of a random model (float32, eval mode) and its tokenizer. Raises KeyError for an unknown family."""
    hf, tokenizer = _built(family, layers, seed, perturb)
    return copy.deepcopy(hf), copy.deepcopy(tokenizer)


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with bos, eos and pad that prepends bos and gives character offsets."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


@functools.cache
def _built(family: str, layers: int, seed: int, perturb: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    model_type, extra = _CONFIGS[family]
    config = CONFIG_MAPPING[model_type](**(_common(model_type, layers) | extra))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        if perturb:
            _perturb(hf)
    return hf, tiny_tokenizer()


def _common(model_type: str, layers: int) -> dict[str, Any]:
    shared = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    if model_type == "gpt2":
        return shared | dict(n_embd=D_MODEL, n_layer=layers, n_head=N_HEADS, n_positions=64)
    common = shared | dict(
        hidden_size=D_MODEL, num_hidden_layers=layers, num_attention_heads=N_HEADS, max_position_embeddings=64
    )
    if model_type != "opt":
        common |= dict(intermediate_size=D_FF, num_key_value_heads=N_KV)
    return common


@torch.no_grad()
def _perturb(hf: PreTrainedModel) -> None:
    for name, parameter in hf.named_parameters():
        if parameter.dim() == 1 or name.endswith("_bias"):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for name, buffer in hf.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.add_(torch.randn_like(buffer) * 0.3)
