"""excise eval: measure a model, an edit of it, or any two checkpoints, whoever edited them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.commands import common, options, outcome
from excise.progress import say

if TYPE_CHECKING:
    from excise.arms import Arm
    from excise.facts import Facts
    from excise.scores import Results


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise eval`, with those of the evaluations when some are named."""
    parser.add_argument(
        "evaluations", nargs="*", metavar="EVALUATION", help="such as recall drift; all when none is named"
    )
    parser.add_argument(
        "--with",
        dest="families",
        type=_names,
        default=(),
        metavar="A,B",
        help="families (behavioural, elicitation, intrinsic) or evaluations, besides those named; all for every one",
    )
    parser.add_argument(
        "--minutes", type=common.minutes, metavar="M", help="leave out what does not fit into so much time"
    )
    parser.add_argument(
        "--before", "--model", dest="model", required=True, metavar="M", help="the model before the edit"
    )
    parser.add_argument("--after", metavar="M", help="an edited checkpoint")
    parser.add_argument("--edit", metavar="E", help="an edit.safetensors, run on --before")
    parser.add_argument(
        "--control", action="store_true", help="also a random edit of the same kind, rank and norm as --edit"
    )
    parser.add_argument("--oracle", metavar="M", help="a model that never learned the forget facts")
    common.model_flags(parser, name=False)
    common.facts_flags(parser)
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="keep every finished item in DIR/results.jsonl, continue from there, write DIR/report.html",
    )
    parser.add_argument("--force", action="store_true", help="use an edit that was made for another model")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    common.output_flags(parser)
    options.method_flags(parser, options.chosen_methods("evaluation", words))


def _names(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def run(args: argparse.Namespace) -> int:
    """Measure every arm and print the table."""
    facts, bad = common.load_facts(args)
    if args.control and not args.edit:
        raise ValueError("--control needs --edit: the control is a random twin of that edit")
    if args.dry_run:
        print(f"would measure {args.model} on {facts!r}")
        return 0
    from excise.audit import chosen, need_oracle
    from excise.measure import measure

    methods = chosen([*args.evaluations, *args.families])
    if not args.oracle and (missing := need_oracle(methods)):
        say(f"without --oracle these lack their zero point: {', '.join(missing)}")
    arms = _arms(args)
    shared: dict[str, Any] = {"seed": args.seed, **_world_of(args.facts, args.seed, facts.group("forget").subjects)}
    own = {m.name: options.given(args, m) for m in methods}
    folder = common.out_folder(args.out) if args.out else None
    kept = folder / "results.jsonl" if folder else None
    results = measure(arms, methods, facts, shared=shared, own=own, kept=kept, minutes=args.minutes)
    if folder:
        _write(folder, args, facts, results, arms)
    _show(args, facts, results)
    return 3 if bad else 0


def _show(args: argparse.Namespace, facts: Facts, results: Results) -> None:
    from excise.audit import outcome as judged
    from excise.audit import told
    from excise.fragments import text_overview
    from excise.measure import plain_row

    if args.format == "json":
        table, summary = ([plain_row(r) for r in rows] for rows in (results.table(seed=args.seed), results.summary()))
        common.print_json({"facts": facts.counts, "results": table, "summary": summary, **judged(results)})
    else:
        print(text_overview(results, whole=bool(args.evaluations)))
        forms = outcome.by_form(results, args.seed)
        print("\nRecall of the facts to forget, by form" if forms else "")
        common.print_rows(forms)
        print(f"\n{common.printable_lines(told(results))}")
        print(
            "\nEvery row: --format json" + (f", {args.out}/results.jsonl, {args.out}/report.html" if args.out else "")
        )


def _write(folder: Path, args: argparse.Namespace, facts: Facts, results: Results, arms: Sequence[Arm]) -> None:
    """What `excise report` reads, and the report."""
    import json

    from excise.edits import Edit
    from excise.facts_io import write_facts
    from excise.files import write_text
    from excise.record import versions
    from excise.report import write_report

    settings = {
        "command": common.typed(args),
        "model": args.model,
        "facts": facts.counts,
        "evaluations": results.evaluations,
        "seeds": {"run": args.seed},
        "fingerprints": {a.name: a.model.fingerprint for a in arms},
        "versions": versions(),
        "seconds": results.recipe.get("seconds", {}),
        **({"left_out": left_out} if (left_out := results.recipe.get("left_out")) else {}),
    }
    write_facts(folder / "facts.jsonl", facts)
    write_text(folder / "run.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    edit = Edit.load(args.edit) if args.edit else None
    say(f"report: {write_report(folder, facts=facts, edit=edit, results=results, recipe=settings)}")


def _arms(args: argparse.Namespace) -> list[Arm]:
    from excise.arms import Arm
    from excise.checks import check
    from excise.edits import Edit

    edit = Edit.load(args.edit) if args.edit else None
    before = common.load_model(args)
    arms = [Arm("before", before)]
    if edit is not None:
        check(before, edit, force=args.force)
        edit = without_fingerprints(edit) if args.force else edit
        arms.append(Arm("edited", before, edit))
    if args.after:
        arms.append(Arm("after", common.load_model(args, args.after)))
    if edit is not None and args.control:
        from excise.chain import random_twin

        arms.append(Arm("control", before, random_twin(edit, args.seed)))
    if args.oracle:
        arms.append(Arm("oracle", common.load_model(args, args.oracle)))
    return arms


def without_fingerprints(edit: Any) -> Any:
    """The edit as one that fits any model: an arm has no `force`."""
    from dataclasses import replace

    return replace(edit, fingerprints={})


def _world_of(source: str, seed: int, forget: Sequence[str]) -> dict[str, Any]:
    """General texts and refusals where the facts are those of an embedded world; else evaluations help themselves."""
    from excise.facts_io import is_world

    if not is_world(source):
        return {}
    from excise.commands.demo import TEXTS
    from excise.testbed import general_text, refusals

    world = source.partition(":")[2] or 0
    return {"texts": tuple(general_text(world, TEXTS, seed=seed, exclude=forget)), "refusals": tuple(refusals(world))}
