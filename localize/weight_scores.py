"""What a weight, or a group of weights, matters for a fact: the published scores as functions of tensors.

Throughout, x [facts, n, d_in] enters a matrix W [d_in, d_out], dy [facts, n, d_out] is the gradient of each fact's loss
at its output, and g = x^T dy, the gradient of W, is formed only where single elements are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

Measure = Literal["taylor", "wagle", "fisher", "snip", "gradient", "wanda", "magnitude"]
MEASURES = ("taylor", "wagle", "fisher", "snip", "gradient", "wanda", "magnitude")
# A unit that the retain facts never use gets this share of the mean retain Fisher information, so that no ratio is infinite.
FLOOR = 1e-3
BINS = 4096
# Places whose products of inputs and gradients are held at once.
AT_ONCE = 1024


def row_effects(x: Tensor, weight: Tensor, dy: Tensor) -> Tensor:
    """Sum over j of weight_ij * g_ij for each fact, [facts, d_in]."""
    rows, back, fact = reached(x, dy)
    return x.new_zeros(len(x), x.shape[-1], dtype=torch.float32).index_add_(0, fact, (back @ weight.float().mT) * rows)


def reached(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [n, d_in] and dy [n, d_out] where a gradient arrives at all, in float32, and the fact of each, [n].

    Padding is left out, and in the last blocks most tokens are: only those that an answer is read from count there.
    """
    at = dy.any(-1).flatten().nonzero()[:, 0]
    return x.flatten(0, 1)[at].float(), dy.flatten(0, 1)[at].float(), at // x.shape[1]


def row_squares(x: Tensor, dy: Tensor) -> Tensor:
    """Sum over j of g_ij^2 for each fact, [facts, d_in]; by the Gram matrix of dy, which is small."""
    x, dy = x.float(), dy.float()
    return ((dy @ dy.mT @ x) * x).sum(1).clamp_min(0)


def row_norms(x: Tensor, weight: Tensor) -> Tensor:
    """Sum over j of |weight_ij| * |x_i|, |x_i| over the fact's tokens, [facts, d_in] (Wanda, arXiv 2306.11695)."""
    return x.float().square().sum(1).sqrt() * weight.float().abs().sum(1)


def score(measure: Measure, forget: Tensor, retain: Tensor | None, *, penalty: float, floor: float) -> Tensor:
    """The score of elements or units, larger for more responsible, from sums over each unit's weights.

    forget: theta * g (taylor, snip), (theta - g_retain / gamma) * g (wagle), g^2 (fisher, gradient), theta^2
    (magnitude), or the sum itself (wanda). retain: theta * g or g^2 of the retain facts, for taylor and fisher.
    """
    match measure:
        case "taylor":
            return -forget if retain is None else -forget - penalty * retain.abs()
        case "snip" | "wagle":
            return forget.abs()
        case "fisher":
            assert retain is not None
            return forget / (retain + floor)
        case "gradient" | "magnitude":
            return forget.sqrt()
        case _:
            return forget


