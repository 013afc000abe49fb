"""The dictionaries that ship: they belong to their models and to no other, and sae-lens reads them."""

import functools
import json
import re

import pytest
import torch

from excise.errors import FingerprintMismatch
from excise.model import load as load_model
from excise.testbed import general_text
from sae.embedded import COMMON, HERE, SETTINGS
from sae.load import embedded, load
from sae.match import check

LARGEST = 4 * 2**20
NAMES = sorted(SETTINGS)


@functools.cache
def model(name):
    return load_model(f"testbed:{name}")


@functools.cache
def texts(name):
    return general_text(name, 150, seed=4)


def test_every_one_is_listed_and_small():
    assert embedded() == [f"testbed:{name}" for name in NAMES]
    for name in NAMES:
        files = {p.name: p.stat().st_size for p in (HERE / name).iterdir()}
        assert set(files) == {"cfg.json", "sae_weights.safetensors"} and sum(files.values()) <= LARGEST
        settings = json.loads((HERE / name / "cfg.json").read_text())
        assert settings["d_sae"] == COMMON["features"] and settings["metadata"]["hook_name"] == SETTINGS[name]["hook"]
        assert not re.search(r"/(home|work|tmp|root)/", (HERE / name / "cfg.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_it_explains_its_own_model(name):
    found = check(load(f"testbed:{name}"), model(name), texts(name), least=0.9)
    assert found.same_weights and 2 < found.l0 < 40


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_of_the_same_shape_is_another_model(name):
    with pytest.raises(FingerprintMismatch, match=f"testbed:{name} explains"):
        check(load(f"testbed:{name}"), model(f"{name}-oracle"), texts(name))


def test_sae_lens_reads_the_same_features():
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(HERE / "dense", device="cpu"), load("testbed:dense")
    x = torch.randn(50, ours.d) * 5
    torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-4, atol=1e-4)


def test_an_unknown_one_names_near_ones():
    with pytest.raises(FileNotFoundError, match="near: testbed:dense"):
        load("testbed:dens")
