"""Gates: when a change takes effect. Each is causal: what fires at a token depends on that token and earlier ones only,
so a prompt processed at once and token by token give the same decisions.

A gate reads the activation at its own site, which the forward pass must reach before the site of the change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from excise.features import read_features, scaling
from excise.sites import Site


@dataclass
class GateState:
    """What a per-sequence gate remembers between steps of one generation: counts per sequence, [batch]."""

    hot: Tensor | None = None
    seen: Tensor | None = None
    opened: Tensor | None = None
    past: Tensor | None = None  # hot tokens among the first n valid ones, [batch, longest + 1]
    last: Tensor | None = None  # which valid token each feature fired on last, counted from 1, [batch, n]

    def running(self, hot: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Running counts [batch, width] of hot and of valid tokens, this step included; the totals are kept."""
        hits, total = (hot & valid).long().cumsum(1), valid.long().cumsum(1)
        if self.hot is not None and self.seen is not None:
            if len(self.hot) != len(hits):
                raise RuntimeError(
                    f"the batch grew from {len(self.hot)} to {len(hits)} rows in the middle of a generation (beam search?): "
                    "per-sequence gates follow one row from prompt to end"
                )
            hits, total = hits + self.hot[:, None], total + self.seen[:, None]
        self.hot, self.seen = hits[:, -1], total[:, -1]
        return hits, total

    def before(self, hits: Tensor, total: Tensor, window: int) -> Tensor:
        """Hot tokens before the last `window` valid ones, [batch, width], from the running counts of this step."""
        past = hits.new_zeros(len(hits), int(total.max()) + 1)
        if self.past is not None:
            past[:, : self.past.shape[1]] = self.past
        self.past = past.scatter(1, total, hits)
        return self.past.gather(1, (total - window).clamp_min(0))

    def since(self, fires: Tensor, total: Tensor) -> Tensor:
        """Number of the valid token on which each feature fired last, [batch, width, n]; 0 before it has."""
        when = torch.where(fires, total[..., None], 0).cummax(1).values
        if self.last is not None:
            when = torch.maximum(when, self.last[:, None])
        self.last = when[:, -1]
        return when

    def ever(self, passed: Tensor) -> Tensor:
        """Whether it has passed at this token or at any earlier one of the sequence, [batch, width]."""
        ever = passed.long().cumsum(1) > 0
        if self.opened is not None:
            ever |= self.opened[:, None]
        self.opened = ever[:, -1]
        return ever


