"""The headline table: all arms and all evaluations, on people that nothing was tuned on, with the time each one took.

    python benchmarks/audit_table.py [--quick] [--model dense moe] [--keep FOLDER] [--out docs/audit_table.md]

Arms: the model before, edits at their defaults (ROCR, also in two copies, LUNAR, MEMIT), ROCR's random twin, six trained
rivals with as many seconds each as the slowest edit took (at least 20), a prompt that asks to be silent, a filter of what is said,
and the oracle, taught the same without those people. All forms of a question are pooled and facts of all people weigh
alike; intervals draw people with all their questions anew. Attacks count by a fact's worst case over their variants.
Distance: that of `run_vs_rivals.py`. Seconds were taken beside other work; `audit_cost.py` measures times. With --keep
every finished item is kept there, and a further call goes on from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept import kept_arm
from benchmarks.run_vs_rivals import distances
from excise.arms import Arm
from excise.attacks import ANY, Attack, attacks
from excise.audit import DEFAULT, FAMILIES, chosen
from excise.chain import random_twin
from excise.facts import Facts
from excise.fates import WORDS, fates
from excise.measure import measure
from excise.model import Model, load
from excise.progress import be_quiet
from excise.registry import family, method
from excise.rivals import RIVALS, output_filter, prompt_guard, train_rival
from excise.scores import Results, Row
from excise.statistics import aggregate
from excise.testbed import facts, general_text, refusals
from localize import causal_trace

SEED, PEOPLE, UNKNOWN = 9001, 8, 24
EDITORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rocr": ("rocr", {}), "rocr, 2 copies": ("rocr", {"copies": 2}), "lunar": ("lunar", {}), "memit": ("memit", {}),
}  # fmt: skip
RIVAL_SECONDS = 20.0
# What a curve over layers shows is in the report of an audit; a table of it would be of no use.
OF_LAYERS = re.compile(r"layer \d+|no mlp \d+|block \d+|step \d+")
HEADLINE = (
    ("still answered: people to forget", "recall", "forget", ""),
    ("the easiest wording of each fact", "form_spread", "forget", "easiest form"),
    ("other people", "recall", "retain", ""),
    ("people who share a name word", "recall", "neighbour", ""),
    ("asked backwards", "reversed_question", "forget", ANY),
    ("with the edited layer skipped", "layer_skip", "forget", ANY),
    ("after relearning other facts, low rank", "relearning", "forget", "lora, best"),
    ("after rounding to 8 or 4 bits", "quantisation", "forget", ANY),
    ("a probe reads it at the name", "probe", "forget", "refit, best layer"),
    ("logit lens, top 5 of some layer", "lens", "forget", "hit@5, any layer"),
)


def made_arms(name: str, known: Facts, seed: int, rivals: Sequence[Any], keep: Path | None) -> list[Arm]:
    """Every arm of the table; trained rivals are kept in a folder, because their training ends by the clock."""
    model, oracle = load(f"testbed:{name}"), load(f"testbed:{name}-oracle")
    shown = known.shown
    forget, retain = shown.group("forget"), shown.group("retain", "neighbour")
    arms, slowest = [Arm("before", model)], 0.0
    texts = tuple(general_text(name, 400, seed=seed, exclude=forget.subjects)[100:])
    for label, (editor, options) in EDITORS.items():
        start = time.monotonic()
        arms.append(Arm(label, model, edited(editor, model, forget, retain, texts=texts, seed=seed, **options)))
        slowest = max(slowest, time.monotonic() - start)
    arms.append(Arm("control", model, random_twin(arms[1].edit, seed)))  # type: ignore[arg-type]
    for rival in rivals:
        seconds = max(slowest, RIVAL_SECONDS)
        train = partial(train_rival, rival, model, forget, retain, steps=10_000, seconds=seconds, seed=seed)
        arms.append(kept_arm(keep / f"{name}-{rival}" if keep else None, rival, train))
    return [*arms, prompt_guard(model, forget), output_filter(model, forget), Arm("oracle", oracle)]


def edited(editor: str, model: Model, forget: Facts, retain: Facts, *, seed: int, **options: Any) -> Any:
    """An edit at its defaults but for `options`; where editors of facts need a place, causal tracing gives it."""
    chosen_one = method("editor", editor)
    where = (
        causal_trace(model, Facts({f.subject: f for f in forget}.values()), seed=seed) if editor != "lunar" else None
    )
    known = {o.name for o in chosen_one.options}
    taken = {k: v for k, v in (options | {"seed": seed}).items() if k in known}
    return chosen_one.function(model, forget, retain, where, **taken)


def table_rows(results: Results) -> dict[tuple[str, str, str], dict[str, Row]]:
    """By evaluation, variant and group, the row of every arm; curves over layers and steps left out."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    worst = {(e, s.group) for (_, e), scores in results.scores.items() for s in scores if s.variant == ANY}
    for row in aggregate(results, by=("group", "variant")):
        of_worst = (row.evaluation, row.group) in worst and row.variant != ANY
        if not row.n or of_worst or OF_LAYERS.search(row.variant):
            continue
        found.setdefault((row.evaluation, row.variant, row.group), {})[row.arm] = row
    return found


