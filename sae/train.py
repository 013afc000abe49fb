"""Training a dictionary with sae-lens's own trainer on activations that stream from a `Model`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from excise.errors import ExciseError
from excise.files import atomic, write_text
from excise.model import Model
from sae.dictionary import Dictionary
from sae.load import CONFIG, WEIGHTS, from_folder
from sae.reading import Text, fitting, readings

# Texts that are tokenised together, tokens that are mixed, batches that measure the scale of the activations, and bytes
# of activations that are kept for a second round.
TEXTS_AT_ONCE, MIXED, SCALED_ON, KEPT = 512, 32_768, 16, 2**30


def train(
    model: Model,
    hook: str,
    texts: Iterable[Text],
    *,
    features: int | None = None,
    k: float = 16,
    architecture: str = "topk",
    tokens: int = 500_000,
    batch: int = 1024,
    lr: float = 1e-3,
    folder: str | Path | None = None,
    dtype: str = "float32",
    seed: int = 0,
    info: dict[str, Any] | None = None,
    **options: Any,
) -> Dictionary:
    """A dictionary of the activation at `hook`, trained by sae-lens's `SAETrainer`; nothing is sent anywhere.

    texts: what the model reads; a sequence is used over and over, an iterator must be as long as `tokens` asks for. What
        does not fit into its context is read in pieces. BOS and padding are left out.
    features: number of features; eight times the width when left out.
    k: active features per token, for "topk" (exactly) and "batchtopk" (on average; becomes a JumpReLU).
    architecture: a training architecture of sae-lens, "topk", "batchtopk", "jumprelu", "standard", "gated", ...
    tokens: tokens to train on; batch: tokens in a step; lr: learning rate, let down to a tenth in the last fifth.
    folder: where the sae-lens folder is kept (cfg.json, sae_weights.safetensors); dtype: of the tensors in it.
    options: further fields of sae-lens's config of that architecture, such as l1_coefficient.

    Raises ExciseError when the texts give out or a field is unknown, UnknownName for a hook that the model does not have.
    """
    os.environ.setdefault("WANDB_MODE", "disabled")  # sae-lens imports wandb; it must stay silent even when asked
    from sae_lens import LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.mixing_buffer import mixing_buffer

    module = model.names.tap(hook).module
    with torch.random.fork_rng(devices=[]), contextlib.redirect_stderr(_terminal()):
        torch.manual_seed(seed)
        rows = stream(model, hook, texts)
        first = next(rows)
        sae = _untrained(architecture, first.shape[1], features or 8 * first.shape[1], k, options)
        metadata = {
            "model_name": model.name, "hook_name": hook, "hf_module": module, "model_fingerprint": model.fingerprint,
            "prepend_bos": True, "training_tokens": tokens, "seed": seed, **(info or {}),
        }  # fmt: skip
        for key, value in metadata.items():
            sae.cfg.metadata[key] = value
        steps = tokens // batch
        settings = SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch,
            lr=lr, lr_end=lr / 10, lr_decay_steps=steps // 5, lr_warm_up_steps=min(100, steps // 20),
            n_batches_for_norm_estimate=SCALED_ON, dead_feature_window=max(50, min(1000, steps // 8)),
            logger=LoggingConfig(log_to_wandb=False),
        )  # fmt: skip
        mixed = mixing_buffer(max(2 * batch, min(MIXED, tokens // 4)), batch, _chained(first, rows))
        try:
            trained = SAETrainer(settings, sae, mixed).fit()
        except StopIteration:
            raise ExciseError(
                f"the texts gave out before {tokens} tokens were read: give more texts, or fewer tokens"
            ) from None
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(folder) if folder is not None else Path(scratch)
        _save(trained, place, dtype)
        return from_folder(place, name=str(folder or f"{model.name} {hook}"))


def stream(model: Model, hook: str, texts: Iterable[Text]) -> Iterator[Tensor]:
    """Activations [tokens, d] in float32 on the CPU, chunk by chunk, without BOS and padding.

    A sequence of texts is endless: later rounds come shuffled from memory while they fit in it (1 GB), else they are read
    again. An iterator is read once.
    """
    again, kept, size = not isinstance(texts, Iterator), list[Tensor](), 0
    while True:
        source = fitting(model, texts)
        while chunk := list(islice(source, TEXTS_AT_ONCE)):
            found = torch.cat([r.x[r.counts].float().cpu() for r in readings(model, chunk, hook, specials=True)])
            size += found.numel() * 4
            if again and size <= KEPT:
                kept.append(found)
            yield found
        if not again or not size:
            return
        if size <= KEPT:
            yield from _rounds(torch.cat(kept))
        kept, size = [], 0


def _rounds(rows: Tensor) -> Iterator[Tensor]:
    """The rows in ever new orders, without end."""
    while True:
        yield from (rows[i] for i in torch.randperm(len(rows)).split(MIXED))


def _chained(first: Tensor, rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield first
    yield from rest


def _untrained(architecture: str, d: int, features: int, k: float, options: dict[str, Any]) -> Any:
    from sae_lens.registry import get_sae_training_class

    try:
        kind, config = get_sae_training_class(architecture)
        if architecture in ("topk", "batchtopk"):
            options = {"k": int(k) if architecture == "topk" else k, **options}
        scaled = {"normalize_activations": "expected_average_only_in", **options}
        return kind(config(d_in=d, d_sae=features, dtype="float32", device="cpu", **scaled))
    except (KeyError, ValueError, TypeError) as error:
        raise ExciseError(f"sae-lens cannot make a {architecture!r} dictionary of this: {error}") from error


def _save(trained: Any, folder: Path, dtype: str) -> None:
    """Write the inference form; the folder is one that sae-lens reads, whatever the dtype of the stored tensors."""
    from safetensors.torch import load_file, save_file

    from excise.model import DTYPES

    trained.save_inference_model(folder)
    cfg = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    write_text(folder / CONFIG, json.dumps(cfg, indent=1, sort_keys=True) + "\n")
    tensors = {name: t.to(DTYPES[dtype]).contiguous() for name, t in load_file(folder / WEIGHTS).items()}
    with atomic(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)


def _terminal() -> Any:
    """Where the trainer's bar goes: to a terminal, else nowhere."""
    return sys.stderr if sys.stderr.isatty() else io.StringIO()
