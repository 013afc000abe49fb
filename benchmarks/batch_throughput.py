"""Facts per second of `excise localize`, against a loop of single calls, and with one worker against two.

    python benchmarks/batch_throughput.py [--quick] [--people N] [--method causal-trace]

All on the embedded dense model. The loop is what one would write by hand: the method called with one fact after another
(with the same facts to borrow counterparts from), the results appended to a Parquet file each. It and the batch take turns
on the same loaded model, CPU seconds of one thread. Workers are timed as processes from start to end, wall seconds, model
loading included, one thread each; beside other work on the machine that ratio means little, so the load is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from excise.batch import Job, localize
from excise.facts import Facts
from excise.facts_io import write_facts
from excise.model import Model, load
from excise.registry import Method, method
from excise.testbed import facts as world_facts
from excise.testbed import world_of

ROOT = Path(__file__).resolve().parents[1]
# People whom the command is given: starting two workers takes as long as tracing a hundred facts.
MANY = 48


def loop(model: Model, chosen: Method, facts: Facts, out: Path) -> float:
    """CPU seconds of calling the method with each fact by itself and writing its data frame."""
    pool = {"pool": facts} if any(o.name == "pool" for o in chosen.options) else {}
    out.mkdir()
    start = time.process_time()
    for i, fact in enumerate(facts):
        found = chosen.function(model, Facts([fact]), **pool)
        found.to_frame().to_parquet(out / f"{i}.parquet")
    return time.process_time() - start


def together(model: Model, chosen: Method, facts: Facts, out: Path) -> float:
    """CPU seconds of the batch, from nothing to the merged table."""
    start = time.process_time()
    localize(model, [Job(chosen, {}, facts, out)])
    return time.process_time() - start


def workers(name: str, file: Path, out: Path, count: int) -> float:
    """Wall seconds of the command with `count` workers."""
    words = ["localize", name, "--facts", str(file), "--model", "testbed:dense", "--out", str(out), "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    command = [sys.executable, "-m", "excise.cli", *words, "--workers", str(count)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def ratio(top: list[float], bottom: list[float]) -> tuple[float, list[float] | None]:
    """mean(top) / mean(bottom) and its 95 % bootstrap interval over rounds; None for a single round."""
    a, b, rng = np.array(top), np.array(bottom), np.random.default_rng(0)
    if len(a) < 2:
        return float(a.mean() / b.mean()), None
    drawn = rng.integers(0, len(a), (9999, len(a)))
    return float(a.mean() / b.mean()), [
        float(q) for q in np.percentile(a[drawn].mean(1) / b[drawn].mean(1), [2.5, 97.5])
    ]


def bar(name: str, found: tuple[float, list[float] | None], aim: str, holds: bool | None) -> dict[str, Any]:
    """One figure; aim "" and holds None where nothing was promised."""
    return {"name": name, "value": found[0], "interval": found[1], "aim": aim, "holds": holds}


def known(people: int) -> Facts:
    """The facts about so many people of the embedded world."""
    chosen = world_of("dense").retain_people[:people]
    return world_facts("dense", forget=chosen, neighbours=0, retain=0, unknown=0, general=0).group("forget")


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few facts, one round: under a minute")
    parser.add_argument("--people", type=int, help="people of 8 facts each (default 12)")
    parser.add_argument("--method", default="causal-trace")
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    people, rounds = args.people or (3 if args.quick else 12), args.rounds or (1 if args.quick else 4)
    many = people if args.quick else MANY
    torch.set_num_threads(1)
    model, chosen = load("testbed:dense"), method("localizer", args.method)
    facts = known(people)
    singles, batches, one, two = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        together(model, chosen, Facts(list(facts)[:8]), base / "warm")
        for r in range(rounds):
            singles.append(loop(model, chosen, facts, base / f"loop{r}"))
            batches.append(together(model, chosen, facts, base / f"batch{r}"))
        file = write_facts(base / "facts.jsonl", known(many))
        for r in range(1 if args.quick else 2):
            one.append(workers(args.method, file, base / f"one{r}", 1))
            two.append(workers(args.method, file, base / f"two{r}", 2))
    faster, spread = ratio(singles, batches), ratio(one, two)
    rate = {k: len(facts) / float(np.mean(x)) for k, x in {"loop": singles, "batch": batches}.items()}
    rate |= {k: 8 * many / float(np.mean(x)) for k, x in {"one": one, "two": two}.items()}
    print(
        f"{args.method}, {len(facts)} facts: loop {rate['loop']:.1f} facts/s, batch {rate['batch']:.1f} ({faster[0]:.2f} x)"
    )
    print(
        f"command, {8 * many} facts: 1 worker {rate['one']:.1f} facts/s, 2 workers {rate['two']:.1f} ({spread[0]:.2f} x), load {os.getloadavg()[0]:.1f}"
    )
    settings = {"method": args.method, "facts": len(facts), "facts of the command": 8 * many, "rounds": rounds, "quick": args.quick, "cores": os.cpu_count(),
                "load": os.getloadavg()[0], "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    results = {"facts_per_second": rate, "loop": singles, "batch": batches, "one_worker": one, "two_workers": two}
    bars = [
        bar("batch over a loop of single calls", faster, "> 1", faster[0] > 1),
        bar("2 workers over 1, model loading included", spread, "", None),
    ]
    print(json.dumps({"benchmark": "batch_throughput", "settings": settings, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
