"""What a person at a terminal may do with a finished run: talk to both models, take another try, save, export."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from excise.commands import common
from excise.commands.ask import answers
from excise.errors import ExciseError

if TYPE_CHECKING:
    from excise.chain import Run
    from excise.edits import Edit

CHOICES = "[a]sk before and after  [t]ake another try  [s]ave the edit  [e]xport a checkpoint  [q]uit"

# Tokens of an answer.
LENGTH = 40


def is_terminal() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def offer(run: Run) -> None:
    """Ask what to do with the edit until the answer is to quit; the run folder stays as it is."""
    edit, name = run.edit, run.search["chosen"] if run.search else run.inputs.editor
    while True:
        print(f"\n{common.printable(name)}: {CHOICES}")
        answer = _typed("> ")[:1].lower()
        match answer:
            case "" | "q":
                return
            case "a":
                _ask(run, edit)
            case "t":
                edit, name = _other(run, edit, name)
            case "s":
                _into("save it as (.safetensors): ", edit.save)
            case "e":
                _into("write the checkpoint into: ", partial(_export, run, edit))


def _typed(prompt: str) -> str:
    """A line; empty at the end of input."""
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def _ask(run: Run, edit: Edit) -> None:
    while question := _typed("question (empty: back): "):
        (said,) = answers(run.inputs.model, edit, [question], LENGTH)
        print(f"before  {common.printable(said['before'])}\nafter   {common.printable(said['edited'])}")


def _other(run: Run, edit: Edit, name: str) -> tuple[Edit, str]:
    """Another try of the search, by its number in the list."""
    from excise.edits import Edit as Stored

    tried = [t for t in (run.search or {}).get("trials", ()) if not t["reason"]]
    if not tried:
        print("nothing else was tried: run without --editor to search")
        return edit, name
    rows = [{"number": t["number"], "try": t["name"], "still said": t["forget"], "damage": t["damage"],
             "inside": t["residual"]} for t in tried]  # fmt: skip
    common.print_rows(rows)
    wanted = _typed("number (empty: back): ")
    found = next((t for t in tried if str(t["number"]) == wanted), None)
    if found is None:
        return edit, name
    return Stored.load(run.inputs.out / "trials" / f"{found['key']}.safetensors"), found["name"]


def _export(run: Run, edit: Edit, path: str) -> Path:
    from excise.checkpoint import export

    return export(run.inputs.model, edit, path)


def _into(prompt: str, write: Callable[[str], Path]) -> None:
    path = _typed(prompt)
    if not path:
        return
    try:
        print(f"written: {write(path)}")
    except (ExciseError, OSError, ValueError) as error:
        print(f"not written: {error}")
