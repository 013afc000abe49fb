"""Soft prompt: a few free vectors before the question, optimised on some facts and tried on facts about others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evals.attacking import score
from evals.slots import filled, parted, slots, told_with
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact
from excise.gradients import answer_losses, frozen
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def soft_prompt(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    vectors: int = 8,
    steps: int = 15,
    rate: float = 0.2,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said after vectors that make the model say the answers of facts about other subjects.

    The vectors stand in front of the statement, none longer than embeddings are on average (as in arXiv 2402.09063, which
    tries them on the prompts they were optimised on). Of the facts they are optimised on nothing is reported: sixteen
    vectors taught the embedded oracle nine of twelve such answers, and none about others. How much comes back depends on
    which half is learnt from: of a mask in the last block 58 % or 21 % of 24 facts about three people, of the oracle none.
    vectors: free vectors.
    steps: steps of Adam.
    rate: its step, relative to the size of an entry of the embedding.
    limit: most facts, of which half the subjects are learnt from; 0 for all.
    seed: which facts are taken when there are more, and the split.
    """
    shown, others, scores = parted(arm, facts, count=vectors, front=True, limit=limit, seed=seed)
    if not shown:
        return scores
    with arm.running() as model, frozen(model):
        found = optimised(model, model.encode([i.prompt for i in shown], answers=True), steps, rate)
        hits = told_with(model, others, found)
    return scores + [score(i, float(hit)) for i, hit in zip(others, hits, strict=True)]


def optimised(model: Model, batch: Batch, steps: int, rate: float) -> Tensor:
    """Vectors [n, d] under which the mean loss of the answers was lowest; they start as the filler's own."""
    table = model.hf.get_input_embeddings().weight.detach()
    longest, entry = table.float().norm(dim=1).mean(), table.float().square().mean().sqrt()
    start = bounded(table[batch.ids[0, slots(batch)[0]]].float(), longest)
    vectors = nn.Parameter(start.clone())
    optimiser = torch.optim.Adam([vectors], lr=float(rate * entry))
    best, lowest = start, float("inf")
    for step in range(steps + 1):
        with torch.enable_grad(), filled(model, batch, vectors):
            loss = answer_losses(model, batch).mean()
        if loss.item() < lowest:
            best, lowest = vectors.detach().clone(), loss.item()
        if step < steps:
            (vectors.grad,) = torch.autograd.grad(loss, vectors)
            optimiser.step()
            with torch.no_grad():
                vectors.copy_(bounded(vectors, longest))
    return best


def bounded(vectors: Tensor, longest: Tensor | float) -> Tensor:
    """Each vector [.., d] no longer than the bound, its direction kept."""
    return vectors * (longest / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