@dataclass(frozen=True, eq=False)
class Gate:
    """Fires or not at every token.

    specials: special tokens other than BOS are judged too; the last token of a chat prompt often is one.
    scope "token": decided for each token alone; "sequence": once fired, it stays on for the rest of the sequence.
    """

    site: Site
    specials: bool = field(default=False, kw_only=True)
    kind: ClassVar[str]

    def hot(self, x: Tensor) -> Tensor:
        """Which tokens look like the target, [batch, width], from x [batch, width, d]."""
        raise NotImplementedError

    def open(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        """Where the change takes effect, [batch, width]. valid: real tokens, padding and specials left out."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Linear(Gate):
    """x . direction > threshold. direction: [d], or [d, n] with thresholds [n], of which any one will do."""

    direction: Tensor
    threshold: float | Tensor
    scope: str = "token"
    kind: ClassVar[str] = "linear"

    def hot(self, x: Tensor) -> Tensor:
        threshold = self.threshold.to(x.device) if isinstance(self.threshold, Tensor) else self.threshold
        above = x.float() @ self.direction.to(x.device).float() > threshold
        return above if self.direction.dim() == 1 else above.any(-1)

    def open(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        return _scoped(self.hot(x), valid, state, self.scope)


@dataclass(frozen=True, eq=False)
class Box(Gate):
    """lower < x < upper in at least `quota` of the coordinates (Key Space Detection, arXiv 2503.21730).

    lower, upper: [d], or [n, d] for n boxes, of which any one will do.
    """

    lower: Tensor
    upper: Tensor
    quota: float = 1.0
    scope: str = "sequence"
    specials: bool = field(default=True, kw_only=True)
    kind: ClassVar[str] = "box"

    def inside(self, x: Tensor) -> Tensor:
        """Share of the coordinates inside, of the box that holds most, [...] from x [..., d]."""
        lower, upper = (t.to(x.device).float().reshape(-1, x.shape[-1]) for t in (self.lower, self.upper))
        wide = x.float()
        shares = [((wide > low) & (wide < high)).float().mean(-1) for low, high in zip(lower, upper, strict=True)]
        return torch.stack(shares).amax(0)

    def hot(self, x: Tensor) -> Tensor:
        return self.inside(x) >= self.quota

    def open(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        return _scoped(self.hot(x), valid, state, self.scope)


@dataclass(frozen=True, eq=False)
class Share(Gate):
    """The share of tokens so far on which one of n features fires passes `share` (dynamic SAE guardrail).

    encoder: [d, n], bias and threshold: [n]; a feature fires where relu(x @ encoder + bias) exceeds its threshold.
    window: 0 counts all tokens of the sequence up to this one (arXiv 2504.08192, made causal); w counts those among the
        last w and divides by w, so that neither harmless text before nor a hot first token moves it.
    sticky: once open, it stays open for the rest of the sequence.
    k, picked, norm: as in `excise.actions.Clamp`. Padding and special tokens are not counted.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    share: float
    window: int = 0
    sticky: bool = False
    k: int = 0
    picked: Tensor | None = None
    norm: str = "none"
    kind: ClassVar[str] = "share"

    def hot(self, x: Tensor) -> Tensor:
        return (read_features(self, scaling(x.float(), self.norm)[0]) > 0).any(-1)

    def open(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        passed = self.reached(x, valid, state) > self.share
        return state.ever(passed) if self.sticky else passed

    def reached(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        """The share after each token of x, [batch, width]."""
        return self.shares(self.hot(x), valid, state)

    def shares(self, hot: Tensor, valid: Tensor, state: GateState) -> Tensor:
        """The share after each token, [batch, width]; before any token has counted it is 0."""
        hits, total = state.running(hot, valid)
        if self.window:
            return (hits - state.before(hits, total, self.window)).double() / self.window
        return hits.double() / total.clamp_min(1)


@dataclass(frozen=True, eq=False)
class Quorum(Gate):
    """More than `share` of the features of one group have fired, each above its level.

    One feature is shared by several topics, and fires weakly on names that look alike; a whole group fires on its own.
    encoder: [d, n], bias and threshold: [n], k, picked, norm: as in `Share`. level: [n], the activation that counts as
    firing. group: [n], number of the group (a subject, a topic) that each feature belongs to, from 0.
    window: 0 counts every firing of the sequence so far; w those on the last w tokens.
    sticky: once open, it stays open for the rest of the sequence. Padding and special tokens are not counted.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    level: Tensor
    group: Tensor
    share: float
    window: int = 0
    sticky: bool = False
    k: int = 0
    picked: Tensor | None = None
    norm: str = "none"
    kind: ClassVar[str] = "quorum"

    def fires(self, x: Tensor) -> Tensor:
        """Which features fire above their levels, [batch, width, n]."""
        return read_features(self, scaling(x.float(), self.norm)[0]) > self.level.to(x.device)

    def open(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        passed = self.reached(x, valid, state) > self.share
        return state.ever(passed) if self.sticky else passed

    def reached(self, x: Tensor, valid: Tensor, state: GateState) -> Tensor:
        """The largest share that any group has reached by each token of x, [batch, width]."""
        fires = self.fires(x) & valid[..., None]
        _, total = state.running(fires.any(-1), valid)
        when = state.since(fires, total)
        counted = when > (total - self.window if self.window else torch.zeros_like(total)).clamp_min(0)[..., None]
        member = torch.nn.functional.one_hot(self.group.to(fires.device)).float()
        return (counted.float() @ (member / member.sum(0).clamp_min(1))).amax(-1)


def _scoped(hot: Tensor, valid: Tensor, state: GateState, scope: str) -> Tensor:
    if scope == "token":
        return hot & valid
    hits, _ = state.running(hot, valid)
    return hits > 0


GATES: dict[str, type[Gate]] = {c.__name__: c for c in (Linear, Box, Share, Quorum)}

__all__ = ["GATES", "Box", "Gate", "GateState", "Linear", "Quorum", "Share"]
