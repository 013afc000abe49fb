"""The whole chain on a tiny untrained world model: its files, its JSON, its way on after an interruption."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from cli_tools import Cli

from excise import measure, registry
from excise.cli import main
from excise.edits import Edit
from excise.testbed.train import train

SIZE = {"layers": 2, "width": 32, "heads": 2, "mlp": 48}
ROW = {"arm", "evaluation", "group", "form", "value", "low", "high", "n"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a world of its own, one step old, with its oracle beside it."""
    folder = tmp_path_factory.mktemp("worlds") / "small"
    for oracle in (False, True):
        name = f"{folder}-oracle" if oracle else folder
        train("dense", name, seed=5, oracle=oracle, steps=1, size=SIZE, log=lambda line: None)
    return folder


FEW = ("--people", 2, "--limit", 4)


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a finished demo, and what it printed with --format json."""
    out, printed = tmp_path_factory.mktemp("demo") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([str(w) for w in ("demo", "--model", world, *FEW, "--out", out, "--format", "json")]) == 0
    return out, printed.getvalue()


@pytest.fixture
def out(finished: tuple[Path, str]) -> Path:
    return finished[0]


def test_json_is_one_object_with_the_long_table(finished: tuple[Path, str]) -> None:
    out, found = finished[0], json.loads(finished[1])
    rows = found["results"]
    assert all(r.keys() >= ROW for r in rows)
    assert list(dict.fromkeys(r["arm"] for r in rows)) == ["before", "edited", "control", "oracle"]
    assert {r["group"] for r in rows if r["group"]} == {"forget", "retain", "neighbour", "unknown", "general"}
    assert {r["evaluation"] for r in rows} == set(measure.EVALUATIONS)
    recall = [r for r in rows if r["evaluation"] == "recall" and r["group"] == "forget" and r["arm"] == "edited"]
    assert {"statement", "question", "cloze", "choice"} <= {r["form"] for r in recall}
    assert any(r.get("held_out") is True for r in recall) and any("held_out" not in r for r in recall)
    assert all(r["low"] <= r["value"] <= r["high"] for r in rows if r["n"])
    assert found["verified"] is True and Path(found["report"]) == out / "report.html"


def test_files_of_a_run(out: Path) -> None:
    names = {p.name for p in out.iterdir()}
    assert names == {
        "facts.jsonl", "run.json", "localization.safetensors", "edit.safetensors", "results.jsonl", "report.html",
    }  # fmt: skip
    settings = json.loads((out / "run.json").read_text())
    assert settings["command"].startswith("excise demo --model")
    assert settings["seeds"] == {"run": 0} and settings["fingerprints"]["model"]
    assert all(json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    assert "http://" not in (out / "report.html").read_text().replace("http://www.w3.org", "")


def test_again_is_read_not_measured(cli: Cli, world: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "evaluate", never)
    before = (out / "results.jsonl").read_text()
    # Half a line, as a killed run leaves it, is dropped.
    with open(out / "results.jsonl", "a") as file:
        file.write('{"key": "x", "sco')
    said = cli("demo", "--model", world, *FEW, "--out", out)
    assert said.code == 0, said.err
    assert "edited" in said.out and "report.html" in said.out and "excise export" in said.out
    assert (out / "results.jsonl").read_text() == before


def test_report_and_show_read_the_folder(cli: Cli, out: Path, tmp_path: Path) -> None:
    (out / "report.html").unlink()
    assert cli("report", out).code == 0 and (out / "report.html").is_file()
    shown = cli("show", out, "--format", "json").json
    assert {p["kind"] for p in shown["parts"]} == {"run", "edit", "localization"}
    assert "blocks." in cli("show", out).out
    said = cli("report", tmp_path)
    assert said.code == 1 and "run.json: no such file" in said.error


def test_people_of_ones_own_have_no_oracle_arm(cli: Cli, world: Path, tmp_path: Path) -> None:
    from excise.testbed import world_of

    person = world_of(world).retain_people[3]
    words = ("demo", "--model", world, "--forget", person, "--limit", 1, "--out", tmp_path / "run", "--format", "json")
    said = cli(*words)
    assert said.code == 0, said.err
    assert "no oracle arm" in said.err and said.json["forget"] == [person]
    assert {r["arm"] for r in said.json["results"]} == {"before", "edited", "control"}
    assert cli("demo", "--model", world, "--forget", "Nobody", "--out", tmp_path / "run").code == 1


def test_an_edit_without_effect_ends_with_4(
    cli: Cli, world: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Edit.load(out / "edit.safetensors").scaled(0)
    rocr = registry.method("editor", "rocr")
    fake = registry.Method("editor", "rocr", lambda *args, **options: nothing, rocr.options, "")
    monkeypatch.setitem(registry._METHODS, ("editor", "rocr"), fake)
    said = cli("demo", "--model", world, *FEW, "--out", tmp_path / "run")
    assert said.code == 4 and "do not change" in said.error
    assert not (tmp_path / "run" / "report.html").exists()


def test_run_on_a_facts_file(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    """One command: a search, its best, the audit, a report and a card; the same again is read, not made."""
    out = tmp_path / "run"
    words = ("run", facts_file, "--model", model_folder, "--out", out, "--trials", 3, "--format", "json")
    said = cli(*words)
    assert said.code == 0, said.err
    assert {r["arm"] for r in said.json["results"]} == {"before", "edited", "control"}
    tried = said.json["search"]["trials"]
    assert len([t for t in tried if t["editor"] != "sum"]) == 3 and sum(t["chosen"] for t in tried) == 1
    assert all(t["reason"] or t["front"] in (True, False) for t in tried)
    assert "What was tried" in (out / "report.html").read_text()
    assert said.json["search"]["chosen"] in (out / "model_card.md").read_text().replace("\\", "")
    edit = (out / "edit.safetensors").read_bytes()
    again = cli(*words)
    assert again.code == 0 and (out / "edit.safetensors").read_bytes() == edit
    assert again.json["search"] == said.json["search"] and "auditing" not in again.err


def test_run_with_one_editor_and_an_export(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    words = ("run", facts_file, "--model", model_folder, "--editor", "rocr", "--localizer", "causal-trace")
    said = cli(*words, "--out", tmp_path / "run", "--export", tmp_path / "edited", "--format", "json")
    assert said.code == 0, said.err
    assert "search" not in said.json and (tmp_path / "edited" / "model.safetensors").is_file()
    assert cli(*words, "--out", tmp_path / "other", "--trials", "0").code == 2


def test_localize_to_parquet(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    words = ("localize", "causal-trace", "--no-known-only", "--model", model_folder, "--facts", facts_file)
    said = cli(*words, "--group", "all", "--out", tmp_path / "all", "--format", "json")
    assert said.code == 0, said.err
    (found,) = said.json["localizations"]
    assert (found["computed"], found["found"], found["failed"]) == (6, 0, {})
    table = pq.read_table(found["table"])
    assert {"fact_id", "method", "site", "point", "layer", "position", "unit", "score", "low", "high"} <= set(
        table.column_names
    )
    again = cli(*words, "--group", "all", "--out", tmp_path / "all", "--format", "json").json["localizations"][0]
    assert (again["computed"], again["found"], again["top"]) == (0, 6, found["top"])
    edited = cli("edit", "rocr", "--model", model_folder, "--facts", facts_file, "--where", tmp_path / "all",
                 "--out", tmp_path / "e.safetensors", "--format", "json")  # fmt: skip
    assert edited.code == 0, edited.err
    assert edited.json["verified"] is True


@pytest.mark.slow
def test_workers_give_the_same_table(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    words = (
        "localize",
        "causal-trace",
        "--no-known-only",
        "--model",
        model_folder,
        "--facts",
        facts_file,
        "--group",
        "all",
    )
    assert cli(*words, "--out", tmp_path / "one").code == 0
    said = cli(*words, "--out", tmp_path / "two", "--workers", 2, "--format", "json")
    assert said.code == 0, said.err
    one, two = (pq.read_table(tmp_path / name / "localization.parquet").to_pylist() for name in ("one", "two"))
    assert [r["site"] for r in one] == [r["site"] for r in two]
    assert all(abs(a["score"] - b["score"]) < 1e-5 for a, b in zip(one, two, strict=True) if a["score"] is not None)
    assert said.json["localizations"][0]["workers"] == 2
