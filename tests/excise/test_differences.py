"""Outlines, conflicts and differences: against the definitions, against planted changes, on every action and gate."""

import json

import numpy as np
import pytest
import torch
from handmade import hook_edits, out_matrix, randn, weight_edit

from excise.actions import Affine, Dense, LowRank, Reflect, Scale, Sparse
from excise.apply import bake
from excise.checkpoint import export
from excise.conflicts import conflicts, smallest_angle
from excise.differences import checkpoint_differences, edit_on_checkpoint, numerical_rank
from excise.edit_differences import edit_differences
from excise.edits import Change, Edit
from excise.errors import DamagedFile, ExciseError, FingerprintMismatch
from excise.gates import Linear
from excise.model import Model
from excise.outline import Outline, outline, read_outline, thin
from excise.sites import Site
from excise.tensorfile import Checkpoint, TensorFile
from tiny import tiny_model

SITE = "blocks.1.mlp.W_out"


def low_rank(seed, rank=2, d_in=12, d_out=9, site=SITE):
    return Edit((Change(Site(site), LowRank(randn(d_in, rank, seed=seed), randn(rank, d_out, seed=seed + 1))),))


@pytest.fixture(scope="module", params=["llama", "qwen3-moe", "gpt2", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def test_outlines_say_what_edits_say(model, tmp_path):
    for name, edit in {"weights": weight_edit(model), **hook_edits(model)}.items():
        read = read_outline(edit.save(tmp_path / f"{name}.safetensors"))
        for found in (read, outline(edit)):
            assert found.bakeable == edit.bakeable and found.recipe == edit.recipe
            rows, expected = found.rows(), edit.summary()
            assert [r.pop("norm") for r in rows] == pytest.approx([e.pop("norm") for e in expected])
            assert rows == expected
        assert all(d.change == "same" for d in edit_differences(read, outline(edit))), name
        for part, change in zip(read.parts, edit.changes, strict=True):
            if part.is_weight:
                weight = model.weight(change.site.point).detach()
                np.testing.assert_allclose(part.delta(weight.double().numpy()), change.action.delta(weight), atol=1e-5)


def test_interference_is_what_it_says():
    """Root mean square over random inputs that the first edit responds to, of the second's outputs over the first's."""
    a, b = low_rank(0, rank=3), low_rank(5, rank=2)
    (found,) = a.conflicts(b)
    delta_a, delta_b = (e.changes[0].action.delta(torch.zeros(1)).double() for e in (a, b))
    basis = torch.linalg.qr(a.changes[0].action.left.double())[0]
    x = torch.randn(200_000, 3, dtype=torch.float64) @ basis.mT
    ratio = (x @ delta_b).norm() / (x @ delta_a).norm()
    assert found.b_moves_a == pytest.approx(float(ratio), rel=0.01)
    assert found.cosine == pytest.approx(float((delta_a * delta_b).sum() / delta_a.norm() / delta_b.norm()))
    assert found.commute and found.kinds == ("LowRank", "LowRank")
    (back,) = b.conflicts(a)
    assert (back.b_moves_a, back.a_moves_b) == pytest.approx((found.a_moves_b, found.b_moves_a))


def test_angles_of_planted_subspaces():
    d = torch.eye(12)
    turned = 0.6 * d[0] + 0.8 * d[1]
    tiny = torch.nn.functional.normalize(d[2] + 1e-6 * d[5], dim=0)

    def edit(*inputs, output=0):
        return Edit((Change(Site(SITE), LowRank(torch.stack(inputs, 1), randn(len(inputs), 9, seed=output))),))

    (found,) = edit(d[0], d[3]).conflicts(edit(turned))
    assert found.input_angle == pytest.approx(np.degrees(np.arccos(0.6)), abs=1e-4)
    (found,) = edit(d[2], d[7]).conflicts(edit(tiny))
    assert found.input_angle == pytest.approx(np.degrees(1e-6), rel=0.1)
    (apart,) = edit(d[0], output=1).conflicts(edit(d[1], output=2))
    assert apart.input_angle == pytest.approx(90) and apart.b_moves_a == apart.a_moves_b == 0
    assert smallest_angle(np.eye(5)[:, :2], np.eye(5)[:, 1:3]) == 0


def test_sums_report_conflicts():
    a, b, c = low_rank(0), low_rank(3), low_rank(6, site="blocks.2.mlp.W_out")
    assert "conflicts" not in (a + c).recipe
    whole = c + a + b
    assert [r["site"] for r in whole.recipe["conflicts"]] == [SITE]
    json.dumps(whole.recipe)
    assert (a + b + c).recipe["conflicts"] == (a + b).recipe["conflicts"]
    scale = Edit((Change(Site(SITE), Scale(torch.tensor([0, 3, 5]), torch.zeros(3))),))
    other = Edit((Change(Site(SITE), Scale(torch.tensor([5, 3, 7]), torch.ones(3) * 2)),))
    (row,) = scale.conflicts(other)
    assert row.shared == 2 and not row.commute and row.cosine is None
    (row,) = scale.conflicts(a)
    assert row.shared is None and not row.commute


def test_shifts_and_neurons_at_one_activation():
    point, zero = Site("blocks.1.hook_resid_post"), torch.zeros(8)
    shift = Edit((Change(point, Affine(torch.zeros(8, 1), torch.zeros(1, 8), zero, randn(8))),))
    (row,) = shift.conflicts(shift)
    assert not row.commute and row.input_angle is None
    one = torch.ones(2)
    units = [Reflect(torch.tensor(u), one, one, one, one) for u in ([1, 2], [2, 3])]
    (row,) = Edit((Change(point, units[0]),)).conflicts(Edit((Change(point, units[1]),)))
    assert row.shared == 1


def test_two_edits():
    a, b = low_rank(0), low_rank(0).scaled(1.5)
    gate = Linear(Site("blocks.0.hook_resid_post"), randn(8), 0.0)
    (row,) = edit_differences(outline(a), outline(b))
    assert (row.change, row.rank) == ("changed", 2) and row.relative == pytest.approx(0.5)
    assert row.cosine == pytest.approx(1) and row.angle == pytest.approx(0, abs=1e-4)
    rows = edit_differences(outline(a + low_rank(3, site="blocks.2.mlp.W_out")), outline(low_rank(9, rank=3)))
    assert [r.change for r in rows] == ["changed", "only in a"] and rows[0].rank == 5
    change = a.changes[0]
    gated = [Edit((Change(change.site, change.action, g),)) for g in (gate, Linear(gate.site, gate.direction, 1.0))]
    (row,) = edit_differences(outline(gated[0]), outline(gated[1]))
    assert row.change == "changed" and row.relative == 0  # the same matrix behind another gate
    dense = Edit((Change(Site(SITE), Dense(change.action.delta(torch.zeros(1)))),))
    (row,) = edit_differences(outline(a), outline(dense))
    assert row.relative < 1e-6 and row.norm_b == pytest.approx(row.norm_a)


def test_thin_finds_the_numerical_rank():
    left, right = randn(40, 3).double().numpy(), randn(3, 30, seed=1).double().numpy()
    u, s, v = thin((np.concatenate([left, left], 1), np.concatenate([right, right], 0)))
    assert len(s) == 3
    np.testing.assert_allclose((u * s) @ v, 2 * left @ right, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoints_against_the_planted_change(model, dtype, tmp_path):
    """Which matrices changed, how much, and the rank that was planted, through the rounding of the stored type."""
    work = Model(*tiny_model(model.name, layers=3), model.name)
    work.hf.to(dtype)
    edit = planted(work)
    old, new = (export(work, e, tmp_path / n) for n, e in (("old", Edit(())), ("new", edit)))
    assert not list(checkpoint_differences(Checkpoint.open(old), Checkpoint.open(old)))
    rows = list(checkpoint_differences(Checkpoint.open(old), Checkpoint.open(new)))
    # Two planted changes; where transformers writes experts one by one, or fused, only the touched ones are named.
    assert len(rows) == 2 and all(r.change == "changed" for r in rows)
    by_rank = sorted(rows, key=lambda r: r.rank or 0)
    assert [r.rank for r in by_rank] == [1, 3]
    for row, change in zip(by_rank, sorted(edit.changes, key=lambda c: c.action.rank), strict=True):
        base = float(work.weight(change.site.point).detach().float().norm())
        fused = row.shape != tuple(work.weight(change.site.point).shape) and row.shape[0] * row.shape[1] > d_size(
            work, change
        )
        assert row.norm == pytest.approx(change.norm, rel=0.05)
        assert fused or row.relative == pytest.approx(change.norm / base, rel=0.05)
    exact = list(edit_on_checkpoint(Checkpoint.open(old), outline(edit)))
    assert sorted(r.rank for r in exact) == [1, 3]
    for row, change in zip(exact, edit.changes, strict=True):
        base = float(work.weight(change.site.point).detach().float().norm())
        assert (row.norm, row.relative) == pytest.approx((change.norm, change.norm / base), rel=1e-4)
        assert row.name.startswith(change.site.point)
    with pytest.raises(FingerprintMismatch, match="made for"):
        list(edit_on_checkpoint(Checkpoint.open(new), outline(edit)))


def d_size(model, change):
    return model.weight(change.site.point).numel()


def planted(model):
    first, second = out_matrix(model, 0), "blocks.2.attn.W_Q" if model.name != "neox" else "blocks.2.attn.W_O"
    changes = []
    for rank, name in ((3, first), (1, second)):
        d_in, d_out = model.weight(name).shape
        changes.append(Change(Site(name), LowRank(randn(d_in, rank, seed=rank), randn(rank, d_out, seed=9))))
    return Edit(
        tuple(changes), {"model": model.name}, {str(c.site): model.matrix_fingerprint(str(c.site)) for c in changes}
    )


def test_scaled_and_sparse_changes_of_a_checkpoint(tmp_path):
    model = Model(*tiny_model("llama", layers=3), "llama")
    folder = export(model, Edit(()), tmp_path / "base")
    edit = weight_edit(model)
    rows = list(edit_on_checkpoint(Checkpoint.open(folder), outline(edit)))
    old = {r.name.split(" ")[0]: model.weight(r.name.split(" ")[0]).detach().clone().double() for r in rows}
    baked = bake(model, edit)
    for row in rows:
        name = row.name.split(" ")[0]
        gap = model.weight(name).detach().double() - old[name]
        assert row.norm == pytest.approx(float(gap.norm()), rel=1e-5)
    baked.revert()
    with pytest.raises(ExciseError, match="lives in activations"):
        list(edit_on_checkpoint(Checkpoint.open(folder), outline(hook_edits(model)["affine"])))


def test_ranks_of_large_matrices():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((1100, 20)), rng.standard_normal((20, 1050))
    noise = 1e-3 * rng.standard_normal((1100, 1050))
    assert numerical_rank(left @ right + noise, 2e-3 * (1100**0.5 + 1050**0.5)) == (20, False)
    assert numerical_rank(rng.standard_normal((1100, 1050)), 0.0) == (256, True)


def test_damaged_files_are_refused(tmp_path):
    path = low_rank(0).save(tmp_path / "edit.safetensors")
    whole = path.read_bytes()
    for cut in (4, 40, len(whole) - 10):
        path.write_bytes(whole[:cut])
        with pytest.raises(DamagedFile, match="not a whole safetensors file"):
            read_outline(path)
    (tmp_path / "x").mkdir()
    with pytest.raises(ExciseError, match="give a folder with a safetensors checkpoint"):
        Checkpoint.open(tmp_path / "x")
    (tmp_path / "x" / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../edit.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="no such file"):
        Checkpoint.open(tmp_path / "x")


def test_other_types_of_tensors_read_as_they_are(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        "h": randn(3, 4).half(), "b": randn(5).bfloat16(), "d": randn(2, 2).double(), "i": torch.arange(4),
        "t": torch.tensor([True, False]), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0),
    }  # fmt: skip
    save_file(tensors, tmp_path / "t.safetensors")
    file = TensorFile.open(tmp_path / "t.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(
            file.read(name), tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        ), name


def test_an_outline_is_no_edit_of_activations():
    with pytest.raises(ValueError, match="does not change a matrix"):
        outline(hook_edits(Model(*tiny_model("llama"), "llama"))["affine"]).parts[0].delta(np.zeros((2, 2)))
    assert Outline((), {}, {}).bakeable and not conflicts(Outline((), {}, {}), outline(low_rank(0)))
    entries = Edit((Change(Site(SITE), Sparse(torch.tensor([1, 2]), torch.ones(2))),))
    assert entries.conflicts(entries)[0].shared == 2
