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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from excise.actions import LowRank
from excise.declining import first_logprobs, least_strengths, log_odds, own_words, refusal_tokens
from excise.detector import ridge_detector
from excise.edits import Change, Edit
from excise.encoding import Batch
from excise.erasure import Eraser, fit_eraser
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.gates import Linear
from excise.mentions import Mention
from excise.model import Model
from excise.redirection import candidate_blocks
from excise.registry import editor
from excise.requests import Spot, View, as_texts, spots_at, thin, view
from excise.scores import Localization
from excise.sites import Site

POSITIONS = ("subject_last", "last")
# Questions asked of a place, and at least so many of each request.
ASKED, FEWEST = 128, 4
# A question is declined when that is nine times as likely as answering it.
DECLINED = 2.2
# Strengths found on some wordings are raised by this factor, for all others.
HEADROOM = 1.5
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
    facts, kept = Facts(forget), Facts(retain)
    if not len(facts):
        raise ExciseError("nothing to forget: the forget set is empty")
    if mode not in ("weight", "hook") or requests not in ("subject", "kind"):
        raise ExciseError(f"mode={mode!r}, requests={requests!r}: choose weight or hook, and subject or kind")
    hooked, plain = mode == "hook", list(texts) if texts is not None else as_texts(kept)
    draw = dict(contexts=contexts, names=names, relatives=relatives, seed=seed)
    whole = view(facts, kept, "last", **draw)
    if reference:
        given = [Mention("", m.kind, Prompt(t, "", chat=True)) for m in _one_per_kind(whole.told) for t in reference]
        whole = replace(whole, made_up=given)
    tokens, share, whole = _declining(model, whole, refusals)
    if share < declined:
        raise ExciseError(
            f"{model.name} declines {share:.0%} of the reference questions, so it has no refusal to redirect to; give "
            "questions that it declines as `reference`, or lower `declined`"
        )
    said = own_words(model, [m.prompt for m in thin(whole.made_up, SAID)], WORDS)
    spots = []
    for at, blocks in _places(model, where, "last" if reference else position, candidates).items():
        seen = whole if at == "last" else _only(view(facts, kept, at, **draw), whole)
        spots += spots_at(model, seen, blocks, requests == "subject", hooked, [plain, said], budget, weight)
    good = [s for s in spots if s.auroc >= least]
    if not good:
        raise ExciseError(
            f"no detector tells forget questions from others: AUROC {max(s.auroc for s in spots):.3f} at best where "
            f"{least} is asked for, so others would be declined too; give more wordings or retain facts, or lower `least`"
        )
    trials: list[_Trial] = []
    for spot in sorted(good, key=lambda s: s.confused):
        # No later spot can do better than decline everything with its own confusion.
        if trials and max(t.score for t in trials) >= 1 - spot.confused:
            break
        asked = _asked(whole.told, spot.requests, requests == "subject")
        trials.append(_try(model, spot, asked, tokens, remove=remove, strength=strength, sure=sure, hooked=hooked))
    chosen = max(trials, key=lambda t: t.score)
    recipe = {
        "model": model.name,
        "subjects": facts.subjects,
        "place": str(chosen.spot.site),
        "auroc": chosen.spot.auroc,
        "strengths": dict(zip(chosen.spot.requests, chosen.strengths.tolist(), strict=True)),
        "declined when redirected": float(chosen.shares.nanmean()),
        "reference declined": share,
        "refusal tokens": tokens.tolist(),
        "places": [_row(s, next((t for t in trials if t.spot is s), None)) for s in spots],
    }
    return _edit(model, chosen, hooked, weight, recipe)


# What the model declines


def _one_per_kind(told: Sequence[Mention]) -> list[Mention]:
    return list({m.kind: m for m in told}.values())


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


# How strongly


@dataclass(frozen=True, eq=False)
class _Trial:
    """A spot with its redirection: directions [m, d], a strength and a share of declined questions each."""

    spot: Spot
    directions: Tensor
    strengths: Tensor
    shares: Tensor
    eraser: Eraser | None

    @property
    def score(self) -> float:
        """Questions declined minus others that would be taken for them."""
        return float(self.shares.nanmean()) - self.spot.confused


