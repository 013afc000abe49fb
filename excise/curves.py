"""Figures of attacks and of the bargain: what each attack draws, what comes back over its steps, forgotten against lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from excise.comparison import arm_role
from excise.figures import arm_style, drawn, picture, quiet, short
from excise.overview import KEPT, Line
from excise.recovery import Curve
from excise.scores import Results, Row, Score
from excise.statistics import aggregate


@drawn
def plot_attacks(lines: Sequence[Line], arms: Sequence[str]) -> Figure:
    """One line per attack: the share of the facts to forget that it draws from edited arms and from the oracle, with 95 %
    intervals; the attack that draws most beyond the oracle on top.
    """
    shown = [a for a in arms if arm_role(a) in ("edited", "oracle")]
    style = arm_style(arms)
    figure = picture(5.2, 1.1 + 0.27 * max(1, len(lines)))
    axes = figure.subplots()
    for i, arm in enumerate(shown):
        there = [(y, line.rows[arm]) for y, line in enumerate(lines) if arm in line.rows]
        y = [y + 0.26 * (i - (len(shown) - 1) / 2) for y, _ in there]
        _dots(axes, [r for _, r in there], y, style[arm], arm)
    axes.set_yticks(
        range(len(lines)), [short(line.name.removesuffix(": any"), 38) for line in lines], fontsize=9, parse_math=False
    )
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("share of facts drawn")
    return _finished(figure, axes, "x", len(shown))


@drawn
def plot_steps(curve: Curve, arms: Sequence[str]) -> Figure:
    """How much an attack draws after so many steps, one line and 95 % band per arm."""
    figure = picture(3.7, 2.8)
    axes = figure.subplots()
    for arm, style in arm_style(arms).items():
        points = curve.rows.get(arm, ())
        if points:
            x = [step for step, _ in points]
            line = {k: v for k, v in style.items() if k != "hatch"}
            if arm_role(arm) in ("edited", "oracle"):
                band = [r.low for _, r in points], [r.high for _, r in points]
                axes.fill_between(x, *band, color=style["color"], alpha=0.18, linewidth=0)
            axes.plot(x, [r.value for _, r in points], label=short(arm, 20), markersize=4, linewidth=1.8, **line)
    axes.set_ylim(-0.03, 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("steps")
    axes.set_title(short(f"{curve.evaluation.replace('_', ' ')}: {curve.measure}", 60), parse_math=False)
    return _finished(figure, axes, "y", 4)


@drawn
def plot_bargain(results: Results) -> Figure:
    """What is still said of the facts to forget against what is lost of those to keep, one dot with 95 % intervals per arm.

    Bottom left is the aim.
    """
    lost = _recall(results, KEPT, lambda value: 1.0 - value)
    said = _recall(results, ("forget",), lambda value: value)
    figure = picture(3.7, 2.8)
    axes = figure.subplots()
    for size, (arm, style) in zip(range(11, 0, -2), arm_style(results.arms).items(), strict=False):
        if arm in lost and arm in said:
            x, y = lost[arm], said[arm]
            error: dict[str, Any] = {"xerr": _error([x]), "yerr": _error([y])}
            # Ever smaller: arms often lie upon each other.
            dot: dict[str, Any] = {
                "fmt": style["marker"],
                "color": style["color"],
                "markersize": max(3, size),
                "capsize": 2,
            }
            axes.errorbar([x.value], [y.value], label=short(arm, 20), **dot, **error)
    axes.set_ylim(-0.04, 1.04)
    most = max((r.high for r in lost.values()), default=1.0)
    axes.set_xlim(-0.04 * max(0.1, most), min(1.04, 1.1 * max(0.1, most)))
    axes.set_xlabel("lost of what is to be kept")
    axes.set_ylabel("still said")
    axes.set_title("forgotten against lost", parse_math=False)
    return _finished(figure, axes, "both", 4)


def _recall(results: Results, groups: Sequence[str], turned: Any) -> dict[str, Row]:
    only: dict[tuple[str, str], tuple[Score, ...]] = {}
    for (arm, name), scores in results.scores.items():
        if name == "recall":
            only[arm, name] = tuple(
                Score(s.fact, s.subject, "", turned(s.value))
                for s in scores
                if s.group in groups and s.value is not None
            )
    return {r.arm: r for r in aggregate(Results(only, results.modes), by=("group",)) if r.n}


def _dots(axes: Any, rows: Sequence[Row], y: Sequence[float], style: Mapping[str, Any], arm: str) -> None:
    axes.errorbar(
        [r.value for r in rows], y, xerr=_error(rows), fmt=style["marker"], color=style["color"], label=short(arm, 20),
        markersize=5, capsize=2, elinewidth=1,
    )  # fmt: skip


def _error(rows: Sequence[Row]) -> np.ndarray:
    """Lengths of the two halves of the intervals, [2, n]; none where there is no interval."""
    found = np.array([[r.value - r.low, r.high - r.value] for r in rows]).reshape(-1, 2).T
    return np.maximum(0.0, np.nan_to_num(found))


def _finished(figure: Figure, axes: Any, grid: str, columns: int) -> Figure:
    quiet(axes, grid)
    figure.legend(
        loc="outside lower center", ncols=max(1, columns), frameon=False, fontsize=9, columnspacing=1, handletextpad=0.4
    )
    return figure
