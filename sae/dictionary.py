"""A dictionary: the features of one activation, as plain tensors. Encode, decode, and change an activation by features."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from excise.actions import Clamp
from excise.errors import ExciseError
from excise.features import NORMS, encode, scaling
from excise.gates import Quorum, Share
from excise.model import tensor_fingerprint
from excise.sites import Site

# sae-lens architectures whose features are read by one affine map and a threshold or a contest.
ARCHITECTURES = ("standard", "jumprelu", "gated", "topk")
ACTS = "hook_sae_acts_post"


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Features of the activation at `hook`: a = relu(z) where z = norm(x) @ encoder + bias exceeds `threshold`.

    encoder: [d, n]; bias, threshold: [n]; decoder: [n, d]; centre: [d], what no feature explains. k: where positive, only
    the k largest z of a token are kept (TopK). norm: normalisation of x per token, see `excise.features.scaling`.
    hook: TransformerLens name. info: what the file says of itself (architecture, model name, measures).
    """

    encoder: Tensor
    bias: Tensor
    threshold: Tensor
    decoder: Tensor
    centre: Tensor
    hook: str
    k: int = 0
    norm: str = "none"
    name: str = ""
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def d(self) -> int:
        """Width of the activation."""
        return self.encoder.shape[0]

    @property
    def n(self) -> int:
        """Number of features."""
        return self.encoder.shape[1]

    @property
    def layer(self) -> int | None:
        """Block of the hook."""
        return Site(self.hook).layer

    @property
    def elementwise(self) -> bool:
        """True when a feature can be read without the others."""
        return not self.k

    @property
    def fingerprint(self) -> str:
        """Short hash of the tensors and of how they are used."""
        parts = [
            tensor_fingerprint(t) for t in (self.encoder, self.bias[:, None], self.threshold[:, None], self.decoder)
        ]
        return hashlib.sha256(f"{parts}{self.hook}{self.k}{self.norm}".encode()).hexdigest()[:16]

    def site(self, feature: int) -> Site:
        """The feature as a site, named as sae-lens names it: `blocks.2.hook_resid_post.hook_sae_acts_post#17`."""
        return Site(f"{self.hook}.{ACTS}", None, feature)

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations [..., n] of x [..., d], float32."""
        z, _ = scaling(x.float(), self.norm)
        here = self.to(x.device)
        return encode(z, here.encoder, here.bias, here.threshold, k=self.k)

    def decode(self, a: Tensor, like: Tensor | None = None) -> Tensor:
        """The activation [..., d] that features a [..., n] stand for, float32.

        like: the x that was encoded; needed where x is normalised per token, because a does not know its scale.
        """
        here = self.to(a.device)
        out = a @ here.decoder + here.centre
        if self.norm == "none":
            return out
        if like is None:
            raise ValueError(f"this dictionary normalises each token ({self.norm}): decode(a, like=x)")
        wide = like.float()
        _, scale = scaling(wide, self.norm)
        assert scale is not None  # only "none" has no scale
        out = out * scale
        return out + wide.mean(-1, keepdim=True) if self.norm == "layer_norm" else out

    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)), float32."""
        return self.decode(self.encode(x), x)

    def delta(self, x: Tensor, features: Sequence[int], new: Tensor) -> Tensor:
        """x with the activations of `features` replaced by new [..., n_features]; all else, the error too, is kept.

        x gains (new - a) @ decoder[features]. Where nothing is replaced by another value the bits of x stay.
        """
        picked = torch.as_tensor(features, dtype=torch.long)
        z, scale = scaling(x.float(), self.norm)
        a = encode(z, self.encoder, self.bias, self.threshold, k=self.k, picked=picked)
        change = (new.float() - a) @ self.decoder[picked]
        moved = x + (change if scale is None else change * scale).to(x.dtype)
        return torch.where((new != a).any(-1, keepdim=True), moved, x)

    def clamp(
        self, features: Sequence[int], value: Tensor | float, *, mode: str = "clamp", mask: str = "feature"
    ) -> Clamp:
        """The action that sets `features` (see `excise.actions.Clamp`); it needs this dictionary no more."""
        picked = torch.as_tensor(features, dtype=torch.long)
        wanted = torch.as_tensor(value, dtype=torch.float32).expand(len(picked)).clone()
        return Clamp(**self._reader(picked), decoder=self.decoder[picked].clone(), value=wanted, mode=mode, mask=mask)

    def share(self, features: Sequence[int], share: float, **options: Any) -> Share:
        """The gate that opens when more than `share` of the tokens have one of `features` active."""
        return Share(
            Site(self.hook), **self._reader(torch.as_tensor(features, dtype=torch.long)), share=share, **options
        )

    def quorum(
        self, features: Sequence[int], group: Sequence[int], level: Tensor, share: float, **options: Any
    ) -> Quorum:
        """The gate that opens when more than `share` of one group's features have fired above their levels."""
        picked, groups = (torch.as_tensor(t, dtype=torch.long) for t in (features, group))
        return Quorum(
            Site(self.hook), **self._reader(picked), level=level.float(), group=groups, share=share, **options
        )

    def _reader(self, picked: Tensor) -> dict[str, Any]:
        """What it takes to read some features: their columns, or, where features compete, every column."""
        if self.elementwise:
            columns = {
                "encoder": self.encoder[:, picked],
                "bias": self.bias[picked],
                "threshold": self.threshold[picked],
            }
            return {k: t.clone() for k, t in columns.items()} | {"norm": self.norm}
        whole = {"encoder": self.encoder, "bias": self.bias, "threshold": self.threshold}
        return whole | {"norm": self.norm, "k": self.k, "picked": picked}

    def to(self, device: torch.device | str) -> Dictionary:
        """The same dictionary on `device`."""
        tensors = ("encoder", "bias", "threshold", "decoder", "centre")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def __repr__(self) -> str:
        kind = self.info.get("architecture", "")
        return f"Dictionary({self.name}: {self.n} {kind} features of {self.hook}, width {self.d})"


