"""How fast the exact restoration grid and attribution patching are, against ROME's loop and a plain forward pass.

    python benchmarks/trace_speed.py [--quick] [--shape gpt2-small llama-small testbed]
    python benchmarks/trace_speed.py --device cuda --dtype bfloat16 --shape llama-8b

Loop and grid take turns in one process. The loop is ROME's: one cell per forward pass of 1 + 10 rows, all logits. It is
run on a random sample of the grid's cells and extrapolated by their mean; intervals are bootstraps over cells and
rounds. On the CPU one thread is used and its CPU time counted, so that other work hardly shows; on a GPU, wall time.

The floor is the work that no exact method with independent cells can avoid: restoring layer l at token t changes only
blocks above l and tokens from t on. Its time is its FLOPs over the best FLOP rate of plain forward passes of the same
model in the same minute. The strict floor also spares the last block everything but keys and values of all tokens but
the last.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from excise.blocks import HOOKS, capture
from excise.corruption import prepare, runs_of
from excise.grid import restoration_grid
from excise.model import DTYPES, Model, load
from excise.restore import Plan, Runs, noisy_embedding, restored
from localize.node_effects import attributions

_LLAMA = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2-small": ("gpt2", {}),
    "llama-small": ("llama", dict(zip(_LLAMA, (768, 2048, 12, 12, 4, 32000), strict=True))),
    "llama-8b": ("llama", dict(zip(_LLAMA, (4096, 14336, 32, 32, 8, 128256), strict=True))),
}
TOKENS, SUBJECT, DRAWS = 16, (3, 7), 10
EMBEDDED = "testbed"
# How many times faster than the loop, by shape.
AIMS = {EMBEDDED: 5.0}
Clock = Callable[[Callable[[], Any]], tuple[float, Any]]


def build(shape: str, device: str, dtype: str) -> Model:
    """A model of the given shape with random weights, wide enough for the subject to matter at the last token."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if shape == EMBEDDED:
        return load("testbed:dense", device=device, dtype=dtype)
    kind, size = SHAPES[shape]
    size = {**size, "initializer_range": 0.05}
    torch.manual_seed(0)
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**size), dtype=DTYPES[dtype])
    return Model(hf.to(device), None, shape)


@torch.no_grad()
def prompts(model: Model, draws: int = DRAWS) -> Runs:
    """One prompt of random tokens with noise on its subject (draws rows), or with another subject (draws = 0).

    The answer is what the clean run says, the foil the token that gains most when the subject breaks.
    """
    if model.tokenizer is not None:
        return embedded_prompts(model, draws)
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(10, model.hf.config.vocab_size, (1, TOKENS), generator=generator)
    corrupt = clean[:, None].repeat(1, max(1, draws), 1)
    noise = None
    if draws:
        scale = 3 * model.hf.get_input_embeddings().weight.float().std().item()
        noise = scale * torch.randn(1, draws, SUBJECT[1] - SUBJECT[0], model.names.d_model, generator=generator)
        noise = noise.to(model.device, model.dtype)
    else:
        corrupt[:, :, SUBJECT[0] : SUBJECT[1]] = torch.randint(
            10, 1000, (1, 1, SUBJECT[1] - SUBJECT[0]), generator=generator
        )
    anything = torch.zeros(1, dtype=torch.long, device=model.device)
    runs = Runs(clean.to(model.device), corrupt.to(model.device), anything, anything, noise, SUBJECT[0])
    whole = capture(model, runs.clean, ()).logits.float()
    with noisy_embedding(model, runs):
        broken = capture(model, runs.corrupt.flatten(0, 1), ()).logits.float().mean(0, keepdim=True)
    return replace(runs, answer=whole.argmax(-1), foil=(broken - whole).argmax(-1))


def embedded_prompts(model: Model, draws: int) -> Runs:
    """A question about a person of the embedded world, asked as chat: the longest prompt of those that it answers."""
    from excise.testbed import facts

    known = facts("dense", people=4).group("forget")
    made = prepare(model, known, corruption="noise" if draws else "swap", form="question")
    case = max(made.cases, key=lambda c: len(c.ids))
    return runs_of(model, [case], noise_std=made.noise_std, draws=max(1, draws), seed=0)


def clock_for(device: str) -> Clock:
    """A function that runs another one and gives its seconds and its result."""

    def clock(work: Callable[[], Any]) -> tuple[float, Any]:
        if device == "cpu":
            start = time.process_time()
            result = work()
            return time.process_time() - start, result
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        return time.perf_counter() - start, result

    return clock


def ratio(top: Sequence[float], bottom: Sequence[float], scale: float = 1.0) -> tuple[float, list[float]]:
    """scale * mean(top) / mean(bottom) and its 95 % bootstrap interval."""
    a, b, rng = np.asarray(top), np.asarray(bottom), np.random.default_rng(0)
    means = [x[rng.integers(0, len(x), (9999, len(x)))].mean(1) for x in (a, b)]
    return scale * a.mean() / b.mean(), [float(q) for q in np.percentile(scale * means[0] / means[1], [2.5, 97.5])]


