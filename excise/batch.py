"""Localization of many facts by any number of methods to one Parquet table: sharded, resumable, no work done twice.

Facts are worked through in chunks of at most 8 of similar length, the same chunks however the work is spread; a worker
takes every n-th one, so workers need no coordinator: processes, job arrays and Ray all give the same rows. A finished
chunk is one file under `parts/`, written under a temporary name and renamed, so a killed run loses the chunk in flight
and nothing else. Each row carries the key of its item, a hash of the fact, the method, its settings and the model; what
has a key there is not done again.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from excise import __version__
from excise.errors import DamagedFile, ExciseError
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
    """What a run of one method did.

    computed: facts worked through now; found: facts finished before. skipped, failed: reasons by fact, of this run.
    """

    method: str
    computed: int
    found: int
    skipped: dict[str, str]
    failed: dict[str, str]


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

    def keys(self, fingerprint: str) -> dict[str, str]:
        """The key of every fact's item by fact id, for the model of that fingerprint."""
        shared = json.dumps(
            [__version__, self.method.name, settings(self.method, self.settings), fingerprint],
            sort_keys=True,
            default=str,
        )
        return {
            f.id: hashlib.sha256(f"{shared}{json.dumps(as_record(f), sort_keys=True)}".encode()).hexdigest()[:20]
            for f in self.facts
        }


def chunks(model: Model, facts: Facts, size: int = CHUNK) -> list[Facts]:
    """All facts in chunks of similar length, so that batches fill; the same for every order of the work."""
    ids = model.tokenizer([f.prompt.text for f in facts])["input_ids"]
    order = sorted(range(len(facts)), key=lambda i: (len(ids[i]), i))
    return [Facts(facts[i] for i in order[k : k + size]) for k in range(0, len(order), size)]


def localize(
    model: Model, jobs: Sequence[Job], *, shard: int = 0, shards: int = 1, chunk: int = CHUNK, skip_bad: bool = False
) -> list[Outcome]:
    """Work through one shard of every job; all jobs share facts and folder. When all is done, write the merged table.

    Raises ExciseError at the first fact that cannot be localized, the others of its chunk saved, unless `skip_bad`.
    """
    started, fingerprint, done, outcomes = time.time(), model.fingerprint, finished(jobs[0].out), []
    mine = chunks(model, jobs[0].facts, chunk)[shard::shards]
    for job in jobs:
        keys, count = job.keys(fingerprint), 0
        outcome = Outcome(job.method.name, 0, sum(keys[f.id] in done for facts in mine for f in facts), {}, {})
        todo = [left for facts in mine if (left := [f for f in facts if keys[f.id] not in done])]
        for facts in bar(todo, what=f"{job.method.name} (chunks of {chunk})"):
            rows, bad = work(model, job, facts, keys, skip_bad)
            count += len(facts) - len(bad)
            keep(job, rows, bad, outcome, skip_bad)
        outcomes.append(replace(outcome, computed=count))
    complete = merge(jobs, fingerprint) is not None
    write_run(jobs, model.name, fingerprint, complete, outcomes, time.time() - started)
    return outcomes


