"""results.jsonl: finished items and the table made of them, one JSON line each; written line by line, read with care."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from excise.errors import DamagedFile, ExciseError
from excise.files import write_text
from excise.jsonfile import why
from excise.scores import Results, Row, Score

if TYPE_CHECKING:
    from excise.arms import Arm
    from excise.registry import Method

# What stands in a score, by field.
KINDS: dict[str, tuple[type, ...]] = {f.name: (str,) for f in fields(Score)} | {
    "value": (int, float, NoneType),
    "held_out": (bool,),
}
HELP = "delete that line and run the command that made the file again: only what is missing is measured"


@dataclass(frozen=True)
class Item:
    """One evaluation of one arm, as it was kept."""

    key: str
    arm: str
    evaluation: str
    mode: str
    scores: tuple[Score, ...]


def plain_row(row: Row) -> dict[str, Any]:
    """One line of the long table as plain values; `held_out` and `variant` only where they apply."""
    found: dict[str, Any] = {"arm": row.arm, "evaluation": row.evaluation, "group": row.group, "form": row.form}
    found |= {k: None if math.isnan(v) else v for k in ("value", "low", "high") for v in [float(getattr(row, k))]}
    found["n"] = row.n
    if row.held_out:
        found["held_out"] = True
    return found | {k: v for k in ("variant", "n_skipped", "mode") if (v := getattr(row, k))}


class Store:
    """Finished items by key, one JSON line each, flushed to the disk as they come. Without a path it keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        if path is not None and path.is_file():
            for line, item in items_of(path):
                self.lines[item.key] = line
        # (arm, key): what two arms of the same state share is kept once for each.
        self.used: dict[tuple[str, str], None] = {}
        self._tidy(list(self.lines.values()))

    def get(self, key: str, arm: str) -> tuple[Score, ...] | None:
        """The scores of an item, now those of this arm; or None."""
        if key not in self.lines:
            return None
        self.used[arm, key] = None
        record = json.loads(self.lines[key])
        self.seconds[key] = record.get("seconds", 0.0)
        return tuple(Score(**s) for s in record["scores"])

    def add(self, key: str, arm: Arm, method: Method, scores: Sequence[Score], seconds: float = 0.0) -> None:
        """Append one item."""
        record: dict[str, Any] = {
            "key": key,
            "arm": arm.name,
            "evaluation": method.name,
            "mode": arm.mode,
            "seconds": round(seconds, 3),
            "scores": [_compact(s) for s in scores],
        }
        self.lines[key] = json.dumps(record, ensure_ascii=False)
        self.seconds[key] = record["seconds"]
        self.used[arm.name, key] = None
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.lines[key] + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ExciseError(
                    f"{self.path}: could not write it ({error.strerror}); free some space, run the same command again"
                ) from error

    def close(self, results: Results) -> None:
        """Leave the items of this run, arms in their order, the table made of them, and what is made of many scores."""
        rows = [*results.table(), *results.summary()] if self.path is not None else []
        order = {arm: i for i, arm in enumerate(results.arms)}
        used = sorted(self.used, key=lambda item: order.get(item[0], len(order)))
        lines = [self._named(key, arm) for arm, key in used]
        self._tidy(lines + [json.dumps(plain_row(r), ensure_ascii=False) for r in rows])

    def _named(self, key: str, arm: str) -> str:
        record = json.loads(self.lines[key])
        return self.lines[key] if record["arm"] == arm else json.dumps({**record, "arm": arm}, ensure_ascii=False)

    def _tidy(self, lines: Sequence[str]) -> None:
        if self.path is not None:
            write_text(self.path, "".join(f"{line}\n" for line in lines))


def read_results(path: Path) -> Results:
    """What `measure` kept, as Results. Raises DamagedFile, with the line, for what it did not write."""
    items = [item for _, item in items_of(path)]
    if not items:
        raise ExciseError(f"{path}: no finished item in it; run the command that makes it again")
    return Results({(i.arm, i.evaluation): i.scores for i in items}, {i.arm: i.mode for i in items})


def items_of(path: Path) -> Iterator[tuple[str, Item]]:
    """Every item with its line; rows of the table are passed over, and the half line that a killed run leaves at the end.

    Raises DamagedFile with the line for anything else.
    """
    # Not splitlines: what a model says may hold characters that it takes for the end of a line.
    whole = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(whole):
                return
            raise DamagedFile(f"{path}, line {number}: not JSON ({why(error, lines=False)}); {HELP}") from error
        if not isinstance(record, dict):
            raise DamagedFile(f"{path}, line {number}: not a JSON object; {HELP}")
        if "scores" in record:
            try:
                yield line.decode(), _item(record)
            except ValueError as error:
                raise DamagedFile(f"{path}, line {number}: {error}; {HELP}") from error


def _item(record: dict[str, Any]) -> Item:
    """The item in a record; raises ValueError that says what is wrong with it."""
    names: dict[str, Any] = {}
    for name, standard in (("key", ""), ("arm", None), ("evaluation", None), ("mode", None)):
        names[name] = record.get(name, standard)
        if not isinstance(names[name], str):
            raise ValueError(f"{name!r} is {'missing' if name not in record else 'not a text'}")
    if not isinstance(record.get("seconds", 0.0), (int, float)):
        raise ValueError("'seconds' is not a number")
    if not isinstance(record["scores"], list):
        raise ValueError("'scores' is not a list")
    return Item(**names, scores=tuple(_score(s, i) for i, s in enumerate(record["scores"], 1)))


def _score(values: Any, number: int) -> Score:
    if not isinstance(values, dict):
        raise ValueError(f"score {number} is not an object")
    for name, value in values.items():
        if name not in KINDS:
            raise ValueError(f"score {number} has an unknown field {name!r}")
        if not isinstance(value, KINDS[name]) or (isinstance(value, bool) and name != "held_out"):
            raise ValueError(f"score {number} has a {name!r} of the wrong kind: {str(value)[:40]!r}")
    missing = [name for name in ("fact", "subject", "group", "value") if name not in values]
    if missing:
        raise ValueError(f"score {number} lacks {', '.join(missing)}")
    return Score(**values)


def _compact(score: Score) -> dict[str, Any]:
    return {k: v for k, v in asdict(score).items() if v not in ("", False) or isinstance(v, float)} | {
        "fact": score.fact, "subject": score.subject, "group": score.group, "value": score.value,
    }  # fmt: skip
