"""Causal tracing: break the subject, put one internal state back, and see how much of the answer returns.

ROME (arXiv 2202.05262, section 2.1) with the defaults of Zhang & Nanda (arXiv 2309.16042): another subject instead of
noise, the logit difference instead of the probability, one layer at a time. A high effect says that a state is enough
in a broken context; it does not say where an edit works best (arXiv 2301.04213).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from excise.corruption import Case, Corruption, Prepared, batches, prepare, runs_of
from excise.facts import Fact, Facts
from excise.grid import BATCH_TOKENS, restoration_grid
from excise.model import Model
from excise.progress import bar, say
from excise.registry import localizer
from excise.restore import HOOKS, METRICS, Grid, Plan, Runs, Sever
from excise.scores import Localization, TraceMap
from excise.sites import POSITION_CLASSES, Site, position_class, position_mask

Metric = Literal["logit_diff", "probability", "logprob"]
# Below this share of the larger end, high - low is rounding and no scale to measure effects on.
SMALLEST_EFFECT = 1e-3


def indirect_effects(values: np.ndarray, low: np.ndarray) -> np.ndarray:
    """What each cell brings back: values [n_facts, n_layers, n_tokens] less the corrupted metric [n_facts]."""
    return values - low[:, None, None]


def normalised_effects(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Indirect effects as shares of the total effect high - low; 1 is full recovery."""
    return indirect_effects(values, low) / (high - low)[:, None, None]


def class_means(values: np.ndarray, subject: tuple[int, int]) -> np.ndarray:
    """Means [n_layers, 7] of a map [n_layers, n_tokens] over each position class; NaN for an empty one."""
    tokens = values.shape[1]
    classes = np.array([position_class(t, tokens, subject) for t in range(tokens)])
    means = np.full((values.shape[0], len(POSITION_CLASSES)), np.nan)
    for i, name in enumerate(POSITION_CLASSES):
        own = values[:, classes == name]
        known = ~np.isnan(own)
        np.divide(np.where(known, own, 0.0).sum(1), known.sum(1), out=means[:, i], where=known.any(1))
    return means


@localizer
def causal_trace(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruption: Corruption = "swap",
    components: Sequence[str] = ("resid", "mlp", "attn"),
    window: int = 1,
    sever: Sever = "none",
    metric: Metric = "logit_diff",
    draws: int = 10,
    noise: float = 3.0,
    positions: Sequence[str] = ("all",),
    form: str = "statement",
    layers: Sequence[int] | None = None,
    known_only: bool = True,
    seed: int = 0,
    pool: Facts | None = None,
    batch_tokens: int | None = None,
) -> Localization:
    """Indirect effect of every layer x position class on each fact, as a share of the total; maps hold all tokens.

    The score of a cell is (restored - corrupted) / (clean - corrupted), measured on the answer's first token.
    corruption: swap the subject for another one with as many tokens (noise where there is none), or noise on it.
    components: what is restored, of resid, mlp, attn.
    window: layers of mlp or attn outputs restored together; ROME used 10, which widens and raises the peak.
    sever: hold mlp or attn outputs at the restored token at their corrupted values; with components resid only.
    metric: what is measured; logit_diff is answer minus foil.
    draws: draws of noise per fact.
    noise: its scale in standard deviations of the subjects' embeddings.
    positions: position rules to trace, such as subject and last; the others are left out.
    form: which of a fact's prompts is traced; the direct one where it has none of this form.
    layers: layers to trace, all when left out.
    known_only: leave out facts whose answer the model does not give.
    seed: of counterparts and noise.
    pool: facts that lend counterparts and give the noise its scale; the traced facts when left out.
    batch_tokens: rows times tokens in one batch; changes speed and memory only.
    """
    plan = Plan(tuple(components), window, sever, layers)
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; metrics are {', '.join(METRICS)}")
    prepared = prepare(
        model, facts, corruption=corruption, form=form, noise=noise, known_only=known_only, seed=seed, pool=pool
    )
    budget = batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    maps: dict[str, TraceMap] = {}
    engines: dict[str, str] = {}
    for batch in bar(list(batches(prepared.cases, draws=draws, tokens=budget)), what="causal trace"):
        runs = runs_of(model, batch, noise_std=prepared.noise_std, draws=draws, seed=seed)
        grid = _traced(model, batch, runs, plan, positions, metric, budget, maps)
        engines[grid.engine] = grid.reason
    pairs = plan.cells(model.n_layers, 1)[0]
    why = "; ".join(filter(None, engines.values()))
    return assemble(model, facts, prepared, maps, pairs, {"engine": ", ".join(engines), "engine_reason": why})


