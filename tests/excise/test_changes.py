"""Changes between arms: paired, by subject, corrected for how many there are."""

from __future__ import annotations

import numpy as np
import pytest

from excise.changes import changes, clearly_best
from excise.scores import Results, Row, Score


def _scores(shift: dict[str, float], seed: int = 0) -> tuple[Score, ...]:
    rng = np.random.default_rng(seed)
    base = {(v, i): rng.normal() for v in ("moved", "a", "b", "c") for i in range(20)}
    noise = np.random.default_rng(len(shift))
    return tuple(
        Score(
            f"f{i}",
            f"s{i % 10}",
            "forget",
            x + shift.get(v, 0.0) + (0.05 * noise.normal() if shift else 0.0),
            variant=v,
        )
        for (v, i), x in base.items()
    )


def test_what_moved_is_found_and_what_did_not_is_not() -> None:
    results = Results({("before", "loss"): _scores({}), ("edited", "loss"): _scores({"moved": 1.0})})
    found = {c.variant: c for c in changes(results, "edited", "before")}
    moved = found["moved"]
    assert moved.low < 1.0 < moved.high and (moved.n, moved.subjects) == (20, 10)
    assert moved.p == pytest.approx(2 / 2**10) and moved.adjusted == pytest.approx(4 * moved.p)  # exact, four looked at
    assert all(found[v].adjusted > 0.05 for v in "abc")
    explored = {c.variant: c.adjusted for c in changes(results, "edited", "before", correction="bh")}
    assert all(explored[v] <= found[v].adjusted for v in found)


def test_nothing_changed_is_nothing_changed() -> None:
    results = Results({("before", "loss"): _scores({}), ("again", "loss"): _scores({})})
    assert {(c.value, c.low, c.high, c.adjusted) for c in changes(results, "again", "before")} == {(0.0, 0.0, 0.0, 1.0)}
    assert changes(results, "again", "nobody") == []


def _row(value: float, half: float) -> Row:
    return Row("a", "recall", "forget", "", False, "", value, value - half, value + half, n=9)


def test_bold_is_for_intervals_that_meet_no_other() -> None:
    low, high = _row(0.2, 0.1), _row(0.6, 0.1)
    assert clearly_best([low, high], higher=True) == high and clearly_best([low, high], higher=False) == low
    assert clearly_best([low, _row(0.35, 0.1)], higher=True) is None
    assert clearly_best([low], higher=True) is None
    assert clearly_best([low, _row(float("nan"), 0.1)], higher=True) is None
