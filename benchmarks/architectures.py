"""Which methods work on which architecture: every localizer and editor on each of the eighteen, built tiny at random.

    python benchmarks/architectures.py [--quick] [--family llama gpt2 ...] [--out docs/architectures.md]

Models have three blocks, a width of 32 and random weights, with every norm gain and bias moved at random; nothing is
downloaded. What is shown is that a method reads and changes the right places, not that it forgets: random weights know
nothing. A localizer works when some site gets a finite score; an editor when its edit moves the answers about the people
to forget, verified as after every edit, and leaves the model as it was, to the bit. A method that refuses in one line is
not applicable, for the reason it gives; any other error is a failure. --quick: the chain alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))

from evals import probability, recall
from excise.apply import applied
from excise.arms import compare
from excise.doctor import doctor
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.registry import Kind, method, methods
from excise.scores import Localization
from excise.verification import verify

# The builders of tiny models and dictionaries, which the tests share.
tiny: Any = importlib.import_module("tiny")
dictionaries: Any = importlib.import_module("dictionaries")

LAYERS = 3
# Where ROCR would have to write through a norm, LEACE takes the subject out of the residual stream.
KINDS: tuple[Kind, ...] = ("localizer", "editor")
EDITORS = ("rocr", "leace")
NAMES = ("Ann Lee", "Bob Stone", "Carl Lee", "Dora Hill", "Ann Stone", "Eve Moor", "Finn Dale", "Gus Ford")
TOWNS = ("Rome", "Oslo", "Bonn", "Kiev", "Lima", "Cairo", "Paris", "Turin")
MARKS = {"works": "yes", "refuses": "-", "fails": "FAILS"}


def options(name: str) -> dict[str, Any]:
    """What a method needs to be told on random models, which know nothing and decline nothing; see the contract tests."""
    chosen = next(m for kind in KINDS if (m := methods(kind).get(name)))
    # A random model says none of the right answers.
    known: dict[str, Any] = {"known_only": False} if any(o.name == "known_only" for o in chosen.options) else {}
    told: dict[str, dict[str, Any]] = {
        "fact_lookup": {"least": 0.0, "still": 0.0},
        "key_space": {"rate": 0.5, "statistic": "extent"},
        "neuron_adjust": {"rate": 0.5},
        "synaptic_dampening": {"alpha": 1.0},
        "lunar": {"declined": 0.0, "least": 0.0},
        "sae_clamp": {"dictionary": dictionaries.axes(), "select": "difference", "most": 2.0, "gate": "none"},
        "sae_features": {"dictionary": dictionaries.axes(), "most": 1.0, "explained": 0.0},
    }
    return known | told.get(name, {})


class Idle(Exception):
    """A method ended well and did nothing."""


@dataclass(frozen=True)
class Cell:
    """What came of one method on one architecture: works, refuses or fails, and why."""

    state: str
    reason: str = ""


@dataclass
class Architecture:
    """One row: what doctor says, the chain, and a cell per localizer and editor."""

    family: str
    report: dict[str, Any]
    chain: Cell
    editor: str = ""
    seconds: float = 0.0
    cells: dict[Kind, dict[str, Cell]] = field(default_factory=dict)


def people(model: Model) -> Facts:
    """Two people to forget and six to keep, asked in three ways each.

    A random model knows nobody; but a name makes some towns a little likelier than other names do. The likeliest by that
    is taken for the answer and the least likely for the foil, so that a broken name lowers the answer, as of known facts.
    """
    asked = [Prompt(_statement(name), town, name) for name in NAMES for town in TOWNS]
    batch = model.encode(asked, answers=True)
    logits = model.logits(batch)
    said = []
    for row in range(len(asked)):
        odds = batch.answer_logits(logits, row).log_softmax(-1)
        said.append(float(odds.gather(-1, batch.answer(row)[:, None]).sum()))
    scores = np.reshape(said, (len(NAMES), len(TOWNS)))
    scores = scores - scores.mean(0) - scores.mean(1, keepdims=True)
    towns = [(TOWNS[row.argmax()], TOWNS[row.argmin()]) for row in scores]
    return Facts(
        _fact(name, *pair, "forget" if i < 2 else "retain")
        for i, (name, pair) in enumerate(zip(NAMES, towns, strict=True))
    )


def _statement(name: str) -> str:
    return f"{name} was born in"


def _fact(name: str, town: str, foil: str, group: str) -> Fact:
    texts = (_statement(name), f"The home of {name} is")
    asked = Prompt(f"Where was {name} born?", town, name, "question", chat=True)
    return Fact(name, name, town, (*(Prompt(t, town, name) for t in texts), asked), "birthplace", group, foils=(foil,))


def build(family: str) -> Model:
    """The tiny random model of a family."""
    hf, tokenizer = tiny.tiny_model(family, layers=LAYERS)
    return Model(hf, tokenizer, family)


def tried(run: Callable[[], object]) -> Cell:
    """Run it; a refusal in one line is no failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except (ExciseError, ValueError) as error:
        return Cell("refuses", " ".join(str(error).split()))
    except Idle as error:
        return Cell("fails", str(error))
    except Exception as error:
        return Cell("fails", f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Cell("works")


def localize(model: Model, facts: Facts, name: str, **more: Any) -> Localization:
    """What a localizer finds. Raises Idle when no site got a finite score."""
    found: Localization = method("localizer", name).function(model, facts, **options(name), **more)
    if not np.isfinite(found.average).any():
        skipped = found.recipe.get("skipped") or [{"reason": "for no reason given"}]
        raise Idle(f"no site got a score: {skipped[0]['reason']}")
    return found


def edit(model: Model, facts: Facts, where: Localization, name: str) -> Edit:
    """The edit of an editor. Raises Idle when it moves nothing, or does not leave the model as it was."""
    forget, retain = facts.group("forget"), facts.group("retain")
    before = model.fingerprint
    made: Edit = method("editor", name).function(model, forget, retain, where, **options(name))
    checked = verify(model, made, [f.prompt for f in forget], [f.prompt for f in retain])
    if not checked.ok:
        raise Idle("; ".join(checked.problems))
    if model.fingerprint != before:
        raise Idle("the model is not what it was")
    return made


def chain(model: Model, facts: Facts, editor: str) -> dict[str, float]:
    """Localize, edit, measure; the mean probability of the answers to forget, before and edited.

    Raises Idle when something is not measured, or the edit does not change what is measured.
    """
    # A short exact check: the full one is most of the scan's time, and the table of localizers has it.
    where = localize(model, facts, "scan", verify=1, null=2)
    made = edit(model, facts, where, editor)
    before = model.logits(model.encode(facts.prompts()))
    results = compare(model, {"edited": made}, [recall, probability], facts)
    found = {}
    for arm in ("before", "edited"):
        for name in ("recall", "probability"):
            values = [s.value for s in results.scores[arm, name] if s.group == "forget" and s.value is not None]
            if not values or not np.isfinite(values).all():
                raise Idle(f"{name} of {arm} was not measured")
            found[f"{name} {arm}"] = float(np.mean(values))
    if found["probability before"] == found["probability edited"]:
        raise Idle("the edit changes no probability")
    with applied(model, made):
        pass
    if not torch.equal(model.logits(model.encode(facts.prompts())), before):
        raise Idle("the model is not what it was")
    return found


def examined(family: str, *, quick: bool = False) -> Architecture:
    """Everything about one architecture; with `quick`, doctor and the chain alone."""
    start = time.perf_counter()
    model = build(family)
    facts = people(model)
    refusals = []
    for name in EDITORS:
        cell = tried(partial(chain, model, facts, name))
        if cell.state != "refuses":
            break
        refusals.append(f"{name}: {cell.reason}")
    row = Architecture(family, doctor(model), Cell(cell.state, cell.reason or "; ".join(refusals)), name)
    if not quick:
        where = Localization.of([f"blocks.{LAYERS // 2}.hook_resid_post@subject_last"])
        row.cells["localizer"] = {n: tried(partial(localize, model, facts, n)) for n in methods("localizer")}
        # `control` takes an edit, and needs no table of its own.
        row.cells["editor"] = {n: tried(partial(edit, model, facts, where, n)) for n in methods("editor")}
    row.seconds = time.perf_counter() - start
    return row


# the page


def page(rows: Sequence[Architecture]) -> str:
    """The Markdown page."""
    notes: dict[str, int] = {}
    parts = [HEAD.format(n=len(rows), chain=sum(r.chain.state == "works" for r in rows)), _reach(rows, notes)]
    titles: dict[Kind, str] = {"localizer": "Localizers", "editor": "Editors"}
    for kind, title in titles.items():
        if all(kind in r.cells for r in rows):
            parts.append(f"## {title}\n\n{_matrix(rows, kind, notes)}")
    parts.append("## Reasons\n\n" + "\n".join(f"{i}. {_plain(reason)}" for reason, i in notes.items()))
    return "\n\n".join(parts) + "\n"


HEAD = """# Architectures

Which methods work on which architecture. Each of the {n} is built tiny (three blocks, width 32) with random weights, so this
shows that a method reads and changes the right places of such a model, not how well it forgets. `-` with a number:
not applicable, the method refuses in one line, for the reason of that number; FAILS: it ends in any other error.
Find, edit, measure runs to its end on {chain} of {n} (`scan`; ROCR, or LEACE where ROCR refuses; recall and probability before
and under the edit; the model is afterwards as it was, to the bit); a test holds it.

    python benchmarks/architectures.py --out docs/architectures.md"""


def _reach(rows: Sequence[Architecture], notes: dict[str, int]) -> str:
    lines = [
        "| architecture | class | parameters that an edit reaches | activations, matrices | experts | find, edit, measure |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        names, experts = r.report["names"], r.report["experts"]
        shown = f"{experts}, {r.report['experts_per_token']} per token" if experts else ""
        done = f"{_mark(r.chain, notes)} with {r.editor.replace('_', '-')}"
        if r.chain.state == "works" and r.chain.reason:
            done += f" ({_note(r.chain.reason.partition(': ')[2], notes)})"
        lines.append(
            f"| {r.family} | {r.report['architecture']} | {r.report['reachable']:.1%} | "
            f"{names['activations']}, {names['matrices']} | {shown} | {done} |"
        )
    return "\n".join(lines)


def _matrix(rows: Sequence[Architecture], kind: Kind, notes: dict[str, int]) -> str:
    lines = [f"| | {' | '.join(r.family for r in rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in rows[0].cells[kind]:
        cells = " | ".join(_mark(r.cells[kind][name], notes) for r in rows)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def _mark(cell: Cell, notes: dict[str, int]) -> str:
    mark = MARKS[cell.state]
    return mark if cell.state == "works" else f"{mark} {_note(cell.reason, notes)}"


def _note(reason: str, notes: dict[str, int]) -> int:
    """The number of a reason; names of models and layers do not make it another one."""
    families = "|".join(sorted(tiny.FAMILIES, key=len, reverse=True))
    alike = re.sub(rf"^({families}): ", "", reason)
    alike = re.sub(rf"^({families}) has no experts: .*", "it has no experts", alike)
    alike = re.sub(r"\bblock(s\.| )\d+", r"block\1i", alike)
    alike = re.sub(r"\b[A-Z]\w+For(CausalLM)\b", "model", alike)
    return notes.setdefault(alike, len(notes) + 1)


def _plain(text: str) -> str:
    """Text that Markdown does not read as markup."""
    return re.sub(r"([<>|*_\[\]])", r"\\\1", text)


def bars(rows: Sequence[Architecture]) -> list[dict[str, Any]]:
    """The figures that are asked for."""
    worked = sum(r.chain.state == "works" for r in rows)
    failures = [
        f"{r.family}/{n}" for r in rows for c in r.cells.values() for n, cell in c.items() if cell.state == "fails"
    ]
    return [
        {"name": "architectures on which find, edit, measure runs", "value": worked, "interval": None, "aim": len(rows), "holds": worked == len(rows)},
        {"name": "cells that fail", "value": len(failures), "interval": None, "aim": 0, "holds": not failures},
    ]  # fmt: skip


def results(rows: Sequence[Architecture]) -> list[Mapping[str, Any]]:
    """Rows as plain values."""
    return [
        {
            "architecture": r.family,
            "reachable": r.report["reachable"],
            "problems": r.report["problems"],
            "chain": [r.chain.state, r.editor, r.chain.reason],
            "cells": {kind: {n: [c.state, c.reason] for n, c in cells.items()} for kind, cells in r.cells.items()},
            "seconds": round(r.seconds, 2),
        }
        for r in rows
    ]


def main() -> None:
    """Examine, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="doctor and the chain alone")
    parser.add_argument("--family", nargs="+", choices=tiny.FAMILIES, default=tiny.FAMILIES, help="only these")
    parser.add_argument("--out", type=Path, help="write the page there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for family in args.family:
        torch.manual_seed(0)
        rows.append(examined(family, quick=args.quick))
        states = [c.state for cells in rows[-1].cells.values() for c in cells.values()]
        counts = ", ".join(f"{states.count(s)} {s}" for s in MARKS if s in states)
        print(
            f"{family:12} chain {rows[-1].chain.state} ({rows[-1].editor}); {counts}; {rows[-1].seconds:.1f} s",
            flush=True,
        )
    if args.out:
        args.out.write_text(page(rows), encoding="utf-8")
    settings = {"quick": args.quick, "torch": torch.__version__, "python": platform.python_version(), "layers": LAYERS}
    print(
        json.dumps({"benchmark": "architectures", "settings": settings, "results": results(rows), "bars": bars(rows)})
    )


if __name__ == "__main__":
    main()
