"""Numbers that are made of many scores, benchmark by benchmark, each a `Row` with its interval: utility, deviation,
privacy leakage, forget quality, recovered shares, composites.

They are means of means, so intervals resample the subjects of each group and make the whole number anew. A number whose
parts were not measured is left out. `n` counts scores; in composites it counts the subjects of the smallest part. Values
in, rows out; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from excise.comparison import roles
from excise.oracle_distance import forget_quality, privacy_leak, privacy_scores, recovered
from excise.scores import Results, Row, Score
from excise.statistics import Interval, interval_of, resampled_together

KEPT = ("retain", "neighbour", "general")


def summary(results: Results, *, seed: int = 0) -> list[Row]:
    """All aggregates that the measured scores allow, arm by arm."""
    found: list[Row] = []
    for arm in results.arms:
        for make in (model_utility, deviation, erasure_target, linguistic, composite):
            found += make(results, arm, seed=seed)
    return found + forget_quality(results, seed=seed) + privacy_leak(results, seed=seed) + recovered(results, seed=seed)


@dataclass(frozen=True)
class Part:
    """The mean of some scores: its name, values, clusters, and their group, whose subjects are drawn together."""

    name: str
    values: tuple[float, ...]
    clusters: tuple[str, ...]
    group: str

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return float(np.mean(self.values))


def harmonic(parts: Any) -> Any:
    """Harmonic mean over the first axis; 0 where any part is 0 or below."""
    x = np.asarray(parts, float)
    safe = np.where(x > 0, x, 1.0)
    return np.where((x > 0).all(0), len(x) / (1 / safe).sum(0), np.where(np.isnan(x).any(0), np.nan, 0.0))


def model_utility(results: Results, arm: str, *, seed: int = 0) -> list[Row]:
    """Harmonic mean of answer probability, ROUGE-L recall and truth ratio (1 - R) on the groups to keep (TOFU).

    TOFU's three sets are retain, real authors and world facts; here they are retain, neighbour and general, as many as
    there are. As there, the probability of the last two is the answer's share among its rivals', where `forced_choice`
    was measured. One more row per part.
    """
    parts = _utility_parts(results, arm)
    if not parts:
        return []
    whole = made(results, arm, "model_utility", "", parts, harmonic, seed)
    return [whole, *(made(results, arm, "model_utility", p.name, [p], lambda x: x[0], seed) for p in parts)]


def _utility_parts(results: Results, arm: str) -> list[Part]:
    """What there is of the parts of a model's utility; none where one of the three kinds is there for no group."""
    of = partial(part_of, results, arm)
    kinds = (
        [(g != "retain" and of("forced_choice", "p(right)", g)) or of("probability", "", g) for g in KEPT],
        [of("rouge", "rougeL recall", g) for g in KEPT],
        [of("truth_ratio", "true better", g) for g in KEPT],
    )
    return [p for by_group in zip(*kinds, strict=True) for p in by_group if p] if all(map(any, kinds)) else []


def deviation(results: Results, arm: str, *, seed: int = 0) -> list[Row]:
    """Deviation score 100 sqrt(f^2 + (1 - r)^2) of mean ROUGE recall on forget and retain facts (LUNAR, 2502.07218).

    0 is the aim, 141.42 the worst. With an oracle also the distance to what it says, and to what the model before keeps.
    """
    rows, who = [], roles(results)
    for kind in ("rouge1 recall", "rougeL recall"):
        parts = [part_of(results, arm, "rouge", kind, group) for group in ("forget", "retain")]
        there = [p for p in parts if p]
        if len(there) < 2:
            continue
        rows.append(made(results, arm, "deviation", kind, there, lambda x: deviation_score(x[0], x[1]), seed))
        aim = [
            part_of(results, who.get(w, ""), "rouge", kind, g) for w, g in (("oracle", "forget"), ("before", "retain"))
        ]
        if aim[0] and aim[1]:
            f, r = aim[0].mean, aim[1].mean
            name = f"{kind}, from the oracle"
            # The aim stands for (0, 1): what the oracle says of the facts to forget, what before says of the others.
            moved = partial(_deviation_from, f, r)
            rows.append(made(results, arm, "deviation", name, there, moved, seed))
    return rows


