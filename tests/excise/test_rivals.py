"""Rivals: their losses by hand, the model left alone, the same copy twice, and that they do forget."""

import math

import pytest
import torch
from toy import taught, toy_facts

from excise.arms import Arm
from excise.errors import ExciseError
from excise.rivals import RIVALS, npo_loss, output_filter, prompt_guard, simnpo_loss, train_rival

FORGET, RETAIN = toy_facts().split("forget", "retain")


def recalled(arm, facts):
    answers = arm.answers(facts.prompts(held_out=False))
    return sum(a.exact for a in answers) / len(answers)


def test_losses_by_hand():
    now, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0])
    by_hand = [-2 / 0.5 * math.log(1 / (1 + math.exp(0.5 * d))) for d in (0.0, -1.0)]
    assert npo_loss(now, reference, 0.5).item() == pytest.approx(sum(by_hand) / 2)
    lengths = torch.tensor([1, 2])
    by_hand = [-2 / 2.5 * math.log(1 / (1 + math.exp(2.5 * p / n))) for p, n in ((-1.0, 1), (-2.0, 2))]
    assert simnpo_loss(now, lengths, 2.5).item() == pytest.approx(sum(by_hand) / 2)


def test_npo_becomes_ascent_for_small_beta():
    """Its gradient in log pi tends to that of gradient ascent (arXiv 2404.05868, section 3)."""
    now = torch.tensor([-1.5], requires_grad=True)
    npo_loss(now, torch.tensor([-1.0]), 1e-4).backward()
    assert now.grad.item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_forgets_in_a_copy_of_its_own(name):
    model = taught("forget", "retain")
    before = {k: v.clone() for k, v in model.hf.state_dict().items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arm = train_rival(name, model, FORGET, RETAIN, steps=40)
    torch.set_num_threads(threads)
    assert all(torch.equal(before[k], v) for k, v in model.hf.state_dict().items())
    assert arm.name == name and recalled(arm, FORGET) <= recalled(Arm("before", model), FORGET) - 0.3


def test_the_same_seed_gives_the_same_rival_and_time_ends_it():
    model = taught("forget", "retain")
    a, b = (train_rival("npo", model, FORGET, RETAIN, steps=3, seed=1).model.hf.state_dict() for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    short, whole = (train_rival("npo", model, FORGET, RETAIN, steps=s, seconds=t) for s, t in ((1, 1e9), (500, 0.0)))
    assert all(torch.equal(x, y) for x, y in zip(short.model.hf.parameters(), whole.model.hf.parameters(), strict=True))


def test_bad_requests():
    with pytest.raises(ExciseError, match="no rival 'magic'"):
        train_rival("magic", taught("forget", "retain"), FORGET, RETAIN)
    with pytest.raises(ExciseError, match="facts to keep"):
        train_rival("npo", taught("forget", "retain"), FORGET, RETAIN[:0])


def test_a_filter_hides_what_the_model_still_says():
    model = taught("forget", "retain")
    arm = output_filter(model, FORGET)
    assert recalled(arm, FORGET) == 0 and recalled(arm, RETAIN) >= 0.95 and arm.mode == "hook"
    prompt = FORGET[0].prompt
    assert FORGET[0].answer in Arm("before", model).generate([prompt], max_new_tokens=4)[0]
    assert arm.generate([prompt], max_new_tokens=4) == [arm.refusal]
    assert arm.answers([prompt])[0].probability > 0.5, "the model underneath knows it as well as before"


def test_a_guard_stands_before_every_prompt():
    guard = prompt_guard(taught("forget", "retain"), FORGET)
    assert "Tom" in guard.instruction and guard.mode == "hook"
    prompt = FORGET[0].prompt
    told = Arm("told", guard.model).answers([type(prompt)(f"{guard.instruction} {prompt.text}", prompt.answer)])
    assert guard.answers([prompt])[0].logprobs == pytest.approx(told[0].logprobs, abs=1e-5)