def against_loop(model: Model, clock: Clock, rounds: int, cells: int, component: str) -> dict[str, Any]:
    """Grid and loop in turns: seconds, their ratio, and the largest difference on the sampled cells."""
    runs, plan = prompts(model), Plan((component,))
    every = [(layer, t) for layer in range(model.n_layers) for t in range(runs.shape[2])]
    sample = [
        every[i] for i in np.random.default_rng(0).choice(len(every), min(len(every), rounds * cells), replace=False)
    ]
    loop, short, grids, everything, far = [], [], [], [], 0.0
    restored(model, runs, {}, all_logits=True)
    for turn in range(rounds):
        found = {}
        for layer, t in sample[turn * cells : (turn + 1) * cells]:
            where = {f"blocks.{layer}.{HOOKS[component]}": [t]}
            seconds, found[layer, t] = clock(partial(restored, model, runs, where, all_logits=True))
            loop.append(seconds)
            short.append(clock(partial(restored, model, runs, where))[0])
        # The loop's logits give every metric; the grid is timed for what causal_trace asks by default, and for all.
        grids.append(clock(lambda: restoration_grid(model, runs, plan, metrics=("logit_diff",)))[0])
        seconds, grid = clock(lambda: restoration_grid(model, runs, plan))
        everything.append(seconds)
        for (layer, t), values in found.items():
            for metric, value in values.items():
                gap = abs(grid.values[metric][component][0, layer, t] - value[0])
                far = max(far, float(gap / abs(grid.high[metric][0] - grid.low[metric][0])))
    speedup, interval = ratio(loop, grids, len(every))
    last_only, last_interval = ratio(short, grids, len(every))
    with_all, all_interval = ratio(loop, everything, len(every))
    return {
        "component": component,
        "engine": grid.engine,
        "cells": len(every),
        "cells_timed": len(loop),
        "rounds": rounds,
        "loop_seconds_extrapolated": float(np.mean(loop)) * len(every),
        "grid_seconds": float(np.mean(grids)),
        "speedup": speedup,
        "interval": interval,
        "speedup_with_all_metrics": [with_all, *all_interval],
        "speedup_over_loop_with_last_logits_only": [last_only, *last_interval],
        "largest_difference": far,
    }


def block_flops(model: Model, context: float) -> tuple[float, float]:
    """FLOPs of one block on one token that sees `context` tokens, and those of its keys and values alone."""
    block = model.hf.get_submodule(model.names.layer_module(0))
    matrices = sum(p.numel() for p in block.parameters() if p.dim() == 2)
    config, d = model.hf.config, model.names.d_model
    kv = 2 * d * d * (getattr(config, "num_key_value_heads", None) or model.names.n_heads) / model.names.n_heads
    return 2 * matrices + 4 * d * context, 2 * kv


def floors(model: Model, runs: Runs) -> dict[str, float]:
    """FLOPs of the floor and of the strict floor of the resid grid."""
    layers, (_, draws, tokens) = model.n_layers, runs.shape
    both = (draws + 1) * tokens * layers * block_flops(model, (tokens + 1) / 2)[0]
    plain = strict = both
    for t in range(runs.start, tokens):
        n = tokens - t
        whole, keys = block_flops(model, t + (n + 1) / 2)
        blocks = draws * layers * (layers - 1) / 2  # cells x blocks above each of them
        last = draws * (layers - 1)
        plain += blocks * n * whole
        strict += (blocks - last) * n * whole + last * ((n - 1) * keys + whole)
    return {"floor": plain, "strict_floor": strict}


