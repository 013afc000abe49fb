"""Neuron Adjust: statistics and choices by brute force, a planted neuron found, skills of the embedded models."""

from __future__ import annotations

import math

import pytest
import torch

from edit import neuron_adjust
from edit.neuron_adjust import Behaviour, Watch, choose, difference, effect, neuron_points
from excise.actions import Reflect
from excise.apply import applied
from excise.arms import Arm
from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Fact, Prompt
from excise.model import Model, load
from excise.scores import Localization
from excise.streaming import stream
from excise.testbed import exercises
from excise.testbed.skills import SKILLS
from excise.trace import read_batch
from tiny import tiny_model

WORDS = "rome old weights model city bank river stone lamp garden tower seven eleven music paper".split()


def facts(count: int, relation: str, *, name: str = "", first: int = 0) -> list[Fact]:
    """Prompts of five words in a fixed scramble, with a name of one token at their end if one is given."""
    found = []
    for i in range(first, first + count):
        text = " ".join([*(WORDS[(7 * i + 4 * j + i // 15) % len(WORDS)] for j in range(5)), *([name] if name else [])])
        found.append(Fact(f"{relation}-{i}", name, WORDS[i % 15], (Prompt(text, WORDS[i % 15], name),), relation))
    return found


def behaviour(seed: int, width: int = 50) -> Behaviour:
    draw = torch.Generator().manual_seed(seed)
    means, spreads = torch.randn(2, width, generator=draw).double(), torch.rand(2, width, generator=draw).double() + 0.5
    return Behaviour(means[0], spreads[0], means[1], spreads[1])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2", "neox"])
def test_behaviour_is_that_of_all_tokens_one_by_one(family: str, gated: bool) -> None:
    """Experts count the tokens routed to them; behind a gate, tokens from the subject's last one on."""
    model = Model(*tiny_model(family), family)
    forget, retain = facts(4, "f", name="Q"), facts(6, "r")
    points = neuron_points(model, 1)
    watch = Watch({f.id for f in forget}, gated=gated)
    model.batch_tokens = 64
    stream(model, [f.prompt for f in (*forget, *retain)], [(points, watch)])
    found = watch.behaviours()
    assert len(points) == (4 if family == "qwen3-moe" else 1)
    for point in points:
        rows: list[list[torch.Tensor]] = [[], []]
        for which, group in enumerate((forget, retain)):
            for fact in group:
                batch = model.encode([fact.prompt], answers=True)
                x = read_batch(model, batch, [point])[point][0].double()
                start = int(batch.has_bos[0])
                if gated:
                    start = (batch.subjects[0][1] if batch.subjects[0] else batch.starts[0]) - 1
                rows[which] += [token for token in x[start:] if token.any()]
        if min(map(len, rows)) < 2:
            assert point not in found
            continue
        for which, (mean, std) in enumerate(
            ((found[point].mean_forget, found[point].std_forget), (found[point].mean_retain, found[point].std_retain))
        ):
            truth = torch.stack(rows[which])
            torch.testing.assert_close(mean, truth.mean(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std, truth.std(0), rtol=1e-4, atol=1e-5)


def test_effect_and_difference_by_hand() -> None:
    b = Behaviour(
        *(
            torch.tensor(v).double()
            for v in ([3.0, 0.0, 1.0, 9.0], [1.0, 2.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0])
        )
    )
    assert effect(b).tolist() == pytest.approx([2 / math.sqrt(5), 0.5, 0.0, 0.0])  # the last one never varies: dead
    assert difference(b).tolist() == [2.0, -1.0, -math.inf, -math.inf]


@pytest.mark.parametrize("select", ["effect", "mean"])
@pytest.mark.parametrize("share", [0.005, 0.03, 0.5, 1.0])
def test_a_share_of_all_neurons_is_chosen_over_all_points_at_once(share: float, select: str) -> None:
    seen = {f"p{i}": behaviour(i) for i in range(4)}
    scores = {
        (p, i): float(s)
        for p, b in seen.items()
        for i, s in enumerate((effect if select == "effect" else difference)(b))
    }
    count = len(scores) - math.floor(len(scores) * (1 - share))
    best = set(sorted(scores, key=scores.__getitem__, reverse=True)[:count])
    assert {(p, int(u)) for p, units in choose(seen, share, select).items() for u in units} == best


def test_dead_neurons_are_never_chosen() -> None:
    b = behaviour(0)
    b.std_forget[7] = b.std_retain[7] = 1e-9
    b.mean_forget[7] = 100.0
    assert 7 not in choose({"p": b}, 1.0, "effect")["p"] and 7 not in choose({"p": b}, 1.0, "mean")["p"]


def planted() -> Model:
    """Neuron 5 of block 0 reads the direction in which the token Q differs from all others."""
    model = Model(*tiny_model("llama"), "llama")
    point = "blocks.0.mlp.hook_in"
    prompts = [f.prompt for f in (*facts(12, "f", name="Q"), *facts(24, "r"))]
    batch = model.encode(prompts)
    x = read_batch(model, batch, [point])[point]
    last = x[torch.arange(12), torch.tensor(batch.starts[:12]) - 1].mean(0)
    rest = x[12:][batch.mask[12:].bool()]
    with torch.no_grad():
        direction = torch.linalg.solve(torch.cov(rest.T) + 0.1 * torch.eye(x.shape[-1]), last - rest.mean(0))
        model.weight("blocks.0.mlp.W_gate")[:, 5] = 8 * direction / ((last - rest.mean(0)) @ direction)
    return model


def test_a_planted_neuron_is_the_one_that_is_adjusted_and_ends_up_as_on_retain_prompts() -> None:
    model = planted()
    forget, retain = facts(24, "f", name="Q"), facts(60, "r")
    edit = neuron_adjust(model, forget, retain, Localization.of(["blocks.0.mlp.hook_post"]), share=1e-9, rate=0.05)
    (change,) = edit.changes
    assert str(change.site) == "blocks.0.mlp.hook_pre@after_bos"
    assert isinstance(change.action, Reflect) and change.action.units.tolist() == [5]
    action, point = change.action, "blocks.0.mlp.hook_pre"
    new = [f.prompt for f in facts(12, "n", name="Q", first=100)]
    batch = model.encode(new)
    at = torch.arange(12), torch.tensor(batch.starts) - 1
    before = read_batch(model, batch, [point])[point][at]
    with applied(model, edit):
        after = read_batch(model, batch, [point])[point][at]
    apart = (before[:, 5].mean() - action.mean_retain) / action.std_retain
    assert apart > 3 and abs((after[:, 5].mean() - action.mean_retain) / action.std_retain) < apart / 2
    others = torch.arange(before.shape[1]) != 5
    assert torch.equal(after[:, others], before[:, others])
    plain = [f.prompt for f in facts(12, "n", first=100)]
    logits = model.logits(model.encode(plain))
    with applied(model, edit):
        assert torch.equal(model.logits(model.encode(plain)), logits)  # the gate is shut


def test_the_fit_does_not_depend_on_batches() -> None:
    found = []
    for tokens in (4096, 40):
        model = planted()
        model.batch_tokens = tokens
        found.append(neuron_adjust(model, facts(24, "f", name="Q"), facts(60, "r"), share=0.1, rate=0.05))
    assert [c.site for c in found[0].changes] == [c.site for c in found[1].changes]
    for a, b in zip(found[0].changes, found[1].changes, strict=True):
        assert torch.equal(a.action.units, b.action.units)
        for name in ("mean_retain", "std_retain", "mean_forget", "std_forget"):
            torch.testing.assert_close(getattr(a.action, name), getattr(b.action, name), rtol=1e-4, atol=1e-5)


def test_requests_that_cannot_be_served_say_why() -> None:
    model = Model(*tiny_model("llama"), "llama")
    with pytest.raises(ExciseError, match="give both"):
        neuron_adjust(model, facts(4, "f"), [])
    with pytest.raises(ValueError, match="selections are effect and mean"):
        neuron_adjust(model, facts(4, "f"), facts(4, "r"), select="size")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "skill", "share"), [("dense", "translation", 0.0), ("moe", "sorting", 1.0)])
def test_a_skill_goes_and_nothing_else(name: str, skill: str, share: float) -> None:
    """On exercises that neither training nor the editor saw, and people and countries the editor was not shown."""
    model, known = load(f"testbed:{name}"), exercises(name, skill, items=32, seed=1001)
    edit = neuron_adjust(model, known.group("forget"), known.group("retain"), share=share)

    def said(edit: Edit | None, prompts: list[Prompt]) -> float:
        return Arm("", model, edit).said(prompts)

    def asked(which: str) -> list[Prompt]:
        return known.where(lambda f: f.tags.get("skill") == which).prompts(held_out=True)

    others = [p for s in SKILLS if s != skill for p in asked(s)[::2]] + known.group("general").prompts()[::12]
    before = said(None, asked(skill)), said(None, others)
    assert said(edit, asked(skill)) <= 0.2 * before[0] and said(edit, others) >= 0.95 * before[1]
