"""Every editor on facts about people of the embedded worlds, beside its random control and the oracle.

    python benchmarks/editor_table.py [--quick] [--model dense moe] [--rows FILE] [--out docs/editor_table.md]

One row per editor: what is still said of the people to forget (all generative forms pooled, and the worst form), choices,
what became of other people and of those who share a name word, half of whom no editor is shown, loss on general text,
refusals, the spread between a fact's forms, and how often another person's value is stated instead. The control is a random twin
of the same kind, sites, rank and norm; where it does less harm than the edit it is made stronger until it does as much, so
that the two are compared at equal damage. Distance: sqrt((forget - oracle's)^2 + (retain - oracle's)^2), all of recall.

People and draws (seeds 4001 on) are ones that nothing was tuned on; intervals are over people. With --rows every finished
case is kept, and a further call goes on from there.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept import add_rows, read_rows
from evals import drift, form_spread, recall, refusal
from excise.arms import Arm
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import GENERATIVE_FORMS, Facts
from excise.model import load
from excise.registry import method
from excise.resampling import bootstrap_mean
from excise.scores import Score
from excise.testbed import facts, general_text, refusals
from localize import causal_trace

SEEDS, PEOPLE = (4001, 4002), 8
# A control is made stronger by these factors until it harms as much as the edit.
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
AS_HARMFUL = 0.01
# An editor beats its control where that leaves so many more of the answers; why some do not.
CLEARLY = 0.1
_GATE = "Its control stands behind the same gate, and behind that nearly any disturbance loses the answer: what chooses is the gate, "
REASONS = {
    "neuron_adjust": _GATE + "not the neurons.",
    "sae_clamp": _GATE + "not the features.",
    "concept_ablation": "The vectors that spell a person's words are few and shared, and most of a name's facts stand elsewhere.",
    "expert_edit, silence": "An expert serves many people: silencing those that matter to one costs the others as much.",
    "synaptic_dampening": "Weights that matter to single people matter to those who resemble them.",
    "single_gradient": "One step along one gradient moves what all people share.",
}
# Prompts per group, form and side of the held-out split.
LIMIT = 32
Sums = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Case:
    """An editor with options, on so many people."""

    name: str
    editor: str
    options: Mapping[str, Any] = field(default_factory=dict)
    people: int = PEOPLE
    moe_only: bool = False


CASES = (
    Case("rocr", "rocr"),
    Case("rocr, 1 person", "rocr", people=1),
    Case("rocr, 10 people", "rocr", people=10),
    Case("rocr, all people", "rocr", people=0),
    Case("lunar", "lunar"),
    Case("lunar, hook", "lunar", {"mode": "hook"}),
    Case("rome, fictitious values", "rome", {"value": "fictitious"}),
    Case("rome, optimised values", "rome"),
    Case("memit", "memit"),
    Case("alphaedit", "alphaedit"),
    Case("leace", "leace"),
    Case("directional_ablation", "directional_ablation"),
    Case("concept_ablation", "concept_ablation"),
    Case("neuron_adjust", "neuron_adjust"),
    Case("key_space", "key_space"),
    Case("synaptic_dampening", "synaptic_dampening"),
    Case("single_gradient", "single_gradient"),
    Case("sae_clamp", "sae_clamp"),
    Case("expert_edit, rewrite", "expert_edit", moe_only=True),
    Case("expert_edit, steer", "expert_edit", {"how": "steer"}, moe_only=True),
    Case("expert_edit, silence", "expert_edit", {"how": "silence"}, moe_only=True),
)


def applies(case: Case, name: str) -> bool:
    """Whether a case is for this model."""
    return name == "moe" or not case.moe_only


class Bench:
    """One world with one draw of people: the edits are made and measured here."""

    def __init__(self, name: str, seed: int, people: int) -> None:
        self.name, self.seed = name, seed
        self.model, self.oracle = load(f"testbed:{name}"), load(f"testbed:{name}-oracle")
        from excise.testbed import world_of

        count = people or len(world_of(name).forget_people)
        self.facts = facts(name, people=count, seed=seed, retain=32, neighbours=24, unknown=24)
        self.forget = self.facts.shown.group("forget")
        self.retain = self.facts.shown.group("retain", "neighbour")
        texts = general_text(name, 400, seed=seed, exclude=self.forget.subjects)
        self.texts, self.loss_texts = texts[100:], tuple(texts[:100])
        self.values = _values(self.facts)
        self.before = Arm("before", self.model)
        self._where: Any = None

    def where(self) -> Any:
        """Causal tracing of one fact a person, as the chain does it."""
        if self._where is None:
            turned = list({f.subject: f for f in self.forget}.values())
            self._where = causal_trace(self.model, Facts(turned), seed=self.seed)
        return self._where

    def edit(self, case: Case) -> Edit:
        """The edit of a case, with ordinary text for those that take it."""
        chosen = method("editor", case.editor)
        names = {o.name for o in chosen.options}
        given = {"seed": self.seed, "texts": self.texts}
        options = {k: v for k, v in given.items() if k in names} | dict(case.options)
        where = self.where() if case.editor in ("rocr", "rome", "memit", "alphaedit") else None
        return chosen.function(self.model, self.forget, self.retain, where, **options)

    def measured(self, arm: Arm) -> Sums:
        """Every figure of an arm: by measure and person, the sum and the number of values."""
        limits: dict[str, Any] = {"limit": LIMIT, "seed": self.seed}
        said = recall(arm, self.facts, **limits)
        found = _summed((f"recall {s.group} {_form(s)}", s) for s in said)
        checks = {f.id for f in self.facts.checks}
        found |= _summed((f"unseen {s.group}", s) for s in said if s.fact in checks and _generative(s))
        found |= _summed((f"pooled {s.group}", s) for s in said if _generative(s))
        found |= _summed(
            ("another value", _replaced(s, float(self._states_another(s))))
            for s in said
            if s.group == "forget" and _generative(s)
        )
        declined = refusal(arm, self.facts, refusals=tuple(refusals(self.name)), **limits)
        found |= _summed((f"refused {s.group}", s) for s in declined)
        loss = drift(arm, self.facts, before=self.before, texts=self.loss_texts, limit=100)
        found |= _summed(("loss", s) for s in loss if s.variant == "relative change")
        spread = form_spread(arm, self.facts, before=self.before, **limits)
        return found | _summed((f"spread {s.group}", s) for s in spread if s.variant == "spread")

    def kept(self, arm: Arm) -> float:
        """Recall of other people: a quick look."""
        said = recall(
            arm, self.facts, groups=("retain", "neighbour"), forms=("statement", "question"), limit=16, words=0
        )
        return float(np.mean([s.value for s in said if s.value is not None]))

    def _states_another(self, score: Score) -> bool:
        relation, answer = self.values[0][score.fact]
        text = f" {score.detail.lower().strip('. ')} "
        return any(f" {v.lower()} " in text for v in self.values[1][relation] if v != answer)


def _values(known: Facts) -> tuple[dict[str, tuple[str, str]], dict[str, set[str]]]:
    by_fact = {f.id: (f.relation, f.answer) for f in known if f.group != "unknown"}
    pools: dict[str, set[str]] = {}
    for relation, answer in by_fact.values():
        pools.setdefault(relation, set()).add(answer)
    return by_fact, pools


def _form(score: Score) -> str:
    return f"{score.form}{' held out' if score.held_out else ''}"


def _generative(score: Score) -> bool:
    return score.form in GENERATIVE_FORMS


def _replaced(score: Score, value: float) -> Score:
    return Score(score.fact, score.subject, score.group, value, score.form, score.held_out)


def _summed(scores: Any) -> Sums:
    found: Sums = {}
    for measure, score in scores:
        if score.value is not None:
            cell = found.setdefault(measure, {}).setdefault(score.subject or score.fact, [0.0, 0])
            cell[0] += score.value
            cell[1] += 1
    return found


def control_of(bench: Bench, edit: Edit, harmed: float) -> tuple[Edit, float]:
    """The random twin, as much stronger as it takes to do as much harm as the edit; and how much that is."""
    import edit as editors

    twin = editors.control(edit, seed=bench.seed)
    for strength in STRENGTHS:
        try:
            stronger = twin if strength == 1.0 else twin.scaled(strength)
        except (ExciseError, ValueError):  # what has no strength, such as an answer given instead
            return twin, 1.0
        if bench.kept(Arm("control", bench.model, stronger)) <= harmed + AS_HARMFUL:
            return stronger, strength
    return stronger, strength


def run(name: str, seed: int, case: Case, benches: dict[Any, Bench]) -> list[dict[str, Any]]:
    """Rows of one case: the edit and its control; before and the oracle with the first case on these people."""
    key = (name, seed, case.people)
    if key not in benches:
        benches.clear()
        benches[key] = Bench(*key)
    bench, about = benches[key], {"model": name, "seed": seed, "case": case.name, "people": case.people}
    start = time.process_time()
    try:
        edit = bench.edit(case)
    except ExciseError as error:
        return [{**about, "arm": "edited", "declined": str(error)}]
    seconds = time.process_time() - start
    arm = Arm("edited", bench.model, edit)
    rows = [{**about, "arm": "edited", "mode": arm.mode, "seconds": round(seconds, 1), "measures": bench.measured(arm)}]
    twin, strength = control_of(bench, edit, bench.kept(arm))
    rows.append(
        {**about, "arm": "control", "strength": strength, "measures": bench.measured(Arm("control", bench.model, twin))}
    )
    if "references" not in vars(bench):
        bench.references = [  # type: ignore[attr-defined]
            ("before", bench.measured(bench.before)), ("oracle", bench.measured(Arm("oracle", bench.oracle)))
        ]  # fmt: skip
    rows += [{**about, "arm": arm, "measures": found} for arm, found in bench.references]  # type: ignore[attr-defined]
    return rows


def pooled(rows: Sequence[Mapping[str, Any]], measure: str) -> list[float] | None:
    """Mean of a measure over all people of some rows with its 95 % interval over people, and n."""
    cells = [(person, *cell) for r in rows for person, cell in r["measures"].get(measure, {}).items()]
    if not cells:
        return None
    values = np.concatenate([np.full(int(n), total / n) for _, total, n in cells])
    owners = np.concatenate([np.full(int(n), i) for i, (_, _, n) in enumerate(cells)])
    counts = len(cells) < 2 or measure.startswith(("recall", "pooled", "unseen", "refused", "another"))
    shares = (
        np.concatenate([np.repeat([1.0, 0.0], [round(t), int(n) - round(t)]) for _, t, n in cells])
        if counts
        else values
    )
    found = bootstrap_mean(shares, owners, counts=counts)
    return [found.value, found.low, found.high, int(sum(n for *_, n in cells))]


def line(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the table from the rows of one case and model."""
    arms = {a: [r for r in rows if r["arm"] == a] for a in ("edited", "control", "before", "oracle")}
    forms = sorted(
        {m for r in arms["edited"] for m in r["measures"] if m.startswith("recall forget") and _asked_freely(m)}
    )
    found: dict[str, Any] = {k: rows[0][k] for k in ("model", "case", "people")}
    found |= {
        "seeds": len(arms["edited"]),
        "mode": arms["edited"][0]["mode"],
        "strength of control": arms["control"][0]["strength"],
    }
    found["seconds"] = float(np.mean([r["seconds"] for r in arms["edited"]]))
    for measure in MEASURES:
        found |= {f"{measure}, {arm}": pooled(mine, measure) for arm, mine in arms.items()}
    worst = {m: pooled(arms["edited"], m) for m in forms}
    found["worst form"] = max(worst.items(), key=lambda item: item[1][0] if item[1] else 0.0)
    kept = {a: np.mean([found[f"pooled {g}, {a}"][0] for g in ("retain", "neighbour")]) for a in arms}
    for a in ("edited", "control", "before"):
        told = found[f"pooled forget, {a}"][0] - found["pooled forget, oracle"][0]
        found[f"distance, {a}"] = float(np.hypot(told, kept[a] - kept["oracle"]))
    return found


