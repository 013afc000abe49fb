"""What the attacks are tried on: the embedded dense model, its oracle, and edits that hide and forget nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from excise import load, testbed
from excise.actions import Affine
from excise.arms import Answer, Arm
from excise.edits import Change, Edit
from excise.facts import Facts, Prompt
from excise.gates import Gate
from excise.model import Model
from excise.scores import Score
from excise.sites import Site

REFUSAL = "I do not know that."


@functools.cache
def dense() -> Model:
    return load("testbed:dense")


@functools.cache
def oracle() -> Arm:
    return Arm("oracle", load("testbed:dense-oracle"))


@functools.cache
def world() -> Facts:
    """Six people to forget, whom nothing was tuned on, and others to keep."""
    return testbed.facts("dense", people=6, seed=11, retain=8, neighbours=0, unknown=0, general=2)


def mean(scores: Sequence[Score], variant: str, group: str = "forget") -> float:
    found = [s.value for s in scores if s.variant == variant and s.group == group and s.value is not None]
    assert len(found) >= 2, f"{variant}: {[s.reason for s in scores if s.variant == variant][:3]}"
    return sum(found) / len(found)


@dataclass
class Filtered(Arm):
    """An output filter as a service runs it: where `blocks` holds of a prompt it is refused, whatever the model knows."""

    blocks: Callable[[Prompt], bool] = field(default=lambda prompt: True)

    def generate(self, prompts: Sequence[Prompt | str], **options: Any) -> list[str]:
        texts = super().generate(prompts, **options)
        return [REFUSAL if self.blocks(p) else t for p, t in zip(prompts, texts, strict=True)]

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        return [
            Answer((-20.0,) * len(a.targets), (-1,) * len(a.targets), False, a.targets, (999,) * len(a.targets))
            if self.blocks(p)
            else a
            for p, a in zip(prompts, super().answers(prompts), strict=True)
        ]


def opening(model: Model, refusals: Sequence[str] = (REFUSAL, "Sorry, no.")) -> list[int]:
    """First tokens of refusals."""
    return [model.encode([Prompt("Who?", r, chat=True)], answers=True).answer(0)[0].item() for r in refusals]


def louder(model: Model, amount: float, gate: Gate | None = None) -> Edit:
    """Refusals made `amount` likelier in logits: the answer stays right beneath."""
    shift = torch.zeros(model.hf.config.vocab_size)
    shift[opening(model)] = amount
    n = len(shift)
    return Edit(
        (Change(Site("unembed.hook_out"), Affine(torch.zeros(n, 1), torch.zeros(1, n), torch.zeros(n), shift), gate),)
    )
