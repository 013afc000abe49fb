"""What a benchmark has finished, rows in a JSON Lines file and trained models, so that one that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from excise.arms import Arm
from excise.model import load


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """The finished rows; none without a file. A last line that was cut off when the benchmark was killed is left out."""
    lines = file.read_text(encoding="utf-8").split("\n") if file and file.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def add_rows(file: Path | None, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows behind those that are there; nothing without a file."""
    if file is None:
        return
    if file.exists():
        # What a kill left of a line goes first, or the next row would be written behind it.
        whole = file.read_bytes()
        with file.open("r+b") as out:
            out.truncate(whole.rfind(b"\n") + 1)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


def kept_arm(folder: Path | None, name: str, make: Callable[[], Arm]) -> Arm:
    """A trained arm: read from the folder where it lies there, else made and written; only made without a folder."""
    if folder is not None and (folder / "config.json").exists():
        return Arm(name, load(str(folder)))
    made = make()
    if folder is not None:
        made.model.tokenizer.save_pretrained(folder)
        made.model.hf.save_pretrained(folder)
    return Arm(name, made.model)
