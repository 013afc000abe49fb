"""Direct logit attribution: what each component itself adds to the logit of the answer.

The residual stream at the end is a sum of what the components wrote, and with the final norm's scale held fixed the
logits are linear in it. This is exact for the direct path and blind to all others: it finds the parts that say the
answer, not those that looked it up, and a part may write what a later one erases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from excise.errors import ExciseError
from excise.facts import Fact
from excise.keys import consumed, write_matrices
from excise.lens import readout
from excise.model import Model
from excise.progress import bar
from excise.registry import localizer
from excise.scores import Localization
from excise.sites import Site
from localize.questions import Question, Table, at_columns, by_length, columns, keys_at, questions, summary, token_rows

UNITS = ("embed", "attn", "mlp", "head", "neuron", "expert")
# How far the parts may lie from the logit difference, relative to the sizes summed, before they are no decomposition.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


@dataclass(frozen=True)
class Parts:
    """Logit differences taken apart, for n questions.

    scores: site -> [n], or [n, n_units] with a column per head or neuron. total: the differences, before any soft cap
    [n]; constant: what no component adds [n].
    """

    scores: dict[Site, Tensor]
    total: Tensor
    constant: Tensor


def head_parts(z: Tensor, w_o: Tensor, direction: Tensor, n_heads: int) -> Tensor:
    """(z_h W_O^h) . direction of every head, [n, n_heads]; z [n, n_heads * d_head], w_o [n_heads * d_head, d]."""
    return (z * (direction @ w_o.mT)).unflatten(-1, (n_heads, -1)).sum(-1)


def neuron_parts(keys: Tensor, w_out: Tensor, direction: Tensor) -> Tensor:
    """k_i (w_i . direction) of every neuron, [n, d_ff]; keys [n, d_ff], w_out [d_ff, d], direction [n, d]."""
    return keys * (direction @ w_out.mT)


def direct_parts(
    model: Model, asked: Sequence[Question], units: Sequence[str] = ("head", "mlp"), *, contrast: str = "foil"
) -> Parts:
    """The logit difference at the last token of questions of one length, by component, from one forward pass.

    embed + attn + mlp + constant is the total. head sums to attn, and neuron and expert to mlp, less their biases.
    Raises ExciseError when the parts do not add up, as in models that scale what a block adds.
    """
    n_layers, ids = model.n_layers, token_rows(model, asked)
    last = columns(asked, "last")
    names = ["blocks.0.hook_resid_pre", f"blocks.{n_layers - 1}.hook_resid_post"]
    names += [f"blocks.{i}.{hook}" for i in range(n_layers) for hook in ("hook_attn_out", "hook_mlp_out")]
    if "head" in units:
        names += [f"blocks.{i}.attn.hook_z" for i in range(n_layers)]
    keys: dict[str, Tensor] = {}
    with consumed(model, range(n_layers) if _written(model, units) else (), keys_at(keys, ids.shape, last)):
        seen = {name: x.double() for name, x in at_columns(model, ids, names, last).items()}
    end = seen[names[1]]
    answer, foil = (torch.tensor([getattr(q, key) for q in asked], device=end.device) for key in ("answer", "foil"))
    direction, constant = readout(model, end, answer, foil if contrast == "foil" else None)
    whole = {Site(p, "last"): (seen[p] * direction).sum(-1) for p in names if not p.endswith(("hook_z", "resid_post"))}
    total = (end * direction).sum(-1) + constant
    gap = (sum(whole.values()) + constant - total).abs().max()
    size = max(float(x.abs().max()) for x in (*whole.values(), constant, total))
    if gap > TOLERANCE.get(model.dtype, 5e-2) * size:
        raise ExciseError(
            f"{model.name}: the last residual state is not the sum of embedding, attention and MLP outputs "
            f"(off by {float(gap / size):.0e}); direct contributions do not apply"
        )
    scores = {site: x for site, x in whole.items() if _unit(site) in units}
    return Parts({**scores, **_inner(model, units, seen, keys, direction)}, total, constant)


def _unit(site: Site) -> str:
    hooks = {"attn_out": "attn", "mlp_out": "mlp", "resid_pre": "embed"}
    return next(unit for hook, unit in hooks.items() if site.point.endswith(hook))


def _inner(
    model: Model, units: Sequence[str], seen: dict[str, Tensor], keys: dict[str, Tensor], direction: Tensor
) -> dict[Site, Tensor]:
    """Heads, experts and neurons."""
    scores: dict[Site, Tensor] = {}
    for layer in range(model.n_layers if "head" in units else 0):
        z, w_o = f"blocks.{layer}.attn.hook_z", model.weight(f"blocks.{layer}.attn.W_O").detach().double()
        scores[Site(z, "last")] = head_parts(seen[z], w_o, direction, model.names.n_heads)
    for name in _written(model, units):
        w_out = model.weight(name).detach().double()
        reached = keys[name].double() if name in keys else direction.new_zeros(len(direction), len(w_out))
        parts = neuron_parts(reached, w_out, direction)
        if "neuron" in units:
            scores[Site(name.replace("W_out", "hook_post"), "last")] = parts
        if "expert" in units and "expert" in name:
            scores[Site(name)] = parts.sum(-1)
    return scores


def _written(model: Model, units: Sequence[str]) -> list[str]:
    """The matrices that neurons or experts write through. Raises ExciseError where they do not apply."""
    if "expert" in units and not model.names.n_experts:
        raise ExciseError(f"{model.name} has no experts: leave out the unit expert")
    asked = {"neuron", "expert"} & set(units)
    return [name for i in range(model.n_layers) for name in write_matrices(model, i)] if asked else []


def _refuse(model: Model, units: Sequence[str], contrast: str) -> None:
    unknown = [u for u in units if u not in UNITS]
    if unknown or not units:
        raise ValueError(f"no unit {', '.join(unknown) or 'given'}; units are {', '.join(UNITS)}")
    if contrast not in ("foil", "mean"):
        raise ValueError(f"no contrast {contrast!r}; contrasts are foil, mean")
    _written(model, units)
    if "head" in units:
        refuse_heads(model)


def refuse_heads(model: Model) -> None:
    """Raise ExciseError where attention outputs pass a norm before they join the residual stream (Gemma-2/3, OLMo-2)."""
    if "norm" in model.names.tap("blocks.0.hook_attn_out").module.rsplit(".", 1)[-1]:
        raise ExciseError(
            f"{model.name}: attention outputs pass a norm before they join the residual stream, so a head alone adds "
            "nothing of its own; leave out the unit head"
        )


@localizer
def direct_logit(
    model: Model,
    facts: Sequence[Fact],
    *,
    units: Sequence[str] = ("head", "mlp"),
    contrast: Literal["foil", "mean"] = "foil",
    form: str = "statement",
    known_only: bool = True,
    batch_tokens: int | None = None,
) -> Localization:
    """What each component writes towards the answer at the last token: its share of the logit difference, in logits.

    Contributions of embed, attn and mlp and a constant (recipe) add up to answer minus foil; head, neuron and expert
    split attn and mlp. Direct paths only; a part may write what a later one erases.
    units: what is scored, of embed, attn, mlp, head, neuron, expert.
    contrast: what the answer is compared with, its foil or the mean of all tokens.
    form: which of a fact's prompts is used; the direct one where it has none of this form.
    known_only: leave out facts whose answer the model does not give.
    batch_tokens: tokens in one batch; changes speed and memory only.
    """
    _refuse(model, units, contrast)
    asked, skipped = questions(model, facts, forms=(form,), known_only=known_only)
    table = Table([f.id for f in facts])
    totals = []
    for index in bar(by_length(asked, batch_tokens or model.batch_tokens), what="direct logit attribution"):
        batch = [asked[i] for i in index]
        parts = direct_parts(model, batch, units, contrast=contrast)
        table.add([q.fact_id for q in batch], parts.scores)
        totals += torch.stack([parts.total, parts.constant], 1).tolist()
    ends = np.mean(totals, axis=0).tolist() if totals else [None, None]
    recipe = {**summary(model, facts, skipped), "logit_diff": ends[0], "constant": ends[1]}
    return table.localization(recipe)
