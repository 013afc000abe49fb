"""Prompts to token rows: chat template, subject span, answer tokens, padding. The only place that does token arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from excise.facts import Prompt
from excise.sites import Site, position_mask


@dataclass(frozen=True)
class Batch:
    """Right-padded token rows.

    ids, mask: [batch, width]; mask is 1 on real tokens.
    lengths: real tokens of each row. starts: where the answer begins (equal to the length when there is none).
    subjects: token span [start, end) of the subject, or None. has_bos: whether row 0 of the tokens is BOS.
    """

    prompts: tuple[Prompt, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    subjects: tuple[tuple[int, int] | None, ...]
    has_bos: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    def where(self, rule: str | int | None) -> torch.Tensor:
        """Boolean mask [batch, width] of the tokens a position rule picks; rules speak of the prompt, not of the answer."""
        return position_mask(rule, self.starts, self.subjects, self.ids.shape[1], self.has_bos)

    def of(self, site: Site) -> torch.Tensor:
        """Boolean mask of the tokens that a site reads."""
        return self.where(site.position)

    def answer(self, row: int) -> torch.Tensor:
        """Answer token ids of one row, [n_answer_tokens]."""
        return self.ids[row, self.starts[row] : self.lengths[row]]

    def answer_logits(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        """The logits [n_answer_tokens, vocab] that predict the answer of one row, out of [batch, width, vocab].

        One row at a time: a log-softmax over the whole batch would hold a second copy of the largest tensor there is.
        """
        return logits[row, self.starts[row] - 1 : self.lengths[row] - 1]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(self, ids=self.ids.to(device), mask=self.mask.to(device))


def as_prompt(prompt: Prompt | str) -> Prompt:
    """A plain prompt for a bare string."""
    return Prompt(prompt, "") if isinstance(prompt, str) else prompt


def render(tokenizer: Any, prompt: Prompt) -> tuple[str, int, bool]:
    """The text that is tokenised, the offset of `prompt.text` in it, and whether the template supplied special tokens."""
    if not prompt.chat or not getattr(tokenizer, "chat_template", None):
        return prompt.text, 0, False
    turn = [{"role": "user", "content": prompt.text}]
    try:
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template does; it runs in a sandbox that forbids what is unsafe
        raise ValueError(
            f"the tokenizer's chat template cannot be rendered ({type(error).__name__}: {error}); mend or remove it"
        ) from error
    # Templates often strip the user's text.
    offset = text.find(prompt.text.strip()) - (len(prompt.text) - len(prompt.text.lstrip()))
    return text, offset, True


def _tokenise(tokenizer: Any, text: str, templated: bool) -> tuple[list[int], list[tuple[int, int]]]:
    coded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    return coded["input_ids"], coded["offset_mapping"]


@dataclass(frozen=True)
class Row:
    """One tokenised prompt: ids with the answer appended, where the answer starts, the subject's token span."""

    ids: list[int]
    start: int
    subject: tuple[int, int] | None
    has_bos: bool


def encode_row(tokenizer: Any, prompt: Prompt, *, answer: bool) -> Row:
    """Tokenise one prompt, with its answer when asked.

    Answer tokens are those after the longest common prefix of prompt and prompt + answer: tokenising the answer alone
    would go wrong wherever the tokenizer merges across the boundary.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} gives no character offsets: a fast tokenizer is needed to find the subject's tokens"
        )
    if not prompt.text.isascii() and any("\ud800" <= c <= "\udfff" for c in prompt.text):
        raise ValueError(f"the prompt {prompt.text[:40]!r} holds half a character; write it as UTF-8")
    text, offset, templated = render(tokenizer, prompt)
    ids, spans = _tokenise(tokenizer, text, templated)
    end = getattr(tokenizer, "eos_token_id", None)
    if ids and ids[-1] == end and not templated and not text.endswith(tokenizer.eos_token):
        ids, spans = ids[:-1], spans[:-1]  # some tokenizers close every text; the answer must come first
    subject = None
    if prompt.span is not None:
        first, last = (offset + c for c in prompt.span)
        inside = [i for i, (a, b) in enumerate(spans) if b > a and b > first and a < last]
        if not inside:
            raise ValueError(
                f"fact {prompt.fact_id or '?'}: subject {prompt.subject!r} got no token of its own in {prompt.text!r}"
            )
        subject = (inside[0], inside[-1] + 1)
    bos = bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    if not answer:
        return Row(ids, len(ids), subject, bos)
    gap = "" if templated or not text or text[-1].isspace() else " "
    full, _ = _tokenise(tokenizer, text + gap + prompt.answer, templated)
    if (
        full
        and full[-1] == end
        and full[: len(ids)] == ids
        and len(full) > len(ids) + 1
        and not prompt.answer.endswith(str(tokenizer.eos_token))
    ):
        full = full[:-1]
    start = next((i for i, (a, b) in enumerate(zip(ids, full, strict=False)) if a != b), min(len(ids), len(full)))
    if start >= len(full):
        raise ValueError(f"fact {prompt.fact_id or '?'}: the answer {prompt.answer!r} adds no token to {prompt.text!r}")
    return Row(full, start, subject, bos)


def collate(prompts: Sequence[Prompt], rows: Sequence[Row], pad: int) -> Batch:
    """Right-pad rows into one batch."""
    width = max(len(r.ids) for r in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
    return Batch(
        tuple(prompts),
        ids,
        mask,
        tuple(len(r.ids) for r in rows),
        tuple(r.start for r in rows),
        tuple(r.subject for r in rows),
        tuple(r.has_bos for r in rows),
    )


def length_groups(lengths: Sequence[int], *, tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `tokens` padded tokens each (at least one row)."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    chunk: list[int] = []
    for i in order:
        if chunk and (len(chunk) + 1) * lengths[i] > tokens:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk
