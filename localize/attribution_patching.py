"""Attribution patching: the map of causal tracing to first order, from two forward passes and one backward pass.

With the two repairs of AtP* (arXiv 2403.00745): attention weights are recomputed for a restored query or key, since a
step along the gradient of a saturated softmax misses them; and gradients can be dropped one layer at a time, so that
paths which cancel do not hide a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from excise.corruption import Case, Corruption, batches, prepare, runs_of
from excise.facts import Fact, Facts
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.restore import HOOKS, METRICS, Plan
from excise.scores import Localization, TraceMap
from excise.sites import Site, position_mask
from localize.causal_trace import Metric, assemble, trace_map
from localize.node_effects import attributions
from localize.nodes import UNITS, Nodes
from sae.own import of_model

# One fact's units: (unit, activation) -> [n_rules, n_units].
Units = dict[tuple[str, str], np.ndarray]


@localizer
def attribution_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruption: Corruption = "swap",
    components: Sequence[str] = ("resid", "mlp", "attn"),
    units_at: Sequence[str] = ("subject_last", "last"),
    metric: Metric = "logit_diff",
    draws: int = 10,
    noise: float = 3.0,
    ig_steps: int = 0,
    exact_attention: bool = True,
    grad_drop: bool = False,
    form: str = "statement",
    known_only: bool = True,
    seed: int = 0,
    pool: Facts | None = None,
    dictionary: str = "",
    batch_tokens: int = 4096,
) -> Localization:
    """First-order indirect effect of every node on each fact, as a share of the total effect.

    The score is (clean - corrupted) * gradient / (high - low), the gradient being that of the corrupted run
    (arXiv 2403.00745). Sites, signs and maps of resid, mlp and attn are those of causal_trace, so the two compare cell by
    cell. An expert's neurons count as much as its router says.
    corruption: swap the subject for another one with as many tokens (noise where there is none), or noise on it.
    components: what is scored: resid, mlp, attn, and unit by unit head, query, key, value, neuron, expert, feature.
    units_at: position rules of the units; a unit's score is that of restoring it at every token that the rule picks.
    metric: what is measured; logit_diff is answer minus foil.
    draws: draws of noise per fact.
    noise: its scale in standard deviations of the subjects' embeddings.
    ig_steps: average the gradient over so many midpoints between corrupted and clean embeddings; 0 is the plain method.
    exact_attention: recompute the attention weights of a restored query or key instead of following their gradient.
    grad_drop: drop the gradient through one layer at a time and average magnitudes; one more backward pass per layer.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    seed: of counterparts and noise.
    pool: facts that lend counterparts and give the noise its scale; the traced facts when left out.
    dictionary: whose features are scored: a sae-lens folder, release:sae_id, or testbed:dense (in Python a `Dictionary`,
        too); left out, the embedded one of an embedded model.
    batch_tokens: rows times tokens in one batch; changes speed and memory only.
    """
    states, units = [c for c in components if c in HOOKS], [c for c in components if c not in HOOKS]
    book = of_model(model, dictionary) if "feature" in units else None
    nodes = Nodes(states, units, None, book, exact_attention)
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; metrics are {', '.join(METRICS)}")
    prepared = prepare(
        model, facts, corruption=corruption, form=form, noise=noise, known_only=known_only, seed=seed, pool=pool
    )
    maps: dict[str, TraceMap] = {}
    scored: dict[str, Units] = {}
    for batch in bar(list(batches(prepared.cases, draws=draws, tokens=batch_tokens)), what="attribution patching"):
        runs = runs_of(model, batch, noise_std=prepared.noise_std, draws=draws, seed=seed)
        at = _mask(batch, units_at).to(model.device) if units else None
        found = attributions(model, runs, replace(nodes, at=at), metric=metric, ig_steps=ig_steps, grad_drop=grad_drop)
        for i, case in enumerate(batch):
            values = {c: found.effects[c][i] + found.low[i] for c in states}
            maps[case.fact_id] = trace_map(model, case, values, found.low[i], found.high[i])
            if at is not None:
                scale = np.where(at[:, i].any(-1).cpu().numpy(), found.high[i] - found.low[i], np.nan)[:, None]
                scored[case.fact_id] = {k: x[i] / scale for k, x in found.units.items()}
    pairs = Plan(tuple(states)).cells(model.n_layers, 1)[0] if states else []
    result = assemble(model, facts, prepared, maps, pairs, {"signed": not grad_drop})
    return _with_units(result, scored, units_at) if units else result


def _mask(batch: Sequence[Case], rules: Sequence[str]) -> Tensor:
    """Tokens that each rule picks, [n_rules, n_facts, n_tokens]."""
    lengths = [len(c.ids) for c in batch]
    rows = (lengths, [c.subject for c in batch], max(lengths), [c.has_bos for c in batch])
    return torch.stack([position_mask(rule, *rows) for rule in ((rules,) if isinstance(rules, str) else rules)])


def _with_units(result: Localization, scored: dict[str, Units], rules: Sequence[str]) -> Localization:
    """The localization with one more site per rule and unit; facts that were skipped have none."""
    usable = {m.fact_id for m in result.maps}
    if not usable:
        return result
    first = scored[next(iter(usable))]
    sites = [
        Site(name, rule, None if unit == "expert" else u)
        for (unit, name), x in first.items()
        for rule in ((rules,) if isinstance(rules, str) else rules)
        for u in range(x.shape[-1])
    ]
    empty = np.full(len(sites), np.nan)
    rows = [
        np.concatenate([x.reshape(-1) for x in scored[f].values()]) if f in usable else empty for f in result.fact_ids
    ]
    return replace(result, sites=(*result.sites, *sites), scores=np.hstack([result.scores, np.stack(rows)]))


__all__ = ["UNITS", "attribution_patching"]
