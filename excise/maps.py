"""Figures of localizations: the layer x token map of causal tracing, rankings, and maps of heads, experts and neurons."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from excise.figures import BLUE, INK, Picture, drawn, picture, short
from excise.scores import Localization, TraceMap
from excise.sites import POSITION_CLASSES, Site, position_class

# One hue per component, as in the figures of ROME (arXiv 2202.05262): state purple, MLP green, attention red.
COMPONENTS = {"resid": ("hidden state", "Purples"), "mlp": ("MLP", "Greens"), "attn": ("attention", "Reds")}
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
# What a method does with a state of its map, and what the cells hold; others restore it.
CELLS = {
    "logit_lens": ("read", "above the embedding"),
    "attribution_patching": ("restored", "effect to first order"),
}
# Up to so many sites are read more easily as a ranking.
FEW = 24
# Neurons shown of each layer.
SHOWN = 24


# --- localizations


@drawn
def plot_localization(localization: Localization, fact: str | int | None = None) -> Figure:
    """The layer x token map of one fact (id or index), the mean map by position class, a map of units, or a ranking."""
    if not localization.maps or not localization.maps[0].values:
        chosen = localization if fact is None else localization.facts([_fact_id(localization, fact)])
        many = sum(map(len, _unit_sites(chosen).values())) > FEW
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


# --- units


@drawn
def plot_units(localization: Localization) -> Figure:
    """Maps of units, mean over the facts: heads and experts as a table with layers across, of each layer its best neurons.

    One panel per kind of unit and position rule. Raises ValueError when no site has units.
    """
    panels = _unit_sites(localization)
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
    for key, found in _unit_sites(localization).items():
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


def _unit_sites(localization: Localization) -> dict[tuple[str, str], list[tuple[Site, int]]]:
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
