"""Facts that a tiny random model knows, because their answers are what it says."""

from __future__ import annotations

from dataclasses import replace

import torch

from excise.facts import Fact, Facts, Prompt
from excise.model import Model


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
