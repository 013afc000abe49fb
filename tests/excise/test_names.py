"""Names against TransformerLens' own bridge, number by number, and against the modules that the matrices belong to."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest
import torch

from excise.names import Names, UnknownName
from excise.views import bridge_view
from tiny import D_EXPERT, D_FF, D_MODEL, FAMILIES, MOE_FAMILIES, VOCAB, tiny_model

torch.set_num_threads(1)

# The bridge keeps these with the head axis before the position axis.
HEADS_FIRST = {family: ("attn.q_norm.", "attn.k_norm.") for family in ("qwen3", "qwen3-moe")}
# GPT-2 embeds positions once for the whole batch; the bridge repeats them.
ONCE = {"gpt2": ("hook_pos_embed", "pos_embed.")}
# Names of ours that the bridge does not have: (end of the name, bridge name of the same numbers or None).
OURS = {
    # the bridge never runs a fused matrix, but its split copies
    "gpt2": (("attn.qkv.hook_in", "attn.hook_in"), ("attn.qkv.hook_out", None)),
    "neox": (("attn.qkv.hook_in", "attn.hook_in"), ("attn.qkv.hook_out", None)),
    "phi3": (
        ("attn.qkv.hook_in", "attn.hook_in"),
        ("attn.qkv.hook_out", None),
        ("mlp.gate_up.hook_in", "mlp.hook_in"),
        ("mlp.gate_up.hook_out", None),
    ),
    # experts and GPT-OSS' router are parts that the adapters do not list
    **{
        family: (("mlp.experts.hook_in", "mlp.hook_in"), ("mlp.experts.hook_out", "mlp.hook_out"))
        for family in ("mixtral", "qwen3-moe", "olmoe")
    },
    **{
        family: (("mlp.experts.hook_in", "mlp.hook_in"), ("mlp.experts.hook_out", None))
        for family in ("deepseek-v2", "deepseek-v3")
    },
    "gpt-oss": (
        ("mlp.gate.hook_in", "mlp.hook_in"),
        ("mlp.gate.hook_out", None),
        ("mlp.experts.hook_in", "mlp.hook_in"),
        ("mlp.experts.hook_out", "mlp.hook_out"),
    ),
}
# Rows of the table by which the adapters' meaning is pinned: name in block 1 -> module path and side.
LLAMA = {
    "hook_resid_pre": ("model.layers.1", "in"),
    "hook_resid_mid": ("model.layers.1.post_attention_layernorm", "in"),
    "hook_resid_post": ("model.layers.1", "out"),
    "hook_attn_out": ("model.layers.1.self_attn", "out"),
    "hook_mlp_out": ("model.layers.1.mlp", "out"),
    "attn.hook_z": ("model.layers.1.self_attn.o_proj", "in"),
    "mlp.hook_pre": ("model.layers.1.mlp.gate_proj", "out"),
    "mlp.hook_pre_linear": ("model.layers.1.mlp.up_proj", "out"),
    "mlp.hook_post": ("model.layers.1.mlp.down_proj", "in"),
}
GEMMA = LLAMA | {
    "hook_attn_out": ("model.layers.1.post_attention_layernorm", "out"),
    "hook_resid_mid": ("model.layers.1.pre_feedforward_layernorm", "in"),
    "hook_mlp_out": ("model.layers.1.post_feedforward_layernorm", "out"),
}
TABLE = {
    **{family: LLAMA for family in ("llama", "mistral", "qwen2", "qwen3")},
    **{family: GEMMA for family in ("gemma2", "gemma3")},
    "olmo2": GEMMA | {"hook_resid_mid": ("model.layers.1.mlp", "in")},
    "phi3": {key: place for key, place in LLAMA.items() if "hook_pre" not in key},
    "gpt2": {
        "hook_resid_post": ("transformer.h.1", "out"),
        "hook_resid_mid": ("transformer.h.1.ln_2", "in"),
        "hook_attn_out": ("transformer.h.1.attn", "out"),
        "attn.hook_z": ("transformer.h.1.attn.c_proj", "in"),
        "mlp.hook_pre": ("transformer.h.1.mlp.c_fc", "out"),
        "mlp.hook_post": ("transformer.h.1.mlp.c_proj", "in"),
    },
    "neox": {
        "hook_resid_post": ("gpt_neox.layers.1", "out"),
        "hook_attn_out": ("gpt_neox.layers.1.attention", "out"),
        "attn.hook_z": ("gpt_neox.layers.1.attention.dense", "in"),
        "mlp.hook_post": ("gpt_neox.layers.1.mlp.dense_4h_to_h", "in"),
    },
    "opt": {
        "hook_resid_mid": ("model.decoder.layers.1.final_layer_norm", "in"),
        "mlp.hook_post": ("model.decoder.layers.1.fc2", "in"),
        "hook_mlp_out": ("model.decoder.layers.1.fc2", "out"),
    },
    **{
        family: {key: place for key, place in LLAMA.items() if not key.startswith("mlp.hook")}
        for family in MOE_FAMILIES
    },
}


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(1))


def hook(hf: Any, tap: Any, function: Any) -> Any:
    """A plain hook at a tap: function(activation) -> new activation or None."""

    def before(module: Any, args: tuple, kwargs: dict) -> Any:
        new = function(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(module: Any, args: tuple, output: Any) -> Any:
        new = function(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    module = hf.get_submodule(tap.module)
    if tap.side == "in":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


@functools.cache
def seen(family: str) -> dict[str, torch.Tensor]:
    """Every activation of the owner by name, in the order in which the hooks fired."""
    hf, _ = tiny_model(family)
    names, found = Names(hf), {}
    for name in names.points():
        if names.tap(name).side != "neurons":
            hook(hf, names.tap(name), lambda x, name=name: found.update({name: x.detach().clone()}))
    with torch.no_grad():
        hf(tokens())
    return found


@functools.cache
def bridged(family: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A model, its bridge and the bridge's cache."""
    hf, tokenizer = tiny_model(family)
    bridge = bridge_view(hf, tokenizer)
    with torch.no_grad():
        return hf, bridge, dict(bridge.run_with_cache(tokens())[1].cache_dict)


