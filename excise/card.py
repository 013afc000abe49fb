"""The model card of an edit: what was removed, how well, what else changed, how to use and undo it. Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from excise.fates import counted, fates
from excise.files import write_text
from excise.page import plain
from excise.verdict import verdict

if TYPE_CHECKING:
    from excise.chain import Run

# Rows of the card's table: evaluation, group, variant.
TABLE = (
    ("recall", "forget", ""), ("recall", "retain", ""), ("recall", "neighbour", ""), ("refusal", "unknown", ""),
    ("drift", "general", "relative change"), ("lens", "forget", "hit@5, any layer"), ("probe", "forget", "refit, best layer"),
)  # fmt: skip


def write_card(run: Run) -> Path:
    """Write model_card.md into the run folder and return its path."""
    return write_text(run.inputs.out / "model_card.md", card(run))


def card(run: Run) -> str:
    """The card as text."""
    inputs, said = run.inputs, verdict(run.results)
    names = ", ".join(inputs.facts.group("forget").subjects[:12])
    more = len(inputs.facts.group("forget").subjects) - 12
    sites = ", ".join(str(s) for s in run.edit.sites)
    lines = [
        f"# An edit of {_text(inputs.model.name)}",
        "",
        f"{said.headline}",
        "",
        f"- To be forgotten: {len(inputs.facts.group('forget'))} facts about {_text(names)}"
        + (f" and {more} more" if more > 0 else "") + ".",
        f"- Method: {_text(run.search['chosen'] if run.search else inputs.editor)}; sites {_text(sites)}.",
        f"- The change is held in {'the weights' if run.edit.bakeable else 'hooks, and vanishes with them'}.",
        f"- {counted(fates(run.results))}",
        "",
        "| | " + " | ".join(run.results.arms) + " |",
        "|---" * (1 + len(run.results.arms)) + "|",
        *_rows(run),
        "",
        *(f"- **{f.question}** {_text(f.text)}" for f in said.findings),
        "",
        "## Use and undo",
        "",
        f"    excise ask QUESTION --model {inputs.model.name} --edit {inputs.out / 'edit.safetensors'}",
        f"    excise export {inputs.out / 'edit.safetensors'} --model {inputs.model.name} --out DIR",
        "",
        "The original model was not written to: load it without the edit and all is as it was.",
        f"Made by: `{_text(inputs.command)}`. Intervals, every form and every fact: report.html beside this file.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _rows(run: Run) -> list[str]:
    from excise.statistics import aggregate

    rows = {(r.arm, r.evaluation, r.group, r.variant): r for r in aggregate(run.results, by=("group", "variant"))}
    found = []
    for evaluation, group, variant in TABLE:
        cells = [rows.get((arm, evaluation, group, variant)) for arm in run.results.arms]
        if any(r and r.n for r in cells):
            shown = [f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}], n {r.n}" if r and r.n else "" for r in cells]
            found.append(f"| {evaluation} {variant}, {group} | {' | '.join(shown)} |")
    return found


def _text(text: str) -> str:
    """Text that cannot become markup."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return "".join(f"\\{c}" if c in "*_`[]" else c for c in escaped)
