"""excise compose: one edit from several, with a report of where they get into each other's way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise compose`."""
    parser.add_argument("edits", nargs="+", metavar="EDIT", help="edit files, in the order they take effect")
    parser.add_argument("--out", required=True, metavar="FILE", help="the composed edit")
    parser.add_argument(
        "--scale",
        nargs="+",
        type=common.finite,
        metavar="FACTOR",
        help="strength of each edit, in their order (default 1)",
    )
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Add the edits up, print their conflicts, save the sum."""
    factors = args.scale or [1.0] * len(args.edits)
    if len(factors) != len(args.edits):
        raise ValueError(f"{len(factors)} factors for {len(args.edits)} edits; give --scale one factor per edit")
    from excise.edits import Edit

    parts = [Edit.load(path) for path in args.edits]
    whole, *rest = [e if f == 1 else e.scaled(f) for e, f in zip(parts, factors, strict=True)]
    for part in rest:
        whole = whole + part
    path = whole.save(args.out)
    found = whole.recipe.get("conflicts", [])
    if args.format == "json":
        common.print_json({"edit": str(path), "changes": whole.summary(), "conflicts": found})
        return 0
    print(whole)
    if found:
        print(f"\n{len(found)} places are changed by more than one edit:")
        common.print_rows(found)
    else:
        print("\nno matrix or activation is changed by more than one edit")
    print(f"saved: {path}")
    return 0
