"""Scores: what a localizer found (`Localization`) and what evaluations measured (`Score`, `Results`).

Values only: drawing is `excise.plots`, intervals are `excise.statistics`, writing is `excise.files`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from excise.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from excise.fates import Fate
    from excise.statistics import Interval
    from excise.verdict import Verdict


@dataclass(frozen=True)
class TraceMap:
    """The layer x token map of one fact.

    values: one array [n_layers, n_tokens] per component ("resid", "mlp", "attn"): the metric after restoring that cell.
    low, high: the metric of the corrupted and of the clean run; `values - low` is the indirect effect.
    subject: token span [start, end).
    """

    fact_id: str
    tokens: tuple[str, ...]
    subject: tuple[int, int]
    values: dict[str, np.ndarray]
    low: float
    high: float

    def effect(self, component: str) -> np.ndarray:
        """Indirect effect [n_layers, n_tokens] of restoring each cell."""
        return self.values[component] - self.low


@dataclass(frozen=True, repr=False)
class Localization:
    """How responsible each site is for each fact.

    scores: [n_facts, n_sites], NaN where a site does not exist for a fact; larger is more responsible.
    directions: one direction per site [n_sites, d] (concept vectors, difference of means), or None.
    maps: layer x token maps behind the scores, for tracing methods.
    recipe: method, options, model, hash of the facts.
    """

    sites: tuple[Site, ...]
    scores: np.ndarray
    fact_ids: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)
    directions: np.ndarray | None = None
    maps: tuple[TraceMap, ...] = ()

    def __post_init__(self) -> None:
        if self.scores.shape != (len(self.fact_ids), len(self.sites)):
            raise ValueError(
                f"scores have shape {self.scores.shape}, but there are {len(self.fact_ids)} facts and {len(self.sites)} sites"
            )

    @classmethod
    def of(cls, sites: Iterable[Site | str], recipe: dict[str, Any] | None = None) -> Localization:
        """A hand-written localization: the given sites, equally responsible."""
        parsed = tuple(s if isinstance(s, Site) else Site.parse(s) for s in sites)
        return cls(parsed, np.ones((1, len(parsed))), ("by hand",), recipe or {"method": "by hand"})

    @property
    def average(self) -> np.ndarray:
        """Mean score of each site over the facts that have it, [n_sites]; NaN where none has."""
        present = ~np.isnan(self.scores)
        total = np.where(present, self.scores, 0.0).sum(0)
        count = present.sum(0)
        return np.divide(total, count, out=np.full(len(self.sites), np.nan), where=count > 0)

    def intervals(self, clusters: Sequence[Any] | None = None, *, seed: int = 0) -> list[Interval]:
        """Mean score of each site over the facts that have it, with its 95 % bootstrap interval; NaN where none has.

        clusters: one label per fact, such as its subject, where facts are not independent of each other.
        """
        from excise.statistics import bootstrap_mean

        groups = np.arange(len(self.fact_ids)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
        known = ~np.isnan(self.scores)
        columns = zip(self.scores.T, known.T, strict=True)
        return [bootstrap_mean(x[k], groups[k], counts=False, seed=seed) for x, k in columns]

    def top(self, k: int) -> Localization:
        """The k sites of highest mean score, best first."""
        order = np.argsort(-np.nan_to_num(self.average, nan=-np.inf), kind="stable")[:k]
        return self._take(order)

    def where(self, predicate: Callable[[Site], bool]) -> Localization:
        """The sites for which `predicate` holds, in order."""
        return self._take(np.array([i for i, s in enumerate(self.sites) if predicate(s)], dtype=int))

    def at(
        self, *, layer: int | None = None, position: str | int | None = None, component: str | None = None
    ) -> Localization:
        """The sites of one layer, position rule or component (part of the point's name)."""
        return self.where(
            lambda s: (
                (layer is None or s.layer == layer)
                and (position is None or s.position == position)
                and (component is None or component in s.point)
            )
        )

    def mean(self) -> Localization:
        """One row: the mean over facts."""
        return replace(self, scores=self.average[None], fact_ids=("mean",))

    def facts(self, ids: Sequence[str]) -> Localization:
        """The rows of the given facts; raises ValueError, with near ids, for one that is not there."""
        known = {fact: row for row, fact in enumerate(self.fact_ids)}
        for fact in ids:
            if fact not in known:
                near = difflib.get_close_matches(fact, known, n=3) or self.fact_ids[:3]
                raise ValueError(
                    f"no fact {fact!r} among the {len(known)} localized ones; did you mean {', '.join(near)}?"
                )
        rows = [known[fact] for fact in ids]
        return replace(
            self, scores=self.scores[rows], fact_ids=tuple(ids), maps=tuple(m for m in self.maps if m.fact_id in ids)
        )

    def layers(self) -> list[int]:
        """Layers of the sites, ascending, without repeats."""
        return sorted({s.layer for s in self.sites if s.layer is not None})

    def _take(self, index: np.ndarray) -> Localization:
        directions = None if self.directions is None else self.directions[index]
        return replace(
            self, sites=tuple(self.sites[i] for i in index), scores=self.scores[:, index], directions=directions
        )

    def to_frame(self) -> DataFrame:
        """A long pandas data frame: fact, site, point, layer, position, unit, score."""
        import pandas as pd

        rows = [
            (fact, str(s), s.point, s.layer, s.position, s.unit, float(self.scores[i, j]))
            for i, fact in enumerate(self.fact_ids)
            for j, s in enumerate(self.sites)
            if not np.isnan(self.scores[i, j])
        ]
        return pd.DataFrame(rows, columns=["fact", "site", "point", "layer", "position", "unit", "score"])

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file; `Localization.load` reads it back."""
        from excise.files import save_localization

        return save_localization(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Localization:
        """Read what `save` wrote."""
        from excise.files import load_localization

        return load_localization(path)

    def plot(self, fact: str | int | None = None) -> Figure:
        """The heat map of one fact (by id or index) or of the mean; a ranking when there is no map. A matplotlib figure."""
        from excise.plots import plot_localization

        return plot_localization(self, fact)

    def __repr__(self) -> str:
        best = self.top(3)
        named = ", ".join(f"{s} {v:.3f}" for s, v in zip(best.sites, best.average, strict=True))
        return f"Localization({self.recipe.get('method', '?')}: {len(self.fact_ids)} facts x {len(self.sites)} sites; top {named})"

    def _repr_html_(self) -> str:
        from excise.notebook import localization_view

        return localization_view(self)


@dataclass(frozen=True)
class Score:
    """One measured value.

    fact, subject, group: what it was measured on; `subject` is the cluster of the bootstrap.
    form, held_out: how it was asked. variant: a further key of the evaluation, e.g. a layer ("layer 3").
    value: None when it could not be measured; then `reason` says why.
    detail: free text for the per-fact page (the model's own words).
    """

    fact: str
    subject: str
    group: str
    value: float | None
    form: str = ""
    held_out: bool = False
    variant: str = ""
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the results table: an aggregate with its 95 % interval."""

    arm: str
    evaluation: str
    group: str
    form: str
    held_out: bool
    variant: str
    value: float
    low: float
    high: float
    n: int
    n_skipped: int = 0
    mode: str = ""


@dataclass(frozen=True, repr=False)
class Results:
    """Everything that was measured: scores per (arm, evaluation), and the table made of them.

    modes: how each arm holds its change: "weight", "hook" or "none".
    """

    scores: dict[tuple[str, str], tuple[Score, ...]]
    modes: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    # Tables that were made already, by seed and keys: `excise.statistics.aggregate` keeps them here.
    _tables: dict[Any, list[Row]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in order."""
        return list(dict.fromkeys(arm for arm, _ in self.scores))

    @property
    def evaluations(self) -> list[str]:
        """Names of the evaluations, in order."""
        return list(dict.fromkeys(name for _, name in self.scores))

    def table(self, *, seed: int = 0) -> list[Row]:
        """One row per arm, evaluation, group, form, split and variant, with cluster-bootstrap intervals."""
        from excise.statistics import aggregate

        return aggregate(self, seed=seed)

    def summary(self, *, seed: int = 0) -> list[Row]:
        """Numbers made of many scores, such as model utility, forget quality and privacy leakage, where measured."""
        from excise.aggregates import summary

        return summary(self, seed=seed)

    def value(self, arm: str, evaluation: str, **keys: Any) -> Row:
        """The one row that matches; raises KeyError naming the rows that exist when none or several do."""
        found = [
            r
            for r in self.table()
            if r.arm == arm and r.evaluation == evaluation and all(getattr(r, k) == v for k, v in keys.items())
        ]
        if len(found) != 1:
            raise KeyError(
                f"{len(found)} rows match arm={arm!r} evaluation={evaluation!r} {keys}; rows: {[(r.group, r.form, r.held_out, r.variant) for r in found]}"
            )
        return found[0]

    def __repr__(self) -> str:
        measured = sum(len(found) for found in self.scores.values())
        return f"Results({', '.join(self.arms)}: {', '.join(self.evaluations)}; {measured} scores)"

    def __add__(self, other: Results) -> Results:
        return Results({**self.scores, **other.scores}, {**self.modes, **other.modes}, {**self.recipe, **other.recipe})

    def to_frame(self) -> DataFrame:
        """The table as a pandas data frame."""
        import dataclasses

        import pandas as pd

        return pd.DataFrame([dataclasses.asdict(r) for r in self.table()])

    def plot(self) -> Figure:
        """Bars with intervals, arms side by side, one panel per evaluation. A matplotlib figure."""
        from excise.plots import plot_results

        return plot_results(self)

    def plot_forms(self, evaluation: str = "recall", *, group: str = "forget") -> Figure:
        """An evaluation form by form, trained and held-out wordings apart, arms side by side. A matplotlib figure."""
        from excise.plots import plot_before_after

        return plot_before_after(self, evaluation, group=group)

    def plot_layers(self, evaluation: str, *, measure: str = "", group: str = "forget") -> Figure:
        """An evaluation layer by layer, one line and 95 % band per arm. A matplotlib figure.

        measure: one of its variants by layer; the first one when empty.
        """
        from excise.plots import plot_layers

        return plot_layers(self, evaluation, measure=measure, group=group)

    def verdict(self, recipe: dict[str, Any] | None = None) -> Verdict:
        """What the intervals allow one to say: a headline, and an answer to each question of an audit.

        recipe: may name the arms under "roles", a mapping from before, edited, control, oracle to arm names.
        """
        from excise.verdict import verdict

        return verdict(self, recipe)

    def fates(self, recipe: dict[str, Any] | None = None) -> list[Fate]:
        """What became of every fact that was asked for, with evidence, worst first; empty without `recall` before and
        after.
        """
        from excise.fates import fates

        return fates(self, recipe)

    def _repr_html_(self) -> str:
        from excise.notebook import results_view

        return results_view(self)
