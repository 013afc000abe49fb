"""What tells two edits apart, place by place. Numpy alone: no model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from excise.conflicts import smallest_angle
from excise.outline import Outline, Part, factors, inner, minus, norm, thin


@dataclass(frozen=True)
class EditDifference:
    """How the changes of b at one place differ from those of a.

    change: "same", "changed", "only in a", "only in b".
    norm_a, norm_b: of the changes; relative: norm of their difference over norm_a; rank: of their difference.
    cosine, angle: of the changes as vectors, and the smallest principal angle between their inputs in degrees.
    Figures are None where they depend on the weights or on the input.
    """

    site: str
    change: str
    kinds: str
    norm_a: float | None = None
    norm_b: float | None = None
    relative: float | None = None
    rank: int | None = None
    cosine: float | None = None
    angle: float | None = None

    def row(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self)


def edit_differences(a: Outline, b: Outline) -> list[EditDifference]:
    """One entry per place that either edit changes."""
    first, second = a.at(), b.at()
    return [_edit_difference(site, first.get(site, []), second.get(site, [])) for site in {**first, **second}]


def _edit_difference(site: str, a: Sequence[Part], b: Sequence[Part]) -> EditDifference:
    kinds = " / ".join(" + ".join(dict.fromkeys(p.action for p in parts)) or "-" for parts in (a, b))
    fa, fb = factors(a), factors(b)
    norms = (norm(fa) if fa else _norm(a), norm(fb) if fb else _norm(b))
    if not a or not b:
        return EditDifference(site, "only in a" if a else "only in b", kinds, *norms)
    change = "same" if _same(a, b) else "changed"
    if fa is None or fb is None or not norms[0] or not norms[1]:
        return EditDifference(site, change, kinds, *norms)
    gap = 0.0 if change == "same" else norm(minus(fa, fb))
    rank = 0 if change == "same" else len(thin(minus(fa, fb))[1])
    angle = smallest_angle(thin(fa)[0], thin(fb)[0])
    return EditDifference(
        site, change, kinds, *norms, gap / norms[0], rank, inner(fa, fb) / (norms[0] * norms[1]), angle
    )


def _norm(parts: Sequence[Part]) -> float | None:
    return parts[0].norm if len(parts) == 1 else None


def _same(a: Sequence[Part], b: Sequence[Part]) -> bool:
    def equal(x: Part, y: Part) -> bool:
        pairs = ((x.arrays, y.arrays), (x.gate_arrays, y.gate_arrays))
        tensors = all(m.keys() == n.keys() and all(np.array_equal(m[k], n[k]) for k in m) for m, n in pairs)
        return tensors and all(
            getattr(x, k) == getattr(y, k) for k in ("site", "action", "gate", "settings", "gate_settings")
        )

    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
