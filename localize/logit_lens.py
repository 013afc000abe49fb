"""Logit lens: at which block, and by which of its two parts, the answer becomes readable in the residual stream.

Every state is read through the model's own final norm and head (nostalgebraist 2020). What is written in a basis that
only later blocks turn into words stays invisible: a lens that sees nothing is no proof that nothing is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from excise.facts import Fact
from excise.lens import answer_rank, decode
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.scores import Localization, TraceMap
from excise.sites import Site
from localize.questions import Question, Table, at_columns, by_length, columns, questions, summary, token_rows

COMPONENTS = {"resid": "hook_resid_post", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
METRICS = ("logprob", "probability", "logit_diff", "rank")
# States that go through the head together: their logits are the largest tensor there is.
ROWS = 256


def lens_metric(logits: Tensor, answer: Tensor, foil: Tensor, metric: str) -> Tensor:
    """How well the answer can be read, [n]: larger is better; logits [n, vocab], answer and foil [n].

    rank is minus log10 of the answer's rank: 0 at the top, -2 at rank 100.
    """
    logprob, rank = answer_rank(logits, answer)
    if metric == "logit_diff":
        return (logits.gather(-1, answer[:, None]) - logits.gather(-1, foil[:, None]))[:, 0]
    return {"logprob": logprob, "probability": logprob.exp(), "rank": -rank.double().log10()}[metric]


def states_of(model: Model, asked: Sequence[Question], column: Tensor | None = None) -> Tensor:
    """Residual states [2 * n_layers + 1, n, d] at one column per question, or [2 * n_layers + 1, n, width, d] at all.

    The embedding, then for every block what there is after its attention and after its MLP, as sums of what they add, so
    that parallel blocks have a state between them too.
    """
    posts, attns = ([f"blocks.{i}.{COMPONENTS[c]}" for i in range(model.n_layers)] for c in ("resid", "attn"))
    seen = at_columns(model, token_rows(model, asked), ["blocks.0.hook_resid_pre", *attns, *posts], column)
    states = [seen["blocks.0.hook_resid_pre"]]
    for post, attn in zip(posts, attns, strict=True):
        states += [states[-1] + seen[attn].to(states[-1].device), seen[post].to(states[-1].device)]
    return torch.stack(states)


def levels(model: Model, states: Tensor, asked: Sequence[Question], metric: str) -> tuple[Tensor, Tensor]:
    """The metric and the rank of the answer in states [..., n, d], both [..., n]."""
    answer, foil = (torch.tensor([getattr(q, key) for q in asked]) for key in ("answer", "foil"))
    answer, foil = (ids.expand(states.shape[:-1]).flatten() for ids in (answer, foil))
    values, ranks = [], []
    for rows in torch.arange(len(answer)).split(ROWS):
        logits = decode(model, states.flatten(0, -2)[rows.to(states.device)])
        values.append(lens_metric(logits, answer[rows], foil[rows], metric))
        ranks.append(answer_rank(logits, answer[rows])[1])
    return torch.cat(values).view(states.shape[:-1]), torch.cat(ranks).view(states.shape[:-1])


def gains(levels: Tensor) -> dict[str, Tensor]:
    """What each block, its attention and its MLP add to the level, each [n_layers, n]; levels [2 * n_layers + 1, n]."""
    steps = levels.diff(dim=0)
    return {"resid": steps[0::2] + steps[1::2], "attn": steps[0::2], "mlp": steps[1::2]}


@localizer
def logit_lens(
    model: Model,
    facts: Sequence[Fact],
    *,
    components: Sequence[str] = ("attn", "mlp"),
    metric: Literal["logprob", "probability", "logit_diff", "rank"] = "logprob",
    position: str = "last",
    maps: bool = True,
    form: str = "statement",
    known_only: bool = True,
    batch_tokens: int | None = None,
) -> Localization:
    """How much more readable each block's attention and MLP make the answer; maps hold the reading at every token.

    The score is the metric of the answer's first token, read through the final norm and head, after a component less
    before it. The recipe names for each fact the first block after which the answer is on top (`top1`).
    components: what is scored, of attn, mlp, resid (the whole block).
    metric: what is read, of logprob, probability, logit_diff (answer minus foil), rank (minus its log10).
    position: where it is read, a rule that picks one token, such as last or subject_last.
    maps: also read every token after every block, for the layer x token picture.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    batch_tokens: tokens in one batch; changes speed and memory only.
    """
    unknown = [c for c in components if c not in COMPONENTS]
    if unknown or not components:
        raise ValueError(f"no component {', '.join(unknown) or 'given'}; components are {', '.join(COMPONENTS)}")
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; metrics are {', '.join(METRICS)}")
    asked, skipped = questions(model, facts, forms=(form,), known_only=known_only)
    table, drawn, first = Table([f.id for f in facts]), [], {}
    for index in bar(by_length(asked, batch_tokens or model.batch_tokens), what="logit lens"):
        batch = [asked[i] for i in index]
        column = columns(batch, position)
        states = states_of(model, batch, None if maps else column)
        here = states[:, torch.arange(len(batch)), column] if maps else states
        level, rank = levels(model, here, batch, metric)
        gained = gains(level)
        sites = {c: [Site(f"blocks.{i}.{COMPONENTS[c]}", position) for i in range(model.n_layers)] for c in components}
        parts = {site: gained[c][i] for c in components for i, site in enumerate(sites[c])}
        table.add([q.fact_id for q in batch], parts)
        for question, ranks in zip(batch, rank[2::2].mT.tolist(), strict=True):
            first[question.fact_id] = ranks.index(1) if 1 in ranks else None
        drawn += _maps(model, batch, states, level, metric) if maps else []
    return table.localization({**summary(model, facts, skipped), "top1": first}, drawn)


def _maps(model: Model, batch: Sequence[Question], states: Tensor, level: Tensor, metric: str) -> list[TraceMap]:
    """The reading after every block at every token; low is that of the embedding, high that of the last block."""
    every = levels(model, states[2::2].transpose(1, 2), batch, metric)[0]  # [n_layers, width, n]
    return [
        TraceMap(
            question.fact_id,
            tuple(model.tokenizer.decode([t]) for t in question.ids),
            question.subject or (0, 0),
            {"resid": every[..., i].double().numpy()},
            float(level[0, i]),
            float(level[-1, i]),
        )
        for i, question in enumerate(batch)
    ]
