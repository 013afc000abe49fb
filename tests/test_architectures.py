"""Doctor, localize, edit and measure on each of the eighteen architectures; the page of all methods is docs/architectures.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.architectures import EDITORS, examined
from tiny import FAMILIES, MOE_FAMILIES

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
# Their MLPs write through a norm, so that no matrix writes to the residual stream and ROCR says that it does not apply.
NORMED = ("gemma2", "gemma3", "olmo2")


@pytest.mark.parametrize("family", FAMILIES)
def test_find_edit_measure(family: str) -> None:
    row = examined(family, quick=True)
    assert (row.chain.state, row.editor) == ("works", EDITORS[family in NORMED]), row.chain
    assert ("passes a norm" in row.chain.reason) == (family in NORMED)
    # Norms, biases and what belongs to no matrix are out of an edit's reach, and are little.
    assert row.report["reachable"] > 0.95 and row.report["problems"] == []
    assert bool(row.report["experts"]) == (family in MOE_FAMILIES)
    shown = re.search(rf"^\| {family} \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert shown and f"{row.report['reachable']:.1%}" in shown[0] and "FAILS" not in shown[0]
