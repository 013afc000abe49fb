"""Routers of Mixture-of-Experts models: which blocks have one, what it says of each token, and saying something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

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
