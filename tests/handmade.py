"""Edits by hand: one of every weight action, and one of every activation action and gate, for a tiny model."""

import torch

from excise.actions import Abstain, Affine, Clamp, Dense, LowRank, Reflect, Scale, Sparse
from excise.edits import Change, Edit
from excise.gates import Box, Linear, Quorum, Share
from excise.sites import Site


def out_matrix(model, layer):
    names = model.names.weights(layer)
    return next(n for n in names if n.endswith("mlp.W_out") or n.endswith("experts.1.W_out"))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_edit(model):
    """One change of every weight action, two of them on the same matrix, on two layers."""
    first, second = out_matrix(model, 0), out_matrix(model, 1)
    d_in, d_out = model.weight(first).shape
    changes = (
        Change(Site(first), LowRank(0.1 * randn(d_in, 2), randn(2, d_out, seed=1))),
        Change(Site(first), Scale(torch.tensor([0, 3]), torch.tensor([0.0, -2.0]))),
        Change(Site(second), Dense(0.05 * randn(d_in, d_out, seed=2))),
        Change(Site(second), Sparse(torch.tensor([1, 5, 40]), torch.tensor([1.0, -1.0, 2.0]))),
        Change(
            Site("blocks.2.attn.W_O"),
            LowRank(0.1 * randn(model.names.d_model, 1, seed=3), randn(1, model.names.d_model, seed=4)),
        ),
    )
    names = {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes}
    return Edit(
        changes, {"method": "by hand", "model": model.name}, {"tokenizer": model.tokenizer_fingerprint, **names}
    )


def hook_edits(model):
    d = model.names.d_model
    resid, late = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    shift = Affine(torch.zeros(d, 1), torch.zeros(1, d), torch.zeros(d), randn(d))
    features = (randn(d, 4, seed=5), torch.zeros(4), torch.zeros(4))
    quorum = Quorum(
        Site(resid), *features, torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0, 0, 1, 1]), 0.8, window=3
    )
    return {
        "affine": Edit((Change(Site(resid, "after_bos"), Affine(0.1 * randn(d, 2), randn(2, d), randn(d), randn(d))),)),
        "reflect": Edit((Change(Site(resid), Reflect(torch.arange(8), torch.zeros(8), torch.ones(8), torch.ones(8), torch.ones(8))),)),
        "clamp": Edit((Change(Site(resid), Clamp(*features, 0.3 * randn(4, d, seed=6), torch.full((4,), -2.0))),)),
        "linear gate": Edit((Change(Site(late), shift, Linear(Site(resid), randn(d, seed=7), 0.5)),)),
        "linear gate, sequence": Edit((Change(Site(late), shift, Linear(Site(resid), randn(d, seed=7), 1.0, "sequence")),)),
        "box gate": Edit((Change(Site(late), shift, Box(Site(resid), torch.full((d,), -1.5), torch.full((d,), 1.5), 0.7)),)),
        "share gate": Edit((Change(Site(late), shift, Share(Site(resid), *features, 0.8)),)),
        "quorum gate": Edit((Change(Site(late), shift, quorum),)),
        "abstain": Edit((Change(Site("unembed.hook_out"), Abstain(torch.tensor([7, 8, 9])), Linear(Site(resid), randn(d, seed=7), 0.5, "sequence")),)),
    }  # fmt: skip
