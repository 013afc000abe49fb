"""excise: find where a language model keeps a fact, cut it out without training, and measure what is left.

The names below are loaded when they are first used, so importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from excise.apply import applied, bake
    from excise.arms import Arm, compare
    from excise.checkpoint import export
    from excise.edits import Edit
    from excise.errors import ExciseError
    from excise.facts import Fact, Facts, Prompt
    from excise.facts_io import read_facts, write_facts
    from excise.model import Model, load
    from excise.report import write_report
    from excise.scores import Localization, Results, Score
    from excise.sites import Site
    from excise.trace import Trace
    from excise.verification import verify

__version__ = "0.1.0"

_HOME = {
    "Arm": "arms",
    "Edit": "edits",
    "ExciseError": "errors",
    "Fact": "facts",
    "Facts": "facts",
    "Localization": "scores",
    "Model": "model",
    "Prompt": "facts",
    "Results": "scores",
    "Score": "scores",
    "Site": "sites",
    "Trace": "trace",
    "applied": "apply",
    "bake": "apply",
    "compare": "arms",
    "export": "checkpoint",
    "load": "model",
    "read_facts": "facts_io",
    "verify": "verification",
    "write_facts": "facts_io",
    "write_report": "report",
}

__all__ = [
    "Arm",
    "Edit",
    "ExciseError",
    "Fact",
    "Facts",
    "Localization",
    "Model",
    "Prompt",
    "Results",
    "Score",
    "Site",
    "Trace",
    "applied",
    "bake",
    "compare",
    "export",
    "load",
    "read_facts",
    "verify",
    "write_facts",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'excise' has no attribute {name!r}; it has {', '.join(__all__)}")
    from excise.guard import check_folders

    check_folders()
    value = getattr(importlib.import_module(f"excise.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
