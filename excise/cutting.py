"""Cutting names: a redirection written into the matrices of a block, while all that has to stay is held against it.

Which block is best, and what is kept for later requests, is the editor's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from excise.apply import applied
from excise.checks import fingerprints
from excise.edits import Edit
from excise.facts import Prompt
from excise.keys import read_keys
from excise.mentions import Mention, met_in, sharing
from excise.model import Model
from excise.redirection import Redirection, entanglement, name_aware
from excise.solve import Metric, Solution, compress, solve_edit

# Mentions of names to keep that the covariance is told of, and that are asked how an edit would move them.
KNOWN, ASKED = 1024, 128
# Relative ridge of the covariance: enough to invert it when text is short.
FLOOR = 1e-3


@dataclass(eq=False)
class Cuts:
    """A redirection with all that limits it; edits of any block follow.

    others: mentions of names to keep; text: what is ordinary; strangers: made-up name-sharers, one list per kind.
    layers: how many consecutive blocks share the change. protect: how many names that share a word with a forget name are
    held fixed: as many of `others`, and as many that `text` speaks of. guard: weight of either sort of names against text
    in the metric; budget: tokens of text that it is made from. mode, ridge: see `excise.solve.solve_edit`.
    """

    model: Model
    redirection: Redirection
    others: list[Mention]
    text: list[Any]
    strangers: list[list[Prompt]]
    layers: int
    protect: int
    guard: float
    budget: int
    mode: str
    ridge: float
    _metrics: dict[int, dict[str, Metric]] = field(default_factory=dict, init=False)
    _edits: dict[int, Edit] = field(default_factory=dict, init=False)

    def near(self, names: Sequence[Mention]) -> list[Mention]:
        """The name-sharers of some names that are held fixed when these are cut."""
        return [*sharing(self.others, names, limit=self.protect), *met_in(self.text, names, limit=self.protect)]

    @cached_property
    def guarded(self) -> list[Mention]:
        """What is held fixed when all names are cut."""
        return self.near(self.redirection.mentions)

    def metrics(self, block: int) -> dict[str, Metric]:
        """What it costs to move text, made-up names and names to keep, per matrix; of `layers` blocks at a time."""
        if block not in self._metrics:
            if len(self._metrics) >= self.layers:
                self._metrics.pop(next(iter(self._metrics)))
            # Made-up names stand for people whom nobody listed; real ones have keys that made-up ones do not have.
            real = [m.prompt for m in self.others[:: max(1, len(self.others) // KNOWN)]]
            self._metrics[block] = self._aware(block, [*self.strangers, real])
        return self._metrics[block]

    def _aware(self, block: int, names: Sequence[Sequence[Prompt]]) -> dict[str, Metric]:
        return name_aware(self.model, block, self.text, names, budget=self.budget, weight=self.guard, ridge=FLOOR)

    def entanglement(self, block: int) -> float:
        """How much an edit of this block would move the name-sharers if they were not held fixed."""
        # Under a metric that was not told of these names: that is how a name that nobody listed would fare.
        judged = self.guarded or self.others
        judged = judged[:: max(1, len(judged) // ASKED)]
        self._metrics.clear()  # the statistics of one block at a time
        return entanglement(self.model, self.redirection.mentions, judged, block, self._aware(block, self.strangers))

    def edit(self, last: int) -> Edit:
        """The edit of the blocks up to `last`, each solved with the earlier ones' changes in force; made once."""
        if last not in self._edits:
            edit, reports = Edit((), fingerprints=fingerprints(self.model)), []
            for block in range(last - self.layers + 1, last + 1):
                solution, wanted = self._solved(block, last, edit)
                changes = edit.changes + solution.changes(idle=not wanted)
                edit = Edit(changes, fingerprints=fingerprints(self.model, changes))
                reports.append({"block": block, **solution.report, "leak max": solution.worst_leak})
            self._edits[last] = replace(edit, recipe={"solution": reports})
        return self._edits[last]

    def _solved(self, block: int, last: int, so_far: Edit) -> tuple[Solution, bool]:
        """What a block writes of the gap that the blocks before it leave open, in equal parts; and whether there is any."""
        point = f"blocks.{last}.hook_resid_post"
        targets, metrics = self.redirection.targets(self.model, point), self.metrics(block)
        with applied(self.model, so_far):
            keys, states = read_keys(self.model, self.redirection.prompts, [block], points=[point])
            kept = read_keys(self.model, [m.prompt for m in self.guarded], [block])[0][block] if self.guarded else {}
        gap = (targets - states[point]) / (last - block + 1)
        parts = {name: k for name, k in keys[block].items() if name in metrics}
        walls = {name: kept.get(name, torch.zeros(len(self.guarded), k.shape[1])) for name, k in parts.items()}
        protect = thinned(walls) if self.guarded else None
        return solve_edit(parts, gap, metrics, protect=protect, mode=self.mode, ridge=self.ridge), bool(gap.any())


def thinned(walls: dict[str, Tensor]) -> dict[str, Tensor]:
    """Protected columns with near-copies merged, jointly over the matrices."""
    names = list(walls)
    joint = compress(torch.cat([walls[n] for n in names], dim=1), tolerance=1e-3)
    return dict(zip(names, joint.split([walls[n].shape[1] for n in names], dim=1), strict=True))