def drawn(results: Results, arm: str) -> list[Attack]:
    """What each attack draws from an arm beyond the oracle."""
    return attacks(results, {"before": "before", "edited": arm, "oracle": "oracle"})


def outcomes(results: Results, arm: str) -> dict[str, int]:
    """How many facts to forget met which fate in an arm."""
    found = fates(results, {"roles": {"before": "before", "edited": arm, "oracle": "oracle"}})
    return dict(Counter(f.word for f in found if f.group == "forget"))


def cell(row: Row | None) -> str:
    """A value with its interval."""
    return "" if row is None else f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}]"


def page(models: Mapping[str, tuple[Results, dict[str, Any]]], wanted: str) -> str:
    """The tables as Markdown."""
    text = ["# Every arm under every evaluation", "", *(__doc__ or "").strip().split("\n")[4:], ""]
    given = "" if wanted == "all" else f" --with '{wanted}'"
    text += [f"    python benchmarks/audit_table.py{given} --out docs/audit_table.md", ""]
    for name, (results, found) in models.items():
        arms, rows = results.arms, table_rows(results)
        line = "|---" * (len(arms) + 1) + "|"
        header = "| | " + " | ".join(arms) + " |"
        text += [f"## {name}: {found['people']} people, {found['facts']} facts to forget", "", header, line]
        for label, *key in HEADLINE:
            of = rows.get((key[0], key[2], key[1]), {})
            n = max((r.n for r in of.values()), default=0)
            text.append(f"| {label}, n {n} | " + " | ".join(cell(of.get(a)) for a in arms) + " |")
        text.append("| distance to the oracle | " + " | ".join(_distance(found["distances"][a]) for a in arms) + " |")
        text += ["", f"### {name}: what became of the facts to forget", "", header, line]
        for word in WORDS:
            counts = [found["fates"].get(a, {}).get(word, 0) for a in arms]
            if any(counts):
                text.append(f"| {word} | " + " | ".join(str(c) if c else "" for c in counts) + " |")
        text += ["", f"### {name}: attacks that draw more than from the oracle", "", "| arm | attacks |", "|---|---|"]
        text += [
            f"| {a} | {'; '.join(map(str, found['attacks'][a])) or 'none'} |"
            for a in arms
            if a not in ("before", "oracle")
        ]
        for kind in FAMILIES:
            own = {k: of for k, of in rows.items() if family(k[0]) == kind}
            text += ["", f"### {name}: {kind}", "", "| evaluation | of | seconds | " + " | ".join(arms) + " |"]
            text.append("|---" * (len(arms) + 3) + "|")
            seen: set[str] = set()
            for (evaluation, variant, group), of in own.items():
                took = "" if evaluation in seen else f"{found['seconds'].get(evaluation, 0.0):.1f}"
                seen.add(evaluation)
                label = f"{evaluation}: {variant}" if variant else evaluation
                text.append(f"| {label} | {group} | {took} | " + " | ".join(cell(of.get(a)) for a in arms) + " |")
        text.append("")
    return "\n".join(text)


