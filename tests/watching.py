"""What a piece of code writes, deletes, starts, connects to and executes, as Python's audit events tell it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event to the arguments that are paths which it changes.
CHANGES = {
    "os.mkdir": (0,), "os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,), "os.symlink": (1,),
    "os.truncate": (0,), "os.chmod": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1),
}  # fmt: skip
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "pickle.find_class")
TALKS = ("socket.connect", "socket.getaddrinfo", "socket.bind")

_watching: list[tuple[list[str], tuple[str, ...], str]] = []


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if not _watching:
        return
    found, allowed, inputs = _watching[-1]
    if event in STARTS or event in TALKS:
        found.append(f"{event} {args!r}"[:300])
    elif event == "exec" and isinstance(args[0], CodeType) and args[0].co_filename.startswith(inputs):
        found.append(f"executes {args[0].co_filename}")
    elif event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITING:
        _judge(found, allowed, "opens for writing", args[0])
    elif event in CHANGES and not (event == "os.mkdir" and os.path.exists(args[0])):
        for i in CHANGES[event]:
            _judge(found, allowed, event, args[i])


def _judge(found: list[str], allowed: tuple[str, ...], what: str, path: Any) -> None:
    if isinstance(path, (str, bytes, os.PathLike)):
        real = os.path.realpath(os.fsdecode(path))
        # Python's own caches of compiled modules are not what a run writes.
        if real != os.devnull and "__pycache__" not in real and not any(_inside(real, a) for a in allowed):
            found.append(f"{what} {real}")


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


@contextmanager
def watched(*allowed: Path, inputs: Path) -> Iterator[list[str]]:
    """The list of what happens in the block, besides changes of and under `allowed`; code from `inputs` counts as well.

    Blind to what libraries do in C; whoever needs that compares folders before and after.
    """
    if _hook not in _installed:
        sys.addaudithook(_hook)  # for good: Python takes no hook back
        _installed.append(_hook)
    found: list[str] = []
    _watching.append((found, tuple(os.path.realpath(a) for a in allowed), str(inputs)))
    try:
        yield found
    finally:
        _watching.pop()


_installed: list[Any] = []
