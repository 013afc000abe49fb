"""What an edit does, as plain numpy arrays: enough to show, compare and combine edits without any model library.

A matrix change is written left @ right wherever its form allows it, so that nothing of the size of a model's matrix is
formed to compare two of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excise.errors import DamagedFile
from excise.headers import WEIGHT_ACTIONS, header_of
from excise.tensorfile import TensorFile

if TYPE_CHECKING:
    from excise.edits import Edit

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Part:
    """One change: its site, the names of its action and gate, and the arrays and settings of both."""

    site: str
    action: str
    gate: str
    arrays: dict[str, Array]
    settings: dict[str, Any]
    gate_arrays: dict[str, Array]
    gate_settings: dict[str, Any]

    @property
    def is_weight(self) -> bool:
        """True for a change of a matrix."""
        return self.action in WEIGHT_ACTIONS

    @property
    def rank(self) -> int | None:
        """Number of factors or features where the form bounds the rank."""
        if self.action in ("LowRank", "Affine"):
            return int(self.arrays["left"].shape[1])
        return len(self.arrays["decoder"]) if self.action == "Clamp" else None

    @property
    def norm(self) -> float | None:
        """Frobenius norm of the matrix change; None where it depends on the weights or on the input."""
        match self.action:
            case "LowRank":
                return (
                    inner((self.arrays["left"], self.arrays["right"]), (self.arrays["left"], self.arrays["right"]))
                    ** 0.5
                )
            case "Dense":
                return float(np.linalg.norm(self.arrays["change"].astype(np.float64)))
            case "Sparse":
                return float(np.linalg.norm(self.arrays["values"].astype(np.float64)))
        return None

    def delta(self, weight: Array) -> Array:
        """What the matrix [d_in, d_out] gains, in float64."""
        arrays = self.arrays
        match self.action:
            case "LowRank":
                return arrays["left"].astype(np.float64) @ arrays["right"].astype(np.float64)
            case "Dense":
                return arrays["change"].astype(np.float64)
            case "Sparse":
                gain = np.zeros(weight.size)
                np.add.at(gain, arrays["indices"], arrays["values"].astype(np.float64))
                return gain.reshape(weight.shape)
            case "Scale":
                change = np.zeros(weight.shape)
                units, gain = arrays["units"], arrays["factor"].astype(np.float64) - 1
                if self.settings.get("side", "in") == "in":
                    change[units] = weight[units] * gain[:, None]
                else:
                    change[:, units] = weight[:, units] * gain
                return change
        raise ValueError(f"{self.action} does not change a matrix")


@dataclass(frozen=True)
class Outline:
    """An edit's parts with its recipe and fingerprints."""

    parts: tuple[Part, ...]
    recipe: dict[str, Any]
    fingerprints: dict[str, str]

    @property
    def bakeable(self) -> bool:
        """True when every change can be written into weights."""
        return all(p.is_weight and not p.gate for p in self.parts)

    def at(self) -> dict[str, list[Part]]:
        """Parts by the point they change, in order; position rules and units left out."""
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(re.split("[@#]", part.site)[0], []).append(part)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """One row per change, as `Edit.summary`."""
        return [
            {
                "site": p.site,
                "kind": _words(p.action),
                "rank": p.rank,
                "norm": p.norm,
                "gate": _words(p.gate),
                "values": sum(a.size for a in p.arrays.values()),
            }
            for p in self.parts
        ]


