"""excise doctor: what can be reached in a model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from excise.commands import common


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise doctor`."""
    common.model_flags(parser)
    common.output_flags(parser)
    parser.add_argument("--site", nargs="+", default=[], metavar="SITE", help="check that these sites exist")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from excise.doctor import doctor, lines
    from excise.sites import Site

    model = common.load_model(args)
    for text in args.site:
        site = Site.parse(text)
        _ = model.names.weight(site.point) if site.is_weight else model.names.tap(site.point)
    report = doctor(model)
    if args.format == "json":
        common.print_json(report)
    else:
        for topic, text in lines(report):
            print(f"{topic:16} {common.printable(text)}")
    return 0
