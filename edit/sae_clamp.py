"""SAE clamping: features that fire on what is to be forgotten are forced to a negative value wherever they fire.

A guard on a hook, not a removal: the knowledge stays in the weights, and so does what the dictionary does not explain.
One engine for three published forms: static clamp of each firing feature (Farrell, Lau, Conmy, arXiv 2410.19278; gate
"none", mask "feature"), dynamic guardrail (Muhamed et al., arXiv 2504.08192; gate "share", mask "token") and ablation.
Beyond them: delta form (bits stay where nothing fires), gates that are causal and keep their state between decoding steps,
thresholds at a stated false-positive rate, features dealt among the subjects, and a gate that asks for several features of
one subject (`quorum`), because a text about somebody else has one of them now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from excise.actions import Clamp
from excise.checks import whole_fingerprints
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.gates import Gate
from excise.model import Model
from excise.registry import editor
from excise.requests import groups
from excise.scores import Localization
from excise.sites import Site
from sae.detect import members, quorum_gate, share_gate
from sae.dictionary import Dictionary
from sae.match import Match, check
from sae.own import features_in, of_model
from sae.reading import Text, after
from sae.select import ranked, shared_out
from sae.statistics import FeatureStats, grouped, statistics

ACTIONS = ("clamp", "ablate", "scale")
MASKS = ("all", "token", "feature")
GATES = ("quorum", "share", "none")


@editor
def sae_clamp(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    dictionary: str = "",
    select: Literal["sparsity", "importance", "attribution", "difference"] = "importance",
    features: int = 32,
    most: float = 0.01,
    action: Literal["clamp", "ablate", "scale"] = "clamp",
    value: float = 5.0,
    mask: Literal["all", "token", "feature"] = "all",
    gate: Literal["quorum", "share", "none"] = "quorum",
    fpr: float = 0.01,
    window: int = 16,
    explained: float = 0.5,
    texts: Sequence[str] | None = None,
) -> Edit:
    """An edit that clamps the dictionary features of the forget facts while the model runs.

    dictionary: a sae-lens folder, release:sae_id, or testbed:dense (in Python a `Dictionary`, too); left out, the embedded
        one of an embedded model.
    select: sparsity, importance, attribution or difference (sae.select); features that `where` names win over it.
    features: how many features, dealt in turn among the subjects.
    most: share of retain tokens on which a chosen feature may fire at most.
    action: clamp to a negative value, ablate (to zero), or scale.
    value: clamp: minus so many times the feature's mean activation on the forget text; scale: the factor.
    mask: feature changes those that fire, token all of them wherever one fires, all does so on every token from where the
        gate has opened (without a gate: as token).
    gate: quorum: act once enough of one subject's features have fired; share: once enough tokens have; none: always.
    fpr: share of retain texts on which the gate may open.
    window: tokens over which the gate counts; 0 for the sequence so far.
    explained: least share of variance that the dictionary must explain in this model.
    texts: ordinary text to keep, beside the retain facts.

    Raises ExciseError when there is nothing to forget, no dictionary, or no feature that fires on the forget facts only;
    FingerprintMismatch for a dictionary of another model.
    """
    _options(action, mask, gate)
    facts, kept = groups(forget, retain)
    book = of_model(model, dictionary, where)
    asked, owner = _asked(facts)
    halves = _halves(kept, texts or ())
    if not halves[0]:
        raise ExciseError("clamping needs text to keep: give retain facts or texts=[...]")
    match = check(book, model, [*asked[:64], *halves[0][:64]], least=explained)
    by_subject = grouped(model, book, asked, owner, max(owner) + 1)
    ordinary, total = statistics(model, book, halves[0]), _sum(by_subject)
    chosen = features_in(where, book) or shared_out(
        ranked(select, model, book, asked, owner, by_subject, ordinary, most=most), features
    )
    if not chosen:
        raise ExciseError(
            f"no feature of {book.name} fires on the forget facts and on fewer than {most:g} of the retain tokens: "
            "raise most, or take another layer's dictionary"
        )
    act = _action(book, chosen, total, action, value, "token" if (gate, mask) == ("none", "all") else mask)
    opened, report = _gate(model, book, gate, chosen, asked, owner, halves, fpr=fpr, window=window)
    recipe = {"model": model.name, **_described(book, match, act, chosen, total, ordinary), "gate": report}
    return Edit((Change(Site(book.hook, "after_bos"), act, opened),), recipe, whole_fingerprints(model))


def _described(
    book: Dictionary, match: Match, act: Clamp, chosen: list[int], forget: FeatureStats, retain: FeatureStats
) -> dict[str, Any]:
    """What the recipe says of the dictionary and of the features that were chosen."""
    return {
        "dictionary": {"name": book.name, "fingerprint": book.fingerprint, "hook": book.hook},
        "match": {"explained": match.explained, "l0": match.l0, "same weights": match.same_weights},
        "chosen": chosen,
        "clamped to": [float(v) for v in act.value] if act.mode == "clamp" else [],
        "forget rate": [float(forget.rate[i]) for i in chosen],
        "retain rate": [float(retain.rate[i]) for i in chosen],
    }


def _gate(
    model: Model,
    book: Dictionary,
    kind: str,
    chosen: Sequence[int],
    asked: Sequence[Text],
    owner: Sequence[int],
    halves: tuple[list[Text], list[Text]],
    **options: Any,
) -> tuple[Gate | None, dict[str, Any]]:
    """The gate of that kind and what was measured of it."""
    if kind == "none":
        return None, {}
    if kind == "share":
        return share_gate(model, book, chosen, asked, halves[1], **options)
    return _quorum(model, book, asked, owner, halves, **options)


def _quorum(
    model: Model,
    book: Dictionary,
    asked: Sequence[Text],
    owner: Sequence[int],
    halves: tuple[list[Text], list[Text]],
    **options: Any,
) -> tuple[Gate, dict[str, Any]]:
    """A quorum gate of the subjects' own features; raises ExciseError where no subject has any."""
    # A name in the middle of other text fires its features more weakly: read so, too, on both sides.
    seen, passing = (_twice(model, half, half) for half in halves)
    known = members(model, book, _twice(model, asked, halves[0]), [*owner, *owner], seen)
    unknown = sorted(set(owner) - set(known.group))
    if len(unknown) == max(owner) + 1:
        raise ExciseError(
            f"no feature of {book.name} fires on most prompts of a subject to be forgotten and rarely elsewhere: take "
            "gate=share or none, or another layer's dictionary"
        )
    gate, report = quorum_gate(model, book, known, asked, passing, **options)
    return gate, report | {"features": known.features, "group": known.group, "subjects without features": len(unknown)}


