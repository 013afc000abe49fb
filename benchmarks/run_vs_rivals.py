"""`excise run` against every single editor at its defaults and every trained rival given the same wall time.

    python benchmarks/run_vs_rivals.py [--quick] [--model dense] [--minutes 10] [--folder F] [--out docs/run_vs_rivals.md]

Ten people of the embedded world that nothing was tuned on are to be forgotten. `run` is the whole command: it localizes,
searches, audits its best few and chooses; the oracle it never sees. Every other arm is then audited on the same questions. A
rival is given as many seconds as `run` took, and ends when its own forget answers are gone, as its authors tune it, or, "all
the time", with the last second; that only where a term of its loss holds what is to be kept. Distance to the oracle:
Euclidean, over recall of the facts to forget in all forms, recall of what is to be kept, what the logit lens and a probe find
inside, and what attacks draw; intervals over people, who are resampled with all their questions, in every arm alike. It is
also what `run` aims at, with what is found by chance in the oracle's place; its search was developed on other people.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept import kept_arm
from excise.arms import Arm
from excise.attacks import ANY, is_attack
from excise.audit import DEFAULT
from excise.chain import Inputs, Run, run
from excise.choosing import FIGURES, audit_distance
from excise.commands.run import TRIALS
from excise.errors import ExciseError
from excise.facts import Facts
from excise.files import write_text
from excise.measure import measure
from excise.model import load
from excise.registry import method, methods
from excise.rivals import RIVALS, output_filter, prompt_guard, train_rival
from excise.scores import Results
from excise.search import SPACES
from excise.testbed import facts, general_text, refusals
from localize import causal_trace

SEED, PEOPLE, RESAMPLES = 8101, 10, 2000
# Rivals with a term for what is to be kept.
HOLDING = ("gradient_difference", "npo", "simnpo", "rmu")
Sums = dict[str, dict[str, tuple[float, int]]]


def sums(results: Results, arm: str) -> Sums:
    """By figure and person: the sum of the scores and their number; every attack is a figure of its own."""
    found: Sums = {}
    for (name, evaluation), scores in results.scores.items():
        if name != arm:
            continue
        attack = is_attack(evaluation)
        worst = any(s.variant == ANY for s in scores)
        for s in scores:
            keys = [k for k, (e, g, v) in FIGURES.items() if e == evaluation and s.group in g and s.variant == v]
            if attack and s.group == "forget" and (s.variant == ANY or not worst):
                keys.append(f"attack {evaluation}")
            for key in keys if s.value is not None else ():
                total, n = found.setdefault(key, {}).get(s.subject or s.fact, (0.0, 0))
                found[key][s.subject or s.fact] = (total + float(s.value or 0.0), n + 1)
    return found


def figures(of: Sums, people: Mapping[str, int] | None = None) -> dict[str, float]:
    """Means of the figures, over people as often as they were drawn; attacks are averaged into one."""
    means = {}
    for key, cells in of.items():
        weights = [(1 if people is None else people.get(p, 0), *cell) for p, cell in cells.items()]
        n = sum(w * count for w, _, count in weights)
        if n:
            means[key] = sum(w * total for w, total, _ in weights) / n
    attacks = [v for k, v in means.items() if k.startswith("attack ")]
    plain = {k: v for k, v in means.items() if not k.startswith("attack ")}
    return plain | ({"attacked": float(np.mean(attacks))} if attacks else {})


def distances(results: Results, run: str = "run", seed: int = 0) -> dict[str, dict[str, Any]]:
    """Distance of every arm to the oracle with its 95 % interval over people, the share of draws in which `run` is closer,
    and the figures that it is made of.
    """
    of = {arm: sums(results, arm) for arm in results.arms}
    people = sorted({p for cells in of["oracle"].values() for p in cells})
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {arm: [] for arm in of}
    for _ in range(RESAMPLES):
        picked, counts = np.unique(rng.integers(0, len(people), len(people)), return_counts=True)
        chosen = {people[i]: int(c) for i, c in zip(picked, counts, strict=True)}
        target = figures(of["oracle"], chosen)
        for arm, cells in of.items():
            drawn[arm].append(audit_distance(figures(cells, chosen), target))
    target = figures(of["oracle"])
    return {
        arm: {"distance": audit_distance(figures(cells), target), **figures(cells),
              "interval": [float(q) for q in np.percentile(drawn[arm], [2.5, 97.5])],
              "closer": float(np.mean(np.array(drawn[run]) < np.array(drawn[arm])))}
        for arm, cells in of.items()
    }  # fmt: skip


def single_edits(inputs: Inputs, texts: Sequence[str]) -> dict[str, Arm]:
    """Every editor of the search at its own defaults."""
    shown, found = inputs.facts.shown, {}
    forget, retain = shown.group("forget"), shown.group("retain", "neighbour")
    where = causal_trace(inputs.model, Facts({f.subject: f for f in forget}.values()), seed=inputs.seed)
    for name in SPACES:
        chosen = method("editor", name)
        given = {"seed": inputs.seed, "texts": tuple(texts)}
        options = {o.name: given[o.name] for o in chosen.options if o.name in given}
        placed = where if name in ("rocr", "rome", "memit", "alphaedit") else None
        try:
            found[name] = Arm(name, inputs.model, chosen.function(inputs.model, forget, retain, placed, **options))
        except ExciseError as error:
            print(f"{name}: {error}", file=sys.stderr)
    return found


def timed_run(inputs: Inputs) -> tuple[Run, float]:
    """The run and its seconds; of one that is only read again, the seconds that it took when it was made."""
    took = inputs.out / "took.json"
    if not took.exists():
        # One that was interrupted has no time of its own.
        shutil.rmtree(inputs.out, ignore_errors=True)
    start = time.monotonic()
    done = run(inputs)
    if not took.exists():
        write_text(took, json.dumps({"seconds": time.monotonic() - start}))
    return done, float(json.loads(took.read_text(encoding="utf-8"))["seconds"])


def page(rows: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    text = ["# One command against its rivals", "", *(__doc__ or "").strip().split("\n")[4:], ""]
    text += [
        f"Model {settings['model']}, {settings['people']} people; `run` took {settings['seconds']:.0f} s and chose",
        "",
    ]
    text += [f"    {settings['chosen']}", "", "    python benchmarks/run_vs_rivals.py --out docs/run_vs_rivals.md", ""]
    names = ["forget", "kept", "lens", "probe", "attacked"]
    text += ["| arm | distance to the oracle | run is closer in | " + " | ".join(names) + " |", "|---" * 8 + "|"]
    for arm, r in sorted(rows.items(), key=lambda item: item[1]["distance"]):
        cells = [f"{r[k]:.3f}" if k in r else "" for k in names]
        text.append(
            f"| {arm} | {r['distance']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}] | {r['closer']:.0%} | {' | '.join(cells)} |"
        )
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three people, six tries, two rivals; ten minutes")
    parser.add_argument("--model", default="dense", choices=("dense", "moe"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument(
        "--folder", type=Path, help="keep the run, trained rivals and measurements there, and go on from them"
    )
    parser.add_argument("--out", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    people, trials, rivals = (3, 6, RIVALS[:2]) if args.quick else (PEOPLE, args.trials, RIVALS)
    known = facts(args.model, people=people, seed=SEED)
    model, oracle = load(f"testbed:{args.model}"), load(f"testbed:{args.model}-oracle")
    texts = tuple(general_text(args.model, 400, seed=SEED, exclude=known.group("forget").subjects))
    with tempfile.TemporaryDirectory() as scratch:
        inputs = Inputs(
            model=model, facts=known, out=(args.folder or Path(scratch)) / "run", seed=SEED, texts=texts[100:],
            loss_texts=texts[:100], refusals=tuple(refusals(args.model)), localizer="scan", evaluations=DEFAULT,
            trials=trials, minutes=args.minutes,
        )  # fmt: skip
        done, seconds = timed_run(inputs)
    chosen = (done.search or {}).get("chosen")
    print(f"run: {seconds:.0f} s, chose {chosen}", file=sys.stderr, flush=True)
    forget, retain = known.shown.group("forget"), known.shown.group("retain", "neighbour")
    arms = [Arm("before", model), Arm("run", model, done.edit), *single_edits(inputs, texts[100:]).values()]
    for name, until_gone in [(r, True) for r in rivals] + [(r, False) for r in rivals if r in HOLDING]:
        label = name if until_gone else f"{name}, all the time"
        train = partial(
            train_rival, name, model, forget, retain, steps=100_000, seconds=seconds, seed=SEED, until_gone=until_gone
        )
        arms.append(kept_arm(args.folder and args.folder / label.replace(", ", "-").replace(" ", "-"), label, train))
        print(label, file=sys.stderr, flush=True)
    arms += [prompt_guard(model, forget), output_filter(model, forget), Arm("oracle", oracle)]
    shared = {"seed": SEED, "texts": texts[:100], "refusals": tuple(refusals(args.model))}
    kept = args.folder and args.folder / "arms.jsonl"
    results = measure(arms, [methods("evaluation")[n] for n in DEFAULT], known, shared=shared, kept=kept)
    rows = distances(results)
    settings = {"model": args.model, "people": people, "trials": trials, "seconds": seconds, "chosen": chosen,
                "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    if args.out:
        args.out.write_text(page(rows, settings), encoding="utf-8")
    for arm, r in sorted(rows.items(), key=lambda item: item[1]["distance"]):
        print(f"{arm:22} {r['distance']:.3f} [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]")
    others = [a for a in rows if a not in ("run", "oracle", "before")]
    bars = [{"name": f"run is closer to the oracle than {a}", "value": rows[a]["distance"] - rows["run"]["distance"],
             "interval": None, "aim": "> 0", "holds": rows[a]["distance"] > rows["run"]["distance"]} for a in others]  # fmt: skip
    bars.append({"name": "seconds of run", "value": seconds, "interval": None, "aim": 600.0, "holds": seconds <= 600})
    print(json.dumps({"benchmark": "run_vs_rivals", "settings": settings, "results": rows, "bars": bars}))


if __name__ == "__main__":
    main()
