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
    assert {"verdict", "findings", "fates", "left_out", "seconds"} <= found.keys()


def test_eval_by_family_writes_a_report(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    """Families, a budget, a folder that `excise report` reads; without an oracle it says what lacks its zero point."""
    edit, out = an_edit(model_folder, tmp_path / "edit.safetensors"), tmp_path / "audit"
    words = ("eval", "--before", model_folder, "--edit", edit, "--facts", facts_file, "--out", out)
    found = cli(*words, "--with", "recall,drift", "--minutes", 5, "--format", "json").json
    assert {r["evaluation"] for r in found["results"]} == {"recall", "drift"} and found["left_out"] == {}
    again = cli(*words, "--with", "recall,drift")
    assert "facts to forget" in again.out and (out / "report.html").is_file()
    (out / "report.html").unlink()
    assert cli("report", out).code == 0 and (out / "report.html").is_file()
    said = cli(*words, "--with", "intrinsik")
    assert said.code == 1 and "did you mean intrinsic" in said.err
    assert cli(*words, "--minutes", "0").code == 2


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


def test_diff(cli: Cli, model_folder: Path, other_folder: Path, tmp_path: Path) -> None:
    edit, other = an_edit(model_folder, tmp_path / "a.safetensors"), an_edit(model_folder, tmp_path / "b.safetensors")
    two = cli("diff", edit, other, "--format", "json").json
    assert (two["what"], two["changed"], two["rows"][0]["change"]) == ("edits", 1, "changed")
    assert cli("diff", edit, edit, "--format", "json").json["changed"] == 0
    said = cli("export", edit, "--model", model_folder, "--out", tmp_path / "edited", "--format", "json").json
    between = cli("diff", model_folder, said["folder"], "--format", "json").json
    alone = cli("diff", model_folder, edit, "--format", "json").json
    (row,), (exact,) = between["rows"], alone["rows"]
    assert row["name"] == "model.layers.1.mlp.down_proj.weight" and row["name"] in exact["name"]
    assert row["rank"] == exact["rank"] == 1 and abs(row["relative"] / exact["relative"] - 1) < 1e-4
    text = cli("diff", model_folder, said["folder"]).out
    assert "1 parameters differ" in text and "down_proj" in text
    assert "made for" in cli("diff", other_folder, edit).error
    assert "no such file" in cli("diff", edit, tmp_path / "nowhere").error


def test_compose(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    parts = [an_edit(model_folder, tmp_path / f"{i}.safetensors") for i in range(2)]
    out = tmp_path / "sum.safetensors"
    found = cli("compose", *parts, "--scale", 1, 0.5, "--out", out, "--format", "json").json
    assert len(found["changes"]) == 2 and found["conflicts"][0]["commute"] is True
    assert 0 < found["conflicts"][0]["input_angle"] <= 90
    shown = cli("show", out, "--format", "json").json
    assert [p["method"] for p in shown["recipe"]["parts"]] == ["by hand", "by hand"]
    assert "changed by more than one edit" in cli("compose", *parts, "--out", out).out
    assert "one factor per edit" in cli("compose", *parts, "--scale", 1, "--out", out).error


def test_requests_come_and_go(cli: Cli, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    book, out = tmp_path / "ledger.safetensors", tmp_path / "edit.safetensors"
    made = cli(
        "edit", "rocr", "--model", model_folder, "--facts", facts_file, "--where", "blocks.1.hook_resid_post",
        "--target", "Dan Orr", "--ledger", book, "--out", out,
    )  # fmt: skip
    assert made.code == 0, made.err
    assert [r["request"] for r in cli("show", book, "--format", "json").json["rows"]] == ["Ann Lee", "Bob Ray"]
    left = cli("withdraw", book, "Ann Lee", "--out", tmp_path / "less.safetensors", "--format", "json").json
    assert left["requests"] == ["Bob Ray"]
    assert cli("show", tmp_path / "less.safetensors", "--format", "json").json["recipe"]["requests"] == ["Bob Ray"]
    assert "did you mean Bob Ray" in cli("withdraw", book, "Bob Roy", "--out", out).error


def test_export_to_other_tools(cli: Cli, model_folder: Path, tmp_path: Path) -> None:
    edit = an_edit(model_folder, tmp_path / "edit.safetensors")
    said = cli(
        "export", edit, "--model", model_folder, "--to", "peft", "--out", tmp_path / "adapter", "--format", "json"
    )
    assert said.json["to"] == "peft" and (tmp_path / "adapter" / "adapter_config.json").is_file()
    error = cli("export", edit, "--model", model_folder, "--to", "steering", "--out", tmp_path / "steering").error
    assert "clamped directions" in error and not (tmp_path / "steering").exists()
    assert "PeftModel" in cli("export", edit, "--model", model_folder, "--to", "peft", "--out", tmp_path / "again").out
