"""excise testbed: train the embedded models again, on this or another world, and show what they were measured to do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from excise.commands import common
from excise.progress import say


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise testbed train` and `excise testbed quality`."""
    actions = parser.add_subparsers(dest="action", metavar="train | quality", required=True)
    train = actions.add_parser(
        "train", help="train one model from nothing", description="Train one model from nothing."
    )
    train.add_argument("arch", choices=("dense", "moe"), help="Llama, or Qwen3-MoE with fused experts")
    train.add_argument(
        "--out", required=True, metavar="DIR", help="folder of the model; its oracle belongs in DIR-oracle"
    )
    train.add_argument("--seed", type=int, default=0, help="the world: names, places, facts (default 0)")
    train.add_argument("--oracle", action="store_true", help="leave the forget people out of the training text")
    train.add_argument("--steps", type=common.positive, metavar="N", help="training steps; the recipe's own by default")
    train.add_argument("--quick", action="store_true", help="a shorter run: all facts, weaker skills")
    train.add_argument("--threads", type=common.positive, default=1, metavar="N", help="CPU threads (default 1)")
    quality = actions.add_parser("quality", help="measure a model", description="Measure what a testbed model can do.")
    quality.add_argument("model", help="testbed:dense, testbed:moe, or a folder that `testbed train` wrote")
    quality.add_argument(
        "--measure", action="store_true", help="measure now instead of reading what is stored beside it"
    )
    common.output_flags(quality)


def run(args: argparse.Namespace) -> int:
    """Train, or print the quality."""
    return _train(args) if args.action == "train" else _quality(args)


def _train(args: argparse.Namespace) -> int:
    from excise.testbed.train import train

    folder = train(
        args.arch,
        args.out,
        seed=args.seed,
        oracle=args.oracle,
        steps=args.steps,
        quick=args.quick,
        threads=args.threads,
        log=say,
    )
    print(folder)
    return 0


def _quality(args: argparse.Namespace) -> int:
    from excise.testbed import model_folder
    from excise.testbed.quality import measure, summary

    folder = model_folder(args.model.removeprefix("testbed:"))
    stored = folder / "measured.json"
    if not args.measure and not stored.is_file():
        raise FileNotFoundError(f"{stored}: not measured yet; add --measure")
    found: dict[str, Any] = measure(folder) if args.measure else json.loads(stored.read_text(encoding="utf-8"))
    if args.format == "json":
        common.print_json(found)
    else:
        print(summary(found))
    missed = [b["name"] for b in found["bars"] if not b["holds"]]
    if missed:
        say(f"excise: {folder}: bars missed: {', '.join(missed)}")
    return 1 if missed else 0
