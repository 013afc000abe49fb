"""Does localization matter? How much forgetting a small edit of the best units buys, against random units.

    python benchmarks/localizer_value.py [--quick] [--model dense moe] [--people N] [--rows FILE] [--out FILE.md]

For every localizer and every kind of unit that it ranks: one person of the embedded world at a time, the k best units on
that person's facts are turned down (their rows of the matrix they write with, times 1 - s), and s is raised until the
answers to facts about other people have lost a fixed share of their probability. What the person's own answers have lost
by then, in all their trained forms, is what the localization is worth; the same for k random units of the same kind. At
most s = LARGEST (units that damage nothing at that strength are counted as they stand there). Features of a dictionary are
turned down where they are written into the stream; random ones are drawn from those that fire on the person's prompts.

People are the world's known ones that no localizer and no test here was tuned on: not among those that the oracle never
met, which everything else uses. Intervals are 95 % bootstraps over people; the difference to random units is paired.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.kept import add_rows, read_rows
from excise.actions import Scale
from excise.apply import applied
from excise.edits import Change, Edit
from excise.facts import Facts, Prompt
from excise.model import Model, load
from excise.progress import be_quiet
from excise.registry import method
from excise.scores import Localization
from excise.sites import Site
from excise.statistics import bootstrap_mean, sign_flip
from excise.testbed import facts as world_facts
from excise.testbed import world_of
from localize.expert_attribution import KINDS
from localize.weight_scores import MEASURES
from sae.dictionary import ACTS
from sae.own import of_model
from sae.statistics import statistics

# What the answers about other people may lose, in probability.
DAMAGE = 0.05
LARGEST = 32.0
STEPS = 5
DRAWS = 5
# Units turned down together, by kind.
K = {"neuron": 16, "head": 2, "expert": 2, "mlp": 1, "feature": 16}
# A unit: matrix and row (a head's number, None for a whole matrix).
Unit = tuple[str, int | None]


@dataclass(frozen=True)
class Case:
    """A localizer with options, and the kind of unit that is read off its result."""

    name: str
    localizer: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)


def cases(moe: bool) -> list[Case]:
    """What is compared."""
    attribution = {kind: {"components": [kind]} for kind in ("neuron", "head", "mlp")}
    found = [
        Case("causal_trace (MLP)", "causal_trace", "mlp", {"components": ["mlp"]}),
        Case("logit_lens", "logit_lens", "mlp", {"components": ["mlp"], "maps": False}),
        Case("fact_lookup", "fact_lookup", "mlp"),
        *(Case("attribution_patching", "attribution_patching", kind, o) for kind, o in attribution.items()),
        Case("attribution_patching (GradDrop)", "attribution_patching", "neuron", {**attribution["neuron"], "grad_drop": True}),
        *(Case("direct_logit", "direct_logit", kind, {"units": [kind]}) for kind in ("mlp", "head", "neuron")),
        Case("knowledge_neurons", "knowledge_neurons", "neuron"),
        *(Case(f"weight_attribution ({m})", "weight_attribution", "neuron", {"measure": m}) for m in MEASURES if m != "gradient"),
        Case("concept_vectors (words)", "concept_vectors", "neuron"),
        *(Case(f"concept_vectors ({s})", "concept_vectors", "neuron", {"search": s}) for s in ("functional", "open")),
        *(Case(f"sae_features ({r})", "sae_features", "feature", {"rule": r, "features": K["feature"]}) for r in ("sparsity", "attribution")),
        Case("attribution_patching", "attribution_patching", "feature", {"components": ["feature"]}),
        *(Case("scan", "scan", kind, {"kinds": [kind], "verify": 0}) for kind in ("neuron", "head", "mlp")),
    ]  # fmt: skip
    if moe:
        found += [
            *(Case(f"expert_attribution ({s})", "expert_attribution", "expert", {"score": s}) for s in KINDS if s != "frequency"),
            Case("attribution_patching", "attribution_patching", "expert", {"components": ["expert"]}),
            Case("scan", "scan", "expert", {"kinds": ["expert"], "verify": 0}),
        ]  # fmt: skip
    return found


def unit_of(site: Site, kind: str) -> Unit | None:
    """The unit that a site of a result stands for; None for sites of another kind."""
    layer = f"blocks.{site.layer}"
    if kind == "head" and site.point.endswith(("attn.hook_z", "attn.W_O")) and site.unit is not None:
        return f"{layer}.attn.W_O", site.unit
    expert = re.search(r"mlp\.experts\.\d+", site.point)
    if kind == "expert" and expert and site.unit is None:
        return f"{layer}.{expert[0]}.W_out", None
    if kind == "neuron" and site.unit is not None and ".mlp." in site.point:
        return f"{layer}.{expert[0] if expert else 'mlp'}.W_out", site.unit
    if kind == "feature" and site.point.endswith(ACTS):
        return site.point, site.unit
    if kind == "mlp" and site.unit is None and expert is None and "mlp" in site.point:
        return f"{layer}.mlp", None
    return None


def best_units(found: Localization, kind: str, k: int) -> list[Unit]:
    """The k best units by mean score; a unit seen at several tokens counts by its best."""
    order = np.argsort(-np.nan_to_num(found.average, nan=-np.inf), kind="stable")
    units = dict.fromkeys(u for i in order if (u := unit_of(found.sites[i], kind)) is not None)
    return list(units)[:k]


def all_units(model: Model, kind: str, prompts: Sequence[Prompt]) -> list[Unit]:
    """Every unit of a kind; of features those that fire on some prompts."""
    if kind == "feature":
        book = of_model(model)
        return [(f"{book.hook}.{ACTS}", u) for u in statistics(model, book, prompts).count.nonzero()[:, 0].tolist()]
    if kind == "mlp":
        return [(f"blocks.{i}.mlp", None) for i in range(model.n_layers)]
    if kind == "head":
        return [(f"blocks.{i}.attn.W_O", h) for i in range(model.n_layers) for h in range(model.names.n_heads)]
    written = [w for i in range(model.n_layers) for w in model.names.weights(i) if w.endswith("W_out")]
    if kind == "expert":
        return [(w, None) for w in written if ".experts." in w]
    return [(w, u) for w in written for u in range(model.weight(w).shape[0])]


def silenced(model: Model, units: Sequence[Unit]) -> Edit:
    """The edit that turns the units off; `scaled(s)` turns them down by s."""
    if units and units[0][0].endswith(ACTS):
        book = of_model(model)
        clamp = book.clamp([u for _, u in units if u is not None], 0.0)
        return Edit((Change(Site(book.hook, "all"), clamp),), {"method": "silenced"})
    rows: dict[str, list[int]] = {}
    for matrix, unit in units:
        owned = [matrix]
        if matrix.endswith(".mlp"):
            layer = int(matrix.split(".")[1])
            owned = [w for w in model.names.weights(layer) if w.endswith("W_out")]
        for name in owned:
            height = model.weight(name).shape[0]
            d_head = height // model.names.n_heads
            mine = range(height) if unit is None else [unit]
            if unit is not None and name.endswith("W_O"):
                mine = range(unit * d_head, (unit + 1) * d_head)
            rows.setdefault(name, []).extend(mine)
    return Edit(
        tuple(Change(Site(name), Scale(torch.tensor(r), torch.zeros(len(r)))) for name, r in rows.items()),
        {"method": "silenced"},
    )


class Probabilities:
    """First-token probabilities of the answers to fixed prompts, tokenised once."""

    def __init__(self, model: Model, prompts: Sequence[Prompt]) -> None:
        self.model, self.n = model, len(prompts)
        self.batches = list(model.batches(prompts, answers=True))

    @torch.no_grad()
    def __call__(self) -> np.ndarray:
        """Probability of each prompt's first answer token, [n_prompts]."""
        found = np.zeros(self.n)
        for index, batch in self.batches:
            rows, at = torch.arange(len(batch)), torch.tensor(batch.starts)
            hidden = self.model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            chosen = hidden[rows, at - 1].float().softmax(-1)[rows, batch.ids[rows, at]]
            found[index] = chosen.cpu().numpy()
        return found


