"""Does a dictionary belong to a model? Hook, width, and whether it can rebuild what it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from excise.errors import ExciseError, FingerprintMismatch
from excise.model import Model
from sae.dictionary import Dictionary
from sae.reading import Text, readings

# Below this share of explained variance a dictionary is not one of this activation. Published ones explain 0.6 and more.
LEAST = 0.5


@dataclass(frozen=True)
class Match:
    """What the check measured. explained: share of variance that the reconstruction explains; l0: features per token;
    tokens: content tokens read; same_weights: whether the model is, to the bit of a sample, the one it was trained on,
    None when the dictionary does not say."""

    explained: float
    l0: float
    tokens: int
    same_weights: bool | None


def check(dictionary: Dictionary, model: Model, texts: Sequence[Text], *, least: float = LEAST) -> Match:
    """Measure how well the dictionary fits the model over `texts`.

    Raises UnknownName (with near names) for a hook that the model does not have, ExciseError for a dictionary that names
    no hook, FingerprintMismatch for another width or when less than `least` of the variance is explained.
    """
    point = resolve(dictionary, model)
    moments = torch.zeros(3, dtype=torch.float64)
    first = torch.zeros(dictionary.d, dtype=torch.float64)
    tokens = 0
    for r in readings(model, texts, point):
        x = r.x[r.counts].float()
        if x.shape[-1] != dictionary.d:
            raise other_width(dictionary, model, x.shape[-1])
        a = dictionary.encode(x)
        error = dictionary.decode(a, x) - x
        moments += torch.tensor([float(x.square().sum()), float(error.square().sum()), float((a > 0).sum())])
        first += x.sum(0).double().cpu()
        tokens += len(x)
    if not tokens:
        raise ExciseError("no text to check the dictionary on: give some that the model reads well")
    variance = float(moments[0] - first.square().sum() / tokens)
    made_on = dictionary.info.get("model_fingerprint")
    match = Match(
        1 - float(moments[1]) / max(variance, 1e-30),
        float(moments[2]) / tokens,
        tokens,
        None if made_on is None else made_on == model.fingerprint,
    )
    if not match.explained >= least:
        raise FingerprintMismatch(
            f"{dictionary.name} explains {match.explained:.2f} of the variance at {point} of {model.name} (at least {least} is "
            f"wanted): it is a dictionary of {dictionary.info.get('model_name') or 'another model'}; take one that was "
            "trained on this model, or train one (sae.train)"
        )
    return match


def other_width(dictionary: Dictionary, model: Model, width: int) -> FingerprintMismatch:
    """The error for a dictionary whose hook is `width` wide in this model."""
    return FingerprintMismatch(
        f"{dictionary.name} reads a width of {dictionary.d}, and {dictionary.hook} of {model.name} is {width} wide; "
        f"it was trained on {dictionary.info.get('model_name') or 'another model'}"
    )


def resolve(dictionary: Dictionary, model: Model) -> str:
    """The dictionary's hook, checked against the model's names."""
    if not dictionary.hook:
        raise ExciseError(
            f"{dictionary.name} does not say which activation it reads: set metadata.hook_name in its cfg.json, "
            "such as blocks.2.hook_resid_post"
        )
    try:
        model.names.tap(dictionary.hook)
    except KeyError as error:
        same = [p for p in model.names.points() if _is(model, p, dictionary.hook)]
        hint = f"; {dictionary.hook} is {same[0]} in TransformerLens names: write that in its cfg.json" if same else ""
        raise type(error)(f"{dictionary.name}: {error}{hint}") from None
    return dictionary.hook


def _is(model: Model, point: str, module: str) -> bool:
    tap = model.names.tap(point)
    return tap.side == "out" and tap.module == module and "hook_resid" in point
