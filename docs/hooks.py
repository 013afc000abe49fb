"""What the site writes by itself, so that it cannot drift from the code.

Every page of a method ends with its options, the rows of our measured tables that name it, and its signature. The pages of
the reference list the public names. Formulas (```math) become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from html import escape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

HERE = Path(__file__).resolve().parent
# mkdocs loads this file by its path; the packages that it describes lie beside its folder.
sys.path.insert(0, str(HERE.parent))

from excise.catalogue import Entry, catalogue  # noqa: E402
from excise.registry import ARMS, FOLDERS, Kind  # noqa: E402

FAMILIES = ("behavioural", "elicitation", "intrinsic")


# mkdocs


def on_config(config: Any) -> Any:
    """Globs of the navigation become pages; formulas are drawn."""
    known = {p.relative_to(HERE).as_posix() for p in HERE.rglob("*.md")}
    known |= {f"{FOLDERS[kind]}/{name}.md" for kind in ("localizer", "editor") for name in methods(kind)}
    config.nav = list(_expanded(config.nav, known, set(_leaves(config.nav))))
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def on_files(files: Any, config: Any) -> Any:
    """A method without a page of its own gets one from its docstring."""
    for kind in ("localizer", "editor"):
        for name, entry in methods(kind).items():
            uri = f"{FOLDERS[kind]}/{name}.md"
            if files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, content=f"# {name}\n\n{_cell(entry.summary)}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The parts of a page that are read from the code."""
    folder, _, name = page.file.src_uri.removesuffix(".md").rpartition("/")
    markdown = re.sub(r"^<!-- (\w+) ([\w.:]+) -->$", lambda m: DIRECTIVES[m[1]](m[2]), markdown, flags=re.MULTILINE)
    for kind in ("localizer", "editor"):
        entry = methods(kind).get(name) if folder == FOLDERS[kind] else None
        if entry:
            return f"{markdown}\n\n{appendix(kind, entry, 2)}"
    return _family(markdown, name) if folder == "evals" and name in FAMILIES else markdown


