"""Aggregates by hand, from scores that were written down: no model runs here."""

from __future__ import annotations

import numpy as np
import pytest

from excise.aggregates import deviation_score, harmonic, linguistic_score, summary
from excise.comparison import pairs
from excise.oracle_distance import like_the_oracle, membership_score, privacy_leakage
from excise.scores import Results, Row, Score
from excise.statistics import ks, resampled_ks


def _scores(
    values: dict[str, float] | float, group: str, variant: str = "", n: int = 12, **keys: object
) -> list[Score]:
    given = values if isinstance(values, dict) else {f"s{i}": values for i in range(n)}
    return [Score(f"{s}/{group}", f"{group} {s}", group, v, variant=variant, **keys) for s, v in given.items()]


def _results(**arms: dict[str, list[Score]]) -> Results:
    return Results(
        {(a, e): tuple(s) for a, found in arms.items() for e, s in found.items()}, dict.fromkeys(arms, "none")
    )


def _row(rows: list[Row], evaluation: str, variant: str = "", arm: str = "edited") -> Row:
    (found,) = [r for r in rows if (r.arm, r.evaluation, r.variant) == (arm, evaluation, variant)]
    return found


def test_harmonic_mean() -> None:
    assert harmonic([0.5] * 9) == pytest.approx(0.5)
    assert harmonic([1.0] * 8 + [0.1]) == pytest.approx(0.5)
    assert harmonic([0.9, 0.6]) == pytest.approx(0.72)
    assert harmonic([1.0, 0.0]) == 0.0 and np.isnan(harmonic([1.0, np.nan]))
    assert harmonic([[1.0, 0.9], [0.0, 0.6]]) == pytest.approx([0.0, 0.72])


def test_deviation_score() -> None:
    assert deviation_score(0, 1) == 0 and deviation_score(1, 0) == pytest.approx(141.421, abs=1e-3)
    assert deviation_score(0.3, 0.6) == pytest.approx(50)
    assert [deviation_score(f, r) for f, r in ((0.109, 0.898), (0.106, 0.909))] == pytest.approx(
        [14.93, 13.97], abs=5e-3
    )


def test_linguistic_score() -> None:
    assert linguistic_score(1, 1, 1) == pytest.approx(0.5)
    assert linguistic_score(3, 3, 99) == pytest.approx(0.3329596, abs=1e-7)


def test_privacy_leakage_and_membership_score() -> None:
    assert [privacy_leakage(u, 0.5) for u in (0.9, 0.2, 1.0)] == pytest.approx([-80, 60, -100])
    assert membership_score(0.9, 0.5) == pytest.approx(0.2) and membership_score(0.9, 0.6) == pytest.approx(0.5)


def test_resampled_ks_is_the_test_on_resampled_items() -> None:
    rng = np.random.default_rng(0)
    a, b, subjects = rng.integers(0, 9, 24), rng.integers(2, 11, 24), np.repeat(np.arange(6), 4)
    drawn = resampled_ks(a, b, subjects, resamples=200, seed=3)
    from excise.resampling import _kept_counts

    for counts, d in zip(_kept_counts(6, 200, 3), drawn, strict=True):
        rows = np.repeat(np.arange(24), counts.astype(int)[subjects])
        assert d == pytest.approx(ks(a[rows], b[rows])[0])


def _audited() -> Results:
    """Two of three parts of what before knew are gone; people to keep lost a tenth."""
    kinds = {"probability": "", "rouge": "rougeL recall", "truth_ratio": "true better"}
    arms: dict[str, dict[str, list[Score]]] = {}
    for arm, known, kept in (("before", 1.0, 1.0), ("edited", 0.4, 0.9), ("oracle", 0.1, 1.0)):
        rng = np.random.default_rng(len(arm))
        found = {e: _scores(kept, "retain", v) + _scores(known, "forget", v) for e, v in kinds.items()}
        found["truth_ratio"] += _scores(
            {f"s{i}": x for i, x in enumerate(rng.normal(-9 * known, 1, 12))}, "forget", "log ratio"
        )
        found["truth_ratio"] += _scores(known, "forget", "knowledge")
        found["memorisation"] = _scores(known, "forget", "extraction strength") + _scores(
            known, "forget", "exact memorisation"
        )
        found["fluency"] = _scores(2.0 * kept, "retain", "entropy")
        losses = {"forget": rng.normal(3 - 2 * known, 0.5, 12), "unknown": rng.normal(3, 0.5, 12)}
        for attack in ("loss", "zlib", "min-k", "min-k++"):
            found.setdefault("privacy", []).extend(
                s for g, x in losses.items() for s in _scores({f"s{i}": v for i, v in enumerate(x)}, g, attack)
            )
        arms[arm] = found
    return _results(**arms)


