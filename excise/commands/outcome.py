"""How a finished run is shown: the table, where the report is, and what to do next."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from excise.commands import common

if TYPE_CHECKING:
    from excise.chain import Run


def show(run: Run, form: str) -> int:
    """Print a run; the exit code of the command."""
    if form == "json":
        common.print_json(run.as_json())
        return 0
    from excise.report import text_table

    print(text_table(run.results.table(seed=run.inputs.seed)))
    print()
    print(run.verification)
    edit, model = shlex.quote(str(run.inputs.out / "edit.safetensors")), shlex.quote(run.inputs.model.name)
    question = next((p.text for f in run.inputs.facts.group("forget") for p in f.ask("question")), "...")
    print(f"""
report   {run.report}
undo     nothing to undo: {run.inputs.model.name} was not changed; the edit is the file {edit}
talk     excise ask {shlex.quote(question)} --model {model} --edit {edit}
export   excise export {edit} --model {model} --out edited-model
took     {sum(run.seconds.values()):.0f} s ({', '.join(f'{stage} {s:.1f}' for stage, s in run.seconds.items())})""")
    return 0
