"""What flows through each matrix: the rows that enter it and the gradients that come back, one matrix at a time.

The gradient of a matrix is x^T dy. Whoever needs a sum, a norm or a product of it can often have that from x and dy
without the gradient itself, and for every fact of a batch apart. So nothing is kept here: each matrix is handed over
when the backward pass reaches it, fused experts included, and parameters ask for no gradient at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.matrix_hooks import Consumer, passing
from excise.trace import _Enough, patched

if TYPE_CHECKING:
    from excise.facts import Prompt
    from excise.model import Model
    from excise.scores import Localization


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient, which spares the backward pass half of its work."""
    asking = [p for p in model.hf.parameters() if p.requires_grad]
    head = model.hf.get_output_embeddings()
    # A slice of the last tokens is multiplied row by row, each time with all of the unembedding, unless it is whole.
    hook = None if head is None else head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
        for parameter in asking:
            parameter.requires_grad_(True)


def answer_losses(model: Model, batch: Batch, *, odds: bool = False) -> Tensor:
    """Mean negative log-likelihood of each row's answer tokens, [rows] in float32; only their logits are computed.

    odds: minus the log-odds log p / (1 - p) instead. Their gradient is that of the likelihood over 1 - p: it does not
        vanish where an answer is certain.
    """
    first = min(batch.starts) - 1
    kept = torch.arange(first, batch.ids.shape[1] - 1, device=batch.ids.device)
    out = model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=kept).logits
    logits = out if out.dtype == torch.float64 else out.float()
    targets = batch.ids[:, first + 1 :]
    columns = torch.arange(first + 1, batch.ids.shape[1], device=batch.ids.device)
    starts, lengths = (torch.tensor(x, device=batch.ids.device)[:, None] for x in (batch.starts, batch.lengths))
    counts = (columns >= starts) & (columns < lengths)
    targets = targets.to(logits.device)[..., None]
    if odds:
        others = logits.scatter(-1, targets, -torch.inf).logsumexp(-1)
        nll = others - logits.gather(-1, targets)[..., 0]
    else:
        nll = -logits.log_softmax(-1).gather(-1, targets)[..., 0]
    return (nll * counts.to(nll.device)).sum(1) / counts.sum(1).to(nll.device)


def flow(model: Model, batch: Batch, names: Sequence[str], consumer: Consumer, *, odds: bool = False) -> Tensor:
    """One forward and one backward pass of the answers' losses; `consumer` gets every named matrix, last block first.

    Returns the losses [rows]. The backward pass ends at the lowest block that is asked for. An expert that no token of
    the batch reaches is not handed over. Raises ExciseError for a matrix whose output is not what the model goes on with.
    """
    lowest = min(model.names.weight(name).layer or 0 for name in names)
    with frozen(model), passing(model, batch, names, consumer, None):
        with patched(model, {f"blocks.{lowest}.hook_resid_pre": _asking}), torch.enable_grad():
            losses = answer_losses(model, batch, odds=odds)
        losses.sum().backward()
    return losses.detach()


def mean_gradients(
    model: Model,
    prompts: Sequence[Prompt],
    names: Sequence[str],
    *,
    square: bool = False,
    odds: bool = False,
    tokens: int | None = None,
) -> dict[str, Tensor]:
    """Mean over prompts of each matrix's gradient of the answer's loss, or of its square, [d_in, d_out] in float32.

    square: the diagonal of the empirical Fisher information, prompt by prompt: the square of a batch's mean gradient is
        something else (Spearman 0.44 with it, and smaller by the size of the batch).
    odds: of the answer's log-odds, see answer_losses.
    Matrices that no token reaches (experts) are left out. tokens: padded tokens of one batch.
    """
    total: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, dy: Tensor | None) -> None:
        assert dy is not None
        if name not in total:
            total[name] = torch.zeros(x.shape[-1], dy.shape[-1], device=dy.device)
        if not square:
            total[name].addmm_(x.flatten(0, 1).float().mT, dy.flatten(0, 1).float())
            return
        for one, back in zip(x.float(), dy.float(), strict=True):
            total[name] += (one.mT @ back).square_()

    for _, batch in model.batches(prompts, answers=True, tokens=tokens):
        flow(model, batch, names, add, odds=odds)
    return {name: t.div_(len(prompts)) for name, t in total.items()}


def sweeps(model: Model, names: Sequence[str], most: int) -> list[list[str]]:
    """The matrices in groups of at most `most` weights (or one matrix), last block first: what one sweep keeps at a time."""
    groups: list[list[str]] = []
    held = 0
    for name in reversed(names):
        size = model.weight(name).numel()
        if not groups or held + size > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def both_gradients(
    model: Model, asked: Sequence[Sequence[Prompt]], names: Sequence[str], at_once: int, **options: bool
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Each matrix with its mean gradients on forget and on retain prompts, in sweeps that hold at most `at_once` weights.

    asked: the forget and the retain prompts. options: as in `mean_gradients`. A matrix that no forget prompt reaches is
    left out; where no retain prompt reaches it the second is None.
    """
    for group in sweeps(model, names, at_once):
        forget, retain = (mean_gradients(model, prompts, group, **options) for prompts in asked)
        for name in group:
            if name in forget:
                yield name, forget.pop(name), retain.pop(name, None)


def block_matrices(model: Model, layers: Sequence[int]) -> list[str]:
    """The attention and MLP matrices of some blocks that a gradient is known of: all but routers."""
    return [n for layer in layers for n in model.names.weights(layer) if not n.endswith("W_router")]


def eligible_matrices(model: Model, where: Localization | None) -> list[str]:
    """The matrices that a localization allows: those it names, else those of its blocks; without it, of all blocks."""
    if where is None or not where.sites:
        return block_matrices(model, range(model.n_layers))
    named = list(dict.fromkeys(s.point for s in where.sites if s.is_weight and s.layer is not None))
    return named or block_matrices(model, where.layers())


def inflow(model: Model, batch: Batch, names: Sequence[str], where: Tensor, consumer: Consumer) -> None:
    """One forward pass without gradients: `consumer` gets what enters every named matrix, dy being None.

    where: mask [rows, width] of the tokens that count. What enters an expert's W_out counts as much as its router says.
    """
    last = max(model.names.weight(name).layer or 0 for name in names)

    def stop(x: Tensor) -> None:
        raise _Enough

    with torch.no_grad(), passing(model, batch, names, consumer, where):
        with patched(model, {f"blocks.{last}.hook_resid_post": stop}):
            try:
                model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
            except _Enough:
                pass


def _asking(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(True)


__all__ = [
    "answer_losses",
    "block_matrices",
    "both_gradients",
    "eligible_matrices",
    "flow",
    "frozen",
    "inflow",
    "mean_gradients",
    "sweeps",
]
