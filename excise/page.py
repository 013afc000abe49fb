"""HTML and terminal text: escaping, tables, and the shell of a page that needs nothing but itself. It knows no
results.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple


class Raw(str):
    """Text that is HTML already; every other string is escaped on its way into a page."""


class Cell(NamedTuple):
    """A table cell with the value that it is sorted by."""

    html: Raw
    sort: float


def plain(text: object) -> str:
    """Text for one line of a terminal or a label: line breaks become spaces, control and direction characters go."""
    spaced = re.sub(r"[\r\n\t\v\f\u2028\u2029]+", " ", str(text))
    return "".join(c for c in spaced if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))


def esc(text: object) -> Raw:
    """The text with everything that HTML gives a meaning escaped; `Raw` passes unchanged."""
    return text if isinstance(text, Raw) else Raw(html.escape(plain(text), quote=True))


def number(value: float | None) -> str:
    """A number as a table shows it; an en dash for what was not measured."""
    if value is None or math.isnan(value):
        return "–"  # noqa: RUF001
    if value == 0 or 0.1 <= abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 0.1 else f"{value:.2g}" if abs(value) < 0.1 else f"{value:.4g}"


def tag(name: str, *content: object, **attributes: object) -> Raw:
    """An element; contents are escaped unless `Raw`. Attribute names lose a trailing underscore, `_` becomes `-`."""
    named = "".join(f' {k.rstrip("_").replace("_", "-")}="{esc(v)}"' for k, v in attributes.items() if v is not None)
    return Raw(f"<{name}{named}>{''.join(esc(c) for c in content)}</{name}>")


def table(
    columns: Sequence[object], rows: Sequence[Sequence[object]], *, caption: str = "", sortable: bool = False
) -> Raw:
    """A table in a box that scrolls by itself; numbers are aligned right, the first column heads its row."""
    numeric = [bool(rows) and all(_is_number(row[i]) or row[i] is None for row in rows) for i in range(len(columns))]
    head = tag(
        "tr",
        *(
            tag(
                "th",
                tag("button", c, type="button") if sortable else c,
                scope="col",
                class_="number" if right else None,
            )
            for c, right in zip(columns, numeric, strict=True)
        ),
    )
    body = Raw("\n".join(tag("tr", *(_cell(v, i == 0, numeric[i]) for i, v in enumerate(row))) for row in rows))
    title = tag("caption", caption) if caption else Raw("")
    whole = tag(
        "table", title, tag("thead", head), Raw("\n"), tag("tbody", body), class_="sortable" if sortable else None
    )
    return tag("div", whole, class_="scroll", tabindex="0")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Cell)) and not isinstance(value, bool)


def _cell(value: object, first: bool, right: bool) -> Raw:
    shown: object = value
    sort: object = None
    if isinstance(value, Cell):
        shown, sort = value
    elif isinstance(value, float):
        shown, sort = number(value), value
    elif value is None:
        shown = "–"  # noqa: RUF001
    kind = "number" if right or _is_number(value) else "words" if isinstance(value, str) and len(value) > 40 else None
    if first:
        return tag("th", shown, scope="row", data_value=sort)
    return tag("td", shown, class_=kind, data_value=sort)


def pairs(values: Mapping[str, Any]) -> Raw:
    """A definition list of a mapping; mappings and lists inside are written out in one line each."""
    return tag("dl", *(part for k, v in values.items() for part in (tag("dt", k), tag("dd", _inline(v)))))


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_inline(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_inline(v) for v in value)
    return number(value) if isinstance(value, float) else str(value)


def document(title: str, body: Sequence[Raw]) -> str:
    """One self-contained page: its style and script inside, and a policy that forbids to fetch anything."""
    style, script = (
        resources.files("excise").joinpath(f"report.{ending}").read_text("utf-8") for ending in ("css", "js")
    )
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Figures carry style attributes, hence unsafe-inline for styles; scripts run by their hash only.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = (
        Raw('<meta charset="utf-8">\n'),
        Raw(f'<meta http-equiv="Content-Security-Policy" content="{esc(policy)}">\n'),
        Raw('<meta name="viewport" content="width=device-width, initial-scale=1">\n'),
        Raw('<meta name="referrer" content="no-referrer">\n'),
        Raw('<meta name="color-scheme" content="light dark">\n'),
        tag("title", title),
        Raw(f"\n<style>{style}</style>\n"),
    )
    page = tag("head", *head) + "\n" + tag("body", *body, Raw(f"\n<script>{script}</script>\n"))
    return f'<!DOCTYPE html>\n<html lang="en">\n{page}\n</html>\n'


def grid(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of plain text for a terminal: control characters stripped, wide characters counted as two."""
    cells = [
        [number(c) if isinstance(c, float) else plain("" if c is None else c) for c in row]
        for row in (list(columns), *rows)
    ]
    widths = [max(_width(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(columns))]
    lines = []
    for line in cells:
        padded = [
            " " * (w - _width(c)) + c if right else c + " " * (w - _width(c))
            for c, w, right in zip(line, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
