"""The report: one HTML page that says what was measured, with no network, and the small tables of notebooks and
terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise import sections
from excise.facts import Fact, Facts
from excise.feature_cards import FeatureCard, cards_section
from excise.files import write_text
from excise.fragments import edit_table, facts_table, localization_table, mappings_table, results_table, text_table
from excise.page import Raw, document, pairs, table, tag
from excise.scores import Localization, Results
from excise.verdict import Verdict, verdict

__all__ = ["edit_table", "facts_table", "localization_table", "results_table", "text_table", "verdict", "write_report"]

# A page of more is slow to open and nobody reads it; what is left out is said.
MOST_SAMPLES, MOST_MAPS = 30, 1
MARKS = {"good": "✓", "bad": "✗", "unclear": "?", "unmeasured": "–"}  # noqa: RUF001


def write_report(
    path: str | Path,
    *,
    facts: Sequence[Fact] = (),
    localization: Localization | None = None,
    traced: Localization | None = None,
    edit: Any = None,
    results: Results | None = None,
    verification: Any = None,
    recipe: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    search: Mapping[str, Any] | None = None,
    features: Sequence[FeatureCard] = (),
    title: str = "",
) -> Path:
    """Write one self-contained page and return its path; a folder gets `report.html`. What is None is left out.

    traced: a second localization, one with maps over tokens and layers, where the first has none.
    edit: anything with `summary()`, a list of rows. verification: anything with `rows()` and a text, or a mapping.
    recipe: how to reproduce: "command", "versions", "seeds", "fingerprints", "undo", "roles" and whatever else was
        recorded.
    samples: prompts with each arm's own words, one mapping per prompt.
    search: what was tried before the edit was chosen, as in search.json.
    features: cards of the dictionary features that the edit is about, as `sae.cards` makes them.
    """
    recipe = dict(recipe or {})
    target = Path(path)
    target = target if target.suffix == ".html" else target / "report.html"
    title = title or str(recipe.get("title") or "What was forgotten, and what was not")
    measured = results if results is not None and results.scores else None
    parts = [
        ("results", "Arms and measures", sections.measures(measured)),
        ("attacks", "What attacks bring back", sections.attacks(measured)),
        ("forms", "Recall by form", sections.forms(measured)),
        ("where", "Where the facts were found", [*_where(localization), *_where(traced)]),
        ("features", "Features of the dictionary", cards_section(features)),
        ("inside", "What the inner layers still show", sections.layers(measured)),
        ("tried", "What was tried", _tried(search)),
        ("change", "What was changed", _change(edit, verification)),
        ("fates", "What became of each fact", sections.fate_by_fact(measured, recipe)),
        ("facts", "Fact by fact", sections.answers(facts, measured)),
        ("samples", "In the model's own words", _samples(samples)),
        ("again", "Reproduce", _reproduce(recipe)),
        ("undo", "Undo", _undo(recipe, measured)),
    ]
    present = [(key, name, body) for key, name, body in parts if body]
    body = tag(
        "main", _top(title, verdict(results, recipe), facts, [p[:2] for p in present]), *(_section(*p) for p in present)
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_text(target, document(title, [body]))


# --- sections


def _top(title: str, said: Verdict, facts: Sequence[Fact], links: Sequence[tuple[str, str]]) -> Raw:
    toggle = tag("button", "light / dark", id="theme", type="button", hidden="hidden")
    counts = Facts(facts).counts if facts else {}
    asked = ", ".join(f"{n} {group}" for group, n in counts.items())
    if unseen := len(Facts(facts).checks.subjects):
        asked += f"; {unseen} of the people to keep were never shown to the editor"
    findings = (
        tag("ul", *(_finding(f.question, f.state, f.text) for f in said.findings), class_="findings")
        if said.findings
        else Raw("")
    )
    menu = tag("nav", *(Raw(tag("a", name, href=f"#{key}") + "\n") for key, name in links), aria_label="Sections")
    parts = [tag("header", tag("h1", title), toggle), tag("p", said.headline, class_=f"headline {said.state}")]
    if asked:
        parts.append(tag("p", f"Facts: {asked}.", class_="soft"))
    return Raw("\n".join([*parts, findings, menu]))


def _finding(question: str, state: str, text: str) -> Raw:
    return tag(
        "li",
        tag("span", MARKS[state], class_="mark", aria_label=state),
        tag("b", question),
        tag("p", text),
        class_=state,
    )


def _section(key: str, name: str, body: Sequence[Raw]) -> Raw:
    return Raw("\n" + tag("section", tag("h2", name), *body, id=key))


def _where(localization: Localization | None) -> list[Raw]:
    if localization is None:
        return []
    from excise.plots import map_figures, plot_ranking, unit_figures

    method = str(localization.recipe.get("method", "?"))
    facts, sites = len(localization.fact_ids), len(localization.sites)
    parts = [tag("p", f"Method: {method}; {facts} fact{'s' * (facts != 1)}, {sites} site{'s' * (sites != 1)}.")]
    if not sites or localization.recipe.get("n") == 0:
        reasons = [str(s.get("reason", "")) for s in localization.recipe.get("skipped", ())]
        return [
            *parts,
            tag("p", f"Nothing was found: {'; '.join(dict.fromkeys(reasons[:3])) or 'no fact was traced'}."),
        ]
    if localization.maps:
        parts += [
            tag(
                "p",
                "Tokens run down, layers across; the subject carries stars. "
                "Darker: restoring this state alone brings more of the answer back.",
            ),
            sections.figures(map_figures(localization)),
        ]
        for found in localization.maps[:MOST_MAPS]:
            parts.append(
                tag(
                    "details",
                    tag("summary", f"The map of {found.fact_id}"),
                    sections.figures(map_figures(localization, found.fact_id)),
                )
            )
    else:
        note = "Mean scores of parts and units by layer; grey: none there, or negative."
        units = unit_figures(localization)
        parts += [tag("p", note, class_="soft")] if units else []
        parts += [sections.figures([plot_ranking(localization)]), sections.figures(units)]
    return [*parts, localization_table(localization, rows=12)]


def _tried(search: Mapping[str, Any] | None) -> list[Raw]:
    if not search:
        return []
    from excise.plots import plot_tradeoff

    audited = search.get("audited", {})
    rows = []
    for trial in sorted(search["trials"], key=lambda t: (not t["chosen"], not t["front"], t["number"])):
        mark = (
            "chosen"
            if trial["chosen"]
            else "audited"
            if trial["name"] in audited
            else "front"
            if trial["front"]
            else ""
        )
        figures = [trial.get(k) for k in ("forget", "damage", "residual")]
        rows.append([trial["name"], mark, *figures, audited.get(trial["name"], {}).get("distance"), trial["reason"]])
    note = (
        "Each try is judged on wordings that were taught: what is still said, what others have lost, and what is still inside: "
        "found there by the logit lens beyond chance, or said again with the edited parts left out. The best few were audited, "
        "on held-out wordings and people too; the nearest to the target was chosen."
    )
    columns = ["try", "standing", "still said", "damage", "inside", "distance in the audit", "why not"]
    return [
        tag("p", note, class_="soft"),
        sections.figures([plot_tradeoff(search["trials"])]),
        table(columns, rows, sortable=True),
    ]


def _change(edit: Any, verification: Any) -> list[Raw]:
    parts = [] if edit is None else [edit_table(edit), *([pairs(edit.recipe)] if getattr(edit, "recipe", None) else [])]
    if verification is not None:
        parts.append(tag("h3", "Verification"))
        if isinstance(verification, Mapping):
            parts.append(pairs(verification))
        else:
            parts.append(tag("p", str(verification)))
            rows = verification.rows() if hasattr(verification, "rows") else []
            parts += [mappings_table(rows)] if rows else []
    return parts


def _samples(samples: Sequence[Mapping[str, Any]]) -> list[Raw]:
    return [mappings_table(samples[:MOST_SAMPLES])] if samples else []


def _reproduce(recipe: Mapping[str, Any]) -> list[Raw]:
    rest = {k: v for k, v in recipe.items() if k not in ("command", "undo", "title", "roles")}
    command = [tag("pre", tag("code", str(recipe["command"])))] if recipe.get("command") else []
    return [*command, *([pairs(rest)] if rest else [])]


def _undo(recipe: Mapping[str, Any], results: Results | None) -> list[Raw]:
    if recipe.get("undo"):
        return [tag("p", str(recipe["undo"]))]
    modes = set(results.modes.values()) if results is not None else set()
    if not modes & {"weight", "hook"}:
        return []
    text = "The original model was not written to: load it without the edit."
    if "weight" in modes:
        text += (
            " In Python, a baked edit is taken back to the bit by revert() of what bake() returned; "
            "an exported checkpoint is undone by using the original one."
        )
    return [tag("p", text)]
