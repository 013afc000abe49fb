"""Figures of localizations: the layer x token map of causal tracing, and rankings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from excise.figures import BLUE, INK, Picture, drawn, picture, short
from excise.scores import Localization, TraceMap
from excise.sites import POSITION_CLASSES, Site, position_class
from excise.unit_maps import plot_units, unit_sites

# One hue per component, as in the figures of ROME (arXiv 2202.05262): state purple, MLP green, attention red.
COMPONENTS = {"resid": ("hidden state", "Purples"), "mlp": ("MLP", "Greens"), "attn": ("attention", "Reds")}
# What a method does with a state of its map, and what the cells hold; others restore it.
CELLS = {
    "logit_lens": ("read", "above the embedding"),
    "attribution_patching": ("restored", "effect to first order"),
}
# Up to so many sites are read more easily as a ranking.
FEW = 24


@drawn
def plot_localization(localization: Localization, fact: str | int | None = None) -> Figure:
    """The layer x token map of one fact (id or index), the mean map by position class, a map of units, or a ranking."""
    if not localization.maps or not localization.maps[0].values:
        chosen = localization if fact is None else localization.facts([_fact_id(localization, fact)])
        many = sum(map(len, unit_sites(chosen).values())) > FEW
        return plot_units(chosen) if many else plot_ranking(chosen)
    panels = _panels(localization, fact)
    rows = len(next(iter(panels.values()))[1])
    figure = picture(4.0 * len(panels), 1.2 + 0.27 * rows)
    for axes, (component, (grid, labels, marked, span)) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw_map(figure, axes, component, grid, labels, marked, span, localization.recipe)
    return figure


@drawn
def map_figures(localization: Localization, fact: str | int | None = None) -> list[Picture]:
    """The same maps, one figure per component: what a narrow page can stack."""
    figures = []
    for component, (grid, labels, marked, span) in (_panels(localization, fact) if localization.maps else {}).items():
        figure = picture(3.7, 1.2 + 0.27 * len(labels))
        _draw_map(figure, figure.subplots(), component, grid, labels, marked, span, localization.recipe)
        figures.append(figure)
    return figures


@drawn
def plot_ranking(localization: Localization, *, k: int = 15) -> Figure:
    """The k sites of highest mean score, best on top, each with the 95 % interval of its mean over the facts."""
    best = localization.top(k)
    y = np.arange(len(best.sites))[::-1]
    figure = picture(5.2, 0.9 + 0.26 * max(1, len(y)))
    axes = figure.subplots()
    axes.barh(y, np.nan_to_num(best.average), color=BLUE, height=0.7)
    if len(best.scores) > 1 and len(y):
        ends = best.intervals()
        axes.hlines(y, [e.low for e in ends], [e.high for e in ends], color=INK, linewidth=1.2)
    axes.set_yticks(y, [_site_label(s) for s in best.sites], fontsize=8, parse_math=False)
    axes.set_xlabel("mean score" + (", 95 % interval" if len(best.scores) > 1 else ""))
    axes.set_title(short(str(localization.recipe.get("method", "sites"))), parse_math=False)
    return figure


def _site_label(site: Site, width: int = 44) -> str:
    """The site's name; a long one loses its middle, since its block stands in front and its unit at the end."""
    text, head = short(str(site), 1000), width // 3
    return text if len(text) <= width else f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[head + 1 - width :]}"


def mean_map(maps: Sequence[TraceMap], component: str) -> np.ndarray:
    """Mean indirect effect by position class: [n_layers, n_classes], NaN where no fact has a token of the class.

    Tokens of one class are averaged within a fact first, so that long names do not outweigh short ones.
    """
    rows = []
    for found in maps:
        effect, n = found.effect(component), len(found.tokens)
        classes = np.array([POSITION_CLASSES.index(position_class(t, n, found.subject)) for t in range(n)])
        rows.append(
            [
                effect[:, classes == c].mean(1) if (classes == c).any() else np.full(len(effect), np.nan)
                for c in range(len(POSITION_CLASSES))
            ]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(np.array(rows), axis=0).T


Panel = tuple[np.ndarray, list[str], list[bool], str]


def _panels(localization: Localization, fact: str | int | None) -> dict[str, Panel]:
    """For each component the grid [n_layers, n_rows], its row labels, which rows are the subject, and a title."""
    maps = localization.maps
    components = [c for c in COMPONENTS if c in maps[0].values] + [c for c in maps[0].values if c not in COMPONENTS]
    if fact is None:
        marked = [c.startswith("subject") for c in POSITION_CLASSES]
        labels = [c.replace("_", " ") for c in POSITION_CLASSES]
        return {c: (mean_map(maps, c), labels, marked, f"mean of {len(maps)} facts") for c in components}
    wanted = _fact_id(localization, fact)
    one = next((m for m in maps if m.fact_id == wanted), None)
    if one is None:
        raise ValueError(f"no map of fact {wanted!r}; maps are of {', '.join(m.fact_id for m in maps[:8])}")
    marked = [one.subject[0] <= i < one.subject[1] for i in range(len(one.tokens))]
    return {c: (one.effect(c), [short(t, 18) for t in one.tokens], marked, short(wanted, 30)) for c in components}


def _fact_id(localization: Localization, fact: str | int) -> str:
    if isinstance(fact, int):
        return localization.maps[fact].fact_id if localization.maps else localization.fact_ids[fact]
    return fact


def _draw_map(
    figure: Figure,
    axes: Any,
    component: str,
    grid: np.ndarray,
    labels: list[str],
    marked: list[bool],
    title: str,
    recipe: Mapping[str, Any],
) -> None:
    """Tokens down, layers across; the subject's tokens carry a star and a bar."""
    done, unit = CELLS.get(str(recipe.get("method")), ("restored", "indirect effect"))
    name, colours = COMPONENTS.get(component, (component, "Blues"))
    top = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
    mesh = axes.pcolormesh(grid.T, cmap=colours, vmin=0, vmax=max(top, 1e-6), edgecolors="face", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_facecolor("#d9d9d9")  # NaN: no fact has such a token
    axes.set_yticks(
        np.arange(len(labels)) + 0.5,
        [f"{t} *" if m else t for t, m in zip(labels, marked, strict=True)],
        fontsize=9,
        parse_math=False,
    )
    step = max(1, grid.shape[0] // 8)
    axes.set_xticks(
        np.arange(0, grid.shape[0], step) + 0.5, [str(i) for i in range(0, grid.shape[0], step)], fontsize=9
    )
    rows = np.flatnonzero(marked)
    if len(rows):
        axes.plot(
            [0, 0], [rows[0] + 0.05, rows[-1] + 0.95], color=INK, linewidth=5, solid_capstyle="butt", clip_on=False
        )
        axes.set_xlim(0, grid.shape[0])
    axes.set_xlabel("layer")
    axes.set_title(f"{name} {done}: {title}", parse_math=False)
    figure.colorbar(mesh, ax=axes, label=f"{unit} ({recipe['metric']})" if "metric" in recipe else unit, shrink=0.9)
