"""Measuring arms with every finished item kept: a results.jsonl that grows line by line and is read by the next run."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from excise import __version__
from excise.arms import Arm, evaluate
from excise.facts import Facts
from excise.facts_io import as_record
from excise.model import tensor_fingerprint
from excise.progress import bar
from excise.registry import Method
from excise.scores import Results, Score
from excise.store import Store, plain_row, read_results

__all__ = ["EVALUATIONS", "Store", "digest", "facts_digest", "measure", "plain_row", "read_results", "settings"]

EVALUATIONS = ("recall", "probability", "form_spread", "drift", "refusal", "lens", "probe")


def digest(*parts: Any) -> str:
    """A short hash of plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def facts_digest(facts: Facts) -> str:
    """A short hash of facts."""
    return digest([as_record(f) for f in facts])


def measure(
    arms: Sequence[Arm],
    evaluations: Sequence[Method],
    facts: Facts,
    *,
    shared: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]] | None = None,
    kept: Path | None = None,
    minutes: float | None = None,
    always: Sequence[str] = (),
) -> Results:
    """Every evaluation on every arm; the first arm is "before", one called "oracle" never learned the facts.

    shared: option values, handed to each evaluation that has an option of that name.
    own: further options by evaluation.
    kept: a results.jsonl; what stands there under the same key is not measured again, the rest is added item by item.
    minutes: an evaluation that does not fit into what is left of them, judging by its first arm, is left out on all
        arms; `Results.recipe["left_out"]` names it. `recipe["seconds"]` says what each evaluation took.
    always: evaluations that are measured whatever time is left.
    """
    items = _Items(arms, facts, Store(kept))
    scores: dict[tuple[str, str], tuple[Score, ...]] = {}
    ends = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for method in bar(evaluations, what="measuring"):
        options = {o.name: shared[o.name] for o in method.options if o.name in shared}
        options |= (own or {}).get(method.name, {})
        reason = items.measure(method, options, math.inf if method.name in always else ends)
        if reason:
            left_out[method.name] = reason
        else:
            scores |= {(a.name, method.name): items.scores(method, options, a) for a in arms}
            seconds[method.name] = items.seconds(method, options)
    recipe: dict[str, Any] = {"seconds": seconds}
    results = Results(scores, {a.name: a.mode for a in arms}, recipe | ({"left_out": left_out} if left_out else {}))
    items.store.close(results)
    return results


class _Items:
    """The items of one run, one per evaluation and arm, measured or read from the store."""

    def __init__(self, arms: Sequence[Arm], facts: Facts, store: Store) -> None:
        self.arms, self.facts, self.store = arms, facts, store
        self.oracle = next((a for a in arms if a.name == "oracle"), None)
        self._about, self._states = facts_digest(facts), {a.name: _state(a) for a in arms}

    def key(self, method: Method, options: Mapping[str, Any], arm: Arm) -> str:
        """What an item follows from; not the arm's name, and the oracle only where it is looked at."""
        looks = "oracle" in inspect.signature(method.function).parameters and self.oracle is not None
        others = [self.arms[0].name, *(["oracle"] if looks else [])]
        return digest(
            __version__, method.name, settings(method, options), self._about, self._states[arm.name],
            *(self._states[name] for name in others),
        )  # fmt: skip

    def measure(self, method: Method, options: Mapping[str, Any], ends: float) -> str:
        """Measure what is not in the store, arm by arm; why not, where the time does not suffice for all arms."""
        missing = [a for a in self.arms if self.store.get(self.key(method, options, a), a.name) is None]
        for done, arm in enumerate(missing):
            start = time.monotonic()
            if start >= ends:
                return "no time was left"
            found = evaluate(method.function, arm, self.facts, self.arms[0], self.oracle, **options)
            took = time.monotonic() - start
            self.store.add(self.key(method, options, arm), arm, method, found, took)
            rest = took * (len(missing) - done - 1)
            if rest and time.monotonic() + rest > ends:
                return f"the time left was not enough for it: about {took * len(self.arms):.0f} s"
        return ""

    def scores(self, method: Method, options: Mapping[str, Any], arm: Arm) -> tuple[Score, ...]:
        """The finished item."""
        return self.store.get(self.key(method, options, arm), arm.name) or ()

    def seconds(self, method: Method, options: Mapping[str, Any]) -> float:
        """What an evaluation took over all arms, in this run or in those that it continues."""
        return round(sum(self.store.seconds[self.key(method, options, a)] for a in self.arms), 2)


def settings(method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a method with their values, so that a changed default counts as a change."""
    return {o.name: o.default for o in method.options} | dict(given)


def _state(arm: Arm) -> list[Any]:
    """What an arm's answers depend on: the model, every number of its edit, and what a special arm does besides."""
    changes = arm.edit.changes if arm.edit else ()
    written = [[str(c.site), _contents(c.action), c.gate and _contents(c.gate)] for c in changes]
    plain = {f.name for f in fields(Arm)}
    own = {f.name: getattr(arm, f.name) for f in fields(arm) if f.name not in plain}
    special = [type(arm).__name__, {k: facts_digest(v) if isinstance(v, Facts) else str(v) for k, v in own.items()}]
    return [arm.model.fingerprint, written, *(special if type(arm) is not Arm else ())]


def _contents(part: Any) -> list[Any]:
    values = {k: tensor_fingerprint(v) if isinstance(v, Tensor) else str(v) for k, v in vars(part).items()}
    return [type(part).__name__, values]
