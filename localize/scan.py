"""Scan: the cheap localizers in one go, their rankings as one, the best units put back exactly against random ones.

A clean pass, a corrupted pass and a backward pass give attribution patching, direct logit attribution and the logit lens
of every component, head, expert and neuron. What they agree on is verified by exact patching, and so is a random sample of
units of the same kind at the same tokens: a unit that does not beat them is not localized.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from excise.corruption import Case, Corruption, batches, prepare, runs_of
from excise.facts import Fact, Facts
from excise.lens import readout
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.restore import HOOKS, Runs
from excise.scores import Localization
from excise.sites import Site, position_mask
from excise.statistics import bootstrap_mean
from excise.units import restored_unit
from localize.causal_trace import SMALLEST_EFFECT
from localize.direct_logit import head_parts, neuron_parts
from localize.logit_lens import gains, levels
from localize.node_effects import Attribution, attributions
from localize.nodes import Nodes, has_experts
from localize.questions import Question
from localize.rank_aggregation import aggregated, beats_null, normalised_ranks

METHODS = ("attribution", "direct", "lens")
RULES = ("subject_last", "last")
KINDS = ("attn", "mlp", "head", "expert", "neuron")
# Facts on which the best units are put back exactly.
VERIFIED = 16

# Sites of some units, and what each method gives them, [n_methods, n_facts, n_sites]; NaN where it says nothing.
Part = tuple[list[Site], np.ndarray]


@dataclass(frozen=True)
class _Batch:
    """Facts of one length that were passed through together."""

    cases: list[Case]
    runs: Runs
    at: Tensor
    low: np.ndarray
    high: np.ndarray

    def where(self, rule: str) -> Tensor:
        """Tokens that a rule picks, [n_facts, n_tokens]."""
        return self.at[RULES.index(rule)]


@localizer
def scan(
    model: Model,
    facts: Sequence[Fact],
    *,
    kinds: Sequence[str] = KINDS,
    corruption: Corruption = "swap",
    verify: int = 8,
    null: int = 20,
    draws: int = 10,
    noise: float = 3.0,
    form: str = "statement",
    known_only: bool = True,
    seed: int = 0,
    pool: Facts | None = None,
    batch_tokens: int = 4096,
) -> Localization:
    """How far up a unit stands in the rankings of all cheap localizers, -log10 p, from three passes; the best are verified.

    Units compete with their kind. The recipe's `table` has a row for every unit that was put back exactly: what each
    method gave it, its exact effect as a share of the total with a 95 % interval over facts, that of random units of its
    kind at the same token, and p against these.
    kinds: what is scanned, of attn, mlp, head, expert, neuron; experts only where there are any.
    corruption: swap the subject for another one with as many tokens (noise where there is none), or noise on it.
    verify: best units of each kind that are put back exactly; 0 for none.
    null: random units of each kind that they are compared with.
    draws: draws of noise per fact.
    noise: its scale in standard deviations of the subjects' embeddings.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    seed: of counterparts, noise and the random units.
    pool: facts that lend counterparts and give the noise its scale; the scanned facts when left out.
    batch_tokens: rows times tokens in one batch; changes speed and memory only.
    """
    unknown = [k for k in kinds if k not in KINDS]
    if unknown or not kinds:
        raise ValueError(f"no kind {', '.join(unknown) or 'given'}; kinds are {', '.join(KINDS)}")
    routed = any(has_experts(model, i) for i in range(model.n_layers))
    kinds = [k for k in kinds if k != "expert" or routed]
    prepared = prepare(
        model, facts, corruption=corruption, form=form, noise=noise, known_only=known_only, seed=seed, pool=pool
    )
    found = _Found({}, {}, [])
    done: list[_Batch] = []
    for cases in bar(list(batches(prepared.cases, draws=draws, tokens=batch_tokens)), what="scan"):
        runs = runs_of(model, cases, noise_std=prepared.noise_std, draws=draws, seed=seed)
        done.append(_scanned(model, cases, runs, kinds, found))
    recipe = {"model": model.name, "skipped": list(prepared.skipped), "n": len(found.fact_ids)}
    result = found.localization([f.id for f in facts], recipe)
    table = _verified(model, result, found, done, verify, null, seed) if verify and found.fact_ids else []
    return replace(result, recipe={**result.recipe, "table": table})


@dataclass
class _Found:
    """Scores by kind, [n_methods, n_facts, n_sites] in parts of some facts; the sites; the facts in the order of the parts."""

    sites: dict[str, list[Site]]
    scores: dict[str, list[np.ndarray]]
    fact_ids: list[str]

    def localization(self, fact_ids: Sequence[str], recipe: dict[str, Any]) -> Localization:
        """Each fact's rankings as one, kind by kind."""
        sites = tuple(site for found in self.sites.values() for site in found)
        rows = np.full((len(fact_ids), len(sites)), np.nan)
        if self.fact_ids:
            kinds = [aggregated(normalised_ranks(np.concatenate(parts, 1))) for parts in self.scores.values()]
            rows[[list(fact_ids).index(f) for f in self.fact_ids]] = np.concatenate(kinds, 1)
        return Localization(sites, rows, tuple(fact_ids), recipe)

    def means(self, kind: str) -> np.ndarray:
        """Mean over the facts of what each method gives, [n_methods, n_sites]."""
        every = np.concatenate(self.scores[kind], 1)
        known = ~np.isnan(every)
        total = np.where(known, every, 0).sum(1)
        return np.divide(total, known.sum(1), out=np.full(total.shape, np.nan), where=known.any(1))


