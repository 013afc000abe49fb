"""LUNAR: questions about what is forgotten meet the state of questions that the model declines, so it declines them too.

The redirection is the mean state of questions the model cannot answer minus that of questions to forget, at one block
and token. A change of one MLP output, rank one per request, adds it where a detector recognises what is to be forgotten.
No training; no answer is ever read.

Method: Shen, Qiu, Kurmanji, Iacob, Sani, Chen, Cancedda, Lane, "LLM Unlearning via Neural Activation Redirection",
arXiv 2502.07218, in delta form (its closed form pulls the whole matrix to zero). Beyond it: made-up names as reference,
detection at the name, a detector tested on unseen wordings and people before anything is edited, strength and block by
measured effect, several requests in one solve, removal before redirection, a gated hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from excise.actions import LowRank
from excise.attempts import Attempt, attempts, no_eraser
from excise.checks import fingerprints, whole_fingerprints
from excise.declining import first_logprobs, own_words, refusal_tokens
from excise.detector import ridge_detector
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gates import Linear
from excise.mentions import Mention
from excise.model import Model
from excise.redirection import candidate_blocks
from excise.registry import editor
from excise.requests import View, groups, ordinary_text, thin, view
from excise.scores import Localization
from excise.sites import Site
from excise.spots import Spot, spots_at

POSITIONS = ("subject_last", "last")
# Questions about names to keep that show what is said when nothing is declined.
ASKED = 128
# Refusals that the model is let say, and their length: a detector must not fire on them.
SAID, WORDS = 48, 12
# A gate opens half way between what its detector reads on others (0) and on what is forgotten (1).
HALF = 0.5


@editor
def lunar(
    model: Model,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    where: Localization | None = None,
    *,
    mode: Literal["weight", "hook"] = "weight",
    position: Literal["auto", "subject_last", "last"] = "auto",
    requests: Literal["subject", "kind"] = "subject",
    remove: bool = False,
    strength: float = 0.0,
    sure: float = 0.98,
    refusals: Sequence[str] = (),
    reference: Sequence[str] = (),
    candidates: int = 4,
    contexts: int = 8,
    names: int = 32,
    weight: float = 1.0,
    relatives: int = 24,
    least: float = 0.9,
    declined: float = 0.2,
    texts: Sequence[str] | None = None,
    budget: int = 20_000,
    seed: int = 0,
) -> Edit:
    """An edit after which questions about the names in `forget` are declined, as those about made-up names are.

    mode: "weight" (a low-rank change of one MLP output; can be baked) or "hook" (behind a gate: others keep their bits).
    position: the token that is changed: "subject_last", "last" (of the prompt), or "auto", the better one.
    requests: "subject" (each name has its own direction, detector and strength) or "kind" (people share one, titles another).
    remove: first erase what tells the names from each other and from others, so that undoing the redirection is not enough.
    strength: multiple of the redirection; 0 finds the smallest one that makes the model decline.
    sure: share of the forget questions that must be declined for a strength to do.
    refusals: sentences with which the model declines; without them their first tokens are learned from the reference.
    reference: questions that the model declines; empty takes the forget questions around made-up names.
    candidates: how many blocks per position are compared.
    contexts: wordings in which each name is read.
    names: how many made-up names stand in the reference.
    weight: weight of the forget side against the other side in the detector.
    relatives: made-up name-sharers per word of each forget name that the detector must not fire on.
    least: refuse to edit when forget questions are told from others with a smaller AUROC than this.
    declined: refuse to edit when the model declines a smaller share of the reference than this.
    texts: ordinary text that the detector must not fire on; None uses the retain facts.
    budget: tokens of ordinary text to read.
    seed: draws the made-up names.

    Raises ExciseError when there is nothing to forget, nobody to tell it from, a model that does not decline, no place
    where a detector tells them apart, or, in weight mode, a block whose MLP cannot write to the residual stream.
    """
    facts, kept = groups(forget, retain)
    if mode not in ("weight", "hook") or requests not in ("subject", "kind"):
        raise ExciseError(f"mode={mode!r}, requests={requests!r}: choose weight or hook, and subject or kind")
    hooked, by_subject = mode == "hook", requests == "subject"
    look = partial(view, facts, kept, contexts=contexts, names=names, relatives=relatives, seed=seed)
    tokens, share, whole = _declining(model, _asking(look("last"), reference), refusals)
    if share < declined:
        raise ExciseError(
            f"{model.name} declines {share:.0%} of the reference questions, so it has no refusal to redirect to; give "
            "questions that it declines as `reference`, or lower `declined`"
        )
    said = own_words(model, [m.prompt for m in thin(whole.made_up, SAID)], WORDS)
    text = [ordinary_text(texts, kept), said]
    spots = []
    for at, blocks in _places(model, where, "last" if reference else position, candidates).items():
        seen = whole if at == "last" else _only(look(at), whole)
        spots += spots_at(model, seen, blocks, by_subject, hooked, text, budget, weight)
    options = dict(remove=remove, strength=strength, sure=sure, hooked=hooked)
    tried = attempts(model, _told_apart(spots, least), whole.told, by_subject, tokens, **options)
    best = max(tried, key=lambda a: a.score)
    recipe = {
        "model": model.name,
        "subjects": facts.subjects,
        **_described(best),
        "reference declined": share,
        "refusal tokens": tokens.tolist(),
        "places": [_row(s, next((a for a in tried if a.spot is s), None)) for s in spots],
    }
    return _edit(model, best, hooked, weight, recipe)


# What the model declines


def _asking(whole: View, reference: Sequence[str]) -> View:
    """The view with the reference, where one is given, in place of questions about made-up names."""
    kinds = dict.fromkeys(m.kind for m in whole.told)
    given = [Mention("", kind, Prompt(text, "", chat=True)) for kind in kinds for text in reference]
    return replace(whole, made_up=given) if reference else whole


def _declining(model: Model, whole: View, refusals: Sequence[str]) -> tuple[Tensor, float, View]:
    """First tokens of refusals, the declined share of the reference, and the view with only what is declined in it."""
    made_up = first_logprobs(model, [m.prompt for m in whole.made_up]) if whole.made_up else torch.zeros(0)
    if not len(made_up):
        raise ExciseError(
            "no made-up name can be formed: give more retain facts, or questions the model declines as `reference`"
        )
    known = first_logprobs(model, [m.prompt for m in thin(whole.others, ASKED)])
    tokens = refusal_tokens(model, refusals, made_up, known)
    fine = torch.isin(made_up.argmax(1), tokens).tolist()
    kept = [m for m, ok in zip(whole.made_up, fine, strict=True) if ok]
    complete = {m.kind for m in kept} == {m.kind for m in whole.made_up}
    return tokens, sum(fine) / len(fine), replace(whole, made_up=kept) if complete else whole


def _only(seen: View, whole: View) -> View:
    """The view with only those made-up names that are declined in whole questions."""
    names = {(m.name, m.kind) for m in whole.made_up}
    return replace(seen, made_up=[m for m in seen.made_up if (m.name, m.kind) in names])


# Where it can be redirected


def _stands_at(position: str, site: Site) -> bool:
    return site.position in (position, None) and "attn" not in site.point


def _places(model: Model, where: Localization | None, position: str, count: int) -> dict[str, list[int]]:
    """Blocks to compare, by position: the responsible ones; or the first half at names, the second half at the end."""
    wanted = POSITIONS if position == "auto" else (position,)
    if not set(wanted) <= set(POSITIONS):
        raise ExciseError(f"position={position!r}: choose auto, {' or '.join(POSITIONS)}")
    if where is None:
        late = {model.n_layers - 1 - i * (model.n_layers // 2) // count for i in range(count)}
        return {p: candidate_blocks(model, None, count) if p == "subject_last" else sorted(late) for p in wanted}
    found = {p: where.where(partial(_stands_at, p)) for p in wanted}
    ranked = {p: f.top(len(f.sites)).sites for p, f in found.items()}
    places = {
        p: list(dict.fromkeys(s.layer for s in sites if s.layer is not None))[:count] for p, sites in ranked.items()
    }
    if not any(places.values()):
        raise ExciseError(
            "the localization names no MLP or residual site at the subject's last token or the prompt's last"
        )
    return {p: sorted(blocks) for p, blocks in places.items() if blocks}


def _told_apart(spots: Sequence[Spot], least: float) -> list[Spot]:
    """The spots whose detector is good enough."""
    good = [s for s in spots if s.auroc >= least]
    if not good:
        raise ExciseError(
            f"no detector tells forget questions from others: AUROC {max(s.auroc for s in spots):.3f} at best where "
            f"{least} is asked for, so others would be declined too; give more wordings or retain facts, or lower `least`"
        )
    return good


# The edit


def _described(best: Attempt) -> dict[str, Any]:
    return {
        "place": str(best.spot.site),
        "auroc": best.spot.auroc,
        "strengths": dict(zip(best.spot.requests, best.strengths.tolist(), strict=True)),
        "declined when redirected": float(best.shares.nanmean()),
    }


def _row(spot: Spot, tried: Attempt | None) -> dict[str, Any]:
    row = {"place": str(spot.site), "auroc": spot.auroc, "confused": spot.confused}
    return row | ({"declined": float(tried.shares.nanmean())} if tried else {})


def _edit(model: Model, best: Attempt, hooked: bool, weight: float, recipe: dict[str, Any]) -> Edit:
    spot, point = best.spot, best.spot.site.point
    shifts = best.strengths[:, None] * best.directions
    eraser = best.eraser or no_eraser(shifts.shape[1])
    if hooked:
        found = ridge_detector(spot.keys, spot.labels, spot.cost, weight=weight)[point].mT.float().contiguous()
        changes = [
            Change(Site(point), eraser.action(shift), Linear(Site(point), detector, HALF, specials=True))
            for shift, detector in zip(shifts, found, strict=True)
        ]
        return Edit(tuple(changes), recipe, whole_fingerprints(model))
    # What to write for each row: its request's shift, and minus what is erased of its state.
    targets = torch.cat([spot.labels, (spot.states.double() - eraser.mean) @ eraser.left], dim=1)
    right = torch.cat([shifts, -eraser.right]).float().contiguous()
    factors = ridge_detector(spot.keys, targets, spot.cost, weight=weight)
    changes = [
        Change(Site(name), LowRank(left.float().contiguous(), right))
        for name, left in factors.items()
        if bool(left.any())
    ]
    return Edit(tuple(changes), recipe, fingerprints(model, changes))