def _asked(told: Sequence[Mention], requests: tuple[str, ...], by_subject: bool) -> list[tuple[int, Prompt]]:
    """Whole questions with their requests, about as many of each; a request without questions has none."""
    found = []
    for i, request in enumerate(requests):
        mine = [m.prompt for m in told if (m.name if by_subject else m.kind) == request]
        found += [(i, p) for p in thin(mine, max(FEWEST, ASKED // len(requests)))]
    return found


def _try(
    model: Model,
    spot: Spot,
    asked: list[tuple[int, Prompt]],
    tokens: Tensor,
    *,
    remove: bool,
    strength: float,
    sure: float,
    hooked: bool,
) -> _Trial:
    """Redirect the forget questions by hand, each request as strongly as it needs.

    A detector that reads less than 1 on its weakest inputs needs that much more.
    """
    eraser = _eraser(spot) if remove else None
    states = eraser(spot.states) if eraser else spot.states.double()
    centres = (spot.labels.mT @ states) / spot.labels.sum(0)[:, None]
    directions = spot.goals.double() - centres
    owner, m = torch.tensor([i for i, _ in asked]), len(directions)

    def shares(strengths: Tensor) -> Tensor:
        """Declined share of each request's questions, [m]; NaN where there are none."""
        change = _redirecting(spot, eraser, (strengths[:, None] * directions)[owner].float())
        fine = log_odds(first_logprobs(model, [p for _, p in asked], spot.site.point, change), tokens) > DECLINED
        return torch.bincount(owner, fine.double(), m) / torch.bincount(owner, minlength=m)

    fixed = torch.full((m,), strength, dtype=torch.float64)
    found, reached = (fixed, shares(fixed)) if strength else least_strengths(shares, m, sure=sure)
    weakest = 1.0 if hooked or strength else min(1.0, max(0.25, spot.weakest))
    return _Trial(spot, directions, found * (1.0 if strength else HEADROOM) / weakest, reached, eraser)


def _redirecting(spot: Spot, eraser: Eraser | None, shifts: Tensor) -> Callable[[Tensor, Batch, list[int]], Tensor]:
    """Replaces the state at the spot; shifts: of each prompt, [n, d]."""
    move = (eraser or _nothing(shifts.shape[1])).action()

    def change(x: Tensor, batch: Batch, index: list[int]) -> Tensor:
        at = batch.where(spot.site.position).to(x.device)
        return torch.where(at[..., None], move(x) + shifts[index, None].to(x.device, x.dtype), x)

    return change


def _nothing(d: int) -> Eraser:
    """An eraser of no direction."""
    return Eraser(*(torch.zeros(s, dtype=torch.float64) for s in ((d, 0), (0, d), (d,))))


def _eraser(spot: Spot) -> Eraser:
    """What tells the names to forget from each other and from those to keep, at equal weight of both sides."""
    _, name = torch.unique(spot.names, return_inverse=True)
    n, n0 = len(spot.states), len(spot.other_states)
    z = torch.cat([torch.nn.functional.one_hot(name), torch.zeros(n0, int(name.max()) + 1, dtype=torch.long)])
    weights = torch.cat([torch.full((n,), 1 / n), torch.full((n0,), 1 / n0)])
    return fit_eraser(torch.cat([spot.states, spot.other_states]), z, weights)


def _row(spot: Spot, trial: _Trial | None) -> dict[str, Any]:
    row = {"place": str(spot.site), "auroc": spot.auroc, "confused": spot.confused}
    return row | ({"declined": float(trial.shares.nanmean())} if trial else {})


# The edit


def _edit(model: Model, trial: _Trial, hooked: bool, weight: float, recipe: dict[str, Any]) -> Edit:
    spot, point = trial.spot, trial.spot.site.point
    shifts = trial.strengths[:, None] * trial.directions
    eraser = trial.eraser or _nothing(shifts.shape[1])
    tokenizer = {"tokenizer": model.tokenizer_fingerprint}
    if hooked:
        found = ridge_detector(spot.keys, spot.labels, spot.cost, weight=weight)[point].mT.float().contiguous()
        changes = [
            Change(Site(point), eraser.action(shift), Linear(Site(point), detector, HALF, specials=True))
            for shift, detector in zip(shifts, found, strict=True)
        ]
        return Edit(tuple(changes), recipe, {"model": model.fingerprint, **tokenizer})
    # What to write for each row: its request's shift, and minus what is erased of its state.
    targets = torch.cat([spot.labels, (spot.states.double() - eraser.mean) @ eraser.left], dim=1)
    right = torch.cat([shifts, -eraser.right]).float().contiguous()
    factors = ridge_detector(spot.keys, targets, spot.cost, weight=weight)
    changes = [
        Change(Site(name), LowRank(left.float().contiguous(), right))
        for name, left in factors.items()
        if bool(left.any())
    ]
    prints = {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes}
    return Edit(tuple(changes), recipe, {**prints, **tokenizer})