def _scanned(model: Model, cases: list[Case], runs: Runs, kinds: Sequence[str], found: _Found) -> _Batch:
    """Add the scores of each fact of a batch to `found`; facts whose subject does not matter have none."""
    lengths = [len(c.ids) for c in cases]
    rows = (lengths, [c.subject for c in cases], max(lengths), [c.has_bos for c in cases])
    at = torch.stack([position_mask(rule, *rows) for rule in RULES]).to(model.device)
    units = [k for k in kinds if k not in HOOKS]
    seen = attributions(model, runs, Nodes(("resid", "attn", "mlp"), units, at))
    answers = torch.tensor([[c.answer, c.foil] for c in cases], device=model.device).T
    end = seen.clean[f"blocks.{model.n_layers - 1}.hook_resid_post"][:, -1].double()
    direction, _ = readout(model, end, answers[0], answers[1])
    asked = [Question(c.fact_id, c.ids, c.answer, c.foil, c.subject, c.has_bos) for c in cases]
    lens = gains(levels(model, _states(model, seen), asked, "logit_diff")[0])
    total = seen.high - seen.low
    usable = total > SMALLEST_EFFECT * np.maximum(np.abs(seen.high), np.abs(seen.low))
    for kind in kinds if usable.any() else ():
        parts = list(_parts(model, kind, seen, at, direction, lens))
        found.sites[kind] = [site for sites, _ in parts for site in sites]
        scores = np.concatenate([x for _, x in parts], 2)
        scores[0] /= np.where(usable, total, np.nan)[:, None]
        found.scores.setdefault(kind, []).append(scores[:, usable])
    found.fact_ids += [c.fact_id for c, u in zip(cases, usable, strict=True) if u]
    return _Batch(cases, runs, at, seen.low, seen.high)


def _states(model: Model, seen: Attribution) -> Tensor:
    """Residual states at the last token: the embedding, then after each attention and each MLP, [2 * n_layers + 1, n, d]."""
    posts, attns, mlps = (
        [seen.clean[f"blocks.{i}.{HOOKS[c]}"][:, -1] for i in range(model.n_layers)] for c in ("resid", "attn", "mlp")
    )
    states = [posts[0] - mlps[0] - attns[0]]
    for post, attn in zip(posts, attns, strict=True):
        states += [states[-1] + attn, post]
    return torch.stack(states)


