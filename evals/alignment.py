"""Linear maps from one model's states to another's, fitted where neither has forgotten anything.

Two uses. If an edited model's states are a linear image of the original's, the knowledge is intact (OPC, arXiv 2507.07754).
And a model that was trained apart speaks another language inside: its states mean something to the original only after
the best linear translation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evals.sampling import direct, measurable
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.trace import patched, read_batch

# Rows of a fit per dimension; with fewer the map fits noise.
ROWS = 10
# One text in this many is kept out of the fit, for R2.
HELD_OUT = 10


@dataclass(frozen=True)
class Linear:
    """x -> (x - centre) @ weight + target, [.., d_in] -> [.., d_out]; r2: share of variance explained on held-out rows."""

    weight: Tensor
    centre: Tensor
    target: Tensor
    r2: float = float("nan")

    def __call__(self, x: Tensor) -> Tensor:
        """The image of x, in x's dtype."""
        parts = (t.to(x.device) for t in (self.weight, self.centre, self.target))
        weight, centre, target = parts
        return ((x.double() - centre) @ weight + target).to(x.dtype)


@dataclass
class Sums:
    """What a linear fit needs of rows x [n, d_in] and y [n, d_out], in float64."""

    n: int = 0
    x: Tensor | float = 0.0
    y: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    xy: Tensor | float = 0.0
    yy: Tensor | float = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count some rows."""
        x, y = x.double().cpu(), y.double().cpu()
        self.n += len(x)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum(0)
        self.xx, self.xy, self.yy = self.xx + x.mT @ x, self.xy + x.mT @ y, self.yy + (y * y).sum()

    def fit(self, ridge: float = 1e-3) -> Linear:
        """argmin |X W - Y|^2 + lambda |W|^2 over centred rows, lambda = ridge * the mean eigenvalue of X' X."""
        centre, target = torch.as_tensor(self.x) / self.n, torch.as_tensor(self.y) / self.n
        xx = torch.as_tensor(self.xx) - self.n * torch.outer(centre, centre)
        xy = torch.as_tensor(self.xy) - self.n * torch.outer(centre, target)
        # States that are all the same leave rounding alone in xx: the second term keeps that from being inverted.
        penalty = ridge * xx.diagonal().mean() + 1e-13 * torch.as_tensor(self.xx).diagonal().mean()
        return Linear(torch.linalg.solve(xx + penalty * torch.eye(len(xx), dtype=xx.dtype), xy), centre, target)

    def r2(self, found: Linear) -> float:
        """1 - (what `found` leaves) / (variance of y) over these rows; NaN without rows."""
        if not self.n:
            return float("nan")
        x, y, c, t, w = torch.as_tensor(self.x), torch.as_tensor(self.y), found.centre, found.target, found.weight
        xx = self.xx - torch.outer(c, x) - torch.outer(x, c) + self.n * torch.outer(c, c)
        xy = self.xy - torch.outer(c, y) - torch.outer(x, t) + self.n * torch.outer(c, t)
        left = self.yy - 2 * t @ y + self.n * t @ t - 2 * (w * xy).sum() + (w * (xx @ w)).sum()
        return float(1 - left / (self.yy - y @ y / self.n))


def fit_maps(
    source: Arm, target: Arm, prompts: Sequence[Prompt], points: Sequence[str], *, ridge: float = 1e-3
) -> dict[str, Linear]:
    """For each point the map from the source's activations to the target's, over all tokens of prompts and answers.

    BOS is left out: its state is the same in every text, and far from all others.
    """
    fitted, held = {p: Sums() for p in points}, {p: Sums() for p in points}
    model = target.model
    for index, batch in model.batches(prompts, answers=True, tokens=max(1, model.batch_tokens // 4)):
        theirs, ours = (_seen(arm, batch, points) for arm in (source, target))
        out = torch.tensor([i % HELD_OUT == HELD_OUT - 1 for i in index])[:, None]
        for kind, chosen in ((fitted, ~out), (held, out)):
            where = real_tokens(batch).cpu() & chosen
            if where.any():
                for p in points:
                    kind[p].add(theirs[p][where.to(theirs[p].device)], ours[p][where.to(ours[p].device)])
    maps = {p: s.fit(ridge) for p, s in fitted.items()}
    return {p: replace(m, r2=held[p].r2(m)) for p, m in maps.items()}


def map_points(model: Model) -> list[str]:
    """The residual stream after each block and, where there is one, the final norm's output."""
    last = ["ln_final.hook_out"] if model.names.final_norm else []
    return [*(f"blocks.{i}.hook_resid_post" for i in range(model.n_layers)), *last]


def kept_maps(source: Arm, target: Arm, prompts: Sequence[Prompt], *, ridge: float = 1e-3) -> dict[str, Linear]:
    """`fit_maps` at all `map_points`, kept with the target for whoever asks again."""
    key = ("maps", source.model, source.edit, tuple(prompts), ridge)
    if key not in target.kept:
        target.kept[key] = fit_maps(source, target, prompts, map_points(target.model), ridge=ridge)
    return dict(target.kept[key])


def fitting_prompts(model: Model, facts: Sequence[Fact], seed: int) -> tuple[list[Prompt], str]:
    """Prompts with answers about what stays, ROWS tokens per dimension or as many as there are; why not, where too few."""
    groups = ("retain", "neighbour", "general")
    items, _ = measurable(model, direct(facts, groups=groups, limit=0, seed=seed))
    wanted, chosen, rows = ROWS * model.names.d_model, [], 0
    for item in items:
        if rows >= wanted:
            break
        chosen.append(item.prompt)
        rows += len(model.tokenised([item.prompt], answers=True)[0].ids) - 1
    if rows < 2 * model.names.d_model:
        return (
            [],
            f"{rows} tokens of facts to keep: a map of {model.names.d_model} dimensions needs at least twice as many",
        )
    return chosen, ""


def real_tokens(batch: Batch, *, bos: bool = False) -> Tensor:
    """All tokens of prompts and answers but padding and, unless `bos`, BOS; [batch, width]."""
    where = batch.mask.bool().clone()
    if not bos:
        where[torch.tensor(batch.has_bos), 0] = False
    return where


def carried_on(model: Model, batch: Batch, put: Mapping[str, Tensor], where: Tensor) -> tuple[Tensor, Tensor]:
    """Mean log-probability of each row's answer, and whether greedy decoding says it, both [rows], under a patch.

    put: point -> values [rows, width, d] that stand there at the tokens `where` [rows, width].
    """

    def write(value: Tensor) -> object:
        return lambda x: torch.where(where.to(x.device)[..., None], value.to(x.device, x.dtype), x)

    with patched(model, {name: write(value) for name, value in put.items()}):  # type: ignore[misc]
        logits = model.logits(batch)
    means, exact = [], []
    for row in range(len(batch)):
        logp, gold = batch.answer_logits(logits, row).log_softmax(-1), batch.answer(row)
        means.append(logp.gather(-1, gold[:, None]).mean())
        exact.append((logp.argmax(-1) == gold).all())
    return torch.stack(means).double().cpu(), torch.stack(exact).double().cpu()


def _seen(arm: Arm, batch: Batch, points: Sequence[str]) -> dict[str, Tensor]:
    with arm.running() as model:
        return read_batch(model, batch.to(model.device), points)
