"""The verdict in words: what intervals allow one to say about an edit, and what they do not. Numbers in, sentences
out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from excise.scores import Results, Row, Score
from excise.statistics import Interval, aggregate, bootstrap_difference, wilson

State = Literal["good", "bad", "unclear", "unmeasured"]
# Fixed beforehand: at most this much above a model that never knew counts as forgotten, at most this loss as harmless.
FORGOTTEN, HARMLESS = 0.10, 0.05
# A form was known when the model answered at least this share before.
KNOWN = 0.5
FORMS = {
    "statement": "statements",
    "question": "questions",
    "cloze": "gap texts",
    "choice": "multiple choice",
    "reversed": "reversed questions",
}
INSIDE = (("lens", "hit@5, any layer", "the logit lens"), ("probe", "refit, best layer", "a linear probe"))


@dataclass(frozen=True)
class Finding:
    """One question about the edit, how it came out, and the sentence that says so."""

    question: str
    state: State
    text: str


@dataclass(frozen=True)
class Verdict:
    """The headline and its reasons."""

    headline: str
    state: State
    findings: tuple[Finding, ...]


def verdict(results: Results | None, recipe: Mapping[str, Any] | None = None) -> Verdict:
    """What the results say about the edit: forgotten, harmless, specific, gone from the inside?

    recipe: may name the arms under "roles", a mapping from before, edited, control, oracle to arm names.
    """
    who = roles(results, recipe) if results is not None else {}
    if results is None or "edited" not in who or "before" not in who:
        return Verdict("Nothing was measured", "unmeasured", ())
    findings = (
        _forgotten(results, who),
        _collateral(results, who),
        _control(results, who),
        *_inside(results, who),
        _mode(results, who),
    )
    return Verdict(_headline(findings), _overall(findings), findings)


def roles(results: Results, recipe: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Which arm is before, edited, control, oracle: as the recipe says, else by name; the first other one is edited."""
    found = dict((recipe or {}).get("roles", {}))
    for arm in results.arms:
        found.setdefault(arm_role(arm), arm)
    return {role: arm for role, arm in found.items() if arm in results.arms}


def arm_role(name: str) -> str:
    """What an arm stands for, by its name: "before", "control", "oracle" or "edited"."""
    lowered = name.lower()
    if lowered in ("before", "oracle"):
        return lowered
    return "control" if lowered.startswith(("control", "random")) else "edited"


def _forgotten(results: Results, who: Mapping[str, str]) -> Finding:
    question = "Is it forgotten?"
    rows = {
        (r.arm, r.form, r.held_out): r for r in _rows(results, "recall", "forget", by=("group", "form", "held_out"))
    }
    pooled = {r.arm: r for r in _rows(results, "recall", "forget")}
    forms = [
        key[1:]
        for key, row in rows.items()
        if key[0] == who["before"] and row.value >= KNOWN and (who["edited"], *key[1:]) in rows
    ]
    if not forms:
        return Finding(
            question,
            "unmeasured",
            "Recall of the facts to forget was not measured, or the model did not know them before.",
        )
    leaks: list[Row] = []
    open_: list[Row] = []
    gone: list[Row] = []
    for form in forms:
        row, oracle = rows[(who["edited"], *form)], rows.get((who.get("oracle", ""), *form))
        ceiling = FORGOTTEN + (oracle.value if oracle else 0.0)
        silent = row.high <= ceiling or (row.value <= FORGOTTEN and pooled[who["edited"]].high <= ceiling)
        (leaks if row.low > ceiling else gone if silent else open_).append(row)
    before, after = pooled[who["before"]], pooled[who["edited"]]
    says = f"Recall of the facts to forget: {_shown(after)}, before {before.value:.2f}, over all forms."
    if leaks:
        return Finding(question, "bad", f"No. {_sentence(leaks)} still answer. {says}")
    if open_:
        return Finding(
            question, "unclear", f"Not shown. {_sentence(open_)}: more than a guess cannot be excluded. {says}"
        )
    return Finding(
        question,
        "good",
        f"Yes, in every form that was answered before ({_named(gone)}). {says}{_instead(results, who)}",
    )


def _instead(results: Results, who: Mapping[str, str]) -> str:
    refused = {r.arm: r for r in _rows(results, "refusal", "forget")}.get(who["edited"])
    return f" It declines to answer {refused.value:.0%} of the questions about them." if refused else ""


