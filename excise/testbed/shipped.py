"""Where the shipped models are, and which world a model folder belongs to. Imports nothing heavy."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from excise.testbed.world import GENERATOR_VERSION, World

MODELS = Path(__file__).parent / "models"
ORACLE_SUFFIX = "-oracle"


def names() -> list[str]:
    """Names of the shipped models, for example "dense" and "dense-oracle"."""
    return sorted(folder.parent.name for folder in MODELS.glob("*/world.json"))


def model_folder(name: str | Path) -> Path:
    """The folder of a shipped model, or `name` itself if it is a model folder already."""
    for folder in (MODELS / str(name), Path(name)):
        if (folder / "world.json").is_file():
            return folder
    shipped = ", ".join(names()) or "none"
    raise FileNotFoundError(f"no testbed model {str(name)!r}: shipped are {shipped}; or give a folder")


def oracle_folder(name: str | Path) -> Path:
    """The folder of the model trained without the forget people, beside the full one."""
    folder = model_folder(name)
    return model_folder(folder.with_name(folder.name + ORACLE_SUFFIX))


def read_description(folder: str | Path) -> dict[str, Any]:
    """`world.json` of a model, checked against this generator."""
    description = json.loads((model_folder(folder) / "world.json").read_text())
    if description["generator_version"] != GENERATOR_VERSION:
        raise ValueError(
            f"{folder} was trained on generator version {description['generator_version']}, this is version "
            f"{GENERATOR_VERSION}: train it again"
        )
    return description


@lru_cache(maxsize=8)
def _world(seed: int) -> World:
    return World(seed)


def world_of(source: World | int | str | Path) -> World:
    """A world from itself, its seed, a shipped model's name or a model folder."""
    if isinstance(source, World):
        return source
    return _world(source if isinstance(source, int) else read_description(source)["seed"])
