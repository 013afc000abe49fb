"""Fine-tuning in place, all weights or low-rank: what attacks that relearn and rivals that train share.

Low rank needs no adapter: the gradient of W = W0 + A B is known from that of W, so that experts in fused parameters are
reached as well as linear layers, and nothing is hooked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from excise.facts import Prompt
from excise.gradients import answer_losses
from excise.model import Model

T = TypeVar("T")
# Models of fewer parameters than this take larger steps.
SMALL = 100_000_000


def learning_rate(model: Model, method: str) -> float:
    """The usual learning rate of AdamW for the model's size: 1e-3 for a small one, else 1e-5, or 1e-4 at low rank."""
    if sum(p.numel() for p in model.hf.parameters()) < SMALL:
        return 1e-3 if method == "full" else 1e-2
    return 1e-5 if method == "full" else 1e-4


class Full:
    """AdamW on all given parameters, in place; kept in float32 beside weights of a shorter type."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float, decay: float = 0.0) -> None:
        self.parameters = list(parameters)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in parameters]
        self.optimiser = torch.optim.AdamW(self.masters, lr=rate, weight_decay=decay, fused=True)

    def step(self) -> None:
        """One step down the gradients, which are cleared."""
        for p, master in zip(self.parameters, self.masters, strict=True):
            master.grad = None if p.grad is None else p.grad.to(master.dtype)
        self.optimiser.step()
        with torch.no_grad():
            for p, master in zip(self.parameters, self.masters, strict=True):
                if master is not p:
                    p.copy_(master)
                p.grad = None


class LowRank:
    """AdamW on factors A [.., m, r] and B [.., r, n] of what each matrix (or each expert's) gains, in place.

    As LoRA (arXiv 2106.09685): A random, B zero, W = W0 + alpha / r A B with alpha = 2 r. Vectors stay.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], rate: float, rank: int, seed: int, decay: float = 0.0
    ) -> None:
        self.parameters = [p for p in parameters if p.dim() in (2, 3)]
        self.bases = [p.detach().clone() for p in self.parameters]
        generator = torch.Generator().manual_seed(seed)
        self.left = [self._random(p, rank, generator) for p in self.parameters]
        self.right = [
            nn.Parameter(torch.zeros(*p.shape[:-2], rank, p.shape[-1], device=p.device)) for p in self.parameters
        ]
        self.optimiser = torch.optim.AdamW([*self.left, *self.right], lr=rate, weight_decay=decay, fused=True)

    @staticmethod
    def _random(p: nn.Parameter, rank: int, generator: torch.Generator) -> nn.Parameter:
        drawn = torch.randn(*p.shape[:-1], rank, generator=generator) / p.shape[-2] ** 0.5
        return nn.Parameter(drawn.to(p.device))

    def step(self) -> None:
        """One step of the factors down the gradients of the matrices, which are cleared."""
        for p, left, right in zip(self.parameters, self.left, self.right, strict=True):
            if p.grad is not None:
                gradient = 2 * p.grad.float()
                left.grad, right.grad = gradient @ right.detach().mT, left.detach().mT @ gradient
        self.optimiser.step()
        self.optimiser.zero_grad()
        with torch.no_grad():
            for p, base, left, right in zip(self.parameters, self.bases, self.left, self.right, strict=True):
                p.copy_((base.float() + 2 * left @ right).to(p.dtype))
                p.grad = None


def stepper(model: Model, method: str, *, rate: float = 0.0, rank: int = 8, seed: int = 0) -> Full | LowRank:
    """What takes the steps: "full" moves every parameter, "lora" the matrices of the blocks, at low rank.

    rate: learning rate; 0 for the usual one of the model's size.
    """
    rate = rate or learning_rate(model, method)
    if method == "full":
        return Full([p for p in model.hf.parameters() if p.is_floating_point()], rate)
    if method != "lora":
        raise ValueError(f"no way to fine-tune {method!r}: full or lora")
    inside = [
        p for i in range(model.n_layers) for p in model.hf.get_submodule(model.names.layer_module(i)).parameters()
    ]
    return LowRank(inside, rate, rank, seed)


def descend(model: Model, loss: Callable[[int], Tensor], by: Full | LowRank, steps: int) -> Iterator[int]:
    """Take `steps` steps down loss(step), giving way after each with its number, from 1; dropout stays off.

    Whoever iterates may stop at any time. Parameters ask for gradients only while a step is computed.
    """
    every = list(model.hf.parameters())
    asking = [p.requires_grad for p in every]
    for step in range(1, steps + 1):
        for p in every:
            p.requires_grad_(False)
        for p in by.parameters:
            p.requires_grad_(True)
        try:
            with torch.enable_grad():
                loss(step).backward()
            by.step()
        finally:
            for p, asked in zip(every, asking, strict=True):
                p.requires_grad_(asked)
        yield step


def answer_logprobs(model: Model, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Log-probability of each prompt's answer [n], summed over its tokens, with gradients; and the number of tokens [n]."""
    batch = model.encode(prompts, answers=True)
    mean = answer_losses(model, batch)
    lengths = torch.tensor(
        [n - start for start, n in zip(batch.starts, batch.lengths, strict=True)], device=mean.device
    )
    return -mean * lengths, lengths


def answer_loss(model: Model, prompts: Sequence[Prompt]) -> Tensor:
    """Mean negative log-likelihood, in nats, over the answer tokens of all prompts, with gradients."""
    total, lengths = answer_logprobs(model, prompts)
    return -total.sum() / lengths.sum()


def draws(items: Sequence[T], size: int, seed: int) -> Callable[[int], list[T]]:
    """Batch number n of shuffled rounds through the items, the same for the same seed; all items where size is 0."""

    def batch(number: int) -> list[T]:
        if not size or size >= len(items):
            return list(items)
        start, found = (number - 1) * size, []
        for at in range(start, start + size):
            turn, place = divmod(at, len(items))
            order = random.Random(f"{seed}|{turn}").sample(range(len(items)), len(items))
            found.append(items[order[place]])
        return found

    return batch
