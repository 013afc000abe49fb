"""The verdict in words: what intervals allow one to say about an edit, and what they do not. Numbers in, sentences
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from excise import findings as ask
from excise.comparison import roles
from excise.findings import Finding, State
from excise.scores import Results


@dataclass(frozen=True)
class Verdict:
    """The headline and its reasons."""

    headline: str
    state: State
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join([self.headline, "", *(f"  {f.question} {f.text}" for f in self.findings)])

    def _repr_html_(self) -> str:
        from excise.notebook import verdict_view

        return verdict_view(self)


def verdict(results: Results | None, recipe: Mapping[str, Any] | None = None) -> Verdict:
    """What the results say about the edit: forgotten, harmless, specific, gone from the inside?

    recipe: may name the arms under "roles", a mapping from before, edited, control, oracle to arm names.
    """
    who = roles(results, recipe) if results is not None else {}
    if results is None or "edited" not in who or "before" not in who:
        return Verdict("Nothing was measured", "unmeasured", ())
    findings = (
        ask.forgotten(results, who),
        ask.collateral(results, who),
        ask.control(results, who),
        ask.recovered(results, who),
        *ask.inside(results, who),
        ask.mode(results, who),
    )
    return Verdict(_headline(findings), _overall(findings), findings)


def _headline(findings: Sequence[Finding]) -> str:
    forgotten, rest, _, attacked, *inside, _ = findings
    said = {
        "good": "The model no longer says the facts", "bad": "Not forgotten", "unclear": "Not shown to be forgotten",
        "unmeasured": "Forgetting was not measured",
    }[forgotten.state]  # fmt: skip
    if forgotten.state == "bad":
        said += f": {forgotten.text.removeprefix('No. ').split(' still answer')[0].split(' (')[0].lower()} still answer"
    stays = {
        "good": "what should stay has stayed",
        "bad": "what should stay was harmed",
        "unclear": "harm to the rest is not excluded",
    }
    parts = [stays[rest.state]] if rest.state in stays else []
    if forgotten.state == "good" and attacked.state == "bad":
        parts.append("but it comes back under attack")
    if forgotten.state == "good" and any(f.state == "bad" for f in inside):
        parts.append("but inside it still holds them")
    return "; ".join([said, *parts]) + "."


def _overall(findings: Sequence[Finding]) -> State:
    states = [f.state for f in findings[:-1]]
    if "bad" in states:
        return "bad"
    return "good" if states[0] == states[1] == "good" and "unclear" not in states else "unclear"
