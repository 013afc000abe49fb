"""Exports for other tools: each is read back the way that tool reads it, and gives the logits of the applied edit."""

import csv
import json
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from handmade import hook_edits, out_matrix, randn, weight_edit

from excise.actions import Affine, Dense, LowRank, Scale, Sparse
from excise.adapters import export_peft
from excise.apply import applied, bake
from excise.checkpoint import export
from excise.edits import Change, Edit
from excise.errors import ExciseError, NotBakeable
from excise.gates import Linear
from excise.model import Model, load
from excise.sites import Site
from excise.steering import COLUMNS, export_steering
from tiny import tiny_model

FAMILIES = ("llama", "qwen3-moe", "mixtral", "gpt-oss", "gpt2", "neox", "phi3")
TEXTS = ["Ann Lee was born in the town of", "A cat", "Where does Bob Stone live now and why?"]


def logits(model, hf=None):
    batch = model.encode(TEXTS)
    with torch.no_grad():
        out = (hf or model.hf)(input_ids=batch.ids, attention_mask=batch.mask).logits.float()
    return torch.cat([row[:n] for row, n in zip(out, batch.lengths, strict=True)])


def small_edit(model):
    """Low-rank changes of every form, two on one matrix, and of every sort of matrix that the family has."""
    names = [
        n
        for layer in (0, 2)
        for n in model.names.weights(layer)
        if ".experts." not in n or ".experts.1." in n or ".experts.3." in n
    ]
    names = [n for n in names if "router" not in n]
    changes = [
        Change(Site(n), LowRank(0.2 * randn(model.weight(n).shape[0], 1 + i % 2, seed=i), randn(1 + i % 2, model.weight(n).shape[1], seed=-i - 1)))
        for i, n in enumerate(names)
    ]  # fmt: skip
    last = out_matrix(model, 2)
    rows = torch.arange(3) * model.weight(last).shape[1]
    changes += [
        Change(Site(last), Scale(torch.tensor([1, 4]), torch.tensor([0.0, -1.0]))),
        Change(Site(last), Sparse(rows, torch.ones(3))),
        Change(Site(out_matrix(model, 1)), Dense(0.1 * randn(model.weight(last).shape[0], 2) @ randn(2, model.weight(last).shape[1], seed=3))),
    ]  # fmt: skip
    prints = {n: model.matrix_fingerprint(n) for n in dict.fromkeys(c.site.point for c in changes)}
    return Edit(tuple(changes), {"method": "by hand"}, prints)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_the_adapter(family, tmp_path):
    from peft import PeftModel

    model = Model(*tiny_model(family, layers=3), family)
    edit, plain = small_edit(model), logits(model)
    with applied(model, edit):
        expected = logits(model)
    folder = export_peft(model, edit, tmp_path / "adapter")
    assert torch.equal(logits(model), plain)
    assert {"adapter_config.json", "adapter_model.safetensors", "excise.json"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == family
    fresh = tiny_model(family, layers=3)[0]
    adapted = PeftModel.from_pretrained(fresh, folder).eval()
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits(model, adapted), expected, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(logits(model, adapted), plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(model, merged), expected, rtol=1e-4, atol=1e-4)


def test_what_an_adapter_cannot_hold_is_refused(tmp_path):
    model = Model(*tiny_model("gpt2", layers=3), "gpt2")
    d, v = model.names.d_model, model.hf.config.vocab_size
    rank_one = LowRank(randn(v, 1), randn(1, d))
    cases = {
        "not low rank": Change(Site("blocks.1.mlp.W_out"), Dense(randn(*model.weight("blocks.1.mlp.W_out").shape))),
        "Embedding": Change(Site("embed.W_E"), rank_one),
        "tied to the embedding": Change(Site("unembed.W_U"), LowRank(rank_one.right.mT, rank_one.left.mT)),
    }
    for reason, change in cases.items():
        with pytest.raises(ExciseError, match=reason):
            export_peft(model, Edit((change,)), tmp_path / "no")
    with pytest.raises(NotBakeable, match="hook_resid_post"):
        export_peft(model, hook_edits(model)["affine"], tmp_path / "no")
    with pytest.raises(ExciseError, match="changes nothing"):
        export_peft(model, Edit(()), tmp_path / "no")
    assert not (tmp_path / "no").exists() and not list(tmp_path.iterdir())


def clamp(point, direction, centre, value):
    d = torch.nn.functional.normalize(direction, dim=0)
    return Change(Site(point), Affine(d[:, None], -d[None], centre, value * d))


def steered(hf, table: Path):
    """Hooks that do what lm-eval documents for a table: take each named feature's decoder row from a `sparsify` folder, and
    set the component of the module's output along it, measured from the bias, to the coefficient."""
    from safetensors.torch import load_file

    hooks = {}
    for row in csv.DictReader(table.open()):
        home = Path(row["sparse_model"]) / row["hookpoint"]
        stored = load_file(home / "sae.safetensors")
        config = json.loads((home / "cfg.json").read_text())
        assert stored["W_dec"].shape == stored["encoder.weight"].shape == (config["num_latents"], config["d_in"])
        assert (row["loader"], row["action"]) == ("sparsify", "clamp") and tuple(row) == COLUMNS
        hooks[row["hookpoint"]] = (
            stored["W_dec"][int(row["feature_index"])],
            stored["b_dec"],
            float(row["steering_coefficient"]),
        )
    found = dict(hf.base_model.named_modules())

    def hook(direction, bias, value):
        unit = direction / direction.norm()

        def run(module, args, output):
            x = (output[0] if isinstance(output, tuple) else output) - bias
            new = x + unit * (value - (x * unit).sum(-1, keepdim=True)) + bias
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return run

    stack = ExitStack()
    for name, known in hooks.items():
        stack.callback(found[name].register_forward_hook(hook(*known)).remove)
    return stack


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2", "neox"])
def test_lm_eval_tables(family, tmp_path):
    model = Model(*tiny_model(family, layers=3), family)
    d = model.names.d_model
    edit = Edit((
        clamp("blocks.0.hook_resid_post", randn(d), randn(d, seed=1), 1.5),
        clamp("blocks.1.hook_mlp_out", randn(d, seed=2), torch.zeros(d), 0.0),
    ))  # fmt: skip
    plain = logits(model)
    with applied(model, edit):
        expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    folder = export_steering(model, edit, tmp_path / "steering")
    with steered(model.hf, folder / "steering.csv"):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)


