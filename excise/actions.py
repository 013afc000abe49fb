"""Actions: the closed list of things an edit can do at a site. Plain tensors with formulas; no model in sight.

Weight actions give the change of a matrix [d_in, d_out]; activation actions map an activation [..., d] to a new one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from excise.features import read_features, scaling


@dataclass(frozen=True, eq=False)
class WeightAction:
    """A change of a matrix W [d_in, d_out]."""

    kind: ClassVar[str]

    def delta(self, weight: Tensor) -> Tensor:
        """What the matrix gains, [d_in, d_out], in float32 at least."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """The same change at `factor` times its strength."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """Rank of the change where its form bounds it, else None."""
        return None


@dataclass(frozen=True, eq=False)
class LowRank(WeightAction):
    """W gains left @ right. left: [d_in, r], right: [r, d_out]."""

    left: Tensor
    right: Tensor
    kind: ClassVar[str] = "low rank"

    def __post_init__(self) -> None:
        if self.left.dim() != 2 or self.right.dim() != 2 or self.left.shape[1] != self.right.shape[0]:
            raise ValueError(
                f"LowRank: left {tuple(self.left.shape)} and right {tuple(self.right.shape)} do not chain to a matrix"
            )

    def delta(self, weight: Tensor) -> Tensor:
        """left @ right."""
        return self.left.to(weight.device) @ self.right.to(weight.device)

    def scaled(self, factor: float) -> LowRank:
        """right times `factor`."""
        return replace(self, right=self.right * factor)

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.left.shape[1]


@dataclass(frozen=True, eq=False)
class Dense(WeightAction):
    """W gains a full matrix [d_in, d_out]."""

    change: Tensor
    kind: ClassVar[str] = "dense"

    def delta(self, weight: Tensor) -> Tensor:
        """The matrix itself."""
        return self.change.to(weight.device)

    def scaled(self, factor: float) -> Dense:
        """The matrix times `factor`."""
        return replace(self, change=self.change * factor)


@dataclass(frozen=True, eq=False)
class Sparse(WeightAction):
    """Chosen entries of W gain values. indices: [n] into the row-major flattened [d_in, d_out]; values: [n]."""

    indices: Tensor
    values: Tensor
    kind: ClassVar[str] = "sparse"

    def delta(self, weight: Tensor) -> Tensor:
        """A matrix of zeros with the values at their places."""
        flat = torch.zeros(weight.numel(), dtype=torch.float32, device=weight.device)
        return flat.index_add(0, self.indices.to(weight.device), self.values.float().to(weight.device)).view(
            weight.shape
        )

    def scaled(self, factor: float) -> Sparse:
        """The values times `factor`."""
        return replace(self, values=self.values * factor)


@dataclass(frozen=True, eq=False)
class Scale(WeightAction):
    """Chosen units of W times a factor. units: [n]; factor: [n]; side "in" takes rows (neurons of W_out), "out" columns."""

    units: Tensor
    factor: Tensor
    side: str = "in"
    kind: ClassVar[str] = "scale"

    def delta(self, weight: Tensor) -> Tensor:
        """(factor - 1) times the chosen rows or columns, zero elsewhere."""
        change = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        units, gain = self.units.to(weight.device), self.factor.float().to(weight.device) - 1
        if self.side == "in":
            change[units] = weight[units].float() * gain[:, None]
        else:
            change[:, units] = weight[:, units].float() * gain
        return change

    def scaled(self, factor: float) -> Scale:
        """A factor f becomes 1 + factor * (f - 1)."""
        return replace(self, factor=1 + factor * (self.factor - 1))


@dataclass(frozen=True, eq=False)
class ActivationAction:
    """A change of an activation x [batch, width, d]."""

    kind: ClassVar[str]

    def __call__(self, x: Tensor) -> Tensor:
        """The new activation, same shape and dtype; the very same tensor when nothing changes."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """The same change at `factor` times its strength."""
        raise NotImplementedError

    @property
    def rank(self) -> int | None:
        """Rank of the change where its form bounds it, else None."""
        return None


@dataclass(frozen=True, eq=False)
class Affine(ActivationAction):
    """x gains ((x - centre) @ left) @ right + shift. left: [d, r], right: [r, d], centre and shift: [d]."""

    left: Tensor
    right: Tensor
    centre: Tensor
    shift: Tensor
    kind: ClassVar[str] = "affine"

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        left, right, centre, shift = (t.to(x.device).float() for t in (self.left, self.right, self.centre, self.shift))
        return (wide + ((wide - centre) @ left) @ right + shift).to(x.dtype)

    def scaled(self, factor: float) -> Affine:
        """right and shift times `factor`."""
        return replace(self, right=self.right * factor, shift=self.shift * factor)

    @property
    def rank(self) -> int:
        """Number of factors."""
        return self.left.shape[1]


@dataclass(frozen=True, eq=False)
class Reflect(ActivationAction):
    """Neurons that look drawn from their forget distribution are mapped back, mirrored, into the retain one.

    z' = mean_retain - std_retain * (z - mean_forget) / std_forget wherever the log-likelihood ratio log p_f - log p_r
    exceeds `margin` (Neuron Adjust, arXiv 2503.21730, without its draw: deterministic). All tensors [n].
    """

    units: Tensor
    mean_retain: Tensor
    std_retain: Tensor
    mean_forget: Tensor
    std_forget: Tensor
    margin: float = 0.0
    strength: float = 1.0
    kind: ClassVar[str] = "reflect"

    def __call__(self, x: Tensor) -> Tensor:
        units = self.units.to(x.device)
        mean_r, std_r, mean_f, std_f = (
            t.to(x.device).float() for t in (self.mean_retain, self.std_retain, self.mean_forget, self.std_forget)
        )
        z = x[..., units].float()
        ratio = 0.5 * ((z - mean_r) / std_r) ** 2 - 0.5 * ((z - mean_f) / std_f) ** 2 + (std_r / std_f).log()
        fires = ratio > self.margin
        if not fires.any():
            return x
        mirrored = mean_r - std_r * (z - mean_f) / std_f
        new = torch.where(fires, z + self.strength * (mirrored - z), z).to(x.dtype)
        return x.index_copy(-1, units, new)

    def scaled(self, factor: float) -> Reflect:
        """The step towards the mirrored value times `factor`."""
        return replace(self, strength=self.strength * factor)


@dataclass(frozen=True, eq=False)
class Clamp(ActivationAction):
    """Chosen dictionary features set to a value, in delta form: x gains (a' - a) @ decoder.

    a = relu(x @ encoder + bias), kept where it exceeds `threshold` (JumpReLU; zeros give ReLU). encoder: [d, n],
    bias, threshold, value: [n], decoder: [n, d]. mode "clamp" sets a' = value, "scale" a' = value * a.
    mask "feature" changes the features that fire, "token" changes all of them on every token where one fires; a token
    where nothing fires keeps its bits (spec: SAE clamping, arXiv 2410.19278; delta form). "all" changes all of them on
    every token, which is for a change behind a gate.
    k, picked: where features compete (TopK), encoder, bias and threshold hold every feature of the dictionary, the k
    largest of a token are kept, and `picked` [n] says which ones are chosen. norm: see `excise.features.scaling`.
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    value: Tensor
    mode: str = "clamp"
    mask: str = "feature"
    strength: float = 1.0
    k: int = 0
    picked: Tensor | None = None
    norm: str = "none"
    kind: ClassVar[str] = "clamp"

    def activations(self, x: Tensor) -> Tensor:
        """Activations of the chosen features [..., n] in float32."""
        return read_features(self, scaling(x.float(), self.norm)[0])

    def __call__(self, x: Tensor) -> Tensor:
        z, scale = scaling(x.float(), self.norm)
        a = read_features(self, z)
        fires = a > 0
        hot = fires.any(-1, keepdim=True)
        if self.mask == "all":
            hot = torch.ones_like(hot)
        if not hot.any():
            return x
        value = self.value.to(x.device).float()
        new = value.expand_as(a) if self.mode == "clamp" else value * a
        change = torch.where(fires if self.mask == "feature" else hot, new - a, torch.zeros_like(a))
        added = self.strength * change @ self.decoder.to(x.device).float()
        moved = x + (added if scale is None else added * scale).to(x.dtype)
        return torch.where(hot, moved, x)

    def scaled(self, factor: float) -> Clamp:
        """The added difference times `factor`."""
        return replace(self, strength=self.strength * factor)

    @property
    def rank(self) -> int:
        """Number of features."""
        return self.decoder.shape[0]


@dataclass(frozen=True, eq=False)
class Abstain(ActivationAction):
    """At the logits: answer with a given refusal, once the gate has fired.

    tokens: [n] refusal token ids, usually ending in EOS. The next token is the one after the longest beginning of the
    refusal that the sequence already ends in, so that decoding needs no memory of its own.
    strength: 1, or 0 to leave the logits alone; abstaining has no half measure.
    """

    tokens: Tensor
    strength: float = 1.0
    kind: ClassVar[str] = "abstain"

    def next_tokens(self, ids: Tensor, width: int) -> Tensor:
        """Forced next token for each of the last `width` positions of `ids` [batch, length]; result [batch, width]."""
        batch, length = ids.shape
        refusal = self.tokens.to(ids.device)
        n = len(refusal)
        said = torch.zeros(batch, width, dtype=torch.long, device=ids.device)
        padded = torch.cat([ids.new_full((batch, n), -1), ids], dim=1)
        for k in range(1, n):
            windows = padded.unfold(1, k, 1)[:, n + length - width - k + 1 :]  # windows ending at each position
            matches = (windows == refusal[:k]).all(-1)
            said = torch.where(matches, k, said)
        return refusal[said]

    def __call__(self, x: Tensor) -> Tensor:
        raise RuntimeError("Abstain needs the token ids of the sequence: excise.apply hands them to `force`")

    def force(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Logits [batch, width, vocab] that put all mass on the refusal's next token."""
        if not self.strength:
            return logits
        forced = torch.full_like(logits, torch.finfo(logits.dtype).min)
        return forced.scatter(-1, self.next_tokens(ids, logits.shape[1])[..., None], 0.0)

    def scaled(self, factor: float) -> Abstain:
        """On at 1, off at 0."""
        if factor not in (0, 1):
            raise ValueError(f"abstaining has no half measure: scale it by 0 or 1, not by {factor}")
        return replace(self, strength=self.strength * factor)


ACTIONS: dict[str, type[WeightAction] | type[ActivationAction]] = {
    c.__name__: c for c in (LowRank, Dense, Sparse, Scale, Affine, Reflect, Clamp, Abstain)
}
