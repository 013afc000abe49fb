"""Key Space Detection: what falls into the region of key space that a skill or a name occupies is declined.

Nothing is erased: the edit is a detector and a refusal. What the box does not hold is answered with the very same bits.
A detector of how requests look can be passed by one that looks different, such as an exercise behind another sentence.

Method: Li, Sun, Weng, "Effective Skill Unlearning through Intervention and Abstention", NAACL 2025, arXiv 2503.21730.
Beyond it: a threshold calibrated on retain prompts to a stated false-positive rate (instead of a factor tuned per
task), the block by measured detection (instead of the last), a linear read-out beside the box, one region per name,
every token judged, batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from excise.actions import Abstain
from excise.checks import whole_fingerprints
from excise.edits import Change, Edit
from excise.encoding import encode_row
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.keyspace import detector
from excise.model import Model
from excise.registry import editor
from excise.requests import thin
from excise.scores import Localization
from excise.sites import Site


@editor
def key_space(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    rate: float = 0.02,
    statistic: Literal["linear", "count", "extent"] = "linear",
    point: str = "mlp.hook_in",
    candidates: int = 8,
    refusal: str = "I do not know.",
    limit: int = 256,
) -> Edit:
    """An edit under which whatever lands among the forget prompts in key space is answered by a refusal.

    rate: share of retain prompts of any kind that may be declined.
    statistic: "linear", "count" (enough coordinates inside a box) or "extent" (all of them, the paper's box), see
        excise.keyspace.detector.
    point: activation to look at inside a block; what enters its MLP holds all that makes its keys, also where each
        expert has keys of its own. The paper looks at mlp.hook_post.
    candidates: how many blocks from `where` (without it, spread over the model) are compared.
    refusal: what is answered instead.
    limit: prompts read of each region and of each kind of retain fact.

    Raises ExciseError where there is nothing to fit or to calibrate on, and where forget and retain cannot be told apart.
    """
    layers = (where.layers() if where is not None else []) or list(range(model.n_layers))
    points = [f"blocks.{i}.{point}" for i in thin(layers, candidates)]
    found = detector(model, forget, retain, points, rate=rate, statistic=statistic, limit=limit)
    change = Change(Site("unembed.hook_out"), Abstain(refusal_ids(model, refusal)), found.gate)
    return Edit((change,), {"model": model.name, "detector": found.report}, whole_fingerprints(model))


def refusal_ids(model: Model, refusal: str) -> torch.Tensor:
    """Token ids [n] of a refusal as it stands after a prompt, ended by EOS where the tokenizer has one."""
    if not refusal.strip():
        raise ExciseError("an empty refusal says nothing; give a sentence")
    row = encode_row(model.tokenizer, Prompt("?", refusal, chat=True), answer=True)
    end = model.tokenizer.eos_token_id
    return torch.tensor(row.ids[row.start :] + ([] if end is None else [end]))
