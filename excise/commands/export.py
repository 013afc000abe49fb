"""excise export: an edit becomes a plain checkpoint, or a PEFT adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise export`."""
    parser.add_argument("edit", help="an edit.safetensors")
    common.model_flags(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the edited checkpoint")
    parser.add_argument(
        "--force",
        action="store_true",
        help="export even if the edit was made for another model, and over an old export",
    )
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint and print where it is."""
    from excise.checkpoint import export
    from excise.edits import Edit

    edit = Edit.load(args.edit)
    model = common.load_model(args)
    folder = export(model, edit, args.out, force=args.force)
    if args.format == "json":
        common.print_json({"model": model.name, "edit": args.edit, "folder": str(folder)})
    else:
        print(f"{folder}: {model.name} without what {args.edit} removes; it loads in plain transformers")
    return 0