def _words(name: str) -> str:
    """LowRank -> low rank."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()


def read_outline(path: str | Path) -> Outline:
    """The outline of an edit file. Raises DamagedFile when the file holds something else."""
    file = TensorFile.open(path)
    header = header_of(file)
    if header.get("kind") != "edit":
        raise DamagedFile(f"{path}: holds {header.get('kind')!r}, and 'edit' is wanted here")
    rows = header["changes"]
    parts = []
    for i, row in enumerate(rows):
        owner = row.get("gate of", i)
        gate = rows[owner].get("gate", {})
        settings = [{k: v for k, v in packed.items() if k != "type"} for packed in (row["action"], gate)]
        arrays = [_under(file, f"{i}.action."), _under(file, f"{owner}.gate.")]
        action, of = row["action"]["type"], gate.get("type", "")
        parts.append(Part(row["site"], action, of, arrays[0], settings[0], arrays[1], settings[1]))
    return Outline(tuple(parts), header["recipe"], header["fingerprints"])


def _under(file: TensorFile, prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): file.read(n) for n in file.entries if n.startswith(prefix)}


def outline(edit: Edit) -> Outline:
    """The outline of an edit in memory."""
    parts = []
    for change in edit.changes:
        (arrays, settings), (gate_arrays, gate_settings) = _split(change.action), _split(change.gate)
        gate = type(change.gate).__name__ if change.gate is not None else ""
        parts.append(
            Part(str(change.site), type(change.action).__name__, gate, arrays, settings, gate_arrays, gate_settings)
        )
    return Outline(tuple(parts), edit.recipe, edit.fingerprints)


def _split(part: Any) -> tuple[dict[str, Array], dict[str, Any]]:
    """Tensors as arrays, and all else as the file has it."""
    fields = {} if part is None else vars(part)
    arrays = {n: _array(t) for n, t in fields.items() if hasattr(t, "detach")}
    return arrays, {n: str(v) if n == "site" else v for n, v in fields.items() if n not in arrays}


def _array(tensor: Any) -> Array:
    plain = tensor.detach().cpu()
    return np.asarray((plain.float() if plain.is_floating_point() else plain).numpy())


# algebra of left @ right

Factors = tuple[Array, Array]


def factors(parts: Sequence[Part]) -> Factors | None:
    """The summed change of the parts as left [d_in, r] @ right [r, d_out]; None where it depends on the weights."""
    found = [_factors(p) for p in parts]
    known = [f for f in found if f is not None]
    if not known or len(known) < len(found):
        return None
    for other in known[1:]:
        _alike(known[0], other)
    return np.concatenate([f[0] for f in known], 1), np.concatenate([f[1] for f in known], 0)


def _alike(a: Factors, b: Factors) -> None:
    """Refuse changes of matrices of different shapes."""
    shapes = [(len(left), right.shape[1]) for left, right in (a, b)]
    if shapes[0] != shapes[1]:
        (d_in, d_out), (other_in, other_out) = shapes
        raise ValueError(
            f"a change of a matrix [{d_in}, {d_out}] meets one of a matrix [{other_in}, {other_out}] at the same place: "
            "these edits were made for different models"
        )


def _factors(part: Part) -> Factors | None:
    if part.action in ("LowRank", "Affine"):
        return part.arrays["left"].astype(np.float64), part.arrays["right"].astype(np.float64)
    if part.action != "Dense":
        return None
    change = part.arrays["change"].astype(np.float64)
    d_in, d_out = change.shape
    return (np.eye(d_in), change) if d_in <= d_out else (change, np.eye(d_out))


def inner(a: Factors, b: Factors) -> float:
    """Frobenius inner product of two matrices given by their factors."""
    _alike(a, b)
    (la, ra), (lb, rb) = ((left.astype(np.float64), right.astype(np.float64)) for left, right in (a, b))
    return max(0.0, float(((la.T @ lb) * (ra @ rb.T)).sum())) if a is b else float(((la.T @ lb) * (ra @ rb.T)).sum())


def norm(a: Factors) -> float:
    """Frobenius norm of left @ right."""
    return inner(a, a) ** 0.5


def minus(a: Factors, b: Factors) -> Factors:
    """a - b."""
    _alike(a, b)
    return np.concatenate([a[0], b[0]], 1), np.concatenate([a[1], -b[1]], 0)


def thin(a: Factors) -> tuple[Array, Array, Array]:
    """The singular value decomposition u [d_in, r], s [r], v [r, d_out] of left @ right; r is the numerical rank."""
    q_left, r_left = np.linalg.qr(a[0])
    q_right, r_right = np.linalg.qr(a[1].T)
    u, s, v = np.linalg.svd(r_left @ r_right.T)
    scale = np.linalg.norm(r_left) * np.linalg.norm(r_right)
    keep = int((s > max(len(a[0]), a[1].shape[1]) * np.finfo(np.float64).eps * scale).sum())
    return q_left @ u[:, :keep], s[:keep], v[:keep] @ q_right.T


__all__ = [
    "Factors",
    "Outline",
    "Part",
    "factors",
    "inner",
    "minus",
    "norm",
    "outline",
    "read_outline",
    "thin",
]
