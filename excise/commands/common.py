"""What several commands share: flags, loading a model and facts, printing results."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise.progress import say

if TYPE_CHECKING:
    from excise.facts import Facts
    from excise.facts_io import BadRecord
    from excise.model import Model

DTYPES = ("auto", "float32", "bfloat16", "float16")


def output_flags(parser: argparse.ArgumentParser) -> None:
    """--format."""
    parser.add_argument("--format", choices=("table", "json"), default="table", help="how results are printed")


def model_flags(parser: argparse.ArgumentParser, *, name: bool = True) -> None:
    """--model and how it is loaded."""
    if name:
        parser.add_argument(
            "--model", required=True, metavar="M", help="testbed:dense, testbed:moe, a folder, or a hub id"
        )
    group = parser.add_argument_group("loading")
    group.add_argument("--device", help="cpu, cuda, or auto for a device map")
    group.add_argument("--dtype", choices=DTYPES, help="dtype of the weights; the checkpoint's own by default")
    group.add_argument(
        "--batch-size",
        default="auto",
        type=batch_size,
        metavar="N",
        help="padded tokens in one forward pass, or auto (4096)",
    )
    group.add_argument("--offline", action="store_true", help="never ask the network")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run the checkpoint's own code; needs --revision"
    )
    group.add_argument("--revision", help="commit of a hub model")


def facts_flags(parser: argparse.ArgumentParser, *, name: bool = True) -> None:
    """--facts and how many of them."""
    if name:
        parser.add_argument(
            "--facts", required=True, metavar="F", help="JSON Lines file, or testbed:dense for that world's facts"
        )
    parser.add_argument(
        "--retain", metavar="F", help="a second file whose facts are to be kept, for data sets without groups"
    )
    parser.add_argument(
        "--people", type=positive, metavar="N", help="forget people, where the facts are a testbed's (default 8)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N facts of each group")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it (default 0)")
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave broken records out, list them, and end with exit code 3"
    )


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


positive.__name__ = "number from 1 on"


def finite(text: str) -> float:
    """A finite number, for argparse."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


finite.__name__ = "finite number"


def minutes(text: str) -> float:
    """A time above zero, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def batch_size(text: str) -> int | None:
    """Tokens in one forward pass; None for auto."""
    return None if text == "auto" else positive(text)


batch_size.__name__ = "batch size"


def load_model(args: argparse.Namespace, name: str | None = None) -> Model:
    """The model that the flags describe."""
    from excise.model import load

    wanted = name or args.model
    say(f"loading {wanted}")
    _no_foreign_bars()
    model = load(
        wanted,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        offline=args.offline,
    )
    if args.batch_size:
        model.batch_tokens = args.batch_size
    return model


def _no_foreign_bars() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_facts(args: argparse.Namespace, *need: str) -> tuple[Facts, list[BadRecord]]:
    """The facts that the flags describe, and the records left out; groups in `need` must not be empty."""
    from excise.facts_io import FactsError, is_world, read_facts, require

    options: dict[str, Any] = {"seed": args.seed, "people": args.people or 8} if is_world(args.facts) else {}
    found, bad = read_facts(args.facts, skip_bad=True, **options)
    if args.retain:
        kept, more = read_facts(args.retain, skip_bad=True)
        found, bad = found + regrouped(kept, "retain"), [*bad, *more]
    if bad and not args.skip_bad:
        raise FactsError(str(bad[0]))
    for record in bad:
        print(f"excise: left out {record}", file=sys.stderr)
    require(found, args.facts, *need)
    return limited(found, args.limit), bad


def limited(facts: Facts, limit: int | None) -> Facts:
    """The first `limit` facts of each group; all when there is no limit."""
    from excise.facts import GROUPS, Facts

    return Facts(f for group in GROUPS for f in facts.group(group)[:limit]) if limit else facts


def regrouped(facts: Facts, group: str) -> Facts:
    """The same facts, all in one group."""
    from dataclasses import replace

    from excise.facts import Facts

    return Facts(replace(f, group=group) for f in facts)


def typed(args: argparse.Namespace) -> str:
    """The command as it was typed."""
    return shlex.join(["excise", *args.words])


def print_json(value: Any) -> None:
    """Exactly one JSON object on stdout; what is not a number is null, since JSON knows no NaN."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    if any("\ud800" <= c <= "\udfff" for c in text):  # half a character: no stream takes it as it is
        text = json.dumps(_finite(value), allow_nan=False)
    print(text)


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {k: _finite(v) for k, v in value.items()}
        case list() | tuple():
            return [_finite(v) for v in value]
    return value


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A plain table on stdout; control characters are escaped, so that no file can drive the terminal."""
    if not rows:
        return
    names = list(columns or rows[0])
    cells = [[_cell(row.get(name, "")) for name in names] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(names)]
    for line in [names, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """The text with control characters made visible."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(printable, text.split("\n")))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def out_folder(path: str) -> Path:
    """The folder to write into, made if need be."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: a file, not a folder; give --out a folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
