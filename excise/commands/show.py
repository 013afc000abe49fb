"""excise show: what is inside an edit, a localization, a ledger of requests or a run folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from excise.commands import common
from excise.jsonfile import read_object


def arguments(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Flags of `excise show`."""
    parser.add_argument("path", help="a .safetensors file of excise's, or a run folder")
    parser.add_argument(
        "--top", type=common.positive, default=10, metavar="N", help="sites of a localization (default 10)"
    )
    common.output_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print one artefact, or each of a run folder."""
    path = Path(args.path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; give a .safetensors file or a run folder")
    found = _folder(path, args.top) if path.is_dir() else _artefact(path, args.top)
    if args.format == "json":
        common.print_json(found)
        return 0
    for part in found["parts"] if path.is_dir() else [found]:
        _print(part)
    return 0


def _folder(path: Path, top: int) -> dict[str, Any]:
    parts = [_artefact(p, top) for p in sorted(path.glob("*.safetensors"))]
    run_file = path / "run.json"
    settings = read_object(run_file) if run_file.is_file() else {}
    if not parts and not settings:
        raise ValueError(f"{path}: not a run folder; it has neither run.json nor a .safetensors file")
    if settings:
        rows = [{"setting": k, "value": json.dumps(v, ensure_ascii=False)} for k, v in settings.items()]
        parts.insert(0, {"path": str(run_file), "kind": "run", "rows": rows, "settings": settings})
    return {"path": str(path), "parts": parts}


def _artefact(path: Path, top: int) -> dict[str, Any]:
    from excise.headers import header_of
    from excise.outline import read_outline
    from excise.tensorfile import TensorFile

    file = TensorFile.open(path)
    header = header_of(file)
    shared = {"path": str(path), "kind": header["kind"], "recipe": header.get("recipe", {})}
    match header["kind"]:
        case "edit":
            edit = read_outline(path)
            return {
                **shared,
                "mode": "weight" if edit.bakeable else "hook",
                "fingerprints": edit.fingerprints,
                "rows": edit.rows(),
            }
        case "localization":
            return {**shared, "facts": len(header["facts"]), "rows": _best(header["sites"], file.read("scores"), top)}
        case "ledger":
            rows = [{k: r[k] for k in ("request", "columns", "protected")} for r in header["requests"]]
            return {**shared, "fingerprints": header["fingerprints"], "rows": rows}
    return {**shared, "rows": [{"entry": k, "value": json.dumps(v)[:100]} for k, v in header.items()]}


def _best(sites: Sequence[str], scores: Any, top: int) -> list[dict[str, Any]]:
    """The sites of highest mean score over the facts that have one, as `Localization.top`."""
    import numpy as np

    present = ~np.isnan(scores)
    count = present.sum(0)
    average = np.divide(np.where(present, scores, 0.0).sum(0), count, out=np.full(len(sites), np.nan), where=count > 0)
    order = np.argsort(-np.nan_to_num(average, nan=-np.inf), kind="stable")[:top]
    return [{"site": sites[i], "score": float(average[i])} for i in order]


def _print(part: dict[str, Any]) -> None:
    print(
        f"{common.printable(part['path'])}: {common.printable(part['kind'])}"
        + (f" ({part['mode']})" if "mode" in part else "")
    )
    for name, value in part.get("recipe", {}).items():
        print(f"  {common.printable(name)}: {common.printable(json.dumps(value, ensure_ascii=False))[:200]}")
    common.print_rows(part["rows"])
