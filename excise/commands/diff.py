"""excise diff: what tells two edits apart, two checkpoints, or a checkpoint from itself under an edit."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from excise.commands import common

KINDS = "an edit file, a model folder, or testbed:NAME"


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise diff`."""
    parser.add_argument("a", help=f"what to compare with: {KINDS}")
    parser.add_argument("b", help="what to compare; an edit after a model shows what baking it changes")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print one row per place that differs."""
    from excise.differences import checkpoint_differences, edit_on_checkpoint
    from excise.edit_differences import edit_differences
    from excise.outline import read_outline
    from excise.tensorfile import Checkpoint

    a, b = _found(args.a), _found(args.b)
    found: Iterable[Any]
    if a.is_file() and b.is_file():
        what, found = "edits", edit_differences(read_outline(a), read_outline(b))
    elif a.is_dir() and b.is_dir():
        what, found = "checkpoints", checkpoint_differences(Checkpoint.open(a), Checkpoint.open(b))
    else:
        folder, file = (a, b) if a.is_dir() else (b, a)
        what, found = "model and edit", edit_on_checkpoint(Checkpoint.open(folder), read_outline(file))
    rows = [difference.row() for difference in found]
    changed = sum(r["change"] != "same" for r in rows)
    if args.format == "json":
        common.print_json({"what": what, "a": args.a, "b": args.b, "changed": changed, "rows": rows})
        return 0
    # Columns that say nothing anywhere are left out.
    common.print_rows(rows, [k for k in (rows[0] if rows else {}) if any(r[k] is not None for r in rows)])
    print(
        f"{what}: {changed} of {len(rows)} places differ" if what == "edits" else f"{what}: {changed} parameters differ"
    )
    return 0


def _found(text: str) -> Path:
    if text.startswith("testbed:"):
        from excise.testbed.shipped import model_folder

        return model_folder(text.removeprefix("testbed:"))
    path = Path(text)
    if not path.exists():
        raise FileNotFoundError(f"{text}: no such file or folder; give {KINDS}")
    return path
