"""excise sae: train, show, check and features on a tiny random model; what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_tools import Cli, Said, save_model

HOOK = "blocks.1.hook_resid_post"
LINES = [f"{name} lives in {place}." for name in ("Ann Lee", "Bob Ray", "Cid Fox", "Dan Orr", "Eve Kay")
         for place in ("Rome", "Oslo", "a red house")]  # fmt: skip


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(LINES) + "\n\n")
    return path


@pytest.fixture(scope="session")
def dictionary(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, texts: Path) -> Path:
    """A dictionary that the command trained."""
    from excise.cli import main

    out = tmp_path_factory.mktemp("dictionaries") / "tiny"
    words = ["sae", "train", "--model", str(model_folder), "--hook", HOOK, "--texts", str(texts), "--out", str(out)]
    assert main([*words, "--features", "64", "--k", "8", "--tokens", "20000", "--batch", "256", "--lr", "0.003"]) == 0
    return out


def train(cli: Cli, model: Path, out: Path, *more: object, hook: str = HOOK) -> Said:
    return cli("sae", "train", "--model", model, "--hook", hook, "--out", out, "--tokens", 1000, "--batch", 50, *more)


def test_trained_one_is_a_sae_lens_folder_that_belongs_to_its_model(
    cli: Cli, dictionary: Path, model_folder: Path, texts: Path
) -> None:
    assert {p.name for p in dictionary.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    shown = cli("sae", "show", dictionary, "--format", "json").json
    assert (shown["hook"], shown["architecture"], shown["features"], shown["tokens"]) == (HOOK, "topk", 64, 20000)
    words = ("sae", "check", dictionary, "--model", model_folder, "--texts", texts)
    found = cli(*words, "--format", "json").json
    assert found["same weights"] is True and found["explained variance"] > 0.7 and found["features per token"] <= 8
    assert "explained variance" in cli(*words).out
    assert "explains 0." in cli(*words, "--explained", 0.9999).error


def test_a_dictionary_of_another_model_is_refused(
    cli: Cli, dictionary: Path, texts: Path, tmp_path: Path, other_folder: Path
) -> None:
    def refused(model: Path, folder: Path = dictionary) -> str:
        said = cli("sae", "check", folder, "--model", model, "--texts", texts)
        assert said.code == 1 and not said.out
        return said.error

    assert "it is a dictionary of" in refused(other_folder) and "train one" in refused(other_folder)
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "sae_weights.safetensors").write_bytes((dictionary / "sae_weights.safetensors").read_bytes())
    for hook, near in (("blocks.1.hook_resid_pots", HOOK), ("model.layers.1", f"is {HOOK} in TransformerLens names")):
        cfg = json.loads((dictionary / "cfg.json").read_text())
        cfg["metadata"]["hook_name"] = hook
        (moved / "cfg.json").write_text(json.dumps(cfg))
        assert near in refused(other_folder, moved)
    gpt2 = save_model(tmp_path / "gpt2", "gpt2", layers=1)
    assert "has 1 blocks" in refused(gpt2)
    assert "near: testbed:dense" in cli("sae", "show", "testbed:dens").error
    assert "sae-lens folder" in cli("sae", "show", tmp_path / "nowhere").error


def test_features_as_cards(cli: Cli, dictionary: Path, model_folder: Path, facts_file: Path, tmp_path: Path) -> None:
    words = ("sae", "features", "--model", model_folder, "--facts", facts_file, "--dictionary", dictionary)
    found = cli(
        *words, "--top", 3, "--most", 1, "--rule", "difference", "--out", tmp_path / "cards", "--format", "json"
    )
    rows = found.json["features"]
    assert 0 < len(rows) <= 3 and rows[0]["site"].startswith(f"{HOOK}.hook_sae_acts_post#")
    assert rows[0]["rates"]["forget"] > 0 and set(rows[0]["rates"]) == {"forget", "retain"}
    page = Path(found.json["page"]).read_text()
    assert all(r["site"] in page for r in rows) and "<svg" in page
    text = cli(*words, "--feature", 5, 7).out
    assert f"{HOOK}.hook_sae_acts_post#5" in text and "#7" in text and "promotes" in text
    assert "features 0 to 63, not 64" in cli(*words, "--feature", 64).error
    assert "no dictionary for" in cli(*words[:-2]).error


def test_wrong_words(cli: Cli, model_folder: Path, texts: Path, tmp_path: Path) -> None:
    for wrong in (("sae",), ("sae", "learn"), ("sae", "show"), ("sae", "show", "x", "--model", "m"),
                  ("sae", "check", "x"), ("sae", "train", "--model", "m", "--hook", HOOK)):  # fmt: skip
        assert cli(*wrong).code == 2, wrong
    out = tmp_path / "out"
    assert train(cli, model_folder, out, "--texts", texts, "--architecture", "big").code == 2
    assert train(cli, model_folder, out, "--texts", texts, "--set", "l0").code == 2
    for more, said in (
        (("--texts", tmp_path / "none.txt"), "no such file"),
        ((), "give --texts FILE"),
        (("--texts", texts, "--architecture", "jumprelu", "--k", 4), "for topk and batchtopk"),
        (("--texts", texts, "--lr", 0), "above 0"),
        (("--texts", texts, "--set", "no_such_field=1"), "no_such_field"),
    ):
        assert said in train(cli, model_folder, out, *more).error
    assert HOOK in train(cli, model_folder, out, "--texts", texts, hook="blocks.1.hook_resid_posst").error
    assert not out.exists()
    out.mkdir()
    (out / "x").write_text("mine")
    assert "a new folder" in train(cli, model_folder, out, "--texts", texts).error
    dry = train(cli, model_folder, tmp_path / "new", "--texts", texts, "--dry-run")
    assert dry.code == 0 and "would train a topk dictionary" in dry.out and not (tmp_path / "new").exists()


def test_texts_of_every_kind(cli: Cli, model_folder: Path, dictionary: Path, tmp_path: Path) -> None:
    """JSON Lines of texts and of objects, texts longer than the context; what is broken is told with its line."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (LINES[0], {"text": " ".join(LINES * 4)}, {"text": ""})))
    words = ("sae", "check", dictionary, "--model", model_folder, "--texts", path, "--explained", -9)
    assert cli(*words, "--format", "json").json["measured on tokens"] > 128
    for broken, said in (("{", ":2: not JSON"), ('{"txt": 1}', ":2: neither a text nor"), ("[1]", ":2: neither")):
        path.write_text(f'"{LINES[0]}"\n{broken}\n')
        assert said in cli(*words).error
    path.write_text("\n")
    assert "no text in it" in cli(*words).error
    path.write_bytes(b'"\xff"\n')
    assert ":1: byte 1 is not UTF-8" in cli(*words).error
