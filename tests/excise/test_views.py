"""Views share the owner's parameters, leave the owner plain and follow its edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from excise.names import Names
from excise.views import bridge_view, follows_edits, nnsight_view, shell_of
from tiny import FAMILIES, VOCAB, tiny_model

torch.set_num_threads(1)


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens())
    return out if isinstance(out, torch.Tensor) else out.logits


def edit(hf: Any, name: str) -> None:
    view = Names(hf).view(name)
    with torch.no_grad():
        view += torch.randn(view.shape, generator=torch.Generator().manual_seed(2)) * 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shell_owns_nothing(family: str) -> None:
    hf, _ = tiny_model(family)
    attention, architectures = hf.config._attn_implementation, hf.config.architectures
    hf.base_model.constant = torch.tensor(0.5)  # some architectures keep tensors as plain attributes
    shell = shell_of(hf)
    mine, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (shell, hf))
    assert mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(shell.buffers(), hf.buffers(), strict=True))
    assert shell.base_model.constant is hf.base_model.constant
    assert torch.allclose(logits(shell), logits(hf), atol=1e-5)
    assert (hf.config._attn_implementation, hf.config.architectures) == (attention, architectures)
    assert shell.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_follows_edits_and_leaves_the_owner_plain(family: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny_model(family)
    hf.set_attn_implementation("eager")  # as the bridge, so that no rounding of another attention hides a difference
    bridge = bridge_view(hf, tokenizer)
    before = logits(hf)
    assert torch.allclose(logits(bridge), before, atol=1e-5)
    for name in (*Names(hf).weights(1), "unembed.W_U"):
        if follows_edits(hf) or not name.endswith("W_QKV"):
            edit(hf, name)
    after = logits(hf)
    assert (after - before).abs().max() > 0.1
    assert torch.allclose(logits(bridge), after, atol=1e-5)
    assert torch.equal(logits(bridge), logits(bridge_view(hf, tokenizer)))
    hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(logits(again), after)
    assert not any("_original_component" in name for name in hf.state_dict())


def test_a_neox_bridge_must_be_made_again() -> None:
    hf, tokenizer = tiny_model("neox")
    assert not follows_edits(hf) and follows_edits(tiny_model("gpt2")[0])
    bridge = bridge_view(hf, tokenizer)
    edit(hf, "blocks.1.attn.W_QKV")
    assert not torch.allclose(logits(bridge), logits(hf), atol=1e-3)
    assert torch.allclose(logits(bridge_view(hf, tokenizer)), logits(hf), atol=1e-5)


def test_hooks_and_gradients_go_where_they_should() -> None:
    hf, tokenizer = tiny_model("qwen3-moe")
    bridge, before = bridge_view(hf, tokenizer), logits(hf)
    handle = hf.model.layers[0].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.allclose(logits(bridge), before, atol=1e-5)
    handle.remove()
    bridge(tokens()).square().mean().backward()
    assert hf.model.layers[1].mlp.experts.down_proj.grad.abs().max() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_an_nnsight_view_sees_edits_and_the_owner_stays_usable(family: str, tmp_path: Path) -> None:
    hf, tokenizer = tiny_model(family)
    names = Names(hf)
    view = nnsight_view(hf, tokenizer)
    edit(hf, "blocks.1.attn.W_O")
    after = logits(hf)
    final = view.get(names.final_norm)
    with view.trace(tokens()):
        normed = final.output.save()
        out = view.output.logits.save()
    assert torch.allclose(out, after, atol=1e-5)
    assert torch.allclose(normed @ names.view("unembed.W_U"), after, atol=1e-5)
    with view.trace(tokens()):
        final.output[:] = 0
        zeroed = view.output.logits.save()
    assert zeroed.abs().max() == 0
    assert torch.equal(logits(hf), after)
    assert torch.allclose(logits(bridge_view(hf, tokenizer)), after, atol=1e-5)
    hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(logits(again), after, atol=1e-5)


def test_a_parametrized_model_has_no_shell() -> None:
    hf, _ = tiny_model("llama")
    torch.nn.utils.parametrize.register_parametrization(hf.model.layers[0].mlp.up_proj, "weight", torch.nn.Identity())
    with pytest.raises(RuntimeError, match="parametrizations"):
        shell_of(hf)
