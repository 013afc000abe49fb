"""Kept readings: taken once for the same model and arguments, again for any other, and no more of them than asked for."""

import torch

from excise.actions import LowRank
from excise.apply import applied, bake
from excise.edits import Change, Edit
from excise.facts import Prompt
from excise.keys import read_keys
from excise.memo import reading, readings_kept
from excise.model import Model
from excise.sites import Site
from tiny import tiny_model

ASKED = [Prompt("Ann Lee was born in", "Rome", "Ann Lee")]


def _counted():
    taken = []

    @reading
    def look(model, layers, *, scale=1.0):
        taken.append(layers)
        return {"first": model.hf.get_input_embeddings().weight[0].detach() * scale}

    return look, taken


def _edit(model, seed=0):
    torch.manual_seed(seed)
    wide, narrow = model.weight("blocks.0.mlp.W_out").shape
    return Edit((Change(Site("blocks.0.mlp.W_out"), LowRank(torch.randn(wide, 1), torch.randn(1, narrow))),))


def test_the_same_reading_is_taken_once_and_another_is_another():
    model, (look, taken) = Model(*tiny_model("llama"), "llama"), _counted()
    look(model, [0])
    look(model, [0])
    assert len(taken) == 2, "nothing is kept outside"
    with readings_kept():
        assert look(model, [0])["first"] is look(model, [0])["first"]
        look(model, [1])
        look(model, [0], scale=2.0)
        look(Model(*tiny_model("llama"), "other"), [0])
    assert len(taken) == 6
    with readings_kept():
        look(model, [0])
    assert len(taken) == 7


def test_an_edit_makes_another_model_and_undone_the_same_again():
    for family in ("llama", "mixtral"):
        model, (look, taken) = Model(*tiny_model(family), family), _counted()
        point = "blocks.0.mlp.W_out" if family == "llama" else "blocks.0.mlp.experts.1.W_out"
        wide, narrow = model.weight(point).shape
        edit = Edit((Change(Site(point), LowRank(torch.ones(wide, 1), torch.ones(1, narrow))),))
        with readings_kept():
            look(model, [0])
            with applied(model, edit):
                look(model, [0])
            baked = bake(model, edit)
            look(model, [0])
            baked.revert()
            assert len(taken) == 3
            look(model, [0])
            assert len(taken) == 3, "the bytes are as they were"


def test_keys_read_under_an_edit_are_never_those_of_the_model():
    model = Model(*tiny_model("llama"), "llama")
    plain = read_keys(model, ASKED, [1])[0][1]["blocks.1.mlp.W_out"]
    with readings_kept():
        kept = read_keys(model, ASKED, [1])[0][1]["blocks.1.mlp.W_out"]
        with applied(model, _edit(model)):
            changed = read_keys(model, ASKED, [1])[0][1]["blocks.1.mlp.W_out"]
        again = read_keys(model, ASKED, [1])[0][1]["blocks.1.mlp.W_out"]
    assert torch.equal(plain, kept) and again is kept and not torch.allclose(plain, changed)


def test_the_oldest_goes_when_there_is_no_room():
    model, (look, taken) = Model(*tiny_model("llama"), "llama"), _counted()
    room = look(model, [0])["first"].numel() * 4
    with readings_kept(2 * room):
        for layers in ([0], [1], [0], [2], [0], [1]):
            look(model, layers)
    assert taken[1:] == [[0], [1], [2], [1]]
