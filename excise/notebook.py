"""How facts, localizations, edits, results and verdicts show themselves in a notebook: the report's fragments, shortened,
with the little style that Jupyter's own lacks and without what needs the report's script.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from excise.fragments import edit_table, facts_table, localization_table, results_table
from excise.page import Raw, table, tag

if TYPE_CHECKING:
    from excise.edits import Edit
    from excise.facts import Fact, Facts
    from excise.scores import Localization, Results
    from excise.verdict import Verdict

# Rows of a table; `to_frame()` has all of them.
ROWS = 12
STYLE = (
    ".excise th, .excise td {text-align: left; vertical-align: top} .excise .number {text-align: right} "
    ".excise small {display: block; font-weight: normal; opacity: .75} .excise summary {margin: .5em 0} "
    ".excise .arm {display: inline-block; width: .7em; height: .7em; margin-right: .35em; background: #0072b2} "
    ".excise .arm.before {background: #767676} .excise .arm.control {background: #e08214} "
    ".excise .arm.oracle {background: #1b8a5a}"
)


def facts_view(facts: Facts) -> str:
    """How many of which group, and the first of them."""
    return _shown(repr(facts), facts_table(facts, rows=ROWS))


def fact_view(fact: Fact) -> str:
    """Every way to ask for the fact."""
    rows = [[p.form, "held out" if p.held_out else "", p.text, p.answer] for p in fact.prompts]
    head = f"Fact {fact.id}: {fact.subject or 'no subject'}, {fact.relation or 'no relation'} ({fact.group})"
    return _shown(head, table(["form", "split", "prompt", "answer"], rows))


def localization_view(localization: Localization) -> str:
    """The method and the best sites."""
    size = f"{len(localization.fact_ids)} facts x {len(localization.sites)} sites"
    head = f"Localization({localization.recipe.get('method', '?')}: {size})"
    return _shown(head, localization_table(localization, rows=ROWS))


def edit_view(edit: Edit) -> str:
    """The method, how it is held, and the changes."""
    return _shown(repr(edit), edit_table(edit, rows=ROWS))


def results_view(results: Results) -> str:
    """The table of the report."""
    return _shown(repr(results), results_table(results))


def verdict_view(verdict: Verdict) -> str:
    """The headline and an answer to every question."""
    rows = [[f.question, f.state, f.text] for f in verdict.findings]
    return _shown(verdict.headline, table(["question", "state", "answer"], rows))


def _shown(head: str, body: Raw) -> str:
    # Buttons sort by the report's script; where styles are stripped, a space keeps a note from its value.
    plain = re.sub(r"</?button[^>]*>", "", body).replace("<small", " <small")
    return str(tag("div", tag("style", Raw(STYLE)), tag("p", tag("b", head)), Raw(plain), class_="excise"))
