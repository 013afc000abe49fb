"""What attribution costs: patching, weight attribution and expert gates, in passes of the plain model.

    python benchmarks/attribution_cost.py [--quick] [--device cuda --dtype bfloat16]

Each method and its unit take turns in one process. Units: a forward pass over the same rows (attribution patching, expert
gates), or a forward and backward pass that gives every parameter its gradient (weight attribution). On the CPU one thread
is used and its CPU time counted, so that other work hardly shows; on a GPU, wall time. Single weights have to be ranked
once, whatever the number of facts: there the cost of 4 times the rows is given too. Memory is the high-water mark above the
loaded model, as a share of one gradient of all scored matrices plus what a pass holds that keeps no gradient; each in a
process of its own that gives freed memory back. Models have random weights and made-up prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import clock as seconds
from benchmarks.overhead import peak
from excise.encoding import Batch, Row, collate
from excise.facts import Prompt
from excise.gradients import answer_losses, flow
from excise.model import DTYPES, Model
from excise.restore import Runs
from localize.expert_attribution import routing
from localize.expert_silencing import expert_blocks, silencing
from localize.node_effects import attributions
from localize.weight_attribution import unit_matrices
from localize.weight_elements import element_scores, select
from localize.weight_sums import Kept, Weighing

LENGTH, START, ROWS = 16, 14, 32
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-small": ("llama", dict(zip(_SIZES, (768, 2048, 12, 12, 32000), strict=True))),
    "moe-small": (
        "qwen3_moe",
        dict(zip(_SIZES, (512, 1408, 8, 8, 16000), strict=True))
        | dict(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=512, head_dim=64, num_key_value_heads=8),
    ),
}
QUICK = {"llama-small": dict(num_hidden_layers=3), "moe-small": dict(num_hidden_layers=2)}
# Freed blocks go back to the system, so that resident memory follows what is in use (glibc).
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
Clock = Callable[[Callable[[], Any]], float]


class _Ready(Model):
    """A model whose prompts are token rows made beforehand: there is no tokenizer to time."""

    rows: Batch

    def batches(self, prompts: Any, **_: Any) -> Any:
        """The one batch there is."""
        yield list(range(len(self.rows))), self.rows


def build(shape: str, args: argparse.Namespace, count: int = ROWS) -> _Ready:
    """A random model of a shape, with `count` prompts of LENGTH tokens."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, size = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(args.device):
        config = CONFIG_MAPPING[kind](**(size | (QUICK[shape] if args.quick else {})))
        hf = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
    model = _Ready(hf, None, shape)
    model.rows = made_up(size["vocab_size"], count).to(args.device)
    return model


