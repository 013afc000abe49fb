"""excise ask: a model's own words, with and without an edit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common


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
    from excise.apply import applied
    from excise.edits import Edit
    from excise.facts import Prompt

    edit = Edit.load(args.edit) if args.edit else None
    model = common.load_model(args)
    prompts = [Prompt(text, "", chat=not args.plain and text.rstrip().endswith("?")) for text in args.prompt]
    answers = {"before": model.generate_all(prompts, max_new_tokens=args.max_new_tokens)}
    if edit is not None:
        with applied(model, edit, force=args.force):
            answers["edited"] = model.generate_all(prompts, max_new_tokens=args.max_new_tokens)
    rows = [{"prompt": p.text, **{arm: said[i] for arm, said in answers.items()}} for i, p in enumerate(prompts)]
    if args.format == "json":
        common.print_json({"model": model.name, "answers": rows})
    else:
        common.print_rows(rows)
    return 0
