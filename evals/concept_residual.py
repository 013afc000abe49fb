"""Concept-vector residual: are the value vectors that wrote the answer still in the MLP?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from evals.lens import kin
from evals.sampling import Item, direct, first_answer_token, measurable, nothing
from excise.arms import Arm
from excise.errors import ExciseError
from excise.facts import Fact
from excise.keys import read_keys, write_matrices
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score

# (matrix, row): a value vector.
Vector = tuple[str, int]


@evaluation("intrinsic")
def concept_residual(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    vectors: int = 10,
    tokens: int = 200,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """How much of the value vectors that wrote each answer is left, before against after; means over the vectors of a fact.

    The vectors are the rows of W_out that push the answer's first token most in `before`, at the last prompt token: key
    times projection on the token's unembedding less the mean one. Variants: "cosine"; "distance" |v0 - vu| / |v0|;
    "jaccard" of their likeliest tokens under the head of `before`; "concept retention" |Au & W| / |A0 & W| and "related
    rate" |A0 & Au & W| / |A0 & W|, W being the first tokens of all answers about the subject, function words left out;
    "logit change" of the concept's tokens in W. 1, 0, 1, 1, 1, 0 where nothing was changed (ConceptVectors, arXiv
    2406.11614). Nothing for an edit that lives in hooks, nor for a model that was trained apart.
    vectors: value vectors per fact.
    tokens: likeliest tokens of a vector that are compared.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    if not items:
        return nothing(unasked[0][1] if unasked else "no facts to forget", group="forget")
    reason = _refusal(arm, before)
    if reason:
        return [item.score(None, variant="cosine", reason=reason) for item in items]
    head = before.model.weight("unembed.W_U").detach().float()
    chosen = _writers(before, items, head, vectors)
    wanted = sorted({v for own in chosen for v in own})
    old, new = ({v: held[i] for i, v in enumerate(wanted)} for held in (_rows(a, wanted) for a in (before, arm)))
    about = _concepts(before.model, facts)
    scores = [item.score(None, variant="cosine", reason=why) for item, why in unasked]
    for item, own in zip(items, chosen, strict=True):
        words = about[item.fact.subject or item.fact.id]
        found = [residual(old[v], new[v], head, words, tokens) for v in own]
        for variant in found[0]:
            values = [x for f in found if (x := f[variant]) is not None]
            why = "" if values else "no answer of the subject is among the likeliest tokens of its vectors"
            mean = sum(values) / len(values) if values else None
            scores.append(item.score(mean, variant=variant, reason=why))
    return scores


def residual(old: Tensor, new: Tensor, head: Tensor, words: Sequence[int], k: int) -> dict[str, float | None]:
    """The six measures of a value vector [d] before and after; head [d, vocab]; words: tokens of its concept.

    A vector of zeros has cosine 0; measures whose denominator is empty are None.
    """
    lengths = float(old.norm()), float(new.norm())
    cosine = float(old @ new) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0
    spelled = old @ head, new @ head
    a, b = (set(x.argsort(descending=True, stable=True)[:k].tolist()) for x in spelled)
    w = set(words)
    return {
        "cosine": max(-1.0, min(1.0, cosine)) if not torch.equal(old, new) or not lengths[0] else 1.0,
        "distance": float((old - new).norm()) / lengths[0] if lengths[0] else None,
        "jaccard": jaccard(a, b),
        "concept retention": len(b & w) / len(a & w) if a & w else None,
        "related rate": len(a & b & w) / len(a & w) if a & w else None,
        "logit change": float((spelled[1] - spelled[0])[list(w)].mean()) if w else None,
    }


def jaccard(a: set[int], b: set[int]) -> float:
    """|a & b| / |a | b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


@cache
def function_words() -> frozenset[str]:
    """English function words, which belong to no concept."""
    return frozenset((Path(__file__).parent / "function_words.txt").read_text(encoding="utf-8").split())


def _refusal(arm: Arm, before: Arm) -> str:
    """Why vectors cannot be compared; "" when they can."""
    if not kin(arm.model, before.model):
        return "trained apart: neuron i of one model is not neuron i of the other"
    if arm.mode == "hook":
        return "the edit lives in hooks: every value vector is as it was"
    try:
        for layer in range(before.model.n_layers):
            write_matrices(before.model, layer)
    except ExciseError as error:
        return str(error)
    return ""


def _writers(before: Arm, items: Sequence[Item], head: Tensor, count: int) -> list[list[Vector]]:
    """For each item the value vectors that push its answer's first token most at the last prompt token."""
    model = before.model
    gold = torch.tensor([first_answer_token(model, i.prompt) for i in items], device=head.device)
    wanted = head[:, gold] - head.mean(1, keepdim=True)  # [d, n]
    with before.running():
        keys, _ = read_keys(model, [i.prompt for i in items], list(range(model.n_layers)), rule="last")
    best: list[list[tuple[float, Vector]]] = [[] for _ in items]
    for name, rows in ((n, r) for own in keys.values() for n, r in own.items()):
        push = rows * (model.weight(name).detach().float() @ wanted.to(model.weight(name).device)).mT.cpu()  # [n, d_in]
        top = push.topk(min(count, push.shape[1]), dim=1)
        for i, (values, at) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            best[i] += [(v, (name, row)) for v, row in zip(values, at, strict=True)]
    return [[v for _, v in sorted(own, key=lambda x: -x[0])[:count]] for own in best]


def _rows(arm: Arm, vectors: Sequence[Vector]) -> list[Tensor]:
    """The value vectors as the arm's weights hold them."""
    with arm.held() as held:
        return [held.model.weight(name).detach()[row].float().clone() for name, row in vectors]


def _concepts(model: Model, facts: Sequence[Fact]) -> dict[str, list[int]]:
    """First tokens of all words of the answers about each subject."""
    found: dict[str, dict[int, None]] = {}
    for fact in facts:
        own = found.setdefault(fact.subject or fact.id, {})
        words = [w for answer in (fact.answer, *fact.aliases) for w in answer.split()]
        for word in words:
            if word.strip(".,;:!?\"'()").lower() not in function_words():
                ids = model.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
                said = [t for t in ids if model.tokenizer.decode([t]).strip()]
                own |= dict.fromkeys(said[:1])
    return {subject: list(own) for subject, own in found.items()}
