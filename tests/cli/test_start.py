"""Help and version: fast, and free of everything heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli_tools import an_edit, save_model

from excise.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "transformer_lens",
    "sae_lens",
    "nnsight",
    "pandas",
    "pyarrow",
    "matplotlib",
    "safetensors",
)

PROBE = """
import sys, time
sys.path.insert(0, {root!r})
start = time.perf_counter()
from excise.cli import main
code = main({words!r})
print(time.perf_counter() - start, code, [m for m in {heavy!r} if m in sys.modules], file=sys.stderr)
"""


def probe(*words: str) -> tuple[float, int, str, str]:
    code = PROBE.format(root=str(ROOT), words=list(words), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, status, heavy = done.stderr.strip().splitlines()[-1].split(" ", 2)
    return float(seconds), int(status), heavy, done.stdout


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    _, status, heavy, text = probe(*words)
    assert (status, heavy) == (0, "[]")
    assert "excise" in text


def test_help_answers_at_once() -> None:
    # The best of some tries: a busy machine must not fail this.
    assert min(probe("--help")[0] for _ in range(5)) < 0.3


def test_whole_process_is_fast() -> None:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", PROBE.format(root=str(ROOT), words=["--version"], heavy=())],
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - start

    assert min(once() for _ in range(8)) < 0.3


def test_importing_the_package_is_light() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import excise; print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


def test_every_public_name_resolves() -> None:
    import excise

    tree = ast.parse(Path(excise.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {a.name: n.module for n in typed.body if isinstance(n, ast.ImportFrom) for a in n.names}
    # What a type checker or an editor sees, what `dir` lists, and what is there are the same names.
    assert shown == {name: f"excise.{home}" for name, home in excise._HOME.items()}
    assert excise.__all__ == sorted(shown) and set(shown) <= set(dir(excise))
    for name in excise.__all__:
        assert callable(getattr(excise, name)), name
    with pytest.raises(AttributeError, match="it has Arm"):
        _ = excise.nonsense


MODEL_LIBRARIES = (
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "nnsight",
    "accelerate",
    "peft",
    "tokenizers",
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An edit, another one, a ledger, a localization, a checkpoint and a run folder, written beforehand."""
    import torch

    from excise.ledger import Ledger, Request
    from excise.scores import Localization
    from excise.solve import Covariance

    folder = tmp_path_factory.mktemp("start")
    model = save_model(folder / "model")
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text('{"command": "excise run facts.jsonl", "seconds": {"edit": 1.5}}')
    an_edit(model, run / "edit.safetensors")
    Localization.of(["blocks.0.mlp.W_out", "blocks.1.hook_resid_post@last"]).save(run / "localization.safetensors")
    book = Ledger({"m": Covariance(torch.eye(3))}).add(Request("Ann", {"m": torch.ones(1, 3)}, torch.ones(1, 2)))
    return {
        "edit": str(an_edit(model, folder / "a.safetensors")),
        "other": str(an_edit(model, folder / "b.safetensors", scale=2.0)),
        "ledger": str(book.save(folder / "ledger.safetensors")),
        "localization": str(Localization.of(["blocks.0.mlp.W_out"]).save(folder / "l.safetensors")),
        "model": str(model),
        "run": str(run),
    }


LOOKING = (
    "list", "list editors --format json", "list localizers", "list evaluations --format json",
    "show {edit}", "show {ledger}", "show {localization}", "show {run}", "show {run} --format json",
    "diff {edit} {other}", "diff {edit} {other} --format json", "diff {model} {model}", "diff {model} {edit}",
    "diff testbed:dense testbed:dense-oracle",
)  # fmt: skip


@pytest.mark.parametrize("words", LOOKING)
def test_looking_loads_no_model_library(words: str, files: dict[str, str]) -> None:
    code = PROBE.format(root=str(ROOT), words=words.format(**files).split(), heavy=MODEL_LIBRARIES)

    def once() -> float:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stderr.strip().splitlines()[-1].split(" ", 1)[1] == "0 []"
        assert done.stdout
        return time.perf_counter() - start

    # The best of some tries: a busy machine must not fail this.
    assert once() < 1.5 or min(once() for _ in range(4)) < 1.5
