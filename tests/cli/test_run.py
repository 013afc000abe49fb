"""excise run as a person has it: interrupted, killed, taken up again, and talked to at a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Cli

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 240


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "excise.cli", "run", *map(str, words)]


def ended(words: list[str], wait_for: Callable[[], bool], by: signal.Signals) -> tuple[int, str]:
    """Start a run, wait for something on the disk, end it; its exit code and what it said."""
    run = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=_heeding
    )
    ends = time.monotonic() + PATIENCE
    while not wait_for() and run.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    assert run.poll() is None, f"it ended by itself: {run.communicate()[1]}"
    run.send_signal(by)
    said = run.communicate(timeout=PATIENCE)[1]
    return run.returncode, said


def _heeding() -> None:
    """What a shell starts in the background is born deaf to Ctrl-C, and so are its children: not this one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def words(model_folder: Path, facts_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    out = tmp_path_factory.mktemp("run") / "run"
    return out, [facts_file, "--model", model_folder, "--out", out, "--trials", 2, "--limit", 1]


@pytest.mark.slow
def test_ctrl_c_and_a_kill_lose_the_item_in_flight_at_most(cli: Cli, words: tuple[Path, list[object]]) -> None:
    out, asked = words

    def finished() -> list[Path]:
        return sorted((out / "trials").glob("*.json"))

    code, said = ended(command(*asked), lambda: len(finished()) > 0, signal.SIGINT)
    assert code == 130 and "run the same command again" in said and "Traceback" not in said
    tried = {p: p.stat().st_mtime_ns for p in finished()}

    def items() -> list[str]:
        file = out / "results.jsonl"
        return [x for x in file.read_text().split("\n")[:-1] if '"scores"' in x] if file.is_file() else []

    code, _ = ended(command(*asked), lambda: len(items()) > 1, signal.SIGKILL)
    assert code == -signal.SIGKILL and not (out / "report.html").exists()
    kept = items()
    assert cli("run", *asked).code == 0 and (out / "report.html").is_file() and (out / "model_card.md").is_file()
    assert tried and all(p.stat().st_mtime_ns == then for p, then in tried.items()), "a finished try was made again"
    assert all(f'"key": "{x.split(chr(34))[3]}"' in (out / "results.jsonl").read_text() for x in kept[:1])
    assert not [p for p in out.rglob("*") if p.name.endswith((".tmp", ".part")) or p.stat().st_size == 0]


@pytest.mark.slow
def test_at_a_terminal_one_may_go_on(words: tuple[Path, list[object]], tmp_path: Path) -> None:
    """Through a pty: ask both models, take another try, save it, export it, quit."""
    out, asked = words
    main, side = pty.openpty()
    run = subprocess.Popen(command(*asked, "--quiet"), cwd=ROOT, stdin=side, stdout=side, stderr=side, close_fds=True)
    os.close(side)
    seen = ""

    def answer(prompt: str, line: str) -> str:
        """Wait for a prompt, type a line; what was shown before the prompt."""
        nonlocal seen
        ends = time.monotonic() + PATIENCE
        while prompt not in seen:
            assert select.select([main], [], [], max(0.0, ends - time.monotonic()))[0], seen
            seen += os.read(main, 1 << 16).decode()
        shown, _, seen = seen.partition(prompt)
        os.write(main, f"{line}\n".encode())
        return shown

    try:
        assert "[t]ake another try" in answer("\n> ", "a")
        answer("question (empty: back): ", "Ann Lee lives in")
        said = answer("question (empty: back): ", "")
        assert "before  " in said and "after   " in said
        answer("> ", "t")
        assert "still said" in answer("number (empty: back): ", "0")
        answer("> ", "s")
        answer("save it as (.safetensors): ", str(tmp_path / "mine.safetensors"))
        assert "written: " in answer("> ", "e")
        answer("write the checkpoint into: ", str(out))
        assert "not written: " in answer("> ", "q"), "a folder that is in use is no place for a checkpoint"
        assert run.wait(PATIENCE) == 0
    finally:
        run.kill()
        os.close(main)
    assert (tmp_path / "mine.safetensors").is_file()


def test_without_a_terminal_nothing_is_asked(cli: Cli, words: tuple[Path, list[object]]) -> None:
    said = cli("run", *words[1])
    assert said.code == 0 and "[q]uit" not in said.out
    assert "excise ask" in said.out and "..." not in said.out.split("talk")[1].split("\n")[0]
    assert "wide intervals" in said.err


def test_what_the_doctor_finds_is_told_before_the_long_part(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from excise.commands.run import _examined
    from excise.model import Model
    from tiny import tiny_model

    model = Model(*tiny_model("llama"), "tiny")
    monkeypatch.setattr("excise.doctor._problems", lambda report: ["some weights are offloaded"])
    assert _examined(model) is model
    assert "tiny: some weights are offloaded" in capsys.readouterr().err
