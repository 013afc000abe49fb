"""The documentation site: it builds without a warning or the network, and no method, option or public name is missing."""

from __future__ import annotations

import ast
import html
import importlib
import importlib.util
import inspect
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evals import drift, lens, recall
from excise.catalogue import catalogue
from excise.cli import parse
from excise.registry import FOLDERS, Kind

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PACKAGES = ("excise", "localize", "edit", "evals", "sae")
SECTIONS = {
    "localizer": ("Formula", "What comes back", "Cost", "When it fails", "Source"),
    "editor": ("Formula", "What it returns", "Cost", "When it fails", "Source"),
}
# CPU seconds that building the site may take.
MOST_SECONDS = 60
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
METHODS = [(kind, entry) for kind in FOLDERS for entry in catalogue(kind)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # No proxy answers at that address: whatever asks the network fails.
    nowhere = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MOST_SECONDS
    return folder


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages() -> list[Path]:
    return sorted(DOCS.rglob("*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text(encoding="utf-8")) if name == language]


def section(text: str, anchor: str) -> str:
    """From the heading with that id to the next one."""
    start = text.index(f'id="{anchor}"')
    rest = text[start:]
    end = re.search(r"<h[1-3] id=", rest[1:])
    return rest[: end.start() + 1 if end else None]


@pytest.mark.parametrize(("kind", "entry"), METHODS, ids=[e.name for _, e in METHODS])
def test_every_method_and_option_is_on_its_page(site: Path, kind: Kind, entry: object) -> None:
    page = entry.family if kind == "evaluation" else entry.name
    text = (site / FOLDERS[kind] / f"{page}.html").read_text(encoding="utf-8")
    if kind == "evaluation":
        assert f'id="{entry.name}"' in text
    for name in (o.name for o in entry.options):
        assert f"<code>{name}</code>" in section(text, f"options-of-{entry.name}"), name


@pytest.mark.parametrize("kind", SECTIONS)
def test_every_localizer_and_editor_has_a_written_page(kind: Kind) -> None:
    """A page from the docstring alone would do for the build; formula, cost and failures have to be written."""
    for entry in catalogue(kind):
        page = DOCS / FOLDERS[kind] / f"{entry.name}.md"
        assert page.is_file(), f"write {page.relative_to(ROOT)} (docs/extend.md says what it holds)"
        headings = re.findall(r"^## (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert [h for h in headings if h in SECTIONS[kind]] == list(SECTIONS[kind]), page.name
        assert blocks(page, "math"), f"{page.name} has no formula"


def test_every_option_says_what_it_does() -> None:
    silent = [f"{e.name}: {o.name}" for _, e in METHODS for o in e.options if not o.help]
    assert not silent
    twice = [f"{e.name}: {o.name}" for _, e in METHODS for o in e.options
             if len(re.findall(rf"^\s*{o.name}: ", e.doc, re.MULTILINE)) > 1]  # fmt: skip
    assert not twice


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(site: Path, package: str) -> None:
    text = (site / "api" / f"{package}.html").read_text(encoding="utf-8")
    home = importlib.import_module(package)
    for name in home.__all__:
        thing = inspect.unwrap(getattr(home, name))
        assert inspect.getdoc(thing), f"{package}.{name} has no docstring"
        assert f'id="{thing.__module__}.{name}"' in text, f"{package}.{name}"


def test_nothing_is_fetched_and_no_link_is_dead(site: Path) -> None:
    found = {p.relative_to(site).as_posix(): p.read_text(encoding="utf-8") for p in site.rglob("*.html")}
    assert {"index.html", "concepts.html", "audit.html", "security.html", "extend.html"} <= found.keys()
    for name, text in found.items():
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"|<link[^>]+href="([^"]+)"', text)
        assert not [a or b for a, b in loaded if re.match(r"(https?:)?//", a or b)], name
        for link in {html.unescape(x) for x in re.findall(r'<a[^>]+href="([^"#]+)', text)}:
            target = (site / name).parent / link
            assert link.startswith(("http", "/", "mailto:")) or name == "404.html" or target.exists(), f"{name}: {link}"
        drawn = re.findall(r"<math.*?</math>", text, re.DOTALL)
        assert not [m for m in drawn if "\\" in m], f"{name}: a formula with a command that is not drawn"
    styles = [p.read_text(encoding="utf-8") for p in site.rglob("*.css")]
    assert styles and not [s for s in styles if re.search(r"url\(\s*['\"]?(https?:)?//|@import", s)]


def test_commands_in_the_pages_are_understood() -> None:
    asked = 0
    for page in [README, *pages()]:
        for block in blocks(page, "") + blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.split(r"\s{3,}|\s#", line.strip())[0]
                if line.startswith("excise ") and "$" not in line and "..." not in line:
                    parse(shlex.split(line)[1:])
                    asked += 1
    assert asked > 15


def test_the_readme_fits_two_screens_and_shows_the_cell_of_the_start_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert blocks(README, "python") == blocks(DOCS / "index.md", "python")[:1]
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (ROOT / target).is_file(), target


def test_code_in_the_pages_is_python() -> None:
    for page in [README, *pages()]:
        for code in blocks(page, "python"):
            ast.parse(code)


def test_what_the_pages_tell_to_write_works(tmp_path: Path) -> None:
    """The three methods of extend.md, and the pages for TransformerLens and nnsight users, run as they are printed."""
    parts = [code for name in ("extend", "recipes/from_transformer_lens", "recipes/from_nnsight")
             for code in blocks(DOCS / f"{name}.md", "python")]  # fmt: skip
    code = "\n".join(p.replace("from __future__ import annotations\n", "") for p in parts)
    script = tmp_path / "pages.py"
    script.write_text(f"""from __future__ import annotations
{code}
assert neurons.shape[-1] == 576 and logits.shape[0] == 1
where = activation_size(model, facts.group("forget"))
assert where.scores.shape == (len(facts.group("forget")), model.n_layers) and where.recipe["position"] == "subject_last"
chosen = ex.Localization((ex.Site("blocks.2.mlp.hook_post", None, 7),), np.ones((1, 1)), (fact.id,))
edit = neuron_off(model, [fact], [], chosen)
from excise.arms import Arm
with ex.applied(model, edit):
    pass
assert edit.recipe["factor"] == 0.0 and len(edit.changes) == 1
(score,) = answer_length(Arm("before", model), [fact])
assert score.value > 0 and score.detail
""")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.slow
def test_the_cell_of_the_readme_works_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On fewer questions than it asks; the rest is as it stands there."""
    (cell,) = blocks(README, "python")
    for evaluation in (drift, lens, recall):
        monkeypatch.setitem(inspect.unwrap(evaluation).__kwdefaults__, "limit", 4)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(cell, str(README), "exec"), names)
    fact, results = names["forget"][0], names["results"]
    assert capsys.readouterr().out.strip() and (tmp_path / "edit.safetensors").is_file()
    assert results.arms == ["before", "edited", "control"] and results.evaluations == ["recall", "drift", "lens"]
    assert fact.answer in names["model"].generate(fact.prompt), "reverted"


def test_globs_of_the_navigation_take_what_is_left(hooks: ModuleType) -> None:
    nav = [{"A": ["index.md", "a/*.md"]}, {"B": ["b.md", "gone.md", "*.md"]}]
    known = {"index.md", "a/one.md", "a/deep/two.md", "b.md", "new.md"}
    named = {"index.md", "a/*.md", "b.md", "gone.md", "*.md"}
    assert list(hooks._expanded(nav, known, named)) == [{"A": ["index.md", "a/one.md"]}, {"B": ["b.md", "new.md"]}]


def test_measured_rows_are_those_that_name_the_method(
    hooks: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = "# T\n\n## dense\n\n| editor | x |\n|---|---|\n| rocr | 1 |\n| rocr (soft) | 2 |\n| rocr_old | 3 |\n"
    (tmp_path / "editor_table.md").write_text(table)
    monkeypatch.setattr(hooks, "HERE", tmp_path)
    found = hooks.measured("rocr")
    assert "| rocr | 1 |" in found and "| rocr (soft) | 2 |" in found and "rocr_old" not in found
    assert found.startswith("[editor table](../editor_table.md): dense\n\n| editor | x |\n|---|---|")
    assert hooks.measured("lunar") == ""


def test_docstrings_become_markdown(hooks: ModuleType) -> None:
    doc = "A site, `[n, d]`, or point[@position].\n\nname: what * it is.\n    And more.\nother: <tag>"
    assert hooks.listed(doc) == (
        "A site, `[n, d]`, or point\\[@position].\n\n- `name`: what \\* it is.\n    And more.\n- `other`: \\<tag>"
    )
    assert "<math" in hooks.formula("a = b\n\nc") and hooks.formula("a = b\n\nc").count("<math") == 2
