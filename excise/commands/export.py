"""excise export: an edit becomes a plain checkpoint, a PEFT adapter, or a steering table for lm-eval."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common

FORMS = {
    "checkpoint": "{model} without what {edit} removes; it loads in plain transformers",
    "peft": "a PEFT adapter of {model}: PeftModel.from_pretrained(model, {folder!r})",
    "steering": "for lm_eval --model steered --model_args pretrained=...,steer_path={folder}/steering.csv",
}


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise export`."""
    parser.add_argument("edit", help="an edit.safetensors")
    common.model_flags(parser)
    parser.add_argument(
        "--to",
        choices=FORMS,
        default="checkpoint",
        help="checkpoint: the whole edited model (default); peft: a LoRA adapter of the changes, where they are low rank; "
        "steering: lm-eval's table, where the edit clamps directions",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--force", action="store_true", help="export even if the edit was made for another model")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder and print where it is."""
    from excise.adapters import export_peft
    from excise.checkpoint import export
    from excise.edits import Edit
    from excise.steering import export_steering

    write = {"checkpoint": export, "peft": export_peft, "steering": export_steering}[args.to]
    edit = Edit.load(args.edit)
    model = common.load_model(args)
    folder = write(model, edit, args.out, force=args.force)
    if args.format == "json":
        common.print_json({"model": model.name, "edit": args.edit, "to": args.to, "folder": str(folder)})
    else:
        print(f"{folder}: {FORMS[args.to].format(model=model.name, edit=args.edit, folder=str(folder))}")
    return 0