def work(
    model: Model, job: Job, facts: Sequence[Fact], keys: Mapping[str, str], skip_bad: bool
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of a chunk and the facts that failed, with reasons; one bad fact does not cost its neighbours."""
    try:
        return list(_rows(job, job.method.function(model, Facts(facts), **job.settings, **job.pool), facts, keys)), {}
    except UnknownName:
        raise
    except (ValueError, ExciseError) as error:
        if len(facts) == 1:
            reason = " ".join(str(error).split())
            row = _row(job, facts[0], keys, status="failed", reason=reason)
            return [row] if skip_bad else [], {facts[0].id: reason}
    rows: list[dict[str, Any]] = []
    bad: dict[str, str] = {}
    for fact in facts:
        found, failed = work(model, job, [fact], keys, skip_bad)
        rows, bad = rows + found, bad | failed
    return rows, bad


def keep(job: Job, rows: list[dict[str, Any]], bad: Mapping[str, str], outcome: Outcome, skip_bad: bool) -> None:
    """Save a chunk's rows and note in `outcome` what was skipped and what failed. Raises ExciseError for bad facts."""
    if rows:
        _write_part(job.out, rows)
    outcome.failed.update(bad)
    outcome.skipped.update({r["fact_id"]: r["reason"] for r in rows if r["status"] == "skipped"})
    if bad and not skip_bad:
        name, reason = next(iter(bad.items()))
        raise ExciseError(f"fact {name}: {reason}; mend it, or leave such facts out with --skip-bad")


def merge(jobs: Sequence[Job], fingerprint: str) -> Path | None:
    """All parts as one table, method by method in the order of the facts; None while any item is neither done nor failed."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = [key for job in jobs for key in job.keys(fingerprint).values()]
    wanted = set(order)
    found: dict[str, pa.Table] = {}
    failed: set[str] = set()
    for part in _parts(jobs[0].out):
        table = pq.read_table(part, schema=_schema())
        coded = table["key"].combine_chunks().dictionary_encode()
        codes = coded.indices.to_numpy()
        for code, key in enumerate(coded.dictionary.to_pylist()):
            # A fact that failed once and worked later counts as finished.
            if key in wanted and (key not in found or key in failed):
                found[key] = table.take((codes == code).nonzero()[0])
                (failed.add if found[key]["status"][0].as_py() == "failed" else failed.discard)(key)
    if len(found) < len(wanted):
        return None
    with atomic(jobs[0].out / TABLE) as temporary:
        pq.write_table(pa.concat_tables([found[key] for key in order]), temporary)
    return jobs[0].out / TABLE


def read_localization(path: str | Path, method: str | None = None) -> Localization:
    """One method's part of the merged table of a folder (or a .parquet file) as a Localization, failed facts left out.

    method: may be left out where the table holds one. Raises ValueError, naming those there are, where it holds more.
    """
    import numpy as np
    import pyarrow.parquet as pq

    file = Path(path) / TABLE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such table; run `excise localize ... --out {Path(path)}` to its end first")
    try:
        table = pq.read_table(file)
        if missing := [c for c in COLUMNS if c not in table.column_names]:
            raise ValueError(f"no column {missing[0]}")
        table = table.select(list(COLUMNS)).cast(_schema())
    except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's own errors are among these
        raise DamagedFile(f"{file}: not a table of `excise localize` ({error}); run it again") from error
    rows = [r for r in table.to_pylist() if r["site"] is not None]
    there = list(dict.fromkeys(r["method"] for r in rows))
    wanted = method.replace("-", "_") if method else there[0] if len(there) == 1 else None
    if there and wanted not in there:
        raise ValueError(f"{file} holds {', '.join(there)}; say which method")
    rows = [r for r in rows if r["method"] == wanted]
    facts = list(dict.fromkeys(r["fact_id"] for r in rows))
    sites = list(dict.fromkeys(r["site"] for r in rows))
    scores = np.full((len(facts), len(sites)), math.nan)
    at_fact, at_site = {f: i for i, f in enumerate(facts)}, {s: i for i, s in enumerate(sites)}
    for row in rows:
        scores[at_fact[row["fact_id"]], at_site[row["site"]]] = row["score"]
    recipe = {"method": wanted or "?", "file": str(file)}
    return Localization(tuple(Site.parse(s) for s in sites), scores, tuple(facts), recipe)


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


def finished(out: Path) -> set[str]:
    """Keys of the items that a folder holds; failed ones are not among them."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    tables = (pq.read_table(part, columns=["key", "status"]) for part in _parts(out))
    return {key for t in tables for key in t.filter(pc.not_equal(t["status"], "failed"))["key"].unique().to_pylist()}


def _write_part(out: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = hashlib.sha256("".join(sorted({r["key"] for r in rows})).encode()).hexdigest()[:16]
    with atomic(out / "parts" / f"part-{name}.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=_schema()), temporary)


def write_run(
    jobs: Sequence[Job], model: str, fingerprint: str, complete: bool, outcomes: Sequence[Outcome], seconds: float
) -> None:
    """Write run.json: what was run on what, whether it is complete, and what failed, by method."""
    record = {
        "command": "localize",
        "methods": {job.method.name: dict(job.settings) for job in jobs},
        "model": model,
        "fingerprint": fingerprint,
        "facts": len(jobs[0].facts),
        "complete": complete,
        "failed": {o.method: o.failed for o in outcomes if o.failed},
        "seconds": round(seconds, 3),
        "excise": __version__,
        "python": platform.python_version(),
    }
    write_text(jobs[0].out / "run.json", json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n")
