"""The search: every editor first, the same tries again from the same seed, nothing made twice, the front and the choice."""

import json
import time
from dataclasses import replace

import pytest
import torch

from excise import registry
from excise.actions import LowRank
from excise.choosing import audit_distance, audit_figures, choose, ideal
from excise.edits import Change, Edit
from excise.errors import ExciseError
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Results, Score
from excise.search import SPACES, Search
from excise.sites import Site
from excise.trials import Trial, best_of_each, front
from tiny import tiny_model

FACTS = Facts(
    Fact(n, n, "Rome", (Prompt(f"{n} was born in", "Rome", n),), group=g)
    for n, g in (("Ann Lee", "forget"), ("Bob Stone", "retain"))
)
MADE: list[tuple] = []


def _edit(size: float) -> Edit:
    left, right = torch.zeros(48, 1), torch.zeros(1, 32)
    left[0], right[0, 0] = size, 1.0
    return Edit((Change(Site("blocks.0.mlp.W_out"), LowRank(left, right)),))


def good(model, forget, retain, where=None, *, ridge: float = 0.3, copies: int = 1, seed: int = 0):
    MADE.append(("good", ridge, where and [str(s) for s in where.sites]))
    return _edit(1.0 + ridge)


def weak(model, forget, retain, where=None, *, seed: int = 0):
    MADE.append(("weak",))
    return _edit(0.5)


def unfit(model, forget, retain, where=None):
    raise ExciseError("no experts here")


class Size:
    """Judges an edit by its size alone: the larger, the less is said and the more is lost."""

    target, model, facts = (0.0, 0.0, 0.0), None, FACTS

    def __call__(self, edit):
        size = float(sum(c.norm for c in edit.changes))
        return max(0.0, 1 - size / 2), size / 10, 0.5


@pytest.fixture
def search(tmp_path, monkeypatch):
    MADE.clear()
    for function in (good, weak, unfit):
        registry._register("editor", function)
    monkeypatch.setitem(SPACES, "good", {"ridge": (0.03, 1.0), "copies": [1, 2]})
    monkeypatch.setattr("excise.search.PLACED", ("good",))
    model = Model(*tiny_model("llama"), "llama")
    yield Search(
        model, FACTS.group("forget"), FACTS.group("retain"), None, Size(), tmp_path, editors=("good", "weak", "unfit")
    )
    for name in ("good", "weak", "unfit"):
        registry._METHODS.pop(("editor", name))


def test_defaults_come_first_and_what_does_not_apply_is_not_tried_again(search):
    done = search.run(20)
    assert [t.editor for t in done[:3]] == ["good", "weak", "unfit"] and done[2].reason == "no experts here"
    assert done[3].options == {"ridge": 0.3, "copies": 2} and done[3].strength == 1, (
        "each choice is made otherwise once"
    )
    assert done[0].options == {"ridge": 0.3, "copies": 1} and done[0].block is None and done[0].strength == 1
    assert "unfit" not in {t.editor for t in done[3:]} and len([t for t in done if t.editor != "sum"]) == 20
    assert any(w and "subject_last" in w[0] for _, *rest in MADE for w in rest[1:]), "blocks are tried one by one"


def test_the_best_are_made_stronger_as_long_as_that_helps(search, monkeypatch):
    monkeypatch.setattr("excise.search.STRENGTHS", (0.7, 4.0))
    steps = [(t.editor, t.strength) for t in search.run(15)[4:15]]
    good = [("good", pytest.approx(1.3**i)) for i in (1, 2, 3)]  # the third disturbs more than it forgets
    weak = [("weak", pytest.approx(1.3**i)) for i in (1, 2, 3, 4, 5)]  # the sixth would be too strong
    assert steps == [*good, *good, *weak]
    assert [name for name, *_ in MADE] == ["good", "weak", "good"], "an edit is multiplied, not made again"


def test_the_same_seed_tries_the_same_and_makes_nothing_twice(search):
    first = search.run(8)
    made = len(MADE)
    again = search.run(8)
    assert again == first and len(MADE) == made
    more = search.run(14)
    assert [t for t in more if t.editor != "sum"][:8] == [t for t in first if t.editor != "sum"] and len(MADE) > made


def test_a_half_written_trial_is_made_again(search):
    first = search.run(3)
    (search.folder / f"{first[0].key}.json").unlink()
    assert search.run(3)[0].figures == first[0].figures


