"""The model's own words after a prompt, as many as its context has room for; asked once, read by several evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from excise.arms import Arm
from excise.facts import Prompt

# Tokens that evaluations which read the model's words ask for by default: what one asked for, the next need not.
WORDS = 32


def own_words(arm: Arm, prompts: Sequence[Prompt], tokens: int = WORDS) -> list[str]:
    """What greedy decoding says after each prompt, at most `tokens` tokens; raises ValueError for one that is too long."""
    if not prompts:
        return []
    # Without the answer: prompts that differ in it alone are one question.
    asked = [replace(p, answer="", choices=(), fact_id="", form="", held_out=False, subject="") for p in prompts]
    context = getattr(arm.model.hf.config, "max_position_embeddings", None)
    longest = max(len(row.ids) for row in arm.model.tokenised(list(dict.fromkeys(asked))))
    room = min(tokens, context - longest) if context else tokens
    if room < 1:
        return [""] * len(prompts)
    return arm.generate(asked, max_new_tokens=room)


def cut(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    ends = [i for stop in stops if (i := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text
