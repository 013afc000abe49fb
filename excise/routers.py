"""Routers of Mixture-of-Experts models: which blocks have one, what it says of each token, and saying something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from excise.facts import Prompt
from excise.model import Model

# logits [tokens, E], weights [tokens, k], chosen experts [tokens, k] -> other weights and experts, or None to leave them
Look = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor] | None"]


def expert_layers(model: Model) -> list[int]:
    """The blocks that have routed experts; none in a dense model."""
    return [i for i in range(model.n_layers) if any(".experts." in n for n in model.names.weights(i))]


@contextmanager
def routed(model: Model, looks: Mapping[int, Look]) -> Iterator[None]:
    """Inside, what the routers of some blocks say passes a look, and goes on as it returns it."""

    def hook(look: Look) -> Callable[..., Any]:
        def run(module: Any, args: Any, output: Any) -> Any:
            # A router's logits are not read again: only new weights and experts have an effect.
            logits, weights, chosen = output
            new = look(logits, weights, chosen)
            return None if new is None else (logits, *new)

        return run

    with ExitStack() as stack:
        for layer, look in looks.items():
            router = model.hf.get_submodule(model.names.tap(f"blocks.{layer}.mlp.gate.hook_out").module)
            stack.callback(router.register_forward_hook(hook(look)).remove)
        yield


def routes(model: Model, prompts: Sequence[Prompt]) -> dict[int, Tensor]:
    """The experts chosen at the last token of each subject, by block, [n_prompts, k]."""
    found: dict[int, dict[int, Tensor]] = {block: {} for block in expert_layers(model)}

    def keeper(block: int, index: list[int], rows: Tensor) -> Look:
        def look(logits: Tensor, weights: Tensor, chosen: Tensor) -> None:
            picks = chosen.detach().reshape(-1, chosen.shape[-1])[rows.to(chosen.device)].cpu()
            found[block].update(zip(index, picks, strict=True))

        return look

    for index, batch in model.batches(prompts):
        rows = batch.where("subject_last").reshape(-1).nonzero()[:, 0]
        with torch.no_grad(), routed(model, {block: keeper(block, index, rows) for block in found}):
            model.hf(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False, logits_to_keep=1)
    return {block: torch.stack([own[i] for i in range(len(prompts))]) for block, own in found.items()}