def forgotten(model: Model, edit: Edit, own: Probabilities, others: Probabilities) -> dict[str, float]:
    """What the person's answers have lost when those of others have lost DAMAGE: strength by bisection of its logarithm."""
    before = float(own().mean()), float(others().mean())

    def lost(strength: float) -> tuple[float, float]:
        with applied(model, edit.scaled(strength)):
            return before[0] - float(own().mean()), before[1] - float(others().mean())

    low, high = (0.0, 0.0, 0.0), (LARGEST, *lost(LARGEST))
    if high[2] > DAMAGE:
        a, b = np.log(0.05), np.log(LARGEST)
        for _ in range(STEPS):
            middle = float(np.exp((a + b) / 2))
            at = (middle, *lost(middle))
            if at[2] > DAMAGE:
                b, high = np.log(middle), at
            else:
                a, low = np.log(middle), at
        # Between the two ends damage is taken as a straight line.
        share = (DAMAGE - low[2]) / (high[2] - low[2])
        return {"forgotten": low[1] + share * (high[1] - low[1]), "damage": DAMAGE, "strength": high[0]}
    return {"forgotten": high[1], "damage": high[2], "strength": LARGEST}


def people_of(name: str, count: int, seed: int) -> list[str]:
    """Known people that the oracle met too: everything else is measured, and was tuned, on the others."""
    known = list(world_of(name).retain_people)
    return random.Random(f"localizer value {seed}").sample(known, count)


