"""Which dictionary goes with a model, and which features a localization names."""

from __future__ import annotations

from excise.errors import ExciseError
from excise.model import Model
from excise.scores import Localization
from sae.dictionary import ACTS, Dictionary
from sae.load import embedded, load


def of_model(model: Model, source: str | Dictionary = "", where: Localization | None = None) -> Dictionary:
    """The dictionary that `source` names; without one the embedded dictionary of an embedded model.

    Raises ExciseError when there is none, or when `where` names features of another hook.
    """
    if not source and model.name not in embedded():
        raise ExciseError(
            f"no dictionary for {model.name}: give dictionary=<sae-lens folder, release:sae_id or "
            f"{' or '.join(embedded())}>, or train one with sae.train"
        )
    book = load(source or model.name).to(model.device)
    named = sorted({h for h in _hooks(where)} - {book.hook})
    if named:
        raise ExciseError(f"the features to clamp are of {', '.join(named)}, and {book.name} reads {book.hook}")
    return book


def features_in(where: Localization | None, book: Dictionary) -> list[int]:
    """Numbers of the features that a localization names, in its order; none when it names other sites."""
    sites = [] if where is None else where.sites
    return [s.unit for s in sites if s.point == f"{book.hook}.{ACTS}" and s.unit is not None]


def _hooks(where: Localization | None) -> list[str]:
    sites = [] if where is None else where.sites
    return [s.point.removesuffix(f".{ACTS}") for s in sites if s.point.endswith(f".{ACTS}")]
