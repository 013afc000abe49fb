"""Redirecting names: the states that names should have, and which block can give them those at the least cost to others.

What a method does with the answer (which matrices it writes, how) is the method's own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from excise.apply import applied
from excise.edits import Edit
from excise.encoding import Batch
from excise.errors import ExciseError
from excise.facts import Prompt
from excise.keys import read_keys
from excise.memo import reading
from excise.mentions import Mention, fictitious, relatives
from excise.model import Model
from excise.scores import Localization
from excise.sites import Site
from excise.solve import Covariance, Metric
from excise.stats import moments
from excise.trace import patched, read

# An answer below this log-probability is gone; how far below must not decide between blocks.
GONE = -9.21  # log 1e-4


@dataclass(frozen=True)
class Redirection:
    """Names in their wordings, and for each the prompts whose mean state it is to have.

    mentions: one column per name and wording. goals: the same wording around the target names.
    """

    mentions: tuple[Mention, ...]
    goals: tuple[tuple[Prompt, ...], ...]

    @property
    def prompts(self) -> list[Prompt]:
        """The wordings, each ending at its name."""
        return [m.prompt for m in self.mentions]

    def targets(self, model: Model, point: str) -> Tensor:
        """Target states [n_mentions, d] at `point`; every distinct goal prompt is run once."""
        distinct = list(dict.fromkeys(p for g in self.goals for p in g))
        site = Site(point, "subject_last")
        states = dict(zip(distinct, read(model, distinct, [site])[site], strict=True))
        return torch.stack(
            # A single goal is taken as it is: even the mean of one could differ in the last bit.
            [states[g[0]] if len(g) == 1 else torch.stack([states[p] for p in g]).mean(0) for g in self.goals]
        )


def redirect(
    told: Sequence[Mention], retained: Sequence[Mention], *, target: str, names: int, seed: int
) -> Redirection:
    """Send each name to made-up names of its kind ("fictitious"), to the retained ones ("centroid"), or to one name.

    Raises ExciseError when there is nothing to make target names from.
    """
    pool = {kind: _target_names(kind, told, retained, target, names, seed) for kind in {m.kind for m in told}}
    empty = sorted(kind for kind, found in pool.items() if not found)
    if empty:
        raise ExciseError(
            f"no target names for {' and '.join(empty)} prompts: a made-up name puts words of known ones "
            "together anew, and no such name is left; give retain facts of more names of two words, or use "
            "target='centroid' or the name of a neutral subject"
        )
    return Redirection(tuple(told), tuple(tuple(m.around(name) for name in pool[m.kind]) for m in told))


def _target_names(
    kind: str, told: Sequence[Mention], retained: Sequence[Mention], target: str, names: int, seed: int
) -> list[str]:
    forgotten = dict.fromkeys(m.name for m in told if m.kind == kind)
    others = [n for n in dict.fromkeys(m.name for m in retained if m.kind == kind) if n not in forgotten]
    if target == "fictitious":
        return fictitious([*forgotten, *others], names, seed=seed)
    return others[:names] if target == "centroid" else [target]


def candidate_blocks(model: Model, where: Localization | None, count: int) -> list[int]:
    """Up to `count` blocks, ascending: the most responsible ones at the subject's last token, or spread over the first half.

    Raises ExciseError when the localization names no MLP or residual site there.
    """
    if where is None:
        half = max(2, model.n_layers // 2)
        return sorted({round(1 + i * (half - 1) / count) for i in range(count)} & set(range(1, half))) or [0]
    best: dict[int, float] = {}
    for site, score in zip(where.sites, where.average, strict=True):
        if site.layer is not None and site.position in ("subject_last", None) and "attn" not in site.point:
            best[site.layer] = max(best.get(site.layer, float("-inf")), float(score))
    if not best:
        raise ExciseError(
            "the localization names no MLP or residual site at the subject's last token; "
            "run causal_trace, or name sites such as blocks.2.mlp.W_out"
        )
    return sorted(sorted(best, key=lambda layer: -best[layer])[:count])


def _share(model: Model) -> int:
    """Tokens of a batch that leave room for the statistics of a block, which are held meanwhile."""
    return max(1, model.batch_tokens // 2)


@reading
def patch_effect(model: Model, redirection: Redirection, asked: Sequence[Prompt], layer: int) -> float:
    """Mean drop of the answers' log-probability when every name gets its target state after block `layer`.

    This is what the best possible edit at this block could do; in nats per answer token.
    """
    point = f"blocks.{layer}.hook_resid_post"
    targets = redirection.targets(model, point)
    by_name = {
        m.name: [t for n, t in zip(redirection.mentions, targets, strict=True) if n.name == m.name]
        for m in redirection.mentions
    }
    goal = {name: torch.stack(states).mean(0) for name, states in by_name.items()}
    drop = 0.0
    for index, batch in model.batches(asked, answers=True, tokens=_share(model)):
        rows = torch.stack([goal[asked[i].subject] for i in index]).to(batch.ids.device)
        at = batch.where("subject_last").to(batch.ids.device)

        def put(x: Tensor, rows: Tensor = rows, at: Tensor = at) -> Tensor:
            return torch.where(at[..., None], rows[:, None].to(x.dtype), x)

        plain = _answer_logprobs(model, batch)
        with patched(model, {point: put}):
            drop += float((plain - _answer_logprobs(model, batch)).sum())
    return drop / max(1, len(asked))


def edit_effect(model: Model, edit: Edit, asked: Sequence[Prompt]) -> float:
    """Mean drop of the answers' log-probability under an edit, counted as in `patch_effect`."""
    plain: dict[int, Tensor] = {}
    edited: dict[int, Tensor] = {}
    for index, batch in model.batches(asked, answers=True, tokens=_share(model)):
        plain |= dict(zip(index, _answer_logprobs(model, batch), strict=True))
    with applied(model, edit):
        for index, batch in model.batches(asked, answers=True, tokens=_share(model)):
            edited |= dict(zip(index, _answer_logprobs(model, batch), strict=True))
    return float(sum(plain[i] - edited[i] for i in plain)) / max(1, len(asked))


