"""Rewriting: one change of state per name, after which something else is said of it, and the weights that bring it about.

The classic editors of single facts look for one vector per fact by gradient descent. All facts of a subject share its
key, so one vector per name has to serve all that is to be forgotten of it. Only that vector is trained, never a weight;
or nothing is, and names get the state of made-up ones. ROME (arXiv 2202.05262), MEMIT (2210.07229) and AlphaEdit
(2410.02355) differ in where and under which metric the change is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from excise.apply import applied
from excise.checks import fingerprints
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.keys import read_keys, write_matrices
from excise.mentions import Mention, mentions
from excise.model import Model
from excise.redirection import candidate_blocks
from excise.scores import Localization
from excise.solve import Covariance, Metric, NullSpace, Solution, solve_edit
from excise.stats import moments

# Where published editors write the most of a fact: blocks 5 of 28 or 32, 8 of 32, 17 of 48.
DEPTH = 0.25
# Said of a fact that has no foils.
NEUTRAL = "I do not know"
# Relative ridge of the covariance: enough to invert it when text is short.
FLOOR = 1e-3

# Metrics of a block's write matrices.
Cost = Callable[[int], Mapping[str, Metric]]


@dataclass(frozen=True)
class Names:
    """Names to be rewritten. Each is read in its wordings, and its key is the mean over them.

    mentions: the wordings; owner: the name that each is of, [n_mentions].
    asked: what is asked of the names, with what they shall answer instead; asker: the name each asks of, [n_asked].
    """

    names: tuple[str, ...]
    mentions: tuple[Mention, ...]
    owner: Tensor
    asked: tuple[Prompt, ...]
    asker: Tensor

    @property
    def prompts(self) -> list[Prompt]:
        """The wordings, each ending at its name."""
        return [m.prompt for m in self.mentions]

    def mean(self, rows: Tensor) -> Tensor:
        """Mean over the wordings of each name: [n_mentions, d] to [n_names, d]."""
        return mean_of(rows, self.owner, len(self.names))


def mean_of(rows: Tensor, owner: Tensor, n: int) -> Tensor:
    """Mean of the rows [m, d] of each of n owners, [n, d]; owner: [m]."""
    count = torch.bincount(owner, minlength=n).clamp_min(1)
    return rows.new_zeros(n, rows.shape[1]).index_add_(0, owner, rows) / count[:, None].to(rows)


def names_of(facts: Sequence[Fact], *, target: str, contexts: int, prompts: int, seed: int) -> Names:
    """The subjects of the facts, and what is asked of them: held-out wordings, reversed ones and choices left out.

    target: "foil" (one of each fact's foils, drawn by `seed`; `NEUTRAL` where it has none) or the text to be said.
    contexts: wordings that make a key. prompts: how many are asked of each name, all its facts in turn.
    Raises ExciseError when there is nothing to forget.
    """
    known = Facts(facts)
    if not len(known):
        raise ExciseError("nothing to forget: the forget set is empty")
    told = [m for m in mentions(known, limit=contexts) if m.kind == "direct"]
    names = tuple(dict.fromkeys(m.name for m in told))
    if not names:
        raise ExciseError("no prompt names the subject of its fact: there is no token to write at")
    asked = [
        p for name in names for p in _turns([_asked(f, target, seed) for f in known if f.subject == name], prompts)
    ]
    return Names(
        names,
        tuple(told),
        torch.tensor([names.index(m.name) for m in told]),
        tuple(asked),
        torch.tensor([names.index(p.subject) for p in asked], dtype=torch.long),
    )


def _asked(fact: Fact, target: str, seed: int) -> list[Prompt]:
    """The fact's prompts with another answer, one of each form first."""
    drawn = random.Random(f"{seed} {fact.id}").choice(fact.foils) if fact.foils else NEUTRAL
    said = drawn if target == "foil" else target
    own = [p for p in fact.ask(held_out=False) if p.subject == fact.subject and p.form not in ("reversed", "choice")]
    forms = {p.form: [q for q in own if q.form == p.form] for p in own}
    return [replace(p, answer=said, choices=()) for p in _turns(list(forms.values()), len(own))]


def _turns(lists: Sequence[Sequence[Prompt]], limit: int) -> list[Prompt]:
    """The first items of all lists, then the second ones, and so on, `limit` at most."""
    return [p for p in chain.from_iterable(zip_longest(*lists)) if p is not None][:limit]


def name_states(model: Model, names: Names, point: str) -> Tensor:
    """States [n_mentions, d] at `point`, of every wording's name."""
    return read_keys(model, names.prompts, [], points=[point])[1][point]


def window(model: Model, where: Localization | None, layers: int) -> range:
    """`layers` consecutive blocks that end at the best one of `where`, or a quarter up the model without it."""
    last = round(model.n_layers * DEPTH) if where is None else candidate_blocks(model, where, 1)[0]
    last = max(last, layers - 1)
    if layers < 1 or last >= model.n_layers:
        raise ValueError(f"layers={layers}: this model has {model.n_layers} blocks")
    for block in range(last - layers + 1, last + 1):
        write_matrices(model, block)  # fails before the long part
    return range(last - layers + 1, last + 1)


def text_cost(
    model: Model, texts: Sequence[Prompt | str], budget: int, metric: Callable[[Tensor], Metric] | None = None
) -> Cost:
    """The metric of each matrix of a block, made from its second moment over ordinary text; one block at a time.

    metric: what is made of a second moment; the covariance with a small ridge when left out.
    """
    made = metric or (lambda second: Covariance(second, FLOOR))
    return lambda block: {n: made(m.second) for n, m in moments(model, [block], texts, budget=budget).items()}


def write(
    model: Model,
    names: Names,
    wanted: Tensor,
    blocks: Sequence[int],
    cost: Cost,
    *,
    mode: str,
    ridge: float,
    only: Sequence[str] = (),
) -> Edit:
    """The edit that gives each name the change `wanted` [n_names, d] of its state after the last of `blocks`.

    Block after block writes its share of what is still open, its keys read again with the earlier changes in force
    (MEMIT, arXiv 2210.07229, section 4.3). only: the matrices that may change; all that write a block's MLP output when
    left out. Raises ExciseError for keys that the hard form cannot tell apart.
    """
    point = f"blocks.{blocks[-1]}.hook_resid_post"
    goal = names.mean(name_states(model, names, point)) + wanted
    edit, reports = Edit((), fingerprints=fingerprints(model)), []
    for i, block in enumerate(blocks):
        with applied(model, edit):
            read, states = read_keys(model, names.prompts, [block], points=[point])
        metrics = {n: m for n, m in cost(block).items() if not only or n in only}
        keys = {n: names.mean(k) for n, k in read[block].items() if n in metrics}
        gap = (goal - names.mean(states[point])) / (len(blocks) - i)
        if not keys:
            continue
        solution = _solved(names, keys, gap, metrics, mode, ridge)
        # An expert that no name reaches is left alone.
        changes = edit.changes + solution.changes(idle=not bool(gap.any()))
        edit = Edit(changes, fingerprints=fingerprints(model, changes))
        reports.append({"block": block, **_report(solution, keys, metrics)})
    return replace(edit, recipe={"model": model.name, "subjects": list(names.names), "solution": reports})


def _solved(
    names: Names, keys: dict[str, Tensor], gap: Tensor, metrics: Mapping[str, Metric], mode: str, ridge: float
) -> Solution:
    try:
        return solve_edit(keys, gap, metrics, mode=mode, ridge=ridge)
    except ValueError as error:
        if "nearly the same" not in str(error):
            raise
        raise ExciseError(
            f"the keys of {', '.join(names.names[:3])} and others cannot be told apart at this block ({error}); "
            "edit fewer names at once, or use a soft editor such as memit"
        ) from error


def _report(solution: Solution, keys: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    found = solution.report
    spaces = {n: m for n, m in metrics.items() if isinstance(m, NullSpace) and n in keys}
    if spaces:
        free = torch.stack([(m.solve(keys[n]) ** 2).sum(1) for n, m in spaces.items()]).sum(0)
        whole = torch.stack([(keys[n].double() ** 2).sum(1) for n in spaces]).sum(0)
        dims = [(m.second_moment.shape[0], m.basis().shape[1]) for m in spaces.values()]
        # Near 0 the name cannot be written here, near 1 nothing is protected.
        found["free share of keys"] = float((free / whole.clamp_min(1e-300)).mean())
        found["free dimensions"] = 1 - sum(b for _, b in dims) / sum(a for a, _ in dims)
    return found


__all__ = [
    "Cost",
    "Names",
    "mean_of",
    "name_states",
    "names_of",
    "text_cost",
    "window",
    "write",
]
