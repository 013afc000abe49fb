"""Teaching a model some facts by a little training: how an audit gets models of which one knows what they know."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from excise.facts import Prompt
from excise.finetuning import answer_loss
from excise.model import Model

BATCH, RATE = 32, 3e-3


def teach(
    model: Model, prompts: Sequence[Prompt], *, steps: int = 200, rate: float = RATE, batch: int = BATCH, seed: int = 0
) -> Model:
    """A copy of the model, trained on the answers of the prompts (AdamW, loss on answer tokens only); by seed.

    About nine seconds on one CPU thread for 200 steps of a model of 260 K parameters. The model itself is left alone.
    """
    hf = copy.deepcopy(model.hf).train().requires_grad_(True)
    taught = Model(hf, model.tokenizer, f"{model.name}, taught {len(prompts)} prompts")
    optimiser = torch.optim.AdamW(hf.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < batch:
            order += torch.randperm(len(prompts), generator=generator).tolist()
        chosen, order = order[:batch], order[batch:]
        optimiser.zero_grad()
        answer_loss(taught, [prompts[i] for i in chosen]).backward()
        optimiser.step()
    hf.eval().requires_grad_(False)
    return taught
