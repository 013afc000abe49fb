"""What of an audit is read first: family by family a sentence, the headline rows, and the rest beneath them; then the
numbers that are made of many scores. Results in, lines and sentences out; pages and terminals draw them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from excise.attacks import attacks, is_attack, worst_variants
from excise.comparison import roles
from excise.facts import GROUPS
from excise.registry import family
from excise.scores import Results, Row
from excise.statistics import aggregate

# A variant of one layer: what was measured there, and the layer.
LAYER = re.compile(r"^(?:(?P<measure>.*), )?layer (?P<layer>\d+)$")
KEPT = ("retain", "neighbour", "general")
# A family of no more lines than this is shown whole, and of attacks so many are read first.
FEW = 8
TITLES = {
    "behavioural": "When asked",
    "elicitation": "Under attack",
    "intrinsic": "Inside",
    "": "Other measures",
}
# Read first, by evaluation, variant and groups; of attacks it is the worst case of each.
FIRST = {
    ("recall", ""): ("forget", *KEPT),
    ("probability", ""): ("forget",),
    ("refusal", ""): ("forget", "unknown"),
    ("form_spread", "easiest form"): ("forget",),
    ("drift", "relative change"): ("general",),
    ("lens", "hit@5, any layer"): ("forget",),
    ("probe", "refit, best layer"): ("forget",),
    ("lens_erasure", "erasure"): ("forget",),
    ("unlearning_depth", "depth"): ("forget",),
    ("linear_recovery", "answered"): ("forget",),
    ("patching_recovery", "subject_last, mean"): ("forget",),
}
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
    ("lens_erasure", "erasure", "forget"): "as oracle",
    ("unlearning_depth", "depth", "forget"): "1",
    ("linear_recovery", "answered", "forget"): "as oracle",
    ("refusal", "", "unknown"): "high",
    ("refusal", "", "retain"): "low",
    ("refusal", "", "neighbour"): "low",
    ("drift", "kl", ""): "low",
    ("drift", "relative", ""): "near 0",
    ("recall", "", ""): "as before",
    ("probability", "", ""): "as before",
    ("form_spread", "hardest", ""): "as before",
}
# Aggregates that are read first, by evaluation and start of the variant: what they are, and what one hopes for.
WHOLE = {
    ("model_utility", ""): "harmonic mean of probability, ROUGE-L and truth ratio on what is to be kept; wanted: as before",
    ("deviation", "rougeL recall"): "0 where nothing is said and everything kept, 141 where the reverse; wanted: 0",
    ("erasure_target", ""): "harmonic mean of what is erased, in known and held-out wordings, and what neighbours keep; wanted: 1",
    ("forget_quality", "D"): "largest distance between truth ratios and the oracle's; wanted: 0",
    ("forget_quality", "log10 p"): "log10 of the p that they are the oracle's; wanted: near 0",
    ("privacy_leak", "PrivLeak"): "per cent, negative: still told from text never seen; wanted: near 0",
    ("recovered", ""): "share left of the way from the oracle to the model before; wanted: 0",
    ("linguistic", ""): "word richness and perplexity of its texts; wanted: as before",
    ("composite", ""): "harmonic mean of several benchmarks' scores; wanted: high",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One measure on one group of facts: its name, a note on it, and a row for each arm that has one."""

    evaluation: str
    variant: str
    group: str
    note: str
    rows: Mapping[str, Row] = field(repr=False)

    @property
    def name(self) -> str:
        """The evaluation and its variant, in words."""
        return ": ".join(filter(None, (self.evaluation.replace("_", " "), self.variant)))


@dataclass(frozen=True)
class Part:
    """One family of an audit: its title, what came out in one sentence, and its lines."""

    family: str
    title: str
    said: str
    first: tuple[Line, ...]
    rest: tuple[Line, ...]


def overview(results: Results) -> list[Part]:
    """The families of an audit, then its aggregates; families without a measured value are left out."""
    who = roles(results)
    found: dict[str, list[Line]] = {}
    for line in lines(results):
        found.setdefault(family(line.evaluation), []).append(line)
    parts = [_part(name, found[name], results, who) for name in TITLES if name in found]
    return [*parts, *_aggregates(results)]


