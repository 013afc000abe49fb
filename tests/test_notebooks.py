"""Every notebook runs top to bottom, was committed with its outputs, and is named where people look for it."""

from pathlib import Path

import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [p.name[:2] for p in NOTEBOOKS] == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]
    assert len(NOTEBOOKS) >= 7


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all: half of a minute of imports is saved. Each notebook starts without a name in it."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(ROOT / "notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    NotebookClient(notebook, km=kernel, timeout=300).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_committed_with_outputs_and_without_errors(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "run it and commit it with its outputs"
    assert not any(o.output_type == "error" for c in cells for o in c.outputs)
    # Warnings and progress bars tell of the machine that ran it, not of the notebook.
    assert not any(o.get("name") == "stderr" for c in cells for o in c.outputs)
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs)
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_opens_with_what_one_will_see_and_ends_with_something_to_try(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith(f"# {path.stem[:2]} · ") and "will see" in cells[0].source
    assert "## Something to try\n\n- " in cells[-1].source


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_notebook_is_named(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    missing = [p.stem for p in NOTEBOOKS if p.stem not in text]
    assert not missing, f"{page} does not name {', '.join(missing)}"