def test_time_that_is_up_leaves_one_try(search):
    assert [t.editor for t in search.run(8, ends=time.monotonic() - 1)] == ["good"]


def test_no_editor_that_applies_is_an_error_with_the_reasons(search):
    with pytest.raises(ExciseError, match="no editor applies: unfit: no experts here"):
        replace(search, editors=("unfit",)).run(3)


def test_good_edits_of_different_editors_are_added_up(search):
    sums = [t for t in search.run(6) if t.editor == "sum"]
    assert sums and " + " in sums[0].name
    parts = [search.folder / f"{key}.safetensors" for key in sums[0].options["keys"]]
    whole = sum(float(c.action.left.abs().sum()) for p in parts for c in Edit.load(p).changes)
    assert float(sum(c.action.left.abs().sum() for c in search.edit(sums[0]).changes)) == pytest.approx(whole)


def trial(name, *figures):
    return Trial(name, 0, name, {}, None, 1.0, *figures)


def test_the_front_holds_what_nothing_beats():
    tried = [
        trial("a", 0.0, 0.5, 0.5),
        trial("b", 0.5, 0.0, 0.5),
        trial("c", 0.5, 0.5, 0.5),
        trial("d", 0.0, 0.5, 0.6),
        trial("e"),
    ]
    assert [t.name for t in front(tried)] == ["a", "b"]
    # forget 0.2 at a utility of 0.9 beats forget 0.4 at 0.8; damage is what utility lacks
    assert [t.name for t in front([trial("x", 0.2, 1 - 0.9, 0.0), trial("y", 0.4, 1 - 0.8, 0.0)])] == ["x"]
    assert len(front([trial("a", 0.1, 0.1, 0.1), trial("b", 0.1, 0.1, 0.1)])) == 2, "equals do not beat each other"


def test_the_best_of_each_kind_stand_first():
    tried = [
        replace(trial("a", 0.0, 0.1, 0.1), options={"copies": 1, "ridge": 0.1}),
        replace(trial("a", 0.0, 0.0, 0.2), options={"copies": 1, "ridge": 0.2}),
        replace(trial("a", 0.3, 0.0, 0.1), options={"copies": 2, "ridge": 0.2}),
        replace(trial("b", 0.4, 0.0, 0.0), block=3),
        trial("c", 0.5, 0.5, 0.5),
    ]
    target = (0.0, 0.0, 0.0)
    assert best_of_each(tried, lambda t: t.kind, target) == [tried[0], tried[2], tried[3], tried[1]]
    assert best_of_each(tried, lambda t: t.editor, target) == [tried[0], tried[3], tried[1], tried[2]]


def test_the_nearest_in_the_audit_is_chosen(search, tmp_path):
    def measured(arms):
        values = {"before": 1.0, "oracle": 0.1} | {a.name: 0.4 - 0.05 * i for i, a in enumerate(arms)}
        return Results(
            {(a, "recall"): (Score("f", "s", "forget", v), Score("r", "t", "retain", 1.0)) for a, v in values.items()}
        )

    chosen = choose(search, measured, tmp_path, trials=6, ends=time.monotonic() + 60)
    distances = [a["distance"] for a in chosen.audited.values()]
    assert chosen.audited[chosen.trial.name]["distance"] == min(distances) and distances == sorted(
        distances, reverse=True
    )
    record = json.loads((tmp_path / "search.json").read_text())
    assert sum(t["chosen"] for t in record["trials"]) == 1 and record["chosen"] == chosen.trial.name


def test_without_an_oracle_the_target_says_nothing_and_keeps_everything():
    scores = [Score("f", "s", "forget", 1.0), Score("r", "t", "retain", 0.8), Score("n", "u", "neighbour", 1.0)]
    before = audit_figures(Results({("before", "recall"): tuple(scores)}), "before")
    assert before == pytest.approx({"forget": 1.0, "kept": 0.9}) and ideal(before) == pytest.approx(
        {"forget": 0.0, "kept": 0.9}
    )
    assert audit_distance(before, ideal(before)) == pytest.approx(1.0)
    assert ideal({"kept": 0.9, "lens": 1.0, "probe": 0.5}, 0.3) == {"kept": 0.9, "lens": 0.3, "probe": 0.0}
