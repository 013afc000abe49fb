"""Other libraries' views of a model. They share its Parameter objects and leave it plain, so it still saves.

Traps, all of which the tests hold:
- A bridge rewrites the object that it is given, so it gets a shell and never the owner.
- In-place edits of the owner, and swaps of `.data`, show in a view at once. New Parameter objects do not (parametrize,
  PEFT injection, `module.weight = ...`): make the view again after those. Buffers are shared as they are when the shell
  is made: move or cast the owner first.
- GPT-NeoX, BLOOM and Falcon: the bridge splits their interleaved query-key-value matrix into copies and goes on using
  those after an edit of the owner's matrix. Ask `follows_edits`, and make the bridge again after such an edit.
- Compatibility mode with weight processing multiplies fused expert weights in place, through the shared storage: never
  call `bridge.enable_compatibility_mode()` without `no_processing=True`.
- The bridge's tokenisation prepends a bos token: pass token ids. Left-padded batches need `attention_mask`.
- nnsight edits live only inside traces, importing it gives every object a `.save`, and the wrapped owner keeps
  nnsight's `forward` controllers; its own results are unchanged.
"""

from __future__ import annotations

import copy
import tempfile
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge

# Their bridges keep private copies of the fused query-key-value matrix.
COPIED_QKV = ("gpt_neox", "bloom", "falcon")


def shell_of(hf: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same Parameter objects, in eval mode with eager attention, for others to rewrite.

    The owner may stay on another attention implementation. Costs next to no memory. Raises RuntimeError when the
    owner's state dict does not fit its class (adapters injected, parametrized).
    """
    with torch.device("meta"):
        shell = type(hf)(_config_of(hf))
    shell.set_attn_implementation("eager")
    shell.load_state_dict(hf.state_dict(keep_vars=True), assign=True, strict=True)
    for mine, theirs in zip(shell.modules(), hf.modules(), strict=True):
        # rotary frequencies and their like are in no state dict, and some are plain attributes
        for key, buffer in theirs._buffers.items():
            mine._buffers[key] = buffer
        for key, value in vars(theirs).items():
            if isinstance(value, torch.Tensor):
                setattr(mine, key, value)
    shell.tie_weights()
    return shell.eval()


def bridge_view(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """A TransformerBridge over a shell of `hf`: TransformerLens' own tools on the owner's weights.

    Gradients through it land on the owner's parameters; hooks on either do not reach the other. Where `follows_edits`
    is False it must be made again after an edit of a query-key-value matrix, or it gives the logits of the old one.
    """
    from transformer_lens.model_bridge import TransformerBridge

    device = str(next(hf.parameters()).device)
    # the bridge makes its tokenizer anew from the path or hub name of the one it is given
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = AutoTokenizer.from_pretrained(folder)
        return TransformerBridge.boot_transformers(
            type(hf).__name__, hf_model=shell_of(hf), tokenizer=saved, device=device
        )


def nnsight_view(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """An nnsight model around `hf` itself, for any value inside a forward pass.

    A traced block needs its source on disk, and only what is `.save()`d in it exists afterwards.
    """
    from nnsight import TransformersModel

    return TransformersModel(hf, tokenizer=tokenizer, task="text-generation")


def follows_edits(hf: PreTrainedModel) -> bool:
    """True when a bridge follows every in-place edit; False when it keeps copies of the query-key-value matrices."""
    return hf.config.get_text_config().model_type not in COPIED_QKV


def _config_of(hf: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's config that names its class; without that a bridge does not know some families."""
    config = copy.deepcopy(hf.config)
    config.architectures = [type(hf).__name__]
    return config