def _deviation_from(forget: float, retain: float, means: np.ndarray) -> Any:
    return deviation_score(means[0] - forget, 1 + means[1] - retain)


def deviation_score(forget: Any, retain: Any) -> Any:
    """100 sqrt(forget^2 + (1 - retain)^2)."""
    return 100 * np.hypot(forget, 1 - np.asarray(retain, float))


def erasure_target(results: Results, arm: str, *, seed: int = 0) -> list[Row]:
    """Harmonic mean of what is erased in known and in held-out wordings and of what neighbours keep (2309.17410)."""
    direct = part_of(results, arm, "erasure", "erased", "forget", held_out=False)
    again = part_of(results, arm, "erasure", "erased", "forget", held_out=True)
    near = part_of(results, arm, "erasure", "kept", "neighbour")
    parts = [p for p in (direct, again, near) if p]
    return [made(results, arm, "erasure_target", "", parts, harmonic, seed)] if len(parts) == 3 else []


def linguistic(results: Results, arm: str, *, seed: int = 0) -> list[Row]:
    """ReLearn's linguistic score of the texts about facts to keep, from perplexity, Brunet's and Honore's means.

    Perplexity of broken text explodes, so the score is also given with its median.
    """
    rows = []
    for group in ("forget", "retain"):
        loss = part_of(results, arm, "fluency", "loss under before", group)
        others = [part_of(results, arm, "fluency", v, group) for v in ("Brunet", "Honore")]
        there = [p for p in others if p]
        if not loss or len(there) < 2:
            continue
        perplexity = replace(loss, values=tuple(np.exp(loss.values).tolist()))
        row = made(results, arm, "linguistic", "", [perplexity, *there], lambda x: linguistic_score(*x), seed)
        middle = float(linguistic_score(float(np.median(perplexity.values)), *(p.mean for p in there)))
        rows += [row, replace(row, variant="median perplexity", value=middle, low=np.nan, high=np.nan)]
    return rows


def linguistic_score(perplexity: Any, brunet: Any, honore: Any) -> Any:
    """Harmonic mean of 1 / (1 + perplexity), 1 / (1 + Brunet) and Honore / (1 + Honore)."""
    ppl, bi, hs = (np.asarray(x, float) for x in (perplexity, brunet, honore))
    return harmonic([1 / (1 + ppl), 1 / (1 + bi), hs / (1 + hs)])


def composite(results: Results, arm: str, *, seed: int = 0) -> list[Row]:
    """Open-unlearning's memorisation, privacy, utility and overall scores (2506.12618), higher is better.

    Memorisation: HM of 1 - extraction strength, exact memorisation, probability of held-out wordings and truth ratio
    (knowledge). Privacy: HM of 1 - |AUC - AUC of the oracle| / max over four attacks. Utility: HM of model utility and
    fluency, here the word entropy relative to the model before, at most 1.
    """
    forget = [
        part_of(results, arm, e, v, "forget", held_out=h)
        for e, v, h in (
            ("memorisation", "extraction strength", None), ("memorisation", "exact memorisation", None),
            ("probability", "", True), ("truth_ratio", "knowledge", None),
        )
    ]  # fmt: skip
    found: dict[str, tuple[Interval, np.ndarray, int]] = {}
    if all(forget):
        found["memorisation"] = _joint([p for p in forget if p], lambda x: harmonic(1 - x), seed)
    private = privacy_scores(results, arm, seed=seed)
    if private:
        drawn = harmonic([d for _, d, _ in private])
        value = float(harmonic([v for v, _, _ in private]))
        few = min(n for *_, n in private)
        found["privacy"] = interval_of(value, drawn, few), drawn, few
    useful = _utility_and_fluency(results, arm, seed)
    if useful:
        found["utility"] = useful
    rows = [_row(results, arm, "composite", name, interval, few) for name, (interval, _, few) in found.items()]
    if len(found) == 3:
        drawn = harmonic([d for _, d, _ in found.values()])
        few = min(n for *_, n in found.values())
        value = float(harmonic([i.value for i, _, _ in found.values()]))
        rows.append(_row(results, arm, "composite", "overall", interval_of(value, drawn, few), few))
    return rows


