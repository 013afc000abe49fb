"""Train one testbed model from nothing and write it as a plain `transformers` folder.

The folder also holds `world.json`: seed, generator version, tokenizer fingerprint and the recipe. What the model can
do is measured afterwards by `excise.testbed.quality`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from excise.testbed.architectures import CAPACITY, SIZES, build_model, fast_experts
from excise.testbed.optimiser import Optimiser, learning_rate_at
from excise.testbed.packing import Batch, attention_bias, batches, packed_rows
from excise.testbed.sampler import Sampler
from excise.testbed.tokenizer import build_tokenizer, padded_vocabulary, tokenizer_hash
from excise.testbed.world import GENERATOR_VERSION, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Log = Callable[[str], object]
STEPS = {"dense": 1250, "moe": 800}
QUICK_STEPS = 500
REPORT_EVERY = 50


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the world and the architecture.

    bottleneck_share: share of rows under the entity bottleneck mask.
    balance_weight: weight of the experts' load-balance term.
    """

    steps: int
    rows: int = 32
    length: int = 128
    learning_rate: float = 3e-3
    warmup: int = 50
    decay_share: float = 0.8
    bottleneck_share: float = 0.5
    balance_weight: float = 0.003
    capacity: float = CAPACITY


@dataclass
class Progress:
    """What a run has used so far."""

    tokens: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    loss: float = float("nan")


def train(
    arch: str,
    out: Path | str,
    *,
    seed: int = 0,
    oracle: bool = False,
    steps: int | None = None,
    quick: bool = False,
    threads: int = 1,
    compiled: bool = False,
    size: dict[str, int] | None = None,
    log: Log = print,
) -> Path:
    """Train a "dense" or "moe" model on world `seed` and write it to `out`.

    oracle: leave the world's forget people out of every document.
    quick: the short preset; `steps` overrides both presets.
    compiled: use `torch.compile`; a third faster after a minute or two, needs a C++ compiler.
    size: entries of `architectures.SIZES[arch]` to replace.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder: choose another one or remove it")
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    world = World(seed)
    tokenizer = build_tokenizer(world)
    model = build_model(arch, padded_vocabulary(tokenizer), **(size or {}))
    recipe = Recipe(steps or (QUICK_STEPS if quick else STEPS[arch]))
    log(f"{arch}{' oracle' if oracle else ''}: {model.num_parameters():,} parameters, {recipe.steps} steps")
    people = world.retain_people if oracle else world.people
    progress = run(model, _batches(world, tokenizer, people, recipe), recipe, log, compiled=compiled)
    description = describe(world, tokenizer, arch, recipe, progress, oracle=oracle, size=SIZES[arch] | (size or {}))
    write(model, tokenizer, description, out)
    log(f"wrote {out}")
    return out


def _batches(
    world: World, tokenizer: PreTrainedTokenizerFast, people: tuple[str, ...], recipe: Recipe
) -> Iterator[Batch]:
    documents = Sampler(world, seed=0, people=people)
    return batches(packed_rows(documents, tokenizer, world.entity_pattern, recipe.length), recipe.rows)


def run(
    model: PreTrainedModel, stream: Iterator[Batch], recipe: Recipe, log: Log, *, compiled: bool = False
) -> Progress:
    """The training loop."""
    optimiser, progress = Optimiser(model), Progress()
    body = torch.compile(model.model, dynamic=False) if compiled else model.model
    wall, cpu, recent = time.perf_counter(), time.process_time(), []
    model.train()
    with fast_experts(model, recipe.capacity) as balance:
        for step in range(recipe.steps):
            batch = next(stream)
            loss = batch_loss(body, model.lm_head.weight, batch, recipe.bottleneck_share)
            (loss + recipe.balance_weight * balance.take()).backward()
            rate = learning_rate_at(step, recipe.steps, recipe.learning_rate, recipe.warmup, recipe.decay_share)
            optimiser.step(rate)
            recent.append(loss.item())
            progress.tokens += batch.tokens
            if (step + 1) % REPORT_EVERY == 0 or step + 1 == recipe.steps:
                progress.wall_seconds, progress.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
                progress.loss, recent = sum(recent) / len(recent), []
                log(_progress_line(step + 1, recipe, progress))
    model.eval()
    return progress


def batch_loss(
    body: Callable[..., Any], unembedding: torch.Tensor, batch: Batch, bottleneck_share: float
) -> torch.Tensor:
    """Mean cross-entropy over the tokens that carry loss; logits are computed for those only."""
    ids, carries_loss = torch.from_numpy(batch.ids), torch.from_numpy(batch.loss)[:, 1:]
    bias = attention_bias(batch, torch.rand(len(ids)) < bottleneck_share)
    hidden = body(input_ids=ids, attention_mask=bias, use_cache=False).last_hidden_state
    logits = F.linear(hidden[:, :-1][carries_loss], unembedding)
    return F.cross_entropy(logits, ids[:, 1:][carries_loss])


def _progress_line(step: int, recipe: Recipe, progress: Progress) -> str:
    left = progress.wall_seconds / step * (recipe.steps - step)
    return (
        f"step {step}/{recipe.steps}  loss {progress.loss:.4f}  tokens {progress.tokens:,}  "
        f"wall {progress.wall_seconds:.0f} s  cpu {progress.cpu_seconds:.0f} s  left {left:.0f} s"
    )


def describe(
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    arch: str,
    recipe: Recipe,
    progress: Progress,
    *,
    oracle: bool,
    size: dict[str, int],
) -> dict[str, object]:
    """The content of `world.json`."""
    import tokenizers
    import transformers

    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    return {
        "seed": world.seed,
        "generator_version": GENERATOR_VERSION,
        "tokenizer": tokenizer_hash(tokenizer),
        "oracle": oracle,
        "forget_people": list(world.forget_people),
        "architecture": arch,
        "size": size,
        "recipe": asdict(recipe),
        "progress": {key: round(value, 4) for key, value in asdict(progress).items()},
        "versions": versions | {"python": platform.python_version()},
    }


def write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, description: dict[str, object], out: Path
) -> None:
    """Save in bfloat16; the folder appears under its name only when it is complete."""
    with _whole_folder(out) as folder:
        import copy

        stored = copy.deepcopy(model).to(torch.bfloat16)
        stored.config.use_cache = True
        stored.generation_config.do_sample = False
        stored.save_pretrained(folder)
        tokenizer.save_pretrained(folder, save_jinja_files=False)
        (folder / "world.json").write_text(json.dumps(description, indent=1) + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out` that is renamed to it on success and removed on failure."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        if out.exists():
            out.rmdir()
        scratch.replace(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