def fold(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], *, name: str = "") -> Dictionary:
    """The dictionary that a sae-lens (6.x) config and its tensors describe, in float32.

    Everything affine is folded: the decoder bias that is taken off the input, decoder norms, and the two paths of a gated
    encoder, which open and scale one projection and so are a JumpReLU with the threshold b_mag - exp(r_mag) b_gate
    (arXiv 2404.16014, appendix). Raises ExciseError for architectures that are read in another way.
    """
    kind, norm = str(cfg.get("architecture")), str(cfg.get("normalize_activations", "none"))
    if kind not in ARCHITECTURES:
        raise ExciseError(
            f"{name or 'this dictionary'}: architecture {kind!r} has no encoder of the form that excise reads; it reads {', '.join(ARCHITECTURES)}"
        )
    wide = {key: t.detach().float() for key, t in tensors.items()}
    encoder, decoder, centre = wide["W_enc"], wide["W_dec"], wide["b_dec"]
    n = encoder.shape[1]
    if kind == "gated":
        gain = wide["r_mag"].exp()
        bias, threshold = wide["b_mag"], wide["b_mag"] - gain * wide["b_gate"]
        shift, encoder = centre @ encoder * gain, encoder * gain
    else:
        bias, threshold, shift = wide["b_enc"], wide.get("threshold", torch.zeros(n)), centre @ encoder
    if cfg.get("apply_b_dec_to_input", True):
        bias = bias - shift
    if cfg.get("rescale_acts_by_decoder_norm"):
        size = decoder.norm(dim=-1)
        encoder, bias, decoder = encoder * size, bias * size, decoder / size[:, None]
    metadata = dict(cfg.get("metadata") or {})
    return Dictionary(
        encoder.contiguous(), bias, threshold, decoder.contiguous(), centre,
        hook=str(metadata.get("hook_name") or ""),
        k=int(cfg["k"]) if kind == "topk" else 0,
        norm=norm if norm in NORMS else "none",
        name=name,
        info={**metadata, "architecture": kind},
    )  # fmt: skip
