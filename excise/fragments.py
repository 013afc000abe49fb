"""Small tables: HTML fragments for notebooks and the report, plain text for terminals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from excise.comparison import arm_role
from excise.facts import Facts
from excise.page import Cell, Raw, esc, grid, number, table, tag
from excise.scores import Localization, Results, Row

if TYPE_CHECKING:
    from excise.overview import Line, Part

MOST_ROWS = 30


def results_table(results: Results) -> Raw:
    """Measures down, arms across, each with interval and n: family by family what is read first, the rest folded.

    Forms are pooled, single layers are left to the figures; numbers that are made of many scores come last.
    """
    from excise.overview import overview

    skipped = {
        f"{k[1]}: {s.reason}" for k, scores in results.scores.items() for s in scores if s.value is None and s.reason
    }
    lost = tag(
        "details",
        tag("summary", f"Not measured ({len(skipped)} reasons)"),
        tag("ul", *(tag("li", s) for s in sorted(skipped)[:MOST_ROWS])),
    )
    return Raw("".join(_part(part, results) for part in overview(results)) + (lost if skipped else ""))


def _part(part: Part, results: Results) -> Raw:
    rest = tag("details", tag("summary", f"{len(part.rest)} more measures"), _lines(part.rest, results))
    return tag(
        "details",
        tag("summary", tag("b", part.title), Raw(" "), tag("span", part.said)),
        _lines(part.first, results),
        rest if part.rest else Raw(""),
        class_="family",
        open="open",
    )


def _lines(lines: Sequence[Line], results: Results) -> Raw:
    heads = ["measure", *(arm_label(a, results.modes.get(a, "")) for a in results.arms)]
    rows = [
        [
            Raw(esc(line.name) + tag("small", line.note)),
            *(interval_cell(line.rows[a]) if a in line.rows else None for a in results.arms),
        ]
        for line in lines
    ]
    return table(heads, rows, sortable=True)


def arm_label(name: str, mode: str = "") -> Raw:
    """The name of an arm with its sign and how it holds its change."""
    held = f" ({mode})" if mode not in ("", "none") else ""
    return Raw(tag("i", class_=f"arm {arm_role(name)}") + esc(name + held))


def interval_cell(row: Row) -> Cell:
    """Value, interval and n of a row."""
    inside = f"[{number(row.low)}, {number(row.high)}] " if row.low == row.low else ""  # NaN: it has no interval
    bracket = tag("small", inside, tag("span", f"n {row.n}"))
    skipped = tag("small", f"{row.n_skipped} not measured") if row.n_skipped else ""
    return Cell(Raw(tag("b", number(row.value)) + bracket + skipped), float(row.value))


def facts_table(facts: Facts, *, rows: int = MOST_ROWS) -> Raw:
    """Facts as an HTML table: group, subject, relation, answer, number of prompts, the direct prompt."""
    lines = [[f.id, f.group, f.subject, f.relation, f.answer, len(f.prompts), f.prompt.text] for f in facts[:rows]]
    return _more(
        table(["fact", "group", "subject", "relation", "answer", "prompts", "direct prompt"], lines), len(facts) - rows
    )


def localization_table(localization: Localization, *, rows: int = MOST_ROWS) -> Raw:
    """The best sites as an HTML table: site, layer, mean score over the facts."""
    best = localization.top(rows)
    lines = [[str(s), s.layer, float(v)] for s, v in zip(best.sites, best.average, strict=True)]
    return _more(table(["site", "layer", "mean score"], lines), len(localization.sites) - rows)


def edit_table(edit: Any, *, rows: int = 200) -> Raw:
    """The changes of an edit as an HTML table, from `edit.summary()`."""
    summary = edit.summary()
    return _more(mappings_table(summary[:rows]), len(summary) - rows)


def text_table(rows: Sequence[Row] | Sequence[Mapping[str, Any]]) -> str:
    """Result rows (or mappings) as plain text for a terminal, control characters stripped."""
    if not rows:
        return "(nothing)"
    if isinstance(rows[0], Mapping):
        names = list(dict.fromkeys(k for row in rows for k in row))  # type: ignore[union-attr]
        return grid(names, [[row.get(k) for k in names] for row in rows])  # type: ignore[union-attr]
    found = [dataclasses.asdict(r) for r in rows]  # type: ignore[arg-type]
    keys = [k for k in ("arm", "mode", "evaluation", "group", "form", "variant") if any(r[k] for r in found)]
    held = any(r["held_out"] for r in found)
    lines = [
        [
            *(r[k] for k in keys),
            *(["held out" if r["held_out"] else ""] if held else []),
            r["value"],
            f"[{number(r['low'])}, {number(r['high'])}]",
            r["n"],
        ]
        for r in found
    ]
    return grid([*keys, *(["split"] if held else []), "value", "95 % interval", "n"], lines)


def text_overview(results: Results, *, whole: bool = False) -> str:
    """The same for a terminal: each family's sentence and headline rows; all rows when `whole`."""
    from excise.overview import overview

    found = []
    for part in overview(results):
        shown = [*part.first, *(part.rest if whole else ())]
        cells = [[x.name, x.group, *(_bracketed(x.rows.get(a)) for a in results.arms)] for x in shown]
        found.append(f"{part.title}. {part.said}".strip() + "\n" + grid(["measure", "facts", *results.arms], cells))
        if len(shown) < len(part.first) + len(part.rest):
            found[-1] += f"\n({len(part.rest)} more)"
    return "\n\n".join(found) or "(nothing was measured)"


def _bracketed(row: Row | None) -> str:
    if row is None:
        return ""
    inside = f" [{number(row.low)}, {number(row.high)}]" if row.low == row.low else ""
    return number(row.value) + inside


def mappings_table(rows: Sequence[Mapping[str, Any]]) -> Raw:
    """Rows of like keys as an HTML table."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    return table(names, [[_plain(row.get(k)) for k in names] for row in rows])


def _plain(value: Any) -> object:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _more(shown: Raw, left: int) -> Raw:
    return Raw(shown + tag("p", f"and {left} more", class_="soft")) if left > 0 else shown
