"""Requests that come one after the other: every request's keys are kept, so that all of them are always solved jointly.

Adding a request or withdrawing one gives exactly the edit that a joint solution of the remaining requests gives; nothing
is left of what was withdrawn (recursive least squares, without its drift). What is solved has the size of the number of
keys, because the expensive part, M^-1 applied to each key, is kept with the key.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from excise.edits import Edit
from excise.errors import DamagedFile, ExciseError, FingerprintMismatch
from excise.files import read_container, write_container
from excise.solve import Covariance, Metric, Solution, compress, solve_edit

if TYPE_CHECKING:
    from excise.model import Model


@dataclass(frozen=True, eq=False)
class Request:
    """What one request asks of the matrices that write to one output.

    keys: per matrix [n, d_in]; a matrix that is left out is not reached. residuals: [n, d_out], what each key's output is
    to gain on the weights without any edit. protect: per matrix [n0, d_in], keys whose output must stay; labels: one per
    protected key, by which a key that several requests protect counts once.
    """

    name: str
    keys: Mapping[str, Tensor]
    residuals: Tensor
    protect: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def rows(self, matrix: str, width: int) -> Tensor:
        """Keys, then protected keys, at one matrix [n + n0, width] in float64; zero where it is not reached."""
        n, n0 = len(self.residuals), len(self.labels)
        keys = self.keys.get(matrix, torch.zeros(n, width))
        return torch.cat([keys.double(), self.protect.get(matrix, torch.zeros(n0, width)).double()])


class _Known:
    """A metric whose answer is already there."""

    def __init__(self, whitened: Tensor) -> None:
        self.whitened = whitened

    def solve(self, keys: Tensor) -> Tensor:
        """M^-1 of just these keys."""
        assert keys.shape == self.whitened.shape
        return self.whitened


@dataclass(frozen=True, eq=False)
class Ledger:
    """Requests of one model, solved jointly under one metric.

    metrics: M of each matrix, the same for all requests. fingerprints: of the matrices and the tokenizer, unedited.
    mode, ridge: as in `excise.solve.solve_edit`. whitened: M^-1 of each request's rows, by request and matrix.
    """

    metrics: Mapping[str, Covariance]
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "ridge"
    ridge: float = 0.3
    requests: tuple[Request, ...] = ()
    whitened: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the requests, in the order they came."""
        return [r.name for r in self.requests]

    def check(self, model: Model) -> None:
        """Refuse a model whose weights are not those that the ledger's requests were read on, or that runs under an edit."""
        for name, expected in self.fingerprints.items():
            found = model.tokenizer_fingerprint if name == "tokenizer" else model.matrix_fingerprint(name)
            if found != expected:
                raise FingerprintMismatch(
                    f"this ledger was opened on other weights ({name} {expected}, here {found}): requests are read on the "
                    "unedited model, so load it, or revert the edit that is baked in"
                )
        if any(model.active.get(name) for name in self.metrics):
            raise ExciseError("requests are read on the unedited model: leave applied() first")

    def add(self, *requests: Request) -> Ledger:
        """The ledger with more requests. Raises ValueError for a name that is taken and for keys of other matrices."""
        taken = set(self.names)
        whitened = dict(self.whitened)
        for request in requests:
            if request.name in taken:
                raise ValueError(f"the ledger has a request {request.name!r} already; withdraw it first")
            self._check_shapes(request)
            taken.add(request.name)
        for name, metric in self.metrics.items():
            wanted = [r for r in requests if name in r.keys or name in r.protect]
            rows = [r.rows(name, metric.second_moment.shape[0]) for r in wanted]
            # All keys in one go: the factor of M is found once.
            solved = metric.solve(torch.cat(rows)).split([len(r) for r in rows]) if rows else ()
            for request, part in zip(wanted, solved, strict=True):
                whitened[request.name] = {**whitened.get(request.name, {}), name: part}
        return replace(self, requests=(*self.requests, *requests), whitened=whitened)

    def _check_shapes(self, request: Request) -> None:
        for name, rows in [*request.keys.items(), *request.protect.items()]:
            if name not in self.metrics:
                raise ValueError(
                    f"request {request.name!r} has keys of {name}; this ledger is about {', '.join(self.metrics)}"
                )
            width = self.metrics[name].second_moment.shape[0]
            if rows.shape[1] != width:
                raise ValueError(
                    f"request {request.name!r}: keys of {name} have {rows.shape[1]} entries, and it reads {width}"
                )

    def withdraw(self, *names: str) -> Ledger:
        """The ledger as if these requests had never come. Raises ValueError with near names for unknown ones."""
        for name in names:
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, n=3) or self.names[:3]
                raise ValueError(
                    f"no request {name!r} in the ledger; did you mean {', '.join(near) or 'another ledger'}?"
                )
        kept = tuple(r for r in self.requests if r.name not in names)
        return replace(
            self, requests=kept, whitened={r.name: self.whitened[r.name] for r in kept if r.name in self.whitened}
        )

    def solution(self) -> Solution:
        """The joint solution of all requests. Raises ValueError when there are none."""
        if not self.requests:
            raise ValueError("the ledger holds no request, so there is nothing to solve")
        reached = [m for m in self.metrics if any(m in r.keys for r in self.requests)]
        guarded = self._guarded()
        columns = {m: self._columns(m, guarded, whitened=False) for m in reached}
        known = {m: self._columns(m, guarded, whitened=True) for m in reached}
        keys = {m: k for m, (k, _) in columns.items()}
        residuals = torch.cat([r.residuals for r in self.requests])
        if not guarded:
            metrics: dict[str, Metric] = {m: _Known(k) for m, (k, _) in known.items()}
            return solve_edit(keys, residuals, metrics, mode=self.mode, ridge=self.ridge)
        mixing = _mixing(torch.cat([walls for _, walls in columns.values()], dim=1))
        protect = {m: mixing @ walls for m, (_, walls) in columns.items()}
        metrics = {m: _Known(torch.cat([k, mixing @ walls])) for m, (k, walls) in known.items()}
        return solve_edit(keys, residuals, metrics, protect=protect, mode=self.mode, ridge=self.ridge)

    def _guarded(self) -> list[tuple[int, int]]:
        """The protected keys that count, as (request, row)."""
        forgotten = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in self.names))
        first: dict[tuple[str, int], tuple[int, int]] = {}
        for i, request in enumerate(self.requests):
            met: Counter[str] = Counter()
            for j, label in enumerate(request.labels):
                met[label] += 1  # what one request protects twice stays twice
                if not forgotten.search(label):
                    first.setdefault((label, met[label]), (i, j))
        return list(first.values())

    def _columns(self, matrix: str, guarded: list[tuple[int, int]], *, whitened: bool) -> tuple[Tensor, Tensor]:
        """Keys [n, d_in] of all requests at one matrix, and the protected ones that count; or M^-1 of both."""
        rows = [r.rows(matrix, self.metrics[matrix].second_moment.shape[0]) for r in self.requests]
        if whitened:
            known = [self.whitened.get(r.name, {}) for r in self.requests]
            rows = [k.get(matrix, torch.zeros_like(x)) for k, x in zip(known, rows, strict=True)]
        counts = [len(r.residuals) for r in self.requests]
        keys = torch.cat([x[:n] for x, n in zip(rows, counts, strict=True)])
        walls = [rows[i][counts[i] + j] for i, j in guarded]
        return keys, torch.stack(walls) if walls else keys[:0]

    def edit(self) -> Edit:
        """The edit that carries out all requests; one without changes when there are none."""
        recipe = {**self.recipe, "requests": self.names}
        prints = {n: p for n, p in self.fingerprints.items() if n == "tokenizer"}
        if not self.requests:
            return Edit((), recipe, prints)
        solution = self.solution()
        changes = solution.changes()
        prints |= {str(c.site): self.fingerprints[str(c.site)] for c in changes if str(c.site) in self.fingerprints}
        report = {**solution.report, "leak max": solution.worst_leak}
        return Edit(changes, {**recipe, "solution": [report]}, prints)

    def save(self, path: str | Path) -> Path:
        """Write keys, their M^-1, and the metrics to one safetensors file, from which everything can be solved again."""
        tensors = {f"second.{name}": m.second_moment for name, m in self.metrics.items()}
        rows = []
        for i, r in enumerate(self.requests):
            tensors[f"{i}.residuals"] = r.residuals
            tensors |= {f"{i}.keys.{n}": t for n, t in r.keys.items()}
            tensors |= {f"{i}.protect.{n}": t for n, t in r.protect.items()}
            tensors |= {f"{i}.whitened.{n}": t for n, t in self.whitened.get(r.name, {}).items()}
            rows.append(
                {"request": r.name, "columns": len(r.residuals), "protected": len(r.labels), "labels": r.labels}
            )
        header = {
            "requests": rows,
            "ridges": {name: m.ridge for name, m in self.metrics.items()},
            "fingerprints": dict(self.fingerprints),
            "recipe": dict(self.recipe),
            "mode": self.mode,
            "ridge": self.ridge,
        }
        return write_container(path, "ledger", header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Ledger:
        """Read what `save` wrote. Raises DamagedFile when a part is missing."""
        header, tensors = read_container(path, "ledger")

        def named(prefix: str) -> dict[str, Tensor]:
            return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

        try:
            requests = tuple(
                Request(
                    row["request"],
                    named(f"{i}.keys."),
                    tensors[f"{i}.residuals"],
                    named(f"{i}.protect."),
                    tuple(row["labels"]),
                )
                for i, row in enumerate(header["requests"])
            )
            metrics = {n: Covariance(tensors[f"second.{n}"], ridge) for n, ridge in header["ridges"].items()}
            whitened = {r.name: named(f"{i}.whitened.") for i, r in enumerate(requests)}
            if any(bool(t.isnan().any()) for t in tensors.values()):
                raise ValueError("NaN among its keys")
            known = (header["fingerprints"], header["recipe"], header["mode"], header["ridge"])
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFile(f"{path}: a request cannot be read ({error})") from error
        return cls(metrics, *known, requests, whitened)


def _mixing(walls: Tensor) -> Tensor:
    """Few combinations [r, n0] of protected keys that stand for all of them, as `excise.solve.compress` makes them.

    As a matrix, so that M^-1 of the combinations follows from M^-1 of the keys.
    """
    short = compress(walls, tolerance=1e-3)
    square = (short * short).sum(1, keepdim=True).clamp_min(1e-300)
    # Rows of `short` are s v of walls = u s v, so u^T = (s v) walls^T / s^2.
    return (short / square) @ walls.mT


__all__ = ["Ledger", "Request"]