def measure(
    model: Model, name: str, person: str, number: int, draws: int, done: set[tuple[str, str]]
) -> list[dict[str, Any]]:
    """One row per case and per random draw, for one person; done: (case, kind) of what is known already."""
    wanted = cases(model.names.n_experts > 0)
    if all((c.name, c.kind) in done for c in wanted):
        return []
    world = world_facts(name, forget=[person], neighbours=12, retain=24, unknown=0, general=0, seed=number)
    forget, kept = world.group("forget"), world.group("retain", "neighbour")
    own = Probabilities(model, [p for f in forget for p in (f.prompt, *f.ask("question", held_out=False)[:1])])
    # Half of the other people tell a method what to spare, the other half the damage.
    spared, judged = Facts(list(kept)[::2]), list(kept)[1::2]
    others = Probabilities(model, [f.prompt for f in judged[:: max(1, len(judged) // 32)]])
    rows = []
    for case in (c for c in wanted if (c.name, c.kind) not in done):
        chosen = method("localizer", case.localizer)
        others_known = {"pool": Facts([*forget, *spared]), "retain": spared}
        pool = {o.name: others_known[o.name] for o in chosen.options if o.name in others_known}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            units = best_units(chosen.function(model, forget, **case.options, **pool), case.kind, K[case.kind])
        rows.append({"case": case.name, "kind": case.kind, **forgotten(model, silenced(model, units), own, others)})
    for kind in dict.fromkeys(c.kind for c in wanted if ("random", c.kind) not in done):
        every = all_units(model, kind, [p for f in forget for p in f.prompts])
        for draw in range(draws):
            units = random.Random(f"{person} {kind} {draw}").sample(every, K[kind])
            made = forgotten(model, silenced(model, units), own, others)
            rows.append({"case": "random", "kind": kind, "draw": draw, **made})
    return [{"model": name, "person": person, **row} for row in rows]


def measured(names: Sequence[str], count: int, draws: int, kept: Path | None) -> list[dict[str, Any]]:
    """Rows of all people; what is in `kept` is not measured again, and new rows are added to it person by person."""
    be_quiet()
    rows = read_rows(kept)
    for name in names:
        people = people_of(name, count, 0)
        rows = [r for r in rows if r["model"] != name or r["person"] in people]
        model = load(f"testbed:{name}")
        for number, person in enumerate(people):
            start = time.process_time()
            known = {(r["case"], r["kind"]) for r in rows if (r["model"], r["person"]) == (name, person)}
            new = measure(model, name, person, number, draws, known)
            rows += new
            add_rows(kept, new)
            seconds = time.process_time() - start
            print(f"{name}: {number + 1} of {count} people, {seconds:.0f} CPU s", file=sys.stderr, flush=True)
    return [r for r in rows if r["model"] in names]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per model, kind and localizer: mean forgetting, random's, their paired difference with its p."""
    lines = []
    for model, kind in dict.fromkeys((r["model"], r["kind"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["kind"]) == (model, kind)]
        people = list(dict.fromkeys(r["person"] for r in mine))
        chance = np.array(
            [np.mean([r["forgotten"] for r in mine if r["case"] == "random" and r["person"] == p]) for p in people]
        )
        for case in dict.fromkeys(r["case"] for r in mine if r["case"] != "random"):
            by_person = {r["person"]: r for r in mine if r["case"] == case}
            values = np.array([by_person[p]["forgotten"] for p in people])
            gain = bootstrap_mean(values - chance, counts=False)
            lines.append(
                {"model": model, "kind": kind, "k": K[kind], "localizer": case, "people": len(people)}
                | {"forgotten": list(bootstrap_mean(values, counts=False)), "random": list(bootstrap_mean(chance, counts=False))}
                | {"difference": list(gain), "p": sign_flip(values - chance), "beats_random": bool(gain.low > 0)}
                | {"reached": float(np.mean([by_person[p]["damage"] >= DAMAGE for p in people]))}
            )  # fmt: skip
    return sorted(lines, key=lambda x: (x["model"], x["kind"], -x["difference"][0]))


def page(lines: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The table as Markdown."""

    def cell(x: Sequence[float]) -> str:
        return f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"

    text = [
        "# What a localization is worth",
        "",
        "For each localizer: on one person's facts, the best k units are turned down until the answers to facts about",
        f"other people have lost {DAMAGE:.2f} of their probability on average; *forgotten* is what the answers about the",
        "person have lost by then, and *random* the same for k random units of the same kind"
        f" ({settings['draws']} draws a person).",
        "People of the embedded world on whom nothing was tuned, 95 % intervals over people; the",
        "difference is paired. A localizer beats random where the interval of the difference lies above 0. *reached*: share of",
        f"people where the damage was reached at all (strength at most {LARGEST:g}; a strength of 1 silences a unit).",
        "",
        "    python benchmarks/localizer_value.py --out docs/localizer_value.md",
    ]
    for model, kind in dict.fromkeys((x["model"], x["kind"]) for x in lines):
        people = next(x["people"] for x in lines if (x["model"], x["kind"]) == (model, kind))
        text += ["", f"## {model}, {kind}s, k = {K[kind]}, {people} people", ""]
        text += [
            "| localizer | forgotten | random | difference | p | beats random | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for x in (x for x in lines if (x["model"], x["kind"]) == (model, kind)):
            verdict = "yes" if x["beats_random"] else "worse" if x["difference"][2] < 0 else "no"
            cells = [
                x["localizer"],
                cell(x["forgotten"]),
                cell(x["random"]),
                cell(x["difference"]),
                f"{x['p']:.3f}",
                verdict,
            ]
            text.append(f"| {' | '.join(cells)} | {x['reached']:.2f} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two people on the dense model: under a minute")
    parser.add_argument("--model", nargs="+", choices=("dense", "moe"))
    parser.add_argument("--people", type=int, help="people per model (default 10)")
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--rows", type=Path, help="keep what was measured there, JSON Lines, and go on from it")
    parser.add_argument("--out", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    models = args.model or (["dense"] if args.quick else ["dense", "moe"])
    count = args.people or (2 if args.quick else 10)
    torch.set_num_threads(1)
    lines = summary(measured(models, count, args.draws, args.rows))
    settings = {"models": models, "people": count, "draws": args.draws, "k": K, "damage": DAMAGE, "largest": LARGEST,
                "torch": torch.__version__, "python": platform.python_version()}  # fmt: skip
    for x in lines:
        print(f"{x['model']:6} {x['kind']:7} {x['localizer']:34} {x['forgotten'][0]:6.3f} random {x['random'][0]:6.3f} "
              f"difference {x['difference'][0]:6.3f} [{x['difference'][1]:.3f}, {x['difference'][2]:.3f}]")  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(page(lines, settings), encoding="utf-8")
    bars = [
        {"name": f"{x['model']} {x['kind']} {x['localizer']}: forgetting over random", "value": x["difference"][0],
         "interval": x["difference"][1:], "aim": "> 0", "holds": x["beats_random"]}
        for x in lines
    ]  # fmt: skip
    print(json.dumps({"benchmark": "localizer_value", "settings": settings, "results": lines, "bars": bars}))


if __name__ == "__main__":
    main()
