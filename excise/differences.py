"""What tells two checkpoints apart, or a checkpoint from itself under an edit. One matrix at a time, numpy alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from excise.errors import ExciseError, FingerprintMismatch
from excise.outline import Array, Outline
from excise.tensorfile import FLOATS, MANTISSA, Checkpoint

# Ranks above this are not counted out on matrices larger than `EXACT`: they cost minutes and say "not low rank".
COUNTED = 256
EXACT = 1024


@dataclass(frozen=True)
class MatrixDifference:
    """How one parameter of b differs from that of a.

    change: "changed", "only in a", "only in b", or what differs about their form.
    norm: Frobenius norm of the difference; relative: that over the norm of a's matrix.
    entries: share of the entries that differ.
    rank: singular values of the difference that stand out of the rounding of the stored type; None for vectors.
    at_least: the rank was not counted further than this.
    """

    name: str
    shape: tuple[int, ...]
    change: str
    norm: float | None = None
    relative: float | None = None
    entries: float | None = None
    rank: int | None = None
    at_least: bool = False

    def row(self) -> dict[str, Any]:
        """A plain dictionary; the rank as text when it is only a bound."""
        found = asdict(self)
        bound = found.pop("at_least")
        return {
            **found,
            "shape": " x ".join(map(str, self.shape)),
            "rank": f">= {self.rank}" if bound else self.rank,
        }


# two checkpoints


def checkpoint_differences(a: Checkpoint, b: Checkpoint) -> Iterator[MatrixDifference]:
    """Every parameter that is not the same in both, in the order of their names; fused experts one by one."""
    for name in sorted(a.home.keys() | b.home.keys(), key=_natural):
        if name not in a.home or name not in b.home:
            side = a if name in a.home else b
            yield MatrixDifference(name, side.entry(name).shape, "only in a" if side is a else "only in b")
            continue
        one, two = a.entry(name), b.entry(name)
        if one.shape != two.shape:
            yield MatrixDifference(name, one.shape, f"{_sizes(one.shape)} in a, {_sizes(two.shape)} in b")
        elif one.dtype == two.dtype and np.array_equal(a.raw(name), b.raw(name)):
            continue
        elif one.dtype not in FLOATS or two.dtype not in FLOATS:
            yield MatrixDifference(
                name, one.shape, "changed" if one.dtype == two.dtype else f"{one.dtype} in a, {two.dtype} in b"
            )
        else:
            coarse = min(one.dtype, two.dtype, key=MANTISSA.__getitem__)
            for label, index in a.slices(name):
                found = matrix_difference(label, a.read(name, index), b.read(name, index), coarse)
                if found is not None:
                    yield found


def matrix_difference(name: str, old: Array, new: Array, dtype: str) -> MatrixDifference | None:
    """The difference of two arrays of one shape, stored as `dtype` or finer; None when there is none."""
    gap = new.astype(np.float64) - old
    size = float(np.linalg.norm(gap))
    if not size:
        return None
    base = float(np.linalg.norm(old.astype(np.float64)))
    known = MatrixDifference(name, old.shape, "changed", size, size / base if base else None, float((gap != 0).mean()))
    if gap.ndim != 2:
        return known
    rank, bound = numerical_rank(gap, rounding(new, dtype))
    return MatrixDifference(**{**asdict(known), "rank": rank, "at_least": bound})


def rounding(matrix: Array, dtype: str) -> float:
    """A bound on the singular values of the error that writing a matrix [m, n] in `dtype` makes.

    Rounding errors are spread evenly over one unit in the last place u, so their standard deviation is u / sqrt(12), and a
    matrix of independent errors of standard deviation s has no singular value beyond s (sqrt m + sqrt n). Four times that
    is taken: entries are not all of one size, and the change itself was a rounded product before it was added.
    """
    _, exponent = np.frexp(matrix)
    unit = np.where(matrix == 0, 0.0, np.ldexp(1.0, exponent - 1 - MANTISSA[dtype]))
    return float(4 * np.sqrt((unit**2).mean() / 12) * sum(n**0.5 for n in matrix.shape))


def numerical_rank(matrix: Array, floor: float) -> tuple[int, bool]:
    """How many singular values of a matrix exceed `floor`, and whether counting stopped before the end.

    Large matrices are looked at through a growing random projection (Halko, Martinsson, Tropp, arXiv 0909.4061), which
    finds the leading singular values of a matrix that is low rank up to noise.
    """
    # What double precision cannot tell from zero does not count either.
    floor = max(floor, float(np.linalg.norm(matrix)) * max(matrix.shape) * np.finfo(np.float64).eps)
    if min(matrix.shape) > EXACT:
        rng, width = np.random.default_rng(0), 16
        while width <= COUNTED:
            seen, _ = np.linalg.qr(matrix @ rng.standard_normal((matrix.shape[1], 2 * width)))
            rank = int((np.linalg.svd(seen.T @ matrix, compute_uv=False) > floor).sum())
            if rank < width:
                return rank, False
            width *= 4
        return COUNTED, True
    return int((np.linalg.svd(matrix, compute_uv=False) > floor).sum()), False


# a checkpoint and an edit of it


def edit_on_checkpoint(checkpoint: Checkpoint, edit: Outline) -> Iterator[MatrixDifference]:
    """How much each matrix of a checkpoint changes when the edit is baked; matrices carry the checkpoint's names.

    They are found by the fingerprints that the edit keeps, which also shows that it was made for these very weights.
    Raises ExciseError for edits that cannot be baked, FingerprintMismatch when a matrix is not there.
    """
    if not edit.bakeable:
        raise ExciseError(
            "the edit lives in activations or behind a gate, so no matrix changes; `excise show` says what it does"
        )
    for site, parts in edit.at().items():
        label, weight = find_matrix(checkpoint, site, edit.fingerprints.get(site, ""), edit.recipe.get("model", ""))
        new = weight = weight.astype(np.float64)
        for part in parts:
            new = new + part.delta(new)
        gap = new - weight
        size, base = float(np.linalg.norm(gap)), float(np.linalg.norm(weight))
        # The edit is given exactly, so only double precision's own rounding is taken off.
        rank, bound = numerical_rank(gap, 0.0)
        yield MatrixDifference(
            f"{site} ({label})", weight.shape, "changed", size, size / base, float((gap != 0).mean()), rank, bound
        )


def find_matrix(checkpoint: Checkpoint, site: str, fingerprint: str, model: str = "") -> tuple[str, Array]:
    """The matrix [d_in, d_out] of a checkpoint with a given fingerprint: its name there, and its values.

    Only parameters whose name holds the site's layer number are looked at; linear layers, GPT-2's transposed ones, fused
    queries, keys and values, fused experts and their gate and up halves are all tried.
    """
    layer = re.search(r"blocks\.(\d+)\.", site)
    wanted = re.compile(rf"(^|\.){layer[1]}\.") if layer else re.compile("")
    for name in sorted(checkpoint.home, key=_natural):
        entry = checkpoint.entry(name)
        if fingerprint and wanted.search(name) and entry.dtype in FLOATS and len(entry.shape) in (2, 3):
            for label, index in checkpoint.slices(name):
                for view in _views(checkpoint.read(name, index)):
                    if _fingerprint(view) == fingerprint:
                        return label, view
    raise FingerprintMismatch(
        f"{checkpoint.folder}: no matrix there is the {site} ({fingerprint or 'no fingerprint kept'}) that this edit was made "
        f"for{f', of {model}' if model else ''}; give the model it was made for"
    )


def _views(stored: Array) -> Iterator[Array]:
    """The matrices [d_in, d_out] that a stored one may hold."""
    for view in (stored.T, stored):
        yield view
        width = view.shape[1]
        for count in (2, 3):
            if width % count == 0:
                yield from np.split(view, count, axis=1)
        yield from (view[:, ::2], view[:, 1::2])


def _fingerprint(matrix: Array) -> str:
    # As excise.model.tensor_fingerprint, whose values do not depend on the stored type.
    digest = hashlib.sha256(str(tuple(matrix.shape)).encode())
    digest.update(np.ascontiguousarray(matrix, dtype=np.float32).tobytes())
    return digest.hexdigest()[:16]


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 after layer 9."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", name)]


def _sizes(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


__all__ = [
    "MatrixDifference",
    "checkpoint_differences",
    "edit_on_checkpoint",
    "find_matrix",
    "matrix_difference",
    "numerical_rank",
    "rounding",
]
