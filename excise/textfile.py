"""Plain texts in a file: one a line, or JSON Lines with "text". Read again and again without being held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from excise.errors import DamagedFile, ExciseError
from excise.jsonfile import decoded

JSON_LINES = (".jsonl", ".ndjson")


class TextFile:
    """The texts of a file, in order; every loop reads the file anew.

    A .jsonl or .ndjson file holds a text, or an object with "text", a line; any other file is a text a line. Empty lines
    are no texts. Raises FileNotFoundError, DamagedFile with file and line, and ExciseError for a file without any text,
    all when it is made: the file is read through once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'{path}: no such file; give one with a text a line, or JSON Lines with "text"')
        self.count = sum(1 for _ in self)
        if not self.count:
            raise ExciseError(f'{path}: no text in it; give a text a line, or JSON Lines with "text"')

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[str]:
        read = _json if self.path.suffix in JSON_LINES else _line
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = read(line.rstrip(b"\r\n"), f"{self.path}:{number}")
                if text.strip():
                    yield text


def _line(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error


def _json(line: bytes, where: str) -> str:
    if not line.strip():
        return ""
    found: Any = decoded(_line(line, where), where)
    text = found.get("text") if isinstance(found, dict) else found
    if not isinstance(text, str):
        raise DamagedFile(f'{where}: neither a text nor an object with "text"')
    return text
