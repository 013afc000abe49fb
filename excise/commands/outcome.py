"""How a finished run is shown: the table, where the report is, and what to do next."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from excise.commands import common
from excise.facts import GENERATIVE_FORMS

if TYPE_CHECKING:
    from excise.chain import Run
    from excise.scores import Results, Row


def show(run: Run, form: str) -> int:
    """Print a run; the exit code of the command."""
    if form == "json":
        common.print_json(run.as_json())
        return 0
    common.print_rows([row for row in side_by_side(run.results, run.inputs.seed) if _told(row["measure"])])
    if run.search:
        from excise.audit import told

        print(f"\nchosen   {common.printable(run.search['chosen'])}\n\n{common.printable_lines(told(run.results))}")
    print()
    print(run.verification)
    edit, model = shlex.quote(str(run.inputs.out / "edit.safetensors")), shlex.quote(run.inputs.model.name)
    forget = run.inputs.facts.group("forget")
    question = next((p.text for f in forget for p in f.ask("question")), forget[0].prompt.text)
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run.seconds.items())
    print(f"""
report   {run.report}
undo     nothing to undo: {run.inputs.model.name} was not changed; the edit is the file {edit}
talk     excise ask {shlex.quote(question)} --model {model} --edit {edit}
export   excise export {edit} --model {model} --out edited-model
took     {sum(run.seconds.values()):.0f} s ({stages})""")
    return 0


def _told(measure: str) -> bool:
    """What a terminal is shown of an audit; the rest stands in the report."""
    from excise.measure import EVALUATIONS

    return measure.split(" ")[0] in EVALUATIONS


def side_by_side(results: Results, seed: int = 0) -> list[dict[str, Any]]:
    """One row per measure and group, one column per arm: value [95 % interval].

    Recall of the forget group by form, of the others pooled over the generative forms; layer curves stay in the report.
    """
    from excise.statistics import aggregate

    by_form = [r for r in aggregate(results, seed=seed) if _is_headline(r)]
    pooled = aggregate(_generative(results), seed=seed, by=("group", "variant"))
    table: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in by_form + [r for r in pooled if r.n and not _is_headline(r) and not re.search(r"\blayer \d", r.variant)]:
        key = _key(row)
        cells = table.setdefault(key, dict(zip(("measure", "group", "asked as"), key, strict=True)))
        cells[row.arm] = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]" if row.n else "-"
    return [_filled(cells, results.arms) for cells in table.values()]


def by_form(results: Results, seed: int = 0) -> list[dict[str, Any]]:
    """Recall of the facts to forget, form by form: the rows of `side_by_side` that tell it."""
    found = side_by_side(results, seed) if "recall" in results.evaluations else []
    return [row for row in found if (row["measure"], row["group"]) == ("recall", "forget")]


def _is_headline(row: Row) -> bool:
    return (row.evaluation, row.group) == ("recall", "forget")


def _generative(results: Results) -> Results:
    """Without recall in forms that were not taught for everybody, or that a guess can meet."""
    kept = {
        key: tuple(s for s in scores if s.form in GENERATIVE_FORMS) if key[1] == "recall" else scores
        for key, scores in results.scores.items()
    }
    return replace(results, scores=kept)


def _key(row: Row) -> tuple[str, ...]:
    asked = f"{row.form} (held out)" if row.held_out else row.form
    if row.evaluation == "recall" and not row.form:
        asked = ", ".join(GENERATIVE_FORMS)
    return (f"{row.evaluation} {row.variant}".strip(), row.group, asked)


def _filled(cells: Mapping[str, Any], arms: list[str]) -> dict[str, Any]:
    return {**{k: v for k, v in cells.items() if k not in arms}, **{arm: cells.get(arm, "") for arm in arms}}
