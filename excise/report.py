"""The report: one HTML page that says what was measured, with no network, and the small tables of notebooks and
terminals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from excise.facts import Fact, Facts
from excise.fates import counted, fates
from excise.feature_cards import FeatureCard, cards_section
from excise.files import write_text
from excise.findings import FORMS
from excise.fragments import (
    arm_label,
    edit_table,
    facts_table,
    interval_cell,
    localization_table,
    mappings_table,
    results_table,
    text_table,
)
from excise.page import Raw, document, esc, pairs, table, tag
from excise.scores import Localization, Results, Score
from excise.statistics import aggregate
from excise.verdict import Verdict, verdict

__all__ = ["edit_table", "facts_table", "localization_table", "results_table", "text_table", "verdict", "write_report"]

# A page of more is slow to open and nobody reads it; what is left out is said.
MOST_FACTS, MOST_SAMPLES, MOST_MAPS = 200, 30, 1
MARKS = {"good": "✓", "bad": "✗", "unclear": "?", "unmeasured": "–"}  # noqa: RUF001


def write_report(
    path: str | Path,
    *,
    facts: Sequence[Fact] = (),
    localization: Localization | None = None,
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
    sections = [
        ("results", "Arms and measures", _measures(measured)),
        ("forms", "Recall by form", _forms(measured)),
        ("where", "Where the facts were found", _where(localization)),
        ("features", "Features of the dictionary", cards_section(features)),
        ("inside", "What the inner layers still show", _layers(measured)),
        ("tried", "What was tried", _tried(search)),
        ("change", "What was changed", _change(edit, verification)),
        ("fates", "What became of each fact", _fates(measured, recipe)),
        ("facts", "Fact by fact", _facts(facts, measured)),
        ("samples", "In the model's own words", _samples(samples)),
        ("again", "Reproduce", _reproduce(recipe)),
        ("undo", "Undo", _undo(recipe, measured)),
    ]
    present = [(key, name, body) for key, name, body in sections if body]
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


def _measures(results: Results | None) -> list[Raw]:
    if results is None:
        return []
    from excise.plots import bar_figure, result_panels

    note = (
        "95 % intervals in brackets: subjects are resampled with all their prompts. "
        "Forms are pooled here and apart below."
    )
    wanted = [("recall", ""), ("refusal", ""), ("form_spread", "easiest form"), ("probability", "")]
    panels = {
        title: rows for title, rows in result_panels(results).items() if (rows[0].evaluation, rows[0].variant) in wanted
    }
    return [
        tag("p", note, class_="soft"),
        results_table(results),
        _figures([bar_figure(results, t, rows) for t, rows in panels.items()]),
    ]


def _forms(results: Results | None) -> list[Raw]:
    if results is None or "recall" not in results.evaluations:
        return []
    from excise.plots import plot_before_after

    only = Results({k: v for k, v in results.scores.items() if k[1] == "recall"}, results.modes)
    rows = [r for r in aggregate(only, by=("group", "form", "held_out")) if r.n]
    parts: list[Raw] = []
    for group in dict.fromkeys(r.group for r in rows):
        mine = [r for r in rows if r.group == group]
        lines = []
        for form, held_out in dict.fromkeys((r.form, r.held_out) for r in mine):
            found = {r.arm: r for r in mine if (r.form, r.held_out) == (form, held_out)}
            cells = [interval_cell(found[a]) if a in found else None for a in results.arms]
            label = tag("small", "held out from training") if held_out else ""
            lines.append([Raw(esc(FORMS.get(form, form)) + label), *cells])
        parts.append(
            table(
                ["form", *(arm_label(a) for a in results.arms)],
                lines,
                caption=f"Share of {group} facts answered in full",
                sortable=True,
            )
        )
    if any(r.group == "forget" for r in rows):
        parts.insert(0, _figures([plot_before_after(results)]))
    return parts


def _where(localization: Localization | None) -> list[Raw]:
    if localization is None:
        return []
    from excise.plots import map_figures, plot_ranking

    method = str(localization.recipe.get("method", "?"))
    parts = [tag("p", f"Method: {method}; {len(localization.fact_ids)} facts, {len(localization.sites)} sites.")]
    if localization.maps:
        parts += [
            tag(
                "p",
                "Tokens run down, layers across; the subject carries stars. "
                "Darker: restoring this state alone brings more of the answer back.",
            ),
            _figures(map_figures(localization)),
        ]
        for found in localization.maps[:MOST_MAPS]:
            parts.append(
                tag(
                    "details",
                    tag("summary", f"The map of {found.fact_id}"),
                    _figures(map_figures(localization, found.fact_id)),
                )
            )
    else:
        parts.append(_figures([plot_ranking(localization)]))
    return [*parts, localization_table(localization, rows=12)]


def _layers(results: Results | None) -> list[Raw]:
    if results is None:
        return []
    from excise.plots import layer_measures, plot_layers

    wanted = [("lens", "log-probability"), ("lens", "top-1"), ("probe", "refit"), ("probe", "transfer")]
    there = layer_measures(results)
    rest = [m for m in there if m[0] not in ("lens", "probe")]
    figures = [
        plot_layers(results, evaluation, measure=measure)
        for evaluation, measure in [*(w for w in wanted if w in there), *rest]
    ]
    note = (
        "Forget facts. The band is the 95 % interval. What counts is the distance to the oracle, where there is one: "
        "a model that never knew the facts still guesses."
    )
    return [tag("p", note, class_="soft"), _figures(figures)] if figures else []


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
        "Each try is judged on wordings that were taught: what is still said, what others have lost, what the logit lens "
        "finds inside. The best few were audited, on held-out wordings and people too; the nearest to the target was chosen."
    )
    columns = ["try", "", "still said", "damage", "inside", "distance in the audit", "why not"]
    return [
        tag("p", note, class_="soft"),
        _figures([plot_tradeoff(search["trials"])]),
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


def _facts(facts: Sequence[Fact], results: Results | None) -> list[Raw]:
    """For each fact to forget, what every arm answers in every form."""
    if results is None or "recall" not in results.evaluations:
        return []
    known = {f.id: f for f in facts}
    answers: dict[str, dict[tuple[str, bool, int], dict[str, Score]]] = {}
    for arm in results.arms:
        turn: dict[tuple[str, str, bool], int] = {}
        for s in results.scores.get((arm, "recall"), ()):
            if s.group == "forget" and s.value is not None:
                key = (s.fact, s.form, s.held_out)
                turn[key] = turn.get(key, -1) + 1
                answers.setdefault(s.fact, {}).setdefault((s.form, s.held_out, turn[key]), {})[arm] = s
    shown = [tag("p", "A tick: the whole answer was said. Otherwise the model's own words.", class_="soft")]
    for fact_id in sorted(answers)[:MOST_FACTS]:
        shown.append(_fact(known.get(fact_id), fact_id, answers[fact_id], results.arms))
    if len(answers) > MOST_FACTS:
        shown.append(tag("p", f"{len(answers) - MOST_FACTS} more facts are in the results file.", class_="soft"))
    return shown if answers else []


def _fact(
    fact: Fact | None, fact_id: str, asked: dict[tuple[str, bool, int], dict[str, Score]], arms: Sequence[str]
) -> Raw:
    rows = []
    for (form, held_out, turn), by_arm in asked.items():
        prompts = [] if fact is None else [p.text for p in fact.ask(form, held_out=held_out)]
        text = prompts[turn] if turn < len(prompts) else form
        label = f"{form}{', held out' if held_out else ''}"
        rows.append([Raw(esc(text) + tag("small", label)), *(_said(by_arm.get(a)) for a in arms)])
    name = fact_id if fact is None else f"{fact.subject or fact_id}: {fact.relation or 'answer'} = {fact.answer}"
    right = ", ".join(f"{a} {sum(bool(s[a].value) for s in asked.values() if a in s)}/{len(asked)}" for a in arms)
    return tag(
        "details",
        tag("summary", name, Raw(" "), tag("small", right)),
        table(["prompt", *(arm_label(a) for a in arms)], rows),
    )


def _said(score: Score | None) -> object:
    if score is None:
        return None
    return Raw(("✓ " if score.value else "") + esc(score.detail or ("" if score.value else "(nothing)")))


def _fates(results: Results | None, recipe: Mapping[str, Any]) -> list[Raw]:
    found = fates(results, recipe) if results is not None else []
    # Facts that were kept are counted; listed are those to forget, and what was lost.
    told = [f for f in found if f.group == "forget" or f.word == "collateral damage"]
    if not told:
        return []
    rows = [[f.fact, f.group, f.word, ", ".join(f.by), f.evidence] for f in told[:MOST_FACTS]]
    more = f" {len(told) - MOST_FACTS} more are not listed." if len(told) > MOST_FACTS else ""
    columns = ["fact", "group", "fate", "by", "evidence"]
    return [tag("p", counted(found) + more), table(columns, rows, sortable=True)]


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


def _figures(figures: Sequence[Any]) -> Raw:
    from excise.figures import BLUE, GREEN, GREY, ORANGE, figure_svg

    drawn = [figure_svg(f) for f in figures]
    for colour, role in ((GREY, "before"), (BLUE, "edited"), (ORANGE, "control"), (GREEN, "oracle")):
        drawn = [svg.replace(colour, f"var(--{role}, {colour})") for svg in drawn]
    return tag("div", *(tag("figure", Raw(svg)) for svg in drawn), class_="figures") if figures else Raw("")
