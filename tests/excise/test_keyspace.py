"""Detectors of key space: closed forms, a false-positive rate that holds for data nobody has seen, planted regions."""

from __future__ import annotations

import random

import pytest
import torch

from excise import keyspace
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.gates import GateState
from excise.keyspace import conformal, detector
from excise.model import Model
from excise.regions import RIDGE, STATISTICS, Regions, discriminant
from excise.resampling import Interval
from excise.streaming import counted, stream
from tiny import tiny_model

WORDS = "rome old weights model city bank river stone lamp garden tower seven eleven music paper".split()
POINTS = ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"]


def sentences(count: int, seed: int, *, relation: str, name: str = "", held_out: bool = False) -> list[Fact]:
    """Facts with prompts of six words drawn at random, about nobody or about a name of one token at the end."""
    draw, found = random.Random(f"{relation}-{seed}"), []
    for i in range(count):
        text = " ".join([*(draw.choice(WORDS) for _ in range(6)), *([name] if name else [])])
        prompt = Prompt(text, draw.choice(WORDS), name, held_out=held_out)
        found.append(Fact(f"{relation}-{seed}-{i}", name, prompt.answer, (prompt,), relation, "retain"))
    return found


def tiny() -> Model:
    return Model(*tiny_model("llama"), "llama")


def opened(model: Model, gate, facts: list[Fact]) -> float:
    """Share of the prompts on which a gate opens, answers included."""
    prompts = [f.prompt for f in facts]
    hits = torch.zeros(len(prompts), dtype=torch.bool)

    def look(point, x, batch, index):
        hits[index] = gate.open(x, counted(batch), GateState()).any(1)

    stream(model, prompts, [([gate.site.point], look)])
    return float(hits.float().mean())


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.37])
@pytest.mark.parametrize("n", [1, 5, 30, 99])
def test_conformal_keeps_its_promise_exactly(n: int, rate: float) -> None:
    """Of n + 1 exchangeable scores each is as likely to be the new one: count those that exceed the others' threshold."""
    scores = torch.randn(n + 1, generator=torch.Generator().manual_seed(n)).tolist()
    limits = [conformal(scores[:i] + scores[i + 1 :], rate) for i in range(n + 1)]
    exceeded = sum(s > limit for s, (limit, _) in zip(scores, limits, strict=True)) / (n + 1)
    bound = limits[0][1]
    assert exceeded <= bound + 1e-12 and bound == max(rate, 1 / (n + 1))
    assert exceeded > bound - 1 / (n + 1) - 1e-12  # and does not promise less than it could


def test_discriminant_is_the_steadiest_readout_of_the_gap() -> None:
    """Among read-outs of gap 1 none varies less: every step that keeps the gap raises the variance."""
    draw = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 12, 12, generator=draw, dtype=torch.float64)
    within, ordinary = (f @ f.mT for f in factors)
    centres, mean = torch.randn(3, 12, generator=draw).double(), torch.randn(12, generator=draw).double()
    direction, offset = discriminant(centres, within, mean, ordinary)
    torch.testing.assert_close(
        centres @ direction - offset, torch.eye(3).double() + (centres @ direction - offset) * (1 - torch.eye(3))
    )
    torch.testing.assert_close(mean @ direction, offset)
    total = within + ordinary
    ridge = RIDGE * total.diagonal().mean() * torch.eye(12)
    for i in range(3):
        gap, best = centres[i] - mean, direction[:, i]
        for _ in range(50):
            step = torch.randn(12, generator=draw).double()
            step -= gap * (step @ gap) / (gap @ gap)
            other = best + 0.1 * step
            assert other @ (total + ridge) @ other > best @ (total + ridge) @ best