def _collateral(results: Results, who: Mapping[str, str]) -> Finding:
    question = "Is the rest intact?"
    parts: list[tuple[str, Interval, float]] = []
    for group, name in (
        ("neighbour", "neighbouring facts"),
        ("retain", "other facts"),
        ("general", "general facts and skills"),
    ):
        change = paired(results, "recall", who["edited"], who["before"], group)
        if change is not None:
            parts.append((f"recall of {name}", change, HARMLESS))
    refused = paired(results, "refusal", who["edited"], who["before"], "retain", "neighbour")
    if refused is not None:
        parts.append(("false refusals", Interval(-refused.value, -refused.high, -refused.low), HARMLESS))
    loss = next(
        (r for r in _rows(results, "drift", "general") if r.arm == who["edited"] and r.variant == "relative change"),
        None,
    )
    if loss is not None:
        parts.append(("loss on general text (relative)", Interval(-loss.value, -loss.high, -loss.low), HARMLESS))
    if not parts:
        return Finding(question, "unmeasured", "Nothing that should stay was measured.")
    harmed = [p for p in parts if p[1].high < -p[2]]
    open_ = [p for p in parts if p not in harmed and p[1].low < -p[2]]
    listed = "; ".join(_change(name, change) for name, change, _ in harmed or open_ or parts)
    if harmed:
        return Finding(question, "bad", f"No. Worse by more than {HARMLESS:.0%}: {listed}.")
    if open_:
        return Finding(
            question,
            "unclear",
            f"Not shown: a loss above {HARMLESS:.0%} cannot be excluded. {listed[0].upper()}{listed[1:]}.",
        )
    return Finding(question, "good", f"Yes, within {HARMLESS:.0%}. {listed[0].upper()}{listed[1:]}.")


def _change(name: str, change: Interval) -> str:
    """A change in which down is worse, as it is said: rates that should stay low were turned round."""
    sign = -1 if name.startswith(("false", "loss")) else 1
    value, low, high = (
        sign * v + 0.0 for v in (change.value, *((change.low, change.high) if sign > 0 else (change.high, change.low)))
    )
    return f"{name} {value:+.3f} [{low:+.3f}, {high:+.3f}]"


def _control(results: Results, who: Mapping[str, str]) -> Finding:
    question = "Is it the edit, or any change of that size?"
    if "control" not in who:
        return Finding(question, "unmeasured", "No random control of the same kind, rank and norm was run.")
    spared = paired(results, "recall", who["control"], who["edited"], "forget")
    lost = paired(results, "recall", who["edited"], who["before"], "forget")
    if spared is None or lost is None:
        return Finding(question, "unmeasured", "Recall of the facts to forget was not measured on the control.")
    if lost.high > -FORGOTTEN:
        return Finding(question, "unclear", "The edit itself removed too little for the comparison to say anything.")
    size = f"{spared.value:.2f} [{spared.low:.2f}, {spared.high:.2f}]"
    numbers = f"after a random change of the same kind, rank and norm recall of the facts to forget is higher by {size}"
    if spared.low > FORGOTTEN:
        return Finding(question, "good", f"It is the edit: {numbers}.")
    if spared.high < FORGOTTEN:
        return Finding(question, "bad", f"Any change of that size does it: {numbers}.")
    return Finding(question, "unclear", f"Not shown: {numbers}.")


def _inside(results: Results, who: Mapping[str, str]) -> list[Finding]:
    return [_found_by(results, who, *tool) for tool in INSIDE]


