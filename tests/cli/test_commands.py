"""The commands on a tiny random model: what they print and what they leave."""

from __future__ import annotations

from pathlib import Path

from cli_tools import Cli, an_edit
from transformers import AutoModelForCausalLM


def test_doctor(cli: Cli, model_folder: Path) -> None:
    report = cli("doctor", "--model", model_folder, "--format", "json").json
    assert report["architecture"] == "LlamaForCausalLM"
    assert report["problems"] == []
    assert abs(sum(report["components"].values()) - 1) < 1e-9
    assert report["reachable"] > 0.95
    text = cli("doctor", "--model", model_folder).out
    assert "BOS              added" in text and "chat template    no" in text


def test_list(cli: Cli) -> None:
    found = cli("list", "--format", "json").json
    assert {"localizers", "editors", "evaluations"} == found.keys()
    rocr = next(m for m in found["editors"] if m["name"] == "rocr")
    assert {"name": "seed", "flag": "--seed"}.items() <= next(o for o in rocr["options"] if o["name"] == "seed").items()
    assert "rocr" in cli("list", "editors").out


def test_flags_of_a_method(cli: Cli) -> None:
    text = cli("edit", "rocr", "--help").out
    assert "--target" in text and "--ridge" in text
    assert "--recall-limit" in cli("eval", "recall", "--help").out
    assert cli("edit", "rocr", "--ridge", "much", "--facts", "f", "--model", "m").code == 2


def test_show_and_ask_and_export(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    edit = an_edit(model_folder, tmp_path / "edit.safetensors")
    shown = cli("show", edit, "--format", "json").json
    assert (shown["kind"], shown["mode"], shown["rows"][0]["rank"]) == ("edit", "weight", 1)
    answers = cli("ask", "Where is", "--model", model_folder, "--edit", edit, "--format", "json").json["answers"]
    assert answers[0].keys() == {"prompt", "before", "edited"}
    said = cli("export", edit, "--model", model_folder, "--out", tmp_path / "edited", "--format", "json")
    assert said.json["folder"] == str(tmp_path / "edited")
    AutoModelForCausalLM.from_pretrained(tmp_path / "edited")


def test_eval_two_checkpoints(cli: Cli, model_folder: Path, other_folder: Path, facts_file: Path) -> None:
    words = ("eval", "recall", "probability", "--before", model_folder, "--after", other_folder, "--facts", facts_file)
    found = cli(*words, "--format", "json").json
    assert {r["arm"] for r in found["results"]} == {"before", "after"}
    assert all(
        {"arm", "evaluation", "group", "form", "value", "low", "high", "n"} <= r.keys() for r in found["results"]
    )
    assert "recall" in cli(*words).out


def test_eval_of_an_edit_with_its_control(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    edit = an_edit(model_folder, tmp_path / "edit.safetensors")
    words = (
        "eval",
        "recall",
        "--recall-limit",
        1,
        "--before",
        model_folder,
        "--edit",
        edit,
        "--control",
        "--facts",
        facts_file,
    )
    found = cli(*words, "--format", "json").json
    assert {r["arm"]: r.get("mode") for r in found["results"]} == {
        "before": "none",
        "edited": "weight",
        "control": "weight",
    }
    assert {r["n"] for r in found["results"]} == {1}


def test_dry_runs_touch_nothing(cli: Cli, facts_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words in (
        ("localize", "causal-trace", "--facts", facts_file, "--model", "nowhere", "--out", out),
        ("edit", "rocr", "--facts", facts_file, "--model", "nowhere", "--out", out),
        ("run", facts_file, "--model", "nowhere", "--out", out),
        ("eval", "--before", "nowhere", "--facts", facts_file, "--out", out),
    ):
        said = cli(*words, "--dry-run")
        assert said.code == 0 and "would" in said.out
    assert not out.exists()


def test_quiet(cli: Cli, model_folder: Path) -> None:
    assert "loading" in cli("doctor", "--model", model_folder).err
    assert cli("doctor", "--model", model_folder, "--quiet").err == ""
