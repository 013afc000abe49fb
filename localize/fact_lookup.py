"""Fact lookup: which MLPs write the attribute into the subject, where later attention heads read it.

Guo et al. 2025, "Mechanistic Unlearning", arXiv 2410.12949. Tracing to the output favours the late parts that put an
answer into words, and an edit there gags one wording. Here the paths end earlier, at the residual stream of the subject
just before heads take its content away. Beyond the paper: that place is found for every fact, by how much of the answer
a restored subject still carries; all senders of a fact run in one batch that starts there; neurons and experts share one
integrated gradient. Take random MLPs of the same size as the control: they beat most output tracing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from excise.corruption import Case, Corruption, batches, prepare, runs_of
from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.keys import write_matrices
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.scores import Localization
from excise.sites import Site, position_mask
from localize.direct_logit import refuse_heads
from localize.knowledge_neurons import line_points
from localize.lookup_probe import Probed, probed
from localize.paths import Pair, head_paths, mlp_paths, output_paths, pair_of, reach, receiver_gradient
from localize.questions import Table, summary

UNITS = ("mlp", "neuron", "expert", "head", "output")
# Points of the integrated gradient.
STEPS = 8


def receivers(reached: np.ndarray, still: float) -> np.ndarray:
    """The last block of each fact that a restored subject enters with at least the share `still` of the most that it
    brings back at any block, [n]; reached [n_layers, n] as shares of high - low."""
    enough = reached >= still * reached.max(0)
    return len(reached) - 1 - enough[::-1].argmax(0)


def smallest_set(scores: np.ndarray, share: float = 0.9) -> list[int]:
    """The fewest entries that together have `share` of all positive scores, best first; scores [n]."""
    positive = np.clip(np.nan_to_num(scores), 0, None)
    order = np.argsort(-positive, kind="stable")
    reached = np.cumsum(positive[order])
    if not positive.any():
        return []
    return order[: int(np.searchsorted(reached, share * reached[-1])) + 1].tolist()


@localizer
def fact_lookup(
    model: Model,
    facts: Sequence[Fact],
    *,
    route: Literal["path", "probe"] = "path",
    units: Sequence[str] = ("mlp",),
    position: str = "subject_last",
    receiver: int | None = None,
    still: float = 0.9,
    least: float = 1.0,
    corruption: Corruption = "swap",
    draws: int = 10,
    noise: float = 3.0,
    form: str = "statement",
    known_only: bool = True,
    attention_until: int | None = None,
    seed: int = 0,
    pool: Facts | None = None,
    batch_tokens: int | None = None,
) -> Localization:
    """How much of the answer each MLP writes into the subject for later heads to read, as a share of the total effect.

    Path patching: with another subject in the prompt, the right MLP output is added to what enters the receiving block,
    at the subject only, and nothing else is changed. A block from the receiver on writes too late: 0. The recipe gives
    the receivers, how much of the answer the whole subject carries there (`reach`: near 0, these scores mean little),
    the fewest layers that hold 90 % of what is looked up, and their matrices and parameters.
    route: path, or probe, for relations with few answers: the score of an MLP is how much it adds to the margin by
        which a linear probe at the subject's last token, trained on other subjects, tells the right answer. Then units,
        position, receiver, still, least and corruption play no part.
    units: what is scored: mlp; neuron or expert (integrated gradient at the receiver); head (what heads extract: their
        direct effect at the last token, through MLPs); output (what MLPs write at the last token, the contrast).
    position: tokens at which the subject is read, such as subject_last or subject.
    receiver: block whose input is the end of the paths; found for every fact when left out.
    still: share of the most that a restored subject brings back, which it must still bring back at the receiver.
    least: leave out facts that a wrong subject costs fewer logits than this.
    corruption: swap the subject for another one with as many tokens (noise where there is none), or noise on it.
    draws: draws of noise per fact.
    noise: its scale in standard deviations of the subjects' embeddings.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    attention_until: on the probe route, attention outputs from this block on are replaced by their mean: what is found
        still, MLPs look up from the name alone.
    seed: of counterparts, noise and the folds of probes.
    pool: facts that lend counterparts, give the noise its scale and train probes; the given facts when left out.
    batch_tokens: tokens times blocks in one batch; changes speed and memory only.

    Raises ExciseError for models whose blocks cannot be called one by one.
    """
    if route not in ("path", "probe"):
        raise ValueError(f"no route {route!r}; routes are path, probe")
    if route == "probe":
        found = probed(
            model, facts, pool or facts, form=form, known_only=known_only, seed=seed, attention_until=attention_until
        )
        return _probe_result(model, facts, found)
    _refuse(model, units, position, receiver)
    prepared = prepare(
        model, facts, corruption=corruption, form=form, noise=noise, known_only=known_only, seed=seed, pool=pool
    )
    table, skipped = Table([f.id for f in facts]), list(prepared.skipped)
    ends: dict[str, int] = {}
    carried: dict[str, list[float]] = {}
    budget = max(1, (batch_tokens or model.batch_tokens) // model.n_layers)
    for batch in bar(list(batches(prepared.cases, draws=draws, tokens=budget)), what="fact lookup"):
        runs = runs_of(model, batch, noise_std=prepared.noise_std, draws=draws, seed=seed)
        inner = bool({"neuron", "expert"} & set(units))
        pair = pair_of(model, runs, _mask(batch, position), heads="head" in units, keys=inner)
        lookup = Lookup(pair, receiver, still)
        rows = [i for i, x in enumerate(lookup.total) if x >= least]
        for i in set(range(len(batch))) - set(rows):
            reason = f"another subject costs {lookup.total[i]:.2f} logits, fewer than {least:g}"
            skipped.append({"fact": batch[i].fact_id, "reason": reason})
        if rows:
            scores = lookup.scores(model, units, position)
            table.add([batch[i].fact_id for i in rows], {site: x[rows] for site, x in scores.items()})
            ends |= {batch[i].fact_id: int(lookup.ends[i]) for i in rows}
            carried |= {batch[i].fact_id: lookup.reached[:, i].tolist() for i in rows}
    result = table.localization({})
    recipe = {
        **summary(model, facts, skipped),
        "corruptions": prepared.corruptions,
        "receivers": ends,
        "reach": {name: carried[name][end] for name, end in ends.items()},
        "reach by block": np.mean(list(carried.values()), axis=0).tolist() if carried else [],
    }
    layers = _chosen(model, result.at(position=position, component="mlp_out")) if "mlp" in units else {}
    return replace(result, recipe={**recipe, **layers})


def _probe_result(model: Model, facts: Sequence[Fact], found: Probed) -> Localization:
    table = Table([f.id for f in facts])
    for name, added in found.gains.items():
        table.add(
            [name],
            {Site(f"blocks.{i}.hook_mlp_out", "subject_last"): x[None] for i, x in enumerate(torch.from_numpy(added))},
        )
    result = table.localization({})
    return replace(result, recipe={**summary(model, facts, found.skipped), **found.recipe, **_chosen(model, result)})


class Lookup:
    """What is looked up in the runs of some facts.

    total: clean less corrupted metric [n]. reached: share of it that the restored subject brings back at what enters
    each block, [n_layers, n]. ends: receiving block of each fact [n].
    """

    def __init__(self, pair: Pair, receiver: int | None, still: float) -> None:
        self.pair = pair
        low, high = (x.cpu().numpy() for x in pair.ends)
        self.low, self.total = low, high - low
        self.reached = self._shares(reach(pair))
        self.ends = receivers(self.reached, still) if receiver is None else np.full(len(low), receiver)

    def scores(self, model: Model, units: Sequence[str], position: str) -> dict[Site, Tensor]:
        """Site -> [n], or [n, n_units] where a site stands for all its units."""
        found: dict[Site, Tensor] = {}
        mlps = [f"blocks.{i}.hook_mlp_out" for i in range(model.n_layers)]
        if "mlp" in units:
            found |= {Site(m, position): x for m, x in zip(mlps, self._mlps(), strict=True)}
        if {"neuron", "expert"} & set(units):
            found |= self._inner(model, units, position)
        if "head" in units:
            shares = self._shares(head_paths(self.pair, _head_shifts(model, self.pair))).T
            parts = torch.from_numpy(shares).split(model.names.n_heads, 1)
            found |= {Site(f"blocks.{i}.attn.hook_z", "last"): x for i, x in enumerate(parts)}
        if "output" in units:
            shares = self._shares(output_paths(self.pair, [self.pair.shift("mlp", i) for i in range(len(mlps))]))
            found |= {Site(m, "last"): x for m, x in zip(mlps, torch.from_numpy(shares), strict=True)}
        return found

    def _shares(self, metric: Tensor) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):  # such facts are left out
            return (metric.cpu().numpy() - self.low) / self.total

    def _mlps(self) -> Tensor:
        """[n_layers, n]; nothing that is written from the receiver on arrives there."""
        shares = np.zeros_like(self.reached)
        for end in np.unique(self.ends).tolist():
            own = self.ends == end
            shares[:end, own] = self._shares(mlp_paths(self.pair, end))[:, own]
        return torch.from_numpy(shares)

    def _inner(self, model: Model, units: Sequence[str], position: str) -> dict[Site, Tensor]:
        """Neurons and experts."""
        names = [name for i in range(model.n_layers) for name in write_matrices(model, i)]
        shares = {name: torch.zeros(len(self.total), len(model.weight(name)), dtype=torch.float64) for name in names}
        for end in np.unique(self.ends).tolist():
            own = torch.from_numpy(self.ends == end)
            gradient = receiver_gradient(self.pair, end, *line_points(STEPS, "gauss"))
            for name in (n for n in names if n in self.pair.keys and int(n.split(".")[1]) < end):
                parts = self.pair.cut(self.pair.keys[name]) * (gradient @ model.weight(name).detach().mT)
                summed = parts.sum(1).unflatten(0, self.pair.runs.shape[:2]).sum(1).double().cpu()
                shares[name][own] = (summed / torch.from_numpy(self.total)[:, None])[own]
        neurons = {Site(n.replace("W_out", "hook_post"), position): x for n, x in shares.items()}
        experts = {Site(n): x.sum(-1) for n, x in shares.items() if "expert" in n}
        return (neurons if "neuron" in units else {}) | (experts if "expert" in units else {})


def _head_shifts(model: Model, pair: Pair) -> list[Tensor]:
    """What each head writes at the last token in the clean run less the corrupted one, per layer [n_heads, n_rows, d]."""
    shifts = []
    for layer in range(model.n_layers):
        z = pair.z[f"blocks.{layer}.attn.hook_z"][:, -1].unflatten(-1, (model.names.n_heads, -1))
        w_o = model.weight(f"blocks.{layer}.attn.W_O").detach().unflatten(0, (model.names.n_heads, -1))
        shifts.append(torch.einsum("nhk,hkd->hnd", z, w_o))
    return shifts


def _chosen(model: Model, mlps: Localization) -> dict[str, Any]:
    """The layers that hold most of the lookup, and their matrices with the number of their parameters."""
    layers = sorted(int(mlps.sites[i].layer or 0) for i in smallest_set(mlps.average))
    names = [n for i in layers for n in model.names.weights(i) if ".mlp." in n and not n.endswith("W_router")]
    return {"layers": layers, "matrices": names, "parameters": sum(model.weight(n).numel() for n in names)}


def _mask(batch: Sequence[Case], rule: str) -> Tensor:
    lengths = [len(c.ids) for c in batch]
    return position_mask(rule, lengths, [c.subject for c in batch], max(lengths), [c.has_bos for c in batch])


def _refuse(model: Model, units: Sequence[str], position: str, receiver: int | None) -> None:
    unknown = [u for u in units if u not in UNITS]
    if unknown or not units:
        raise ValueError(f"no unit {', '.join(unknown) or 'given'}; units are {', '.join(UNITS)}")
    if receiver is not None and not 0 <= receiver < model.n_layers:
        raise ValueError(f"no block {receiver} to receive: there are {model.n_layers}")
    if position == "last" and {"mlp", "output"} <= set(units):
        raise ValueError("mlp and output name the same sites at the position last: ask for one of them")
    if "expert" in units and not model.names.n_experts:
        raise ExciseError(f"{model.name} has no experts: leave out the unit expert")
    if {"neuron", "expert"} & set(units):
        write_matrices(model, 0)
    if "head" in units:
        refuse_heads(model)
