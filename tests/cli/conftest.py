"""A tiny random model in a folder, a facts file, and a way to run a command in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import Cli, Said, save_model

from excise.cli import main
from excise.progress import be_quiet


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: object) -> Said:
        be_quiet(False)
        capsys.readouterr()
        code = main([str(w) for w in words])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "other", seed=1)


PEOPLE = {"forget": ["Ann Lee", "Bob Ray"], "retain": ["Cid Fox", "Dan Orr", "Eve Kay"], "unknown": ["Flo Day"]}


@pytest.fixture(scope="session")
def facts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    records = [
        {
            "id": f"{name}/home", "subject": name, "group": group, "prompt": f"{name} lives in",
            "answer": "Rome" if group != "unknown" else "nowhere",
            "question": f"Where does {name} live?", "foils": ["Oslo"],
        }
        for group, names in PEOPLE.items()
        for name in names
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path
