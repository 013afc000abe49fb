"""Knowledge neurons: how much of the answer each MLP neuron brings, by integrated gradients from silence to what it is.

Dai et al. 2022, arXiv 2104.08696, with the neurons after their activation function, as the paper has them. Only the last
token changes, and what all neurons of a block write changes on a straight line. So one gradient of the residual stream
per point of the line, from blocks that run on one token behind cached keys and values, gives every neuron of the block;
the lines of all blocks climb through the model together. Such neurons follow surface patterns as much as facts
(arXiv 2405.02421): test what they find against random ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from excise.blocks import Blocks, Unsupported, capture, refuse_states
from excise.facts import Fact
from excise.gradients import frozen
from excise.keys import consumed, write_matrices
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.restore import METRICS, answer_metrics
from excise.scores import Localization
from excise.sites import Site
from excise.trace import patched
from localize.questions import Question, Table, by_length, keys_at, questions, summary, token_rows

# logits [rows, vocab] -> what is explained [rows]
Value = Callable[[Tensor], Tensor]


def line_points(steps: int, rule: str) -> tuple[Tensor, Tensor]:
    """Points on the line from 0 to 1 and their weights, in float64.

    gauss: Gauss-Legendre, exact for polynomials of degree 2 * steps - 1. uniform: equally spaced, both ends included, as
    the paper's code has it; its error falls as 1 / steps only. 0 steps: the gradient at the far end alone.
    """
    if rule not in ("gauss", "uniform"):
        raise ValueError(f"no rule {rule!r}; rules are gauss, uniform")
    if steps < 1:
        return torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if rule == "uniform":
        return torch.linspace(0, 1, steps, dtype=torch.float64), torch.full((steps,), 1 / steps, dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2)


def neuron_scores(keys: Tensor, w_out: Tensor, gradient: Tensor) -> Tensor:
    """k_i (w_i . g) of every neuron, [n, d_ff]: its activation times the gradient of what its value vector w_i adds.

    keys [n, d_ff], w_out [d_ff, d]; gradient [n, d] of the residual stream, averaged along the line.
    """
    return keys * (gradient @ w_out.mT)


def line_gradients(
    model: Model, ids: Tensor, value: Value, *, points: Tensor, weights: Tensor
) -> tuple[dict[str, Tensor], list[Tensor], str]:
    """Keys [n, d_in] of every write matrix at the last token, and per block the gradient [n, d] of `value` at its output,
    averaged over the line on which all its neurons go from 0 to what they are.

    ids: [n, n_tokens], rows of one length. Also returns why whole forward passes were needed; "" where they were not.
    """
    keys: dict[str, Tensor] = {}
    last = torch.full((len(ids),), ids.shape[1] - 1)
    with consumed(model, range(model.n_layers), keys_at(keys, ids.shape, last)):
        seen = capture(model, ids, (), cache=True)
    starts = []
    for layer in range(model.n_layers):
        end = seen.inputs[layer + 1][:, -1]  # [n, d]
        wrote = sum((keys[n] @ model.weight(n).detach() for n in write_matrices(model, layer) if n in keys), 0 * end)
        silence = 1 - points.to(end)[:, None, None]
        starts.append(end - silence * wrote)  # [n_points, n, d]
    try:
        refuse_states(model)
        blocks = Blocks(model, seen)
        blocks.checked(ids.shape[1] - 1)
        gradients, why = _climb(blocks, starts, value), ""
    except Unsupported as reason:
        gradients, why = _whole_passes(model, ids, starts, value), str(reason)
    scale = weights.to(starts[0])[:, None, None]
    return keys, [(scale * g).sum(0) for g in gradients], why


def _climb(blocks: Blocks, starts: Sequence[Tensor], value: Value) -> list[Tensor]:
    """Gradients at the starts of all blocks from one pass: the rows of a block join after it."""
    begun = [s.detach().requires_grad_() for s in starts]
    column = blocks.n_tokens - 1
    with frozen(blocks.model), torch.enable_grad():
        hidden = begun[0].flatten(0, 1)[:, None]  # [n_points * n, 1, d]
        for layer in range(1, len(begun)):
            hidden = torch.cat([blocks(layer, hidden, column), begun[layer].flatten(0, 1)[:, None]])
        return list(torch.autograd.grad(value(blocks.logits(hidden[:, 0])).sum(), begun))


def _whole_passes(model: Model, ids: Tensor, starts: Sequence[Tensor], value: Value) -> list[Tensor]:
    """The same by one forward and backward pass of all tokens per block."""
    gradients = []
    rows = ids.repeat(len(starts[0]), 1)
    for layer, start in enumerate(starts):
        begun = start.detach().requires_grad_()

        def put(x: Tensor, begun: Tensor = begun) -> Tensor:
            return torch.cat([x[:, :-1], begun.flatten(0, 1)[:, None]], 1)

        with frozen(model), torch.enable_grad(), patched(model, {f"blocks.{layer}.hook_resid_post": put}):
            logits = model.hf(input_ids=rows, use_cache=False, logits_to_keep=1).logits[:, -1]
            gradients.append(torch.autograd.grad(value(logits).sum(), begun)[0])
    return gradients


def refined(scores: np.ndarray, threshold: float, share: float) -> np.ndarray:
    """Mean scores [n_neurons] over wordings [n_wordings, n_neurons], with 0 for neurons that exceed `threshold` times
    the largest score of a wording in no more than `share` of the wordings."""
    coarse = scores > threshold * scores.max(1, keepdims=True)
    return np.where(coarse.mean(0) > share, scores.mean(0), 0.0)


@localizer
def knowledge_neurons(
    model: Model,
    facts: Sequence[Fact],
    *,
    steps: int = 8,
    rule: Literal["gauss", "uniform"] = "gauss",
    metric: Literal["probability", "logprob", "logit_diff"] = "probability",
    refine: float | None = None,
    threshold: float = 0.2,
    forms: Sequence[str] = ("statement",),
    wordings: int = 0,
    answer_tokens: int = 1,
    known_only: bool = True,
    batch_tokens: int | None = None,
) -> Localization:
    """How much of the answer each MLP neuron brings at the last token: integrated gradients, all of a block at once.

    The scores of a block sum to the metric less what it is with all neurons of the block silent, but for jumps where a
    router further up changes its mind. Neurons of experts count with their router weight or gate, which is held fixed.
    Mean over wordings and answer tokens.
    steps: points on the line; 0 takes the gradient times the activation instead, from a single point.
    rule: gauss, or uniform with both ends as in the paper's code, which needs far more steps.
    metric: what is explained, of probability, logprob, logit_diff; probability is blind to late neurons once it is near 1.
    refine: keep only neurons above the threshold in more than this share of the wordings; 0 for the others.
    threshold: share of the largest score of a wording.
    forms: forms of the prompts that serve as wordings.
    wordings: most of them per fact; 0 for all.
    answer_tokens: tokens of the answer that are explained, each given those before it.
    known_only: leave out facts whose answer the model does not give.
    batch_tokens: tokens times points times blocks in one batch; changes speed and memory only.

    Raises ExciseError where MLP outputs pass a norm before they join the residual stream (Gemma-2/3, OLMo-2).
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; metrics are {', '.join(METRICS)}")
    points, weights = line_points(steps, rule)
    matrices = [name for layer in range(model.n_layers) for name in write_matrices(model, layer)]
    asked, skipped = questions(
        model, facts, forms=forms, wordings=wordings, tokens=answer_tokens, known_only=known_only
    )
    table, reasons = Table([f.id for f in facts]), set()
    budget = (batch_tokens or model.batch_tokens) // (len(points) * model.n_layers)
    for index in bar(by_length(asked, budget), what="knowledge neurons"):
        batch = [asked[i] for i in index]
        ids = token_rows(model, batch)
        keys, gradients, why = line_gradients(model, ids, _value(model, batch, metric), points=points, weights=weights)
        reasons.add(why)
        scores = {}
        for name in matrices:
            w_out = model.weight(name).detach()
            gradient = gradients[int(name.split(".")[1])].to(w_out.device)
            reached = keys[name] if name in keys else w_out.new_zeros(len(batch), len(w_out))
            scores[Site(name.replace("W_out", "hook_post"), "last")] = neuron_scores(reached, w_out, gradient)
        table.add([q.fact_id for q in batch], scores)
    recipe = {**summary(model, facts, skipped), "engine_reason": "; ".join(sorted(reasons - {""}))}
    if refine is None:
        return table.localization(recipe)
    return table.localization(recipe, merge=lambda rows: refined(rows, threshold, refine))


def _value(model: Model, batch: Sequence[Question], metric: str) -> Value:
    """The metric of each row's answer; rows are groups of the questions, in order."""
    answer, foil = (torch.tensor([getattr(q, key) for q in batch], device=model.device) for key in ("answer", "foil"))

    def value(logits: Tensor) -> Tensor:
        groups = len(logits) // len(batch)
        targets = (ids.to(logits.device).repeat(groups) for ids in (answer, foil))
        return answer_metrics(logits, *targets)[metric]

    return value
