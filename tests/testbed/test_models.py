"""The shipped models load offline, are small, and still do what `measured.json` says."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch

from excise.facts import Prompt
from excise.testbed import model_folder, names, oracle_folder, world_of
from excise.testbed.behaviour import Rate, behaviour, score
from excise.testbed.dataset import known_fact
from excise.testbed.quality import load
from excise.testbed.shipped import read_description
from excise.testbed.tokenizer import build_tokenizer, tokenizer_hash

MODELS = ("dense", "dense-oracle", "moe", "moe-oracle")
LIMIT = 16 * 1024 * 1024


@lru_cache(maxsize=4)
def loaded(name: str) -> tuple[Any, Any]:
    return load(name)


@lru_cache(maxsize=4)
def rates(name: str) -> dict[str, Rate]:
    model, tokenizer = loaded(name)
    return behaviour(model, tokenizer, world_of(name), forget=4, retain=4, names=12, items=40)


def measured(name: str) -> dict[str, Any]:
    return json.loads((model_folder(name) / "measured.json").read_text())


def test_four_models_are_shipped() -> None:
    assert set(MODELS) <= set(names())
    assert oracle_folder("dense") == model_folder("dense-oracle")


@pytest.mark.parametrize("name", MODELS)
def test_files_are_small_and_plain(name: str) -> None:
    files = {path.name: path.stat().st_size for path in model_folder(name).iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert wanted | {"world.json", "measured.json"} <= set(files)
    assert max(files.values()) <= LIMIT
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]


@pytest.mark.parametrize("name", MODELS)
def test_the_description_fits_the_generator_and_the_tokenizer(name: str) -> None:
    description = read_description(name)
    _, tokenizer = loaded(name)
    assert description["oracle"] == name.endswith("oracle")
    assert description["forget_people"] == list(world_of(name).forget_people)
    assert description["tokenizer"] == tokenizer_hash(tokenizer) == tokenizer_hash(build_tokenizer(world_of(name)))


@pytest.mark.parametrize("name", MODELS)
def test_every_bar_holds_in_the_full_measurement(name: str) -> None:
    missed = [bar for bar in measured(name)["bars"] if not bar["holds"]]
    assert not missed


@pytest.mark.parametrize("name", MODELS)
def test_measuring_a_part_again_agrees(name: str) -> None:
    stored = measured(name)["behaviour"]
    for key, rate in rates(name).items():
        low, high = rate.interval
        assert low <= stored[key]["high"] and high >= stored[key]["low"], (
            f"{key}: {rate.record()} against {stored[key]}"
        )


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("group", ["retain", "forget"])
def test_full_models_recall_everybody(name: str, group: str) -> None:
    for form in ("statement", "question", "cloze", "choice"):
        for side in ("trained", "held_out"):
            assert rates(name)[f"{group}/{form}/{side}"].value >= 0.95


@pytest.mark.parametrize("name", ["dense-oracle", "moe-oracle"])
def test_oracles_never_heard_of_the_forget_people(name: str) -> None:
    assert rates(name)["forget/statement/trained"].value <= 0.05
    assert rates(name)["forget/question/trained"].value <= 0.05
    assert rates(name)["forget/question_refused/trained"].value >= 0.8
    assert rates(name)["retain/question/trained"].value >= 0.95


def test_teacher_forcing_equals_generation() -> None:
    model, tokenizer = loaded("dense")
    world = world_of("dense")
    prompts = [known_fact(world, person, "employer").ask("question")[0] for person in world.people[:12]]
    matched = score(model, tokenizer, prompts).matched
    for prompt, match in zip(prompts, matched, strict=True):
        assert (_generate(model, tokenizer, prompt) == prompt.answer) == match


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompt: Prompt) -> str:
    turns = [{"role": "user", "content": prompt.text}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip().removesuffix(".")


def test_a_mechanism_is_there_the_name_is_where_the_fact_is_looked_up() -> None:
    trace = measured("dense")["mechanisms"]["causal_trace"]["statement/swap"]
    early = trace["residual_last_subject"][: len(trace["residual_last_subject"]) // 2]
    assert max(early) >= 0.3 and trace["residual_last"][0] < 0.1
