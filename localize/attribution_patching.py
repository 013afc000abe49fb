"""Attribution patching: the map of causal tracing to first order, from two forward passes and one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from excise.facts import Fact, Facts
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.restore import HOOKS, METRICS, Plan, Runs, answer_metrics
from excise.scores import Localization, TraceMap
from excise.sites import Site, position_mask
from excise.trace import patched
from localize.causal_trace import Metric, assemble, trace_map
from localize.corruption import Case, Corruption, batches, prepare, runs_of

NEURONS = "mlp.hook_post"


@dataclass(frozen=True)
class Attribution:
    """First-order effects, as means over the draws.

    effects: hook (such as "hook_mlp_out") -> [n_facts, n_layers, n_tokens]. embed: of the token embeddings,
    [n_facts, n_tokens]. units: of each unit of `mlp.hook_post`, [n_facts, n_layers, d]; None when not asked for.
    low, high: the metric of the corrupted and of the clean run, [n_facts].
    """

    effects: dict[str, np.ndarray]
    embed: np.ndarray
    units: np.ndarray | None
    low: np.ndarray
    high: np.ndarray


def first_order(clean: Tensor, corrupt: Tensor, gradient: Tensor) -> Tensor:
    """Predicted gain (clean - corrupt) * gradient of restoring each unit; the gradient is that of the corrupted run."""
    return (clean - corrupt) * gradient


def attributions(
    model: Model,
    runs: Runs,
    hooks: Sequence[str],
    *,
    metric: Metric = "logit_diff",
    ig_steps: int = 0,
    units_at: Tensor | None = None,
) -> Attribution:
    """Effects of restoring every output of `hooks`, denoising direction (arXiv 2403.00745, section 2).

    ig_steps: 0 takes the gradient at the corrupted run; m > 0 its mean over m midpoints of the straight line between
        the corrupted and the clean token embeddings (EAP-IG, arXiv 2403.17806, section 3).
    units_at: mask [n_facts, n_tokens] of the positions whose neurons are scored.
    """
    facts, draws, tokens = runs.shape
    every = [*hooks, *([NEURONS] if units_at is not None else [])]
    names = [f"blocks.{i}.{hook}" for hook in every for i in range(model.n_layers)]
    answer, foil = (x.repeat_interleave(draws) for x in (runs.answer, runs.foil))

    def value(logits: Tensor) -> Tensor:
        n = len(logits) // facts
        return answer_metrics(logits, answer if n == draws else runs.answer, foil if n == draws else runs.foil)[
            metric
        ].double()

    with frozen(model):
        embeds = {True: _embedded(model, runs, True), False: _embedded(model, runs, False)}
        clean, high, _ = _pass(model, runs.clean, embeds[True], names, value)
        corrupt, low, gradients = _pass(
            model, runs.corrupt.flatten(0, 1), embeds[False], names, value, grad=ig_steps == 0
        )
        line = embeds[True].repeat_interleave(draws, 0) - embeds[False]
        for k in range(ig_steps):
            at = embeds[False] + (k + 0.5) / ig_steps * line
            found = _pass(model, runs.corrupt.flatten(0, 1), at, names, value, grad=True)[2]
            gradients = found if not gradients else [a + b for a, b in zip(gradients, found, strict=True)]
    scale = max(1, ig_steps)

    def gain(i: int) -> Tensor:  # [facts, draws, tokens, d]
        x = corrupt[i].unflatten(0, (facts, draws))
        return first_order(clean[i][:, None], x, gradients[i].view_as(x) / scale)

    sums = [gain(i).sum(-1).double().mean(1).cpu().numpy() for i in range(len(hooks) * model.n_layers)]
    effects = {h: np.stack(sums[k * model.n_layers : (k + 1) * model.n_layers], 1) for k, h in enumerate(hooks)}
    units = None
    if units_at is not None:
        picked = units_at.to(gradients[0].device)[:, None, :, None]
        units = np.stack(
            [
                (gain(i) * picked).sum(2).double().mean(1).cpu().numpy()
                for i in range(len(hooks) * model.n_layers, len(names))
            ],
            1,
        )
    embed = (line * gradients[-1] / scale).sum(-1).view(facts, draws, tokens).double().mean(1)
    return Attribution(
        effects, embed.cpu().numpy(), units, *(x.view(facts, -1).mean(1).cpu().numpy() for x in (low, high))
    )


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient, which spares the backward pass half of its work."""
    asking = [p for p in model.hf.parameters() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@torch.no_grad()
def _embedded(model: Model, runs: Runs, clean: bool) -> Tensor:
    """Token embeddings of the clean rows, or of the corrupted ones with their noise, [n_rows, n_tokens, d]."""
    embed = model.hf.get_submodule(model.names.embed)
    if clean or runs.noise is None:
        return embed(runs.clean if clean else runs.corrupt.flatten(0, 1))
    x = embed(runs.corrupt.flatten(0, 1))
    x[:, runs.noise_start : runs.noise_start + runs.noise.shape[2]] += runs.noise.flatten(0, 1).to(x)
    return x


def _pass(
    model: Model,
    ids: Tensor,
    embedding: Tensor,
    names: Sequence[str],
    value: Callable[[Tensor], Tensor],
    *,
    grad: bool = False,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """One pass from given token embeddings: activations in the order of `names`, the metric per row, and the metric's
    gradients at the activations and, last, at the embeddings."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.update({name: x})

    start = embedding.detach().requires_grad_(grad)
    patches = {"hook_embed": lambda _: start, **{name: keep(name) for name in names}}
    with torch.set_grad_enabled(grad), patched(model, patches):
        found = value(model.hf(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1])
    gradients = torch.autograd.grad(found.sum(), [*(seen[n] for n in names), start]) if grad else ()
    shaped = [seen[n].detach().reshape(*ids.shape, -1) for n in names]
    return shaped, found.detach(), [g.reshape(*ids.shape, -1) for g in gradients]


@localizer
def attribution_patching(
    model: Model,
    facts: Sequence[Fact],
    *,
    corruption: Corruption = "swap",
    components: Sequence[str] = ("resid", "mlp", "attn"),
    neurons: str | None = None,
    metric: Metric = "logit_diff",
    draws: int = 10,
    noise: float = 3.0,
    ig_steps: int = 0,
    form: str = "statement",
    known_only: bool = True,
    seed: int = 0,
    pool: Facts | None = None,
    batch_tokens: int = 4096,
) -> Localization:
    """First-order indirect effect of every layer x position class on each fact, as a share of the total effect.

    The score of a cell is (clean - corrupted) * gradient / (high - low), the gradient being that of the corrupted run
    (arXiv 2403.00745). Sites, signs and maps are those of causal_trace, so the two compare cell by cell.
    corruption: swap the subject for another one with as many tokens (noise where there is none), or noise on it.
    components: what is scored, of resid, mlp, attn.
    neurons: also score every neuron, summed over the tokens that this position rule picks, such as subject_last or all.
    metric: what is measured; logit_diff is answer minus foil.
    draws: draws of noise per fact.
    noise: its scale in standard deviations of the subjects' embeddings.
    ig_steps: average the gradient over so many midpoints between corrupted and clean embeddings; 0 is the plain method.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    seed: of counterparts and noise.
    pool: facts that lend counterparts and give the noise its scale; the traced facts when left out.
    batch_tokens: rows times tokens in one batch; changes speed and memory only.
    """
    pairs = Plan(tuple(components)).cells(model.n_layers, 1)[0]
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; metrics are {', '.join(METRICS)}")
    prepared = prepare(
        model, facts, corruption=corruption, form=form, noise=noise, known_only=known_only, seed=seed, pool=pool
    )
    maps: dict[str, TraceMap] = {}
    units: dict[str, np.ndarray] = {}
    for batch in bar(list(batches(prepared.cases, draws=draws, tokens=batch_tokens)), what="attribution patching"):
        runs = runs_of(model, batch, noise_std=prepared.noise_std, draws=draws, seed=seed)
        at = None if neurons is None else _mask(batch, neurons)
        found = attributions(model, runs, [HOOKS[c] for c in components], metric=metric, ig_steps=ig_steps, units_at=at)
        for i, case in enumerate(batch):
            values = {c: found.effects[HOOKS[c]][i] + found.low[i] for c in components}
            maps[case.fact_id] = trace_map(model, case, values, found.low[i], found.high[i])
            if found.units is not None:
                units[case.fact_id] = found.units[i] / (found.high[i] - found.low[i])
    result = assemble(model, facts, prepared, maps, pairs, {})
    return result if neurons is None else _with_units(result, units, neurons)


def _mask(batch: Sequence[Case], rule: str) -> Tensor:
    lengths = [len(c.ids) for c in batch]
    return position_mask(rule, lengths, [c.subject for c in batch], max(lengths), [c.has_bos for c in batch])


def _with_units(result: Localization, units: dict[str, np.ndarray], rule: str) -> Localization:
    """The localization with one more site per neuron; facts that were skipped have none."""
    usable = {m.fact_id for m in result.maps}
    if not usable:
        return result
    layers, width = next(iter(units.values())).shape
    sites = tuple(Site(f"blocks.{i}.{NEURONS}", rule, u) for i in range(layers) for u in range(width))
    empty = np.full(layers * width, np.nan)
    scores = np.stack([units[f].reshape(-1) if f in usable else empty for f in result.fact_ids])
    return replace(result, sites=result.sites + sites, scores=np.hstack([result.scores, scores]))
