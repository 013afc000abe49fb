"""Rivals: short trained baselines, a prompt that asks to be silent, and a filter of what is said.

They are what a user would otherwise do. Each trained one gets a copy of the model, the same steps or seconds, AdamW on all
weights, and stops early when its own forget answers are gone, as its authors tune it, unless it is told to go on; the
model itself is left alone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from excise.arms import Answer, Arm
from excise.errors import ExciseError
from excise.facts import Facts, Prompt
from excise.finetuning import answer_logprobs, answer_loss, descend, draws, stepper
from excise.model import Model
from excise.trace import patched

Rival = Literal["gradient_ascent", "gradient_difference", "npo", "simnpo", "rmu", "task_vector"]
RIVALS: tuple[Rival, ...] = ("gradient_ascent", "gradient_difference", "npo", "simnpo", "rmu", "task_vector")
# Prompts of each side in one step; steps between looks at what is forgotten; a share below which it counts as gone.
BATCH, LOOK, GONE = 16, 5, 0.05
# Temperatures of the preference losses (NPO arXiv 2404.05868; SimNPO arXiv 2410.07163).
NPO_BETA, SIMNPO_BETA = 0.1, 2.5
# RMU (arXiv 2403.03218): length of the random target in units of the usual state's, and the weight of what is kept.
RMU_LENGTH, RMU_KEEP = 5.0, 1.0
# Multiples of the task vector that are tried (arXiv 2212.04089).
NEGATED = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def train_rival(
    name: Rival,
    model: Model,
    forget: Facts,
    retain: Facts,
    *,
    steps: int = 60,
    seconds: float = float("inf"),
    rate: float = 0.0,
    seed: int = 0,
    until_gone: bool = True,
) -> Arm:
    """An arm with its own copy of the model, trained to forget; named after its method.

    steps, seconds: whichever is reached first ends the training. rate: 0 for the usual one of the model's size.
    until_gone: end it as soon as the forget answers are gone, too; a task vector is always learned to the end.
    Only wordings that are not held out are trained on. Raises ExciseError for an unknown name or empty facts.
    """
    if name not in RIVALS:
        raise ExciseError(f"no rival {name!r}; there are {', '.join(RIVALS)}")
    asked, kept = forget.prompts(held_out=False), retain.prompts(held_out=False)
    if not asked or not kept:
        raise ExciseError("a rival needs facts to forget and facts to keep")
    run = _Run(_copy(model, name), model, asked, kept, steps, time.monotonic() + seconds, rate, seed)
    if name == "task_vector":
        _negate(run)
    else:
        losses: dict[str, Callable[[_Run], Callable[[int], Tensor]]] = {
            "gradient_ascent": _ascent, "gradient_difference": _difference, "npo": _npo, "simnpo": _simnpo, "rmu": _rmu,
        }  # fmt: skip
        run.train(losses[name](run), until_gone=until_gone)
    return Arm(name, run.model)


@dataclass(frozen=True)
class _Run:
    """One training: the copy, the model as it was, prompts, and when it ends."""

    model: Model
    base: Model
    forget: list[Prompt]
    retain: list[Prompt]
    steps: int
    ends: float
    rate: float
    seed: int

    def train(self, loss: Callable[[int], Tensor], *, until_gone: bool) -> None:
        by = stepper(self.model, "full", rate=self.rate, seed=self.seed)
        for step in descend(self.model, loss, by, self.steps):
            if time.monotonic() >= self.ends or (until_gone and step % LOOK == 0 and self.recalled() <= GONE):
                break

    def recalled(self) -> float:
        """Share of some forget prompts that are answered still."""
        some = self.forget[:: max(1, len(self.forget) // 64)]
        return Arm("", self.model).said(some)

    def batches(self) -> Callable[[int], tuple[list[Prompt], list[Prompt]]]:
        """Forget and retain prompts of a step."""
        forget, retain = draws(self.forget, BATCH, self.seed), draws(self.retain, BATCH, self.seed + 1)
        return lambda step: (forget(step), retain(step))


def _copy(model: Model, name: str) -> Model:
    copied = Model(copy.deepcopy(model.hf), model.tokenizer, f"{model.name}, {name}")
    copied.batch_tokens = model.batch_tokens
    return copied


def _ascent(run: _Run) -> Callable[[int], Tensor]:
    draw = run.batches()
    return lambda step: -answer_loss(run.model, draw(step)[0])


def _difference(run: _Run) -> Callable[[int], Tensor]:
    draw = run.batches()

    def loss(step: int) -> Tensor:
        forget, retain = draw(step)
        return answer_loss(run.model, retain) - answer_loss(run.model, forget)

    return loss


def npo_loss(now: Tensor, reference: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(-beta (log pi - log pi_ref)), mean over answers; both [n]."""
    return -2 / beta * logsigmoid(-beta * (now - reference)).mean()


def simnpo_loss(now: Tensor, lengths: Tensor, beta: float) -> Tensor:
    """-(2 / beta) log sigmoid(-(beta / length) log pi), mean over answers; both [n]. No reference model."""
    return -2 / beta * logsigmoid(-beta / lengths * now).mean()