def test_what_a_table_cannot_say_is_refused(tmp_path):
    model = Model(*tiny_model("llama", layers=3), "llama")
    d, point = model.names.d_model, "blocks.0.hook_resid_post"
    good, zero = clamp(point, randn(d), randn(d, seed=1), 1.5), torch.zeros(d)
    action = good.action
    cases = {
        "refuses to add": Change(Site(point), Affine(zero[:, None], zero[None], zero, randn(d))),
        "not the clamp": Change(Site(point), Affine(action.left, 0.5 * action.right, zero, zero)),
        "of one direction": Change(Site(point), Affine(action.left, action.right, zero, randn(d, seed=5))),
        "gated": Change(good.site, action, Linear(Site(point), randn(d), 0.0)),
        "BOS": Change(Site(point, "after_bos"), action),
        "low rank change": Change(Site("blocks.0.mlp.W_out"), LowRank(randn(48, 1), randn(1, d))),
        "puts out": Change(Site("blocks.1.hook_resid_pre"), action),
    }
    for reason, change in cases.items():
        with pytest.raises(ExciseError, match=reason):
            export_steering(model, Edit((change,)), tmp_path / "no")
    with pytest.raises(ExciseError, match="several at one place"):
        export_steering(model, Edit((good, good)), tmp_path / "no")
    assert not list(tmp_path.iterdir())


