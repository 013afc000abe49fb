"""How close the open search for concept vectors comes to the machine's matrix product, and what memory it takes.

    python benchmarks/concept_search.py [--quick] [--device cuda --dtype bfloat16]

Search and peak take turns in one process. The peak is the best rate of several large square products of the same dtype, and
the rate of the search counts 2 * vectors * d * vocabulary operations, whatever else it does (best tokens, tails, both signs).
On the CPU one thread is used and its CPU time counted; on a GPU, wall time. Memory: one process per number of layers; the
figure is the high-water mark above the loaded model. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.overhead import RETURNED, clock, peak
from excise.keys import write_matrices
from excise.model import DTYPES, Model
from localize.concept_search import best_tokens, excess_kurtosis, open_search, projected, unembedding

# model type, d, neurons, heads, vocabulary
SHAPES: dict[str, tuple[str, int, int, int, int]] = {
    "gpt2-small": ("gpt2", 768, 3072, 12, 50257),
    "llama-1b": ("llama", 2048, 8192, 16, 32000),
    "llama-7b": ("llama", 4096, 11008, 32, 32000),
}
SQUARE = 2048
BEST = 50


class _Pieces:
    """A tokenizer as far as this needs one: it writes tokens."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """A word for each id."""
        return [f" word{i}" for i in ids]


def build(shape: str, layers: int, device: str, dtype: str) -> Model:
    """A random model of a shape."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, d, ff, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    size: dict[str, Any] = (
        dict(n_embd=d, n_inner=ff, n_layer=layers, n_head=heads)
        if kind == "gpt2"
        else dict(hidden_size=d, intermediate_size=ff, num_hidden_layers=layers, num_attention_heads=heads)
    )
    with torch.device(device):
        hf = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](vocab_size=vocabulary, **size), dtype=DTYPES[dtype])
    return Model(hf, _Pieces(), shape)


def peak_rate(model: Model, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Best operations per second of square products, over about this long."""
    device = model.device
    n = SQUARE if device.type == "cpu" else 4 * SQUARE
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    once = clock(model, lambda: torch.mm(a, b, out=out))
    times = [clock(model, lambda: torch.mm(a, b, out=out)) for _ in range(max(3, int(seconds / max(once, 1e-6))))]
    return 2 * n**3 / min(times)


def speed(model: Model, rounds: int, rows: int) -> dict[str, Any]:
    """Share of the peak that the search over `rows` vectors of one block reaches, in turns with the peak."""
    name = write_matrices(model, 0)[0]
    vectors, unembed = model.weight(name).detach()[:rows], unembedding(model)
    signs = (1, -1) if model.hf.config.model_type == "llama" else (1,)

    def search() -> None:
        for _, logits in projected(vectors, unembed):
            for sign in signs:
                best_tokens(logits, BEST, sign=sign)
            excess_kurtosis(logits)

    def product() -> None:
        for _ in projected(vectors, unembed):
            pass

    work = 2 * len(vectors) * unembed.shape[1] * len(unembed)
    search()
    shares, alone = [], []
    for _ in range(rounds):
        rate = peak_rate(model, unembed.dtype)
        shares.append(work / clock(model, search) / rate)
        alone.append(work / clock(model, product) / rate)
    drawn = np.median(np.random.default_rng(0).choice(shares, (9999, rounds)), axis=1)
    return {
        "share_of_peak": float(np.median(shares)),
        "interval": [float(q) for q in np.percentile(drawn, [2.5, 97.5])],
        "share_of_peak_without_sorting": float(np.median(alone)),
        "peak_gflops": rate / 1e9,
        "vectors": len(vectors),
        "vocabulary": len(unembed),
        "signs": len(signs),
    }


def memory_job(layers: int, device: str, dtype: str) -> dict[str, int]:
    """Bytes above the loaded model at the peak of a search through all its blocks. Runs in a process of its own."""
    model = build("gpt2-small", layers, device, dtype)
    names = [n for i in range(layers) for n in write_matrices(model, i)]
    # Kernels and names are made on first use; none of that is the search's.
    open_search(model, names[:1], keep=8)
    return {"above": peak(model, partial(open_search, model, names))}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks for few and many layers, and what all logits would take."""
    few, many = (1, 3) if args.quick else (2, 8)
    found = {}
    for layers in (few, many):
        words = [sys.executable, __file__, "--job", str(layers), "--device", args.device, "--dtype", args.dtype]
        # Freed blocks go back to the system, so that the high-water mark follows what is in use.
        done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **RETURNED})
        if done.returncode:
            raise SystemExit(f"memory job {layers} failed:\n{done.stderr}")
        found[layers] = json.loads(done.stdout.splitlines()[-1])["above"]
    _, _, ff, _, vocabulary = SHAPES["gpt2-small"]
    return {
        "above": found,
        "ratio": found[many] / found[few],
        "layers": [few, many],
        "all_logits": many * ff * vocabulary * 4,
    }


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer vectors and rounds: under a minute")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.job:
        print(json.dumps(memory_job(args.job, args.device, args.dtype)))
        return
    rounds = 3 if args.quick else 7
    rows = 1024 if args.device == "cpu" else 8192
    speeds = {}
    for shape in ["gpt2-small", "llama-1b"] if args.quick else list(SHAPES):
        speeds[shape] = speed(build(shape, 1, args.device, args.dtype), rounds, rows)
    used = memory(args)
    bars = [
        {"name": f"{shape}: open search, share of the matmul peak", "value": x["share_of_peak"], "interval": x["interval"],
         "aim": ">= 0.6", "holds": x["share_of_peak"] >= 0.6}
        for shape, x in speeds.items()
    ]  # fmt: skip
    name = f"peak memory above the model, {used['layers'][1]} layers / {used['layers'][0]} layers"
    bars.append(
        {"name": name, "value": used["ratio"], "interval": None, "aim": "<= 1.1", "holds": used["ratio"] <= 1.1}
    )
    for b in bars:
        print(f"{b['name']}: {b['value']:.2f} (aim {b['aim']}, {'holds' if b['holds'] else 'DOES NOT HOLD'})")
    settings = {
        "best_tokens": BEST, "rounds": rounds, "device": args.device, "dtype": args.dtype, "quick": args.quick, "threads": 1,
        "torch": torch.__version__, "python": platform.python_version(),
        "clock": "CPU seconds" if args.device == "cpu" else "wall seconds",
    }  # fmt: skip
    print(
        json.dumps(
            {
                "benchmark": "concept_search",
                "settings": settings,
                "results": {"speed": speeds, "memory": used},
                "bars": bars,
            }
        )
    )


if __name__ == "__main__":
    main()
