"""The registry: `@localizer`, `@editor`, `@evaluation` name a function as a method and stamp its recipe on the result.

The keyword-only parameters of a method are its options: their annotations and defaults become command-line flags, their
docstring lines become help, their values become provenance. Nothing here imports a method folder before it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast, get_args, get_origin

# Keyword parameters of an evaluation that are other arms, handed over by whoever measures; not options.
ARMS = ("before", "oracle")
# Longest list of option values that a recipe spells out.
LONG = 32
Kind = Literal["localizer", "editor", "evaluation"]
Family = Literal["behavioural", "elicitation", "intrinsic"]
# A decorated function keeps its type, so that editors complete its options and type checkers know them.
F = TypeVar("F", bound=Callable[..., Any])
FOLDERS: dict[Kind, str] = {"localizer": "localize", "editor": "edit", "evaluation": "evals"}
LEADING: dict[Kind, tuple[str, ...]] = {
    "localizer": ("model", "facts"),
    "editor": ("model", "forget", "retain", "where"),
    "evaluation": ("arm", "facts"),
}


@dataclass(frozen=True)
class Option:
    """One keyword-only parameter of a method."""

    name: str
    default: Any
    annotation: str
    help: str


@dataclass(frozen=True)
class Method:
    """A registered method: its kind, name, function and options; an evaluation also has a family."""

    kind: Kind
    name: str
    function: Callable[..., Any]
    options: tuple[Option, ...]
    summary: str
    family: str = ""


_METHODS: dict[tuple[Kind, str], Method] = {}


def localizer(function: F) -> F:
    """Register `(model, facts, *, options) -> Localization`."""
    return _register("localizer", function)


def editor(function: F) -> F:
    """Register `(model, forget, retain, where, *, options) -> Edit`."""
    return _register("editor", function)


def evaluation(family: Family) -> Callable[[F], F]:
    """Register `(arm, facts, *, options) -> list of Score`; a signature with `before` or `oracle` is handed that arm.

    `oracle` is None where there is none.
    family: what it looks at. "behavioural": what the model says when asked; "elicitation": what it says under attack;
    "intrinsic": what is readable inside it.
    """

    def register(function: F) -> F:
        return _register("evaluation", function, family)

    return register


def _register(kind: Kind, function: F, family: str = "") -> F:
    signature = inspect.signature(function)
    leading = tuple(p.name for p in signature.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY)
    if leading != LEADING[kind]:
        raise TypeError(
            f"{kind} {function.__name__} takes ({', '.join(leading)}); it must take ({', '.join(LEADING[kind])})"
        )
    name = function.__name__

    @functools.wraps(function)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not hasattr(result, "recipe"):
            return result
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        options = {o.name: _plain(bound.arguments[o.name]) for o in made.options}
        return replace(result, recipe={"method": name, **options, **result.recipe})

    summary = (inspect.getdoc(function) or "").split("\n")[0]
    made = Method(kind, name, recorded, tuple(_options(function, signature)), summary, family)
    _METHODS[kind, name] = made
    return cast(F, recorded)


def _options(function: Callable[..., Any], signature: inspect.Signature) -> list[Option]:
    doc = inspect.getdoc(function) or ""
    found = []
    for parameter in signature.parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name in ARMS:
            continue
        annotation = _annotation(function, parameter.annotation)
        found.append(Option(parameter.name, parameter.default, annotation, help_of(doc, parameter.name)))
    return found


def _annotation(function: Callable[..., Any], annotation: Any) -> str:
    """The annotation as text; a name given to a Literal is spelled out, so that the choices are known."""
    if not isinstance(annotation, str):
        return getattr(annotation, "__name__", "str")
    value = inspect.unwrap(function).__globals__.get(annotation)
    return f"Literal[{', '.join(map(repr, get_args(value)))}]" if get_origin(value) is Literal else annotation


def help_of(doc: str, option: str) -> str:
    """What a method's docstring says about one of its options."""
    line = re.search(rf"^\s*{option}: (.+(?:\n\s{{4,}}.+)*)", doc, re.MULTILINE)
    return re.sub(r"\s+", " ", line[1]).strip() if line else ""


def _plain(value: Any) -> Any:
    """A JSON-safe stand-in for an option value."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        if len(value) > LONG:  # a corpus is provenance, not cargo
            return {"count": len(value), "sha256": hashlib.sha256(repr(value).encode()).hexdigest()[:16]}
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return f"<{type(value).__name__}>"


def methods(kind: Kind) -> dict[str, Method]:
    """All methods of a kind by name; imports that method folder."""
    importlib.import_module(FOLDERS[kind])
    return {name: m for (k, name), m in sorted(_METHODS.items()) if k == kind}


def method(kind: Kind, name: str) -> Method:
    """The method called `name` (dashes count as underscores); raises ValueError with near names."""
    known = methods(kind)
    found = known.get(name.replace("-", "_"))
    if found is None:
        import difflib

        near = difflib.get_close_matches(name.replace("-", "_"), known, n=3) or sorted(known)
        raise ValueError(f"no {kind} {name!r}; did you mean {', '.join(near)}?")
    return found


def family(name: str) -> str:
    """The family of an evaluation; "" for one that is not registered."""
    found = methods("evaluation").get(name)
    return found.family if found else ""
