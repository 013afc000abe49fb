"""What the tests of the command line share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from excise.actions import LowRank
from excise.edits import Change, Edit
from excise.model import load
from excise.sites import Site
from tiny import tiny_model

SITE = "blocks.1.mlp.W_out"


@dataclass(frozen=True)
class Said:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Stdout, which must be one JSON object."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def error(self) -> str:
        """The one error line; fails when there is a traceback or another number of them."""
        assert "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if line.startswith("excise: ")]
        assert len(lines) == 1, self.err
        return lines[0].removeprefix("excise: ")


Cli = Callable[..., Said]


def save_model(folder: Path, family: str = "llama", **options: int) -> Path:
    hf, tokenizer = tiny_model(family, **options)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def an_edit(folder: Path, path: Path, scale: float = 1.0) -> Path:
    model = load(str(folder))
    d_in, d_out = model.weight(SITE).shape
    left, right = torch.randn(d_in, 1) * scale, torch.randn(1, d_out)
    prints = {"tokenizer": model.tokenizer_fingerprint, SITE: model.matrix_fingerprint(SITE)}
    return Edit((Change(Site(SITE), LowRank(left, right)),), {"method": "by hand", "model": model.name}, prints).save(
        path
    )
