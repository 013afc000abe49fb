"""excise demo: the whole chain on an embedded model, offline."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.commands import common, outcome
from excise.progress import say

if TYPE_CHECKING:
    from excise.model import Model

# General texts for statistics and for the loss: enough for a 1 % change to stand out of the noise.
TEXTS = 300
# Added to the seed for text that nothing else reads.
UNSEEN = 100_000


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise demo`."""
    parser.add_argument(
        "--model",
        default="testbed:dense",
        metavar="M",
        help="testbed:dense, testbed:moe, or a folder from `excise testbed train`",
    )
    common.model_flags(parser, name=False)
    parser.add_argument(
        "--people", type=common.positive, default=8, metavar="N", help="how many people to forget (default 8)"
    )
    parser.add_argument(
        "--forget", nargs="+", metavar="NAME", help="forget these people instead; without oracle where it knows them"
    )
    parser.add_argument(
        "--limit", type=common.positive, metavar="N", help="only N facts of each group: faster, wider intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="which people, and every other random choice (default 0)")
    parser.add_argument("--out", default="excise-demo", metavar="DIR", help="run folder (default excise-demo)")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chain and print what it found."""
    from excise.chain import Inputs
    from excise.chain import run as run_chain
    from excise.testbed import facts, general_text, refusals

    world = args.model.removeprefix("testbed:")
    found = common.limited(facts(world, people=args.people, seed=args.seed, forget=args.forget), args.limit)
    model = common.load_model(args)
    inputs = Inputs(
        model=model,
        facts=found,
        out=common.out_folder(args.out),
        command=common.typed(args),
        seed=args.seed,
        texts=tuple(general_text(world, TEXTS, seed=args.seed, exclude=found.group("forget").subjects)),
        loss_texts=prose(world, args.seed, found.group("forget").subjects),
        refusals=tuple(refusals(world)),
        oracle=_oracle(args, world, found),
    )
    return outcome.show(run_chain(inputs), args.format)


def prose(world: str, seed: int, exclude: Sequence[str]) -> tuple[str, ...]:
    """Texts that the statistics have not seen, without chats: there the model learned only the answers."""
    from excise.testbed import general_text

    texts = general_text(world, 3 * TEXTS, seed=seed + UNSEEN, exclude=exclude)
    return tuple(t for t in texts if "<|user|>" not in t)[:TEXTS]


def _oracle(args: argparse.Namespace, world: str, found: Any) -> Model | None:
    from excise.testbed import oracle_fits, oracle_folder

    if not oracle_fits(world, found):
        say("no oracle arm: the oracle of this world knows some of the people to forget")
        return None
    try:
        folder = oracle_folder(world)
    except FileNotFoundError:
        say(f"no oracle arm: there is no {Path(world).name}-oracle beside the model")
        return None
    return common.load_model(args, f"{args.model}-oracle" if args.model.startswith("testbed:") else str(folder))
