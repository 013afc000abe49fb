"""The claims of the README, on the embedded models, for people and seeds that nothing was tuned on.

Seeds 0 to 9 are for development; the seeds here were drawn once and not looked at while choosing defaults.
"""

import functools

import pytest

from edit import control, rocr
from evals import drift, layer_skip, recall, refusal
from excise.arms import Arm, compare
from excise.edits import Edit
from excise.facts import GENERATIVE_FORMS
from excise.model import load
from excise.scores import Results
from excise.testbed import facts, general_text, refusals
from excise.verification import verify
from localize import causal_trace

# Half of the people to keep are not shown to the editor.
SIZES = {"retain": 32, "neighbours": 32}
CASES = [("dense", 1001), ("moe", 3003)]


@functools.cache
def edited(name: str, seed: int, copies: int = 1) -> Edit:
    model, known = load(f"testbed:{name}"), facts(name, seed=seed, retain=32, neighbours=24)
    forget, retain = known.shown.group("forget"), known.shown.group("retain", "neighbour")
    where = causal_trace(model, forget[::4], seed=seed)
    return rocr(model, forget, retain, where, texts=texts_of(name, seed)[100:], copies=copies, seed=seed)


def texts_of(name: str, seed: int) -> list[str]:
    people = facts(name, seed=seed, retain=32, neighbours=24).group("forget").subjects
    return general_text(name, 400, seed=seed, exclude=people)


@functools.cache
def measured(name: str, seed: int) -> Results:
    model, known = load(f"testbed:{name}"), facts(name, seed=seed, retain=32, neighbours=24)
    forget, retain = known.shown.group("forget"), known.shown.group("retain", "neighbour")
    texts, edit = texts_of(name, seed), edited(name, seed)
    assert verify(model, edit, forget.prompts("statement")[:16], retain.prompts("statement")[:16]).ok
    before, after = Arm("before", model), Arm("edited", model, edit)
    random, oracle = Arm("control", model, control(edit, seed=seed)), Arm("oracle", load(f"testbed:{name}-oracle"))

    def every_form(arm, facts):
        return recall(arm, facts, limit=96, words=0)

    def general_loss(arm, facts, *, before):
        return drift(arm, facts, before=before, texts=tuple(texts[:100]), limit=100)

    def declines(arm, facts):
        return refusal(arm, facts, refusals=tuple(refusals(name)), limit=64)

    # Each only on the arms of which something is claimed.
    asked = {
        every_form: (before, after, random),
        general_loss: (before, after),
        declines: (before, after, oracle),
    }
    parts = [compare(arms, None, [evaluation], known) for evaluation, arms in asked.items()]
    return parts[0] + parts[1] + parts[2]


def rows(results, arm, evaluation, group, forms=(), variant=""):
    found = [
        r
        for r in results.table()
        if (r.arm, r.evaluation, r.group, r.variant) == (arm, evaluation, group, variant)
        and (not forms or r.form in forms)
    ]
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), CASES)
class TestForgettingPeople:
    def test_before_they_are_known_in_every_form(self, name, seed):
        for row in rows(measured(name, seed), "before", "every_form", "forget", (*GENERATIVE_FORMS, "choice")):
            assert row.value >= 0.98, row

    def test_after_they_are_forgotten_in_every_generative_form(self, name, seed):
        found = rows(measured(name, seed), "edited", "every_form", "forget", GENERATIVE_FORMS)
        assert {r.form for r in found} == set(GENERATIVE_FORMS) and {r.held_out for r in found} == {True, False}
        for row in found:
            assert row.value <= 0.05, row

    def test_others_stay_also_those_no_editor_was_shown(self, name, seed):
        known = facts(name, seed=seed, **SIZES)
        assert {f.subject for f in known.shown}.isdisjoint(f.subject for f in known.checks)
        for group, floor in (("retain", 0.99), ("neighbour", 0.97)):
            for part in (known.shown, known.checks):
                ids = {f.id for f in part.group(group)}
                scores = measured(name, seed).scores["edited", "every_form"]
                mine = [s.value for s in scores if s.fact in ids and s.form in (*GENERATIVE_FORMS, "choice")]
                assert len(mine) >= 200 and sum(mine) / len(mine) >= floor, (group, sum(mine) / len(mine), len(mine))

    def test_general_loss_stays(self, name, seed):
        (row,) = rows(measured(name, seed), "edited", "general_loss", "general", variant="relative change")
        assert row.value <= 0.01, row

    def test_a_random_edit_of_the_same_size_forgets_nothing(self, name, seed):
        for row in rows(measured(name, seed), "control", "every_form", "forget", GENERATIVE_FORMS):
            assert row.value >= 0.90, row

    def test_the_edited_model_declines_like_the_oracle(self, name, seed):
        edited, oracle = (
            rows(measured(name, seed), arm, "declines", "forget", ("question",)) for arm in ("edited", "oracle")
        )
        for mine, wanted in zip(edited, oracle, strict=True):
            assert wanted.value >= 0.9 and mine.value >= 0.9, (mine, wanted)
        for row in rows(measured(name, seed), "edited", "declines", "retain"):
            assert row.value <= 0.01, row


@pytest.mark.slow
def test_with_two_copies_skipping_the_edited_layer_brings_nothing_back():
    """With one, every answer is back as soon as the edited MLP is left out (`benchmarks/audit_table.py`)."""
    name, seed = CASES[-1]
    known = facts(name, seed=seed, retain=32, neighbours=24).group("forget")
    edit = edited(name, seed, copies=2)
    assert len({c.site.layer for c in edit.changes}) == 2
    scores = layer_skip(Arm("edited", load(f"testbed:{name}"), edit), known, groups=("forget",), limit=16)
    worst = [s.value for s in scores if s.variant == "any"]
    assert len(worst) == 16 and sum(worst) / len(worst) <= 0.1
