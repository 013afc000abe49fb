"""Safetensors files and checkpoint folders through numpy alone, so that looking at them loads no model library."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from excise.errors import DamagedFile, ExciseError
from excise.jsonfile import read_object, why

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
# bfloat16 is the upper half of a float32, which numpy does not know by itself.
_NUMPY = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
# Digits of the mantissa that are kept, the leading one not counted.
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file; start and end count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file: its header is read at once, its tensors when they are asked for."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]

    @classmethod
    def open(cls, path: str | Path) -> TensorFile:
        """Read the header. Raises FileNotFoundError, and DamagedFile when it is not a whole safetensors file."""
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        size = file.stat().st_size
        try:
            with file.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                if not 2 <= length <= size - 8:
                    raise ValueError("its header is cut off")
                header = json.loads(opened.read(length))
            metadata = _metadata(header)
            entries = {name: _entry(row, 8 + length, size) for name, row in header.items()}
            if max((e.end for e in entries.values()), default=8 + length) != size:
                raise ValueError("it is longer than its header says")
        except (ValueError, RecursionError) as error:
            raise DamagedFile(
                f"{file}: not a whole safetensors file ({why(error)}); make it again or copy it again"
            ) from error
        return cls(file, metadata, entries)

    @cached_property
    def _bytes(self) -> np.memmap[Any, Any]:
        return np.memmap(self.path, mode="r")

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """The stored numbers, without a copy; bfloat16 as unsigned integers, unknown types as bytes."""
        entry = self.entries[name]
        part = self._bytes[entry.start : entry.end]
        kind = _NUMPY.get(entry.dtype)
        return part if kind is None else part.view(kind).reshape(entry.shape)

    def read(self, name: str, index: int | None = None) -> np.ndarray[Any, Any]:
        """A tensor, or one slice of its first axis; bfloat16 and float16 become float32, exactly.

        Raises ExciseError for packed types.
        """
        entry = self.entries[name]
        if entry.dtype not in _NUMPY:
            raise ExciseError(f"{self.path}: {name} is packed as {entry.dtype}; use a checkpoint without quantisation")
        raw = self.raw(name) if index is None else self.raw(name)[index]
        if entry.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32) if entry.dtype == "F16" else np.asarray(raw)


def _metadata(header: Any) -> dict[str, str]:
    """The metadata, taken out of the header."""
    found = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("its header is not an object, or its metadata not an object of texts")
    return found


def _entry(row: Any, base: int, size: int) -> Entry:
    match row:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(start), int(end)]}:
            shape = tuple(sizes)
        case _:
            raise ValueError("its header does not say type, shape and place of every tensor")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("its header names a shape that is none")
    kind = _NUMPY.get(dtype)
    # Whole numbers of Python's: a product that overflows could fit anything.
    expected = None if kind is None else math.prod(shape) * np.dtype(kind).itemsize
    if not 0 <= start <= end <= size - base or expected not in (None, end - start):
        raise ValueError("it ends too early, or its header does not fit its data")
    return Entry(dtype, shape, base + start, base + end)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: parameter name to the file that holds it."""

    folder: Path
    home: dict[str, TensorFile]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read the headers of a model folder, sharded or not. Raises ExciseError when it holds no safetensors."""
        path = Path(folder)
        if (path / INDEX).is_file():
            table = read_object(path / INDEX).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
                raise DamagedFile(
                    f"{path / INDEX}: its weight_map is not an object of file names; copy the folder again"
                )
            # Names come from a file: they must not lead out of the folder.
            files = {name: TensorFile.open(path / Path(name).name) for name in set(table.values())}
            missing = [n for n, file in table.items() if n not in files[file].entries]
            if missing:
                raise DamagedFile(
                    f"{path}: {missing[0]} is not in the shard that the index names; copy the folder again"
                )
            return cls(path, {name: files[file] for name, file in table.items()})
        if not (path / WHOLE).is_file():
            raise ExciseError(f"{path}: no {WHOLE} and no {INDEX}; give a folder with a safetensors checkpoint")
        whole = TensorFile.open(path / WHOLE)
        return cls(path, dict.fromkeys(whole.entries, whole))

    def entry(self, name: str) -> Entry:
        """Type and shape of a parameter."""
        return self.home[name].entries[name]

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """See TensorFile.raw."""
        return self.home[name].raw(name)

    def slices(self, name: str) -> Iterator[tuple[str, int | None]]:
        """The matrices of a parameter: itself, or one per expert where experts are fused along the first axis."""
        shape = self.entry(name).shape
        if len(shape) == 3:
            yield from ((f"{name}[{i}]", i) for i in range(shape[0]))
        else:
            yield name, None

    def read(self, name: str, index: int | None = None) -> np.ndarray[Any, Any]:
        """See TensorFile.read."""
        return self.home[name].read(name, index)