def _utility_and_fluency(results: Results, arm: str, seed: int) -> tuple[Interval, np.ndarray, int] | None:
    parts = _utility_parts(results, arm)
    now, then = (part_of(results, a, "fluency", "entropy", "retain") for a in (arm, roles(results).get("before", "")))
    if not parts or not now or not then or then.mean <= 0:
        return None
    usual = then.mean

    def whole(x: np.ndarray) -> Any:
        return harmonic([harmonic(x[:-1]), np.minimum(1.0, x[-1] / usual)])

    return _joint([*parts, now], whole, seed)


def part_of(
    results: Results, arm: str, evaluation: str, variant: str, group: str, *, held_out: bool | None = None
) -> Part | None:
    """The measured scores of one arm, evaluation, variant and group; None without any."""
    scores: Sequence[Score] = results.scores.get((arm, evaluation), ())
    there = [
        s
        for s in scores
        if s.variant == variant and s.group == group and s.value is not None and held_out in (None, s.held_out)
    ]
    if not there:
        return None
    name = ", ".join(x for x in (evaluation, variant, group) if x)
    return Part(name, tuple(float(s.value or 0.0) for s in there), tuple(s.subject or s.fact for s in there), group)


def made(
    results: Results,
    arm: str,
    evaluation: str,
    variant: str,
    parts: Sequence[Part],
    make: Callable[[np.ndarray], Any],
    seed: int,
) -> Row:
    """A row of what `make` makes of the parts' means [n_parts, ...], with its interval."""
    interval, _, _ = _joint(parts, make, seed)
    row = _row(results, arm, evaluation, variant, interval, sum(len(p.values) for p in parts))
    return replace(row, group=parts[0].group) if len({p.group for p in parts}) == 1 else row


def _joint(parts: Sequence[Part], make: Callable[[np.ndarray], Any], seed: int) -> tuple[Interval, np.ndarray, int]:
    """The number, its resampled values and the clusters of the smallest group; groups are drawn independently."""
    value = float(make(np.array([p.mean for p in parts])))
    drawn = np.empty((len(parts), 0))
    for turn, group in enumerate(_unique(p.group for p in parts)):
        mine = [i for i, p in enumerate(parts) if p.group == group]
        found = resampled_together([(parts[i].values, parts[i].clusters) for i in mine], seed=seed + turn)
        drawn = np.empty((len(parts), found.shape[1])) if not drawn.size else drawn
        drawn[mine] = found
    for i, part in enumerate(parts):
        if set(part.values) in ({0.0}, {1.0}):
            # Resampling what never varied would claim certainty: Jeffreys' posterior of such a share instead.
            k, n = sum(part.values), len(part.values)
            drawn[i] = np.random.default_rng(seed + i).beta(k + 0.5, n - k + 0.5, drawn.shape[1])
    few = min(len(set(p.clusters)) for p in parts)
    made_ = np.asarray(make(drawn), float)
    return interval_of(value, made_, few), made_, few


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _row(results: Results, arm: str, evaluation: str, variant: str, interval: Interval, n: int) -> Row:
    return Row(arm, evaluation, "", "", False, variant, *interval, n=n, mode=results.modes.get(arm, ""))


__all__ = [
    "composite", "deviation", "erasure_target", "forget_quality", "harmonic", "linguistic", "model_utility",
    "privacy_leak", "recovered", "summary",
]  # fmt: skip