# where the weights are


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_under_a_device_map(family, dtype, tmp_path):
    """Loaded with a device map on the CPU, in both dtypes: apply, bake, revert and export as without one."""
    hf, tokenizer = tiny_model(family, layers=3)
    hf.to(getattr(torch, dtype)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    mapped_hf = hf.__class__.from_pretrained(tmp_path / "base", device_map={"": "cpu"}, dtype="auto")
    # The hooks that move tensors between devices are there even where all devices are one.
    model = Model(dispatch_model(mapped_hf, {"": "cpu"}, force_hooks=True), tokenizer, family)
    assert str(model.dtype) == f"torch.{dtype}" and hasattr(model.hf, "_hf_hook")
    alone = load(str(tmp_path / "base"))
    edit, plain = weight_edit(model), logits(model)
    assert torch.equal(plain, logits(alone))
    for whole in (edit, hook_edits(model)["affine"], hook_edits(model)["share gate"]):
        with applied(model, whole):
            mapped = logits(model)
        with applied(alone, whole):
            assert torch.equal(logits(alone), mapped)
        assert torch.equal(logits(model), plain) and not torch.equal(mapped, plain)
    baked = bake(model, edit)
    changed = logits(model)
    baked.revert()
    assert torch.equal(logits(model), plain)
    again = load(str(export(model, edit, tmp_path / "out")))
    assert again.dtype == model.dtype and torch.equal(logits(again), changed)


def test_offloaded_weights_are_refused(tmp_path):
    """On disk, a matrix is a meta tensor: writing to it would be lost. Activation edits do not mind."""
    hf, tokenizer = tiny_model("llama", layers=3)
    hf.save_pretrained(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.rotary_emb": "cpu"}
    where |= {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    off = hf.__class__.from_pretrained(tmp_path / "base", device_map=where, offload_folder=tmp_path / "off")
    model, alone = Model(off, tokenizer, "tiny"), Model(hf, tokenizer, "tiny")
    d = model.names.d_model
    edit = Edit((Change(Site("blocks.1.mlp.W_out"), LowRank(randn(48, 1), randn(1, d))),))
    for carry in (bake, export_peft, export):
        with pytest.raises(ExciseError, match="offload"):
            carry(model, edit, *([] if carry is bake else [tmp_path / "out"]))
    with pytest.raises(ExciseError, match="offloaded"), applied(model, edit):
        pass
    with pytest.raises(ExciseError, match="offloaded"):
        export(model, Edit(()), tmp_path / "out")
    shift = hook_edits(alone)["affine"]
    with applied(model, shift), applied(alone, shift):
        torch.testing.assert_close(logits(model), logits(alone))
    resident = Edit((Change(Site("blocks.2.mlp.W_out"), edit.changes[0].action),))
    with applied(model, resident), applied(alone, resident):
        torch.testing.assert_close(logits(model), logits(alone))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tied_embeddings_stay_tied_in_a_checkpoint(family, tmp_path):
    """Editing the embedding edits the unembedding, applied, baked, exported and loaded again."""
    hf, tokenizer = tiny_model(family)
    if family == "llama":
        hf.config.tie_word_embeddings = True
        hf.lm_head.weight = hf.model.embed_tokens.weight
    model = Model(hf, tokenizer, family)
    assert model.hf.get_output_embeddings().weight is model.hf.get_input_embeddings().weight
    v, d = model.weight("embed.W_E").shape
    edit = Edit((Change(Site("embed.W_E"), LowRank(0.1 * randn(v, 1), randn(1, d))),))
    plain = logits(model)
    with applied(model, edit):
        expected = logits(model)
    again = load(str(export(model, edit, tmp_path / "out")))
    assert again.hf.get_output_embeddings().weight is again.hf.get_input_embeddings().weight
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(expected, plain) and torch.equal(logits(model), plain)
