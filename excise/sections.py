"""Sections of the report that are made of results alone: measures, attacks, forms, layers, each fact's answers and fate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from excise.facts import Fact
from excise.fates import counted, fates
from excise.findings import FORMS
from excise.fragments import arm_label, interval_cell, results_table
from excise.overview import attack_lines, overview
from excise.page import Cell, Raw, esc, table, tag
from excise.recovery import Drawn, drawn_facts, step_curves
from excise.scores import Results, Score
from excise.statistics import aggregate

# A page of more is slow to open and nobody reads it; what is left out is said.
MOST_FACTS = 200
# The curves that are drawn of evaluations that measure several things layer by layer.
CURVES = (
    ("lens", "log-probability"),
    ("lens", "top-1"),
    ("probe", "refit"),
    ("probe", "transfer"),
    ("lens_erasure", "erased"),
    ("unlearning_depth", "cost"),
    ("linear_recovery", "answered"),
    ("patching_recovery", "subject_last"),
)
# How a fact that an attack drew is marked, and how it is sorted.
DRAWN: Mapping[Drawn, tuple[str, float]] = {
    "edited": ("●", 2.0),
    "both": ("◐", 1.0),
    "oracle": ("○", 0.5),
    "neither": ("·", 0.0),
}


def measures(results: Results | None) -> list[Raw]:
    """Arms across, measures down, family by family."""
    if results is None:
        return []
    from excise.plots import bar_figure, plot_bargain, result_panels

    note = (
        "95 % intervals in brackets: subjects are resampled with all their prompts. "
        "Forms are pooled here and apart below."
    )
    wanted = [("recall", ""), ("refusal", ""), ("form_spread", "easiest form")]
    panels = {
        title: rows for title, rows in result_panels(results).items() if (rows[0].evaluation, rows[0].variant) in wanted
    }
    drawn = [bar_figure(results, t, rows) for t, rows in panels.items()]
    bargain = [plot_bargain(results)] if "recall" in results.evaluations else []
    return [tag("p", note, class_="soft"), results_table(results), figures([*bargain, *drawn])]


def attacks(results: Results | None) -> list[Raw]:
    """What each attack draws from the edited model and from the oracle, over its steps, and which facts."""
    part = next((p for p in overview(results) if p.family == "elicitation"), None) if results is not None else None
    if results is None or part is None:
        return []
    from excise.plots import plot_attacks, plot_steps

    parts = [tag("p", part.said), figures([plot_attacks(attack_lines(results), results.arms)])]
    curves = step_curves(results)
    if curves:
        parts.append(figures([plot_steps(c, results.arms) for c in curves]))
        note = (
            "Curves: facts of people who were not trained on. An edit that hides facts lets them come back sooner than a "
            "model that has to learn them."
        )
        parts.append(tag("p", note, class_="soft"))
    return [*parts, *_who_came_back(results)]


def _who_came_back(results: Results) -> list[Raw]:
    table_ = drawn_facts(results)
    by_attack = list(dict.fromkeys(name for found in table_.values() for name in found))
    telling = [n for n in by_attack if any(found.get(n, "neither") != "neither" for found in table_.values())]
    facts = {
        fact: found for fact, found in table_.items() if any(found.get(n, "neither") != "neither" for n in telling)
    }
    if not table_:
        return []
    silent = [n.replace("_", " ") for n in by_attack if n not in telling]
    said = f"Some attack drew {len(facts)} of the {len(table_)} facts that were asked for."
    said += f" Nothing came of {', '.join(silent)}." if silent else ""
    key = (
        "● the edited model alone, ◐ the oracle too (guessed or taught), ○ the oracle alone, · neither, - not asked"
    ).replace("-", "\N{EN DASH}")
    rows = [
        [fact, *(_mark(found.get(n)) for n in telling)]
        for fact, found in sorted(facts.items(), key=lambda x: -sum(v == "edited" for v in x[1].values()))
    ]
    heads = ["fact", *(n.replace("_", " ") for n in telling)]
    shown = table(heads, rows[:MOST_FACTS], caption=f"Which attack brings back which fact: {key}", sortable=True)
    return [tag("p", said), *([tag("div", shown, class_="marks")] if rows else [])]


def _mark(drawn: Drawn | None) -> Cell | None:
    if drawn is None:
        return None
    sign, order = DRAWN[drawn]
    return Cell(tag("span", sign, title=drawn, class_=f"drawn {drawn}"), order)


def forms(results: Results | None) -> list[Raw]:
    """Recall before and after in every form that was asked."""
    if results is None or "recall" not in results.evaluations:
        return []
    from excise.plots import plot_before_after

    only = Results({k: v for k, v in results.scores.items() if k[1] == "recall"}, results.modes)
    rows = [r for r in aggregate(only, by=("group", "form", "held_out")) if r.n]
    parts: list[Raw] = []
    others: list[Raw] = []
    for group in dict.fromkeys(r.group for r in rows):
        mine = [r for r in rows if r.group == group]
        lines = []
        for form, held_out in dict.fromkeys((r.form, r.held_out) for r in mine):
            found = {r.arm: r for r in mine if (r.form, r.held_out) == (form, held_out)}
            cells = [interval_cell(found[a]) if a in found else None for a in results.arms]
            label = tag("small", "held out from training") if held_out else ""
            lines.append([Raw(esc(FORMS.get(form, form)) + label), *cells])
        (parts if group == "forget" else others).append(
            table(
                ["form", *(arm_label(a) for a in results.arms)],
                lines,
                caption=f"Share of {group} facts answered in full",
                sortable=True,
            )
        )
    if any(r.group == "forget" for r in rows):
        parts.insert(0, figures([plot_before_after(results)]))
    return [*parts, *([tag("details", tag("summary", "Facts of the other groups"), *others)] if others else [])]


def layers(results: Results | None) -> list[Raw]:
    """Curves over layers of what lenses and probes read, one line an arm."""
    if results is None:
        return []
    from excise.plots import layer_measures, plot_layers

    there = layer_measures(results)
    known = {evaluation for evaluation, _ in CURVES}
    chosen = [m for m in CURVES if m in there] + [m for m in there if m[0] not in known]
    drawn = [plot_layers(results, evaluation, measure=measure) for evaluation, measure in chosen]
    note = (
        "Forget facts. The band is the 95 % interval. What counts is the distance to the oracle, where there is one: "
        "a model that never knew the facts still guesses."
    )
    return [tag("p", note, class_="soft"), figures(drawn)] if drawn else []


def answers(facts: Sequence[Fact], results: Results | None) -> list[Raw]:
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


def fate_by_fact(results: Results | None, recipe: Mapping[str, Any]) -> list[Raw]:
    """What became of each fact to forget and of what was lost besides."""
    found = fates(results, recipe) if results is not None else []
    # Facts that were kept are counted; listed are those to forget, and what was lost.
    told = [f for f in found if f.group == "forget" or f.word == "collateral damage"]
    if not told:
        return []
    rows = [[f.fact, f.group, f.word, ", ".join(f.by), f.evidence] for f in told[:MOST_FACTS]]
    more = f" {len(told) - MOST_FACTS} more are not listed." if len(told) > MOST_FACTS else ""
    columns = ["fact", "group", "fate", "by", "evidence"]
    return [tag("p", counted(found) + more), table(columns, rows, sortable=True)]


def figures(figures: Sequence[Any]) -> Raw:
    """Figures beside each other, as drawings that follow the theme."""
    from excise.figures import BLUE, GREEN, GREY, ORANGE, figure_svg

    drawn = [figure_svg(f) for f in figures]
    for colour, role in ((GREY, "before"), (BLUE, "edited"), (ORANGE, "control"), (GREEN, "oracle")):
        drawn = [svg.replace(colour, f"var(--{role}, {colour})") for svg in drawn]
    return tag("div", *(tag("figure", Raw(svg)) for svg in drawn), class_="figures") if figures else Raw("")
