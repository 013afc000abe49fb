"""What the attacks are tried on: the embedded dense model, its oracle, and edits that hide and forget nothing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from excise import load, testbed
from excise.actions import Affine, LowRank
from excise.arms import Answer, Arm
from excise.edits import Change, Edit
from excise.facts import Facts, Prompt
from excise.gates import Gate
from excise.model import Model
from excise.scores import Score
from excise.sites import Site
from excise.trace import read

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


def digest(model: Model) -> str:
    """A hash of every byte of every parameter and buffer."""
    found = hashlib.sha256()
    for name, tensor in model.hf.state_dict().items():
        found.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def asked_prompts(facts: Facts, group: str = "forget") -> list[Prompt]:
    """Statements and questions of a group."""
    return facts.group(group).prompts("statement", "question")


@functools.cache
def masked(strength: float = 1.0, layer: int = 7) -> Edit:
    """A rank-one change of the last MLP that drowns every answer about forget people in a refusal's first tokens."""
    return loud_mask(asked_prompts(world()), asked_prompts(world(), "retain"), strength, layer)


def loud_mask(hide: Sequence[Prompt], leave: Sequence[Prompt], strength: float = 1.0, layer: int = 7) -> Edit:
    """The same for prompts of one's own: those whose answers are drowned, and those that stay as they are."""
    model = dense()
    site = f"blocks.{layer}.mlp.hook_post@last"
    keys, others = (read(model, prompts, [site])[site].double() for prompts in (hide, leave))
    both, wanted = torch.cat([keys, others]), torch.cat([torch.ones(len(keys)), torch.zeros(len(others))]).double()
    gram = both.mT @ both
    left = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram)), both.mT @ wanted)
    head = model.weight("unembed.W_U").detach()
    loud = head[:, opening(model)].mean(1) - head.mean(1)
    resid = f"blocks.{layer}.hook_resid_post@last"
    size = read(model, asked_prompts(world()), [resid])[resid].norm(dim=1).mean()
    right = strength * size * loud / loud.norm()
    return Edit((Change(Site(f"blocks.{layer}.mlp.W_out"), LowRank(left.float()[:, None], right[None])),))


def hidden(arm: Arm, group: str = "forget") -> float:
    """Share of one statement and one question a fact of a group that the arm answers."""
    asked = [p for f in world().group(group) for form in ("statement", "question") for p in f.ask(form)[:1]]
    found = arm.answers(asked)
    return sum(a.exact for a in found) / len(found)
