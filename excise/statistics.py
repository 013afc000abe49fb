"""The results table: scores in, rows with cluster-bootstrap intervals out. It gathers all statistics under one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from excise.intervals import Interval, Labels, Values, auc, interval_of, share, wilson
from excise.resampling import (
    RESAMPLES,
    bootstrap_auc,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    resampled_aucs,
    resampled_ks,
    resampled_means,
    resampled_together,
)
from excise.significance import (
    Verdict,
    above_chance,
    benjamini_hochberg,
    equivalence,
    holm,
    ks,
    mcnemar,
    permutation,
    sign_flip,
    trend,
    wasserstein,
)

if TYPE_CHECKING:
    from excise.scores import Results, Row, Score

__all__ = [
    "RESAMPLES",
    "Interval",
    "Labels",
    "Values",
    "Verdict",
    "above_chance",
    "aggregate",
    "auc",
    "benjamini_hochberg",
    "bootstrap_auc",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "equivalence",
    "holm",
    "interval_of",
    "ks",
    "mcnemar",
    "permutation",
    "resampled_aucs",
    "resampled_ks",
    "resampled_means",
    "resampled_together",
    "share",
    "sign_flip",
    "trend",
    "wasserstein",
    "wilson",
]

KEYS = ("group", "form", "held_out", "variant")


@dataclass(frozen=True)
class _Cell:
    """The scores of one row of the table."""

    key: tuple[Any, ...]
    scores: tuple[Score, ...]


def aggregate(results: Results, *, seed: int = 0, by: Sequence[str] = KEYS) -> list[Row]:
    """One `Row` per arm, evaluation and distinct combination of `by`, in order of first appearance.

    by: the keys that tell rows apart, out of group, form, held_out, variant; a key left out is pooled over and stays
    empty in the row. Scores without a value are counted in `n_skipped`. Clusters are subjects (the fact, when it
    names none).
    """
    key = (seed, tuple(by))
    # Thousands of resamples a row, and tables, figures and sentences ask for the same rows: made once.
    if key not in results._tables:
        results._tables[key] = _aggregated(results, seed, by)
    return list(results._tables[key])


def _aggregated(results: Results, seed: int, by: Sequence[str]) -> list[Row]:
    from excise.scores import Row

    quantities = _quantities(results)
    rows = []
    for (arm, evaluation), scores in results.scores.items():
        for cell in _cells(scores, by):
            measured = [s for s in cell.scores if s.value is not None and np.isfinite(s.value)]
            values, clusters = [float(s.value or 0.0) for s in measured], [s.subject or s.fact for s in measured]
            counts = not any((evaluation, s.variant) in quantities for s in measured)
            interval = bootstrap_mean(values, clusters, counts=counts, seed=seed)
            named = dict.fromkeys(KEYS, "") | {"held_out": False} | dict(zip(by, cell.key, strict=True))
            skipped = len(cell.scores) - len(measured)
            mode = results.modes.get(arm, "")
            rows.append(
                Row(arm, evaluation, **named, **interval._asdict(), n=len(measured), n_skipped=skipped, mode=mode)
            )
    return rows


def _quantities(results: Results) -> set[tuple[str, str]]:
    """Evaluations and variants that measure a quantity: some arm has a value other than 0 and 1."""
    return {
        (evaluation, s.variant)
        for (_, evaluation), scores in results.scores.items()
        for s in scores
        if s.value is not None and s.value not in (0.0, 1.0)
    }


def _cells(scores: Sequence[Score], by: Sequence[str]) -> list[_Cell]:
    found: dict[tuple[Any, ...], list[Score]] = {}
    for score in scores:
        found.setdefault(tuple(getattr(score, k) for k in by), []).append(score)
    return [_Cell(key, tuple(group)) for key, group in found.items()]
