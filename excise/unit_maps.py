"""Figures of localizations whose sites are units: layer by layer, heads and experts as a table, neurons by rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from excise.figures import Picture, drawn, picture
from excise.scores import Localization
from excise.sites import Site

# Positive scores in the component's hue, negative ones in grey.
UNIT_HUES = {
    "head": "Reds",
    "query": "Reds",
    "key": "Reds",
    "value": "Reds",
    "expert": "Greens",
    "neuron": "Greens",
    "component": "Purples",
}
HEAD_POINTS = {"hook_z": "head", "hook_q": "query", "hook_k": "key", "hook_v": "value"}
# Points that are the whole output of a component.
WHOLE = {"hook_attn_out": "attention", "hook_mlp_out": "MLP", "hook_resid_post": "hidden state"}
# Neurons shown of each layer.
SHOWN = 24


@drawn
def plot_units(localization: Localization) -> Figure:
    """Maps of units, mean over the facts: heads and experts as a table with layers across, of each layer its best neurons.

    One panel per kind of unit and position rule. Raises ValueError when no site has units.
    """
    panels = unit_sites(localization)
    if not panels:
        raise ValueError("no site of this localization is a head, an expert or a neuron: draw a ranking")
    figure = picture(4.0 * len(panels), _height(panels))
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (key, found) in zip(grid, panels.items(), strict=True):
        _draw_panel(figure, axes, key, found, localization.average)
    return figure


@drawn
def unit_figures(localization: Localization) -> list[Picture]:
    """The same maps, and one of whole attention and MLP outputs, each a figure of its own; none where there is nothing."""
    figures, average = [], localization.average
    components = _component_sites(localization)
    if components:
        figure = picture(3.7, 1.2 + 0.27 * len(components))
        _draw_components(figure, figure.subplots(), components, average)
        figures.append(figure)
    for key, found in unit_sites(localization).items():
        figure = picture(3.7, _height({key: found}))
        _draw_panel(figure, figure.subplots(), key, found, average)
        figures.append(figure)
    return figures


def _height(panels: dict[tuple[str, str], list[tuple[Site, int]]]) -> float:
    return 1.3 + min(5.0, 0.2 * max(_rows(kind, found) for (kind, _), found in panels.items()))


def _rows(kind: str, found: Sequence[tuple[Site, int]]) -> int:
    return SHOWN if kind == "neuron" else 1 + max(_number(s) for s, _ in found)


def _draw_panel(
    figure: Figure, axes: Any, key: tuple[str, str], found: Sequence[tuple[Site, int]], average: np.ndarray
) -> None:
    kind, rule = key
    layers = 1 + max(s.layer or 0 for s, _ in found)
    if kind == "neuron":
        cells, names = _ranked(found, average, layers)
    else:
        cells, names = _tabled(found, average, layers, _rows(kind, found))
    _draw_units(figure, axes, kind, rule, cells)
    for (x, y), name in names.items():
        axes.text(x + 0.5, y + 0.5, name, fontsize=6.5, ha="center", va="center", color="white", parse_math=False)


def _component_sites(localization: Localization) -> dict[tuple[str, str], list[tuple[Site, int]]]:
    """(component, position rule) -> sites of the whole output of it, with their columns."""
    found: dict[tuple[str, str], list[tuple[Site, int]]] = {}
    for column, site in enumerate(localization.sites):
        component = WHOLE.get(site.point.rsplit(".", 1)[-1]) if site.unit is None and site.expert is None else None
        if component and site.layer is not None:
            found.setdefault((component, str(site.position or "")), []).append((site, column))
    return dict(sorted(found.items(), key=lambda x: (x[0][1], x[0][0])))


def _draw_components(
    figure: Figure, axes: Any, found: dict[tuple[str, str], list[tuple[Site, int]]], average: np.ndarray
) -> None:
    layers = 1 + max(s.layer or 0 for sites in found.values() for s, _ in sites)
    cells = np.full((len(found), layers), np.nan)
    for row, sites in enumerate(found.values()):
        for site, column in sites:
            cells[row, site.layer] = average[column]
    _draw_units(figure, axes, "component", "", cells)
    labels = [f"{component}, {rule.replace('_', ' ')}".removesuffix(", ") for component, rule in found]
    axes.set_ylabel("")
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=9, parse_math=False)


def unit_sites(localization: Localization) -> dict[tuple[str, str], list[tuple[Site, int]]]:
    """(kind of unit, position rule) -> sites of it with their columns."""
    panels: dict[tuple[str, str], list[tuple[Site, int]]] = {}
    for column, site in enumerate(localization.sites):
        leaf = site.point.rsplit(".", 1)[-1]
        kind = HEAD_POINTS.get(leaf) if site.unit is not None else None
        if kind is None and site.expert is not None and site.unit is None:
            kind = "expert"
        if kind is None and site.unit is not None and site.layer is not None:
            kind = "neuron"
        if kind is not None:
            panels.setdefault((kind, str(site.position or "")), []).append((site, column))
    return panels


def _number(site: Site) -> int:
    """Row of a head or an expert."""
    return int(site.expert if site.unit is None else site.unit)  # type: ignore[arg-type]


def _tabled(
    found: Sequence[tuple[Site, int]], average: np.ndarray, layers: int, rows: int
) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    cells = np.full((rows, layers), np.nan)
    for site, column in found:
        before = cells[_number(site), site.layer]
        cells[_number(site), site.layer] = np.nanmax([before, average[column]])
    return cells, {}


def _ranked(
    found: Sequence[tuple[Site, int]], average: np.ndarray, layers: int
) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    """The best neurons of each layer from the top, and the names of the best of all."""
    cells, names = np.full((SHOWN, layers), np.nan), {}
    best = sorted((c for c in found if not np.isnan(average[c[1]])), key=lambda c: -average[c[1]])
    places = [0] * layers
    for i, (site, column) in enumerate(best):
        layer = int(site.layer or 0)
        if places[layer] < SHOWN:
            cells[places[layer], layer] = average[column]
            if i < 5:
                names[layer, places[layer]] = f"{'' if site.expert is None else f'e{site.expert} '}#{site.unit}"
            places[layer] += 1
    return cells, names


def _draw_units(figure: Figure, axes: Any, kind: str, rule: str, cells: np.ndarray) -> None:
    from matplotlib.colors import TwoSlopeNorm

    top = max(float(np.nanmax(np.abs(cells))) if np.isfinite(cells).any() else 1.0, 1e-9)
    lowest = float(np.nanmin(cells)) if np.isfinite(cells).any() else 0.0
    colours = _two_sided(UNIT_HUES[kind]) if lowest < 0 else UNIT_HUES[kind]
    norm = TwoSlopeNorm(0, -top, top) if lowest < 0 else None
    span = {"norm": norm} if norm else {"vmin": 0, "vmax": top}
    mesh = axes.pcolormesh(cells, cmap=colours, edgecolors="face", linewidth=0.4, **span)
    axes.invert_yaxis()
    axes.set_facecolor("#d9d9d9")
    axes.set_xlabel("layer")
    axes.set_ylabel("rank in its layer" if kind == "neuron" else kind)
    step, rows = max(1, cells.shape[1] // 8), max(1, cells.shape[0] // 8)
    axes.set_xticks(
        np.arange(0, cells.shape[1], step) + 0.5, [str(i) for i in range(0, cells.shape[1], step)], fontsize=9
    )
    first = 1 if kind == "neuron" else 0
    axes.set_yticks(
        np.arange(0, cells.shape[0], rows) + 0.5, [str(i + first) for i in range(0, cells.shape[0], rows)], fontsize=9
    )
    axes.set_title(f"{kind}s{f' at {rule}' if rule else ''}".replace("_", " "), parse_math=False)
    figure.colorbar(mesh, ax=axes, label="mean score", shrink=0.9)


def _two_sided(hue: str) -> Any:
    """Grey below zero, white at zero, the hue above."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    below, above = (
        matplotlib.colormaps["Greys"](np.linspace(0.75, 0, 128)),
        matplotlib.colormaps[hue](np.linspace(0, 1, 128)),
    )
    return ListedColormap(np.vstack([below, above]))
