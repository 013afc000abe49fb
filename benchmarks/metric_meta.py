"""Are the metrics any good? Do they tell models that know from models that never learned, and does that survive attacks?

    python benchmarks/metric_meta.py [--quick] [--out docs/metric_meta.md]

A real small language model (stories260k) is taught sixty invented facts. Pool P knows them (three seeds, two learning
rates, all wordings); pool N does not: taught the facts to keep only, or those and wrong answers in place of the ones to
forget. Faithfulness: AUC with which a metric, its mean over the facts to forget, tells P from N. Robustness: edited models
(MEMIT, ROME, MEMIT at half strength), relearned for one epoch on the facts to forget, or rounded to 4 bits:
symmetric 1 - |dU - dR| / (|dU| + |dR|) against the same relearning of a model of N, and 1 - |after - before| / (|after| + |before|)
(open-unlearning, arXiv 2506.12618). Overall: their harmonic mean. The default audit takes metrics of
faithfulness 0.9 or more; refusal, fluency and drift are in it for what they say of damage.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from edit import memit, rome
from evals.quantisation import rounded
from evals.tampering import matrices
from excise.apply import bake
from excise.arms import Arm
from excise.audit import DEFAULT, chosen
from excise.facts import Facts, Prompt
from excise.measure import measure
from excise.model import Model
from excise.progress import be_quiet
from excise.resampling import auc
from excise.testbed.teach import teach
from tests.toy import stories, toy_facts

SEEDS, RATES, STEPS = (0, 1, 2), (3e-3, 1.5e-3), 120
BITS, FAITHFUL = 4, 0.9
# Not metrics of one model: they compare with what these pools do not have, or change the question asked.
# In the default audit for what they say of damage, not of knowledge.
OF_DAMAGE = ("refusal", "fluency", "drift")
LEFT_OUT = ("lm_eval", "expert_rollback", "router_shift", "sae_residual")
Key = tuple[str, str]


def wrong(known: Facts) -> list[Prompt]:
    """Prompts of the facts to forget with a wrong answer each."""
    return [replace(p, answer=f.foils[0]) for f in known.group("forget") for p in f.ask(held_out=False)]


def pools(quick: bool) -> tuple[list[Model], list[Model]]:
    """Models that know the facts to forget, and models that do not."""
    known, base = toy_facts(), stories()
    every, kept = known.prompts(held_out=False), known.group("retain").prompts(held_out=False)
    seeds, rates = (SEEDS[:1], RATES) if quick else (SEEDS, RATES)
    runs = [(seed, rate) for seed in seeds for rate in rates]
    knows = [teach(base, every, steps=STEPS, seed=s, rate=r) for s, r in runs]
    never = [
        teach(base, kept if i % 2 else kept + wrong(known), steps=STEPS, seed=s, rate=r)
        for i, (s, r) in enumerate(runs)
    ]
    return knows, never


def values(models: Sequence[Model], before: Model, oracle: Model, wanted: Sequence[Any]) -> list[dict[Key, float]]:
    """Mean of every metric over the facts to forget, by model; each is measured beside the same two references."""
    found = []
    for i, model in enumerate(models):
        arms = [Arm("before", before), Arm("model", model), Arm("oracle", oracle)]
        results = measure(arms, wanted, toy_facts(), shared={"seed": 0})
        means: dict[Key, list[float]] = {}
        for (arm, evaluation), scores in results.scores.items():
            for s in scores:
                if arm == "model" and s.group == "forget" and s.value is not None and "layer " not in s.variant:
                    means.setdefault((evaluation, s.variant), []).append(s.value)
        found.append({k: float(np.mean(v)) for k, v in means.items()})
        print(f"model {i + 1} of {len(models)}", file=sys.stderr, flush=True)
    return found


def relearned(model: Model) -> Model:
    """One epoch on the facts to forget, at a tenth of the rate of teaching."""
    prompts = toy_facts().group("forget").prompts(held_out=False)
    return teach(model, prompts, steps=max(1, len(prompts) // 8), rate=RATES[0] / 10, batch=8)


def quantised(model: Model) -> Model:
    """A copy with every matrix of the blocks rounded."""
    made = Model(copy.deepcopy(model.hf), model.tokenizer, f"{model.name}, {BITS} bits")
    with torch.no_grad():
        for name in matrices(made):
            view = made.weight(name)
            view.copy_(rounded(view, BITS))
    return made


def edited(model: Model) -> list[Model]:
    """The model under some edits, each in a copy."""
    forget, retain = toy_facts().split("forget", "retain")
    whole = memit(model, forget, retain)
    made = []
    for edit in (whole, rome(model, forget, retain), whole.scaled(0.5)):
        copied = Model(copy.deepcopy(model.hf), model.tokenizer, "edited")
        bake(copied, edit, force=True)
        made.append(copied)
    return made


def symmetric(before: tuple[float, float], after: tuple[float, float]) -> float:
    """1 - |dU - dR| / (|dU| + |dR|) of (unlearned, reference); 1 where neither moves."""
    du, dr = after[0] - before[0], after[1] - before[1]
    return 1.0 if abs(du) + abs(dr) < 1e-9 else 1 - abs(du - dr) / (abs(du) + abs(dr))


def steady(before: float, after: float) -> float:
    """1 - |after - before| / (|after| + |before|); 1 where both are nought."""
    return 1.0 if abs(after) + abs(before) < 1e-9 else 1 - abs(after - before) / (abs(after) + abs(before))


def harmonic(a: float, b: float) -> float:
    """Harmonic mean of two numbers in [0, 1]."""
    return 0.0 if min(a, b) <= 0 else 2 * a * b / (a + b)


def faithfulness(knows: Sequence[Mapping[Key, float]], never: Sequence[Mapping[Key, float]], key: Key) -> float | None:
    """AUC of telling the pools apart, turned so that a half means nothing and 1 everything."""
    a, b = ([m[key] for m in pool if key in m] for pool in (knows, never))
    if len(a) < len(knows) or len(b) < len(never):
        return None
    found = auc(b, a)  # auc(members, others): share of pairs with the member lower
    return max(found, 1 - found)


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The table as Markdown."""
    text = ["# How good the metrics are", "", *(__doc__ or "").strip().split("\n")[4:], ""]
    text += ["    python benchmarks/metric_meta.py --out docs/metric_meta.md", "", "## Measured", ""]
    text += [
        "| evaluation | variant | faithfulness | relearning | 4 bits | overall | in the default audit |",
        "|---" * 7 + "|",
    ]
    for x in lines:
        shown = [
            f"{x[k]:.2f}" if x[k] is not None else "" for k in ("faithfulness", "relearning", "quantisation", "overall")
        ]
        text.append(f"| {x['evaluation']} | {x['variant']} | {' | '.join(shown)} | {'yes' if x['default'] else ''} |")
    return "\n".join(text) + "\n"


