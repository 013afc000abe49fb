"""JSON that others wrote: decoded, or one line that says where it is broken. Imports nothing heavy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from excise.errors import DamagedFile


def why(error: Exception, *, lines: bool = True) -> str:
    """Why a text could not be decoded, in a few words; with the line where `lines`."""
    match error:
        case json.JSONDecodeError():
            place = f"line {error.lineno} column {error.colno}" if lines else f"column {error.colno}"
            return f"{error.msg.removesuffix(' at')} at {place}"
        case UnicodeDecodeError():
            return f"byte {error.start} is not UTF-8"
        case RecursionError():
            return "nested too deep"
    # Python refuses to read whole numbers of thousands of digits.
    return "a number of too many digits" if "integer string conversion" in str(error) else str(error)


def decoded(text: str | bytes, where: str | Path) -> Any:
    """The value of a JSON text. Raises DamagedFile that begins with `where`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError, TypeError) as error:
        raise DamagedFile(f"{where}: not JSON ({why(error)}); make it again or copy it again") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DamagedFile for anything else, OSError when it cannot be read."""
    found = decoded(Path(path).read_bytes(), path)
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: not a JSON object; make it again or copy it again")
    return found


__all__ = ["decoded", "read_object", "why"]
