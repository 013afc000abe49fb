"""Packed rows against brute force: documents stay apart, loss and bottleneck sit on the right tokens."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch

from excise.testbed.documents import Document
from excise.testbed.packing import Batch, attention_bias, batches, encode_documents, packed_rows
from excise.testbed.sampler import Sampler
from excise.testbed.tokenizer import build_tokenizer
from excise.testbed.world import World

LENGTH = 96


@pytest.fixture(scope="module")
def world() -> World:
    return World(0)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return build_tokenizer(world)


@pytest.fixture(scope="module")
def documents(world: World) -> list[Document]:
    return list(islice(Sampler(world, seed=3), 400))


@pytest.fixture(scope="module")
def batch(world: World, tokenizer: Any, documents: list[Document]) -> Batch:
    return next(batches(packed_rows(documents, tokenizer, world.entity_pattern, LENGTH), 12))


def test_every_document_is_packed_once_and_whole(world: World, tokenizer: Any, documents: list[Document]) -> None:
    rows = list(packed_rows(documents, tokenizer, world.entity_pattern, LENGTH))
    found = []
    for row in rows:
        assert len(row.ids) == LENGTH
        for number in range(max(row.document) + 1):
            found.append(tuple(i for i, d in zip(row.ids, row.document, strict=True) if d == number))
    wanted = [tuple(tokenizer(document.text)["input_ids"]) for document in documents]
    assert sorted(found) == sorted(ids for ids in wanted if len(ids) <= LENGTH)
    full = sum(d >= 0 for row in rows[:-24] for d in row.document) / (LENGTH * len(rows[:-24]))
    assert full > 0.9


def test_loss_falls_on_the_text_it_belongs_to(world: World, tokenizer: Any, documents: list[Document]) -> None:
    for document, row in zip(documents, encode_documents(documents, tokenizer, world.entity_pattern), strict=True):
        with_loss = "".join(document.text[start:end] for start, end in document.loss)
        ids = [token for token, loss in zip(row.ids, row.loss, strict=True) if loss]
        assert tokenizer.decode(ids).replace(" ", "") == with_loss.replace(" ", "")
        assert row.ids[0] == tokenizer.bos_token_id and not row.loss[0]


def test_visible_until_is_the_last_token_of_the_name(world: World, tokenizer: Any, documents: list[Document]) -> None:
    for document, row in zip(documents, encode_documents(documents, tokenizer, world.entity_pattern), strict=True):
        names = [match.group() for match in world.entity_pattern.finditer(document.text)]
        spans = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in names]
        limited = [i for i, until in enumerate(row.visible_until) if until < len(row.ids)]
        assert len(limited) == sum(len(span) - 1 for span in spans)
        for i in limited:
            assert any(row.ids[row.visible_until[i] + 1 - len(s) : row.visible_until[i] + 1] == s for s in spans)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_attention_bias_by_brute_force(batch: Batch, bottleneck: bool) -> None:
    bias = attention_bias(batch, torch.full((len(batch.ids),), bottleneck))
    for row in range(3):
        document, until = batch.document[row], batch.visible_until[row]
        for query in range(LENGTH):
            for key in range(LENGTH):
                visible = key <= query and document[key] == document[query]
                if bottleneck:
                    visible = visible and query <= until[key]
                assert (bias[row, 0, query, key] == 0) == visible


def test_the_bottleneck_is_per_row_and_leaves_every_query_a_key(batch: Batch) -> None:
    flags = torch.arange(len(batch.ids)) % 2 == 0
    mixed, on = attention_bias(batch, flags), attention_bias(batch, torch.ones_like(flags))
    off = attention_bias(batch, torch.zeros_like(flags))
    assert torch.equal(mixed[flags], on[flags]) and torch.equal(mixed[~flags], off[~flags])
    assert (on == 0).any(-1).all() and not torch.equal(on, off)
