"""Single weights: a score for every element of a model's matrices, one matrix at a time, and the best share of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from excise.errors import ExciseError
from excise.facts import Prompt
from excise.gradients import flow, inflow
from excise.progress import bar
from excise.sites import Site
from localize.weight_scores import Gradients, best_rows, bracket, gradients_at, threshold
from localize.weight_sums import Weighing

# More sites than this are no localization; masks have no such limit.
MOST = 100_000
# Single weights whose scores tell beforehand about where the threshold lies.
SAMPLE = 16384

# (matrix, places or None) -> scores [d_in, d_out] of its weights, or [n] of those at the places (rows, columns)
Scores = Callable[[str, "tuple[Tensor, Tensor] | None"], Tensor]


@dataclass(frozen=True)
class ElementMasks:
    """The best share of single weights. masks: matrix -> boolean [d_in, d_out].

    threshold: the score that a chosen weight reaches; NaN for wanda, which ranks inside each output.
    """

    masks: dict[str, Tensor]
    threshold: float

    @property
    def density(self) -> dict[str, float]:
        """Share of chosen weights by matrix."""
        return {name: float(mask.float().mean()) for name, mask in self.masks.items()}


def element_scores(weighing: Weighing, prompts: Sequence[Prompt]) -> Scores:
    """A function from a matrix, and places in it if not all are wanted, to the scores of its weights for all prompts together.

    What is kept is the gradient over the prompts (as inputs and output gradients while these are smaller), never a
    score: each call works one matrix out.
    """
    model, measure = weighing.model, weighing.measure
    told = Gradients(len(prompts), square=measure == "fisher")
    norms: dict[str, Tensor] = {}

    def square(name: str, x: Tensor, dy: Tensor | None) -> None:
        norms[name] = norms.get(name, torch.zeros(())) + x.float().square().sum((0, 1))

    if measure != "magnitude":
        batches = list(model.batches(prompts, answers=measure != "wanda", tokens=weighing.tokens))
        for _, batch in bar(batches, what="weights"):
            if measure == "wanda":
                inflow(model, batch, weighing.names, batch.where("after_bos").to(batch.ids.device), square)
            else:
                flow(model, batch, weighing.names, told.add)

    def of(name: str, at: tuple[Tensor, Tensor] | None = None) -> Tensor:
        whole = model.weight(name).detach()
        theta = (whole if at is None else whole[at]).float()
        if measure == "magnitude":
            return theta.abs()
        if measure == "wanda":
            scale = norms.get(name, whole.new_zeros(len(whole))).sqrt()
            return theta.abs() * (scale[:, None] if at is None else scale[at[0]])
        gradient = told.mean(name, theta) if at is None else told.mean_at(name, at)
        return _scored(weighing, name, at)(gradient, theta)

    return of


def _scored(
    weighing: Weighing, name: str, at: tuple[Tensor, Tensor] | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """A function from g (fisher: g^2) and theta to scores; of a whole matrix, or of its weights at some places."""
    kept, measure = weighing.kept.gradients, weighing.measure
    theta = weighing.model.weight(name).detach()
    retain = None
    if kept is not None:
        retain = kept.mean(name, theta) if at is None else kept.mean_at(name, at)
    wagle = measure == "wagle" and retain is not None

    def scored(gradient: Tensor, theta: Tensor) -> Tensor:
        if measure == "fisher":
            return weighing.score(gradient, retain)
        target = theta - retain / weighing.kept.gamma if wagle and retain is not None else theta
        forget = gradient.square() if measure == "gradient" else target * gradient
        return weighing.score(forget, None if retain is None else theta * retain)

    return scored


def select(weighing: Weighing, scores: Scores, share: float) -> ElementMasks:
    """The best `share` of the weights of all matrices together; for wanda, of the rows of every column.

    One pass over the matrices where a sample tells what the threshold lies between, which it does but for ties.
    Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share of weights lies between 0 and 1, not {share}")
    if weighing.measure == "wanda":
        return ElementMasks({n: best_rows(scores(n, None), share) for n in weighing.names}, float("nan"))
    sizes = {n: weighing.model.weight(n).numel() for n in weighing.names}
    total = sum(sizes.values())
    count = max(1, round(share * total))
    low, high = bracket(_sample(weighing, scores, sizes), count / total)
    masks: dict[str, Tensor] = {}
    between: dict[str, tuple[Tensor, Tensor]] = {}
    for name in weighing.names:
        values = scores(name, None)
        masks[name] = values >= high
        inside = values > low
        places = (inside if high == float("inf") else inside.logical_and_(values < high)).nonzero()
        between[name] = places, values[places[:, 0], places[:, 1]]
    close = torch.cat([v for _, v in between.values()])
    missing = count - sum(int(m.count_nonzero()) for m in masks.values())
    if not 0 < missing <= len(close):

        def stream() -> Iterator[Tensor]:
            return (scores(name, None) for name in weighing.names)

        limit = threshold(stream, count)
        return ElementMasks({n: scores(n, None).double() >= limit for n in weighing.names}, limit)
    limit = float(close.topk(missing).values[-1])
    for name, (places, values) in between.items():
        masks[name][tuple(places[values >= limit].T)] = True
    return ElementMasks(masks, limit)


