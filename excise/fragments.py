"""Small tables: HTML fragments for notebooks and the report, plain text for terminals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from excise.comparison import arm_role
from excise.facts import GROUPS, Facts
from excise.page import Cell, Raw, esc, grid, number, table, tag
from excise.scores import Localization, Results, Row

MOST_ROWS = 30
# Evaluations in the order in which they are read; others follow.
ORDER = ("recall", "probability", "refusal", "form_spread", "drift", "lens", "probe")
# What one hopes for: by evaluation, start of the variant and group.
WANTED = {
    ("recall", "", "forget"): "low",
    ("probability", "", "forget"): "as oracle",
    ("refusal", "", "forget"): "as oracle",
    ("form_spread", "easiest", "forget"): "as oracle",
    ("form_spread", "hardest", "forget"): "as oracle",
    ("lens", "hit", "forget"): "as oracle",
    ("probe", "refit", "forget"): "as oracle",
    ("probe", "transfer", "forget"): "as oracle",
    ("refusal", "", "unknown"): "high",
    ("refusal", "", "retain"): "low",
    ("refusal", "", "neighbour"): "low",
    ("drift", "kl", ""): "low",
    ("drift", "relative", ""): "near 0",
    ("recall", "", ""): "as before",
    ("probability", "", ""): "as before",
    ("form_spread", "hardest", ""): "as before",
}


def results_table(results: Results) -> Raw:
    """Measures down, arms across, each with interval and n; forms pooled, single layers left to the figures."""
    from excise.plots import result_panels

    heads = ["measure", *(arm_label(a, results.modes.get(a, "")) for a in results.arms)]
    lines = []
    for title, rows in sorted(result_panels(results).items(), key=lambda panel: _place(panel[1][0].evaluation, ORDER)):
        for group in sorted({r.group for r in rows}, key=lambda g: _place(g, GROUPS)):
            found = {r.arm: r for r in rows if r.group == group}
            cells = [interval_cell(found[a]) if a in found else None for a in results.arms]
            wanted = _wanted(rows[0].evaluation, rows[0].variant, group)
            note = f"{group or 'all'} facts{f', wanted: {wanted}' if wanted else ''}"
            lines.append([Raw(esc(title.replace("_", " ")) + tag("small", note)), *cells])
    skipped = {
        f"{k[1]}: {s.reason}" for k, scores in results.scores.items() for s in scores if s.value is None and s.reason
    }
    lost = tag(
        "details",
        tag("summary", f"Not measured ({len(skipped)} reasons)"),
        tag("ul", *(tag("li", s) for s in sorted(skipped)[:MOST_ROWS])),
    )
    return Raw(table(heads, lines, sortable=True) + (lost if skipped else ""))


def _place(name: str, order: Sequence[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order)), name


def _wanted(evaluation: str, variant: str, group: str) -> str:
    for (name, start, of), text in WANTED.items():
        if name == evaluation and variant.startswith(start) and of in ("", group) and (of or group != "unknown"):
            return text
    return ""


def arm_label(name: str, mode: str = "") -> Raw:
    """The name of an arm with its sign and how it holds its change."""
    held = f" ({mode})" if mode not in ("", "none") else ""
    return Raw(tag("i", class_=f"arm {arm_role(name)}") + esc(name + held))


def interval_cell(row: Row) -> Cell:
    """Value, interval and n of a row."""
    bracket = tag("small", f"[{number(row.low)}, {number(row.high)}] n {row.n}")
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


def mappings_table(rows: Sequence[Mapping[str, Any]]) -> Raw:
    """Rows of like keys as an HTML table."""
    names = list(dict.fromkeys(k for row in rows for k in row))
    return table(names, [[_plain(row.get(k)) for k in names] for row in rows])


def _plain(value: Any) -> object:
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _more(shown: Raw, left: int) -> Raw:
    return Raw(shown + tag("p", f"and {left} more", class_="soft")) if left > 0 else shown