def _twice(model: Model, texts: Sequence[Text], fillers: Sequence[Text]) -> list[Text]:
    """The texts, alone and after others."""
    return [*texts, *after(model, texts, fillers[::-1])]


def _halves(retain: Facts, texts: Sequence[str]) -> tuple[list[Text], list[Text]]:
    """What features are chosen on and what the gate is calibrated on: no subject is in both, since who is met later is
    neither."""
    subjects = list(dict.fromkeys(f.subject or f.id for f in retain))
    second = set(subjects[1::2])
    halves: tuple[list[Text], list[Text]] = ([], [])
    for fact in retain:
        halves[(fact.subject or fact.id) in second].extend(fact.ask(held_out=False))
    halves[0].extend(texts[::2])
    halves[1].extend(texts[1::2])
    both = [*halves[0], *halves[1]]
    return (halves[0] or both, halves[1] or both)


def _action(
    book: Dictionary, chosen: Sequence[int], forget: FeatureStats, action: str, value: float, mask: str
) -> Clamp:
    if action == "clamp":
        # A feature that `where` names may never fire on these facts; its value does not matter then.
        return book.clamp(chosen, -value * forget.strength[list(chosen)].float(), mask=mask)
    return book.clamp(chosen, 0.0 if action == "ablate" else value, mode="scale", mask=mask)


def _asked(facts: Facts) -> tuple[list[Text], list[int]]:
    """Every prompt that is not held out, and the number of its subject."""
    names = [f.subject or f.relation for f in facts]  # exercises of a skill have no subject
    subjects = list(dict.fromkeys(names))
    pairs = [
        (p, subjects.index(n)) for f, n in zip(facts, names, strict=True) for p in f.ask(held_out=False) or f.ask()
    ]
    return [p for p, _ in pairs], [i for _, i in pairs]


def _sum(parts: Sequence[FeatureStats]) -> FeatureStats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _options(action: str, mask: str, gate: str) -> None:
    given = {"action": (action, ACTIONS), "mask": (mask, MASKS), "gate": (gate, GATES)}
    for name, (word, words) in given.items():
        if word not in words:
            raise ValueError(f"{name} {word!r}: choose {', '.join(words)}")
