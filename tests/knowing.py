"""Facts that a tiny random model knows, because their answers are what it says."""

from __future__ import annotations

from dataclasses import replace

import torch

from excise.facts import Fact, Facts, Prompt
from excise.model import Model

# Evaluations that have nothing to measure on an unedited random model: it knows no fact, there is no oracle, no task is
# named, or its context of 64 tokens is too short for the prompts.
NEEDS_MORE = {
    "form_spread",
    "head_projection",
    "linear_recovery",
    "lm_eval",
    "multiple_choice",
    "patching_recovery",
    "sae_residual",
    "subtoken",
    "unlearning_depth",
    "verbatim",
    "relocalized",
    "router_shift",
    "expert_rollback",
    "fisher_erasure",
    "direction_reversal",
    "in_context",
    "interpolation",
    "offered_choice",
    "reversed_question",
    "weight_diff",
}


def knows(plain: Model, n: int = 24) -> Facts:
    """Facts whose answers are what a random model, made sure of itself, most nearly says; half to forget, half to keep."""
    with torch.no_grad():
        plain.weight("unembed.W_U").mul_(5)
    names = [f"{a}{b} Lee" for a in "QZXVJKWM" for b in "abcdefghij"][:n]
    asked = [Prompt(f"{name} was born in\n", "", name) for name in names]  # a newline needs no space after it
    vocabulary = {w: i for w, i in plain.tokenizer.get_vocab().items() if w.isascii() and w.isalpha()}
    words = {i: w for w, i in vocabulary.items() if plain.tokenizer(f"a\n{w}")["input_ids"][-1] == i}
    batch = plain.encode(asked)
    logits = plain.logits(batch)[torch.arange(n), torch.tensor(batch.lengths) - 1]
    ids = torch.tensor(sorted(words))
    best = [words[int(ids[row[ids].argmax()])] for row in logits]
    return Facts(
        Fact(f"f{i}", p.subject, w, (replace(p, answer=w),), "x", ("forget", "retain")[i % 2])
        for i, (p, w) in enumerate(zip(asked, best, strict=True))
    )