def made_up(vocabulary: int, count: int) -> Batch:
    """Prompts of random tokens with answers of two."""
    ids = torch.randint(10, vocabulary, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    return collate([Prompt("", "")] * count, [Row(row.tolist(), START, (1, 4), False) for row in ids], 0)


def turns(clock: Clock, unit: Callable[[], Any], work: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Cost of `work` in units, from neighbouring runs; the median ratio and its 95 % bootstrap interval."""
    unit(), work()
    ratios, seconds = [], []
    for i in range(rounds):
        # Which goes first alternates, so that a drift of the clock speed cancels.
        one, all_ = (clock(unit), clock(work)) if i % 2 else (clock(work), clock(unit))[::-1]
        ratios.append(all_ / one)
        seconds.append(one)
    drawn = np.median(np.random.default_rng(0).choice(ratios, (9999, rounds)), axis=1)
    interval = [float(q) for q in np.percentile(drawn, [2.5, 97.5])]
    return {"value": float(np.median(ratios)), "interval": interval, "unit_seconds": float(np.mean(seconds))}


def forward(model: _Ready) -> None:
    """A plain pass over the rows."""
    with torch.no_grad():
        answer_losses(model, model.rows)


def forward_backward(model: _Ready) -> None:
    """A plain pass over the rows that gives every parameter its gradient."""
    answer_losses(model, model.rows).sum().backward()
    model.hf.zero_grad(set_to_none=True)


def patching(model: _Ready, clock: Clock, rounds: int) -> dict[str, Any]:
    """The first-order map of residual stream, MLP and attention at every layer and position, in forward passes."""
    ids = model.rows.ids[:8]
    noise = 0.1 * torch.randn(8, 4, 3, model.names.d_model, device=ids.device, dtype=model.dtype)
    answer, foil = ids[:, -1], ids[:, -2]
    runs = Runs(ids, ids[:, None].repeat(1, 4, 1), answer, foil, noise, 1)
    rows = runs.corrupt.flatten(0, 1)

    def plain() -> None:
        with torch.no_grad():
            model.hf(input_ids=rows, use_cache=False, logits_to_keep=1)

    return turns(clock, plain, lambda: attributions(model, runs), rounds)


def weights(model: _Ready, clock: Clock, rounds: int, measure: Any, unit: Any) -> dict[str, Any]:
    """One pass of weight attribution over the rows, in forward and backward passes."""
    names = tuple(unit_matrices(model, unit))
    weighing = Weighing(model, measure, unit, names, 1.0, LENGTH * len(model.rows))
    if unit == "element":

        def work() -> None:
            _chosen(weighing, model)

    else:

        def work() -> None:
            found = weighing.sums(model.rows)
            for sums in found.values():
                weighing.score(sums, None)

    return turns(clock, partial(forward_backward, model), work, rounds)


def memory_job(job: str, shape: str, args: argparse.Namespace) -> dict[str, int]:
    """Bytes above the loaded model at the peak, and those of one gradient. Runs in a process of its own."""
    model = build(shape, args)
    names = tuple(unit_matrices(model, "matrix"))
    one = sum(model.weight(n).numel() for n in names) * 4
    # Kernels and names are made on first use; none of that is the job's.
    few = collate([Prompt("", "")], _rows(model.rows, 1), 0).to(model.device)
    Weighing(model, "taylor", "matrix", names[:1], 1.0, LENGTH, Kept()).sums(few)
    if job == "pass":
        return {"above": peak(model, lambda: flow(model, model.rows, names, lambda *_: None)), "gradient": one}
    per: Literal["element", "matrix"] = "element" if job == "element" else "matrix"
    weighing = Weighing(model, "taylor", per, names, 1.0, LENGTH * ROWS, Kept())
    work = partial(_chosen, weighing, model) if job == "element" else partial(weighing.sums, model.rows)
    return {"above": peak(model, work), "gradient": one}


def _chosen(weighing: Weighing, model: _Ready) -> None:
    select(weighing, element_scores(weighing, model.rows.prompts), 1e-4)


def memory(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """The three jobs, each in a process of its own."""
    found = {}
    for job in ("pass", "matrix", "element"):
        words = [
            sys.executable,
            __file__,
            "--job",
            job,
            "--shape",
            shape,
            "--device",
            args.device,
            "--dtype",
            args.dtype,
        ]
        words += ["--quick"] * args.quick
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **RETURNED})
        if done.returncode:
            raise SystemExit(f"memory job {job} failed:\n{done.stderr}")
        found[job] = json.loads(done.stdout.splitlines()[-1])
    allowed = found["pass"]["above"] + found["pass"]["gradient"]
    return {**found, "share": {job: found[job]["above"] / allowed for job in ("matrix", "element")}}


def experts(model: _Ready, clock: Clock, rounds: int) -> dict[str, Any]:
    """Gates of all experts of all blocks in forward passes; and against silencing every expert that a row reaches."""
    counted = torch.ones_like(model.rows.ids, dtype=torch.bool)
    gates = turns(clock, partial(forward, model), lambda: routing(model, model.rows, counted), rounds)
    chosen = routing(model, model.rows, counted).chosen.cpu()
    blocks, few = expert_blocks(model), 4
    cells = [(row, (blocks[b], e)) for row in range(few) for b, e in chosen[row].nonzero().tolist()]
    part = collate(model.rows.prompts[:few], _rows(model.rows, few), 0).to(model.device)
    exact = turns(
        clock,
        lambda: routing(model, part, counted[:few]),
        lambda: silencing(model, part, cells, tokens=4096),
        max(2, rounds // 4),
    )
    naive = len(blocks) * model.names.n_experts / gates["value"]
    found = {"gates": gates, "silencing over gates": exact, "one pass per expert over gates": naive}
    return {**found, "cells silenced": len(cells), "rows silenced": few}


def _rows(batch: Batch, count: int) -> list[Row]:
    return [Row(ids.tolist(), START, (1, 4), False) for ids in batch.ids[:count]]


def bar(name: str, value: float, interval: Sequence[float] | None, aim: str, holds: bool) -> dict[str, Any]:
    """One figure that was asked for."""
    return {"name": name, "value": float(value), "interval": interval, "aim": aim, "holds": bool(holds)}


WEIGHED = (("taylor", "neuron"), ("taylor", "matrix"), ("gradient", "matrix"), ("taylor", "element"))


def measure(shape: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and bars of one shape."""
    model, rounds, bars = build(shape, args), args.rounds, []
    clock = partial(seconds, model)

    def add(what: str, x: dict[str, Any], most: float) -> None:
        bars.append(bar(f"{shape}: {what}", x["value"], x["interval"], f"<= {most:g}", x["value"] <= most))

    found: dict[str, Any] = {"attribution patching": patching(model, clock, rounds)}
    add("attribution patching, whole grid, in forward passes", found["attribution patching"], 4)
    unit_of = "in forward and backward passes"
    for how, unit in WEIGHED:
        x = found[f"weights, {how} per {unit}"] = weights(model, clock, rounds, how, unit)
        add(f"weight attribution, {how} per {unit}, {unit_of}", x, 1.3)
    if not args.quick:
        model.rows = made_up(model.hf.config.vocab_size, 4 * ROWS).to(args.device)
        x = found["weights, taylor per element, 4 x rows"] = weights(model, clock, rounds // 2, "taylor", "element")
        add(f"weight attribution, taylor per element, {4 * ROWS} rows, {unit_of}", x, 1.3)
        model.rows = made_up(model.hf.config.vocab_size, ROWS).to(args.device)
    if model.names.n_experts:
        x = found["experts"] = experts(model, clock, rounds)
        add("expert gate gradient, all cells, in forward passes", x["gates"], 4)
        e = x["silencing over gates"]
        bars.append(bar(f"{shape}: exact silencing / gate gradient", e["value"], e["interval"], "> 1", e["value"] > 1))
    routed = model.names.n_experts > 0
    del model
    if args.quick and routed:
        return found, bars
    found["memory"] = memory(shape, args)
    for job, share in found["memory"]["share"].items():
        name = f"{shape}: memory of weight attribution per {job} / (one gradient + one pass)"
        bars.append(bar(name, share, None, "<= 1", share <= 1))
    return found, bars


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers and rounds: under a minute")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--job", choices=("pass", "matrix", "element"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 8)
    torch.set_num_threads(1)
    if args.job:
        print(json.dumps(memory_job(args.job, args.shape[0], args)))
        return
    measured = {shape: measure(shape, args) for shape in args.shape}
    bars = [b for _, own in measured.values() for b in own]
    for b in bars:
        spread = f" [{b['interval'][0]:.2f}, {b['interval'][1]:.2f}]" if b["interval"] else ""
        print(f"{b['name']}: {b['value']:.2f}{spread} (aim {b['aim']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})")
    settings = {
        "rows": ROWS, "tokens": LENGTH, "rounds": args.rounds, "device": args.device, "dtype": args.dtype,
        "quick": args.quick, "threads": 1, "torch": torch.__version__, "python": platform.python_version(),
        "clock": "CPU seconds" if args.device == "cpu" else "wall seconds",
    }  # fmt: skip
    results = {shape: found for shape, (found, _) in measured.items()}
    print(json.dumps({"benchmark": "attribution_cost", "settings": settings, "results": results, "bars": bars}))


if __name__ == "__main__":
    main()
