"""What computing, solving and writing an edit costs: against the forward passes that read its keys, and a plain load and save.

    python benchmarks/edit_cost.py [--quick]

Figures in CPU time of one thread.
ROCR: the whole call less its statistics (covariances of text and of made-up names), over the forward passes inside that
    call which read keys and target states; once for a given block, once with the choice among four blocks.
LUNAR: the same, on the embedded model, which declines; what it does besides is looking how strongly it must redirect.
Solve: 1,000 concepts at once, one key each, at the width of an 8B model's MLP (14,336 to 4,096), made-up keys and
    covariance; the Cholesky factor of the covariance is part of it. Peak memory is that of a process of its own. Then one
    request more and one less, from a ledger that keeps M^-1 of every key.
Export: loading a checkpoint, baking an edit and writing the edited checkpoint, over loading it and saving it with
    transformers alone; wall time, which is about the disk and other work too, stands beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import bar, build, rank_one, status
from excise.ledger import Ledger, Request
from excise.model import load
from excise.redirection import Redirection
from excise.scores import Localization
from excise.solve import Covariance, solve_edit

AIMS = {"keys": 2.0, "solve": 60.0, "export": 1.5}
# Tokens of the statistics; they are not part of the figure, so a few will do.
BUDGET = 2048
# concepts, d_in, d_out
SIZES = {"full": (1000, 14336, 4096), "quick": (200, 2048, 512)}


class Stopwatch:
    """CPU time spent inside wrapped functions, by name; what a wrapped function calls counts to the outermost one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open = False

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed under `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._open:
                return function(*args, **kwargs)
            self._open, start = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._open = False
                self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start

        return timed


@contextmanager
def watched(watch: Stopwatch, parts: Mapping[str, Sequence[tuple[Any, str]]]) -> Iterator[None]:
    """Inside the block, functions [(where they stand, name)] of each part are timed under the part's name."""
    with ExitStack() as stack:
        for part, functions in parts.items():
            for owner, name in functions:
                plain = getattr(owner, name)
                setattr(owner, name, watch.wrap(part, plain))
                stack.callback(setattr, owner, name, plain)
        yield


def after_statistics(
    work: Callable[[], Any], parts: Mapping[str, Sequence[tuple[Any, str]]], rounds: int
) -> dict[str, Any]:
    """Seconds of some work by part, and the ratio of all but "statistics" to "keys"."""
    ratios = []
    for turn in range(rounds + 1):
        watch = Stopwatch()
        with watched(watch, parts):
            start = time.process_time()
            work()
            total = time.process_time() - start
        if turn:  # the first one warms up
            ratios.append((total - watch.seconds["statistics"]) / watch.seconds["keys"])
    return {"ratio": float(np.median(ratios)), "interval": interval(ratios), "total": total, **watch.seconds}


def rocr_cost(shape: str, rounds: int) -> dict[str, Any]:
    """ROCR at a random model of a shape: a given block, and the choice among four."""
    import edit
    from excise.testbed import facts

    model = build(shape, "cpu", "float32")
    model.batch_tokens = 4096
    known = facts(0, people=8, retain=32, neighbours=8, unknown=8, general=4)
    forget, retain = known.group("forget"), known.group("retain", "neighbour")
    middle = model.n_layers // 3
    given = Localization.of([f"blocks.{middle}.hook_resid_post@subject_last"])
    four = Localization.of([f"blocks.{middle + i}.hook_resid_post@subject_last" for i in range(-1, 3)])
    module: Any = sys.modules["edit.rocr"]
    parts = {"statistics": [(module, "name_aware")], "keys": [(module, "read_keys"), (Redirection, "targets")]}
    places = {"given block": given, "choice of four": four}
    return {
        name: after_statistics(
            partial(edit.rocr, model, forget, retain, where, budget=BUDGET, relatives=4), parts, rounds
        )
        for name, where in places.items()
    }


def lunar_cost(rounds: int) -> dict[str, Any]:
    """LUNAR at the embedded model, which declines: a given place and strength, a given place, and the choice of both."""
    import edit
    from excise import requests
    from excise.testbed import facts, general_text

    model, module = load("testbed:dense"), sys.modules["edit.lunar"]
    known = facts("dense", people=8, seed=4201)
    forget, retain = known.group("forget"), known.group("retain", "neighbour")
    texts = tuple(general_text("dense", 200, seed=4201, exclude=forget.subjects))
    parts = {"statistics": [(requests, "text_moments"), (module, "own_words")], "keys": [(requests, "read_inputs")]}
    here = Localization.of([f"blocks.{model.n_layers // 2}.hook_resid_post@last"])
    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "given place and strength": (here, {"position": "last", "strength": 4.0}),
        "given place": (here, {"position": "last"}),
        "choice of both": (None, {}),
    }
    return {
        name: after_statistics(
            partial(edit.lunar, model, forget, retain, where, texts=texts, least=0.0, **options), parts, rounds
        )
        for name, (where, options) in cases.items()
    }


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    drawn = np.median(np.random.default_rng(0).choice(values, (9999, len(values))), axis=1)
    return [float(q) for q in np.percentile(drawn, [2.5, 97.5])]


def solve_job(size: str) -> dict[str, Any]:
    """Seconds and peak memory of one joint solve; runs in a process of its own."""
    n, d_in, d_out = SIZES[size]
    torch.manual_seed(0)
    # A covariance as a model's is: a falling spectrum on top of a floor; in float32, as statistics are kept.
    spread = torch.randn(d_in, 256) * torch.linspace(3, 0.1, 256)
    second = torch.addmm(torch.diag(torch.rand(d_in) + 0.1), spread, spread.mT)
    keys, residuals = torch.randn(n, d_in) + spread[:, :1].mT, torch.randn(n, d_out)
    metric = Covariance(second)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    start, wall = time.process_time(), time.perf_counter()
    solution = solve_edit({"W": keys}, residuals, {"W": metric}, ridge=0.1)
    seconds, waited = time.process_time() - start, time.perf_counter() - wall
    peak = status("VmHWM")
    # From a ledger, nothing of the covariance's size is touched again.
    whitened = metric.solve(keys)
    book = Ledger(
        {"W": metric},
        requests=tuple(Request(str(i), {"W": keys[i : i + 1]}, residuals[i : i + 1]) for i in range(n)),
        whitened={str(i): {"W": whitened[i : i + 1]} for i in range(n)},
        ridge=0.1,
    )
    start = time.process_time()
    less = book.withdraw("0").solution()
    again = time.process_time() - start
    return {
        "concepts": n, "d_in": d_in, "d_out": d_out, "seconds": seconds, "wall": waited, "peak": peak, "above": peak - before,
        "second moment": second.numel() * 4, "rank": solution.rank, "share min": float(solution.share.min()),
        "withdraw one": again, "columns then": less.rank,
    }  # fmt: skip


def export_cost(shape: str, rounds: int) -> dict[str, Any]:
    """CPU time of load + bake + export over that of load + save."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from excise.checkpoint import export

    waited: dict[str, list[float]] = {"plain": [], "export": []}
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        model = build(shape, "cpu", "float32")
        model.hf.save_pretrained(base)
        model.tokenizer.save_pretrained(base)
        edit, size = rank_one(model, "weight edit"), sum(p.numel() * 4 for p in model.hf.parameters())
        del model

        def plain(out: Path) -> None:
            AutoModelForCausalLM.from_pretrained(base, dtype="auto").save_pretrained(out)
            AutoTokenizer.from_pretrained(base).save_pretrained(out)

        def ours(out: Path) -> None:
            export(load(str(base)), edit, out)

        spent: dict[str, list[float]] = {"plain": [], "export": []}
        # One after the other, not in turns: the first round after a change of kind costs several times the next ones (the
        # kernel's page cache), whichever kind it is that follows transformers' own, and is left out.
        for name, work in (("plain", plain), ("export", ours)):
            for turn in range(rounds + 1):
                gc.collect()
                start, wall = time.process_time(), time.perf_counter()
                work(Path(folder) / f"{name}-{turn}")
                if turn:
                    spent[name].append(time.process_time() - start)
                    waited[name].append(time.perf_counter() - wall)
                shutil.rmtree(Path(folder) / f"{name}-{turn}")
    rng = np.random.default_rng(0)
    drawn = {n: np.median(rng.choice(t, (9999, rounds)), axis=1) for n, t in spent.items()}
    medians = {n: float(np.median(t)) for n, t in spent.items()}
    return {
        "ratio": medians["export"] / medians["plain"],
        "interval": [float(q) for q in np.percentile(drawn["export"] / drawn["plain"], [2.5, 97.5])],
        "rounds": rounds, "bytes": size, "seconds": medians,
        "wall": {name: float(np.median(t)) for name, t in waited.items()},
    }  # fmt: skip


def main() -> None:
    """Run and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--job", choices=("solve",), help=argparse.SUPPRESS)
    args = parser.parse_args()
    size, shape = ("quick", "quick") if args.quick else ("full", "gpt2-small")
    torch.set_num_threads(1)
    if args.job:
        print(json.dumps(solve_job(size)))
        return
    rocr = rocr_cost(shape, args.rounds or (3 if args.quick else 5))
    words = [sys.executable, __file__, "--job", "solve", *(["--quick"] if args.quick else [])]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the solve failed:\n{done.stderr}")
    solve = json.loads(done.stdout.splitlines()[-1])
    written = export_cost(shape, args.rounds or (6 if args.quick else 12))
    lunar = lunar_cost(1 if args.quick else 3)
    bars = [
        bar(f"{editor} after statistics / the forward passes that read its keys, {name}", r["ratio"], r["interval"], AIMS["keys"])
        for editor, found in (("ROCR", rocr), ("LUNAR", lunar)) for name, r in found.items()
    ]  # fmt: skip
    bars += [
        bar(
            f"seconds for {solve['concepts']} concepts in one solve at d_mlp {solve['d_in']}",
            solve["seconds"],
            None,
            AIMS["solve"],
        ),
        bar("load, bake and export / plain load and save", written["ratio"], written["interval"], AIMS["export"]),
    ]
    for b in bars:
        print(f"{b['name']}: {b['value']:.3f} (aim {b['aim']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})")
    print(
        f"peak memory of the solve: {solve['peak'] / 1e9:.2f} GB in all, {solve['above'] / 1e9:.2f} above keys and covariance"
    )
    settings = {
        "shape": shape, "threads": 1, "torch": torch.__version__, "python": platform.python_version(), "quick": args.quick,
    }  # fmt: skip
    results = {"rocr": rocr, "lunar": lunar, "solve": solve, "export": written}
    print(json.dumps({"benchmark": "edit_cost", "settings": settings, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
