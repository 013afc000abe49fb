"""excise run: from a list of facts to the best edit found for them, with its evidence and a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from excise.commands import common, menu, outcome
from excise.progress import say

if TYPE_CHECKING:
    from excise.facts import Facts
    from excise.model import Model
    from excise.registry import Kind

# Tries of a search: about four minutes of two cores on a model of the embedded ones' size.
TRIALS = 40
# With fewer prompts about what is to be forgotten, 0 of n excludes little: 0 of 20 is [0, 0.16].
FEW = 20


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise run`."""
    parser.add_argument("facts", help="JSON Lines file with forget and retain facts")
    common.model_flags(parser)
    common.facts_flags(parser, name=False)
    parser.add_argument("--oracle", metavar="M", help="a model that never learned the forget facts, to compare with")
    parser.add_argument("--localizer", default="scan", metavar="METHOD", help="how to find the sites (default scan)")
    parser.add_argument("--editor", metavar="METHOD", help="cut with this one, at its defaults, in place of a search")
    parser.add_argument(
        "--trials", type=common.positive, default=TRIALS, metavar="N", help=f"tries of the search (default {TRIALS})"
    )
    parser.add_argument(
        "--minutes",
        type=common.minutes,
        metavar="M",
        help="half of them at most for the search; of the audit what fits into the rest",
    )
    parser.add_argument("--export", metavar="DIR", help="also write the edited model there, as a plain checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder; the same command again continues")
    parser.add_argument("--dry-run", action="store_true", help="read the facts, say what would be done, and stop")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chain and print what it found."""
    from excise.registry import method

    wanted: tuple[tuple[Kind, str | None], ...] = (("localizer", args.localizer), ("editor", args.editor))
    for kind, name in wanted:
        if name:
            method(kind, name)  # a name that does not exist is told before a model is loaded
    facts, bad = common.load_facts(args, "forget", "retain")
    if args.dry_run:
        cut = args.editor or f"a search of {args.trials} tries"
        print(f"would run {args.localizer}, {cut} and the audit on {facts!r} with {args.model} into {args.out}")
        return 0
    wordings = sum(len(f.prompts) for f in facts.group("forget"))
    if wordings < FEW:
        say(
            f"{wordings} wordings of what is to be forgotten make wide intervals: more facts, or fields `question` and "
            f"`paraphrases`, let the audit decide more"
        )
    from excise.audit import DEFAULT
    from excise.card import write_card
    from excise.chain import Inputs
    from excise.chain import run as run_chain

    inputs = Inputs(
        model=_examined(common.load_model(args)),
        facts=facts,
        out=common.out_folder(args.out),
        command=common.typed(args),
        seed=args.seed,
        oracle=common.load_model(args, args.oracle) if args.oracle else None,
        localizer=args.localizer,
        editor=args.editor or "rocr",
        trials=0 if args.editor else args.trials,
        minutes=args.minutes,
        evaluations=DEFAULT,
        **_own_world(args, facts),
    )
    done = run_chain(inputs)
    write_card(done)
    if args.export:
        from excise.checkpoint import export

        export(inputs.model, done.edit, args.export)
    code = outcome.show(done, args.format)
    if args.format == "table" and menu.is_terminal():
        menu.offer(done)
    return 3 if bad and not code else code


def _examined(model: Model) -> Model:
    """The model; what `excise doctor` finds wrong with it is told before the long part."""
    from excise.doctor import doctor

    for problem in doctor(model)["problems"]:
        say(f"{model.name}: {problem}")
    return model


def _own_world(args: argparse.Namespace, facts: Facts) -> dict[str, Any]:
    """Ordinary text and refusals where the facts are those of an embedded world; else the chain helps itself."""
    from excise.facts_io import is_world

    if not is_world(args.facts):
        return {}
    from excise.commands.demo import TEXTS, prose
    from excise.testbed import general_text, refusals

    world, forget = args.facts.partition(":")[2], facts.group("forget").subjects
    texts = general_text(world, TEXTS, seed=args.seed, exclude=forget)
    return {"texts": tuple(texts), "loss_texts": prose(world, args.seed, forget), "refusals": tuple(refusals(world))}
