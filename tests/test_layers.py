"""Who may import whom, read from the import statements: excise <- sae <- {localize, edit, evals}."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "excise": {"excise"},
    "sae": {"excise", "sae"},
    "localize": {"excise", "sae", "localize"},
    "edit": {"excise", "sae", "edit"},
    "evals": {"excise", "sae", "evals"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, f"{folder}/ holds no code"
    for path in files:
        forbidden = imported(path) & (MAY_IMPORT.keys() - MAY_IMPORT[folder])
        assert not forbidden, f"{path.relative_to(ROOT)} imports {', '.join(sorted(forbidden))}"


def test_nothing_is_imported_from_tests_or_benchmarks() -> None:
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            assert not imported(path) & {"tests", "tiny", "benchmarks", "pytest"}, path


def test_every_method_file_is_listed() -> None:
    """One file, one line in __init__.py: a method that is not listed would be invisible to everything."""
    for folder in ("localize", "edit", "evals"):
        listed = ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(listed) if isinstance(node, ast.ImportFrom)}
        for path in (ROOT / folder).glob("*.py"):
            decorated = any(
                isinstance(d, ast.Name) and d.id in ("localizer", "editor", "evaluation")
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.FunctionDef)
                for d in node.decorator_list
            )
            assert not decorated or f"{folder}.{path.stem}" in names, f"{path.name} is missing in {folder}/__init__.py"
