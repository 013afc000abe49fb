"""Choosing features: which of a dictionary's features belong to what is to be forgotten, and to nothing else.

Every rule is a function of sums over texts or of activations and gradients; scores that a rule excludes are -inf. What
fires on a text and what changes the output are different sets (Arad et al., arXiv 2505.20063): `attribution` asks for
the second, the others for the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.features import scaling
from excise.gradients import answer_losses, frozen
from excise.model import Model
from excise.trace import patched, read_batch
from sae.dictionary import Dictionary
from sae.reading import Text, content
from sae.statistics import CHUNK, FeatureStats

RULES = ("sparsity", "importance", "attribution", "difference")
NEVER = -torch.inf


def sparsity(forget: FeatureStats, retain: FeatureStats, *, most: float = 0.01, least: int = 1) -> Tensor:
    """Share of forget tokens on which a feature fires, [n]; excluded where it fires on `most` of the retain tokens or more.

    least: forget tokens that a feature must fire on. Farrell et al., arXiv 2410.19278 (as in SAEBench).
    """
    return torch.where((retain.rate < most) & (forget.count >= max(1, least)), forget.rate, NEVER)


def importance(forget: FeatureStats, retain: FeatureStats, *, percentile: float = 95.0, least: int = 1) -> Tensor:
    """Mean squared activation on forget tokens, [n]: the diagonal Fisher information of a feature.

    Excluded unless forget / retain is above 1 and within the top (100 - percentile) % of all features. Muhamed et al.,
    arXiv 2504.08192, with a floor under the ratio that counts one firing as the least evidence (the release divides by
    1e-21).
    """
    floor = 1.0 / max(1, forget.tokens + retain.tokens)
    ratio = (forget.power + floor) / (retain.power + floor)
    among = ratio >= torch.quantile(ratio, percentile / 100)
    return torch.where(among & (ratio > 1) & (forget.count >= max(1, least)), forget.power, NEVER)


def difference(forget: FeatureStats, retain: FeatureStats, *, least: int = 1) -> Tensor:
    """Mean activation on forget tokens minus that on retain tokens, [n]; excluded where it is not positive. The baseline."""
    gap = forget.mean - retain.mean
    return torch.where((gap > 0) & (forget.count >= max(1, least)), gap, NEVER)


def attributed(effect: Tensor, forget: FeatureStats, retain: FeatureStats, *, most: float = 0.01) -> Tensor:
    """Effect on the answers, [n], excluded where it is not positive or the feature fires on too much retain text."""
    return torch.where((effect > 0) & (retain.rate < most) & (forget.count >= 1), effect, NEVER)


def top(scores: Tensor, n: int) -> list[int]:
    """The n features of highest score, best first; excluded ones never, ties in the order of the features."""
    order = torch.argsort(-scores, stable=True)[:n].tolist()
    return [i for i in order if scores[i] > NEVER]


def ranked(
    rule: str,
    model: Model,
    dictionary: Dictionary,
    prompts: Sequence[Text],
    groups: Sequence[int],
    forget: Sequence[FeatureStats],
    retain: FeatureStats | Sequence[FeatureStats],
    *,
    most: float = 0.01,
) -> Tensor:
    """Scores of every feature by `rule` for each group of prompts, [n_groups, n].

    forget[g]: sums over group g; retain: sums over what it is to be told apart from, one for all or one per group.

    Whatever the rule, a feature that fires on `most` of the retain tokens or more is excluded. Raises ValueError for an
    unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"no selection rule {rule!r}; rules are {', '.join(RULES)}")
    others = [retain] * len(forget) if isinstance(retain, FeatureStats) else list(retain)
    pairs = list(zip(forget, others, strict=True))
    if rule == "attribution":
        allowed = torch.stack([(r.rate < most) & (f.count >= 1) for f, r in pairs])
        effect = attribution(model, dictionary, prompts, groups, allowed)
        return torch.stack([attributed(e, f, r, most=most) for e, (f, r) in zip(effect, pairs, strict=True)])
    if rule == "sparsity":
        return torch.stack([sparsity(f, r, most=most) for f, r in pairs])
    score = importance if rule == "importance" else difference
    return torch.stack([torch.where(r.rate < most, score(f, r), NEVER) for f, r in pairs])


def shared_out(scores: Tensor, n: int) -> list[int]:
    """n features dealt in turn among the groups, each taking its best one that is still free; scores: [n_groups, n]."""
    queues = [iter(top(row, scores.shape[1])) for row in scores]
    chosen: dict[int, None] = {}
    while queues and len(chosen) < n:
        for queue in list(queues):
            best = next((i for i in queue if i not in chosen), None)
            if best is None:
                queues.remove(queue)
            elif len(chosen) < n:
                chosen[best] = None
    return list(chosen)


