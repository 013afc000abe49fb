"""Arms: teacher forcing equals decoding, edits are entered and left, every evaluation meets every arm."""

import pytest
import torch

from excise.actions import Affine, LowRank
from excise.arms import Arm, compare
from excise.edits import Change, Edit
from excise.facts import Fact, Facts, Prompt
from excise.model import Model
from excise.scores import Score
from excise.sites import Site
from tiny import tiny_model

PROMPTS = [
    Prompt("Ann Lee was born in", "Rome", "Ann Lee"),
    Prompt("A cat", "sat on the mat"),
    Prompt("Where?", "here", chat=True),
]
FACTS = Facts([Fact("a", "Ann Lee", "Rome", (PROMPTS[0],))])


@pytest.fixture(params=["llama", "qwen3-moe"])
def model(request):
    return Model(*tiny_model(request.param), request.param)


def some_edit(model):
    d = model.names.d_model
    left, right = torch.randn(d, 1, generator=torch.Generator().manual_seed(0)), torch.full((1, d), 0.3)
    return Edit((Change(Site("blocks.0.attn.W_O"), LowRank(left, right)),))


def test_answers_equal_one_by_one_log_probabilities(model):
    answers = Arm("before", model).answers(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        batch = model.encode([prompt], answers=True)
        logp = model.logits(batch)[0].log_softmax(-1)
        expected = [float(logp[t - 1, batch.ids[0, t]]) for t in range(batch.starts[0], batch.lengths[0])]
        assert answer.logprobs == pytest.approx(expected, abs=1e-4)
        assert answer.probability == pytest.approx(torch.tensor(expected).mean().exp().item(), rel=1e-3)


def test_candidates_of_one_token_share_a_row_and_lose_nothing(model, monkeypatch):
    """Letters after one text are read from one row; a longer answer has its own."""
    asked = [Prompt("A cat\n", answer) for answer in ("a", "b", "sat on")]
    alone = [Arm("before", model).answers([p])[0] for p in asked]
    rows = []
    plain = model.logits
    monkeypatch.setattr(model, "logits", lambda batch: (rows.append(len(batch)), plain(batch))[1])
    together = Arm("before", model).answers(asked)
    lengths = [len(a.logprobs) for a in alone]
    assert sum(rows) == 2 and [n > 1 for n in lengths] == [False, False, True]
    for a, b in zip(alone, together, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert (a.argmax, a.targets, a.ranks, a.exact) == (b.argmax, b.targets, b.ranks, b.exact)


def test_ranks_and_targets(model):
    (answer,) = Arm("before", model).answers(PROMPTS[1:2])
    batch = model.encode(PROMPTS[1:2], answers=True)
    logits = batch.answer_logits(model.logits(batch), 0)
    assert answer.targets == tuple(batch.answer(0).tolist())
    order = logits.argsort(-1, descending=True)
    expected = [row.tolist().index(t) + 1 for row, t in zip(order, answer.targets, strict=True)]
    assert list(answer.ranks) == expected
    assert answer.exact == all(rank == 1 for rank in answer.ranks)


def test_exact_answers_are_those_that_greedy_decoding_says(model):
    """The model's own greedy words, given as the answer, are exact; any other first word is not."""
    arm = Arm("before", model)
    ids = model.encode(PROMPTS[:1]).ids
    out = model.hf.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :].tolist()
    assert arm.answers(PROMPTS[:1])[0].argmax[0] == out[0]


def test_an_arm_is_entered_and_left(model):
    before, edited = Arm("before", model), Arm("edited", model, some_edit(model))
    plain = before.losses(["a text to read", "another"])
    assert edited.losses(["a text to read", "another"]) != plain
    assert Arm("again", model).losses(["a text to read", "another"]) == plain
    assert (before.mode, edited.mode) == ("none", "weight")
    d = model.names.d_model
    hook = Affine(torch.zeros(d, 1), torch.zeros(1, d), torch.zeros(d), torch.ones(d))
    assert Arm("hook", model, Edit((Change(Site("blocks.0.hook_resid_post"), hook),))).mode == "hook"


def test_answers_are_kept_and_duplicates_cost_nothing(model, monkeypatch):
    arm = Arm("before", model)
    first = arm.answers([PROMPTS[0], PROMPTS[0]])
    monkeypatch.setattr(model, "logits", None)
    assert arm.answers([PROMPTS[0]]) == first[:1]


def test_compare_runs_everything_on_every_arm(model):
    seen = []

    def asked(arm, facts, *, before):
        seen.append((arm.name, before.name))
        return [Score(f.id, f.subject, f.group, arm.answers([f.prompt])[0].probability) for f in facts]

    results = compare(model, {"edited": some_edit(model)}, [asked], FACTS, oracle=model)
    assert seen == [("before", "before"), ("edited", "before"), ("oracle", "before")]
    assert results.arms == ["before", "edited", "oracle"] and results.evaluations == ["asked"]
    assert results.modes == {"before": "none", "edited": "weight", "oracle": "none"}
    assert results.value("before", "asked").value == results.value("oracle", "asked").value
    assert results.value("edited", "asked").value != results.value("before", "asked").value
    with pytest.raises(KeyError, match="0 rows match"):
        results.value("before", "nothing")
    with pytest.raises(ValueError, match="two arms are called 'before'"):
        compare(model, {"before": some_edit(model)}, [asked], FACTS)


def test_a_held_edit_stands_in_the_weights_and_leaves_to_the_bit(model):
    arm = Arm("edited", model, some_edit(model))
    shown, matrix = arm.answers(PROMPTS), model.weight("blocks.0.attn.W_O")
    old = matrix.detach().clone()
    with pytest.raises(RuntimeError, match="half-way"), arm.held() as inside:
        assert inside.edit is None and not torch.equal(matrix, old)
        for a, b in zip(inside.answers(PROMPTS), shown, strict=True):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        raise RuntimeError("half-way")
    assert torch.equal(matrix, old)


def test_what_greedy_decoding_says_is_asked_once(model, monkeypatch):
    arm, passes = Arm("before", model), []
    generate = model.generate_all
    monkeypatch.setattr(model, "generate_all", lambda *a, **k: passes.append(len(a[0])) or generate(*a, **k))
    first = arm.generate(PROMPTS[:2], max_new_tokens=3)
    assert arm.generate(PROMPTS, max_new_tokens=3)[:2] == first and passes == [2, 1]
    arm.generate(PROMPTS[:1], max_new_tokens=2)
    arm.generate(PROMPTS[:1], max_new_tokens=3, do_sample=True)
    arm.generate(PROMPTS[:1], max_new_tokens=3, do_sample=True)
    assert passes == [2, 1, 1, 1, 1], "other lengths and drawn words are asked anew"
