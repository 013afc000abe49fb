"""Reading and patching activations at Sites with plain forward hooks on the owner of the weights.

Unknown names are errors here, never a silent skip; hooks are always removed; a forward pass stops after the last site
that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from excise.encoding import Batch
from excise.errors import ExciseError
from excise.experts import Callback, expert_neurons
from excise.facts import Prompt
from excise.sites import Site

if TYPE_CHECKING:
    from excise.model import Model
    from excise.names import Tap

Patch = Callable[[torch.Tensor], "torch.Tensor | None"]


class _Enough(Exception):
    """Raised by the last needed hook to end a forward pass early."""


@dataclass(frozen=True)
class Trace:
    """What was seen.

    values: for each site a tensor [n_rows, width], one row per token that its position rule picked.
    prompt: for each site, the prompt index of each row [n_rows]; rows come in prompt order, then token order.
    `trace[site]` is the tensor of a site or of its text; raises KeyError, naming the sites, for one that was not read.
    """

    prompts: tuple[Prompt, ...]
    values: dict[Site, torch.Tensor]
    prompt: dict[Site, torch.Tensor]

    def __getitem__(self, site: Site | str) -> torch.Tensor:
        wanted = site if isinstance(site, Site) else Site.parse(site)
        if wanted not in self.values:
            raise KeyError(f"{wanted} was not read; there are {', '.join(map(str, list(self.values)[:8]))}")
        return self.values[wanted]


def read(
    model: Model,
    prompts: Sequence[Prompt | str],
    sites: Sequence[Site | str],
    *,
    dtype: torch.dtype = torch.float32,
    answers: bool = False,
) -> Trace:
    """Activations at `sites` over `prompts`, selected by position rule while reading, on the CPU in `dtype`.

    With a rule that picks one token (`subject_last`, `last`) row i belongs to prompt i.
    """
    from excise.encoding import as_prompt

    wanted = [s if isinstance(s, Site) else Site.parse(s) for s in sites]
    parts: dict[Site, dict[int, torch.Tensor]] = {s: {} for s in wanted}
    for index, batch in model.batches(prompts, answers=answers):
        seen = read_batch(model, batch, [s.point for s in wanted])
        for site in wanted:
            where = batch.of(site)
            for row, i in enumerate(index):
                picked = seen[site.point][row][where[row].to(seen[site.point].device)]
                picked = picked if site.unit is None else picked[:, site.unit : site.unit + 1]
                parts[site][i] = picked.to("cpu", dtype)
    order = range(len(prompts))
    values = {s: torch.cat([parts[s][i] for i in order]) for s in wanted}
    owner = {s: torch.tensor([i for i in order for _ in range(len(parts[s][i]))]) for s in wanted}
    return Trace(tuple(as_prompt(p) for p in prompts), values, owner)


def read_batch(model: Model, batch: Batch, points: Sequence[str], *, grad: bool = False) -> dict[str, torch.Tensor]:
    """Activations [batch, width, d] of each named point over one batch; the forward pass ends after the last one."""
    seen: dict[str, torch.Tensor] = {}
    wanted = list(dict.fromkeys(points))

    def keep(name: str) -> Patch:
        def look(x: torch.Tensor) -> None:
            seen[name] = x if grad else x.detach()
            if len(seen) == len(wanted):
                raise _Enough

        return look

    with torch.set_grad_enabled(grad), patched(model, {n: keep(n) for n in wanted}, batch=batch):
        try:
            model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
        except _Enough:
            pass
    missing = [n for n in wanted if n not in seen]
    if missing:
        raise RuntimeError(f"{model.name}: {', '.join(missing)} did not fire in a forward pass")
    shape = batch.ids.shape
    return {n: x if x.dim() == 3 else x.reshape(*shape, -1) for n, x in seen.items()}


@contextmanager
def patched(
    model: Model, patches: Mapping[str, Callable[..., Any]], *, batch: Batch | None = None, tokens: bool = False
) -> Iterator[None]:
    """Run every forward pass inside the block with `patches[name](activation)` in place of the activation.

    A patch returns the new activation, or None to leave it; it must not write in place. Hooks are removed on leaving,
    also after an exception. Expert neurons (`blocks.i.mlp.experts.e.hook_post`) are served as rows [n_routed, d_expert],
    or, when `batch` is given, scattered to [batch, width, d_expert] with zeros where the router sent nothing.
    tokens: patches of expert neurons are called with a second argument, the flat token index of each row [n_routed].
    """
    with ExitStack() as stack:
        routed: dict[tuple[str, bool], dict[int, Callable[..., Any]]] = {}
        columns: dict[tuple[str, bool], slice] = {}
        for name, patch in patches.items():
            tap = model.names.tap(name)
            if tap.side == "neurons" and tap.expert is not None:
                at = (tap.module, name.endswith("hook_pre"))
                routed.setdefault(at, {})[tap.expert] = patch
                columns[at] = _gate_columns(model, name) if at[1] else slice(None)
            else:
                stack.enter_context(_hooked(model, tap, patch))
        for early in (True, False):
            found = {m: _on_experts(p, batch, columns[m, e], tokens) for (m, e), p in routed.items() if e == early}
            if found:
                stack.enter_context(expert_neurons(model.hf, found, before_activation=early))
        yield


def _gate_columns(model: Model, name: str) -> slice:
    """Where the gate stands in what enters the activation function of an expert; everything where there is no gate."""
    stem = name.removesuffix("hook_pre")
    gated = f"{stem}W_gate" in model.names.weights(model.names.tap(name).layer)
    return (model.names.weight(f"{stem}W_gate").part if gated else None) or slice(None)


def _on_experts(
    patches: Mapping[int, Callable[..., Any]], batch: Batch | None, columns: slice, tokens: bool
) -> Callback:
    """Callback that hands each expert's neurons to its patch, or, when reading a batch, all tokens of it at once."""

    def callback(fused: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        neurons = fused[..., columns]
        new = neurons
        for expert, patch in patches.items():
            chosen = experts == expert  # [tokens, k]
            if batch is not None:
                rows = neurons.new_zeros(len(neurons), neurons.shape[-1])
                rows = rows.index_put((chosen.any(1).nonzero()[:, 0],), neurons[chosen])
                patch(rows.view(*batch.ids.shape, -1))
            elif chosen.any():
                changed = patch(new[chosen], *([chosen.nonzero()[:, 0]] if tokens else []))
                new = new if changed is None else new.index_put(chosen.nonzero(as_tuple=True), changed.to(new.dtype))
        if new is neurons:
            return None
        if neurons.shape == fused.shape:
            return new
        whole = fused.clone()
        whole[..., columns] = new
        return whole

    return callback


@contextmanager
def _hooked(model: Model, tap: Tap, patch: Patch) -> Iterator[None]:
    module = model.hf.get_submodule(tap.module)
    handle = (
        module.register_forward_pre_hook(_on_input(patch), with_kwargs=True)
        if tap.side == "in"
        else module.register_forward_hook(_on_output(patch))
    )
    try:
        yield
    finally:
        handle.remove()


def _on_input(patch: Patch) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = bool(args)
        new = patch(args[0] if positional else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if positional else (args, {**kwargs, "hidden_states": new})

    return hook


def _on_output(patch: Patch) -> Callable[..., Any]:
    def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = patch(first)
        if new is None:
            return None
        if isinstance(output, tuple) and len(output) == 3 and not output[2].is_floating_point():
            raise ExciseError(
                "a router's logits are not read again after it has chosen: patching them has no effect; change its "
                "choice or its weights, the second and third of what it returns"
            )
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook
