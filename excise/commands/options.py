"""Methods on the command line: their names come first, and their options become flags, read from the registry."""

from __future__ import annotations

import argparse
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from excise.registry import Kind, Method, Option


def number(text: str) -> float:
    """A number, for argparse; infinity may mean "no limit", but NaN never means anything."""
    value = float(text)
    if math.isnan(value):
        raise ValueError(text)
    return value


_SCALARS: dict[str, Callable[[str], Any]] = {"int": int, "float": number, "str": str}
_SEQUENCE = re.compile(r"^(?:Sequence|tuple|list|Iterable|frozenset|set)\[(int|float|str)(?:, ?\.\.\.)?\]$")


def chosen_methods(kind: Kind, words: Sequence[str]) -> list[Method]:
    """The methods named right after the command; importing their folder only when there are any."""
    names = []
    for word in words[1:]:
        if word.startswith("-"):
            break
        names.append(word)
    if not names:
        return []
    from excise.registry import method

    return [method(kind, name) for name in names]


def method_flags(parser: argparse.ArgumentParser, methods: Sequence[Method]) -> None:
    """One flag per option of the chosen methods.

    Methods share a flag of the same name. Where the command has such a flag itself, the method's is --METHOD-OPTION,
    except --seed, which is the command's for all.
    """
    own = {flag for action in parser._actions for flag in action.option_strings}
    taken: set[str] = set()
    for method in methods:
        group = parser.add_argument_group(f"options of {method.name.replace('_', '-')}", method.summary)
        for option in method.options:
            flag, settings = flag_of(option), _settings(option)
            if flag is None or settings is None or flag == "--seed" or flag in taken:
                continue
            if flag in own:
                flag = f"--{method.name.replace('_', '-')}-{option.name.replace('_', '-')}"
            taken.add(flag)
            default = (
                ""
                if option.default is None or option.default is inspect.Parameter.empty
                else f" (default {_shown(option.default)})"
            )
            text = f"{option.help}{default}".replace("%", "%%")
            group.add_argument(flag, dest=_dest(flag), default=argparse.SUPPRESS, help=text, **settings)


def given(args: argparse.Namespace, method: Method) -> dict[str, Any]:
    """The options of a method that were set, and the command's seed where the method has one."""
    found = {}
    for option in method.options:
        for name in (option.name, f"{method.name}_{option.name}"):
            if hasattr(args, _dest(name)):
                found[option.name] = getattr(args, _dest(name))
    seeded = any(o.name == "seed" for o in method.options) and hasattr(args, "seed")
    return found | ({"seed": args.seed} if seeded else {})


def _dest(flag: str) -> str:
    # Apart from the command's own attributes, which would otherwise pass for options of the method.
    return "method_" + flag.lstrip("-").replace("-", "_")


def flag_of(option: Option) -> str | None:
    """How the option is typed; None when it can only be given in Python."""
    return None if _settings(option) is None else f"--{option.name.replace('_', '-')}"


def _settings(option: Option) -> dict[str, Any] | None:
    """Keyword arguments for argparse; None for what cannot be typed (models, tensors, functions)."""
    parts = [p.strip() for p in re.split(r"\|(?![^\[]*\])", option.annotation) if p.strip() != "None"]
    if len(parts) != 1:
        scalars = [p for p in parts if p in _SCALARS]
        # int | str: what looks like a number is one.
        return {"type": _number_or_text, "metavar": "VALUE"} if scalars == parts and "str" in parts else None
    kind = parts[0]
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind], "metavar": kind.upper()}
    if kind.startswith("Literal["):
        return {"choices": re.findall(r"['\"]([^'\"]+)['\"]", kind)}
    found = _SEQUENCE.match(kind)
    return {"nargs": "+", "type": _SCALARS[found[1]], "metavar": found[1].upper()} if found else None


def _number_or_text(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