def main() -> None:
    """Measure; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two models a pool, no robustness")
    parser.add_argument("--with", dest="wanted", default="all", help="families or evaluations")
    parser.add_argument("--out", type=Path, help="write the table there as Markdown")
    args = parser.parse_args()
    be_quiet()
    torch.set_num_threads(1)  # many times faster than two for a model this small
    wanted = [m for m in chosen(args.wanted.split(",")) if m.name not in LEFT_OUT]
    knows, never = pools(args.quick)
    before, oracle = knows[0], never[1]
    told = values(knows, before, oracle, wanted), values(never, before, oracle, wanted)
    lines: list[dict[str, Any]] = []
    robust: dict[Key, tuple[float, float]] = {}
    if not args.quick:
        unlearned = edited(before)
        plain = values([*unlearned, oracle], before, oracle, wanted)
        again = values([relearned(m) for m in [*unlearned, oracle]], before, oracle, wanted)
        small = values([quantised(m) for m in unlearned], before, oracle, wanted)
        for key in plain[0]:
            if all(key in m for m in [*plain, *again, *small]):
                r = [
                    symmetric((plain[i][key], plain[-1][key]), (again[i][key], again[-1][key]))
                    for i in range(len(unlearned))
                ]
                q = [steady(plain[i][key], small[i][key]) for i in range(len(unlearned))]
                robust[key] = (float(np.mean(r)), float(np.mean(q)))
    for key in dict.fromkeys(k for m in told[0] for k in m):
        f = faithfulness(*told, key)
        if f is not None:
            relearn, quantise = robust.get(key, (None, None))
            overall = None if relearn is None or quantise is None else harmonic(f, harmonic(relearn, quantise))
            lines.append({"evaluation": key[0], "variant": key[1], "faithfulness": f, "relearning": relearn,
                          "quantisation": quantise, "overall": overall, "default": key[0] in DEFAULT})  # fmt: skip
    lines.sort(key=lambda x: (-x["faithfulness"], -(x["overall"] or 0.0)))
    if args.out:
        args.out.write_text(page(lines), encoding="utf-8")
    for x in lines:
        print(
            f"{x['evaluation']:22} {x['variant']:28} {x['faithfulness']:.2f} {x['overall'] if x['overall'] is not None else float('nan'):.2f}"
        )
    best = {
        name: max(x["faithfulness"] for x in lines if x["evaluation"] == name)
        for name in {x["evaluation"] for x in lines}
    }
    bars = [{"name": f"{name}: AUC of its best variant", "value": value, "interval": None, "aim": FAITHFUL, "holds": value >= FAITHFUL}
            for name, value in sorted(best.items()) if name in DEFAULT and name not in OF_DAMAGE]  # fmt: skip
    settings = {
        "models": len(knows) + len(never),
        "steps": STEPS,
        "bits": BITS,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"benchmark": "metric_meta", "settings": settings, "results": lines, "bars": bars}))


if __name__ == "__main__":
    main()