def _traced(
    model: Model,
    batch: Sequence[Case],
    runs: Runs,
    plan: Plan,
    rules: Sequence[str],
    metric: Metric,
    budget: int,
    maps: dict[str, TraceMap],
) -> Grid:
    """The grid of one batch; the map of each of its cases goes into `maps`."""
    asked = [_positions(case, rules) for case in batch]
    grid = restoration_grid(
        model, runs, replace(plan, positions=sorted(set().union(*asked))), batch_tokens=budget, metrics=(metric,)
    )
    for i, case in enumerate(batch):
        values = {c: _only(x[i], asked[i]) for c, x in grid.values[metric].items()}
        maps[case.fact_id] = trace_map(model, case, values, grid.low[metric][i], grid.high[metric][i])
    return grid


def _positions(case: Case, rules: Sequence[str]) -> list[int]:
    """The tokens of the prompt that any of the rules picks."""
    picked = set()
    for rule in (rules,) if isinstance(rules, str) else rules:
        mask = position_mask(rule, [len(case.ids)], [case.subject], len(case.ids), [case.has_bos])
        picked |= set(mask[0].nonzero()[:, 0].tolist())
    return sorted(picked)


def _only(values: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    kept = np.full_like(values, np.nan)
    kept[:, columns] = values[:, columns]
    return kept


def trace_map(model: Model, case: Case, values: dict[str, np.ndarray], low: float, high: float) -> TraceMap:
    """The map of one case; values: component -> metric after restoring each cell, [n_layers, n_tokens]."""
    tokens = tuple(model.tokenizer.decode([t]) for t in case.ids)
    return TraceMap(case.fact_id, tokens, case.subject, values, float(low), float(high))


def assemble(
    model: Model,
    facts: Sequence[Fact],
    prepared: Prepared,
    maps: dict[str, TraceMap],
    pairs: Sequence[tuple[str, int]],
    recipe: dict[str, Any],
) -> Localization:
    """Maps as a Localization: a site per (component, layer) of `pairs` and position class, NaN for skipped facts."""
    sites = tuple(Site(f"blocks.{layer}.{HOOKS[c]}", name) for c, layer in pairs for name in POSITION_CLASSES)
    scores = np.full((len(facts), len(sites)), np.nan)
    skipped = list(prepared.skipped)
    usable: list[TraceMap] = []
    for row, fact in enumerate(facts):
        found = maps.get(fact.id)
        if found is None:
            continue
        total = found.high - found.low
        if not total > SMALLEST_EFFECT * max(abs(found.high), abs(found.low)):
            skipped.append(
                {
                    "fact": fact.id,
                    "reason": f"breaking the subject does not lower the metric ({found.high:.3g} to {found.low:.3g})",
                }
            )
            continue
        means = {c: class_means(found.effect(c) / total, found.subject) for c in found.values}
        scores[row] = [x for c, layer in pairs for x in means[c][layer]]
        usable.append(found)
    if not usable:
        reason = skipped[0]["reason"] if skipped else "none was given"
        warnings.warn(f"none of {len(facts)} facts could be scored, the first because {reason}", stacklevel=4)
    elif skipped:
        say(f"{len(skipped)} of {len(facts)} facts skipped, the first because {skipped[0]['reason']}")
    summary = {
        "n": len(usable),
        "low": _mean([m.low for m in usable]),
        "high": _mean([m.high for m in usable]),
        "skipped": skipped,
        "corruptions": prepared.corruptions,
        "noise_std": prepared.noise_std,
        "model": model.name,
        "facts": _digest(facts),
    }
    return Localization(sites, scores, tuple(f.id for f in facts), {**summary, **recipe}, maps=tuple(usable))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _digest(facts: Sequence[Fact]) -> str:
    """Short hash of the facts' ids, prompts and answers."""
    text = repr([(f.id, f.answer, [p.text for p in f.prompts]) for f in facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
