"""The report in a browser: no complaint, no request, tables that sort, both themes, and a phone's width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from audited import EVIL, SKIPS, audit, edit, facts, localization
from browser import Page, browsing, chromium

from excise.report import write_report

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
PHONE = 390
# How light a colour looks, 0 to 1 (Rec. 709), and the contrast of text on its ground (WCAG 2).
LIGHTNESS = """
const light = (css) => { const [r, g, b] = css.match(/[\\d.]+/g).map((x) => x / 255)
  .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const contrast = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trials = [
        {"name": f"rocr (ridge 0.{i})", "number": i, "forget": 0.1 * i, "damage": 0.3 - 0.1 * i, "residual": 0.5,
         "front": True, "chosen": i == 0, "reason": ""}
        for i in range(3)
    ]  # fmt: skip
    return write_report(
        tmp_path_factory.mktemp("page"),
        facts=facts(),
        localization=localization(),
        edit=edit(),
        results=audit({"1": 0.0, "5": 0.5, "10": 0.25}, SKIPS),
        verification={"ok": EVIL * 4},
        recipe={"command": f"excise run {'x' * 300} {EVIL}", "versions": {"excise": "0.1.0"}, "undo": EVIL},
        samples=[{"prompt": EVIL * 3, "before": "a" * 200, "edited": "b"}],
        search={"trials": trials, "audited": {}},
        title=EVIL,
    )


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.mark.parametrize("width", [1100, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_without_a_word_and_fits(tab: Page, report: Path, width: int, scheme: str) -> None:
    tab.open(report, width=width, scheme=scheme)
    tab.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert tab.complaints == []
    assert [r for r in tab.requests if not r.startswith(("file://", "data:image/"))] == []
    assert len([r for r in tab.requests if r.startswith("file://")]) == 1
    assert tab.run("document.title").startswith("<script>") and tab.run("document.images.length") == 0
    assert tab.run("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll('main *')].filter((e) => !e.closest('.scroll, pre, svg')
        && e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.tagName + '.' + e.className)"""
    assert tab.run(wide) == []


def test_the_watch_sees_what_it_looks_for(tab: Page, report: Path, tmp_path: Path) -> None:
    """A page that complains, asks and overflows is seen to."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width: 900px'>x</div><script>nothing()</script>"
    )
    tab.open(page, width=PHONE)
    assert any("nothing is not defined" in c for c in tab.complaints)
    assert "http://127.0.0.1:9/x.png" in tab.requests
    assert tab.run("document.documentElement.scrollWidth") > PHONE


def test_tables_sort_by_value(tab: Page, report: Path) -> None:
    tab.open(report)
    column = """(up) => { const table = document.querySelector('#attacks table.sortable');
      const values = () => [...table.tBodies[0].rows].map((r) => Number(r.cells[2].dataset.value));
      const head = table.tHead.rows[0].cells[2]; head.querySelector('button').click();
      return [values(), head.getAttribute('aria-sort')]; }"""
    values, sorted_ = tab.run(f"({column})()")
    assert sorted_ == "ascending" and values == sorted(values) and len(set(values)) > 1
    values, sorted_ = tab.run(f"({column})()")
    assert sorted_ == "descending" and values == sorted(values, reverse=True)
    names = tab.run("""(() => { const table = document.querySelector('#attacks table.sortable');
      table.tHead.rows[0].cells[0].querySelector('button').click();
      return [...table.tBodies[0].rows].map((r) => r.cells[0].textContent); })()""")
    assert names == sorted(names)


def test_themes_follow_the_reader_and_the_button(tab: Page, report: Path) -> None:
    ground = f"(() => {{ {LIGHTNESS} return light(getComputedStyle(document.body).backgroundColor); }})()"
    for scheme, dark in (("light", False), ("dark", True)):
        tab.open(report, scheme=scheme)
        assert (tab.run(ground) < 0.2) is dark
        tab.run("document.getElementById('theme').click()")
        assert (tab.run(ground) < 0.2) is not dark
        tab.run("document.getElementById('theme').click()")
        assert (tab.run(ground) < 0.2) is dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(tab: Page, report: Path, scheme: str) -> None:
    """Contrast of at least 4.5 for all words, those of figures included."""
    tab.open(report, scheme=scheme)
    poor = f"""(() => {{ {LIGHTNESS}
      const ground = (e) => {{ for (; e; e = e.parentElement) {{ const c = getComputedStyle(e).backgroundColor;
        if (!c.endsWith(' 0)')) return light(c); }} return 1; }};
      const words = [...document.querySelectorAll('p, th, td, small, h1, h2, summary, dt, dd, a, .mark, .drawn, svg text')];
      const shown = words.filter((e) => e.textContent.trim() && e.getClientRects().length);
      const ink = (e) => light(getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color']);
      return [...new Set(shown.filter((e) => contrast(ink(e), ground(e)) < 4.5)
        .map((e) => [e.tagName, e.className.baseVal ?? e.className, getComputedStyle(e).color, e.textContent.slice(0, 30)].join('|')))];
    }})()"""
    assert tab.run(poor) == []


def test_folds_open_for_print_and_close_again(tab: Page, report: Path) -> None:
    tab.open(report)
    count = "[...document.querySelectorAll('details')].filter((d) => d.open).length"
    before, whole = tab.run(count), tab.run("document.querySelectorAll('details').length")
    tab.run("dispatchEvent(new Event('beforeprint'))")
    assert before < tab.run(count) == whole
    tab.run("dispatchEvent(new Event('afterprint'))")
    assert tab.run(count) == before
