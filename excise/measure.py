"""Measuring arms with every finished item kept: a results.jsonl that grows line by line and is read by the next run."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from excise import __version__
from excise.arms import Arm, evaluate
from excise.errors import ExciseError
from excise.facts import Facts
from excise.facts_io import as_record
from excise.files import write_text
from excise.model import tensor_fingerprint
from excise.progress import bar
from excise.registry import Method
from excise.scores import Results, Row, Score

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
) -> Results:
    """Every evaluation on every arm; the first arm is "before", one called "oracle" never learned the facts.

    shared: option values, handed to each evaluation that has an option of that name.
    own: further options by evaluation.
    kept: a results.jsonl; what stands there under the same key is not measured again, the rest is added item by item.
    minutes: an evaluation that does not fit into what is left of them, judging by its first arm, is left out on all
        arms; `Results.recipe["left_out"]` names it. `recipe["seconds"]` says what each evaluation took.
    """
    items = _Items(arms, facts, Store(kept))
    scores: dict[tuple[str, str], tuple[Score, ...]] = {}
    ends = time.monotonic() + 60 * minutes if minutes is not None else math.inf
    left_out: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for method in bar(evaluations, what="measuring"):
        options = {o.name: shared[o.name] for o in method.options if o.name in shared}
        options |= (own or {}).get(method.name, {})
        reason = items.measure(method, options, ends)
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


def plain_row(row: Row) -> dict[str, Any]:
    """One line of the long table as plain values; `held_out` and `variant` only where they apply."""
    found: dict[str, Any] = {"arm": row.arm, "evaluation": row.evaluation, "group": row.group, "form": row.form}
    found |= {k: None if math.isnan(v) else v for k in ("value", "low", "high") for v in [float(getattr(row, k))]}
    found["n"] = row.n
    if row.held_out:
        found["held_out"] = True
    return found | {k: v for k in ("variant", "n_skipped", "mode") if (v := getattr(row, k))}


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


class Store:
    """Finished items by key, one JSON line each, flushed to the disk as they come. Without a path it keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        if path is not None and path.is_file():
            # A killed run can leave half a line at the end: only whole lines count.
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                record = _decoded(line)
                if "scores" in record:
                    self.lines[record["key"]] = line
        # (arm, key): what two arms of the same state share is kept once for each.
        self.used: dict[tuple[str, str], None] = {}
        self._tidy(list(self.lines.values()))

    def get(self, key: str, arm: str) -> tuple[Score, ...] | None:
        """The scores of an item, now those of this arm; or None."""
        if key not in self.lines:
            return None
        self.used[arm, key] = None
        record = json.loads(self.lines[key])
        self.seconds[key] = record.get("seconds", 0.0)
        return tuple(Score(**s) for s in record["scores"])

    def add(self, key: str, arm: Arm, method: Method, scores: Sequence[Score], seconds: float = 0.0) -> None:
        """Append one item."""
        record: dict[str, Any] = {
            "key": key,
            "arm": arm.name,
            "evaluation": method.name,
            "mode": arm.mode,
            "seconds": round(seconds, 3),
            "scores": [_compact(s) for s in scores],
        }
        self.lines[key] = json.dumps(record, ensure_ascii=False)
        self.seconds[key] = record["seconds"]
        self.used[arm.name, key] = None
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(self.lines[key] + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise ExciseError(
                    f"{self.path}: could not write it ({error.strerror}); free some space, run the same command again"
                ) from error

    def close(self, results: Results) -> None:
        """Leave the items of this run and the table made of them."""
        rows = [json.dumps(plain_row(r), ensure_ascii=False) for r in results.table()] if self.path is not None else []
        self._tidy([self._named(key, arm) for arm, key in self.used] + rows)

    def _named(self, key: str, arm: str) -> str:
        record = json.loads(self.lines[key])
        return self.lines[key] if record["arm"] == arm else json.dumps({**record, "arm": arm}, ensure_ascii=False)

    def _tidy(self, lines: Sequence[str]) -> None:
        if self.path is not None:
            write_text(self.path, "".join(f"{line}\n" for line in lines))


def read_results(path: Path) -> Results:
    """What `measure` kept, as Results."""
    records = [r for r in map(_decoded, path.read_text(encoding="utf-8").splitlines()) if "scores" in r]
    if not records:
        raise ExciseError(f"{path}: no finished item in it; run the command that makes it again")
    scores = {(r["arm"], r["evaluation"]): tuple(Score(**s) for s in r["scores"]) for r in records}
    return Results(scores, {r["arm"]: r["mode"] for r in records})


def _compact(score: Score) -> dict[str, Any]:
    return {k: v for k, v in asdict(score).items() if v not in ("", False) or isinstance(v, float)} | {
        "fact": score.fact, "subject": score.subject, "group": score.group, "value": score.value,
    }  # fmt: skip


def _decoded(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return {}
    return record if isinstance(record, dict) else {}