def _found_by(results: Results, who: Mapping[str, str], evaluation: str, variant: str, tool: str) -> Finding:
    """Whether a tool finds more in the edited model than in the oracle or, without one, than in shuffled answers."""
    question = f"Is it still inside? ({tool.removeprefix('the ').removeprefix('a ')})"
    rows = {(r.arm, r.variant): r for r in _rows(results, evaluation, "forget")}
    after = rows.get((who["edited"], variant))
    if after is None:
        return Finding(question, "unmeasured", f"Not looked for with {tool}.")
    references = (
        (who.get("oracle", ""), variant, "a model that never knew the facts"),
        (who["edited"], "shuffled, best layer", "answers dealt at random"),
    )
    says = f"{tool[0].upper()}{tool[1:]} reads {_shown(after)}"
    arm, other, name = next((r for r in references if r[:2] in rows), ("", "", ""))
    more = paired(results, evaluation, who["edited"], arm, "forget", variants=(variant, other))
    if more is None:
        before = rows.get((who["before"], variant))
        was = f", before {before.value:.2f}" if before else ""
        return Finding(
            question,
            "unclear",
            f"{says}{was}; without a model that never knew the facts there is no zero to compare with.",
        )
    says += f"; {name}: {_shown(rows[arm, other])}; difference {more.value:+.2f} [{more.low:+.2f}, {more.high:+.2f}]."
    if more.high <= FORGOTTEN:
        return Finding(question, "good", f"Not found. {says}")
    if more.low > 0 and more.value > FORGOTTEN:
        return Finding(question, "bad", f"Yes. {says}")
    return Finding(question, "unclear", f"{'Traces' if more.low > 0 else 'Not decided'}. {says}")


def _mode(results: Results, who: Mapping[str, str]) -> Finding:
    question, mode = "Does it last?", results.modes.get(who["edited"], "")
    if mode == "weight":
        return Finding(
            question, "good", "The change can be written into the weights and exported; relearning is another matter."
        )
    if mode == "hook":
        return Finding(
            question, "unclear", "The change lives in hooks and vanishes with them: the weights still hold the facts."
        )
    return Finding(question, "unmeasured", "How the change is held was not recorded.")


def _headline(findings: Sequence[Finding]) -> str:
    forgotten, rest, _, *inside, _ = findings
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
    if forgotten.state == "good" and any(f.state == "bad" for f in inside):
        parts.append("but inside it still holds them")
    return "; ".join([said, *parts]) + "."


def _overall(findings: Sequence[Finding]) -> State:
    states = [f.state for f in findings[:-1]]
    if "bad" in states:
        return "bad"
    return "good" if states[0] == states[1] == "good" and "unclear" not in states else "unclear"


def paired(
    results: Results, evaluation: str, after: str, before: str, *groups: str, variants: tuple[str, str] | None = None
) -> Interval | None:
    """Mean change of some groups from one arm to another over the same prompts, with its paired 95 % interval.

    variants: the variant on each side; all, like with like, when None. Where no prompt changed, the interval is what
        that
    many unchanged prompts allow (Wilson). None without common prompts.
    """
    sides = []
    for i, arm in enumerate((after, before)):
        scores = [s for s in results.scores.get((arm, evaluation), ()) if s.group in groups]
        sides.append(
            _by_prompt([replace(s, variant="") for s in scores if s.variant == variants[i]] if variants else scores)
        )
    common = [k for k in sides[0] if k in sides[1]]
    if not common:
        return None
    a, b = ([float(side[k].value or 0.0) for k in common] for side in sides)
    change = bootstrap_difference(a, b, [sides[0][k].subject or k[0] for k in common])
    if change.value == change.low == change.high == 0:
        bound = wilson(0, len(common)).high
        return Interval(0.0, -bound, bound)
    return change


def _by_prompt(scores: Sequence[Score]) -> dict[tuple[Any, ...], Score]:
    """Scores by fact, form, split, variant and turn: wordings of one form come in the same order in every arm."""
    turn: dict[tuple[Any, ...], int] = {}
    found = {}
    for s in scores:
        key = (s.fact, s.form, s.held_out, s.variant)
        turn[key] = turn.get(key, -1) + 1
        if s.value is not None:
            found[*key, turn[key]] = s
    return found


def _rows(results: Results, evaluation: str, group: str, by: Sequence[str] = ("group", "variant")) -> list[Row]:
    only = {
        k: tuple(s for s in v if s.group == group and "layer " not in s.variant)
        for k, v in results.scores.items()
        if k[1] == evaluation
    }
    return [r for r in aggregate(Results(only, results.modes), by=by) if r.n]


def _shown(row: Row) -> str:
    return f"{row.value:.2f} [{row.low:.2f}, {row.high:.2f}], n {row.n}"


def _named(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(FORMS.get(r.form, r.form or "prompts") for r in rows))


def _sentence(rows: Sequence[Row]) -> str:
    text = ", ".join(
        f"{_named([r])}{' held out from training' if r.held_out else ''} ({r.value:.2f} [{r.low:.2f}, {r.high:.2f}])"
        for r in rows
    )
    return text[0].upper() + text[1:]