def _parts(
    model: Model, kind: str, seen: Attribution, at: Tensor, direction: Tensor, lens: dict[str, Tensor]
) -> Iterator[Part]:
    """What each method gives the units of a kind, by rule; direct and lens speak of the last token only."""
    named: list[
        tuple[str, np.ndarray, np.ndarray, np.ndarray]
    ] = []  # name, [facts, rules, units], two of [facts, units]
    if kind in HOOKS:
        where = at.transpose(0, 1).cpu().numpy()  # [facts, rules, tokens]
        for layer in range(model.n_layers):
            name = f"blocks.{layer}.{HOOKS[kind]}"
            effect = (seen.effects[kind][:, layer][:, None] * where).sum(-1, keepdims=True)
            direct = (seen.clean[name][:, -1].double() * direction).sum(-1, keepdim=True).cpu().numpy()
            named.append((name, effect, direct, lens[kind][layer].double().cpu().numpy()[:, None]))
    for (unit, name), effects in seen.units.items():
        if unit == kind:
            direct = _direct(model, kind, name, seen, direction)
            named.append((name, effects, direct, np.full(direct.shape, np.nan)))
    for r, rule in enumerate(RULES):
        for name, effect, *ends in named:
            nothing = np.full(ends[0].shape, np.nan)
            n = range(effect.shape[-1])
            sites = [Site(name, rule, None if kind in ("attn", "mlp", "expert") else u) for u in n]
            yield sites, np.stack([effect[:, r], *(ends if rule == "last" else [nothing, nothing])])


def _direct(model: Model, kind: str, name: str, seen: Attribution, direction: Tensor) -> np.ndarray:
    """What each unit writes towards the answer at the last token, [n_facts, n_units]."""
    if kind == "head":
        w_o = model.weight(name.replace("hook_z", "W_O")).detach().double()
        return head_parts(seen.clean[name][:, -1].double(), w_o, direction, model.names.n_heads).cpu().numpy()
    matrix = name.replace("hook_post", "W_out")
    w_out = model.weight(matrix).detach().double()
    if matrix in seen.routed or name not in seen.clean:
        width = next(iter(seen.clean.values())).shape[1]
        keys = direction.new_zeros(len(direction) * width, len(w_out))
        if matrix in seen.routed:
            keys[seen.routed[matrix][1]] = seen.routed[matrix][0].to(keys)
        keys = keys.view(len(direction), width, -1)[:, -1]
    else:
        keys = seen.clean[name][:, -1].double()
    parts = neuron_parts(keys, w_out, direction)
    return (parts.sum(-1, keepdim=True) if kind == "expert" else parts).cpu().numpy()


def _verified(
    model: Model, result: Localization, found: _Found, done: list[_Batch], best: int, null: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of the table: the best units of each kind, put back exactly, against random ones at the same token."""
    rng, rows, known = np.random.default_rng(seed), [], set(found.fact_ids[:VERIFIED])
    for kind, sites in found.sites.items():
        own = set(sites)
        top, means = result.where(own.__contains__).top(best), found.means(kind)
        samples: dict[str, np.ndarray] = {}
        for site, score in zip(top.sites, top.average, strict=True):
            rule = str(site.position)
            if rule not in samples:
                others = [s for s in sites if s.position == rule and s not in top.sites]
                drawn = [others[i] for i in rng.permutation(len(others))[:null]]
                samples[rule] = np.array([_exact(model, s, done, known).mean() for s in drawn])
            effects = _exact(model, site, done, known)
            interval = bootstrap_mean(effects, counts=False, seed=seed)
            given = zip(METHODS, means[:, sites.index(site)], strict=True)
            rows.append(
                {"site": str(site), "kind": kind, "score": float(score)}
                | {m: None if np.isnan(x) else float(x) for m, x in given}
                | {"exact": interval.value, "low": interval.low, "high": interval.high, "facts": len(effects)}
                | {
                    "null": float(samples[rule].mean()) if len(samples[rule]) else None,
                    "null_units": len(samples[rule]),
                }
                | {"p": beats_null(interval.value, samples[rule])}
            )
    return rows


def _exact(model: Model, site: Site, done: list[_Batch], known: set[str]) -> np.ndarray:
    """Exact effects of putting a unit back as shares of the total, one per known fact."""
    effects = []
    for batch in done:
        kept = [i for i, case in enumerate(batch.cases) if case.fact_id in known]
        if kept:
            value = restored_unit(model, batch.runs, site, batch.where(str(site.position)))["logit_diff"]
            effects += list(((value - batch.low) / (batch.high - batch.low))[kept])
    return np.array(effects)
