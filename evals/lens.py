"""Logit lens: can the answer be read from inner layers, whatever the last layer says?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from evals.sampling import Item, first_answer_token, measurable, nothing, sample
from evals.states import states
from excise.arms import Arm
from excise.facts import Fact
from excise.lens import answer_rank, decode
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

GROUPS = ("forget", "retain")
NEAR = 5
# Relative distance of two heads above which they were not made from each other; independent ones are at 1.4.
KIN = 0.5


@evaluation("intrinsic")
def lens(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    forms: tuple[str, ...] = ("statement", "question"),
    groups: tuple[str, ...] = GROUPS,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """Whether each block's residual stream, read through the final norm and head of `before`, holds the answer.

    Read at the last prompt position. The frozen decoder rules out that only the head was edited; a model that was
    trained apart from `before`, such as an oracle, speaks another language inside and is read by its own. Variants:
    "log-probability, layer i", "rank, layer i" and "top-1, layer i" of the answer's first token; "hit@1, any layer" and
    "hit@5, any layer" (nostalgebraist 2020; arXiv 2309.17410); "hit@5, others' answers", the share of the other subjects'
    answers of the same relation that are found in the same states: with few possible answers the right one is near the
    top by chance, and to a model that does not know it, it is one of them.
    forms: forms to ask in.
    groups: groups of facts to ask about.
    limit: most prompts per group, form and side of the held-out split; 0 for all.
    seed: which prompts are taken when there are more.
    """
    chosen = sample(facts, groups=groups, forms=forms, limit=limit, seed=seed)
    items, unasked = measurable(arm.model, chosen or sample(facts, groups=groups, limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else f"no facts of the groups {', '.join(groups)}")
    decoder = before.model if kin(arm.model, before.model) else arm.model
    gold = torch.tensor([first_answer_token(arm.model, item.prompt) for item in items])
    logprobs, ranks, near = [], [], []
    for rows in layer_states(arm, items):
        logits = decode(decoder, rows)
        logp, rank = answer_rank(logits, gold)
        logprobs.append(logp)
        ranks.append(rank)
        near.append(logits.topk(min(NEAR, logits.shape[-1])).indices)
    logp, rank, found = torch.stack(logprobs, 1), torch.stack(ranks, 1), torch.cat(near, 1)
    scores = [score for i, item in enumerate(items) for score in _scores(item, logp[i].tolist(), rank[i].tolist())]
    chances = by_chance([(item.fact.relation, item.fact.subject) for item in items], gold.tolist(), found.tolist())
    pairs = zip(items, chances, strict=True)
    return scores + [
        i.score(chance, variant=f"hit@{NEAR}, others' answers") for i, chance in pairs if chance is not None
    ]


def by_chance(
    about: Sequence[tuple[str, str]], gold: Sequence[int], found: Sequence[Sequence[int]]
) -> list[float | None]:
    """Of each item the share of the other subjects' answers of its relation that are among what was found for it.

    about: relation and subject; gold: the answer; found: what was found. An answer that many give counts as often, one
    that is the item's own not at all; None without a relation, or where there is no other answer.
    """
    answers: dict[str, Counter[tuple[str, int]]] = {}
    for (relation, subject), answer in zip(about, gold, strict=True):
        if relation:
            answers.setdefault(relation, Counter())[subject, answer] += 1
    chances: list[float | None] = []
    for (relation, subject), own, seen in zip(about, gold, map(set, found), strict=True):
        mine = answers.get(relation, Counter())
        others = {key: n for key, n in mine.items() if key[0] != subject and key[1] != own}
        hits = sum(n for (_, answer), n in others.items() if answer in seen)
        chances.append(hits / sum(others.values()) if others else None)
    return chances


def layer_states(arm: Arm, items: Sequence[Item]) -> list[torch.Tensor]:
    """Residual stream after each block where the answer's first token is predicted: one [n, d_model] per layer.

    Hooks, not `hidden_states`: the last entry of those is already normalised.
    """
    return list(torch.stack([s.last for s in states(arm, [i.prompt for i in items])], 1))


def kin(model: Model, other: Model) -> bool:
    """Whether two models share a residual basis: one is an edit of the other, as their nearly equal heads show."""
    if model is other:
        return True
    a, b = (m.hf.get_submodule(m.names.unembed).weight.detach().float() for m in (model, other))
    return a.shape == b.shape and float((a - b.to(a.device)).norm()) < KIN * float(b.norm())


def _scores(item: Item, logp: Sequence[float], rank: Sequence[int]) -> list[Score]:
    scores = []
    for layer, (p, r) in enumerate(zip(logp, rank, strict=True)):
        scores.append(item.score(p, variant=f"log-probability, layer {layer}"))
        scores.append(item.score(float(r), variant=f"rank, layer {layer}"))
        scores.append(item.score(float(r == 1), variant=f"top-1, layer {layer}"))
    best = min(range(len(rank)), key=lambda layer: rank[layer])
    scores.append(
        item.score(float(rank[best] == 1), variant="hit@1, any layer", detail=f"best rank {rank[best]} at layer {best}")
    )
    return [*scores, item.score(float(rank[best] <= NEAR), variant=f"hit@{NEAR}, any layer")]
