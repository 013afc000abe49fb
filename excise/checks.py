"""Whether a model can carry an edit, and the fingerprints by which an edit knows the weights that it was made for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from excise.actions import Dense, LowRank, Scale, Sparse, WeightAction
from excise.edits import Change, Edit
from excise.errors import ExciseError, FingerprintMismatch

if TYPE_CHECKING:
    from excise.model import Model


def fingerprints(model: Model, changes: Iterable[Change] = ()) -> dict[str, str]:
    """What an edit keeps of the weights it was computed on: the tokenizer and the matrices that the changes write."""
    matrices = {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes if c.site.is_weight}
    return {"tokenizer": model.tokenizer_fingerprint, **matrices}


def whole_fingerprints(model: Model) -> dict[str, str]:
    """The same for an edit of activations, which rest on all weights."""
    return {"tokenizer": model.tokenizer_fingerprint, "model": model.fingerprint}


def check(model: Model, edit: Edit, *, force: bool = False) -> None:
    """Refuse an edit that this model cannot carry: unknown sites, offloaded or other weights, gates that come too late."""
    for change in edit.changes:
        if change.site.is_weight:
            if model.names.is_offloaded(change.site.point):
                raise ExciseError(
                    f"{change.site}: its weights are offloaded, so a change would be lost; load the model without offload"
                )
        else:
            model.names.tap(change.site.point)
        if isinstance(change.action, WeightAction):
            _check_shape(model, change.site.point, change.action)
        if change.gate is not None:
            _check_order(model, change)
    if not force:
        _check_fingerprints(model, edit)


def _check_shape(model: Model, name: str, action: WeightAction) -> None:
    """Refuse a change of a matrix of another shape."""
    d_in, d_out = model.weight(name).shape
    match action:
        case LowRank(left=left, right=right):
            fits = (left.shape[0], right.shape[1]) == (d_in, d_out)
        case Dense(change=full):
            fits = full.shape == (d_in, d_out)
        case Sparse(indices=places):
            fits = _within(places, d_in * d_out)
        case Scale(units=units, side=side):
            fits = _within(units, d_in if side == "in" else d_out)
        case _:
            fits = True
    if not fits:
        raise ExciseError(
            f"{name}: a matrix [{d_in}, {d_out}] in {model.name}, and the edit's {action.kind} change is for another shape; "
            "load the model that the edit was made for"
        )


def _within(index: Tensor, size: int) -> bool:
    return not len(index) or (int(index.min()) >= 0 and int(index.max()) < size)


def _check_order(model: Model, change: Change) -> None:
    assert change.gate is not None
    model.names.tap(change.gate.site.point)
    acts_at = change.site.point if not change.site.is_weight else model.names.weight(change.site.point).reads
    order = {name: i for i, name in enumerate(model.names.points())}
    if acts_at in order and order[change.gate.site.point] > order[acts_at]:
        raise ExciseError(
            f"{change.site}: its gate reads {change.gate.site}, which the forward pass reaches only later; move the gate to an earlier site"
        )


def _check_fingerprints(model: Model, edit: Edit) -> None:
    for name, expected in edit.fingerprints.items():
        if name == "tokenizer":
            found = model.tokenizer_fingerprint
        elif name == "model":
            # Baking one edit must not forbid the next: with matrices of its own an edit vouches for those alone.
            if edit.bakeable:
                continue
            found = model.fingerprint
        else:
            found = model.matrix_fingerprint(name)
        if found != expected:
            made_for = edit.recipe.get("model", "another model")
            raise FingerprintMismatch(
                f"this edit was made for {made_for} ({name} {expected}) and not for {model.name} ({name} {found}); "
                "load the model it was made for, or apply it all the same with --force (force=True)"
            )