def test_extent_is_the_paper_s_box() -> None:
    """The smallest factor k at which a box holds all its vectors: from running minima and maxima, and by bisection."""
    x = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)) ** 3
    mean, std = x.mean(0), x.std(0)
    box = Regions("blocks.0.mlp.hook_post", "extent", mean[None], std)
    k = float((-box.score(x)).max())
    assert k == pytest.approx(float((torch.maximum(x.amax(0) - mean, mean - x.amin(0)) / std).max()), rel=1e-6)
    low, high = 0.0, 1e4
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if ((x - mean).abs() <= middle * std).all() else (middle, high)
    assert k == pytest.approx(high, abs=1e-5) and k <= 39 / 40**0.5
    assert box.gate(-k * 1.0001).hot(x[None]).all() and not box.gate(-k * 0.999).hot(x[None]).all()
    widths = [int(box.gate(-k * a).hot(3 * x[None]).sum()) for a in (0.2, 0.5, 1.0, 2.0, 3.5)]
    assert widths == sorted(widths) and widths[-1] == len(x)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_gate_opens_where_the_score_exceeds_its_threshold(statistic: str) -> None:
    draw = torch.Generator().manual_seed(1)
    centres, spread, x = (
        torch.randn(3, 8, generator=draw),
        torch.rand(8, generator=draw) + 0.5,
        torch.randn(4, 50, 8, generator=draw),
    )
    direction = torch.randn(8, 3, generator=draw) if statistic == "linear" else None
    regions = Regions(
        POINTS[0], statistic, centres, spread, direction, None if direction is None else torch.randn(3, generator=draw)
    )
    scores = regions.score(x)
    for threshold in scores.flatten()[::40].tolist():
        if statistic == "extent":  # a box is open at its edge: float32 decides there
            threshold += 1e-4
        assert torch.equal(regions.gate(threshold).hot(x), scores > threshold)
    with torch.no_grad():
        gate = regions.gate(float(scores.quantile(0.9)))
        valid = torch.rand(4, 50, generator=draw) < 0.8
        fires = gate.open(x, valid, GateState())
    assert torch.equal(fires, ((scores > float(scores.quantile(0.9))) & valid).cumsum(1) > 0)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_the_false_positive_rate_is_the_one_that_was_asked_for(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing sets forget apart, so that the threshold is all there is, and the best of three points is taken."""
    monkeypatch.setattr(keyspace, "wilson", lambda *_: Interval(1.0, 1.0, 1.0))
    model, rate, shares = tiny(), 0.15, []
    for seed in range(12):
        found = detector(
            model,
            sentences(12, seed, relation="a"),
            sentences(48, seed, relation="b"),
            POINTS,
            rate=rate,
            statistic=statistic,
        )
        assert found.report["bound"] == rate
        shares.append(opened(model, found.gate, sentences(60, seed, relation="new")))
    mean = sum(shares) / len(shares)
    # Given the calibration, a share varies by sqrt(rate (1 - rate) / 25); 12 of them and 720 prompts: sd 0.025.
    assert mean < rate + 2 * 0.025
    assert mean > 0.06 or statistic == "count"  # shares of 32 coordinates tie, and ties open nothing


def test_what_cannot_be_told_apart_is_refused() -> None:
    model, refused = tiny(), 0
    for seed in range(4):
        try:
            detector(model, sentences(12, seed, relation="a"), sentences(60, seed, relation="b"), POINTS, rate=0.1)
        except ExciseError as error:
            refused += "nothing at" in str(error)
    assert refused >= 3


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_a_planted_name_is_detected_at_no_cost(family: str, statistic: str) -> None:
    model = Model(*tiny_model(family), family)
    forget, retain = sentences(24, 0, relation="planted", name="Q"), sentences(60, 0, relation="b")
    found = detector(model, forget, retain, POINTS[:2], rate=0.05, statistic=statistic)
    least = 0.5 if statistic == "count" else 0.8  # shares of 32 coordinates are coarse
    assert found.report["detected"] >= least and found.report["regions"] == 1 and found.report["detected on"] == 6
    assert opened(model, found.gate, sentences(40, 7, relation="c", name="Q")) >= least
    assert opened(model, found.gate, sentences(80, 8, relation="d")) <= 0.1


def test_every_prompt_is_read_once_and_held_out_ones_never(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = keyspace.stream
    monkeypatch.setattr(
        keyspace,
        "stream",
        lambda m, prompts, looks: (read.extend(p.fact_id for p in prompts), plain(m, prompts, looks)),
    )
    monkeypatch.setattr(keyspace, "wilson", lambda *_: Interval(1.0, 1.0, 1.0))
    forget, retain = sentences(12, 0, relation="a"), sentences(40, 0, relation="b") + sentences(3, 0, relation="c")
    secret = sentences(9, 1, relation="a", held_out=True) + sentences(9, 1, relation="b", held_out=True)
    beside: list[str] = []
    look = (POINTS[:1], lambda point, x, batch, index: beside.extend(p.fact_id for p in batch.prompts))
    detector(tiny(), [*forget, *secret[:9]], [*retain, *secret[9:]], POINTS, rate=0.5, beside=[look])
    assert sorted(read) == sorted(beside) == sorted(f.id for f in (*forget, *retain))


def test_the_fit_depends_neither_on_batches_nor_on_the_order_of_calls() -> None:
    model = tiny()
    forget, retain = sentences(16, 0, relation="a", name="Q"), sentences(48, 0, relation="b")
    found = []
    for tokens in (model.batch_tokens, 40):
        model.batch_tokens = tokens
        found.append(detector(model, forget, retain, POINTS, rate=0.5, statistic="linear"))
    first, second = found
    assert first.report["point"] == second.report["point"]
    assert first.report["threshold"] == pytest.approx(second.report["threshold"], abs=1e-4)
    torch.testing.assert_close(first.gate.direction, second.gate.direction, rtol=1e-3, atol=1e-4)
    again = detector(model, forget, retain, POINTS, rate=0.5, statistic="linear")
    assert again.report == second.report and torch.equal(again.gate.direction, second.gate.direction)


def test_an_early_point_is_taken_where_its_gap_is_half_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny(), keyspace._calibrated
    forget, retain = sentences(24, 0, relation="planted", name="Q"), sentences(60, 0, relation="b")
    for margins, best, early in (((0.2, 0.5, 0.6), 2, 1), ((0.3, 0.2, 0.6), 2, 0), ((0.1, 0.6, 0.2), 1, 1)):
        for wanted, option in ((best, False), (early, True)):
            given = iter(margins)
            monkeypatch.setattr(keyspace, "_calibrated", lambda *a, g=given: plain(*a) | {"margin": next(g)})
            monkeypatch.setattr(keyspace, "wilson", lambda *_: Interval(1.0, 1.0, 1.0))
            assert detector(model, forget, retain, POINTS, rate=0.05, early=option).report["point"] == POINTS[wanted]


def test_requests_that_cannot_be_served_say_why() -> None:
    model, some = tiny(), sentences(8, 0, relation="a")
    with pytest.raises(ExciseError, match="nothing to detect"):
        detector(model, sentences(3, 0, relation="a", held_out=True), some, POINTS)
    with pytest.raises(ExciseError, match="calibrated on"):
        detector(model, some, [], POINTS)
    with pytest.raises(ExciseError, match="at least two"):
        detector(model, some, sentences(1, 0, relation="b"), POINTS)
    with pytest.raises(ValueError, match="no statistic"):
        detector(model, some, some, POINTS, statistic="sphere")
    with pytest.raises(ValueError, match="between 0 and 1"):
        detector(model, some, some, POINTS, rate=0)
