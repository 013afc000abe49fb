"""results.jsonl: what was kept is read back to the letter; what is damaged is told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from excise.errors import DamagedFile, ExciseError
from excise.scores import Results, Score
from excise.store import Store, read_results

# All that some reader or other takes for the end of a line.
ENDS = "a\x0b\x0c\x1c\x85\u2028\u2029b\nc"
SCORE: dict[str, Any] = {"fact": "f", "subject": "s", "group": "forget", "value": 1.0}
ITEM: dict[str, Any] = {
    "key": "k",
    "arm": "before",
    "evaluation": "recall",
    "mode": "none",
    "seconds": 0.5,
    "scores": [SCORE],
}


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return path


def test_words_of_a_model_do_not_break_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(ITEM | {"scores": [SCORE | {"detail": ENDS}]}, ensure_ascii=False) + "\n")
    assert read_results(path).scores["before", "recall"] == (Score("f", "s", "forget", 1.0, detail=ENDS),)
    assert Store(path).get("k", "before") == read_results(path).scores["before", "recall"]


def test_the_table_closes_with_what_is_made_of_many_scores(tmp_path: Path) -> None:
    kept = [
        Score(f"{g}{i}", f"{g}{i}", g, 1.0, variant="rougeL recall") for g in ("forget", "retain") for i in range(3)
    ]
    path = tmp_path / "results.jsonl"
    Store(path).close(Results({("before", "rouge"): tuple(kept)}))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["evaluation"], r["value"]) for r in rows] == [("rouge", 1.0), ("rouge", 1.0), ("deviation", 100.0)]


@pytest.mark.parametrize("last", ['{"key": "x", "sco', '{"key": "\u00e9'.encode()[:-1].decode("latin-1")])
def test_half_a_line_at_the_end_is_what_a_killed_run_leaves(tmp_path: Path, last: str) -> None:
    path = written(tmp_path / "results.jsonl", ITEM)
    with open(path, "ab") as file:
        file.write(last.encode("latin-1"))
    assert read_results(path).arms == ["before"]
    assert Store(path).get("k", "before") and path.read_text().count("\n") == 1


DAMAGED = {
    '{"key": "x", "sco': "not JSON",
    "[" * 9999: "nested too deep",
    "[1]": "not a JSON object",
    json.dumps(ITEM | {"scores": 3}): "'scores' is not a list",
    json.dumps(ITEM | {"scores": [3]}): "score 1 is not an object",
    json.dumps(ITEM | {"scores": [SCORE, SCORE | {"color": 1}]}): "score 2 has an unknown field 'color'",
    json.dumps(ITEM | {"scores": [SCORE | {"value": "high"}]}): "score 1 has a 'value' of the wrong kind: 'high'",
    json.dumps(ITEM | {"scores": [SCORE | {"value": True}]}): "'value' of the wrong kind",
    json.dumps(ITEM | {"scores": [{"fact": "f", "value": 1}]}): "score 1 lacks subject, group",
    json.dumps({k: v for k, v in ITEM.items() if k != "arm"}): "'arm' is missing",
    json.dumps(ITEM | {"mode": None}): "'mode' is not a text",
    json.dumps(ITEM | {"seconds": "long"}): "'seconds' is not a number",
}


@pytest.mark.parametrize(("line", "said"), DAMAGED.items(), ids=list(DAMAGED.values()))
def test_what_is_damaged_is_told_with_its_line_and_what_would_do(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path / "results.jsonl", ITEM, line, ITEM)
    for read in (read_results, Store):
        with pytest.raises(DamagedFile) as caught:
            read(path)
        message = str(caught.value)
        assert message.startswith(f"{path}, line 2: ") and said in message and "delete that line" in message
    assert path.read_text().count("\n") == 3, "nothing was thrown away"


def test_a_file_without_items_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExciseError, match="no finished item"):
        read_results(written(tmp_path / "results.jsonl", {"arm": "before", "value": 1}))
