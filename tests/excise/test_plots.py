"""Figures: they draw what they are given, the same bytes every time, safely for any token."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from excise.plots import (
    arm_style,
    figure_png,
    figure_svg,
    layer_measures,
    map_figures,
    mean_map,
    plot_before_after,
    plot_layers,
    plot_localization,
    plot_ranking,
    plot_results,
    plot_units,
    result_panels,
    save_figure,
)
from excise.scores import Localization, Results, Score, TraceMap
from excise.sites import POSITION_CLASSES, Site

HOSTILE = ("<s>", "$x_{", "\x00\x1b[31m", "</svg><script>", "日本", "\u202e", "b$", "é")


def trace_map(fact: str = "f0", tokens: tuple[str, ...] = HOSTILE, subject: tuple[int, int] = (2, 5)) -> TraceMap:
    grid = np.random.default_rng(0).random((4, len(tokens)))
    return TraceMap(fact, tokens, subject, {"resid": grid, "mlp": grid / 2, "attn": grid / 3}, 0.1, 0.9)


@pytest.fixture(scope="module")
def localization() -> Localization:
    sites = tuple(Site(f"blocks.{i}.hook_resid_post", "subject_last") for i in range(4))
    maps = (trace_map("f0"), trace_map("f1", ("<s>", "A", "b", "is"), (1, 3)))
    return Localization(sites, np.arange(8.0).reshape(2, 4), ("f0", "f1"), {"method": "causal_trace"}, None, maps)


@pytest.fixture(scope="module")
def results() -> Results:
    rng = np.random.default_rng(0)
    scores: dict[tuple[str, str], tuple[Score, ...]] = {}
    for arm in ("before", "rocr", "control", "oracle"):
        facts = [(f"f{i}", f"s{i // 2}", ("forget", "retain")[i % 2]) for i in range(16)]
        recall = [
            Score(*f, float(rng.random() < 0.7), form, held)
            for f in facts
            for form in ("statement", "question")
            for held in (False, True)
        ]
        lens = [
            Score(*f, -rng.random(), "statement", variant=f"log-probability, layer {i}")
            for f in facts
            for i in range(4)
        ]
        scores[arm, "recall"], scores[arm, "lens"] = tuple(recall), tuple(lens)
    return Results(scores, {"before": "none", "rocr": "weight"})


def test_mean_map_averages_by_position_class() -> None:
    grid = np.array([[0.1, 0.2, 0.4, 0.8, 0.5]])
    found = mean_map([TraceMap("f", ("<s>", "Ma", "ri", "e", "is"), (1, 4), {"resid": grid}, 0.1, 1.0)], "resid")
    by_class = dict(zip(POSITION_CLASSES, found[0], strict=True))
    assert by_class["subject_last"] == pytest.approx(0.7) and by_class["last"] == pytest.approx(0.4)
    assert by_class["subject_middle"] == pytest.approx(0.3) and np.isnan(by_class["further"])


def test_a_map_per_component_with_the_subject_marked(localization: Localization) -> None:
    figure = plot_localization(localization, "f1")
    axes = [a for a in figure.axes if a.get_xlabel() == "layer"]
    assert [a.get_title().split(" restored")[0] for a in axes] == ["hidden state", "MLP", "attention"]
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["<s>", "A *", "b *", "is"]
    lens = replace(localization, recipe={"method": "logit_lens", "metric": "logprob"})
    found = plot_localization(lens, "f1").axes
    assert found[0].get_title() == "hidden state read: f1"
    assert any(a.get_ylabel() == "above the embedding (logprob)" for a in found)
    assert len(map_figures(localization)) == 3
    assert len(plot_localization(localization).axes) == 6


def test_what_has_no_map_is_ranked_and_unknown_facts_are_named(localization: Localization) -> None:
    flat = Localization(localization.sites, localization.scores, localization.fact_ids)
    labels = [t.get_text() for t in plot_localization(flat).axes[0].get_yticklabels()]
    assert labels[0] == "blocks.3.hook_resid_post@subject_last"
    assert plot_localization(flat, 0) and map_figures(flat) == []
    long = Localization.of(["blocks.31.hook_resid_post.hook_sae_acts_post#16383"])
    (label,) = (t.get_text() for t in plot_localization(long).axes[0].get_yticklabels())
    assert label.startswith("blocks.31.") and label.endswith("#16383") and len(label) == 44
    assert plot_ranking(Localization((), np.zeros((1, 0)), ("f",)))
    with pytest.raises(ValueError, match="no map of fact 'x'; maps are of f0, f1"):
        plot_localization(localization, "x")
    with pytest.raises(ValueError, match="no fact 'x' among the"):
        plot_localization(flat, "x")


def test_units_are_drawn_as_maps() -> None:
    heads = [
        Site(f"blocks.{i}.attn.hook_z", rule, h)
        for rule in ("subject_last", "last")
        for i in range(3)
        for h in range(4)
    ]
    experts = [Site(f"blocks.{i}.mlp.experts.{e}.W_out") for i in (1, 2) for e in range(5)]
    neurons = [Site(f"blocks.{i}.mlp.hook_post", "last", u) for i in range(3) for u in range(60)]
    routed = [Site("blocks.2.mlp.experts.3.hook_post", "last", 7)]
    sites = (*heads, *experts, *neurons, *routed)
    scores = np.linspace(-1, 1, len(sites))[None]
    figure = plot_units(Localization(sites, scores, ("f0",)))
    panels = {a.get_title(): a for a in figure.axes if a.get_xlabel() == "layer"}
    assert list(panels) == ["heads at subject last", "heads at last", "experts", "neurons at last"]
    (mesh,) = panels["heads at last"].collections
    by_hand = scores[0, 12:24].reshape(3, 4).T  # heads down, layers across
    np.testing.assert_allclose(np.asarray(mesh.get_array()).reshape(4, 3), by_hand)
    assert mesh.norm.vcenter == 0 and panels["experts"].collections[0].norm.vmin <= 0
    ranks = np.asarray(panels["neurons at last"].collections[0].get_array()).reshape(-1, 3)
    assert (np.diff(ranks, axis=0) <= 0).all() and ranks[0, 2] == 1
    assert panels["neurons at last"].texts[0].get_text() == "e3 #7"
    with pytest.raises(ValueError, match="draw a ranking"):
        plot_units(Localization((Site("blocks.0.hook_resid_post", "last"),), np.ones((1, 1)), ("f",)))


def test_what_has_units_is_drawn_as_units() -> None:
    sites = tuple(Site("blocks.0.mlp.hook_post", "last", u) for u in range(40))
    many = Localization(sites, np.arange(40.0)[None], ("f0",))
    assert plot_localization(many).axes[0].get_title() == "neurons at last"
    assert plot_localization(many.top(5)).axes[0].get_yticklabels()[0].get_text() == "blocks.0.mlp.hook_post@last#39"


def test_results_are_pooled_over_forms_and_single_layers_left_out(results: Results) -> None:
    panels = result_panels(results)
    assert list(panels) == ["recall"] and {r.group for r in panels["recall"]} == {"forget", "retain"}
    bars = plot_results(results).axes[0]
    heights = sorted(round(p.get_height(), 9) for p in bars.patches)
    assert heights == sorted(round(r.value, 9) for r in panels["recall"])
    assert plot_results(Results({})) and plot_before_after(results)


def test_layer_curves(results: Results) -> None:
    assert layer_measures(results) == [("lens", "log-probability")]
    lines = plot_layers(results, "lens").axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["before", "rocr", "control", "oracle"]
    assert list(lines[0].get_xdata()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no measure 'rank' by layer on forget facts; there are log-probability"):
        plot_layers(results, "lens", measure="rank")


def test_arms_have_fixed_looks_that_differ_without_colour() -> None:
    style = arm_style(["before", "rocr", "lunar", "control", "random 2", "oracle"])
    assert [style[a]["color"] for a in ("before", "rocr", "control", "oracle")] == [
        "#767676",
        "#0072b2",
        "#e08214",
        "#1b8a5a",
    ]
    assert style["lunar"]["color"] not in {style[a]["color"] for a in ("before", "rocr", "control", "oracle")}
    for look in ("marker", "linestyle", "hatch"):
        assert len({style[a][look] for a in ("before", "rocr", "control", "oracle")}) == 4


def test_svg_is_deterministic_wellformed_and_keeps_to_itself(localization: Localization) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = figure_svg(plot_localization(localization, 0)), figure_svg(plot_localization(localization, 0))
        mean = figure_svg(plot_localization(localization))
    assert first == again and first.startswith("<svg") and first.endswith("</svg>")
    ElementTree.fromstring(first)
    assert "<script" not in first and "<metadata" not in first and "\x1b" not in first and "currentColor" in first
    assert not re.search(r"(href|url\()=?['\"]?(?!#)https?:", first)
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in (first, mean)]
    assert ids[0] and not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"', first)) | set(re.findall(r"url\(#([^)]+)\)", first)) <= ids[0]


def test_png_and_files(results: Results, tmp_path) -> None:
    figure = plot_layers(results, "lens")
    assert figure_png(figure) == figure_png(figure) and figure_png(figure).startswith(b"\x89PNG")
    assert save_figure(figure, tmp_path / "a.svg").read_text().startswith("<svg")
    assert save_figure(figure, tmp_path / "a.png").stat().st_size > 1000
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        save_figure(figure, tmp_path / "a.pdf")


def test_the_reader_s_own_style_stays(results: Results) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure_svg(plot_layers(results, "lens"))
    assert dict(matplotlib.rcParams) == before


def test_nothing_but_plots_loads_matplotlib() -> None:
    code = "import sys, excise.report, excise.verdict, excise.statistics; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
