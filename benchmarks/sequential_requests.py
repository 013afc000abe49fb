"""Requests that come one after the other: how forgetting, what is to stay, and drift go with their number.

    python benchmarks/sequential_requests.py [--quick] [--model dense] [--requests 50] [--out docs/sequential_requests.md]

People ask to be forgotten one by one; whoever asks later is among the people to keep until then. Three ways:
ledger: `rocr(..., ledger=...)`, which keeps the keys of every request and solves all of them jointly;
summed: every person's edit is made alone, on the original model, and the edits are added up;
joint: one solve for everybody who has asked so far, made anew at each point of the curve.
Measured at points of the curve: recall of all who have asked (generative forms), recall of people who never ask, half of
whom no editor is shown, KL to the original model on them, loss on general text. People and seed are ones that nothing
was tuned on; intervals are over people.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edit import rocr
from evals import drift, recall
from excise.arms import Arm
from excise.edits import Edit
from excise.facts import GENERATIVE_FORMS, Facts
from excise.model import Model, load
from excise.resampling import Interval, bootstrap_mean
from excise.scores import Score
from excise.testbed import facts, general_text, world_of

SEED, REQUESTS = 5001, 50
POINTS = (1, 5, 10, 20, 30, 40, 50)
WAYS = ("ledger", "summed", "joint")
LIMIT = 64


class Queue:
    """People of a world who ask to be forgotten, in their order, and all others."""

    def __init__(self, name: str, requests: int, seed: int) -> None:
        people = list(world_of(name).people)
        self.order = random.Random(f"requests {seed}").sample(people, requests)
        self.model: Model = load(f"testbed:{name}")
        self.known = facts(name, forget=self.order, retain=None, neighbours=None, unknown=0, seed=seed)
        texts = general_text(name, 400, seed=seed, exclude=self.order)
        self.texts, self.loss_texts = texts[100:], tuple(texts[:100])
        self.before, self.seed = Arm("before", self.model), seed

    def of(self, people: Sequence[str]) -> Facts:
        """The facts of those who ask."""
        return self.known.group("forget").where(lambda f: f.subject in set(people))

    def staying(self, count: int) -> Facts:
        """What an editor is told to keep once `count` people have asked: later ones too, nobody knows of them yet."""
        later = self.of(self.order[count:])
        return Facts([*self.known.shown.group("retain", "neighbour"), *later])

    def edits(self, way: str, points: Sequence[int]) -> Iterator[tuple[int, Edit, float]]:
        """The edit at every point of the curve, and the CPU seconds from the one before."""
        options: dict[str, Any] = {"texts": self.texts, "seed": self.seed}
        start, made = time.process_time(), Edit(())
        with tempfile.TemporaryDirectory() as folder:
            for count, person in enumerate(self.order, start=1):
                if way == "ledger":
                    book = str(Path(folder) / "ledger.safetensors")
                    made = rocr(self.model, self.of([person]), self.staying(count), ledger=book, **options)
                elif way == "summed":
                    made = made + rocr(self.model, self.of([person]), self.staying(count), **options)
                elif count in points:
                    made = rocr(self.model, self.of(self.order[:count]), self.staying(count), **options)
                if count in points:
                    yield count, made, time.process_time() - start
                    start = time.process_time()

    def measured(self, edit: Edit, count: int) -> dict[str, list[float]]:
        """Figures with intervals and n, of those who have asked and of those who stay."""
        arm = Arm("edited", self.model, edit)
        asked = Facts([*self.of(self.order[:count]), *self.known.group("retain", "neighbour", "general")])
        said = recall(arm, asked, limit=LIMIT, seed=self.seed, words=0)
        checks = {f.id for f in self.known.checks}
        free = [s for s in said if s.form in GENERATIVE_FORMS]
        moved = drift(arm, asked, before=self.before, texts=self.loss_texts, limit=100)
        return {
            "forget": figure([s for s in free if s.group == "forget"]),
            "retain": figure([s for s in free if s.group in ("retain", "neighbour")]),
            "unseen": figure([s for s in free if s.fact in checks]),
            "kl": figure([s for s in moved if s.variant == "kl"], counts=False),
            "loss": figure([s for s in moved if s.variant == "relative change"], counts=False),
        }


def figure(scores: Sequence[Score], counts: bool = True) -> list[float]:
    """Mean, interval over people, and n."""
    mine = [s for s in scores if s.value is not None]
    found: Interval = bootstrap_mean([s.value or 0.0 for s in mine], [s.subject or s.fact for s in mine], counts=counts)
    return [*map(float, found), len(mine)]


def page(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The curves as Markdown."""
    text = ["# Requests one after the other", "", *(__doc__ or "").strip().split("\n")[4:], ""]
    text += ["    python benchmarks/sequential_requests.py --out docs/sequential_requests.md"]
    for model in dict.fromkeys(r["model"] for r in rows):
        text += [
            "",
            f"## {model}",
            "",
            "| way | requests | forget | retain | unseen | KL, nats | loss | CPU s |",
            "|---" * 8 + "|",
        ]
        for r in (r for r in rows if r["model"] == model):
            cells = [f"{r[k][0]:.3f} [{r[k][1]:.3f}, {r[k][2]:.3f}]" for k in ("forget", "retain", "unseen", "kl")]
            text.append(
                f"| {r['way']} | {r['requests']} | {' | '.join(cells)} | {r['loss'][0]:+.2%} | {r['seconds']:.0f} |"
            )
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three requests, by ledger and jointly: under a minute")
    parser.add_argument("--model", nargs="+", default=["dense"], choices=("dense", "moe"))
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    count = 3 if args.quick else args.requests
    points = [p for p in POINTS if p < count] + [count]
    rows: list[dict[str, Any]] = []
    for name in args.model:
        queue = Queue(name, count, args.seed)
        for way in [w for w in WAYS if not (args.quick and w == "summed")]:
            for asked, edit, seconds in queue.edits(way, points):
                rows.append(
                    {"model": name, "way": way, "requests": asked, "seconds": seconds, **queue.measured(edit, asked)}
                )
                r = rows[-1]
                print(f"{name} {way:7}{asked:4} forget {r['forget'][0]:.3f} retain {r['retain'][0]:.3f} unseen {r['unseen'][0]:.3f} "
                      f"KL {r['kl'][0]:.4f} loss {r['loss'][0]:+.2%} {seconds:.0f} CPU s", file=sys.stderr, flush=True)  # fmt: skip
    settings = {"models": args.model, "requests": count, "seed": args.seed, "torch": torch.__version__,
                "python": platform.python_version()}  # fmt: skip
    if args.out:
        args.out.write_text(page(rows, settings), encoding="utf-8")
    bars = [
        {"name": f"{r['model']} {r['way']}, {r['requests']} requests: {k}", "value": r[k][0], "interval": r[k][1:3],
         "aim": aim, "holds": holds(r[k][0])}
        for r in rows if r["way"] == "ledger"
        for k, aim, holds in (("forget", "<= 0.05", lambda v: v <= 0.05), ("retain", ">= 0.99", lambda v: v >= 0.99))
    ]  # fmt: skip
    print(json.dumps({"benchmark": "sequential_requests", "settings": settings, "results": rows, "bars": bars}))


if __name__ == "__main__":
    main()
