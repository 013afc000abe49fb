"""excise localize: where facts are kept, for as many facts as there are; resumable, sharded, to Parquet."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise.commands import common, options
from excise.progress import say


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise localize`, with those of the method when one is named."""
    parser.add_argument(
        "method", nargs="+", metavar="METHOD", help="such as causal-trace; `excise list localizers` names all"
    )
    common.model_flags(parser)
    common.facts_flags(parser)
    parser.add_argument("--group", default="forget", metavar="G", help="which facts: a group, or all (default forget)")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="run folder; the same command again continues where it stopped"
    )
    parser.add_argument(
        "--chunk",
        type=common.positive,
        default=8,
        metavar="N",
        help="facts per saved part, at most 8: what a killed run loses",
    )
    spread = parser.add_mutually_exclusive_group()
    spread.add_argument("--shard", metavar="I/N", help="only the I-th of N parts (from 0), for job arrays")
    spread.add_argument(
        "--workers", type=common.positive, metavar="N", help="N processes, one GPU each where there are some"
    )
    spread.add_argument(
        "--ray", type=common.positive, metavar="N", help="N tasks on a Ray cluster that shares this file system"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    common.output_flags(parser)
    options.method_flags(parser, options.chosen_methods("localizer", words))


def run(args: argparse.Namespace) -> int:
    """Localize, write DIR/localization.parquet, and print the best sites."""
    shard, shards = _shard(args.shard)
    if args.chunk > 8:
        raise ValueError(f"--chunk {args.chunk}: at most 8, so that a killed run loses little")
    facts, bad = common.load_facts(args)
    facts = facts if args.group == "all" else facts.group(args.group)
    if not len(facts):
        raise ValueError(f"{args.facts}: no {args.group} fact; name another --group, or all")
    methods = options.chosen_methods("localizer", ["localize", *args.method])
    if args.dry_run:
        for method in methods:
            print(f"would run {method.name} on {len(facts)} facts with {args.model} into {args.out}")
        return 0
    jobs = [(m, common.out_folder(args.out if len(methods) == 1 else str(Path(args.out) / m.name))) for m in methods]
    if args.workers or args.ray:
        code = _spread(args)
        _print(
            [{"method": m.name, "out": str(out), "workers": args.workers or args.ray, **_best(out)} for m, out in jobs],
            args.format,
        )
        return code
    from excise.batch import Job, localize

    model = common.load_model(args)
    found, failed = [], bool(bad)
    for method, out in jobs:
        done = localize(
            model,
            Job(method, options.given(args, method), facts, out),
            shard=shard,
            shards=shards,
            chunk=args.chunk,
            skip_bad=args.skip_bad,
        )
        for fact, reason in done.failed.items():
            print(f"excise: left out fact {fact}: {reason}", file=sys.stderr)
        counts = {"computed": done.computed, "found": done.found, "skipped": done.skipped, "failed": done.failed}
        found.append(
            {
                "method": method.name,
                "out": str(out),
                **counts,
                **(_best(out) if done.table else {"table": None, "top": []}),
            }
        )
        failed = failed or bool(done.failed)
    _print(found, args.format)
    return 3 if failed else 0


def _shard(text: str | None) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text or "0/1")
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(f"--shard {text}: write I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def _spread(args: argparse.Namespace) -> int:
    from excise.launch import processes, ray_tasks

    count = args.workers or args.ray
    say(f"{count} workers, one shard each")
    return (processes if args.workers else ray_tasks)(_without(args.words, "--workers", "--ray"), count)


def _without(words: Sequence[str], *flags: str) -> list[str]:
    kept, skip = [], False
    for word in words:
        if not skip and word not in flags and not word.startswith(tuple(f"{f}=" for f in flags)):
            kept.append(word)
        skip = word in flags
    return kept


def _best(out: Path) -> dict[str, Any]:
    from excise.batch import TABLE, read_localization

    if not (out / TABLE).is_file():
        return {"table": None, "top": []}
    top = read_localization(out).top(10)
    return {
        "table": str(out / TABLE),
        "top": [{"site": str(s), "score": float(v)} for s, v in zip(top.sites, top.average, strict=True)],
    }


def _print(found: list[dict[str, Any]], form: str) -> None:
    if form == "json":
        common.print_json({"localizations": found})
        return
    for each in found:
        common.print_rows(each["top"])
        table = f"table: {each['table']}" if each["table"] else "other shards are not finished yet"
        if "computed" in each:
            done = f"{each['computed']} facts now, {each['found']} before"
            print(f"{each['method']}: {done}; {len(each['skipped'])} skipped, {len(each['failed'])} failed; {table}")
        else:
            print(f"{each['method']}: {table}")
