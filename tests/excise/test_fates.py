"""Fates of single facts: the first word that applies, never more than the oracle allows, each with its evidence."""

import pytest

from excise import attacks as beside
from excise import registry
from excise.fates import INSIDE, counted, fates
from excise.findings import recovered
from excise.scores import Results, Score
from excise.statistics import wilson
from excise.verdict import verdict

FORMS = ("statement", "question", "choice")
WHO = {"before": "before", "edited": "edited", "oracle": "oracle"}


@pytest.fixture(autouse=True)
def families(monkeypatch):
    family = {"relearning": "elicitation", "few_shot": "elicitation", "lens": "intrinsic"}.get
    monkeypatch.setattr(beside, "family", lambda name: family(name) or "behavioural")


def recall(said, group="forget"):
    """`said`: by fact, the forms that are answered."""
    return [
        Score(fact, f"subject of {fact}", group, float(form in forms), form)
        for fact, forms in said.items()
        for form in FORMS
    ]


def attack(values, variant=""):
    return tuple(Score(f, f"subject of {f}", "forget", v, "statement", variant=variant) for f, v in values.items())


def planted(*, oracle=True, **edited):
    facts = list(edited)
    arms = {
        "before": recall(dict.fromkeys(facts, FORMS)) + recall({"kept": FORMS, "lost": FORMS}, "retain"),
        "edited": recall(edited) + recall({"kept": FORMS[:2], "lost": FORMS[:1]}, "retain"),
    }
    if oracle:
        arms["oracle"] = recall({f: ("question",) if f == "guessed" else () for f in facts})
    return {(arm, "recall"): tuple(scores) for arm, scores in arms.items()}


def words(scores):
    return {f.fact: f.word for f in fates(Results(scores))}


def test_what_is_still_said_is_stated_but_not_what_the_oracle_guesses():
    scores = planted(said=("question",), silent=(), guessed=("question",), chosen=("choice",))
    found = {f.fact: f for f in fates(Results(scores))}
    assert found["said"].word == "still stated" and found["said"].by == ("questions",)
    assert "1 of 3 prompts" in found["said"].evidence
    assert found["guessed"].word == found["silent"].word == "no longer stated"
    assert found["chosen"].word == "still stated", "its only choice was answered"
    assert (found["kept"].word, found["lost"].word) == ("kept", "collateral damage")
    assert "2 of 3 prompts lost" in found["lost"].evidence


def test_a_choice_that_may_be_a_guess_is_not_a_statement():
    scores = planted(chosen=())
    more = tuple(Score("chosen", "s", "forget", v, "choice") for v in (1.0, 0.0, 0.0))
    for arm in ("before", "edited"):
        scores[arm, "recall"] += (
            tuple(Score("chosen", "s", "forget", 1.0, "choice") for _ in more) if arm == "before" else more
        )
    assert words(scores)["chosen"] == "no longer stated"


def test_attacks_come_before_looks_inside_and_the_oracle_takes_both_back():
    facts = [f"back {i}" for i in range(8)] + ["inside", "taught", "gone"]
    scores = planted(**dict.fromkeys(facts, ()))
    for arm, hits in (("before", facts), ("edited", [*facts[:8], "taught"]), ("oracle", ["taught"])):
        scores[arm, "relearning"] = attack({f: float(f in hits) for f in facts}, "held-out people")
    for arm, hits in (("before", facts), ("edited", ["back 0", "inside"]), ("oracle", [])):
        scores[arm, "lens"] = attack({f: float(f in hits) for f in facts}, "hit@5, any layer")
    found = {f.fact: f for f in fates(Results(scores))}
    assert found["back 0"].word == "suppressed (recoverable)" and found["back 0"].by == ("relearning",)
    assert str(found["back 0"]).startswith("back 0: suppressed (recoverable: relearning);")
    assert found["inside"].word == "suppressed (found inside)" and found["inside"].by == ("lens",)
    assert found["taught"].word == found["gone"].word == "removed"
    told = counted(list(found.values()))
    assert "Of 11 facts to forget: 8 suppressed (recoverable), 1 suppressed (found inside), 2 removed." in told
    assert "Of 2 facts to keep: 1 collateral damage, 1 kept." in told
    assert [f.word for f in fates(Results(scores))][7:9] == ["suppressed (recoverable)", "suppressed (found inside)"]


