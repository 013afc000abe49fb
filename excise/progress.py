"""Chatter on stderr: lines that say what happens, and a bar with the remaining time when someone is watching."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """Drop everything but errors from now on."""
    global _quiet
    _quiet = quiet


def say(text: str) -> None:
    """One line for the person at the terminal; results never go through here."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def bar(items: Iterable[Item], *, total: int | None = None, what: str = "", done: int = 0) -> Iterator[Item]:
    """The same items, with a progress bar on a terminal and nothing at all elsewhere.

    done: items that an earlier run finished; they count for the bar but not for the remaining time.
    """
    if _quiet or not sys.stderr.isatty():
        # Not even a disabled tqdm: its lock is shared with forked children, and one that is killed may never give it back.
        yield from items
        return
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=what, initial=done, file=sys.stderr, leave=False)
