"""excise ask: a model's own words, with and without an edit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from excise.commands import common

if TYPE_CHECKING:
    from excise.edits import Edit
    from excise.model import Model


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise ask`."""
    parser.add_argument(
        "prompt", nargs="+", help="what to ask; a question is sent as a chat turn where the model knows one"
    )
    common.model_flags(parser)
    parser.add_argument("--edit", metavar="E", help="also answer under this edit.safetensors")
    parser.add_argument(
        "--plain", action="store_true", help="never use the chat template: let the model continue the text"
    )
    parser.add_argument(
        "--max-new-tokens", type=common.positive, default=24, metavar="N", help="length of an answer (default 24)"
    )
    parser.add_argument("--force", action="store_true", help="use an edit that was made for another model")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the answers, one row a prompt."""
    from excise.edits import Edit

    edit = Edit.load(args.edit) if args.edit else None
    model = common.load_model(args)
    rows = answers(model, edit, args.prompt, args.max_new_tokens, plain=args.plain, force=args.force)
    if args.format == "json":
        common.print_json({"model": model.name, "answers": rows})
    else:
        common.print_rows(rows)
    return 0


def answers(
    model: Model, edit: Edit | None, asked: Sequence[str], length: int, *, plain: bool = False, force: bool = False
) -> list[dict[str, str]]:
    """For each question what the model says before and, where there is an edit, under it; `length` in tokens."""
    from excise.apply import applied
    from excise.facts import Prompt

    prompts = [Prompt(text, "", chat=not plain and text.rstrip().endswith("?")) for text in asked]
    said = {"before": model.generate_all(prompts, max_new_tokens=length)}
    if edit is not None:
        with applied(model, edit, force=force):
            said["edited"] = model.generate_all(prompts, max_new_tokens=length)
    return [{"prompt": p.text, **{arm: texts[i] for arm, texts in said.items()}} for i, p in enumerate(prompts)]
