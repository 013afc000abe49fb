"""One container for everything excise keeps: a safetensors file whose header holds a JSON description.

Edits, localizations and statistics share it, so there is one reader and one writer. Files appear under their final name
only when complete. Artefact types are looked up in a closed list; nothing in a file can name code to run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from excise.errors import DamagedFile, ExciseError
from excise.headers import FORMAT, read_header
from excise.sites import Site

if TYPE_CHECKING:
    from excise.edits import Edit
    from excise.scores import Localization


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends well, and disappears when it does not."""
    target, temporary = Path(path), None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes private files; artefacts are shared like any other file.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise ExciseError(
            f"{target}: could not write it ({error.strerror or error}); free some space or choose another folder"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_container(path: str | Path, kind: str, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    """Write one artefact. Tensors are stored contiguous, on the CPU, in their own dtype."""
    from safetensors.torch import save_file

    description = json.dumps({"format": FORMAT, "kind": kind, **header}, sort_keys=True)
    plain = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    with atomic(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"excise": description})
        except Exception as error:  # safetensors raises its own type for a full disk
            raise OSError(None, str(error)) from error
    return Path(path)


def inspect(path: str | Path) -> dict[str, Any]:
    """The header of an artefact, without its tensors. Raises DamagedFile or FileNotFoundError."""
    return read_header(path)


def read_container(path: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Header and tensors of an artefact of the wanted kind. Raises DamagedFile when it is something else."""
    from safetensors.torch import load_file

    header = inspect(path)
    if header["kind"] != kind:
        raise DamagedFile(f"{path}: holds {header['kind']!r}, and {kind!r} is wanted here")
    try:
        return header, load_file(path)
    except Exception as error:  # safetensors raises its own type
        raise DamagedFile(f"{path}: not a whole safetensors file ({error}); make it again or copy it again") from error


def save_edit(edit: Edit, path: str | Path) -> Path:
    """Write an edit; tensors are named `0.action.left`, `0.gate.direction`, ..."""
    tensors: dict[str, torch.Tensor] = {}
    changes = []
    gates: dict[int, int] = {}  # changes often share a gate: it is written once, and shared again when read
    for i, change in enumerate(edit.changes):
        row: dict[str, Any] = {"site": str(change.site), "action": _pack(change.action, f"{i}.action", tensors)}
        if id(change.gate) in gates:
            row["gate of"] = gates[id(change.gate)]
        elif change.gate is not None:
            gates[id(change.gate)] = i
            row["gate"] = _pack(change.gate, f"{i}.gate", tensors)
        changes.append(row)
    header = {"changes": changes, "recipe": edit.recipe, "fingerprints": edit.fingerprints}
    return write_container(path, "edit", header, tensors)


def load_edit(path: str | Path) -> Edit:
    """Read an edit. Raises DamagedFile when a part is missing, of an unknown type, of a wrong shape or not a number."""
    from excise.actions import ACTIONS, WeightAction
    from excise.edits import Change, Edit
    from excise.gates import GATES

    header, tensors = read_container(path, "edit")
    try:
        rows = list(enumerate(header["changes"]))
        gates = {i: _unpack(row["gate"], f"{i}.gate", tensors, GATES) for i, row in rows if "gate" in row}
        changes = tuple(
            Change(
                Site.parse(row["site"]),
                _unpack(row["action"], f"{i}.action", tensors, ACTIONS),
                gates[row.get("gate of", i)] if "gate of" in row or "gate" in row else None,
            )
            for i, row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path}: a change cannot be read ({error})") from error
    for name, values in tensors.items():
        if values.is_floating_point() and bool(values.isnan().any()):
            raise DamagedFile(f"{path}: the tensor {name} holds NaN; compute the edit again")
    for change in changes:
        if isinstance(change.action, WeightAction) and not _finite(change.action):
            raise DamagedFile(f"{path}: the change of {change.site} is infinite; compute the edit again")
    return Edit(changes, header["recipe"], header["fingerprints"])


def _finite(action: Any) -> bool:
    return all(bool(v.isfinite().all()) for v in vars(action).values() if isinstance(v, torch.Tensor))


def _pack(part: Any, prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {"type": type(part).__name__}
    for name in (f.name for f in dataclasses.fields(part)):
        value = getattr(part, name)
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}.{name}"] = value
        else:
            row[name] = str(value) if isinstance(value, Site) else value
    return row


def _unpack(row: dict[str, Any], prefix: str, tensors: dict[str, torch.Tensor], allowed: dict[str, Any]) -> Any:
    if row["type"] not in allowed:
        raise ValueError(f"unknown type {row['type']!r}; known: {', '.join(allowed)}")
    kind = allowed[row["type"]]
    values: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(kind)):
        if f"{prefix}.{name}" in tensors:
            values[name] = tensors[f"{prefix}.{name}"]
        elif name in row:
            values[name] = Site.parse(row[name]) if name == "site" else row[name]
    return kind(**values)


def save_localization(localization: Localization, path: str | Path) -> Path:
    """Write a localization with its maps."""
    tensors = {"scores": torch.from_numpy(np.ascontiguousarray(localization.scores))}
    if localization.directions is not None:
        tensors["directions"] = torch.from_numpy(np.ascontiguousarray(localization.directions))
    maps = []
    for i, m in enumerate(localization.maps):
        maps.append(
            {
                "fact": m.fact_id,
                "tokens": m.tokens,
                "subject": m.subject,
                "low": m.low,
                "high": m.high,
                "components": list(m.values),
            }
        )
        tensors |= {f"map.{i}.{name}": torch.from_numpy(np.ascontiguousarray(v)) for name, v in m.values.items()}
    header = {
        "sites": [str(s) for s in localization.sites],
        "facts": localization.fact_ids,
        "recipe": localization.recipe,
        "maps": maps,
    }
    return write_container(path, "localization", header, tensors)


def load_localization(path: str | Path) -> Localization:
    """Read a localization. Raises DamagedFile when it does not hold together."""
    from excise.scores import Localization, TraceMap

    header, tensors = read_container(path, "localization")
    maps = tuple(
        TraceMap(
            m["fact"],
            tuple(m["tokens"]),
            (m["subject"][0], m["subject"][1]),
            {c: _array(tensors[f"map.{i}.{c}"]) for c in m["components"]},
            m["low"],
            m["high"],
        )
        for i, m in enumerate(header["maps"])
    )
    return Localization(
        tuple(Site.parse(s) for s in header["sites"]),
        _array(tensors["scores"]),
        tuple(header["facts"]),
        header["recipe"],
        _array(tensors["directions"]) if "directions" in tensors else None,
        maps,
    )


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """As numpy has it, which knows no bfloat16."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