def lines(results: Results) -> list[Line]:
    """Every measure by group, forms pooled; single layers and what could not be measured are left out."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in aggregate(results, by=("group", "variant")):
        if row.n and not LAYER.match(row.variant):
            found.setdefault((row.evaluation, row.variant, row.group), {})[row.arm] = row
    made = [Line(*key, note=_note(*key), rows=rows) for key, rows in found.items()]
    order = {name: i for i, name in enumerate(dict.fromkeys(e for e, _ in FIRST))}
    return sorted(made, key=lambda x: order.get(x.evaluation, len(order)))


def _note(evaluation: str, variant: str, group: str) -> str:
    wanted = next(
        (
            text
            for (name, start, of), text in WANTED.items()
            if name == evaluation and variant.startswith(start) and of in ("", group) and (of or group != "unknown")
        ),
        "low" if is_attack(evaluation) and group == "forget" else "",
    )
    return f"{group or 'all'} facts{f', wanted: {wanted}' if wanted else ''}"


def attack_lines(results: Results, found: Sequence[Line] | None = None) -> list[Line]:
    """What counts of every attack on the facts to forget, the one that draws most beyond the oracle first.

    found: the lines of the results, where they are at hand.
    """
    who = roles(results)
    attacked = [x for x in (lines(results) if found is None else found) if family(x.evaluation) == "elicitation"]
    names = dict.fromkeys(x.evaluation for x in attacked)
    counted = {name: worst_variants(results, who.get("edited", ""), name) for name in names}
    told = [x for x in attacked if x.group == "forget" and x.variant in counted[x.evaluation]]
    return sorted(told, key=lambda x: -_gap(x, who))


def _part(name: str, found: Sequence[Line], results: Results, who: Mapping[str, str]) -> Part:
    if name == "elicitation":
        first, said = attack_lines(results, found)[:FEW], _of_attacks(results, who)
    else:
        first = [x for x in found if x.group in FIRST.get((x.evaluation, x.variant), ())]
        first.sort(key=lambda x: (list(FIRST).index((x.evaluation, x.variant)), GROUPS.index(x.group)))
        said = _asked(first, results, who) if name == "behavioural" else _inside(first, who)
    first = list(found) if len(found) <= FEW or not first else first
    rest = [x for x in found if x not in first]
    return Part(name, TITLES[name], said, tuple(first), tuple(rest))


def _gap(line: Line, who: Mapping[str, str]) -> float:
    """What an arm gives beyond the oracle, or at all without one."""
    after, never = (line.rows.get(who.get(role, "")) for role in ("edited", "oracle"))
    return (after.value if after else 0.0) - (never.value if never else 0.0)


def _asked(first: Sequence[Line], results: Results, who: Mapping[str, str]) -> str:
    forget = next((x for x in first if (x.evaluation, x.group) == ("recall", "forget")), None)
    said = f"Of the facts to forget {_shares(forget.rows, who)} of the answers are still given" if forget else ""
    kept = {arm: _mean(results, arm) for arm in results.arms}
    if said and kept.get(who.get("edited", "")) is not None:
        before = kept.get(who.get("before", ""))
        was = f" (before {before:.2f})" if before is not None else ""
        said += f", of those to keep {kept[who['edited']]:.2f}{was}"
    return f"{said}." if said else ""


def _mean(results: Results, arm: str) -> float | None:
    values = [s.value for s in results.scores.get((arm, "recall"), ()) if s.group in KEPT and s.value is not None]
    return sum(values) / len(values) if values else None


def _of_attacks(results: Results, who: Mapping[str, str]) -> str:
    tried = attacks(results, who) if "edited" in who else []
    if not tried:
        return ""
    back = [a for a in tried if a.works]
    against = "than a model that never knew gives" if "oracle" in who else "than nothing"
    named = ", ".join(a.label for a in back[:4]) + (f" and {len(back) - 4} more" if len(back) > 4 else "")
    verb = "is" if len(back) < 2 else "are"
    said = f"{len(back) or 'None'} of {len(tried)} attacks {verb} shown to bring back more {against}"
    open_ = sum(a.change.value > 0 and not a.works for a in tried)
    more = f"; {open_} more drew some, which so few facts may owe to chance" if open_ else ""
    return f"{said}{f': {named}' if named else ''}{more}."


def _inside(first: Sequence[Line], who: Mapping[str, str]) -> str:
    tools = {"lens": "the logit lens finds", "probe": "a linear probe reads"}
    found = [f"{tools[x.evaluation]} {_shares(x.rows, who)}" for x in first if x.evaluation in tools]
    said = ", ".join(dict.fromkeys(found))
    return f"{said[0].upper()}{said[1:]} of the facts to forget." if said else ""


def _shares(rows: Mapping[str, Row], who: Mapping[str, str]) -> str:
    """The edited arm's value, with those of before and the oracle in brackets."""
    value = {role: rows[arm].value for role, arm in who.items() if arm in rows}
    beside = ", ".join(f"{role} {value[role]:.2f}" for role in ("before", "oracle") if role in value)
    return (f"{value['edited']:.2f}" if "edited" in value else "?") + (f" ({beside})" if beside else "")


def _aggregates(results: Results) -> list[Part]:
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results.summary():
        found.setdefault((row.evaluation, row.variant, row.group), {})[row.arm] = row
    made = [Line(e, v, g, _meaning(e, v, g), rows) for (e, v, g), rows in found.items()]
    if not made:
        return []
    first = [x for x in made if x.note]
    said = "Benchmarks' own numbers, each made of many scores."
    return [Part("aggregates", "All in one number", said, tuple(first), tuple(x for x in made if not x.note))]


def _meaning(evaluation: str, variant: str, group: str) -> str:
    """What an aggregate is; "" for one that is only a step towards another."""
    for (name, start), text in WHOLE.items():
        whole = (
            variant == start if name in ("model_utility", "linguistic", "forget_quality") else variant.startswith(start)
        )
        if name == evaluation and whole and (name != "linguistic" or group != "forget"):
            return text
    return ""
