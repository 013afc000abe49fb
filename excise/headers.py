"""Headers of artefacts: read and checked against what an artefact of that kind consists of, before anything is built.

Every reader of ours goes through `header_of`, with or without a model library: what it gives back has all fields, each of
the right type, and tensors whose shapes fit each other. Types of actions and gates are names on a closed list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.errors import DamagedFile
from excise.jsonfile import decoded
from excise.sites import Site
from excise.tensorfile import FLOATS, Entry, TensorFile

FORMAT = 1
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8")

# Tensors of each action and gate: its axes, where one letter is one size throughout the part. "whole": of whole numbers;
# "?": may be missing; "|": either.
TENSORS: dict[str, dict[str, str]] = {
    "LowRank": {"left": "i r", "right": "r o"},
    "Dense": {"change": "i o"},
    "Sparse": {"indices": "whole n", "values": "n"},
    "Scale": {"units": "whole n", "factor": "n"},
    "Affine": {"left": "d r", "right": "r d", "centre": "d", "shift": "d"},
    "Reflect": {"units": "whole n"} | dict.fromkeys(("mean_retain", "std_retain", "mean_forget", "std_forget"), "n"),
    "Clamp": {"encoder": "d m", "bias": "m", "threshold": "m", "picked": "? whole n", "decoder": "n d", "value": "n"},
    "Abstain": {"tokens": "whole n"},
}
WEIGHT_ACTIONS = ("LowRank", "Dense", "Sparse", "Scale")
GATES: dict[str, dict[str, str]] = {
    "Linear": {"direction": "d | d n", "threshold": "? n"},
    "Box": {"lower": "d | n d", "upper": "d | n d"},
    "Share": {"encoder": "d m", "bias": "m", "threshold": "m", "picked": "? whole n"},
    "Quorum": {
        "encoder": "d m",
        "bias": "m",
        "threshold": "m",
        "picked": "? whole n",
        "level": "n",
        "group": "whole n",
    },
}
# All else an action or gate may hold: a type, or the words that it may be.
SETTINGS: dict[str, type | tuple[str, ...]] = {
    "side": ("in", "out"),
    "mode": ("clamp", "scale"),
    "mask": ("feature", "token"),
    "norm": ("none", "layer_norm", "constant_norm_rescale"),
    "scope": ("token", "sequence"),
    "site": Site,
    **dict.fromkeys(("margin", "strength", "share", "quota", "threshold"), float),
    **dict.fromkeys(("k", "window"), int),
    **dict.fromkeys(("sticky", "specials"), bool),
}
WORDS = {
    list: "a list",
    dict: "an object",
    str: "text",
    int: "a whole number from 0 on",
    float: "a number",
    bool: "true or false",
}


def read_header(path: str | Path) -> dict[str, Any]:
    """The checked header of an artefact. Raises DamagedFile, or FileNotFoundError."""
    return header_of(TensorFile.open(path))


def header_of(file: TensorFile) -> dict[str, Any]:
    """The checked header of an opened artefact. Raises DamagedFile when it is none, or one that does not hold together."""
    if "excise" not in file.metadata:
        raise DamagedFile(
            f"{file.path}: a safetensors file, but not one of excise's; expected an edit, a localization or statistics"
        )
    header = decoded(file.metadata["excise"], f"{file.path}: its header")
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else "?"
        raise DamagedFile(f"{file.path}: format {found!r}; this version reads format {FORMAT}")
    try:
        kind = _of(header, "kind", str)
        {"edit": _edit, "localization": _localization, "ledger": _ledger}.get(kind, _other)(header, file.entries)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{file.path}: cannot be read: {error}; make it again or copy it again") from error
    return header


def _other(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    """Nothing is known of other kinds; whoever reads them checks them."""


# the kinds


def _edit(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    _provenance(header)
    gated = set()
    for i, row in enumerate(_list(header, "changes", dict)):
        where = f"change {i}"
        site = Site.parse(_of(row, "site", str, where))
        _part(_of(row, "action", dict, where), TENSORS, f"{i}.action", entries)
        if site.is_weight != (row["action"]["type"] in WEIGHT_ACTIONS):
            raise ValueError(f"{where}: {row['action']['type']} cannot act on {site}")
        if "gate" in row:
            _part(_of(row, "gate", dict, where), GATES, f"{i}.gate", entries)
            gated.add(i)
        if "gate of" in row and _of(row, "gate of", int, where) not in gated:
            raise ValueError(f"{where} shares the gate of change {row['gate of']}, which has none")


def _part(
    row: Mapping[str, Any], known: Mapping[str, dict[str, str]], prefix: str, entries: Mapping[str, Entry]
) -> None:
    name = _of(row, "type", str, prefix)
    if name not in known:
        raise ValueError(f"{prefix} has the unknown type {name!r}; known: {', '.join(known)}")
    for setting in (s for s in SETTINGS if s in row):
        _setting(row, setting, prefix)
    sizes: dict[str, int] = {}
    for tensor, axes in known[name].items():
        entry = entries.get(f"{prefix}.{tensor}")
        if entry is None and not axes.startswith("?"):
            raise ValueError(f"the tensor {prefix}.{tensor} is missing")
        if entry is not None:
            _fits(f"{prefix}.{tensor}", entry, axes.removeprefix("? "), sizes)
    # Without a choice of features, all that are encoded count.
    if name in ("Clamp", "Quorum") and f"{prefix}.picked" not in entries and sizes["m"] != sizes["n"]:
        raise ValueError(f"{prefix} encodes {sizes['m']} features and uses {sizes['n']}")
    if name == "Abstain" and not sizes["n"]:
        raise ValueError(f"{prefix} has no token to say")


def _setting(row: Mapping[str, Any], name: str, prefix: str) -> None:
    wanted = SETTINGS[name]
    if isinstance(wanted, tuple):
        if row[name] not in wanted:
            raise ValueError(f"{prefix}.{name} is {row[name]!r}; it must be {' or '.join(wanted)}")
    elif wanted is Site:
        Site.parse(_of(row, name, str, prefix))
    else:
        _of(row, name, wanted, prefix)


def _localization(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    sites, facts = _list(header, "sites", str), _list(header, "facts", str)
    for site in sites:
        Site.parse(site)
    _of(header, "recipe", dict)
    sizes = {"f": len(facts), "s": len(sites)}
    _tensor(entries, "scores", "f s", sizes)
    if "directions" in entries:
        _tensor(entries, "directions", "s d", sizes)
    for i, row in enumerate(_list(header, "maps", dict)):
        where = f"map {i}"
        _of(row, "fact", str, where)
        tokens = _list(row, "tokens", str, where)
        if len(_list(row, "subject", int, where)) != 2:
            raise ValueError(f"{where}: the subject must be two token numbers")
        for end in ("low", "high"):
            _of(row, end, float, where)
        size = {"t": len(tokens)}
        for component in _list(row, "components", str, where):
            _tensor(entries, f"map.{i}.{component}", "l t", size)


def _ledger(header: Mapping[str, Any], entries: Mapping[str, Entry]) -> None:
    _provenance(header)
    if _of(header, "mode", str) not in ("hard", "ridge", "soft"):
        raise ValueError(f"mode is {header['mode']!r}; it must be hard, ridge or soft")
    _of(header, "ridge", float)
    ridges = _of(header, "ridges", dict)
    widths: dict[str, int] = {}
    for name in ridges:
        _of(ridges, name, float)
        size: dict[str, int] = {}
        _tensor(entries, f"second.{name}", "d d", size)
        widths[name] = size["d"]
    sizes: dict[str, int] = {}
    for i, row in enumerate(_list(header, "requests", dict)):
        where = f"request {i}"
        _of(row, "request", str, where)
        rows = {"keys": _of(row, "columns", int, where), "protect": len(_list(row, "labels", str, where))}
        if _of(row, "protected", int, where) != rows["protect"]:
            raise ValueError(f"{where} has {rows['protect']} labels for {row['protected']} protected keys")
        rows["whitened"] = rows["keys"] + rows["protect"]
        sizes["n"] = rows["keys"]
        _tensor(entries, f"{i}.residuals", "n o", sizes)
        for part, count in rows.items():
            for entry in (e for e in entries if e.startswith(f"{i}.{part}.")):
                name = entry.removeprefix(f"{i}.{part}.")
                if name not in widths:
                    raise ValueError(f"the tensor {entry} belongs to no matrix of this ledger")
                _tensor(entries, entry, "n d", {"n": count, "d": widths[name]})


# the pieces


def _provenance(header: Mapping[str, Any]) -> None:
    _of(header, "recipe", dict)
    prints = _of(header, "fingerprints", dict)
    for name in prints:
        _of(prints, name, str)


def _of(row: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """The field of a row. Raises ValueError when it is missing or not of that type."""
    shown = f"{where}.{name}" if where else name
    if name not in row:
        raise ValueError(f"{shown} is missing")
    value = row[name]
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is int and value < 0):
        raise ValueError(f"{shown} must be {WORDS[kind]}")
    return value


def _list(row: Mapping[str, Any], name: str, kind: type, where: str = "") -> list[Any]:
    found: list[Any] = _of(row, name, list, where)
    for i, value in enumerate(found):
        _of({str(i): value}, str(i), kind, f"{where}.{name}" if where else name)
    return found


def _tensor(entries: Mapping[str, Entry], name: str, axes: str, sizes: dict[str, int]) -> None:
    if name not in entries:
        raise ValueError(f"the tensor {name} is missing")
    _fits(name, entries[name], axes, sizes)


def _fits(name: str, entry: Entry, axes: str, sizes: dict[str, int]) -> None:
    """Check a tensor's type and shape; `sizes` learns each letter's size from the first tensor that has it."""
    whole = axes.startswith("whole ")
    if entry.dtype not in (WHOLE_NUMBERS if whole else FLOATS):
        raise ValueError(
            f"the tensor {name} holds {entry.dtype}; it must hold {'whole' if whole else 'floating-point'} numbers"
        )
    for each in axes.removeprefix("whole ").split("|"):
        letters = each.split()
        if len(letters) == len(entry.shape):
            break
    else:
        raise ValueError(f"the tensor {name} has shape {list(entry.shape)}; it must have the axes {axes}")
    for letter, size in zip(letters, entry.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(
                f"the tensor {name} has shape {list(entry.shape)}, where {letter} is {sizes[letter]} in {_axes(letters)}"
            )


def _axes(letters: Sequence[str]) -> str:
    return f"[{', '.join(letters)}]"


__all__ = ["FORMAT", "GATES", "SETTINGS", "TENSORS", "WEIGHT_ACTIONS", "header_of", "read_header"]