class Gradients:
    """Means over so many facts of g, or of g^2, by matrix. Kept as x and dy while these are smaller than the matrix."""

    def __init__(self, facts: int, *, square: bool = False) -> None:
        self.facts, self.square = facts, square
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._dense: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, dy: Tensor | None) -> None:
        """Add the facts of one batch."""
        assert dy is not None
        self._factors.setdefault(name, []).append((x, dy.detach()))
        if sum(a.numel() + b.numel() for a, b in self._factors[name]) > x.shape[-1] * dy.shape[-1]:
            # Laid out as most matrices are stored, so that the two are read in the same order.
            self._dense[name] = self._sum(name, x.new_empty(dy.shape[-1], x.shape[-1], dtype=torch.float32).mT)
            self._factors[name] = []

    def mean(self, name: str, like: Tensor) -> Tensor:
        """Mean over the facts, float32, in the shape of `like`; zero for a matrix that no token reached."""
        return self._sum(name, like).to(like.device)

    def mean_at(self, name: str, at: tuple[Tensor, Tensor]) -> Tensor:
        """The mean at some places, rows and columns [n], without the rest of the gradient, [n]."""
        factors = self._factors.get(name, [])
        dense = self._dense.get(name)
        if dense is None and not factors:
            return torch.zeros(len(at[0]), device=at[0].device)
        found = torch.zeros((), device=at[0].device) if dense is None else dense[at]
        for x, dy in factors:
            each = gradients_at(x, dy, at)
            found = found + (each.square() if self.square else each).sum(0) / self.facts
        return found

    def _sum(self, name: str, like: Tensor) -> Tensor:
        factors = self._factors.get(name, [])
        total = self._dense.get(name)
        if total is None:
            total = torch.zeros_like(like, dtype=torch.float32, device=factors[0][0].device if factors else None)
        elif factors:
            total = total.clone()
        for x, dy in factors:
            if self.square:
                for one, back in zip(x.float(), dy.float(), strict=True):
                    total += (one.mT @ back).square_().div_(self.facts)
            else:
                rows, back, _ = reached(x, dy)
                total.addmm_(rows.mT, back, alpha=1 / self.facts)
        return total


def gradients_at(x: Tensor, dy: Tensor, at: tuple[Tensor, Tensor]) -> Tensor:
    """g_ij of each fact at some places, rows and columns [n]: [facts, n] in float32."""
    pairs = zip(*(part.split(AT_ONCE) for part in at), strict=True)
    return torch.cat([(x[..., i].float() * dy[..., j].float()).sum(1) for i, j in pairs], 1)


def bracket(sample: Tensor, share: float) -> tuple[float, float]:
    """Two values between which lies, all but surely, the one that `share` of all numbers reach, from a random sample."""
    ordered = sample.sort(descending=True).values
    place = share * len(ordered)
    slack = 6 * (place * (1 - share)) ** 0.5 + 6  # standard deviations of the number that is above it
    first, last = int(place - slack), int(place + slack) + 1
    low = float(ordered[last]) if last < len(ordered) else float("-inf")
    return low, float(ordered[first]) if first >= 0 else float("inf")


def threshold(stream: Callable[[], Iterable[Tensor]], count: int, *, bins: int = BINS, passes: int = 3) -> float:
    """The value that `count` of all streamed numbers reach, to within one bin of the last histogram; equal ones stay together.

    Each pass lays a histogram over the bin that holds the value, so that what is held is one tensor and `bins` counts.
    """
    low, high = _range(stream())
    for _ in range(passes):
        if not high > low:
            break
        found = torch.zeros(bins, dtype=torch.float64)
        above = 0
        for values in stream():
            flat = values.reshape(-1).double()
            above += int((flat > high).sum())
            inside = flat[(flat >= low) & (flat <= high)]
            found += torch.histc(inside.cpu(), bins, low, high) if len(inside) else 0
        reached = above + found.flip(0).cumsum(0)
        place = bins - 1 - int((reached < count).sum().clamp(max=bins - 1))
        width = (high - low) / bins
        low, high = low + place * width, low + (place + 1) * width
    return low


def _range(stream: Iterable[Tensor]) -> tuple[float, float]:
    ends = [(float(v.min()), float(v.max())) for v in stream if v.numel()]
    return min(a for a, _ in ends), max(b for _, b in ends)


def best_rows(values: Tensor, share: float) -> Tensor:
    """Boolean mask of the best `share` of the rows in every column: the same number for each output, as Wanda ranks."""
    count = max(1, round(share * values.shape[0]))
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    return mask.scatter_(0, values.topk(count, dim=0).indices, True)


def spread(values: Tensor, most: int) -> list[float]:
    """At most `most` absolute values on an even grid through a tensor, for a median over many tensors."""
    flat = values.reshape(-1)
    return flat[:: -(-flat.numel() // most)].abs().double().tolist()
