"""Sites: where in a network something is read, scored or changed.

A site is a TransformerLens name, an optional position rule and an optional unit, with one text form used in files, on
axes and on the command line: `blocks.17.mlp.hook_post@subject_last#1532`, `blocks.3.mlp.experts.5.W_out`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

POSITION_RULES = (
    "all",
    "after_bos",
    "prefix",
    "subject",
    "subject_first",
    "subject_middle",
    "subject_last",
    "after_subject",
    "further",
    "last",
)
# The classes that causal tracing averages over (ROME, arXiv 2202.05262, figure 2), in reading order.
POSITION_CLASSES = ("prefix", "subject_first", "subject_middle", "subject_last", "after_subject", "further", "last")
# Only these can be decided without knowing the fact, so only these may stand in an edit.
DEPLOYABLE_RULES = ("all", "after_bos")

_FORM = re.compile(r"^(?P<point>[A-Za-z_][\w.]*)(@(?P<position>[a-z_]+|\d+))?(#(?P<unit>\d+)(:(?P<column>\d+))?)?$")
_LAYER = re.compile(r"(?:^|\.)blocks\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, order=True)
class Site:
    """A place in the network.

    point: TransformerLens name of an activation (`hook_...`) or of a matrix (`W_...`).
    position: rule that says which tokens count, or a token index; None for matrices.
    unit: neuron, head or feature; on `W_out` it is the row of the same neuron, on `W_O` the head of the same number.
    column: makes a site of one single weight: row `unit` and this column of the matrix [d_in, d_out], `W_out#12:7`.
    """

    point: str
    position: str | int | None = None
    unit: int | None = None
    column: int | None = None

    def __post_init__(self) -> None:
        if "@" in self.point or "#" in self.point:
            raise ValueError(f"{self.point!r} is more than a point: Site.parse({self.point!r}) reads a site's text")
        if isinstance(self.position, str) and self.position not in POSITION_RULES:
            raise ValueError(
                f"site {self.point}: no position rule {self.position!r}; rules: {', '.join(POSITION_RULES)}"
            )

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `text` names; raises ValueError when it is not of the form point[@position][#unit]."""
        match = _FORM.match(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a site; write point[@position][#unit], e.g. blocks.3.mlp.hook_post@subject_last#7"
            )
        rule: str | None = match["position"]
        position = int(rule) if rule is not None and rule.isdigit() else rule
        unit, column = (None if match[key] is None else int(match[key]) for key in ("unit", "column"))
        return cls(match["point"], position, unit, column)

    def __str__(self) -> str:
        text = self.point
        if self.position is not None:
            text += f"@{self.position}"
        text = text if self.unit is None else f"{text}#{self.unit}"
        return text if self.column is None else f"{text}:{self.column}"

    @property
    def is_weight(self) -> bool:
        """True for a matrix, False for an activation."""
        return self.point.rsplit(".", 1)[-1].startswith("W_")

    @property
    def layer(self) -> int | None:
        """Block number; None outside the blocks."""
        match = _LAYER.search(self.point)
        return int(match[1]) if match else None

    @property
    def expert(self) -> int | None:
        """Expert number; None when the point belongs to no expert."""
        match = _EXPERT.search(self.point)
        return int(match[1]) if match else None

    def at(self, position: str | int | None) -> Site:
        """The same point under another position rule."""
        return replace(self, position=position)


def position_mask(
    rule: str | int | None,
    lengths: Sequence[int],
    subjects: Sequence[tuple[int, int] | None],
    width: int,
    has_bos: Sequence[bool],
) -> torch.Tensor:
    """Boolean mask [batch, width] of the tokens that `rule` picks in right-padded rows.

    lengths: real tokens of each row; subjects: token span [start, end) of each row's subject, or None.
    Raises ValueError when the rule needs a subject and a row has none, or an index lies outside a row.
    """
    import torch  # here alone: to name a site must not load it

    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, (length, span, bos) in enumerate(zip(lengths, subjects, has_bos, strict=True)):
        start, end = _span(rule, length, span, bos, row)
        mask[row, start:end] = True
    return mask


def _span(rule: str | int | None, length: int, subject: tuple[int, int] | None, bos: bool, row: int) -> tuple[int, int]:
    match rule:
        case None | "all":
            return 0, length
        case "after_bos":
            return int(bos), length
        case "last":
            return length - 1, length
        case int():
            if not -length <= rule < length:
                raise ValueError(f"prompt {row} has {length} tokens: no position {rule}")
            return rule % length, rule % length + 1
    if subject is None:
        raise ValueError(f"prompt {row} names no subject: position rule {rule!r} needs one")
    start, end = subject
    return {
        "prefix": (int(bos), start),
        "subject": (start, end),
        "subject_first": (start, start + 1),
        "subject_middle": (start + 1, end - 1),
        "subject_last": (end - 1, end),
        "after_subject": (end, end + 1),
        "further": (end + 1, length - 1),
    }[str(rule)]


def position_class(position: int, length: int, subject: tuple[int, int]) -> str:
    """The class of one token in a prompt; the subject wins over `last`, the end of the name over its start."""
    start, end = subject
    if position == end - 1:
        return "subject_last"
    if position == start:
        return "subject_first"
    if start < position < end:
        return "subject_middle"
    if position == length - 1:
        return "last"
    if position < start:
        return "prefix"
    return "after_subject" if position == end else "further"
