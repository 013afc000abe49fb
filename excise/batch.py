"""Localization of many facts to Parquet: sharded, resumable, never the same work twice.

A shard is a function of the fact's id, so workers need no coordinator: processes, job arrays and Ray all run the same
command with another `--shard i/n`. Facts are worked through in chunks of at most 8; a finished chunk is one file under
`parts/`, written under a temporary name and renamed, so a killed run loses the chunk in flight and nothing else. Each
row carries the key of its item, a hash of the fact, the method, its settings and the model; what has a key there is not
done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise import __version__
from excise.errors import ExciseError
from excise.facts import Fact, Facts
from excise.facts_io import as_record
from excise.files import atomic, write_text
from excise.measure import settings
from excise.names import UnknownName
from excise.progress import bar
from excise.scores import Localization
from excise.sites import Site

if TYPE_CHECKING:
    from excise.model import Model
    from excise.registry import Method

CHUNK = 8
TABLE = "localization.parquet"
# status: "scored", "skipped" (the method has nothing to say about this fact) or "failed" (tried again by the next run).
COLUMNS = (
    "fact_id",
    "method",
    "status",
    "site",
    "point",
    "layer",
    "position",
    "unit",
    "score",
    "low",
    "high",
    "reason",
    "key",
)


@dataclass(frozen=True)
class Outcome:
    """What a run did.

    computed: facts worked through now; found: facts finished before. skipped, failed: reasons by fact, of this run.
    table: the merged table once every shard is complete.
    """

    computed: int
    found: int
    skipped: dict[str, str]
    failed: dict[str, str]
    table: Path | None


@dataclass(frozen=True)
class Job:
    """One method with its settings over one list of facts into one folder.

    A method that borrows counterparts from other facts is lent all of them, whatever the shard and the chunk.
    """

    method: Method
    settings: Mapping[str, Any]
    facts: Facts
    out: Path

    @property
    def pool(self) -> dict[str, Facts]:
        """The facts that the method may borrow from, as its option `pool` where it has one."""
        return {"pool": self.facts} if any(o.name == "pool" for o in self.method.options) else {}

    def keys(self, model: Model) -> dict[str, str]:
        """The key of every fact's item, by fact id."""
        shared = json.dumps(
            [__version__, self.method.name, settings(self.method, self.settings), model.fingerprint],
            sort_keys=True,
            default=str,
        )
        return {
            f.id: hashlib.sha256(f"{shared}{json.dumps(as_record(f), sort_keys=True)}".encode()).hexdigest()[:20]
            for f in self.facts
        }


def shard_of(fact_id: str, shards: int) -> int:
    """The shard that a fact belongs to: the same on every machine and for every order of the file."""
    return int.from_bytes(hashlib.sha256(fact_id.encode()).digest()[:8], "big") % shards


def localize(
    model: Model, job: Job, *, shard: int = 0, shards: int = 1, chunk: int = CHUNK, skip_bad: bool = False
) -> Outcome:
    """Work through one shard; when it completes the last one, write the merged table.

    Raises ExciseError at the first fact that cannot be localized, the others of its chunk saved, unless `skip_bad`.
    """
    started, keys = time.time(), job.keys(model)
    done = _finished(job.out)
    mine = [f for f in job.facts if shard_of(f.id, shards) == shard]
    pending = [f for f in mine if keys[f.id] not in done]
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for facts in bar(
        [pending[i : i + chunk] for i in range(0, len(pending), chunk)], what=f"{job.method.name} (chunks of {chunk})"
    ):
        rows, bad = _chunk(model, job, facts, keys, skip_bad)
        if rows:
            _write_part(job.out, rows)
        failed |= bad
        skipped |= {r["fact_id"]: r["reason"] for r in rows if r["status"] == "skipped"}
        if bad and not skip_bad:
            name, reason = next(iter(bad.items()))
            raise ExciseError(f"fact {name}: {reason}; mend it, or leave such facts out with --skip-bad")
    table = merge(job, keys)
    _write_run(model, job, table is not None, failed, time.time() - started)
    return Outcome(len(pending) - len(failed), len(mine) - len(pending), skipped, failed, table)


