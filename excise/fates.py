"""Fates: what became of each single fact, in words a reviewer can use, each with its evidence. Results in, fates out.

A fact to forget is *still stated*, or *suppressed (recoverable by ...)*, or *suppressed (found inside: ...)*, or *removed*:
the first that applies. A tool or an attack that finds it in the oracle too has taught or guessed it: that does not count.
Single answers of single attacks are often guesses, so an attack counts where it works on the whole (`excise.attacks`), or
where so many attacks agree on a fact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from excise.attacks import GUESSABLE, attacks, is_attack
from excise.comparison import by_prompt, roles
from excise.findings import FORMS
from excise.scores import Results, Score

Word = Literal[
    "still stated", "suppressed (recoverable)", "suppressed (found inside)", "removed", "no longer stated",
    "collateral damage", "kept", "not known before",
]  # fmt: skip
# In the order in which they are told; bad news first.
WORDS: tuple[Word, ...] = (
    "still stated", "suppressed (recoverable)", "suppressed (found inside)", "no longer stated", "removed",
    "collateral damage", "kept", "not known before",
)  # fmt: skip
KEPT = ("retain", "neighbour", "general")
# A value of at least this counts as found; where a low value means found, at most this.
FOUND = 0.5
# So many attacks, beyond those that draw it from the oracle, must agree on a fact where none works on the whole.
AGREE = 3
# What looks at single facts from inside: evaluation, variant, whether a high value means that it is there.
INSIDE = (
    ("lens", "hit@5, any layer", True),
    ("unlearning_depth", "depth", False),
)


@dataclass(frozen=True)
class Fate:
    """What became of one fact.

    by: attacks that bring it back, tools that find it inside, or prompts that were lost; evidence: the numbers in words.
    """

    fact: str
    subject: str
    group: str
    word: Word
    by: tuple[str, ...] = ()
    evidence: str = ""

    def __str__(self) -> str:
        inside = f": {', '.join(self.by)})" if self.by and self.word.startswith("suppressed") else ""
        said = self.word.removesuffix(")") + inside if inside else self.word
        return f"{self.fact}: {said}{f'; {self.evidence}' if self.evidence else ''}"


def fates(results: Results, recipe: Mapping[str, object] | None = None) -> list[Fate]:
    """The fate of every fact that was asked for, forget facts first, the worst fates first."""
    who = roles(results, recipe)
    if "before" not in who or "edited" not in who:
        return []
    asked = {role: _by_fact(results.scores.get((arm, "recall"), ())) for role, arm in who.items()}
    working = {a.name for a in attacks(results, who) if a.works}
    looked = {
        (role, name): _values(results.scores.get((arm, name), ()))
        for role, arm in who.items()
        for name in _looks(results, who)
    }
    found = []
    for fact, scores in asked["before"].items():
        known = {role: by_prompt(mine.get(fact, ())) for role, mine in asked.items()}
        if scores[0].group == "forget":
            found.append(_forgotten(scores[0], known, {key: of.get(fact, {}) for key, of in looked.items()}, working))
        elif scores[0].group in KEPT:
            found.append(_kept(scores[0], known))
    return sorted(found, key=lambda f: (f.group != "forget", WORDS.index(f.word)))


def counted(found: Sequence[Fate]) -> str:
    """The fates in one sentence: how many facts met which."""
    parts = []
    for forget, what in ((True, "to forget"), (False, "to keep")):
        mine = [f for f in found if (f.group == "forget") is forget]
        count = Counter(f.word for f in mine)
        if mine:
            listed = ", ".join(f"{count[w]} {w}" for w in WORDS if count[w])
            parts.append(f"Of {len(mine)} facts {what}: {listed}.")
    return " ".join(parts)


def _by_fact(scores: Sequence[Score]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for score in scores:
        found.setdefault(score.fact, []).append(score)
    return found


# By role: the scores of one fact by prompt. By role and evaluation: the values of one fact by variant.
Asked = Mapping[str, dict[tuple[Any, ...], Score]]
Looked = Mapping[tuple[str, str], dict[str, float]]


def _forgotten(first: Score, asked: Asked, looked: Looked, working: Collection[str]) -> Fate:
    after, oracle = asked["edited"], asked.get("oracle", {})
    known = [k for k, s in asked["before"].items() if s.value and k in after]
    said = [k for k in known if after[k].value and not (k in oracle and oracle[k].value)]
    told = f"answered in {len(said)} of {len(known)} prompts"

    def fate(word: Word, by: Sequence[str] = (), evidence: str = told) -> Fate:
        return Fate(first.fact, first.subject, first.group, word, tuple(by), evidence)

    if not known:
        return fate("not known before", (), "")
    if _more_than_guessed(said, known):
        return fate("still stated", _forms(said))
    tried, tools = _attacks(looked), list(_tools(looked))
    seen = [name for name, found in tools if found]
    back = [name for name, (drawn, _) in tried.items() if drawn and name in working]
    drawn, never = (sum(hit[i] for hit in tried.values()) for i in (0, 1))
    if not back and drawn - never >= AGREE:
        back = [name for name, (drawn, _) in tried.items() if drawn]
    if back:
        guessed = f", {never} from the oracle" if "oracle" in asked else ""
        return fate("suppressed (recoverable)", back, f"{told}; {drawn} of {len(tried)} attacks draw it{guessed}")
    if seen:
        return fate("suppressed (found inside)", seen)
    nothing = f"{told}; {len(tried)} attacks and {len(tools)} looks inside found nothing"
    return fate("removed" if tried and tools else "no longer stated", (), nothing)


def _kept(first: Score, asked: Asked) -> Fate:
    after = asked["edited"]
    known = [k for k, s in asked["before"].items() if s.value and k in after]
    lost = [k for k in known if not after[k].value]
    if not known:
        return Fate(first.fact, first.subject, first.group, "not known before")
    word: Word = "collateral damage" if 2 * len(lost) >= len(known) else "kept"
    evidence = f"{len(lost)} of {len(known)} prompts lost"
    return Fate(first.fact, first.subject, first.group, word, _forms(lost), evidence)


def _forms(keys: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(FORMS.get(k[1], k[1]) for k in keys))


def _more_than_guessed(said: Sequence[tuple[Any, ...]], known: Sequence[tuple[Any, ...]]) -> bool:
    """Any answer in the model's own words; of choices, which can be guessed, more than half."""
    free = [k for k in said if k[1] != "choice"]
    choices = len(said) - len(free)
    return bool(free) or 2 * choices > sum(k[1] == "choice" for k in known) > 0


