"""An audit that is killed again and again ends with what an uninterrupted one gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ASKED = ("recall", "drift", "quantisation", "noise")
KILLS = 3
# One process that has imported everything: its children are killed, some while an item is being measured or written.
KILLER = """
import os, random, signal, sys, time
sys.path[:0] = [{root!r}]
import torch, transformers, evals
from pathlib import Path
from excise.cli import main
torch.set_num_threads(1)
words = {words!r}
child = os.fork()
if child == 0:
    os._exit(main([*words, {whole!r}]))
assert os.waitpid(child, 0)[1] == 0
print("killed from here on", flush=True)
rng, kept, kills, seen = random.Random({seed}), Path({out!r}) / "results.jsonl", 0, set()
while True:
    child = os.fork()
    if child == 0:
        os._exit(main([*words, {out!r}]))
    lines = lambda: kept.read_text().splitlines(keepends=True) if kept.exists() else []
    wanted, ended = len([x for x in lines() if '"scores"' in x]) + rng.randint(1, 3), 0
    while kills < {kills} and not ended and len(lines()) < wanted:
        time.sleep(0.002)
        ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        if kills < {kills}:
            time.sleep(rng.uniform(0.0, 0.05))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    whole = {{x for x in lines() if x.endswith("\\n") and '"scores"' in x}}
    assert seen <= whole, "an item that was finished was measured again, or is gone"
    seen = whole
    if not os.WIFSIGNALED(status):
        break
    kills += 1
print(kills, os.WEXITSTATUS(status))
"""


def items(folder: Path) -> list[dict[str, object]]:
    """What stands in results.jsonl, but for how long each item took."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def test_killed_and_continued_equals_uninterrupted(
    model_folder: Path, other_folder: Path, facts_file: Path, tmp_path: Path
) -> None:
    words = ["eval", *ASKED, "--before", str(model_folder), "--after", str(other_folder), "--facts", str(facts_file)]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = KILLER.format(
        root=str(ROOT), out=str(killed), whole=str(whole), words=[*words, "--out"], kills=KILLS, seed=7
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.splitlines()[-1] == f"{KILLS} 0", ended.stdout[-2000:]
    found = items(killed)
    assert found == items(whole)
    assert {r["evaluation"] for r in found if "scores" in r} == set(ASKED)
    # What is printed is made of the items alone.
    tables = [said.partition("\nEvery row")[0] for said in ended.stdout.split("killed from here on\n")]
    assert len(tables[0]) > 500 and tables[0] == tables[1]
