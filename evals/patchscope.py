"""Patchscope: an attacker without the original puts the subject's inner state into another prompt of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evals.sampling import direct, first_answer_token, measurable, nothing
from evals.states import states
from excise.arms import Arm
from excise.encoding import Batch
from excise.facts import Fact, Prompt
from excise.model import Model
from excise.registry import evaluation
from excise.scores import Score
from excise.trace import patched

# A state is put at most so many blocks above the one that it came from.
AHEAD = 2


@evaluation("intrinsic")
def patchscope(
    arm: Arm,
    facts: Sequence[Fact],
    *,
    before: Arm,
    placeholder: str = "x",
    text: str = "",
    ks: tuple[int, ...] = (1, 5),
    levels: int = 8,
    limit: int = 24,
    seed: int = 0,
) -> list[Score]:
    """1 where the answer's first token is in the top k for some pair of blocks, when the subject's state is decoded elsewhere.

    The state after block s at the subject's last token takes the place of the placeholder's after block t, t <= s + 2, in
    a prompt that does not name the subject; no other model is needed (after Patchscopes, arXiv 2401.06102). Variants:
    "hit@k"; "chance, hit@k" with another subject's states, whose answer is a different one, which says what so many tries
    bring by themselves; "best rank". Read against the oracle too.
    placeholder: stands where the subject stood.
    text: the decoding prompt, which holds the placeholder; the fact's own wording when empty.
    ks: sizes k of the lists of likeliest tokens.
    levels: most blocks, evenly spaced, that states are taken from and put into.
    limit: most facts; 0 for all.
    seed: which facts are taken when there are more.
    """
    items, unasked = measurable(arm.model, direct(facts, groups=("forget",), limit=limit, seed=seed))
    named = [i for i in items if i.prompt.subject]
    scores = [
        i.score(None, variant=f"hit@{ks[0]}", reason="the prompt names no subject") for i in items if i not in named
    ]
    scores += [i.score(None, variant=f"hit@{ks[0]}", reason=why) for i, why in unasked]
    if not named:
        return scores or nothing("no facts to forget", group="forget")
    asked = [_decoding(i.prompt, placeholder, text) for i in named]
    sources = [s.subject for s in states(arm, [i.prompt for i in named])]
    found = torch.stack([s for s in sources if s is not None])
    gold = torch.tensor([first_answer_token(arm.model, i.prompt) for i in named])
    lent = _lenders(gold.tolist())
    rows = [i for i, j in enumerate(lent) if j >= 0]
    whose = torch.cat([found, found[[lent[i] for i in rows]]])
    best = _best_ranks(arm, [*asked, *(asked[i] for i in rows)], whose, torch.cat([gold, gold[rows]]), levels)
    ranks = best.tolist()
    for item, rank in zip(named, ranks[: len(named)], strict=True):
        scores += [item.score(float(rank <= k), variant=f"hit@{k}") for k in ks]
        scores.append(item.score(float(rank), variant="best rank"))
    for i, rank in zip(rows, ranks[len(named) :], strict=True):
        scores += [named[i].score(float(rank <= k), variant=f"chance, hit@{k}") for k in ks]
    why = "no other fact to forget has another answer"
    return scores + [
        i.score(None, variant=f"chance, hit@{ks[0]}", reason=why) for i, j in zip(named, lent, strict=True) if j < 0
    ]


def block_pairs(layers: int, levels: int) -> list[tuple[int, int]]:
    """(source, target) blocks: at most `levels` evenly spaced ones, targets up to AHEAD above their source."""
    chosen = sorted({round(i * (layers - 1) / max(1, levels - 1)) for i in range(levels)}) if layers > levels else None
    spaced = chosen or list(range(layers))
    ahead = [(s, min(layers - 1, s + AHEAD)) for s in spaced]
    return sorted({(s, t) for s in spaced for t in spaced if t <= s + AHEAD} | set(ahead))


def _lenders(gold: Sequence[int]) -> list[int]:
    """For each fact the next one whose answer is another; -1 where there is none."""
    n = len(gold)
    return [next((j % n for j in range(i + 1, i + n) if gold[j % n] != gold[i]), -1) for i in range(n)]


def _decoding(prompt: Prompt, placeholder: str, text: str) -> Prompt:
    """The prompt that the state is put into."""
    own = prompt.text.replace(prompt.subject, placeholder)
    return replace(prompt, text=text or own, subject=placeholder)


def _best_ranks(arm: Arm, asked: Sequence[Prompt], found: Tensor, gold: Tensor, levels: int) -> Tensor:
    """Best rank [n] of each gold token over all pairs of blocks; found [n, n_layers, d_model]."""
    best = torch.full((len(asked),), torch.iinfo(torch.long).max)
    with arm.running() as model:
        for index, batch in model.batches(asked, tokens=max(1, model.batch_tokens // 4)):
            for source, target in block_pairs(model.n_layers, levels):
                logits = _decoded(model, batch, f"blocks.{target}.hook_resid_post", found[index, source])
                picked = logits.gather(-1, gold[index, None])
                best[index] = torch.minimum(best[index], 1 + (logits > picked).sum(-1))
    return best


def _decoded(model: Model, batch: Batch, point: str, state: Tensor) -> Tensor:
    """Next-token logits [n, vocab] with `state` [n, d] at the placeholder."""
    where = batch.where("subject_last").to(batch.ids.device)[..., None]

    def write(x: Tensor) -> Tensor:
        return torch.where(where.to(x.device), state.to(x.device, x.dtype)[:, None], x)

    last = torch.tensor(batch.lengths, device=batch.ids.device) - 1
    with torch.no_grad(), patched(model, {point: write}):
        keep = torch.unique(last)
        out = model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=keep).logits
    return out[torch.arange(len(batch)), torch.searchsorted(keep, last)].float().cpu()
