"""excise run: the whole chain on one's own model and facts."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common, outcome


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise run`."""
    parser.add_argument("facts", help="JSON Lines file with forget and retain facts")
    common.model_flags(parser)
    common.facts_flags(parser, name=False)
    parser.add_argument("--oracle", metavar="M", help="a model that never learned the forget facts, to compare with")
    parser.add_argument(
        "--localizer", default="causal-trace", metavar="METHOD", help="how to find the sites (default causal-trace)"
    )
    parser.add_argument("--editor", default="rocr", metavar="METHOD", help="how to cut (default rocr)")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder; the same command again continues")
    parser.add_argument("--dry-run", action="store_true", help="read the facts, say what would be done, and stop")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chain and print what it found."""
    facts, bad = common.load_facts(args, "forget", "retain")
    if args.dry_run:
        print(
            f"would run {args.localizer}, {args.editor} and all evaluations on {facts!r} "
            f"with {args.model} into {args.out}"
        )
        return 0
    from excise.chain import Inputs
    from excise.chain import run as run_chain

    inputs = Inputs(
        model=common.load_model(args),
        facts=facts,
        out=common.out_folder(args.out),
        command=common.typed(args),
        seed=args.seed,
        oracle=common.load_model(args, args.oracle) if args.oracle else None,
        localizer=args.localizer,
        editor=args.editor,
    )
    code = outcome.show(run_chain(inputs), args.format)
    return 3 if bad and not code else code