def _npo(run: _Run) -> Callable[[int], Tensor]:
    draw = run.batches()

    def loss(step: int) -> Tensor:
        forget, retain = draw(step)
        with torch.no_grad():
            reference, _ = answer_logprobs(run.base, forget)
        return npo_loss(answer_logprobs(run.model, forget)[0], reference, NPO_BETA) + answer_loss(run.model, retain)

    return loss


def _simnpo(run: _Run) -> Callable[[int], Tensor]:
    draw = run.batches()

    def loss(step: int) -> Tensor:
        forget, retain = draw(step)
        return simnpo_loss(*answer_logprobs(run.model, forget), SIMNPO_BETA) + answer_loss(run.model, retain)

    return loss


def _rmu(run: _Run) -> Callable[[int], Tensor]:
    """States of forget prompts go to one random direction, those of retain prompts stay where the model had them."""
    point = f"blocks.{run.model.n_layers // 2}.hook_resid_post"
    draw, generator = run.batches(), torch.Generator().manual_seed(run.seed)
    direction = torch.randn(run.model.names.d_model, generator=generator).to(run.model.device)
    with torch.no_grad():
        usual = _states(run.base, run.retain[:BATCH], point).norm(dim=-1).mean()
    target = RMU_LENGTH * usual * direction / direction.norm()

    def loss(step: int) -> Tensor:
        forget, retain = draw(step)
        with torch.no_grad():
            there = _states(run.base, retain, point)
        gone = (_states(run.model, forget, point) - target).pow(2).mean()
        return gone + RMU_KEEP * (_states(run.model, retain, point) - there).pow(2).mean()

    return loss


def _states(model: Model, prompts: Sequence[Prompt], point: str) -> Tensor:
    """Activations [n_tokens, d] at a point over prompts with their answers, padding left out, with gradients."""
    batch, seen = model.encode(prompts, answers=True), {}

    def keep(x: Tensor) -> None:
        seen[point] = x

    with patched(model, {point: keep}, batch=batch):
        model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
    return seen[point][batch.mask.bool()].float()


def _negate(run: _Run) -> None:
    """Learn the forget answers still better, and go the other way; the shortest way after which they are gone."""
    draw = run.batches()
    run.train(lambda step: answer_loss(run.model, draw(step)[0]), until_gone=False)
    with torch.no_grad():
        pairs = list(zip(run.model.hf.parameters(), run.base.hf.parameters(), strict=True))
        learned = [p.detach() - q for p, q in pairs]
        for factor in NEGATED:
            for (p, q), delta in zip(pairs, learned, strict=True):
                p.copy_(q - factor * delta)
            if run.recalled() <= GONE:
                break


@dataclass
class PromptGuard(Arm):
    """An arm that is told, before every prompt, to know nothing of some names. Nothing in the model changes."""

    instruction: str = ""

    @property
    def mode(self) -> str:
        """A guard vanishes with whoever holds it, as hooks do."""
        return "hook"

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """As of an arm, asked with the instruction in front."""
        return super().answers([self._told(p) for p in prompts])

    def generate(self, prompts: Sequence[Prompt | str], *, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """As of an arm, asked with the instruction in front."""
        told = [self._told(p if isinstance(p, Prompt) else Prompt(p, "")) for p in prompts]
        return super().generate(told, max_new_tokens=max_new_tokens, **options)

    def _told(self, prompt: Prompt) -> Prompt:
        return replace(prompt, text=f"{self.instruction} {prompt.text}", subject="")


def prompt_guard(model: Model, forget: Facts) -> PromptGuard:
    """The model, asked to be silent about the subjects of these facts (arXiv 2403.03329)."""
    names = ", ".join(forget.subjects)
    return PromptGuard(
        "prompt_guard", model, instruction=f"You know nothing about {names}. If asked, say that you do not know."
    )


@dataclass
class OutputFilter(Arm):
    """An arm whose words are replaced by a refusal where they, with the prompt, hold a subject and one of its answers."""

    facts: Facts = field(default_factory=lambda: Facts(()))
    refusal: str = "I do not know."

    @property
    def mode(self) -> str:
        """A filter vanishes with whoever holds it, as hooks do."""
        return "hook"

    def answers(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """As of an arm; an answer that would be filtered out is none, though the model underneath finds it as likely."""
        found = super().answers(prompts)
        return [replace(a, exact=False) if a.exact and self._stops(p.text, p.answer) else a
                for p, a in zip(prompts, found, strict=True)]  # fmt: skip

    def generate(self, prompts: Sequence[Prompt | str], *, max_new_tokens: int = 16, **options: Any) -> list[str]:
        """As of an arm, filtered."""
        said = super().generate(prompts, max_new_tokens=max_new_tokens, **options)
        texts = [p.text if isinstance(p, Prompt) else p for p in prompts]
        return [self.refusal if self._stops(t, s) else s for t, s in zip(texts, said, strict=True)]

    def _stops(self, prompt: str, said: str) -> bool:
        whole = f"{prompt} {said}".lower()
        return any(f.subject.lower() in whole and f.answer.lower() in said.lower() for f in self.facts if f.subject)


def output_filter(model: Model, forget: Facts, refusal: str = "I do not know.") -> OutputFilter:
    """The model behind a filter that knows the facts to forget."""
    return OutputFilter("output_filter", model, facts=forget, refusal=refusal)
