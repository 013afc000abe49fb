"""Batch localization: sharded, resumable, nothing lost to a kill, nothing done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from excise import batch
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.names import UnknownName
from excise.registry import Method, Option
from excise.scores import Localization
from excise.sites import Site
from tiny import tiny_model

ROOT = Path(__file__).resolve().parents[2]
STABLE = [1, 0, 1, 0, 2, 0]


def some_facts(n: int) -> Facts:
    return Facts(
        Fact(f"f{i}", f"Person {i}", "Rome", (Prompt(f"Person {i} lives in", "Rome", f"Person {i}"),)) for i in range(n)
    )


def scores_of(facts: Sequence[Fact]) -> Localization:
    sites = [
        Site("blocks.0.hook_resid_post", "subject_last"),
        Site("blocks.1.mlp.hook_post", None, 3),
        Site("blocks.1.mlp.W_out"),
    ]
    values = np.array([[float(f.id[1:]) + j for j in range(3)] for f in facts])
    values[:, 1] = [np.nan if int(f.id[1:]) % 2 else v for f, v in zip(facts, values[:, 1], strict=True)]
    return Localization(tuple(sites), values, tuple(f.id for f in facts))


class Recorder:
    """A localizer that counts, and that fails on chosen facts."""

    def __init__(self, *, bad: Sequence[str] = (), error: Exception | None = None) -> None:
        self.seen: list[str] = []
        self.bad, self.error = set(bad), error

    def __call__(self, model: Model, facts: Facts, **settings: Any) -> Localization:
        if self.bad & {f.id for f in facts}:
            raise self.error or ValueError("the subject got no token of its own")
        self.seen += [f.id for f in facts]
        return scores_of(facts)

    def job(self, facts: Facts, out: Path, **settings: Any) -> batch.Job:
        return batch.Job(Method("localizer", "recorder", self, (), ""), settings, facts, out)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*tiny_model("llama"), "tiny")


def rows(path: Path | None) -> list[dict[str, Any]]:
    assert path is not None
    found: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return found


def test_table_and_localization(model: Model, tmp_path: Path) -> None:
    facts = some_facts(3)
    done = batch.localize(model, Recorder().job(facts, tmp_path))
    assert (done.computed, done.found, done.failed) == (3, 0, {})
    table = rows(done.table)
    assert [r["fact_id"] for r in table] == ["f0"] * 3 + ["f1"] * 2 + ["f2"] * 3
    assert {k: v for k, v in table[1].items() if v is not None and k != "key"} == {
        "fact_id": "f0", "method": "recorder", "status": "scored", "score": 1.0,
        "site": "blocks.1.mlp.hook_post#3", "point": "blocks.1.mlp.hook_post", "layer": 1, "unit": 3,
    }  # fmt: skip
    found, expected = batch.read_localization(tmp_path), scores_of(facts)
    assert (found.sites, found.fact_ids) == (expected.sites, expected.fact_ids)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert json.loads((tmp_path / "run.json").read_text())["complete"] is True


def test_a_second_run_computes_nothing(model: Model, tmp_path: Path) -> None:
    first = batch.localize(model, Recorder().job(some_facts(20), tmp_path))
    before = rows(first.table)
    again = Recorder()
    done = batch.localize(model, again.job(some_facts(20), tmp_path))
    assert again.seen == [] and (done.computed, done.found) == (0, 20)
    assert rows(done.table) == before


def test_new_facts_and_new_settings_are_computed(model: Model, tmp_path: Path) -> None:
    batch.localize(model, Recorder().job(some_facts(5), tmp_path, window=1))
    more, other = Recorder(), Recorder()
    assert batch.localize(model, more.job(some_facts(7), tmp_path, window=1)).found == 5
    assert more.seen == ["f5", "f6"]
    assert batch.localize(model, other.job(some_facts(7), tmp_path, window=2)).computed == 7
    changed = Facts(Fact(f.id, f.subject, "Oslo", f.prompts) for f in some_facts(7))
    assert batch.localize(model, Recorder().job(changed, tmp_path, window=2)).computed == 7


def test_another_model_is_another_item(model: Model, tmp_path: Path) -> None:
    batch.localize(model, Recorder().job(some_facts(2), tmp_path))
    other = Model(*tiny_model("llama", seed=1), "other")
    assert batch.localize(other, Recorder().job(some_facts(2), tmp_path)).computed == 2


def test_shards_cover_everything_once(model: Model, tmp_path: Path) -> None:
    facts, seen = some_facts(40), []
    for shard in range(3):
        recorder = Recorder()
        done = batch.localize(model, recorder.job(facts, tmp_path), shard=shard, shards=3)
        assert (done.table is None) == (shard < 2)
        seen += recorder.seen
    assert sorted(seen) == sorted(f.id for f in facts)
    whole = batch.localize(model, Recorder().job(facts, tmp_path / "whole"))
    assert rows(done.table) == rows(whole.table)


def test_shard_of_is_stable() -> None:
    assert [batch.shard_of(f"f{i}", 4) for i in range(6)] == STABLE
    assert batch.shard_of("curie-born", 64) == 19


def test_a_bad_fact_stops_the_run_but_costs_nothing(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ExciseError, match=r"fact f3: the subject got no token of its own.*--skip-bad"):
        batch.localize(model, Recorder(bad=["f3"]).job(some_facts(8), tmp_path))
    again = Recorder()
    batch.localize(model, again.job(some_facts(8), tmp_path))
    assert again.seen == ["f3"]


def test_skip_bad_records_the_reason(model: Model, tmp_path: Path) -> None:
    done = batch.localize(model, Recorder(bad=["f3"]).job(some_facts(8), tmp_path), skip_bad=True)
    assert done.failed == {"f3": "the subject got no token of its own"} and done.computed == 7
    failed = [r for r in rows(done.table) if r["status"] == "failed"]
    assert [(r["fact_id"], r["site"], r["score"], r["reason"]) for r in failed] == [
        ("f3", None, None, done.failed["f3"])
    ]
    assert "f3" not in batch.read_localization(tmp_path).fact_ids
    mended = batch.localize(model, Recorder().job(some_facts(8), tmp_path), skip_bad=True)
    assert mended.computed == 1 and {r["status"] for r in rows(mended.table)} == {"scored"}


def test_skipped_facts_are_finished(model: Model, tmp_path: Path) -> None:
    class Silent(Recorder):
        def __call__(self, model: Model, facts: Facts, **settings: Any) -> Localization:
            found = super().__call__(model, facts)
            return Localization(
                found.sites,
                np.full_like(found.scores, np.nan),
                found.fact_ids,
                {"skipped": [{"fact": "f1", "reason": "never knew it"}]},
            )

    done = batch.localize(model, Silent().job(some_facts(2), tmp_path))
    assert done.skipped == {"f0": "no site has a score", "f1": "never knew it"} and not done.failed
    assert [r["status"] for r in rows(done.table)] == ["skipped", "skipped"]
    again = Recorder()
    assert batch.localize(model, again.job(some_facts(2), tmp_path)).found == 2 and not again.seen


def test_the_pool_is_all_facts(model: Model, tmp_path: Path) -> None:
    lent: list[int] = []

    def borrower(model: Model, facts: Facts, *, pool: Facts) -> Localization:
        lent.append(len(pool))
        return scores_of(facts)

    method = Method("localizer", "borrower", borrower, (Option("pool", None, "Facts | None", ""),), "")
    batch.localize(model, batch.Job(method, {}, some_facts(20), tmp_path), shard=0, shards=2)
    assert set(lent) == {20}


def test_a_site_that_does_not_exist_is_nobodys_bad_fact(model: Model, tmp_path: Path) -> None:
    with pytest.raises(UnknownName):
        batch.localize(
            model, Recorder(bad=["f0"], error=UnknownName("no block 9")).job(some_facts(2), tmp_path), skip_bad=True
        )


def test_full_disk_leaves_nothing_half_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, write, count = some_facts(20), pq.write_table, []

    def full(table: Any, where: Any) -> None:
        count.append(1)
        if len(count) == 2:
            Path(where).write_bytes(b"PAR1 half")
            raise OSError(28, "No space left on device")
        write(table, where)

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(ExciseError, match="No space left on device"):
        batch.localize(model, Recorder().job(facts, tmp_path))
    assert len(list((tmp_path / "parts").iterdir())) == 1
    again = Recorder()
    done = batch.localize(model, again.job(facts, tmp_path))
    assert (done.found, len(again.seen)) == (8, 12)


KILLED = """
import sys, time
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
from pathlib import Path
from tiny import tiny_model
from test_batch import Recorder, some_facts
from excise import batch
from excise.model import Model

class Slow(Recorder):
    def __call__(self, model, facts, **settings):
        time.sleep(0.1)
        return super().__call__(model, facts)

batch.localize(Model(*tiny_model("llama"), "tiny"), Slow().job(some_facts(400), Path({out!r})))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(model: Model, tmp_path: Path, how: signal.Signals) -> None:
    out, tests = tmp_path / "run", ROOT / "tests"
    code = KILLED.format(root=str(ROOT), tests=str(tests), here=str(tests / "excise"), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, env=dict(os.environ))
    deadline = time.monotonic() + 120
    while len(list((out / "parts").glob("part-*.parquet"))) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(how)
    process.wait(30)
    kept = len(list((out / "parts").glob("part-*.parquet")))
    assert not (out / batch.TABLE).exists()
    again = Recorder()
    done = batch.localize(model, again.job(some_facts(400), out))
    assert done.found == kept * batch.CHUNK and len(again.seen) == 400 - done.found
    whole = batch.localize(model, Recorder().job(some_facts(400), tmp_path / "whole"))
    assert rows(done.table) == rows(whole.table)
