"""Does LUNAR's detector tell, before anything is edited, whether the edit will work?

    python benchmarks/lunar_detector.py [--quick] [--model dense moe] [--rows FILE] [--out docs/lunar_detector.md]

LUNAR is forced to every block and to both tokens (the subject's last, the prompt's last), good or bad. Before each edit the
AUROC of its detector is written down, on wordings and people left out of its fit, with the share of others that it takes
for those to forget. After it: the share of held-out forget questions that are declined, minus the share of other people's
questions that are declined, too. Spearman's rank correlation over places, its 95 % interval from drawing places anew.
People and seeds are ones that nothing was tuned on.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept import add_rows, read_rows
from edit import lunar
from evals import refusal
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import Facts
from excise.model import Model, load
from excise.progress import be_quiet
from excise.scores import Localization
from excise.testbed import facts, general_text, refusals

SEEDS, PEOPLE = (4101, 4102), 8
LIMIT, DRAWS = 48, 2000
Position = Literal["subject_last", "last"]
POSITIONS: tuple[Position, ...] = get_args(Position)


def places(model: Model) -> list[tuple[int, Position]]:
    """Every block at both tokens."""
    return [(block, position) for position in POSITIONS for block in range(model.n_layers)]


def row_of(model: Model, known: Facts, block: int, position: Position, seed: int, name: str) -> dict[str, Any]:
    """One place: what the detector promised and what the edit did."""
    shown = known.shown
    where = Localization.of([f"blocks.{block}.hook_resid_post@{position}"])
    about: dict[str, Any] = {"model": name, "seed": seed, "block": block, "position": position}
    texts = tuple(general_text(name, 200, seed=seed, exclude=known.group("forget").subjects))
    try:
        edit = lunar(
            model, shown.group("forget"), shown.group("retain", "neighbour"), where,
            position=position, least=0.0, texts=texts, seed=seed,
        )  # fmt: skip
    except ExciseError as error:
        return {**about, "declined": str(error)}
    spot = edit.recipe["places"][0]
    said = refusal(Arm("edited", model, edit), known, refusals=tuple(refusals(name)), limit=LIMIT, seed=seed)
    unseen = [s.value for s in said if s.group == "forget" and s.held_out and s.value is not None]
    others = [s.value for s in said if s.group in ("retain", "neighbour") and s.value is not None]
    told, lost = float(np.mean(unseen)), float(np.mean(others))
    return {**about, "auroc": spot["auroc"], "confused": spot["confused"], "forgotten": told, "others": lost,
            "success": told - lost, "n": [len(unseen), len(others)]}  # fmt: skip


def correlation(rows: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    """Spearman's correlation of a promise with success, and its interval."""
    x, y = (np.array([r[k] for r in rows]) for k in (by, "success"))
    rng = np.random.default_rng(0)
    drawn = [_spearman(x[i], y[i]) for i in (rng.integers(0, len(x), len(x)) for _ in range(DRAWS))]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": _spearman(x, y), "interval": [float(low), float(high)], "n": len(x)}


def _spearman(x: np.ndarray, y: np.ndarray) -> float:
    if len(set(x.tolist())) < 2 or len(set(y.tolist())) < 2:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def page(rows: Sequence[dict[str, Any]], found: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    text = [
        "# LUNAR: what its detector promises and what the edit does",
        "",
        *(__doc__ or "").strip().split("\n")[4:],
        "",
    ]
    text += ["    python benchmarks/lunar_detector.py --out docs/lunar_detector.md", ""]
    text += ["| rank correlation with success | of AUROC | of the share of others taken for them |", "|---|---|---|"]
    for name, of in found.items():
        cells = [f"{x['value']:+.2f} [{x['interval'][0]:+.2f}, {x['interval'][1]:+.2f}]" for x in of.values()]
        text.append(f"| {name}, {of['auroc']['n']} places | {' | '.join(cells)} |")
    text += ["", "| model | seed | place | AUROC | others taken for them | declined, to forget | declined, others |"]
    text.append("|---" * 7 + "|")
    for r in rows:
        place = f"{r['model']} | {r['seed']} | block {r['block']}, {r['position']}"
        if "declined" in r:
            text.append(f"| {place} | | | no edit: {r['declined']} | |")
        else:
            text.append(
                f"| {place} | {r['auroc']:.3f} | {r['confused']:.2f} | {r['forgotten']:.2f} | {r['others']:.2f} |"
            )
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one draw of people, every other block, dense model")
    parser.add_argument("--model", nargs="+", choices=("dense", "moe"))
    parser.add_argument("--rows", type=Path, help="keep what was measured there, JSON Lines, and go on from it")
    parser.add_argument("--out", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)
    rows = read_rows(args.rows)
    done = {(r["model"], r["seed"], r["block"], r["position"]) for r in rows}
    for name in args.model or (("dense",) if args.quick else ("dense", "moe")):
        model = load(f"testbed:{name}")
        for seed in SEEDS[:1] if args.quick else SEEDS:
            known = facts(name, people=PEOPLE, seed=seed, retain=32, neighbours=24, unknown=24)
            for block, position in places(model)[:: 2 if args.quick else 1]:
                if (name, seed, block, position) in done:
                    continue
                rows.append(row_of(model, known, block, position, seed, name))
                print(rows[-1], file=sys.stderr, flush=True)
                add_rows(args.rows, rows[-1:])
    made = [r for r in rows if "declined" not in r]
    names = list(dict.fromkeys(r["model"] for r in made))
    found = {
        n: {by: correlation([r for r in made if r["model"] == n], by) for by in ("auroc", "confused")} for n in names
    }
    if args.out:
        args.out.write_text(page(rows, found), encoding="utf-8")
    bars = [{"name": f"{n}: rank correlation of AUROC with success", **of["auroc"], "aim": "> 0",
             "holds": of["auroc"]["interval"][0] > 0} for n, of in found.items()]  # fmt: skip
    for b in bars:
        print(
            f"{b['name']}: {b['value']:+.2f} {b['interval']} (n {b['n']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})"
        )
    settings = {"seeds": SEEDS, "people": PEOPLE, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "lunar_detector", "settings": settings, "results": rows, "bars": bars}))


if __name__ == "__main__":
    main()