def attribution(
    model: Model,
    dictionary: Dictionary,
    prompts: Sequence[Text],
    groups: Sequence[int],
    candidates: Tensor | None = None,
    *,
    steps: int = 4,
) -> Tensor:
    """How much of the answers' log-probability hangs on each feature, [n_groups, n].

    Integrated gradients (arXiv 1703.01365; for features arXiv 2403.19647) along the path on which the candidates of a group
    go out together, on the content tokens: a * (decoder . mean slope of log p(answer)), p as the mean over the answer's
    tokens; summed over tokens, then the mean over the prompts of each group. The sum over the candidates is what ablating
    all of them takes away, and one candidate alone gets what ablating it takes away, both up to the `steps` of the path.
    The slope at the state itself would not do: an answer that is certain has none, and features stand in for each other.

    candidates: features that go out, [n] or [n_groups, n]; all when left out. Others get what they would be given there.
    """
    found = torch.zeros(max(groups) + 1, dictionary.n, dtype=torch.float64)
    leaving = torch.ones(dictionary.n, dtype=torch.bool) if candidates is None else candidates
    leaving, dictionary = leaving.expand(len(found), dictionary.n).to(model.device), dictionary.to(model.device)
    # A backward pass holds every activation, so batches are smaller than for reading.
    for index, batch in model.batches(list(prompts), answers=True, tokens=model.batch_tokens // 4):
        x, counts = read_batch(model, batch, [dictionary.hook])[dictionary.hook], content(model, batch)
        owner = torch.tensor([groups[i] for i in index])[:, None].expand(counts.shape)[counts.cpu()]
        rows = max(1, CHUNK // dictionary.n)
        chunks = list(zip(x[counts].split(rows), owner.split(rows), strict=True))
        part = torch.zeros_like(x)
        part[counts] = torch.cat([_written(dictionary, xs, leaving[of]) for xs, of in chunks]).to(x.dtype)
        places = [(step + 0.5) / steps for step in range(steps)]
        slope = sum(_slope(model, dictionary.hook, batch, x - (1 - at) * part)[counts].float() for at in places) / steps
        for (xs, of), gs in zip(chunks, torch.as_tensor(slope).split(rows), strict=True):
            found.index_add_(0, of, first_order(dictionary, xs, gs).double().cpu())
    size = torch.bincount(torch.tensor(groups), minlength=len(found)).clamp_min(1)
    return found / size[:, None]


def _written(dictionary: Dictionary, x: Tensor, features: Tensor) -> Tensor:
    """What some features write into x [tokens, d]; features: [tokens, n]."""
    written = torch.where(features, dictionary.encode(x), 0.0) @ dictionary.decoder
    scale = scaling(x.float(), dictionary.norm)[1]
    return written if scale is None else written * scale


def first_order(dictionary: Dictionary, x: Tensor, gradient: Tensor) -> Tensor:
    """a * (decoder . gradient) for every feature and token, [tokens, n]; x and gradient are [tokens, d]."""
    scale = scaling(x.float(), dictionary.norm)[1]
    pull = gradient.float() @ dictionary.decoder.mT
    return dictionary.encode(x) * (pull if scale is None else pull * scale)


def _slope(model: Model, hook: str, batch: Batch, x: Tensor) -> Tensor:
    """The gradient of the answers' mean log-probability at x, put in at the hook, [rows, width, d]."""
    leaf = x.detach().requires_grad_(True)
    with frozen(model), patched(model, {hook: lambda _: leaf}), torch.enable_grad():
        gain = -answer_losses(model, batch)
        (slope,) = torch.autograd.grad(gain.sum(), [leaf])
    return slope


def matched(stats: FeatureStats, features: Sequence[int], *, seed: int = 0) -> list[int]:
    """For each feature another one, drawn from the twenty whose firing rate is nearest: the control of a choice."""
    generator = torch.Generator().manual_seed(seed)
    taken = set(features)
    found: list[int] = []
    for feature in features:
        nearest = torch.argsort((stats.rate - stats.rate[feature]).abs(), stable=True).tolist()
        free = [i for i in nearest if i not in taken][:20]
        if not free:
            raise ValueError(f"the dictionary has no {len(features)} other features to match")
        found.append(free[int(torch.randint(len(free), (1,), generator=generator))])
        taken.add(found[-1])
    return found
