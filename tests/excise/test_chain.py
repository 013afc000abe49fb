"""The chain's own pieces: the map that a run draws where its localizer has none, and what it writes down of itself."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from excise import load
from excise.chain import MAP, Inputs, _mapped
from excise.facts import Facts
from excise.record import write_run
from excise.report import write_report
from excise.testbed import facts
from localize import scan


def test_a_map_over_tokens_is_drawn_once_and_only_of_facts_that_are_known(tmp_path: Path) -> None:
    model, known = load("testbed:dense"), facts("dense", people=2, seed=77)
    inputs = Inputs(model=model, facts=known, out=tmp_path, localizer="scan")
    found = _mapped(inputs)
    assert found is not None and {c for m in found.maps for c in m.values} == {"resid", "mlp", "attn"}
    again = _mapped(inputs)
    assert again is not None and np.array_equal(again.scores, found.scores, equal_nan=True)
    made_up = Facts([replace(f, prompts=tuple(replace(p, answer="Zzyzx") for p in f.prompts)) for f in known])
    (tmp_path / MAP).unlink()
    assert _mapped(replace(inputs, facts=made_up)) is None and not (tmp_path / MAP).exists()
    nothing = scan(model, made_up.group("forget")[:1], verify=0)
    page = write_report(tmp_path, localization=nothing, traced=found).read_text()
    assert "Method: scan; 1 fact, " in page and "Nothing was found: the model says" in page
    assert "Tokens run down, layers across" in page


def test_what_was_left_out_is_written_down_for_a_report_that_is_made_again(tmp_path: Path) -> None:
    inputs = Inputs(model=load("testbed:dense"), facts=facts("dense", people=1, seed=77), out=tmp_path)
    for found in ({}, {"left_out": {"relearning": "no time was left"}}):
        write_run(inputs, {}, None, found=found)
        assert json.loads((tmp_path / "run.json").read_text()).get("left_out") == found.get("left_out")