def test_a_lucky_hit_of_an_attack_that_does_not_work_is_no_recovery(monkeypatch):
    """One hit in twenty facts is a guess; the same fact drawn by three attacks is not."""
    facts = [f"f{i}" for i in range(20)]
    scores = planted(**dict.fromkeys(facts, ()))
    names = ("few_shot", "relearning", "third")
    monkeypatch.setattr(beside, "family", lambda name: "elicitation" if name in names else "")
    for count, word in ((1, "no longer stated"), (3, "suppressed (recoverable)")):
        for name in names[:count]:
            for arm in ("before", "edited", "oracle"):
                scores[arm, name] = attack({f: float(arm == "edited" and f == "f3") for f in facts})
        assert words(scores)["f3"] == word
        assert words(scores)["f4"] == "no longer stated"


def test_without_an_oracle_nothing_is_found_inside_and_removal_is_not_claimed():
    scores = planted(oracle=False, a=())
    scores["edited", "lens"] = attack({"a": 1.0}, "hit@5, any layer")
    scores["edited", "few_shot"] = attack({"a": 0.0})
    assert words(scores)["a"] == "no longer stated"


def test_facts_that_were_not_known_before_are_not_judged():
    scores = planted(a=("question",))
    scores["before", "recall"] = tuple(recall({"a": ()}))
    assert words(scores) == {"a": "not known before"}


def attacked(edited, oracle, n=40):
    scores = planted(**{f"f{i}": () for i in range(n)})
    for arm, share in (("before", 1.0), ("edited", edited), ("oracle", oracle)):
        scores[arm, "few_shot"] = attack({f"f{i}": float(i < share * n) for i in range(n)})
        scores[arm, "relearning"] = attack({f"f{i}": 0.0 for i in range(n)}, "steps 2")
    return Results(scores, {"edited": "weight"})


def test_recovery_counts_beyond_what_the_oracle_gives_under_the_same_attack():
    said = recovered(attacked(0.5, 0.0), WHO)
    assert said.state == "bad" and "few shot +0.50" in said.text and "relearning" not in said.text
    assert recovered(attacked(0.5, 0.5), WHO).state == "good", "what an attack teaches the oracle too is not recalled"
    assert recovered(attacked(0.0, 0.0), WHO).state == "good"
    assert "comes back under attack" in verdict(attacked(0.5, 0.0)).headline
    assert recovered(attacked(0.0, 0.0, n=8), WHO).state == "unclear", "eight facts cannot exclude a tenth"


def test_where_all_facts_agree_the_interval_is_what_so_many_allow():
    for share in (0.0, 1.0):
        (found,) = (a for a in beside.attacks(attacked(share, 0.0, n=12), WHO) if a.name == "few_shot")
        assert (found.change.value, found.change.low, found.change.high) == pytest.approx(
            tuple(wilson(round(12 * share), 12))
        )


def test_the_report_tells_fates_and_counts_what_was_kept(tmp_path):
    from excise.report import write_report

    page = write_report(tmp_path, results=attacked(0.5, 0.0)).read_text()
    assert "What became of each fact" in page and "suppressed (recoverable)" in page
    assert "Of 2 facts to keep: 1 collateral damage, 1 kept." in page


def test_of_a_curve_over_steps_its_best_point_counts():
    scores = dict(attacked(0.5, 0.0).scores)
    for arm, share in (("edited", 0.5), ("oracle", 0.0)):
        curve = {
            name: attack({f"f{i}": float(i < share * 40) for i in range(40)}, name)
            for name in ("step 1", "step 5", "best")
        }
        scores[arm, "relearning"] = tuple(s for part in curve.values() for s in part)
    found = beside.attacks(Results(scores), WHO)
    assert [(a.name, a.variant) for a in found] == [("few_shot", ""), ("relearning", "best")]


@pytest.mark.parametrize(("name", "variant", "_"), INSIDE)
def test_what_looks_inside_is_called_by_a_name_that_it_gives(name, variant, _):
    said = registry.method("evaluation", name).function.__doc__
    assert f'"{variant}"' in said.replace("\n   ", "")
