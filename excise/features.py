"""Features of a sparse dictionary: the one encoder that clamps, gates and dictionaries share. Plain tensors."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

NORMS = ("none", "layer_norm", "constant_norm_rescale")


def scaling(x: Tensor, norm: str) -> tuple[Tensor, Tensor | None]:
    """What the encoder reads, and the factor [..., 1] that decoder units have to be multiplied with to be units of x.

    norm: "none", or a normalisation that sae-lens computes per token at run time. x is float32.
    """
    if norm == "none":
        return x, None
    if norm == "layer_norm":
        centred = x - x.mean(-1, keepdim=True)
        spread = centred.std(-1, keepdim=True)
        return centred / (spread + 1e-5), spread
    if norm == "constant_norm_rescale":
        factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return x * factor, 1 / factor
    raise ValueError(f"no normalisation {norm!r}; known: {', '.join(NORMS)}")


def encode(
    x: Tensor, encoder: Tensor, bias: Tensor, threshold: Tensor, *, k: int = 0, picked: Tensor | None = None
) -> Tensor:
    """Feature activations [..., n] of x [..., d] in float32: relu(before) where before = x @ encoder + bias > threshold.

    encoder: [d, n]; bias, threshold: [n]. Zeros as threshold give ReLU. k: where positive, only the k largest of the n
    are kept. picked: columns that are wanted, [m]; the result is then [..., m].
    """
    before = x.float() @ encoder + bias
    fires = before > threshold.clamp_min(0)
    if k:
        largest = before.topk(min(k, before.shape[-1]), dim=-1).indices
        fires &= torch.zeros_like(fires).scatter(-1, largest, True)
    found = torch.where(fires, before, 0.0)
    return found if picked is None else found[..., picked]


class Reader(Protocol):
    """What reads some features of a dictionary, see `encode`."""

    @property
    def encoder(self) -> Tensor:
        """Directions that the features read, [d, n]."""

    @property
    def bias(self) -> Tensor:
        """What is added before the threshold, [n]."""

    @property
    def threshold(self) -> Tensor:
        """What a feature must exceed to fire, [n]."""

    @property
    def k(self) -> int:
        """How many features of a token are kept; 0 for all that fire."""

    @property
    def picked(self) -> Tensor | None:
        """The columns that are wanted, [m]; None for all."""


def read_features(reader: Reader, z: Tensor) -> Tensor:
    """`encode` with the tensors of a clamp or a gate, on the device of z."""
    encoder, bias, threshold = (t.to(z.device).float() for t in (reader.encoder, reader.bias, reader.threshold))
    picked = None if reader.picked is None else reader.picked.to(z.device)
    return encode(z, encoder, bias, threshold, k=reader.k, picked=picked)
