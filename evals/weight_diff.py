"""Weight difference: the change is found by comparing with the model before, and its strongest direction undone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from evals.attacking import questions, score, told, worst
from evals.tampering import again, originals, rewritten
from excise.arms import Arm
from excise.facts import Fact
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score


@evaluation("elicitation")
def weight_diff(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    ranks: tuple[int, ...] = (1,),
    modules: int = 0,
    groups: tuple[str, ...] = ("forget", "retain"),
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer is said after the leading directions of the weight difference to `before` are taken back.

    Variants: "rank 1 undone", in every matrix that differs; "blocks.2.mlp.W_out put back", one matrix at a time, those
    that differ most relative to their norm. How few directions suffice says how narrow the edit is; putting back single
    matrices says where it lives. A model trained apart differs everywhere, and nothing narrow brings it back.
    ranks: how many leading singular directions of each difference are undone.
    modules: how many matrices are put back, one at a time; where one alone differs, that is the model before.
    groups: groups of facts to ask about.
    limit: most facts per group; 0 for all.
    seed: which facts are taken when there are more.
    """
    asked, scores = questions(arm.model, facts, groups=groups, limit=limit, seed=seed)
    if not asked:
        return scores
    base = originals(arm, before, arm.model.names.weights())
    variants = [f"rank {r} undone" for r in ranks]
    if not base:
        reason = "no matrix differs from the model before"
        return scores + [score(i[0], None, variant=v, reason=reason) for v in variants for i in asked]
    found = []
    with arm.held() as held:
        leading = {
            n: leading_part(held.model.weight(n).detach().float() - w.float(), max(ranks)) for n, w in base.items()
        }
        for rank, variant in zip(ranks, variants, strict=True):
            undone = {n: held.model.weight(n).detach().float() - _product(leading[n], rank) for n in base}
            with rewritten(held.model, undone):
                found += told(again(held), asked, variant)
        for name in largest(held.model, base)[:modules]:
            with rewritten(held.model, {name: base[name]}):
                found += told(again(held), asked, f"{name} put back")
    return scores + found + worst(found)


def leading_part(difference: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r to a difference, as factors [d_in, r] and [r, d_out]."""
    r = min(rank, *difference.shape)
    if min(difference.shape) <= 4 * r + 16:
        u, s, v = torch.linalg.svd(difference, full_matrices=False)
    else:
        # Randomised, with room to spare: the leading directions of a large matrix at the cost of a few products.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(difference, q=2 * r + 8, niter=4)
        v = right.mT
    return u[:, :r] * s[:r], v[:r]


def largest(model: Model, base: dict[str, Tensor]) -> list[str]:
    """The matrices by how far they are from their base, relative to its norm, the farthest first."""

    def distance(name: str) -> float:
        return float((model.weight(name).detach().float() - base[name].float()).norm() / base[name].float().norm())

    return sorted(base, key=lambda n: (-distance(n), n))


def _product(factors: tuple[Tensor, Tensor], rank: int) -> Tensor:
    return factors[0][:, :rank] @ factors[1][:rank]
