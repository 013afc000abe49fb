"""Features of a sparse dictionary that go with a fact and not with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.model import Model
from excise.registry import localizer
from excise.scores import Localization
from sae.dictionary import Dictionary
from sae.match import check
from sae.own import of_model
from sae.reading import Text
from sae.select import ranked, shared_out
from sae.statistics import FeatureStats, grouped, statistics


@localizer
def sae_features(
    model: Model,
    facts: Sequence[Fact],
    *,
    dictionary: str = "",
    rule: Literal["sparsity", "importance", "attribution", "difference"] = "sparsity",
    features: int = 32,
    most: float = 0.01,
    explained: float = 0.5,
    retain: Facts | None = None,
    texts: Sequence[str] | None = None,
) -> Localization:
    """Scores of the dictionary features that belong to each fact: sites `blocks.i.hook_resid_post.hook_sae_acts_post#j`.

    The score of a feature for a fact is that of the rule over the fact's prompts (no special tokens); 0 where the rule
    excludes it. Directions are the features' decoder rows.
    dictionary: a sae-lens folder, release:sae_id, or testbed:dense (in Python a `Dictionary`, too); left out, the embedded
        one of an embedded model.
    rule: sparsity, importance, attribution or difference (sae.select).
    features: how many features, dealt in turn among the facts to be forgotten.
    most: share of retain tokens on which a chosen feature may fire at most.
    explained: least share of variance that the dictionary must explain in this model.
    retain: facts to tell apart from; left out, those of `facts` that are not to be forgotten, or, where all are, for each
        subject the other subjects.
    texts: ordinary text to tell apart from, too.

    Raises ExciseError when there is no dictionary or nothing to tell the facts apart from; FingerprintMismatch for a
    dictionary of another model.
    """
    asked = Facts(facts)
    if not len(asked):
        raise ExciseError("no facts to localize")
    book = of_model(model, dictionary)
    prompts: list[Text] = [p for f in asked for p in _open(f)]
    owner = [i for i, f in enumerate(asked) for _ in _open(f)]
    check(book, model, prompts[:128], least=explained)
    by_fact = grouped(model, book, prompts, owner, len(asked))
    others = _others(model, book, asked, by_fact, retain, texts)
    scores = ranked(rule, model, book, prompts, owner, by_fact, others, most=most)
    sought = [i for i, f in enumerate(asked) if f.group == "forget"] or list(range(len(asked)))
    chosen = shared_out(scores[sought], features)
    found = scores[:, chosen].clamp_min(0.0).numpy()  # what a rule excludes is -inf
    return Localization(
        tuple(book.site(j) for j in chosen),
        found,
        tuple(f.id for f in asked),
        {
            "model": model.name,
            "dictionary": {"name": book.name, "fingerprint": book.fingerprint, "hook": book.hook},
            "retain tokens": max(o.tokens for o in others),
        },
        directions=np.ascontiguousarray(book.decoder[chosen].cpu().numpy()) if chosen else None,
    )


def _open(fact: Fact) -> list[Text]:
    """The prompts that are not held out; all where all are."""
    return list(fact.ask(held_out=False) or fact.prompts)


def _others(
    model: Model,
    book: Dictionary,
    facts: Facts,
    by_fact: Sequence[FeatureStats],
    retain: Facts | None,
    texts: Sequence[str] | None,
) -> list[FeatureStats]:
    """For each fact the sums over what it is to be told apart from."""
    kept = retain if retain is not None else facts.where(lambda f: f.group != "forget")
    apart: list[Text] = [*(p for f in kept for p in _open(f)), *(texts or ())]
    common = statistics(model, book, apart) if apart else None
    found = []
    for fact in facts:
        rest = [] if len(kept) else [s for s, f in zip(by_fact, facts, strict=True) if f.subject != fact.subject]
        parts = [*([common] if common is not None else []), *rest]
        if not parts:
            raise ExciseError(
                f"nothing to tell {fact.subject or fact.id} apart from: give facts of others, retain or texts"
            )
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        found.append(total)
    return found
