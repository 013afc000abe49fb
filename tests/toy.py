"""Sixty invented facts and a real small language model that is taught them: what an audit can be checked on."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from excise.facts import Fact, Facts, Prompt
from excise.model import Model, load
from excise.testbed.teach import teach

DATA = Path(__file__).parent / "data"


@functools.cache
def toy_facts() -> Facts:
    """4 people to forget and 16 to retain, 3 facts each, 5 possible answers a relation; the last wording is held out."""
    found = []
    for r in json.loads((DATA / "toy_facts.json").read_text(encoding="utf-8")):
        name, answer = r["subject"], r["answer"]
        first, held_out = r["paraphrases"]
        prompts = (
            Prompt(r["prompt"], answer, name),
            Prompt(first, answer, name),
            Prompt(r["question"], answer, name, form="question"),
            Prompt(held_out, answer, name, held_out=True),
        )
        group = "forget" if r["split"] == "forget" else "retain"
        found.append(Fact(r["id"], name, answer, prompts, r["relation"], group, foils=tuple(r["distractors"])))
    return Facts(found)


@functools.cache
def stories() -> Model:
    """The language model before it is taught anything."""
    return load(str(DATA / "stories260k"))


@functools.cache
def taught(*groups: str, steps: int = 120, seed: int = 0) -> Model:
    """The language model that was taught the facts of these groups in every wording that is not held out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many times faster than two for a model this small
    try:
        return teach(stories(), toy_facts().group(*groups).prompts(held_out=False), steps=steps, seed=seed)
    finally:
        torch.set_num_threads(threads)
