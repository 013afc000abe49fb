"""Export of an edit as lm-eval's steering table, with the directions that it names."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from excise.actions import Affine
from excise.checkpoint import new_folder, record
from excise.checks import check
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.outline import thin

if TYPE_CHECKING:
    from excise.model import Model

# Singular values below this share of the largest are rounding.
NOISE = 1e-6
# How near a change must be to an exact projection to be written as one.
CLOSE = 1e-4
# The table's columns, as lm-eval 0.4.13 documents them; sparse_model is a folder in the format of `sparsify`.
COLUMNS = (
    "loader", "action", "sparse_model", "hookpoint", "feature_index", "steering_coefficient", "head_index", "sae_id",
    "description",
)  # fmt: skip
TABLE, DIRECTIONS = "steering.csv", "directions"


def export_steering(model: Model, edit: Edit, folder: str | Path, *, force: bool = False) -> Path:
    """Write `steering.csv` for `lm_eval --model steered`, and the directions it names, in the format of `sparsify`.

    The table knows two actions. "clamp" sets the component along a direction d: x gains (value - (x - centre) . d) d, which
    is an `Affine` with left = -right^T of unit norm. "add" is a constant shift, but from a table lm-eval (0.4.13) also reads
    a bias and then refuses to add; its other form is a file of Python objects, which excise does not write. So edits must be clamps, one per
    place, at every token. Raises ExciseError for all others.
    """
    check(model, edit, force=force)
    places = [_clamp(model, change) for change in edit.changes]
    points = [p.hookpoint for p in places]
    if not places or len(set(points)) < len(points):
        raise ExciseError(
            "lm-eval steers each place by one direction; this edit has "
            + ("none" if not places else "several at one place")
        )
    with new_folder(folder) as temporary:
        for place in places:
            _write_direction(temporary / DIRECTIONS / place.hookpoint, place)
        with (temporary / TABLE).open("w", newline="", encoding="utf-8") as opened:
            table = csv.DictWriter(opened, COLUMNS)
            table.writeheader()
            for p in places:
                home = str(Path(folder).resolve() / DIRECTIONS)
                table.writerow({
                    "loader": "sparsify", "action": "clamp", "sparse_model": home, "hookpoint": p.hookpoint,
                    "feature_index": 0, "steering_coefficient": p.value, "description": p.site,
                })  # fmt: skip
        (temporary / "excise.json").write_text(record(model, edit), encoding="utf-8")
    return Path(folder)


@dataclass(frozen=True)
class Clamped:
    """One place: the component of x - centre along the unit vector `direction` becomes `value`."""

    site: str
    hookpoint: str
    direction: Tensor
    centre: Tensor
    value: float


def _clamp(model: Model, change: Change) -> Clamped:
    site, action = change.site, change.action
    if change.site.is_weight or not isinstance(action, Affine) or change.gate is not None:
        what = "is a gated change" if change.gate is not None else f"is a {action.kind} change"
        raise ExciseError(f"{site}: {what}; lm-eval's table holds clamped directions alone, without gate")
    if site.position == "after_bos":
        raise ExciseError(f"{site}: leaves BOS alone, and lm-eval steers every token; make the edit for all tokens")
    u, s, v = (torch.from_numpy(t) for t in thin((action.left.double().numpy(), action.right.double().numpy())))
    if not len(s):
        raise ExciseError(
            f"{site}: a constant shift; from a table lm-eval refuses to add (it reads a bias with it), and its other form "
            "is a file of Python objects, which excise does not write"
        )
    direction, along = v[0], action.shift.double() @ v[0]
    projects = len(s[s > NOISE]) == 1 and abs(float(s[0]) - 1) < CLOSE and float(u[:, 0] @ v[0]) < CLOSE - 1
    if not projects or float((action.shift.double() - along * direction).norm()) > CLOSE * (1 + abs(float(along))):
        raise ExciseError(f"{site}: is not the clamp of one direction, which is all that lm-eval's table can say")
    tap = model.names.tap(site.point)
    base = f"{model.hf.base_model_prefix}."
    if tap.side != "out" or not tap.module.startswith(base):
        raise ExciseError(
            f"{site}: lm-eval steers what a module of {base[:-1]} puts out; use hook_resid_post or hook_mlp_out"
        )
    return Clamped(str(site), tap.module.removeprefix(base), direction, action.centre.double(), float(along))


def _write_direction(folder: Path, place: Clamped) -> None:
    """A dictionary of one feature whose decoder is the direction and whose bias is the centre."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    d = len(place.direction)
    decoder = place.direction.float()[None]
    tensors = {
        "encoder.weight": decoder.clone(),
        "encoder.bias": torch.zeros(1),
        "W_dec": decoder,
        "b_dec": place.centre.float(),
    }
    save_file(tensors, folder / "sae.safetensors")
    config = {
        "d_in": d,
        "num_latents": 1,
        "k": 1,
        "activation": "topk",
        "normalize_decoder": True,
        "expansion_factor": 1,
    }
    (folder / "cfg.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
