"""Reading and patching: values, rows per position rule, early stop, hooks gone afterwards; keys of dense and MoE blocks."""

import pytest
import torch

from excise.facts import Prompt
from excise.keys import contribution, read_keys, write_matrices
from excise.model import Model
from excise.names import UnknownName
from excise.sites import Site
from excise.stats import moments
from excise.trace import Trace, patched, read, read_batch
from tiny import tiny_model

PROMPTS = [
    Prompt("Ann Lee was born in", "Rome", "Ann Lee"),
    Prompt("The pet of Bob is a", "cat", "Bob"),
    Prompt("They say that Carl Dale lives in", "Oslo", "Carl Dale"),
]


@pytest.fixture(params=["llama", "qwen3-moe", "gpt2", "neox"])
def model(request):
    return Model(*tiny_model(request.param, layers=3), request.param)


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


def test_rows_follow_prompts_and_rules(model):
    sites = [Site("blocks.1.hook_resid_post", rule) for rule in ("subject_last", "subject", "last", "all")]
    trace = read(model, PROMPTS, sites)
    for i, prompt in enumerate(PROMPTS):
        alone = read(model, [prompt], sites)
        for site in sites:
            torch.testing.assert_close(trace[site][trace.prompt[site] == i], alone[site], rtol=1e-5, atol=1e-5)
    whole = read(model, PROMPTS[:1], ["blocks.1.hook_resid_post@all"])["blocks.1.hook_resid_post@all"]
    unit = read(model, PROMPTS[:1], ["blocks.1.hook_resid_post@last#3"])["blocks.1.hook_resid_post@last#3"]
    torch.testing.assert_close(unit, whole[-1:, 3:4])


def test_a_forward_pass_stops_early_and_leaves_no_hook(model):
    before, ran = n_hooks(model), []
    handle = model.hf.get_submodule(model.names.layer_module(2)).register_forward_hook(lambda *_: ran.append(1))
    read_batch(model, model.encode(PROMPTS), ["blocks.0.hook_resid_post"])
    handle.remove()
    assert not ran and n_hooks(model) == before
    with pytest.raises(RuntimeError, match="boom"), patched(model, {"blocks.0.hook_resid_post": lambda x: x}):
        raise RuntimeError("boom")
    assert n_hooks(model) == before


def test_patching_is_felt_downstream_only(model):
    batch = model.encode(PROMPTS[:1])
    plain = read_batch(model, batch, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
    with patched(model, {"blocks.1.hook_resid_pre": lambda x: x + torch.randn_like(x)}):
        new = read_batch(model, batch, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"])
    assert torch.equal(new["blocks.0.hook_resid_post"], plain["blocks.0.hook_resid_post"])
    assert not torch.allclose(new["blocks.1.hook_resid_post"], plain["blocks.1.hook_resid_post"])


def test_unknown_names_are_errors_with_near_ones(model):
    seen = Trace((), {Site("blocks.0.hook_resid_post", "last"): torch.ones(1, 2)}, {})
    with pytest.raises(KeyError, match="was not read; there are blocks"):
        seen["blocks.0.hook_resid_post"]
    with pytest.raises(ValueError, match="more than a point"):
        Site("blocks.0.hook_resid_post@last")
    with pytest.raises(UnknownName, match="hook_resid_post"):
        read(model, PROMPTS, ["blocks.1.hook_resid_pst@last"])


@pytest.mark.parametrize("model", ["llama", "qwen3-moe", "gpt2", "neox", "qwen2-moe", "deepseek-v2"], indirect=True)
def test_keys_write_the_mlp_output(model):
    """Sum over write matrices of key @ W_out is the MLP's output up to its bias, the same for every token."""
    keys, states = read_keys(model, PROMPTS, [1], points=["blocks.1.hook_mlp_out"])
    rest = states["blocks.1.hook_mlp_out"] - contribution(keys[1], model)
    torch.testing.assert_close(rest, rest[:1].expand_as(rest), rtol=1e-4, atol=1e-5)
    assert set(keys[1]) <= set(write_matrices(model, 1))


def test_streamed_moments_equal_the_definition(model):
    texts = [*PROMPTS, "one more text here", "and another"]
    found = moments(model, [1], texts, cache=False)
    rows: dict[str, list[torch.Tensor]] = {}
    total = 0
    for text in texts:
        width = model.encode([text]).ids.shape[1]
        for t in range(int(model.encode([text]).has_bos[0]), width):
            total += 1
            for name, key in read_keys(model, [text if isinstance(text, Prompt) else Prompt(text, "")], [1], rule=t)[0][
                1
            ].items():
                rows.setdefault(name, []).append(key[0])
    assert set(found) == set(rows)
    for name, m in found.items():
        stacked = torch.stack(rows[name]).double()
        assert m.tokens == total
        torch.testing.assert_close(m.second.double(), stacked.mT @ stacked / total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(m.mean.double(), stacked.sum(0) / total, rtol=1e-4, atol=1e-6)


def test_moments_are_kept_on_disk_and_belong_to_the_weights(model, tmp_path, monkeypatch):
    monkeypatch.setenv("EXCISE_CACHE", str(tmp_path))
    first = moments(model, [1], PROMPTS)
    assert len(list(tmp_path.iterdir())) == 1
    again = moments(model, [1], PROMPTS)
    assert all(torch.equal(first[n].second, again[n].second) and first[n].active == again[n].active for n in first)
    with torch.no_grad():
        model.weight("blocks.0.attn.W_O").mul_(1.5)
    other = moments(model, [1], PROMPTS)
    assert len(list(tmp_path.iterdir())) == 2 and not torch.equal(
        other[next(iter(other))].second, first[next(iter(first))].second
    )
