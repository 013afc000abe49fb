"""excise report: write report.html of a run folder again, from the files in it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from excise.commands import common
from excise.errors import DamagedFile
from excise.jsonfile import read_object


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise report`."""
    parser.add_argument("folder", help="a run folder of `excise demo`, `excise run` or `excise eval --out`")
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    from excise.edits import Edit
    from excise.facts_io import read_facts
    from excise.feature_cards import FeatureCards
    from excise.measure import read_results
    from excise.report import write_report
    from excise.scores import Localization

    folder = Path(args.folder)
    for name in ("run.json", "facts.jsonl", "results.jsonl"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: no such file; a report needs a finished run, such as `excise demo` or `excise eval --out {folder}`"
            )
    settings = read_object(folder / "run.json")
    samples = settings.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
        raise DamagedFile(f"{folder / 'run.json'}: its samples are not a list of objects; run the command again")
    path = write_report(
        folder,
        facts=read_facts(folder / "facts.jsonl"),
        localization=Localization.load(found) if (found := folder / "localization.safetensors").is_file() else None,
        traced=Localization.load(found) if (found := folder / "map.safetensors").is_file() else None,
        edit=Edit.load(cut) if (cut := folder / "edit.safetensors").is_file() else None,
        results=read_results(folder / "results.jsonl"),
        verification=settings.get("verification"),
        recipe={k: v for k, v in settings.items() if k not in ("samples", "verification")},
        samples=samples,
        search=read_object(tried) if (tried := folder / "search.json").is_file() else None,
        features=FeatureCards.load(folder),
    )
    if args.format == "json":
        common.print_json({"report": str(path)})
    else:
        print(path)
    return 0
