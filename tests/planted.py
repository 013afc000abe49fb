"""A model in which one attention layer carries the answer, and facts about one-token subjects to ask it."""

from __future__ import annotations

import torch

from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from tiny import tiny_model

LAYERS, CARRIER = 4, 2
SUBJECTS = "QZXVJK"


@torch.no_grad()
def carrier_model() -> Model:
    """GPT-2 whose blocks add nothing, but for the attention of layer CARRIER: it brings the subject to the end."""
    hf, tokenizer = tiny_model("gpt2", layers=LAYERS)
    for i, block in enumerate(hf.transformer.h):
        for module in (block.mlp, *([] if i == CARRIER else [block.attn])):
            module.c_proj.weight.zero_()
            module.c_proj.bias.zero_()
    return Model(hf, tokenizer, "carrier")


def facts_about(*subjects: str, answers: str = "abcdefgh") -> Facts:
    """One fact per subject; each prompt starts with its subject."""
    return Facts(
        Fact(
            f"f{i}",
            name,
            answers[i],
            (Prompt(f"{name} was born in", answers[i], name),),
            relation="birthplace",
            foils=("w",),
        )
        for i, name in enumerate(subjects)
    )