def _sample(weighing: Weighing, scores: Scores, sizes: dict[str, int]) -> Tensor:
    """Scores of random weights, of each matrix as many as its size demands."""
    generator, found, total = torch.Generator().manual_seed(0), [], sum(sizes.values())
    for name, size in sizes.items():
        theta = weighing.model.weight(name)
        flat = torch.randint(size, (-(-SAMPLE * size // total),), generator=generator).to(theta.device)
        found.append(scores(name, (flat // theta.shape[1], flat % theta.shape[1])).float().cpu())
    return torch.cat(found)


def element_sites(
    weighing: Weighing, prompts: Sequence[Prompt], share: float
) -> tuple[tuple[Site, ...], np.ndarray, ElementMasks]:
    """Sites of the best single weights for all prompts together, and their scores for each prompt, [n, n_sites].

    Raises ExciseError when the share makes more sites than a localization should have.
    """
    scores = element_scores(weighing, prompts)
    chosen = select(weighing, scores, share)
    places = {n: m.nonzero() for n, m in chosen.masks.items() if bool(m.any())}
    count = sum(len(at) for at in places.values())
    if count > MOST:
        raise ExciseError(f"{count} single weights are too many sites: lower `share`, or take element_masks")
    sites = tuple(Site(n, None, i, j) for n, at in places.items() for i, j in at.tolist())
    if weighing.measure in ("wanda", "magnitude"):
        same = torch.cat([scores(n, (at[:, 0], at[:, 1])) for n, at in places.items()]).double().cpu().numpy()
        return sites, np.tile(same, (len(prompts), 1)), chosen
    return sites, _per_fact(weighing, prompts, places), chosen


def _per_fact(weighing: Weighing, prompts: Sequence[Prompt], places: dict[str, Tensor]) -> np.ndarray:
    """Scores [n, n_places] of single weights, from the gradient of each prompt at these places alone."""
    model, squared = weighing.model, weighing.measure == "fisher"
    at = {n: (p[:, 0], p[:, 1]) for n, p in places.items()}
    scored = {n: _scored(weighing, n, at[n]) for n in places}
    theta = {n: model.weight(n).detach()[at[n]].float() for n in places}
    table = np.zeros((len(prompts), sum(map(len, places.values()))))
    for index, batch in model.batches(prompts, answers=True, tokens=weighing.tokens):
        slopes = {n: torch.zeros(len(batch), len(p), device=p.device) for n, p in places.items()}

        def consume(name: str, x: Tensor, dy: Tensor | None, slopes: dict[str, Tensor] = slopes) -> None:
            assert dy is not None
            slopes[name] = gradients_at(x, dy, at[name])

        flow(model, batch, list(places), consume)
        found = [scored[n](g.square() if squared else g, theta[n]) for n, g in slopes.items()]
        table[index] = torch.cat(found, 1).double().cpu().numpy()
    return table
