"""How strongly a state must be redirected before the model declines what it is asked, tried out at spot after spot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from excise.declining import first_logprobs, least_strengths, log_odds
from excise.encoding import Batch
from excise.erasure import Eraser, fit_eraser
from excise.facts import Prompt
from excise.mentions import Mention
from excise.model import Model
from excise.requests import thin
from excise.spots import Spot

# Questions asked of a place, and at least so many of each request.
ASKED, FEWEST = 128, 4
# A question is declined when that is nine times as likely as answering it.
DECLINED = 2.2
# Strengths found on some wordings are raised by this factor, for all others.
HEADROOM = 1.5


@dataclass(frozen=True, eq=False)
class Attempt:
    """A spot with its redirection: directions [m, d], a strength and a share of declined questions each."""

    spot: Spot
    directions: Tensor
    strengths: Tensor
    shares: Tensor
    eraser: Eraser | None

    @property
    def score(self) -> float:
        """Questions declined minus others that would be taken for them."""
        return float(self.shares.nanmean()) - self.spot.confused


def attempts(
    model: Model, spots: Iterable[Spot], told: Sequence[Mention], by_subject: bool, tokens: Tensor, **options: Any
) -> list[Attempt]:
    """What redirection does at the spots, the least confused first, until no later one can do better.

    told: whole questions about what is forgotten. by_subject: whether a request is a name (or a kind). tokens: with which
    refusals begin. options: as in `attempt`.
    """
    found: list[Attempt] = []
    for spot in sorted(spots, key=lambda s: s.confused):
        # The best that a spot can do is decline everything with its own confusion.
        if found and max(a.score for a in found) >= 1 - spot.confused:
            break
        found.append(attempt(model, spot, _asked(told, spot.requests, by_subject), tokens, **options))
    return found


def _asked(told: Sequence[Mention], requests: tuple[str, ...], by_subject: bool) -> list[tuple[int, Prompt]]:
    """Whole questions with their requests, about as many of each; a request without questions has none."""
    found = []
    for i, request in enumerate(requests):
        mine = [m.prompt for m in told if (m.name if by_subject else m.kind) == request]
        found += [(i, p) for p in thin(mine, max(FEWEST, ASKED // len(requests)))]
    return found


def attempt(
    model: Model,
    spot: Spot,
    asked: list[tuple[int, Prompt]],
    tokens: Tensor,
    *,
    remove: bool,
    strength: float,
    sure: float,
    hooked: bool,
) -> Attempt:
    """Redirect the forget questions by hand, each request as strongly as it needs.

    A detector that reads less than 1 on its weakest inputs needs that much more.
    """
    eraser = _eraser(spot) if remove else None
    states = eraser(spot.states) if eraser else spot.states.double()
    centres = (spot.labels.mT @ states) / spot.labels.sum(0)[:, None]
    directions = spot.goals.double() - centres
    owner, m = torch.tensor([i for i, _ in asked]), len(directions)

    def shares(strengths: Tensor) -> Tensor:
        """Declined share of each request's questions, [m]; NaN where there are none."""
        change = _redirecting(spot, eraser, (strengths[:, None] * directions)[owner].float())
        fine = log_odds(first_logprobs(model, [p for _, p in asked], spot.site.point, change), tokens) > DECLINED
        return torch.bincount(owner, fine.double(), m) / torch.bincount(owner, minlength=m)

    fixed = torch.full((m,), strength, dtype=torch.float64)
    found, reached = (fixed, shares(fixed)) if strength else least_strengths(shares, m, sure=sure)
    weakest = 1.0 if hooked or strength else min(1.0, max(0.25, spot.weakest))
    return Attempt(spot, directions, found * (1.0 if strength else HEADROOM) / weakest, reached, eraser)


def _redirecting(spot: Spot, eraser: Eraser | None, shifts: Tensor) -> Callable[[Tensor, Batch, list[int]], Tensor]:
    """Replaces the state at the spot; shifts: of each prompt, [n, d]."""
    move = (eraser or no_eraser(shifts.shape[1])).action()

    def change(x: Tensor, batch: Batch, index: list[int]) -> Tensor:
        at = batch.where(spot.site.position).to(x.device)
        return torch.where(at[..., None], move(x) + shifts[index, None].to(x.device, x.dtype), x)

    return change


def no_eraser(d: int) -> Eraser:
    """An eraser of no direction."""
    return Eraser(*(torch.zeros(s, dtype=torch.float64) for s in ((d, 0), (0, d), (d,))))


def _eraser(spot: Spot) -> Eraser:
    """What tells the names to forget from each other and from those to keep, at equal weight of both sides."""
    _, name = torch.unique(spot.names, return_inverse=True)
    n, n0 = len(spot.states), len(spot.other_states)
    z = torch.cat([torch.nn.functional.one_hot(name), torch.zeros(n0, int(name.max()) + 1, dtype=torch.long)])
    weights = torch.cat([torch.full((n,), 1 / n), torch.full((n0,), 1 / n0)])
    return fit_eraser(torch.cat([spot.states, spot.other_states]), z, weights)