def routing(hf: Any, names: Names) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the router of block 1 gives: logits [tokens, experts], weights [tokens, k], expert ids [tokens, k]."""
    found = []
    router = hf.get_submodule(names.tap("blocks.1.mlp.gate.hook_out").module)
    handle = router.register_forward_hook(lambda module, args, out: found.append(out))
    with torch.no_grad():
        hf(tokens())
    handle.remove()
    return found[0]


def same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine.flatten(), theirs.flatten(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_equal_the_bridge(family: str) -> None:
    cache = bridged(family)[2]
    ours = dict(OURS.get(family, ()))
    compared = 0
    for name, mine in seen(family).items():
        if name not in cache:
            local = name.split(".", 2)[2]
            assert local in ours, f"{name} is neither the bridge's nor listed as ours"
            assert ours[local] is None or same(mine, cache[name.replace(local, ours[local])]), name
            continue
        theirs = cache[name]
        if any(part in name for part in HEADS_FIRST.get(family, ())):
            theirs = theirs.transpose(1, 2)
        if name.startswith(ONCE.get(family, ("-",))):
            mine = mine.expand_as(theirs)
        assert mine.numel() == theirs.numel() and same(mine, theirs), name
        compared += 1
    assert compared >= 45


@pytest.mark.parametrize("family", FAMILIES)
def test_points_are_in_order_of_computation(family: str) -> None:
    hf, _ = tiny_model(family)
    names = Names(hf)
    assert list(seen(family)) == [name for name in names.points() if names.tap(name).side != "neurons"]


@pytest.mark.parametrize("family", FAMILIES)
def test_table_of_places(family: str) -> None:
    names = Names(tiny_model(family)[0])
    for local, place in TABLE[family].items():
        tap = names.tap(f"blocks.1.{local}")
        assert (tap.module, tap.side, tap.layer, tap.expert) == (*place, 1, None)
    assert names.tap("hook_embed").module == names.tap("embed.hook_out").module == names.embed
    assert names.tap("unembed.hook_out").module == names.unembed
    assert names.tap("ln_final.hook_out").module == names.final_norm
    assert names.tap("blocks.1.hook_out").module == names.layer_module(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_equals_the_bridge(family: str) -> None:
    hf, bridge, _ = bridged(family)
    name, scale = "blocks.1.hook_mlp_out", torch.linspace(-1, 2, D_MODEL)
    with torch.no_grad():
        plain = hf(tokens()).logits
        handle = hook(hf, Names(hf).tap(name), lambda x: x * scale)
        mine = hf(tokens()).logits
        handle.remove()
        theirs = bridge.run_with_hooks(tokens(), fwd_hooks=[(name, lambda x, hook: x * scale)])
    assert not same(mine, plain)
    assert same(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_views_are_live_and_read_d_in_d_out(family: str) -> None:
    hf, _ = tiny_model(family)
    names = Names(hf)
    wanted = {"embed.W_E": (VOCAB, D_MODEL), "unembed.W_U": (D_MODEL, VOCAB)}
    for name in names.weights():
        view, weight = names.view(name), names.weight(name)
        parameter = hf.get_parameter(weight.parameter)
        assert weight.name == name and view.dim() == 2
        assert view.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
        leaf, width = name.rsplit(".", 1)[-1], D_EXPERT if ".experts." in name else D_FF
        if "shared" not in name:
            wanted |= {f"{name}": (D_MODEL, width)} if leaf in ("W_in", "W_gate") else {}
            wanted |= {f"{name}": (width, D_MODEL)} if leaf == "W_out" else {}
        assert tuple(view.shape) == wanted.get(name, tuple(view.shape)), name
        assert view.shape[1] == D_MODEL or leaf != "W_O"
    leaves = {name.rsplit(".", 1)[-1] for name in names.weights()}
    assert {"W_O", "W_in", "W_out", "W_E", "W_U"} <= leaves


@pytest.mark.parametrize("family", FAMILIES)
def test_views_give_the_modules_outputs(family: str) -> None:
    hf, _ = tiny_model(family)
    names, checked = Names(hf), 0
    for name in [*names.weights(0), *names.weights(1), "unembed.W_U"]:
        weight = names.weight(name)
        if weight.expert is not None:
            continue
        calls: list[Any] = []
        module = hf.get_submodule(weight.module)
        handle = module.register_forward_hook(lambda module, *call, calls=calls: calls.append(call))
        with torch.no_grad():
            hf(tokens())
        handle.remove()
        (entered,), left = calls[0]
        left = left[0] if isinstance(left, tuple) else left
        part = weight.part or slice(None)
        bias = getattr(module, "bias", None)
        mine = entered @ names.view(name) + (bias[part] if bias is not None else 0)
        assert same(mine, left[..., part]), name
        assert same(seen(family)[weight.reads], entered), f"{name} reads {weight.reads}"
        checked += 1
    assert checked >= 7


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("neox", "deepseek-v2", "deepseek-v3")])
def test_matrices_give_what_the_bridge_calls_q_k_v_gate_and_up(family: str) -> None:
    hf, _, cache = bridged(family)
    names, block = Names(hf), "blocks.1"
    gated = f"{block}.mlp.W_gate" in names.weights(1)
    outputs = {"attn.W_Q": "attn.hook_q", "attn.W_K": "attn.hook_k", "attn.W_V": "attn.hook_v"}
    if family not in MOE_FAMILIES:
        outputs |= (
            {"mlp.W_gate": "mlp.hook_pre", "mlp.W_in": "mlp.hook_pre_linear"} if gated else {"mlp.W_in": "mlp.hook_pre"}
        )
    for local, output in outputs.items():
        weight = names.weight(f"{block}.{local}")
        bias = getattr(hf.get_submodule(weight.module), "bias", None)
        mine = seen(family)[weight.reads] @ names.view(weight.name)
        mine = mine if bias is None else mine + bias[weight.part or slice(None)]
        assert same(mine, cache[f"{block}.{output}"]), local


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_views_add_up_to_the_block(family: str) -> None:
    hf, _ = tiny_model(family)
    names, block = Names(hf), "blocks.1.mlp"
    _, weights, index = routing(hf, names)
    assert index.shape[1] == names.experts_per_token
    x = seen(family)[f"{block}.hook_in"].flatten(0, 1)
    bias = getattr(hf.get_submodule(names.tap(f"{block}.experts.0.hook_post").module), "gate_up_proj_bias", None)
    total = torch.zeros_like(x)
    for e in range(names.n_experts):
        gate, up = (x @ names.view(f"{block}.experts.{e}.{key}") for key in ("W_gate", "W_in"))
        if bias is None:
            out = (torch.nn.functional.silu(gate) * up) @ names.view(f"{block}.experts.{e}.W_out")
        else:  # GPT-OSS
            gate, up = (gate + bias[e, ::2]).clamp(max=7.0), (up + bias[e, 1::2]).clamp(-7.0, 7.0)
            neurons = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            down_bias = hf.get_parameter(f"{names.tap(f'{block}.experts.0.hook_post').module}.down_proj_bias")
            out = neurons @ names.view(f"{block}.experts.{e}.W_out") + down_bias[e]
        total += out * (weights * (index == e)).sum(1, keepdim=True)
    if f"{block}.shared_expert.W_in" in names.weights():
        gate, up = (x @ names.view(f"{block}.shared_expert.{key}") for key in ("W_gate", "W_in"))
        shared = (torch.nn.functional.silu(gate) * up) @ names.view(f"{block}.shared_expert.W_out")
        scale = torch.sigmoid(x @ hf.model.layers[1].mlp.shared_expert_gate.weight.T) if family == "qwen2-moe" else 1
        total += shared * scale
    assert same(total, seen(family)[f"{block}.hook_out"])


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_to_a_view_reaches_the_model(family: str) -> None:
    hf, _ = tiny_model(family)
    names, generator = Names(hf), torch.Generator().manual_seed(2)
    # no token may be sent to an expert: then, and only then, writing to it must change nothing
    chosen = set(routing(hf, names)[2].unique().tolist()) if names.n_experts else set()
    with torch.no_grad():
        before = hf(tokens()).logits
        for name in [*names.weights(1), "embed.W_E", "unembed.W_U"]:
            view = names.view(name)
            old = view.clone()
            view += torch.randn(view.shape, generator=generator) * 0.3
            expert = names.weight(name).expert
            moved = (hf(tokens()).logits - before).abs().max()
            assert moved > 1e-3 if expert is None or expert in chosen else moved == 0, name
            view.copy_(old)
        assert torch.equal(hf(tokens()).logits, before)


def test_neurons_have_one_name_on_every_kind_of_block() -> None:
    names = Names(tiny_model("deepseek-v3")[0])
    assert names.weight("blocks.0.mlp.W_out").reads == "blocks.0.mlp.hook_post"
    assert names.tap("blocks.0.mlp.hook_post").module == "model.layers.0.mlp.down_proj"
    assert names.weight("blocks.1.mlp.experts.3.W_out").reads == "blocks.1.mlp.experts.3.hook_post"
    tap = names.tap("blocks.1.mlp.experts.3.hook_post")
    assert (tap.module, tap.side, tap.layer, tap.expert) == ("model.layers.1.mlp.experts", "neurons", 1, 3)
    assert "blocks.1.mlp.experts.5.hook_post" in names.points()
    assert names.tap("blocks.1.mlp.shared_expert.hook_post").module == "model.layers.1.mlp.shared_experts.down_proj"
    with pytest.raises(UnknownName, match="neurons belong to its experts"):
        names.tap("blocks.1.mlp.hook_post")


def test_unknown_names_say_why_and_what_is_near() -> None:
    names = Names(tiny_model("qwen3-moe")[0])
    for error in (KeyError, ValueError):
        with pytest.raises(error, match=r"^no activation 'blocks.1.hook_resid_pots' .*near: blocks.1.hook_resid_post"):
            names.tap("blocks.1.hook_resid_pots")
    with pytest.raises(UnknownName, match=r"blocks\.1\.attn\.W_Q"):
        names.view("blocks.1.attn.W_q")
    with pytest.raises(UnknownName, match="2 blocks, from 0 to 1"):
        names.tap("blocks.2.hook_resid_pre")
    with pytest.raises(UnknownName, match="2, from 0 to 1"):
        names.layer_module(2)
    with pytest.raises(UnknownName, match="4 experts"):
        names.weight("blocks.1.mlp.experts.4.W_out")
    with pytest.raises(UnknownName, match="bridge view"):
        names.tap("blocks.1.attn.hook_pattern")
    with pytest.raises(UnknownName, match="ask `weight`"):
        names.tap("blocks.1.attn.W_Q")
    with pytest.raises(UnknownName, match="ask `tap`"):
        names.weight("blocks.1.hook_mlp_out")
    with pytest.raises(UnknownName, match=r"near: blocks\.0\.hook_mlp_out"):
        names.tap("block.0.hook_mlp_out")


def test_the_config_is_left_alone_and_names_are_fast() -> None:
    hf, _ = tiny_model("llama", layers=32)
    Names(hf).points()
    start = time.process_time()
    names = Names(hf)
    assert len(names.points()) > 32 * 30 and len(names.weights()) == 32 * 7 + 2
    assert time.process_time() - start < 0.4
    assert hf.config.architectures is None
    assert (names.n_layers, names.d_model, names.n_heads, names.n_experts, names.experts_per_token) == (32, 32, 4, 0, 0)


def test_offloaded_and_packed_weights_are_told() -> None:
    hf, _ = tiny_model("llama")
    names = Names(hf)
    assert not names.is_offloaded("blocks.1.mlp.W_out")
    hf.model.layers[1].mlp.to("meta")
    assert names.is_offloaded("blocks.1.mlp.W_out") and not names.is_offloaded("blocks.0.mlp.W_out")
    packed = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    hf.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match=r"packed as torch\.uint8"):
        names.view("blocks.0.mlp.W_in")
