"""Gates that tell texts apart by their features, calibrated on texts that must pass.

`share_gate` is that of the dynamic guardrail (Muhamed et al., arXiv 2504.08192): the share of tokens on which a chosen
feature fires. `quorum_gate` asks for the features of one subject: each of them is shared with other subjects, all of them
together with hardly any.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from excise.gates import GateState, Quorum, Share
from excise.model import Model
from sae.dictionary import Dictionary
from sae.reading import Text, readings

# A member fires on OFTEN of its subject's prompts, which are also read after other texts. Its level is BELOW times the peak
# that all but WEAK of them reach: names that look alike fire the same features, but not as strongly. The threshold moves a
# THIRD of the way from texts to prompts, because subjects that nobody listed come closer to it than those that were.
OFTEN, WEAK, BELOW, THIRD = 0.8, 0.05, 0.7, 1 / 3


@dataclass(frozen=True, eq=False)
class Members:
    """The features by which subjects are known. group: number of the subject of each; level: see `excise.gates.Quorum`."""

    features: list[int]
    group: list[int]
    level: Tensor


def members(
    model: Model,
    dictionary: Dictionary,
    prompts: Sequence[Text],
    owner: Sequence[int],
    others: Sequence[Text],
    *,
    size: int = 12,
) -> Members:
    """For each subject at most `size` features: those that fire on its prompts and on the smallest share of other texts.

    owner[i]: number of the subject of prompts[i], from 0. Prompts are read without their answers, so that a subject is
    known before anything is said of it; the others with theirs. What fires on half as many other texts or more is left out.
    """
    mine = _all_peaks(model, dictionary, prompts, answers=False)
    rows = [torch.tensor([i for i, o in enumerate(owner) if o == g]) for g in range(max(owner) + 1)]
    levels = torch.stack([BELOW * _quantile(mine[r], WEAK) for r in rows])  # [subjects, n]
    often = torch.stack([(mine[r] > level).double().mean(0) for r, level in zip(rows, levels, strict=True)])
    elsewhere, read = torch.zeros_like(often), 0
    for _, peaks in _peaks(model, dictionary, others):
        for g, level in enumerate(levels):
            elsewhere[g] += (peaks > level).double().sum(0)
        read += len(peaks)
    rare = (elsewhere + 1) / (read + 2)
    odds = torch.where((often >= OFTEN) & (often > 2 * rare), (often / rare).log(), -torch.inf)
    picked = [[i for i in row.argsort(descending=True, stable=True)[:size].tolist() if row[i] > 0] for row in odds]
    return Members(
        [i for row in picked for i in row],
        [g for g, row in enumerate(picked) for _ in row],
        torch.cat([levels[g][row] for g, row in enumerate(picked)]),
    )


def quorum_gate(
    model: Model,
    dictionary: Dictionary,
    known: Members,
    prompts: Sequence[Text],
    texts: Sequence[Text],
    *,
    fpr: float,
    window: int = 16,
) -> tuple[Quorum, dict[str, Any]]:
    """The gate that opens once enough of one subject's features have fired, and what was measured.

    Its threshold is that of `quantile_above` on `texts`, moved a third of the way to what all but 1 in 20 of `prompts` reach.
    """
    gate = dictionary.quorum(known.features, known.group, known.level, 0.0, window=window, sticky=True)
    wanted = reached(model, dictionary, gate, prompts, answers=False)
    passing = reached(model, dictionary, gate, texts)
    bound = quantile_above(passing, fpr)
    gate = replace(gate, share=bound + THIRD * max(0.0, float(_quantile(wanted, WEAK)) - bound))
    return gate, _report(gate, passing, wanted, fpr)


def share_gate(
    model: Model,
    dictionary: Dictionary,
    features: Sequence[int],
    prompts: Sequence[Text],
    texts: Sequence[Text],
    *,
    fpr: float,
    window: int = 0,
) -> tuple[Share, dict[str, Any]]:
    """The gate that opens once the share of tokens with one of `features` active passes what texts reach."""
    gate = dictionary.share(features, 0.0, window=window, sticky=True)
    wanted = reached(model, dictionary, gate, prompts, answers=False)
    passing = reached(model, dictionary, gate, texts)
    gate = replace(gate, share=quantile_above(passing, fpr))
    return gate, _report(gate, passing, wanted, fpr)


def quantile_above(values: Tensor, rate: float) -> float:
    """The smallest of `values` that a further exchangeable one exceeds with probability at most `rate`.

    With fewer than 1 / rate - 1 values no such promise can be made, and the largest one is taken; at rate 1 it is below all.
    """
    place = math.ceil((len(values) + 1) * (1 - rate))
    return float(values.sort().values[min(place, len(values)) - 1]) if place else -1.0


def reached(
    model: Model, dictionary: Dictionary, gate: Share | Quorum, texts: Sequence[Text], *, answers: bool = True
) -> Tensor:
    """The largest share that each text reaches under the gate, [texts]."""
    found = torch.zeros(len(texts), dtype=torch.float64)
    for r in readings(model, texts, dictionary.hook, answers=answers):
        shares = gate.reached(r.x, r.counts, GateState())
        found[r.index] = torch.where(r.counts, shares, 0.0).amax(1).double().cpu()
    return found


def _report(gate: Share | Quorum, passing: Tensor, wanted: Tensor, fpr: float) -> dict[str, Any]:
    return {
        "kind": gate.kind,
        "share": gate.share,
        "window": gate.window,
        "fpr asked": fpr,
        "fpr on retain": float((passing > gate.share).double().mean()),
        "retain texts": len(passing),
        "forget texts that open it": float((wanted > gate.share).double().mean()),
    }


def _peaks(
    model: Model, dictionary: Dictionary, texts: Sequence[Text], *, answers: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """The largest activation of every feature on each text, [batch, n], with the numbers of the texts."""
    for r in readings(model, texts, dictionary.hook, answers=answers):
        yield r.index, torch.where(r.counts[..., None], dictionary.encode(r.x), 0.0).amax(1).cpu()


def _all_peaks(model: Model, dictionary: Dictionary, texts: Sequence[Text], *, answers: bool) -> Tensor:
    found = torch.zeros(len(texts), dictionary.n)
    for index, peaks in _peaks(model, dictionary, texts, answers=answers):
        found[index] = peaks
    return found


def _quantile(values: Tensor, rate: float) -> Tensor:
    """The value that all but `rate` of the rows reach, along the first axis."""
    return values.kthvalue(max(1, math.ceil(rate * len(values))), dim=0).values