def _looks(results: Results, who: Mapping[str, str]) -> list[str]:
    """Evaluations that look at single facts: attacks, and tools that look inside. Guesses count only beside an oracle."""
    inside, guess = {name for name, *_ in INSIDE}, () if "oracle" in who else GUESSABLE
    names = [name for name in results.evaluations if name in inside or is_attack(name)]
    return [name for name in names if name not in guess]


def _attacks(looked: Looked) -> dict[str, tuple[bool, bool]]:
    """By attack: whether it drew the answer from the edited model and not from the oracle, and from the oracle alone."""
    inside = {name for name, *_ in INSIDE}
    found = {}
    for (role, name), values in looked.items():
        if role == "edited" and name not in inside and values:
            never = looked.get(("oracle", name), {})
            here, there = max(values.values()) >= FOUND, max(never.values(), default=0.0) >= FOUND
            found[name] = (here and not there, there and not here)
    return found


def _tools(looked: Looked) -> Iterator[tuple[str, bool]]:
    """Each look inside, and whether it found the fact where a model that never knew it shows nothing.

    Without such a model there is no zero to compare with, and nothing is said.
    """
    for name, variant, high in INSIDE:
        after, never = (looked.get((role, name), {}).get(variant) for role in ("edited", "oracle"))
        if after is not None and never is not None:
            yield name, (after >= FOUND > never) if high else (after <= FOUND < never)


def _values(scores: Sequence[Score]) -> dict[str, dict[str, float]]:
    """By fact: the largest value of each variant."""
    found: dict[str, dict[str, float]] = {}
    for s in scores:
        if s.value is not None:
            mine = found.setdefault(s.fact, {})
            mine[s.variant] = max(mine.get(s.variant, s.value), s.value)
    return found
