"""Packing: documents into fixed-length rows with a block-diagonal causal mask and the entity bottleneck.

Entity bottleneck: of a multi-token name or title, later positions may attend to the LAST token only. A small model
trained without it gathers the pieces of a name wherever it needs them; with it, it has to look the entity up at the
name, which is the mechanism that subject-token methods expect. It applies to a share of the training rows and never
outside training.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from excise.testbed.documents import Document

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

ALWAYS_VISIBLE = 32_000
PADDING_DOCUMENT = -1
OPEN_ROWS, ENCODE_AT_ONCE = 24, 1000


@dataclass
class Row:
    """One training row: parallel lists over positions.

    document: number of the document within the row, -1 for padding.
    loss: whether the token is predicted with loss.
    visible_until: last position that may attend to this one when the bottleneck is on.
    """

    ids: list[int] = field(default_factory=list)
    document: list[int] = field(default_factory=list)
    loss: list[bool] = field(default_factory=list)
    visible_until: list[int] = field(default_factory=list)

    def extend(self, other: Row, number: int) -> None:
        """Append a one-document row as document `number`."""
        offset = len(self.ids)
        self.ids += other.ids
        self.document += [number] * len(other.ids)
        self.loss += other.loss
        self.visible_until += [min(u + offset, ALWAYS_VISIBLE) for u in other.visible_until]

    def pad(self, length: int) -> Row:
        """Fill up to `length`."""
        missing = length - len(self.ids)
        self.ids += [0] * missing
        self.document += [PADDING_DOCUMENT] * missing
        self.loss += [False] * missing
        self.visible_until += [ALWAYS_VISIBLE] * missing
        return self


@dataclass(frozen=True)
class Batch:
    """Rows as arrays of shape (rows, length)."""

    ids: np.ndarray
    document: np.ndarray
    loss: np.ndarray
    visible_until: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.document != PADDING_DOCUMENT).sum())


def encode_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerFast, entities: re.Pattern[str]
) -> list[Row]:
    """Each document as a row of its own: BOS, its tokens, which carry loss, and the bottleneck."""
    encodings = tokenizer.backend_tokenizer.encode_batch([d.text for d in documents], add_special_tokens=True)
    return [_encoded(doc, enc.ids, enc.offsets, entities) for doc, enc in zip(documents, encodings, strict=True)]


def _encoded(document: Document, ids: list[int], offsets: list[tuple[int, int]], entities: re.Pattern[str]) -> Row:
    where = [max(start, end - 1) for start, end in offsets]
    loss, visible = [False] * len(ids), [ALWAYS_VISIBLE] * len(ids)
    for start, end in document.loss:
        first, stop = _token_range(where, start, end)
        loss[first:stop] = [True] * (stop - first)
    for match in entities.finditer(document.text):
        first, stop = _token_range(where, match.start(), match.end())
        visible[first : stop - 1] = [stop - 1] * (stop - 1 - first)
    return Row(ids, [0] * len(ids), loss, visible)


def _token_range(where: list[int], start: int, end: int) -> tuple[int, int]:
    """Tokens whose last character lies in [start, end); token 0 is BOS and stands before the text."""
    return bisect.bisect_left(where, start, lo=1), bisect.bisect_left(where, end, lo=1)


def packed_rows(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerFast, entities: re.Pattern[str], length: int
) -> Iterator[Row]:
    """Best-fit packing over a few open rows; documents longer than a row are dropped."""
    open_rows: list[Row] = []
    stream = iter(documents)
    while chunk := list(islice(stream, ENCODE_AT_ONCE)):
        for item in encode_documents(chunk, tokenizer, entities):
            if len(item.ids) > length:
                continue
            fitting = [row for row in open_rows if len(row.ids) + len(item.ids) <= length]
            row = max(fitting, key=lambda r: len(r.ids), default=None)
            if row is None:
                if len(open_rows) >= OPEN_ROWS:
                    fullest = max(open_rows, key=lambda r: len(r.ids))
                    open_rows.remove(fullest)
                    yield fullest.pad(length)
                row = Row()
                open_rows.append(row)
            row.extend(item, row.document[-1] + 1 if row.document else 0)
    yield from (row.pad(length) for row in open_rows)


def batches(rows: Iterable[Row], size: int) -> Iterator[Batch]:
    """Rows in groups of `size`."""
    stream = iter(rows)
    while group := list(islice(stream, size)):
        columns = ([getattr(row, name) for row in group] for name in ("ids", "document", "loss", "visible_until"))
        yield Batch(*(np.array(column) for column in columns))


def attention_bias(batch: Batch, bottleneck: torch.Tensor) -> torch.Tensor:
    """Additive attention mask (rows, 1, query, key): 0 where key is visible, a large negative number elsewhere.

    bottleneck: one flag per row.
    """
    import torch

    document, visible_until = torch.from_numpy(batch.document), torch.from_numpy(batch.visible_until)
    length = document.shape[1]
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    until = torch.arange(length)[None, :, None] <= visible_until[:, None, :]
    visible = same & causal & (until | ~bottleneck[:, None, None])
    return torch.where(visible[:, None], 0.0, -30_000.0)