def _answer_logprobs(model: Model, batch: Batch) -> Tensor:
    logits = model.logits(batch)
    means = [-cross_entropy(batch.answer_logits(logits, row), batch.answer(row)) for row in range(len(batch))]
    return torch.stack(means).clamp_min(GONE)


def name_prompts(
    told: Sequence[Mention], retained: Sequence[Mention], *, each: int, wordings: int, seed: int
) -> list[list[Prompt]]:
    """Made-up names in some of the wordings, one list per kind: `each` relatives for every word of every name in `told`,
    and half as many unrelated ones."""
    lists = []
    for kind in sorted({m.kind for m in told}):
        mine = [m for m in told if m.kind == kind]
        names = list(dict.fromkeys(m.name for m in mine))
        known = list(dict.fromkeys([*names, *(m.name for m in retained if m.kind == kind)]))
        near = relatives(names, known, each, seed=seed)
        made = dict.fromkeys([*near, *fictitious(known, max(each, len(near) // 2), seed=seed + 1)])
        frames = [m for m in mine if m.name == names[0]][:wordings]
        lists.append([m.around(name) for name in made for m in frames])
    return [prompts for prompts in lists if prompts]


def name_aware(
    model: Model,
    block: int,
    texts: Sequence[Prompt | str],
    names: Sequence[Sequence[Prompt]],
    *,
    budget: int,
    weight: float,
    ridge: float,
) -> dict[str, Metric]:
    """Metrics that charge for moving ordinary text and, in equal parts at weight 1, for moving each list of other names.

    Names are rare in text, so its statistics alone leave their keys almost free to move; and it is names that an edit of
    a name disturbs. The second moment of each list's keys is scaled to the trace of the text's. One block at a time: the
    statistics of several blocks together would be larger than all that an edit touches.
    """
    second = {n: m.second for n, m in moments(model, [block], texts, budget=budget).items()}
    text = sum(float(c.trace()) for c in second.values())
    for prompts in filter(None, names if weight else ()):
        found = read_keys(model, prompts, [block])[0][block]
        keys = {n: k for n, k in found.items() if n in second}
        scale = weight * text / max(sum(float((k * k).sum()) for k in keys.values()), 1e-30)
        second |= {n: torch.addmm(second[n], k.mT, k, alpha=scale) for n, k in keys.items()}
    return {n: Covariance(c, ridge) for n, c in second.items()}


def entanglement(
    model: Model, told: Sequence[Mention], others: Sequence[Mention], layer: int, metrics: Mapping[str, Metric]
) -> float:
    """How much an unprotected edit of `told` at this block would move `others`: mean over them of the largest
    |k'^T M^-1 k| / k^T M^-1 k, which is the share of the written residual that leaks onto key k'.
    """
    prompts = [m.prompt for m in (*told, *others)]
    keys = {n: k.double() for n, k in read_keys(model, prompts, [layer])[0][layer].items() if n in metrics}
    gram = torch.stack([k @ metrics[n].solve(k[: len(told)]).mT for n, k in keys.items()]).sum(0)
    own = gram[: len(told)].diagonal().clamp_min(1e-30)
    return float((gram[len(told) :].abs() / own).amax(1).mean()) if others else 0.0
