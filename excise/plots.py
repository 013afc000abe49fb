"""Figures of results, and every other figure under one name. Import this module only where something is drawn.

Arms differ in colour, marker, line and hatch, so that a figure suits grey paper and colour-blind readers too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from excise.comparison import rows_of
from excise.curves import plot_attacks, plot_bargain, plot_steps
from excise.figures import (
    BLUE,
    GREEN,
    GREY,
    INK,
    arm_style,
    drawn,
    figure_png,
    figure_svg,
    picture,
    quiet,
    save_figure,
    short,
)
from excise.maps import map_figures, mean_map, plot_localization, plot_ranking
from excise.overview import LAYER
from excise.scores import Results, Row
from excise.statistics import aggregate
from excise.unit_maps import plot_units, unit_figures

__all__ = [
    "arm_style",
    "bar_figure",
    "figure_png",
    "figure_svg",
    "layer_measures",
    "map_figures",
    "mean_map",
    "plot_attacks",
    "plot_bargain",
    "plot_before_after",
    "plot_layers",
    "plot_localization",
    "plot_ranking",
    "plot_results",
    "plot_steps",
    "plot_tradeoff",
    "plot_units",
    "result_panels",
    "save_figure",
    "unit_figures",
]


@drawn
def plot_results(results: Results) -> Figure:
    """Bars with 95 % intervals: one panel per measure, groups of facts across, arms side by side."""
    panels = result_panels(results)
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = picture(3.9 * columns, 2.7 * lines + 0.4)
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, rows) in zip(grid, panels.items(), strict=False):
        _draw_bars(axes, title, rows, results.arms)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    if panels:
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), frameon=False)
    return figure


@drawn
def bar_figure(results: Results, title: str, rows: Sequence[Row]) -> Figure:
    """One panel of `plot_results` as a figure of its own."""
    figure = picture(3.7, 2.8)
    axes = figure.subplots()
    _draw_bars(axes, title, rows, results.arms)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def result_panels(results: Results) -> dict[str, list[Row]]:
    """Rows pooled over forms, by evaluation and variant; single layers and what could not be measured are left out."""
    panels: dict[str, list[Row]] = {}
    for row in aggregate(results, by=("group", "variant")):
        if row.n and not LAYER.match(row.variant):
            panels.setdefault(f"{row.evaluation}: {row.variant}" if row.variant else row.evaluation, []).append(row)
    return panels


def layer_measures(results: Results, *, group: str = "forget") -> list[tuple[str, str]]:
    """Pairs (evaluation, measure) that were measured layer by layer, in order."""
    found: dict[tuple[str, str], None] = {}
    for (_, evaluation), scores in results.scores.items():
        for s in scores:
            match = LAYER.match(s.variant) if s.group == group and s.value is not None else None
            if match:
                found[evaluation, match["measure"] or ""] = None
    return list(found)


@drawn
def plot_layers(results: Results, evaluation: str, *, measure: str = "", group: str = "forget") -> Figure:
    """A measure layer by layer, one line and 95 % band per arm.

    measure: the part of the variant before ", layer i"; the first one when empty.
    """
    found = [
        (LAYER.match(r.variant), r)
        for r in aggregate(results, by=("group", "variant"))
        if r.evaluation == evaluation and r.group == group
    ]
    layered = [(m["measure"] or "", int(m["layer"]), r) for m, r in found if m and r.n]
    names = list(dict.fromkeys(name for name, *_ in layered))
    if not layered or (measure and measure not in names):
        raise ValueError(
            f"{evaluation} has no measure {measure!r} by layer on {group} facts; there are {', '.join(names) or 'none'}"
        )
    measure = measure or names[0]
    figure = picture(3.7, 2.8)
    axes = figure.subplots()
    for arm, style in arm_style(results.arms).items():
        rows = sorted(
            ((layer, r) for name, layer, r in layered if name == measure and r.arm == arm), key=lambda x: x[0]
        )
        if rows:
            x = [layer for layer, _ in rows]
            axes.fill_between(
                x, [r.low for _, r in rows], [r.high for _, r in rows], color=style["color"], alpha=0.18, linewidth=0
            )
            line = {k: v for k, v in style.items() if k != "hatch"}
            axes.plot(x, [r.value for _, r in rows], label=short(arm, 20), markersize=4, linewidth=1.8, **line)
    axes.set_xlabel("layer")
    axes.set_title(short(f"{evaluation.replace('_', ' ')}: {measure} ({group} facts)", 60), parse_math=False)
    if all(0 <= r.value <= 1 for name, _, r in layered if name == measure):
        axes.set_ylim(-0.03, 1.03)
    quiet(axes)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, columnspacing=1, handletextpad=0.4)
    return figure


@drawn
def plot_before_after(results: Results, evaluation: str = "recall", *, group: str = "forget") -> Figure:
    """One line per form: where each arm stands, with 95 % intervals; held-out prompts apart."""
    rows = rows_of(results, evaluation, group, by=("group", "form", "held_out"))
    forms = list(dict.fromkeys((r.form, r.held_out) for r in rows))
    figure = picture(4.6, 1.3 + 0.5 * max(1, len(forms)))
    axes = figure.subplots()
    style = arm_style(results.arms)
    for i, arm in enumerate(results.arms):
        mine = {(r.form, r.held_out): r for r in rows if r.arm == arm}
        y = [forms.index(key) + 0.16 * (i - (len(results.arms) - 1) / 2) for key in mine]
        values = np.array([[r.value, r.low, r.high] for r in mine.values()]).reshape(-1, 3).T
        errors = np.maximum(0, [values[0] - values[1], values[2] - values[0]])
        axes.errorbar(
            values[0],
            y,
            xerr=errors,
            fmt=style[arm]["marker"],
            color=style[arm]["color"],
            label=short(arm, 20),
            markersize=6,
            capsize=2,
        )
    axes.set_yticks(
        range(len(forms)), [f"{form}{', held out' if held_out else ''}" for form, held_out in forms], parse_math=False
    )
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_title(short(f"{evaluation} on {group} facts"), parse_math=False)
    quiet(axes, "x")
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, columnspacing=1, handletextpad=0.4)
    return figure


@drawn
def plot_tradeoff(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """What is still said against what others have lost, one dot a try; larger dots leave more inside.

    trials: mappings with "name", "forget", "damage", "residual", "front" and "chosen", as in search.json.
    """
    made = [t for t in trials if t.get("forget") is not None]
    figure = picture(4.6, 3.4)
    axes = figure.subplots()
    sorts: list[tuple[str, str, str, Callable[[Mapping[str, Any]], bool]]] = [
        ("beaten by others", GREY, "o", lambda t: not t["front"]),
        ("not beaten", BLUE, "o", lambda t: t["front"] and not t["chosen"]),
        ("chosen", GREEN, "D", lambda t: t["chosen"]),
    ]
    for label, colour, marker, mine in sorts:
        dots = [t for t in made if mine(t)]
        if dots:
            sizes = [20 + 90 * float(t["residual"] or 0.0) for t in dots]
            axes.scatter(
                [t["damage"] for t in dots], [t["forget"] for t in dots], s=sizes, c=colour, marker=marker, alpha=0.75,
                label=label, linewidths=0.6, edgecolors="white",
            )  # fmt: skip
    axes.set_xlabel("damage: probability that answers to keep have lost")
    axes.set_ylabel("still said: probability")
    axes.set_title("Tries", parse_math=False)
    quiet(axes, "both")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_bars(axes: Any, title: str, rows: Sequence[Row], arms: Sequence[str]) -> None:
    groups = list(dict.fromkeys(r.group for r in rows))
    style, width = arm_style(arms), 0.8 / max(1, len(arms))
    for i, arm in enumerate(arms):
        mine = [r for r in rows if r.arm == arm]
        x = [groups.index(r.group) + width * (i - (len(arms) - 1) / 2) for r in mine]
        value = np.array([r.value for r in mine])
        errors = np.maximum(0, [value - [r.low for r in mine], [r.high for r in mine] - value]) if mine else None
        look = {"color": style[arm]["color"], "hatch": style[arm]["hatch"], "edgecolor": "white"}
        axes.bar(x, value, width * 0.92, label=short(arm, 20), linewidth=0, **look)
        axes.errorbar(x, value, yerr=errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=2)
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.set_title(short(title.replace("_", " "), 48), parse_math=False)
    if all(0 <= r.low and r.high <= 1 for r in rows):
        axes.set_ylim(0, 1.05)
    quiet(axes)
