"""Check that `localize`, `edit`, `sae` and `evals` are ours: the names are general, others use them too."""

from __future__ import annotations

import functools
import importlib.util
from importlib import metadata
from pathlib import Path

from excise.errors import ExciseError

FOLDERS = ("localize", "edit", "sae", "evals")


@functools.cache
def check_folders() -> None:
    """Raise ExciseError naming the distribution that shadows one of our folders; looks once, imports none of them."""
    home = Path(__file__).resolve().parent.parent
    for name in FOLDERS:
        found = _location(name)
        if found is None:
            raise ExciseError(f"the folder {name}/ is missing beside {home / 'excise'}; install excise again")
        if found.parent != home:
            raise ExciseError(
                f"{name}: Python finds {_owner(name)} at {found} instead of excise's own folder; "
                "install excise in a virtual environment of its own, or uninstall that distribution"
            )


def _location(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    if spec.origin and spec.origin != "namespace":
        file = Path(spec.origin).resolve()
        return file.parent if file.name == "__init__.py" else file
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None


def _owner(name: str) -> str:
    owners = [o for o in metadata.packages_distributions().get(name, []) if o != "excise"]
    return f"the distribution {owners[0]!r}" if owners else "another package of that name"
