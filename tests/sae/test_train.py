"""Training with sae-lens's trainer on a stream from a model: it learns, it is kept, it is the same again."""

import functools
import importlib
import json
from itertools import cycle, islice

import pytest
import torch
from dictionaries import HOOK, TEXTS, tiny

from excise.errors import ExciseError
from excise.names import UnknownName
from sae.load import load
from sae.match import check
from sae.train import stream, train

SETTINGS = dict(features=64, tokens=20_000, batch=256, lr=3e-3)


@functools.cache
def trained(architecture, **options):
    return train(tiny(), HOOK, TEXTS, architecture=architecture, **SETTINGS, **options)


@pytest.mark.parametrize(
    ("architecture", "options"), [("topk", {"k": 8}), ("jumprelu", {"l0_coefficient": 1.0, "jumprelu_bandwidth": 0.5})]
)
def test_it_learns_the_activations(architecture, options):
    book = trained(architecture, **options)
    assert book.info["architecture"] == architecture and book.elementwise == (architecture == "jumprelu")
    found = check(book, tiny(), TEXTS, least=0.7)
    assert found.same_weights and 1 < found.l0 < 50
    if architecture == "topk":
        assert found.l0 <= 8


def test_folder_says_where_it_belongs_and_reads_back_to_the_bit(tmp_path):
    book = train(tiny(), HOOK, TEXTS, **SETTINGS, k=8, folder=tmp_path)
    again, cfg = load(tmp_path), json.loads((tmp_path / "cfg.json").read_text())
    x = next(stream(tiny(), HOOK, TEXTS))
    assert torch.equal(again.encode(x), book.encode(x)) and torch.equal(book.encode(x), trained("topk", k=8).encode(x))
    assert cfg["metadata"]["hook_name"] == HOOK and cfg["metadata"]["hf_module"] == "model.layers.1"
    assert cfg["metadata"]["model_fingerprint"] == tiny().fingerprint
    assert {p.name for p in tmp_path.iterdir()} == {"cfg.json", "sae_weights.safetensors"}


def test_the_stream_leaves_out_bos_and_padding_and_starts_again(monkeypatch):
    first, second = islice(stream(tiny(), HOOK, TEXTS), 2)
    lengths = [len(tiny().tokenizer(t)["input_ids"]) - 1 for t in TEXTS]
    assert len(first) == len(second) == sum(lengths) and not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    # What does not fit in memory is read again, to the same end.
    monkeypatch.setattr(importlib.import_module("sae.train"), "KEPT", 0)
    assert torch.equal(*islice(stream(tiny(), HOOK, TEXTS), 2))
    assert len(list(stream(tiny(), HOOK, iter(TEXTS)))) == 1


def test_what_is_wrong_is_said_before_the_long_part():
    with pytest.raises(UnknownName, match="hook_resid_post"):
        train(tiny(), "blocks.1.hook_resid_posst", TEXTS, **SETTINGS)
    with pytest.raises(ExciseError, match="gave out"):
        train(tiny(), HOOK, iter(islice(cycle(TEXTS), 40)), **SETTINGS)
    with pytest.raises(ExciseError, match="sae-lens cannot make"):
        train(tiny(), HOOK, TEXTS, **SETTINGS, no_such_option=1)