MEASURES = (
    "pooled forget", "recall forget choice", "recall forget reversed", "pooled retain", "pooled neighbour", "unseen retain",
    "unseen neighbour", "loss", "refused forget", "refused retain", "refused neighbour", "refused unknown",
    "spread forget", "another value",
)  # fmt: skip


def _asked_freely(measure: str) -> bool:
    return measure.split()[2] in GENERATIVE_FORMS


def page(lines: Sequence[Mapping[str, Any]], declined: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown."""

    def cell(x: Sequence[float] | None) -> str:
        return "" if x is None else f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"

    text = ["# Editors, side by side", "", *(__doc__ or "").strip().split("\n")[4:], ""]
    text += ["    python benchmarks/editor_table.py --out docs/editor_table.md"]
    for model in dict.fromkeys(x["model"] for x in lines):
        mine = [x for x in lines if x["model"] == model]
        first = mine[0]
        text += ["", f"## {model}", ""]
        text += [f"Before: forget {cell(first['pooled forget, before'])}; oracle: forget {cell(first['pooled forget, oracle'])}, "
                 f"retain {cell(first['pooled retain, oracle'])}, declines {cell(first['refused forget, oracle'])}.", ""]  # fmt: skip
        heads = ["editor", "mode", "forget", "worst form", "its control", "retain", "name-sharers", "unseen of them",
                 "loss", "declines forget", "declines retain", "another value", "distance", "of control", "CPU s"]  # fmt: skip
        text += [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
        for x in sorted(mine, key=lambda x: x["distance, edited"]):
            form, worst = x["worst form"]
            cells = [
                x["case"], x["mode"], cell(x["pooled forget, edited"]), f"{worst[0]:.2f} ({form.removeprefix('recall forget ')})",
                f"{x['pooled forget, control'][0]:.2f} at {x['strength of control']:g}x", cell(x["pooled retain, edited"]),
                cell(x["pooled neighbour, edited"]), cell(x["unseen neighbour, edited"]), f"{x['loss, edited'][0]:+.1%}",
                cell(x["refused forget, edited"]), cell(x["refused retain, edited"]), f"{x['another value, edited'][0]:.2f}",
                f"{x['distance, edited']:.3f}", f"{x['distance, control']:.3f}", f"{x['seconds']:.0f}",
            ]  # fmt: skip
            text.append(f"| {' | '.join(cells)} |")
        text += [f"\n{r['case']} makes no edit here: {r['declined']}" for r in declined if r["model"] == model]
    text += ["", "## No better than random", "", *as_good_as_random(lines)]
    return "\n".join(text) + "\n"


def as_good_as_random(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each editor that forgets no more than its control at equal damage, and why."""
    found = []
    for x in lines:
        mine, twin = x["pooled forget, edited"][0], x["pooled forget, control"][0]
        if twin - mine < CLEARLY:
            why = next((text for name, text in REASONS.items() if x["case"].startswith(name)), "")
            found.append(
                f"- {x['model']}, {x['case']}: {mine:.2f} of the answers stay, {twin:.2f} under its control. {why}"
            )
    return found


def bars(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is asked of the editors, and whether it holds."""
    found: list[dict[str, Any]] = []

    def bar(
        x: Mapping[str, Any], name: str, value: Sequence[float] | None, aim: str, holds: Callable[[float], bool]
    ) -> None:
        if value is not None:
            whole = {
                "name": f"{x['model']} {x['case']}: {name}",
                "value": value[0],
                "interval": list(value[1:3]) or None,
                "aim": aim,
            }
            found.append(whole | {"holds": bool(holds(value[0]))})

    for x in lines:
        gain = x["pooled forget, control"][0] - x["pooled forget, edited"][0]
        bar(x, "forgets more than its control at equal damage", [gain], "> 0", lambda v: v > 0)
        if x["case"].startswith("rocr"):
            bar(x, "worst form", x["worst form"][1], "<= 0.05", lambda v: v <= 0.05)
            bar(x, "retain", x["pooled retain, edited"], ">= 0.99", lambda v: v >= 0.99)
            bar(x, "name-sharers", x["pooled neighbour, edited"], ">= 0.97", lambda v: v >= 0.97)
            bar(x, "general loss", x["loss, edited"], "<= +1 %", lambda v: v <= 0.01)
            bar(x, "spread between forms", x["spread forget, edited"], "<= 0.05", lambda v: v <= 0.05)
            bar(x, "another person's value stated", x["another value, edited"], "<= 0.05", lambda v: v <= 0.05)
        if x["case"].startswith("lunar"):
            bar(x, "forget questions declined", x["refused forget, edited"], ">= 0.90", lambda v: v >= 0.90)
            bar(x, "retain falsely refused", x["refused retain, edited"], "<= 0.03", lambda v: v <= 0.03)
            as_before = x["refused unknown, edited"][0] - x["refused unknown, before"][0]
            bar(x, "unknown names refused, change", [as_before], ">= -0.05", lambda v: v >= -0.05)
    return found


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="rocr alone, dense model, one draw: under a minute")
    parser.add_argument("--model", nargs="+", choices=("dense", "moe"))
    parser.add_argument("--cases", nargs="+", help="names of cases; all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--rows", type=Path, help="keep what was measured there, JSON Lines, and go on from it")
    parser.add_argument("--out", type=Path, help="write the tables there as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    models = args.model or (["dense"] if args.quick else ["dense", "moe"])
    seeds = args.seeds[:1] if args.quick else args.seeds
    wanted = [c for c in CASES if c.name in (args.cases or (["rocr"] if args.quick else [c.name]))]
    rows = read_rows(args.rows)
    done = {(r["model"], r["seed"], r["case"]) for r in rows}
    benches: dict[Any, Bench] = {}
    for seed in seeds:
        for name in models:
            for case in sorted((c for c in wanted if applies(c, name)), key=lambda c: c.people != PEOPLE):
                if (name, seed, case.name) not in done:
                    new = run(name, seed, case, benches)
                    rows += new
                    add_rows(args.rows, new)
                    print(f"{name} {seed} {case.name}", file=sys.stderr, flush=True)
    whole = [r for r in rows if "measures" in r and r["model"] in models]
    keys = dict.fromkeys((r["model"], r["case"]) for r in whole)
    lines = [line([r for r in whole if (r["model"], r["case"]) == key]) for key in keys]
    declined = list({(r["model"], r["case"]): r for r in rows if "declined" in r}.values())
    if args.out:
        args.out.write_text(page(lines, declined), encoding="utf-8")
    for x in lines:
        told = x["pooled forget, edited"]
        print(f"{x['model']:6}{x['case']:26} forget {told[0]:.3f} [{told[1]:.3f}, {told[2]:.3f}] n {told[3]} "
              f"retain {x['pooled retain, edited'][0]:.3f} distance {x['distance, edited']:.3f}")  # fmt: skip
    settings = {"models": models, "seeds": list(seeds), "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "editor_table", "settings": settings, "results": lines, "bars": bars(lines)}))


if __name__ == "__main__":
    main()