def merge(job: Job, keys: Mapping[str, str]) -> Path | None:
    """All parts as one table in the order of the facts; None while some fact is neither finished nor failed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = {key: i for i, key in enumerate(keys.values())}
    rows: dict[str, list[dict[str, Any]]] = {}
    for part in _parts(job.out):
        found: dict[str, list[dict[str, Any]]] = {}
        for row in pq.read_table(part).to_pylist():
            found.setdefault(row["key"], []).append(row)
        for key, items in found.items():
            # A fact that failed once and worked later counts as finished.
            if key in order and (key not in rows or rows[key][0]["status"] == "failed"):
                rows[key] = items
    if len(rows) < len(order):
        return None
    table = pa.Table.from_pylist(
        [r for key in sorted(rows, key=order.__getitem__) for r in rows[key]], schema=_schema()
    )
    with atomic(job.out / TABLE) as temporary:
        pq.write_table(table, temporary)
    return job.out / TABLE


def read_localization(path: str | Path) -> Localization:
    """The merged table of a folder (or a .parquet file) as a Localization; failed facts are left out."""
    import numpy as np
    import pyarrow.parquet as pq

    file = Path(path) / TABLE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such table; run `excise localize ... --out {Path(path)}` to its end first")
    rows = [r for r in pq.read_table(file).to_pylist() if r["site"] is not None]
    facts = list(dict.fromkeys(r["fact_id"] for r in rows))
    sites = list(dict.fromkeys(r["site"] for r in rows))
    scores = np.full((len(facts), len(sites)), math.nan)
    at_fact, at_site = {f: i for i, f in enumerate(facts)}, {s: i for i, s in enumerate(sites)}
    for row in rows:
        scores[at_fact[row["fact_id"]], at_site[row["site"]]] = row["score"]
    method = rows[0]["method"] if rows else "?"
    return Localization(
        tuple(Site.parse(s) for s in sites), scores, tuple(facts), {"method": method, "file": str(file)}
    )


def _chunk(
    model: Model, job: Job, facts: Sequence[Fact], keys: Mapping[str, str], skip_bad: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the chunk and the facts that failed; one bad fact does not cost its neighbours."""
    try:
        return list(_rows(job, job.method.function(model, Facts(facts), **job.settings, **job.pool), facts, keys)), {}
    except UnknownName:
        raise
    except (ValueError, ExciseError) as error:
        if len(facts) == 1:
            reason = " ".join(str(error).split())
            return [_row(job, facts[0], keys, status="failed", reason=reason)] if skip_bad else [], {
                facts[0].id: reason
            }
    rows: list[dict[str, Any]] = []
    bad: dict[str, str] = {}
    for fact in facts:
        found, failed = _chunk(model, job, [fact], keys, skip_bad)
        rows, bad = rows + found, bad | failed
    return rows, bad


def _rows(job: Job, found: Localization, facts: Iterable[Fact], keys: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    maps = {m.fact_id: m for m in found.maps}
    reasons = {s["fact"]: s["reason"] for s in found.recipe.get("skipped", ())}
    for fact in facts:
        if fact.id not in found.fact_ids:
            raise ValueError(f"fact {fact.id}: {job.method.name} gave no scores for it")
        scores = found.scores[found.fact_ids.index(fact.id)]
        present = [(s, float(v)) for s, v in zip(found.sites, scores, strict=True) if not math.isnan(v)]
        ends: dict[str, Any] = {"low": maps[fact.id].low, "high": maps[fact.id].high} if fact.id in maps else {}
        for site, score in present:
            yield _row(job, fact, keys, site=site, score=score, **ends)
        if not present:
            yield _row(job, fact, keys, status="skipped", reason=reasons.get(fact.id, "no site has a score"))


def _row(
    job: Job, fact: Fact, keys: Mapping[str, str], *, status: str = "scored", site: Site | None = None, **values: Any
) -> dict[str, Any]:
    place = {} if site is None else {
        "site": str(site), "point": site.point, "layer": site.layer, "unit": site.unit,
        "position": None if site.position is None else str(site.position),
    }  # fmt: skip
    return (
        dict.fromkeys(COLUMNS)
        | {"fact_id": fact.id, "method": job.method.name, "status": status, "key": keys[fact.id]}
        | place
        | values
    )


def _schema() -> Any:
    import pyarrow as pa

    kinds = {"layer": pa.int32(), "unit": pa.int64(), "score": pa.float64(), "low": pa.float64(), "high": pa.float64()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])


def _parts(out: Path) -> list[Path]:
    return sorted((out / "parts").glob("part-*.parquet"))


def _finished(out: Path) -> set[str]:
    import pyarrow.parquet as pq

    done: set[str] = set()
    for part in _parts(out):
        rows = pq.read_table(part, columns=["key", "status"]).to_pylist()
        done |= {r["key"] for r in rows if r["status"] != "failed"}
    return done


def _write_part(out: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = hashlib.sha256("".join(sorted({r["key"] for r in rows})).encode()).hexdigest()[:16]
    with atomic(out / "parts" / f"part-{name}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), temporary)


def _write_run(model: Model, job: Job, complete: bool, failed: Mapping[str, str], seconds: float) -> None:
    record = {
        "command": "localize",
        "method": job.method.name,
        "settings": dict(job.settings),
        "model": model.name,
        "fingerprint": model.fingerprint,
        "facts": len(job.facts),
        "complete": complete,
        "failed": dict(failed),
        "seconds": round(seconds, 3),
        "excise": __version__,
        "python": platform.python_version(),
    }
    write_text(job.out / "run.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