def _leaves(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else nav.values():
        if isinstance(item, str):
            yield item
        else:
            yield from _leaves(item)


def _expanded(nav: list[Any], known: set[str], named: set[str]) -> Iterator[Any]:
    for item in nav:
        if isinstance(item, dict):
            yield {title: list(_expanded(v, known, named)) for title, v in item.items()}
        elif "*" in item:
            depth = item.count("/")
            found = sorted(p for p in known - named if fnmatch(p, item) and p.count("/") == depth)
            named.update(found)
            yield from found
        elif item in known:
            yield item


def formula(source: str, *_: Any, **__: Any) -> str:
    """A block of LaTeX, one formula a paragraph, as MathML."""
    lines = [line.strip() for line in re.split(r"\n\s*\n|\\\\\n", source) if line.strip()]
    return f'<div class="formula">{"".join(convert(line, display="block") for line in lines)}</div>'


# methods


@functools.cache
def methods(kind: Kind) -> dict[str, Entry]:
    """The registered methods of a kind, read from their files."""
    return {entry.name: entry for entry in catalogue(kind)}


def appendix(kind: Kind, entry: Entry, level: int) -> str:
    """What a method's docstring adds, its options, the measured rows that name it, and where its signature is."""
    mark, parts = "#" * level, []
    if kind == "evaluation":
        parts.append(prose(entry))
    if entry.options:
        parts.append(f"{mark} Options of {entry.name}\n\n{options_table(entry)}")
    rows = measured(entry.name) if kind != "evaluation" else ""
    if rows:
        parts.append(f"{mark} Measured\n\n{rows}")
    module = entry.path.removesuffix(".py").replace("/", ".")
    parts.append(f"[Signature](../api/{FOLDERS[kind]}.md#{module}.{entry.name}) · file `{entry.path}`")
    return "\n\n".join(parts)


def prose(entry: Entry) -> str:
    """What a docstring says beyond its first line and its options."""
    told = "|".join([*(o.name for o in entry.options), *ARMS])
    lines = [line for line in entry.doc.split("\n")[1:] if not line.startswith("    ")]
    return escaped("\n".join(line for line in lines if not re.match(rf"({told}): ", line)).strip())


def options_table(entry: Entry) -> str:
    """The keyword options of a method with their defaults and what its docstring says of them."""
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for option in entry.options:
        lines.append(f"| `{option.name}` | {_code(_default(option.default))} | {_cell(option.help)} |")
    return "\n".join(lines)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|")


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _family(markdown: str, family: str) -> str:
    """Sections of a family's evaluations, each with its options; those without a text of their own show their docstring."""
    entries = {name: e for name, e in methods("evaluation").items() if e.family == family}
    head, *sections = re.split(r"^(?=## )", markdown, flags=re.MULTILINE)
    found = [head]
    for section in sections:
        heading, _, written = section.partition("\n")
        entry = entries.pop(heading.removeprefix("## ").strip(), None)
        found.append(_section(entry, written) if entry else section)
    found += [_section(entry) for entry in entries.values()]
    return "".join(found)


def _section(entry: Entry, written: str = "") -> str:
    return f"## {entry.name}\n\n{_cell(entry.summary)}\n\n{written.strip()}\n\n{appendix('evaluation', entry, 3)}\n\n"


def methods_table(kind: str) -> str:
    """All methods of a kind, a line each, linked to their pages."""
    rows = []
    for name, entry in methods(kind).items():  # type: ignore[arg-type]
        page = f"{entry.family}.md#{name}" if kind == "evaluation" else f"{name}.md"
        rows.append(f"| [{name}]({page}) | {_cell(entry.summary)} |")
    return "\n".join(["| method | what comes back |", "|---|---|", *rows])


def measured(name: str) -> str:
    """The rows of our measured tables that are about a method, under the heading of their table."""
    found = []
    for path in sorted(HERE.glob("*.md")):
        heading, header = "", []
        for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
            if line.startswith("#"):
                heading = line.lstrip("# ")
            if not line.startswith("|"):
                header = []
            elif len(header) < 2:
                header.append(line)
            elif re.match(rf"\|\s*`?{name}`?(\W|$)", line):
                title = f"[{path.stem.replace('_', ' ')}](../{path.name}): {heading}"
                if not found or found[-1][0] != (title, header):
                    found.append(((title, header), []))
                found[-1][1].append(line)
    return "\n\n".join(f"{title}\n\n" + "\n".join([*header, *rows]) for (title, header), rows in found)


# reference


def public_names(package: str) -> str:
    """Every public name of a package, documented."""
    home = importlib.import_module(package)
    found = []
    for name in home.__all__:
        thing = getattr(home, name)
        found.append(f"::: {inspect.unwrap(thing).__module__}.{name}")
    return "\n\n".join(found)


def module(name: str) -> str:
    """Everything public in a module, but for what the page of `excise` has: links need one target."""
    home = importlib.import_module("excise")
    there = [n for n in home.__all__ if inspect.unwrap(getattr(home, n)).__module__ == name]
    filters = json.dumps(["!^_", *(f"!^{n}$" for n in there)])
    return f"::: {name}\n    options:\n      show_root_full_path: true\n      filters: {filters}\n"


def names(source: str) -> str:
    """TransformerLens names of one block of a model and of what surrounds the blocks, with the modules that they mean."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from excise.names import Names
    from excise.testbed import model_folder

    config = AutoConfig.from_pretrained(model_folder(source.removeprefix("testbed:")))
    with torch.device("meta"):
        known = Names(AutoModelForCausalLM.from_config(config))
    seen: dict[tuple[str, str], list[str]] = {}
    for name in (n for n in known.points() if _shown(n, ".hook_")):
        tap = known.tap(name)
        side = {"in": "its input", "out": "its output", "neurons": "inside it, per expert"}[tap.side]
        seen.setdefault((tap.module, side), []).append(f"`{name}`")
    for name in (n for n in known.weights() if _shown(n, ".W_")):
        weight = known.weight(name)
        part = " (a slice)" if weight.expert is not None or weight.part else ""
        what = f"the parameter, {'transposed' if weight.transposed else 'as stored'}{part}"
        seen.setdefault((weight.parameter, what), []).append(f"`{name}`")
    rows = [f"| {', '.join(found)} | `{place}` | {what} |" for (place, what), found in seen.items()]
    return "\n".join(["| names | in transformers | what |", "|---|---|---|", *rows])


def _shown(name: str, leaf: str) -> bool:
    """One block and one expert stand for all; names of outside the blocks have no number."""
    inside = re.match(r"blocks\.(\d+)\.(?:mlp\.experts\.(\d+)\.)?", name)
    return (leaf in f".{name}") and (inside is None or (inside[1] == "1" and inside[2] in (None, "0")))


DIRECTIVES = {"methods": methods_table, "public": public_names, "module": module, "names": names}


class Listed(griffe.Extension):
    """Lines `name: text` of a docstring, our way of saying what an option or a field is, become a list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite a docstring in place."""
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(doc: str) -> str:
    """A docstring in which each run of `name: text` lines is a Markdown list."""
    found: list[str] = []
    for line in doc.splitlines():
        item = re.match(r"(\w+): (.+)", line)
        if item:
            # A list needs an empty line before it.
            if found and found[-1] and not found[-1].startswith(("- ", "  ")):
                found.append("")
            line = f"- `{item[1]}`: {item[2]}"
        found.append(line)
    return escaped("\n".join(found))


def escaped(text: str) -> str:
    """Shapes and formulas outside code are no links, emphasis or tags."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(r"([\[*<])", r"\\\1", part) for i, part in enumerate(parts))