def _distance(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['distance']:.2f} [{low:.2f}, {high:.2f}]"


def measured(name: str, args: argparse.Namespace) -> tuple[Results, dict[str, Any]]:
    """Results of one model and what follows from them."""
    known = facts(name, people=2 if args.quick else PEOPLE, seed=SEED, unknown=UNKNOWN)
    torch.set_num_threads(1)
    arms = made_arms(name, known, SEED, RIVALS[:1] if args.quick else RIVALS, args.keep)
    print(f"{name}: {len(arms)} arms made", file=sys.stderr, flush=True)
    texts = tuple(general_text(name, 100, seed=SEED, exclude=known.group("forget").subjects))
    wanted = chosen(["recall", "form_spread", "probe"] if args.quick else [w for w in args.wanted.split(",") if w])
    kept = args.keep / f"{name}.jsonl" if args.keep else None
    shared = {"seed": SEED, "texts": texts, "refusals": tuple(refusals(name))}
    results = measure(arms, wanted, known, shared=shared, kept=kept)
    tried = [a for a in results.arms if a not in ("before", "oracle")]
    found = {
        "people": len(known.group("forget").subjects),
        "facts": len(known.group("forget")),
        "seconds": results.recipe["seconds"],
        "distances": distances(results, run=tried[0]),
        "fates": {a: outcomes(results, a) for a in tried},
        "attacks": {a: [str(x) for x in drawn(results, a) if x.works] for a in tried},
    }
    return results, found


def plain(results: Results, found: Mapping[str, Any]) -> dict[str, Any]:
    """The headline rows and what follows from all, as plain values."""
    rows = table_rows(results)
    head = {
        label: {a: [r.value, r.low, r.high, r.n] for a, r in rows.get((e, v, g), {}).items()}
        for label, e, g, v in HEADLINE
    }
    return {**found, "headline": head}


def bars(name: str, results: Results, found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ROCR against every other arm, by distance to the oracle, and what it must reach by itself."""
    far, rows = found["distances"], table_rows(results)
    others = [a for a in results.arms if a not in ("before", "rocr", "oracle")]
    made = [
        {"name": f"{name}: rocr is closer to the oracle than {a}", "value": far[a]["distance"] - far["rocr"]["distance"],
         "interval": None, "aim": "> 0", "holds": far[a]["distance"] > far["rocr"]["distance"]}
        for a in others
    ]  # fmt: skip
    for group, aim in (("forget", 0.05), ("retain", -0.01), ("neighbour", -0.03)):
        of = rows[("recall", "", group)]
        # What is to be kept counts by its change: some questions nobody answers, such as those asked backwards.
        value = of["rocr"].value - (0.0 if group == "forget" else of["before"].value)
        holds = value <= aim if group == "forget" else value >= aim
        what = "recall" if group == "forget" else "change of recall"
        made.append({"name": f"{name}: rocr, {what} of {group}, n {of['rocr'].n}", "value": value, "interval": None,
                     "aim": aim, "holds": holds})  # fmt: skip
    return made


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two people, one rival, three evaluations, dense model")
    parser.add_argument("--model", nargs="+", choices=("dense", "moe"))
    parser.add_argument(
        "--with", dest="wanted", default="all", help="families or evaluations; all by default, '' for the default audit"
    )
    parser.add_argument("--keep", type=Path, help="keep what was measured in this folder, and go on from there")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    be_quiet()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    models = {n: measured(n, args) for n in args.model or (("dense",) if args.quick else ("dense", "moe"))}
    if args.out:
        args.out.write_text(page(models, args.wanted), encoding="utf-8")
    checks = [b for n, (results, found) in models.items() for b in bars(n, results, found)]
    for b in checks:
        print(f"{b['name']}: {b['value']:.3f} (aim {b['aim']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})")
    settings = {"people": PEOPLE, "seed": SEED, "default audit": DEFAULT, "torch": torch.__version__,
                "python": platform.python_version()}  # fmt: skip
    results = {n: plain(*pair) for n, pair in models.items()}
    print(json.dumps({"benchmark": "audit_table", "settings": settings, "results": results, "bars": checks}))


if __name__ == "__main__":
    main()
