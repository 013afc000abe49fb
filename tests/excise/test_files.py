"""The container: round trips, damage, foreign content, and nothing half-written."""

import errno
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from excise.actions import LowRank
from excise.edits import Change, Edit
from excise.errors import DamagedFile, ExciseError
from excise.files import atomic, inspect, write_container, write_text
from excise.scores import Localization, TraceMap
from excise.sites import Site


def some_edit():
    return Edit(
        (Change(Site("blocks.0.mlp.W_out"), LowRank(torch.randn(4, 1), torch.randn(1, 3))),), {"method": "by hand"}
    )


def test_localizations_round_trip(tmp_path):
    maps = (TraceMap("a", ("<s>", "Ann", "Lee"), (1, 3), {"resid": np.random.rand(2, 3)}, 0.1, 0.9),)
    sites = (Site("blocks.0.hook_resid_post", "subject_last"), Site.parse("blocks.1.mlp.W_out#4"))
    scores = np.array([[0.5, np.nan], [0.25, 1.0]])
    first = Localization(sites, scores, ("a", "b"), {"method": "x"}, np.random.rand(2, 5), maps)
    again = Localization.load(first.save(tmp_path / "l.safetensors"))
    np.testing.assert_array_equal(again.scores, scores)
    np.testing.assert_array_equal(again.directions, first.directions)
    np.testing.assert_array_equal(again.maps[0].values["resid"], maps[0].values["resid"])
    assert (again.sites, again.fact_ids, again.recipe) == (sites, ("a", "b"), {"method": "x"})
    assert again.maps[0].tokens == maps[0].tokens and again.maps[0].subject == (1, 3)
    np.testing.assert_allclose(again.average, [0.375, 1.0])
    assert [str(s) for s in again.top(1).sites] == ["blocks.1.mlp.W_out#4"]


def test_damage_is_named(tmp_path):
    path = some_edit().save(tmp_path / "e.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedFile, match="not a whole safetensors file"):
        Edit.load(path)
    path.write_bytes(b"")
    with pytest.raises(DamagedFile):
        inspect(path)
    with pytest.raises(FileNotFoundError):
        Edit.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(DamagedFile, match="not one of excise's"):
        Edit.load(tmp_path / "foreign.safetensors")


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = some_edit().save(tmp_path / "e.safetensors")
    with pytest.raises(DamagedFile, match="'edit', and 'localization' is wanted"):
        Localization.load(path)


@pytest.mark.parametrize("action", [{"type": "os.system"}, {"type": "Edit"}, {"type": "LowRank"}])
def test_types_outside_the_list_are_never_built(tmp_path, action):
    header = {"changes": [{"site": "blocks.0.mlp.W_out", "action": action}], "recipe": {}, "fingerprints": {}}
    path = write_container(tmp_path / "e.safetensors", "edit", header, {})
    with pytest.raises(DamagedFile, match="cannot be read"):
        Edit.load(path)


def test_newer_formats_are_refused(tmp_path):
    save_file({}, tmp_path / "e.safetensors", metadata={"excise": json.dumps({"format": 99, "kind": "edit"})})
    with pytest.raises(DamagedFile, match="format 99"):
        Edit.load(tmp_path / "e.safetensors")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = write_text(tmp_path / "a.json", "old")
    with pytest.raises(ExciseError, match="free some space"), atomic(path) as temporary:
        temporary.write_text("half of the ne")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_tensors_survive_whatever_their_layout(tmp_path):
    left = torch.randn(6, 8)[:, ::2].to(torch.bfloat16)
    edit = Edit((Change(Site("blocks.0.mlp.W_out"), LowRank(left, torch.randn(3, 4).T.contiguous().T.T)),))
    again = Edit.load(edit.save(tmp_path / "e.safetensors"))
    assert torch.equal(again.changes[0].action.left, left) and again.changes[0].action.left.dtype == torch.bfloat16


def test_norm_of_a_low_rank_change_is_that_of_its_product():
    edit = some_edit()
    action = edit.changes[0].action
    assert edit.changes[0].norm == pytest.approx(float((action.left @ action.right).norm()), rel=1e-5)
    assert str(edit).count("\n") == 1 and "low rank" in str(edit)