def test_summary_of_an_audit() -> None:
    rows = summary(_audited())
    assert _row(rows, "model_utility").value == pytest.approx(0.9)
    assert _row(rows, "deviation", "rougeL recall").value == pytest.approx(100 * np.hypot(0.4, 0.1))
    assert _row(rows, "deviation", "rougeL recall, from the oracle").value == pytest.approx(100 * np.hypot(0.3, 0.1))
    for name in ("probability", "rouge, rougeL recall", "memorisation, extraction strength", "truth_ratio, knowledge"):
        assert _row(rows, "recovered", name).value == pytest.approx(1 / 3)
    assert _row(rows, "composite", "utility").value == pytest.approx(harmonic([0.9, 0.9]))
    before, edited = (_row(rows, "privacy_leak", "PrivLeak, loss", arm) for arm in ("before", "edited"))
    assert before.value < edited.value < 20 and before.low <= before.value <= before.high
    assert not [r for r in rows if r.arm == "oracle" and (r.evaluation == "forget_quality" or "PrivLeak" in r.variant)]
    distances = [_row(rows, "forget_quality", "D", arm) for arm in ("before", "edited")]
    assert distances[0].value == 1.0 and all(d.low <= d.value <= d.high for d in distances)
    assert _row(rows, "forget_quality", "log ratio above the oracle").high < 0
    far, near = (_row(rows, "forget_quality", "Wasserstein", arm).value for arm in ("before", "edited"))
    assert far > near > 1
    assert all(r.n > 0 and r.mode == "none" for r in rows)


def test_utility_takes_the_share_among_rivals_of_what_is_no_retain_fact() -> None:
    kinds = {"probability": "", "rouge": "rougeL recall", "truth_ratio": "true better"}
    scores = {
        ("edited", e): (
            *_scores(0.5, "retain", variant=v),
            *_scores(0.2 if e == "probability" else 0.5, "general", variant=v),
        )
        for e, v in kinds.items()
    }
    rows = summary(Results(scores, {"edited": "weight"}))
    assert _row(rows, "model_utility").value == pytest.approx(6 / (5 / 0.5 + 1 / 0.2))
    shares = {
        ("edited", "forced_choice"): (
            *_scores(0.9, "retain", variant="p(right)"),
            *_scores(0.5, "general", variant="p(right)"),
        )
    }
    rows = summary(Results({**scores, **shares}, {"edited": "weight"}))
    assert _row(rows, "model_utility").value == pytest.approx(0.5)
    assert _row(rows, "model_utility", "forced_choice, p(right), general").value == pytest.approx(0.5)
    assert not [
        r
        for r in summary(Results({k: v for k, v in scores.items() if k[1] != "rouge"}))
        if r.evaluation == "model_utility"
    ]


def test_memorisation_composite_needs_held_out_wordings() -> None:
    results = _audited()
    assert not [r for r in summary(results) if (r.evaluation, r.variant) == ("composite", "memorisation")]
    more = {
        (a, "probability"): (*s, *_scores(0.4, "forget", held_out=True))
        for (a, e), s in results.scores.items()
        if e == "probability"
    }
    rows = summary(Results({**results.scores, **more}, results.modes))
    assert _row(rows, "composite", "memorisation").value == pytest.approx(0.6)
    overall = _row(rows, "composite", "overall")
    assert overall.low <= overall.value <= overall.high < 1


def test_a_wording_that_could_not_be_asked_shifts_no_other() -> None:
    def arm(*values: float | None) -> dict[str, list[Score]]:
        return {"recall": [Score("f", "s", "forget", v, "question", reason="" if v else "too long") for v in values]}

    found = pairs(
        _results(edited=arm(None, 0.2, 0.3), before=arm(0.9, 0.8, 0.7)), "recall", "edited", "before", "forget"
    )
    assert (found.after, found.before) == ([0.2, 0.3], [0.8, 0.7])


def test_what_never_varied_claims_no_certainty() -> None:
    always = _results(
        edited={"rouge": _scores(0.0, "forget", "rouge1 recall") + _scores(1.0, "retain", "rouge1 recall")}
    )
    row = _row(summary(always), "deviation", "rouge1 recall")
    assert row.value == 0.0 and 5 < row.high < 40 and row.n == 24


def test_recovered_is_refused_where_before_and_oracle_agree() -> None:
    same = {"probability": _scores(0.5, "forget")}
    near = _results(before={"probability": _scores(0.53, "forget")}, edited=same, oracle=same)
    assert not [r for r in summary(near) if r.evaluation == "recovered"]
    assert summary(_results(edited=same)) == []


def test_privacy_without_an_oracle_says_so() -> None:
    privacy = _scores({"a": 0.1, "b": 0.2, "c": 0.3}, "forget", "loss") + _scores(
        {"a": 0.25, "b": 0.4, "c": 0.5}, "unknown", "loss"
    )
    rows = summary(_results(edited={"privacy": privacy}))
    assert _row(rows, "privacy_leak", "AUC, loss").value == pytest.approx(8 / 9)
    leak = _row(rows, "privacy_leak", "PrivLeak, loss, oracle taken as 0.5")
    assert leak.value == pytest.approx(100 * (0.5 - 8 / 9) / 0.5)


def test_equivalence_to_the_oracle_is_three_way() -> None:
    rng = np.random.default_rng(0)
    oracle = {f"s{i}": x for i, x in enumerate(rng.uniform(0.1, 0.3, 40))}

    def moved(by: float, spread: float = 0.01) -> str | None:
        values = {k: v + by + spread * rng.normal() for k, v in oracle.items()}
        results = _results(
            edited={"probability": _scores(values, "forget")}, oracle={"probability": _scores(oracle, "forget")}
        )
        found = like_the_oracle(results, "edited", "probability")
        return found and found.verdict

    assert [moved(0.0), moved(0.3), moved(-0.3), moved(0.04, 0.3)] == ["equivalent", "higher", "lower", "inconclusive"]
    assert like_the_oracle(_results(edited={}), "edited", "probability") is None
