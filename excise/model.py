"""Model: one plain transformers model and its tokenizer, under TransformerLens names. It never wraps what it owns."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from excise.encoding import Batch, Row, as_prompt, collate, encode_row, length_groups, render
from excise.errors import DamagedFile
from excise.facts import Prompt

if TYPE_CHECKING:
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from excise.names import Names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Model:
    """The owner of the weights.

    hf: a plain `transformers` causal language model; tokenizer: its fast tokenizer; name: how reports call it.
    """

    # Tokenised prompts that are kept, about 1 kB each.
    most_rows = 100_000
    # Padded tokens in one forward pass: about the most that keeps logits of a 50k vocabulary under 1 GB in float32.
    batch_tokens = 4096

    def __init__(self, hf: Any, tokenizer: Any, name: str = "") -> None:
        self.hf: PreTrainedModel = hf.eval()
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        # Weight changes that run as hooks right now, by matrix; excise.apply keeps the book.
        self.active: dict[str, list[Any]] = {}
        # Fingerprints of the unedited matrices whose slices are swapped right now.
        self.originals: dict[str, str] = {}
        self._hashes: dict[str, tuple[tuple[int, int], str]] = {}
        self._rows: dict[tuple[Any, ...], Row] = {}
        self.name = name or getattr(hf.config, "name_or_path", "") or type(hf).__name__

    @cached_property
    def names(self) -> Names:
        """TransformerLens names of this model: taps, weights, views."""
        from excise.names import Names

        return Names(self.hf)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the embedding."""
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.hf.dtype

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return self.names.n_layers

    @property
    def context(self) -> int | None:
        """Tokens that prompt and answer may have together; None where the model does not say."""
        return getattr(self.hf.config, "max_position_embeddings", None)

    @property
    def bridge(self) -> TransformerBridge:
        """A TransformerBridge over a shell that shares these very parameters; every access makes a new one."""
        from excise.views import bridge_view

        return bridge_view(self.hf, self.tokenizer)

    @property
    def nnsight(self) -> TransformersModel:
        """An nnsight view of the same model; every access makes a new one."""
        from excise.views import nnsight_view

        return nnsight_view(self.hf, self.tokenizer)

    def weight(self, name: str) -> torch.Tensor:
        """Live view [d_in, d_out] of a matrix: writing to it changes the model."""
        return self.names.view(name)

    def encode(self, prompts: Sequence[Prompt | str], *, answers: bool = False) -> Batch:
        """Right-padded token rows on the model's device; with `answers`, each row ends in its answer."""
        wanted = [as_prompt(p) for p in prompts]
        return self._collated(wanted, self.tokenised(wanted, answers=answers))

    def batches(
        self,
        prompts: Sequence[Prompt | str],
        *,
        answers: bool = False,
        tokens: int | None = None,
        rows: Sequence[Row] | None = None,
    ) -> Iterator[tuple[list[int], Batch]]:
        """Batches of similar length, each with the indices of its prompts; `rows` when they are tokenised already."""
        wanted = [as_prompt(p) for p in prompts]
        rows = self.tokenised(wanted, answers=answers) if rows is None else rows
        for index in length_groups([len(r.ids) for r in rows], tokens=tokens or self.batch_tokens):
            yield index, self._collated([wanted[i] for i in index], [rows[i] for i in index])

    def tokenised(self, prompts: Sequence[Prompt], *, answers: bool = False) -> list[Row]:
        """Each prompt tokenised; raises ValueError, naming the fact, for one that does not fit the model's context.

        Rows are kept, because every arm and evaluation asks the same prompts; not beyond a change of the tokenizer.
        """
        tokenizer = self.tokenizer
        state = id(tokenizer), len(tokenizer), tokenizer.chat_template, answers
        if len(self._rows) > self.most_rows:
            self._rows.clear()
        found = []
        for prompt in prompts:
            key = (prompt, *state)
            if key not in self._rows:
                self._rows[key] = self._row(prompt, answers)
            found.append(self._rows[key])
        return found

    def _row(self, prompt: Prompt, answer: bool) -> Row:
        row = encode_row(self.tokenizer, prompt, answer=answer)
        limit, known = self.context, self.hf.get_input_embeddings().weight.shape[0]
        if row.ids and max(row.ids) >= known:
            raise ValueError(
                f"{self.name}: its tokenizer gives token {max(row.ids)}, and the model knows {known} tokens; "
                "they do not belong together"
            )
        if limit and len(row.ids) > limit:
            raise ValueError(
                f"fact {prompt.fact_id or '?'}: {len(row.ids)} tokens do not fit the model's context of {limit}; "
                "shorten the prompt"
            )
        return row

    def _collated(self, prompts: Sequence[Prompt], rows: Sequence[Row]) -> Batch:
        pad = self.tokenizer.pad_token_id
        return collate(prompts, rows, 0 if pad is None else pad).to(self.device)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits [batch, width, vocab] in float32, no gradient, no cache."""
        with torch.no_grad():
            return self.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits.float()

    def generate(self, prompt: Prompt | str, *, max_new_tokens: int = 32, **options: Any) -> str:
        """The continuation of one prompt, greedy unless told otherwise (`do_sample=True`, ...), special tokens left out."""
        return self.generate_all([prompt], max_new_tokens=max_new_tokens, **options)[0]

    def generate_all(self, prompts: Sequence[Prompt | str], *, max_new_tokens: int = 32, **options: Any) -> list[str]:
        """Continuations of many prompts, in order; left-padded batches. They end where the model's context ends."""
        texts: list[str] = [""] * len(prompts)
        for index, batch in self.batches(prompts):
            ids, mask = _left_padded(batch)
            with torch.no_grad():
                settings = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id or 0, **options}
                room = max_new_tokens if self.context is None else min(max_new_tokens, self.context - ids.shape[1])
                if room < 1:
                    continue
                out = self.hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, **settings)
            for i, row in zip(index, out[:, ids.shape[1] :], strict=True):
                texts[i] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return texts

    def render(self, prompt: Prompt | str) -> str:
        """The text that is tokenised for a prompt, chat template included."""
        return render(self.tokenizer, as_prompt(prompt))[0]

    def matrix_fingerprint(self, name: str) -> str:
        """Short hash of one matrix's exact values, the same whether it was loaded in bfloat16 or float32.

        A matrix whose slice an applied edit has swapped answers for its unedited self.
        """
        return self.originals[name] if name in self.originals else self._hashed(name, self.weight(name))

    @property
    def state(self) -> tuple[Any, ...]:
        """What tells the model as it is now, to the bit, from itself under an edit: all values, and all hooks, to each of
        which torch gives a number of its own. Offloaded parameters count as unchanged.
        """
        values = tuple("" if p.is_meta else self._hashed(n, p) for n, p in self.hf.named_parameters())
        hooks = tuple(h for m in self.hf.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks))
        return id(self), values, hooks

    def _hashed(self, name: str, tensor: torch.Tensor) -> str:
        """The tensor's fingerprint, taken anew only after a write."""
        state = (tensor.data_ptr(), tensor._version)  # every in-place write raises the version
        if self._hashes.get(name, ((0, -1), ""))[0] != state:
            self._hashes[name] = (state, tensor_fingerprint(tensor))
        return self._hashes[name][1]

    @property
    def fingerprint(self) -> str:
        """Short hash of architecture, shapes and a sample of every parameter, as they are now."""
        digest = hashlib.sha256(json.dumps([self.hf.config.model_type, self.hf.config.hidden_size]).encode())
        for name, parameter in self.hf.named_parameters():
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            if not parameter.is_meta:
                flat = parameter.detach().reshape(-1)
                step = max(1, flat.numel() // 512)
                digest.update(flat[::step][:512].float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Short hash of the vocabulary and the chat template."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        template = str(getattr(self.tokenizer, "chat_template", ""))
        return hashlib.sha256(json.dumps([vocabulary, template]).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.hf.parameters())
        experts = f", {self.names.n_experts} experts" if self.names.n_experts else ""
        shape = f"{self.hf.config.model_type}, {self.n_layers} layers{experts}, {size / 1e6:.1f} M parameters"
        return f"Model({self.name}: {shape}, {str(self.dtype)[6:]} on {self.device})"


def tensor_fingerprint(tensor: torch.Tensor) -> str:
    """Short hash of a tensor's values in float32, row by row so that memory stays small."""
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    for rows in tensor.detach().split(1024):
        digest.update(rows.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _left_padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    shifts = [batch.ids.shape[1] - n for n in batch.lengths]
    ids = torch.stack([row.roll(s) for row, s in zip(batch.ids, shifts, strict=True)])
    mask = torch.stack([row.roll(s) for row, s in zip(batch.mask, shifts, strict=True)])
    return ids, mask


def load(
    model: Any,
    tokenizer: Any = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    offline: bool = False,
) -> Model:
    """A `Model` from "testbed:dense" (or -oracle, moe, moe-oracle), a folder, a hub id, or a (model, tokenizer) pair.

    dtype: None keeps the checkpoint's own (the embedded models are computed in float32).
    device: "cpu", "cuda", "auto" for a device map; None leaves the default.
    trust_remote_code: run the checkpoint's own code; only together with a `revision`.
    Raises FileNotFoundError when there is no such model, DamagedFile when it cannot be loaded or lacks parameters,
    ValueError for a wrong combination.
    """
    if not isinstance(model, (str, Path)):
        if isinstance(model, Model):
            return model
        if tokenizer is None:
            raise ValueError("load(model) needs its tokenizer: load(model, tokenizer)")
        return Model(model, tokenizer)
    if trust_remote_code and not revision:
        raise ValueError(
            "trust_remote_code runs code from the checkpoint: name the revision you have read, revision='<commit>'"
        )
    name, folder = str(model), str(model)
    if name.startswith("testbed:"):
        from excise.testbed import model_folder

        folder, dtype = str(model_folder(name.removeprefix("testbed:"))), dtype or "float32"
    return _from_pretrained(name, folder, dtype, device, revision, trust_remote_code, offline)


def _from_pretrained(
    name: str, folder: str, dtype: Any, device: str | None, revision: str | None, remote_code: bool, offline: bool
) -> Model:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if isinstance(dtype, str) and dtype not in {*DTYPES, "auto"}:
        raise ValueError(f"no dtype {dtype!r}; dtypes are {', '.join(DTYPES)}")
    _check_device(device)
    # False and not left out: left out, transformers would ask the terminal, and a "y" would run the checkpoint's code.
    shared: dict[str, Any] = {"trust_remote_code": remote_code}
    shared |= {k: v for k, v in {"revision": revision, "local_files_only": offline}.items() if v}
    placing = {"device_map": "auto"} if device == "auto" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        hf, told = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES.get(dtype, dtype) or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **placing,
            **shared,
        )
    except Exception as error:  # a broken file can make any part of these libraries fail, in any way
        raise _not_loaded(name, folder, error) from error
    if told["mismatched_keys"]:
        parameter, stored, wanted = min(told["mismatched_keys"])
        raise DamagedFile(
            f"{name}: its checkpoint holds {parameter} as {list(stored)}, and its config.json asks for {list(wanted)}; "
            "copy it again or mend the config"
        )
    if told["missing_keys"]:
        raise DamagedFile(
            f"{name}: its checkpoint lacks {len(told['missing_keys'])} parameters that its config.json asks for "
            f"({min(told['missing_keys'])}, ...); they would be random numbers, so copy it again or mend the config"
        )
    loaded = Model(hf if device in (None, "auto") else hf.to(device), tokenizer, name)
    _refuse_nan(loaded)
    return loaded


def _not_loaded(name: str, folder: str, error: Exception) -> Exception:
    """What to say of a model that could not be loaded: not there, damaged, or too large for this machine."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return error
    # The first sentence: what follows is advice for other callers than ours.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[: 1 + lines[0].endswith(":")])
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    if (Path(folder) / "config.json").is_file():
        return DamagedFile(f"{name}: not a causal language model that transformers can load ({reason})")
    return FileNotFoundError(
        f"no model at {name!r}: give testbed:dense, testbed:moe, a folder with config.json, or a hub id ({reason})"
    )


def _check_device(device: str | None) -> None:
    if device in (None, "auto"):
        return
    try:
        usable = torch.zeros((), device=device).device.type != "meta"
    except (RuntimeError, AssertionError, NotImplementedError):
        usable = False
    if not usable:
        raise ValueError(f"no device {device!r} on this machine; use cpu, auto, or cuda and mps where there are some")


def _refuse_nan(model: Model) -> None:
    for name, parameter in model.hf.named_parameters():
        if not parameter.is_meta and not torch.isfinite(parameter.detach().float().sum()):
            raise ValueError(f"{model.name}: parameter {name} holds NaN or infinity; the checkpoint is damaged")
