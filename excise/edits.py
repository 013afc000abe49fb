"""Edit: a small frozen value that says what changes where. No method here takes a model; `excise.apply` carries it out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from excise.actions import (
    Abstain,
    ActivationAction,
    Affine,
    Clamp,
    Dense,
    LowRank,
    Reflect,
    Scale,
    Sparse,
    WeightAction,
)
from excise.gates import Box, Gate, Linear, Quorum, Share
from excise.sites import DEPLOYABLE_RULES, Site

if TYPE_CHECKING:
    from excise.conflicts import Conflict

Action = WeightAction | ActivationAction


@dataclass(frozen=True, eq=False)
class Change:
    """One action at one site, under a gate or always."""

    site: Site
    action: Action
    gate: Gate | None = None

    def __post_init__(self) -> None:
        if self.site.is_weight != isinstance(self.action, WeightAction):
            wanted = "a matrix (W_...)" if isinstance(self.action, WeightAction) else "an activation (hook_...)"
            raise ValueError(f"{type(self.action).__name__} acts on {wanted}, not on {self.site}")
        if not self.site.is_weight and (self.site.position or "all") not in DEPLOYABLE_RULES:
            raise ValueError(
                f"{self.site}: an edit must decide its tokens without knowing the fact; use {' or '.join(DEPLOYABLE_RULES)}, or a gate"
            )

    @property
    def bakeable(self) -> bool:
        """True when the change can be written into weights."""
        return self.site.is_weight and self.gate is None

    @property
    def norm(self) -> float | None:
        """Frobenius norm of the matrix change; None where it depends on the weights or on the input."""
        match self.action:
            case LowRank(left=left, right=right):
                # |L R|_F from the small Gram matrices, so that the product is never formed.
                gram = (left.double().mT @ left.double()) * (right.double() @ right.double().mT)
                return float(gram.sum().clamp_min(0).sqrt())
            case Dense(change=change):
                return float(change.double().norm())
            case Sparse(values=values):
                return float(values.double().norm())
        return None


@dataclass(frozen=True, eq=False)
class Edit:
    """A tuple of changes with their provenance.

    recipe: method, options, model name, hash of the facts, and what the method reports about its solution.
    fingerprints: "model", "tokenizer" and one entry per matrix the edit was computed on.
    """

    changes: tuple[Change, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)

    @property
    def bakeable(self) -> bool:
        """True when every change can be written into weights."""
        return all(c.bakeable for c in self.changes)

    @property
    def sites(self) -> list[Site]:
        """Sites of the changes, without repeats."""
        return list(dict.fromkeys(c.site for c in self.changes))

    def scaled(self, factor: float) -> Edit:
        """The edit at `factor` times its strength; scaled(0) changes nothing."""
        changes = tuple(replace(c, action=c.action.scaled(factor)) for c in self.changes)
        return replace(self, changes=changes, recipe={**self.recipe, "scaled": factor * self.recipe.get("scaled", 1.0)})

    def __add__(self, other: Edit) -> Edit:
        for name, value in other.fingerprints.items():
            if self.fingerprints.get(name, value) != value:
                raise ValueError(
                    f"these edits were computed on different weights: {name} is {self.fingerprints[name]} in one and {value} in the other"
                )
        parts = [*self.recipe.get("parts", [self.recipe]), *other.recipe.get("parts", [other.recipe])]
        met = [*self.recipe.get("conflicts", []), *other.recipe.get("conflicts", [])]
        found = [*met, *(c.row() for c in self.conflicts(other))]
        recipe = {"method": "sum", "parts": parts, **({"conflicts": found} if found else {})}
        return Edit(self.changes + other.changes, recipe, {**self.fingerprints, **other.fingerprints})

    def conflicts(self, other: Edit) -> list[Conflict]:
        """The places that both edits change, with how far they get into each other's way; `+` keeps it in the recipe."""
        from excise.conflicts import conflicts
        from excise.outline import outline

        return conflicts(outline(self), outline(other))

    def summary(self) -> list[dict[str, Any]]:
        """One row per change: site, kind, rank, norm, gate, number of stored values."""
        return [
            {
                "site": str(c.site),
                "kind": c.action.kind,
                "rank": c.action.rank,
                "norm": c.norm,
                "gate": c.gate.kind if c.gate else "",
                "values": sum(v.numel() for v in vars(c.action).values() if isinstance(v, torch.Tensor)),
            }
            for c in self.changes
        ]

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; `Edit.load` reads it back to the bit."""
        from excise.files import save_edit

        return save_edit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Edit:
        """Read what `save` wrote."""
        from excise.files import load_edit

        return load_edit(path)

    def __str__(self) -> str:
        lines = [f"{'site':<40} {'kind':<10} {'rank':>5} {'norm':>10}  gate"]
        for row in self.summary():
            norm = "" if row["norm"] is None else f"{row['norm']:.4g}"
            lines.append(
                f"{row['site']:<40} {row['kind']:<10} {row['rank'] or '':>5} {norm:>10}  {row['gate'] or 'always'}"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Edit({self.recipe.get('method', '?')}: {len(self.changes)} changes, {'weight' if self.bakeable else 'hook'})"

    def _repr_html_(self) -> str:
        from excise.notebook import edit_view

        return edit_view(self)


__all__ = [
    "Abstain",
    "Affine",
    "Box",
    "Change",
    "Clamp",
    "Dense",
    "Edit",
    "Gate",
    "Linear",
    "LowRank",
    "Quorum",
    "Reflect",
    "Scale",
    "Share",
    "Sparse",
]