def against_floor(model: Model, clock: Clock, rounds: int) -> dict[str, Any]:
    """Share of the floor reached: time of the floor at the model's best forward FLOP rate over time of the grid."""
    runs = prompts(model)
    rows, tokens = runs.corrupt.flatten(0, 1), runs.shape[2]
    batches = {n: rows[:1].repeat(max(1, n // tokens), 1) for n in (256, 512, 1024, 2048)}
    body = getattr(model.hf, model.hf.base_model_prefix)
    cost = {n: x.numel() * model.n_layers * block_flops(model, (tokens + 1) / 2)[0] for n, x in batches.items()}
    rates: dict[int, list[float]] = {n: [] for n in batches}
    grids = []
    with torch.no_grad():
        for turn in range(rounds + 1):
            for n, x in batches.items():
                seconds = clock(partial(body, input_ids=x, use_cache=False))[0]
                rates[n] += [cost[n] / seconds] if turn else []
            seconds = clock(lambda: restoration_grid(model, runs, Plan(("resid",)), metrics=("logit_diff",)))[0]
            grids += [seconds] if turn else []
    best = max(rates, key=lambda n: np.mean(rates[n]))
    found = {}
    for name, flops in floors(model, runs).items():
        value, interval = ratio([flops / r for r in rates[best]], grids)
        found[name] = {"flops": flops, "share": value, "interval": interval}
    return {"best_batch_tokens": best, "flop_per_second": float(np.mean(rates[best])), "rounds": rounds, **found}


def against_forward(model: Model, clock: Clock, rounds: int, draws: int) -> dict[str, Any]:
    """Attribution patching of the whole grid in units of one plain forward pass over the corrupted rows."""
    runs = prompts(model, draws)
    rows = runs.corrupt.flatten(0, 1)

    def forward() -> Any:
        with torch.no_grad():
            return model.hf(input_ids=rows, use_cache=False, logits_to_keep=1)

    forward(), attributions(model, runs)
    plain, patching = [], []
    for _ in range(rounds):
        plain.append(clock(forward)[0])
        patching.append(clock(lambda: attributions(model, runs))[0])
    value, interval = ratio(patching, plain)
    return {
        "draws": draws,
        "rounds": rounds,
        "forward_seconds": float(np.mean(plain)),
        "forward_equivalents": value,
        "interval": interval,
    }


def measure(shape: str, args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and bars of one shape."""
    model, clock = build(shape, args.device, args.dtype), clock_for(args.device)
    components = ["resid"] if args.quick else ["resid", "mlp"]
    loops = [against_loop(model, clock, args.rounds, args.cells, c) for c in components]
    passes = [against_forward(model, clock, args.passes, draws) for draws in (DRAWS, 0)]
    floor = against_floor(model, clock, max(2, args.rounds))
    aim = AIMS.get(shape, 8.0)
    for x in loops:
        times = f"{x['grid_seconds']:8.2f} s, loop {x['loop_seconds_extrapolated']:8.1f} s"
        low, high = x["interval"]
        gain = f"{x['speedup']:5.1f} x [{low:.1f}, {high:.1f}]"
        gain += f" ({x['speedup_with_all_metrics'][0]:.1f} x with probabilities)"
        print(f"{shape:12} {x['component']:5} grid {times}: {gain}, largest difference {x['largest_difference']:.1e}")
    for x in passes:
        low, high = x["interval"]
        cost = f"{x['forward_equivalents']:.2f} forward passes [{low:.2f}, {high:.2f}]"
        print(f"{shape:12} attribution patching, {x['draws'] or 'no'} draws of noise: {cost}")
    share, strict = floor["floor"]["share"], floor["strict_floor"]["share"]
    rate = f"{floor['flop_per_second'] / 1e9:.0f} GFLOP/s at {floor['best_batch_tokens']} tokens"
    print(f"{shape:12} resid grid: {share:.2f} of the FLOP floor ({strict:.2f} of the strict one); forward {rate}")
    worst = max(passes, key=lambda x: x["forward_equivalents"])
    exact = args.dtype == "float32"
    bars = [
        bar(
            f"{shape}: exact grid over ROME's loop",
            loops[0]["speedup"],
            loops[0]["interval"],
            f">= {aim:g}",
            loops[0]["speedup"] >= aim,
        ),
        bar(
            f"{shape}: share of the FLOP floor",
            floor["floor"]["share"],
            floor["floor"]["interval"],
            ">= 0.7",
            floor["floor"]["share"] >= 0.7,
        ),
        bar(
            f"{shape}: attribution patching in forward passes",
            worst["forward_equivalents"],
            worst["interval"],
            "<= 4",
            worst["forward_equivalents"] <= 4,
        ),
    ]
    far = max(x["largest_difference"] for x in loops)
    # In half precision the loop itself differs from run to run of another batch size: no bar there.
    bars += (
        [bar(f"{shape}: largest difference as a share of high - low", far, None, "<= 1e-5", far <= 1e-5)]
        if exact
        else []
    )
    return {"loops": loops, "attribution_patching": passes, "floor": floor}, bars


def bar(name: str, value: float, interval: list[float] | None, aim: str, holds: bool) -> dict[str, Any]:
    """One figure that was asked for."""
    return {"name": name, "value": float(value), "interval": interval, "aim": aim, "holds": bool(holds)}


def main() -> None:
    """Measure every shape; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, few cells: under a minute")
    parser.add_argument("--shape", nargs="+", choices=[*SHAPES, EMBEDDED])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--rounds", type=int, help="turns of loop and grid")
    parser.add_argument("--cells", type=int, default=6, help="cells of the loop that are timed in each turn")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 4)
    args.passes = 4 if args.quick else 10
    shapes = args.shape or (["gpt2-small"] if args.quick else ["gpt2-small", "llama-small", EMBEDDED])
    torch.set_num_threads(1)
    measured = {shape: measure(shape, args) for shape in shapes}
    settings = {
        "tokens": TOKENS,
        "subject": SUBJECT,
        "draws": DRAWS,
        "device": args.device,
        "dtype": args.dtype,
        "quick": args.quick,
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "clock": "CPU seconds" if args.device == "cpu" else "wall seconds",
    }
    print(
        json.dumps(
            {
                "benchmark": "trace_speed",
                "settings": settings,
                "results": {s: m[0] for s, m in measured.items()},
                "bars": [b for m in measured.values() for b in m[1]],
            }
        )
    )


if __name__ == "__main__":
    main()
