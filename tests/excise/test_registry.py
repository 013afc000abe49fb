"""The registry: recipes, options, and what it refuses."""

import inspect
from collections.abc import Callable
from typing import get_type_hints

import pytest

from excise import registry
from excise.edits import Edit


def test_recipe_carries_the_options_and_what_the_method_reports(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {})

    @registry.editor
    def cut(
        model, forget, retain, where, *, strength: float = 0.5, names: tuple = ("a",), texts: object = None
    ) -> Edit:
        """Cut it.

        strength: how much
            of it.
        """
        return Edit((), {"model": model, "texts": "reported"})

    edit = cut("m", [], [], None, strength=2.0)
    assert edit.recipe == {"method": "cut", "strength": 2.0, "names": ["a"], "texts": "reported", "model": "m"}
    options = {o.name: o for o in registry._METHODS["editor", "cut"].options}
    assert (
        options["strength"].help == "how much of it."
        and options["strength"].annotation == "float"
        and options["strength"].default == 0.5
    )
    assert registry._METHODS["editor", "cut"].summary == "Cut it."


def test_a_method_keeps_its_signature_for_editors_and_type_checkers():
    import edit

    assert {"where", "copies", "seed"} <= inspect.signature(edit.rocr).parameters.keys()
    for decorator in (registry.localizer, registry.editor):
        hints = get_type_hints(decorator)
        assert hints["function"] is hints["return"] is registry.F
    assert get_type_hints(registry.evaluation)["return"] == Callable[[registry.F], registry.F]


def test_wrong_parameters_are_refused():
    with pytest.raises(TypeError, match="must take"):
        registry.editor(lambda model, facts: None)


def test_look_up_by_name_suggests_near_ones():
    assert registry.method("editor", "rocr").function.__name__ == "rocr"
    assert registry.method("localizer", "causal-trace").name == "causal_trace"
    with pytest.raises(ValueError, match="causal_trace"):
        registry.method("localizer", "causal_tracing")
