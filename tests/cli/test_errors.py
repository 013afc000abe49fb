"""What goes wrong gets one line that says where, what and what would do, and the right exit code."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_tools import SITE, Cli, an_edit

from excise.edits import Edit
from excise.model import load


def test_usage(cli: Cli) -> None:
    assert cli().code == 2
    assert cli("nonsense").code == 2
    assert cli("doctor").code == 2
    assert cli("doctor", "--model", "x", "--dtype", "int3").code == 2
    assert cli("ask", "hi", "--model", "x", "--max-new-tokens", "0").code == 2


def test_broken_facts(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(facts_file.read_text() + '{"id": "x", "subjct": "Ann Lee"}\n')
    said = cli("edit", "rocr", "--facts", broken, "--model", model_folder)
    assert said.code == 1
    assert said.error == f"{broken}:7: no field 'subjct'; did you mean subject?"


def test_no_forget_facts(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text(facts_file.read_text().replace('"forget"', '"retain"'))
    said = cli("run", kept, "--model", model_folder, "--out", tmp_path / "run")
    assert (said.code, said.error.split(";")[0]) == (1, f"{kept}: no forget fact, only 5 retain, 1 unknown")


def test_missing_model(cli: Cli, tmp_path: Path) -> None:
    said = cli("doctor", "--model", tmp_path / "nothing")
    assert said.code == 1
    assert said.error.startswith(f"no model at '{tmp_path / 'nothing'}': give testbed:dense")


def test_damaged_model(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model_folder, tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    said = cli("doctor", "--model", folder)
    assert said.code == 1 and said.error


def test_nan_weights(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    model = load(str(model_folder))
    with torch.no_grad():
        model.weight(SITE)[0, 0] = float("nan")
    model.hf.save_pretrained(tmp_path / "nan")
    model.tokenizer.save_pretrained(tmp_path / "nan")
    said = cli("doctor", "--model", tmp_path / "nan")
    assert said.code == 1 and "NaN" in said.error


def test_remote_code_needs_a_revision(cli: Cli) -> None:
    said = cli("doctor", "--model", "someone/model", "--trust-remote-code")
    assert said.code == 1 and "name the revision" in said.error


@pytest.mark.parametrize("site", ["blocks.7.mlp.W_out", "blocks.1.mlp.W_uot", "blocks.1.mlp.hook_psot"])
def test_site_that_does_not_exist(cli: Cli, model_folder: Path, facts_file: Path, site: str) -> None:
    for said in (
        cli("doctor", "--model", model_folder, "--site", site),
        cli("edit", "rocr", "--facts", facts_file, "--model", model_folder, "--where", site),
    ):
        assert said.code == 1
        assert site in said.error


def test_site_that_is_none(cli: Cli, model_folder: Path) -> None:
    said = cli("doctor", "--model", model_folder, "--site", "the third layer")
    assert said.code == 1 and "is not a site" in said.error


def test_unknown_method(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    said = cli("edit", "rorc", "--facts", facts_file, "--model", model_folder)
    assert said.code == 1 and "did you mean rocr" in said.error


def test_edit_for_another_model(
    cli: Cli, model_folder: Path, other_folder: Path, facts_file: Path, tmp_path: Path
) -> None:
    edit = an_edit(model_folder, tmp_path / "edit.safetensors")
    commands = [
        ("ask", "Who?", "--model", other_folder, "--edit", edit),
        ("eval", "recall", "--before", other_folder, "--edit", edit, "--facts", facts_file),
        ("export", edit, "--model", other_folder, "--out", tmp_path / "export"),
    ]
    for words in commands:
        said = cli(*words)
        assert said.code == 1
        assert str(model_folder) in said.error and str(other_folder) in said.error and "--force" in said.error
        assert not (tmp_path / "export").exists()
    for words in commands:
        assert cli(*words, "--force").code == 0


def test_edit_that_is_no_edit(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("not one")
    for path in (tmp_path / "text.safetensors", model_folder / "model.safetensors", tmp_path / "missing.safetensors"):
        said = cli("ask", "Who?", "--model", model_folder, "--edit", path)
        assert said.code == 1 and str(path) in said.error
        said = cli("show", path)
        assert said.code == 1 and str(path) in said.error


def test_full_disk(
    cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    out = tmp_path / "run"
    said = cli("eval", "recall", "--before", model_folder, "--facts", facts_file, "--out", out)
    assert said.code == 1
    assert "No space left on device" in said.error and "free some space" in said.error
    monkeypatch.undo()
    assert cli("eval", "recall", "--before", model_folder, "--facts", facts_file, "--out", out).code == 0
    assert {p.name for p in out.iterdir()} == {"results.jsonl", "run.json", "facts.jsonl", "report.html"}


def test_interrupt(
    cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from excise import measure

    one, calls = measure.evaluate, []

    def twice(*args: object, **options: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "evaluate", twice)
    words = ("eval", "recall", "probability", "--before", model_folder, "--facts", facts_file, "--out", tmp_path)
    said = cli(*words)
    assert said.code == 130
    assert "run the same command again" in said.error
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1
    assert cli(*words).code == 0
    assert len(calls) == 3, "the finished item was measured again"


def test_out_is_a_file(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    said = cli("run", facts_file, "--model", model_folder, "--out", tmp_path / "taken")
    assert said.code == 1 and "a file, not a folder" in said.error


def test_no_effect_is_exit_code_4(
    cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from excise import registry

    nothing = Edit.load(an_edit(model_folder, tmp_path / "zero.safetensors")).scaled(0)
    rocr = registry.method("editor", "rocr")
    fake = registry.Method("editor", "rocr", lambda *args, **options: nothing, rocr.options, "")
    monkeypatch.setitem(registry._METHODS, ("editor", "rocr"), fake)
    said = cli("edit", "rocr", "--facts", facts_file, "--model", model_folder, "--out", tmp_path / "e.safetensors")
    assert said.code == 4
    assert "its weights do not change" in said.error


def test_debug_shows_where(cli: Cli, tmp_path: Path) -> None:
    said = cli("doctor", "--model", tmp_path / "nothing", "--debug")
    assert said.code == 1 and "Traceback" in said.err


def test_hostile_text_cannot_drive_the_terminal(cli: Cli, tmp_path: Path) -> None:
    edit = Edit((), {"method": "\x1b[2J\x07"}, {}).save(tmp_path / "edit.safetensors")
    said = cli("show", edit)
    assert said.code == 0 and "\x1b" not in said.out
    assert json.loads(cli("show", edit, "--format", "json").out)["recipe"]["method"] == "\x1b[2J\x07"
