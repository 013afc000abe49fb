"""The methods there are, read from their source files: naming them must not load the libraries they run on.

`excise.registry` gives the methods themselves; this gives their names, summaries and options, and says the same.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.registry import ARMS, FOLDERS, Kind, Option, help_of

HOME = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Entry:
    """Name, first line, options and whole docstring of a method; the file it is in; an evaluation's family."""

    name: str
    summary: str
    options: tuple[Option, ...]
    doc: str = ""
    path: str = ""
    family: str = ""


def catalogue(kind: Kind) -> list[Entry]:
    """The methods of a kind, by name: those that the folder's `__init__.py` imports."""
    folder = HOME / FOLDERS[kind]
    listed = _parsed(folder / "__init__.py")
    files = {n.module.split(".")[-1] for n in ast.walk(listed) if isinstance(n, ast.ImportFrom) and n.module}
    return sorted((e for file in files for e in _entries(folder / f"{file}.py", kind)), key=lambda e: e.name)


def _entries(path: Path, kind: Kind) -> Iterator[Entry]:
    tree = _parsed(path)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for mark in node.decorator_list:
            name = mark.func if isinstance(mark, ast.Call) else mark
            if isinstance(name, ast.Name) and name.id == kind:
                doc = inspect.cleandoc(ast.get_docstring(node) or "")
                family = str(ast.literal_eval(mark.args[0])) if isinstance(mark, ast.Call) and mark.args else ""
                options = tuple(_options(node.args, doc, tree))
                yield Entry(node.name, doc.split("\n")[0], options, doc, path.relative_to(HOME).as_posix(), family)


def _options(args: ast.arguments, doc: str, tree: ast.Module) -> Iterator[Option]:
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        if arg.arg not in ARMS:
            value = inspect.Parameter.empty if default is None else _value(default, tree)
            annotation = arg.annotation and ast.unparse(arg.annotation)
            if isinstance(arg.annotation, ast.Name) and str(_value(arg.annotation, tree)).startswith("Literal["):
                annotation = _value(arg.annotation, tree)
            yield Option(arg.arg, value, annotation or "str", help_of(doc, arg.arg))


def _value(node: ast.expr, tree: ast.Module) -> Any:
    """A default's value where it is written out, here or in the file of ours it is imported from; else its text."""
    if isinstance(node, ast.Name):
        for line in tree.body:
            if isinstance(line, ast.Assign) and any(isinstance(t, ast.Name) and t.id == node.id for t in line.targets):
                return _value(line.value, tree)
            if isinstance(line, ast.ImportFrom) and any((a.asname or a.name) == node.id for a in line.names):
                home = HOME.joinpath(*(line.module or "").split(".")).with_suffix(".py")
                return _value(node, _parsed(home)) if home.is_file() else node.id
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


__all__ = ["Entry", "catalogue"]
