"""Where a trained model looks a fact up: causal tracing with plain forward hooks.

The hooks are this file's own, so that the check does not depend on the methods it vouches for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from excise.encoding import encode_row
from excise.facts import Prompt
from excise.testbed import vocabulary as v
from excise.testbed.documents import ATTRIBUTES
from excise.testbed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NOISE_SCALE, NOISE_DRAWS, WINDOW = 3.0, 3, 3


@contextmanager
def hooks(changes: Mapping[Any, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Run each module's output through a function for the length of the block; None leaves it as it is."""

    def wrap(change: Callable[[Tensor], Tensor | None]) -> Callable[..., object]:
        def hook(module: nn.Module, inputs: object, output: Any) -> object:
            state = output[0] if isinstance(output, tuple) else output
            changed = change(state)
            if changed is None:
                return None
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    handles = [module.register_forward_hook(wrap(change)) for module, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Case:
    """A question about one person and the same question about another one, token by token aligned."""

    ids: Tensor
    other_ids: Tensor
    start: int
    last: int
    answer: int


def trace_cases(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, form: str, count: int
) -> list[Case]:
    """Facts with a single-token answer that the model knows, each with a person of another answer to swap in."""
    rng, cases = random.Random(f"trace-{form}"), []
    for _ in range(50 * count):
        person, other = rng.sample(world.people, 2)
        relation = rng.choice([name for name in ATTRIBUTES if name != "employer"])
        if world.answers[person, relation] == world.answers[other, relation]:
            continue
        rows = [encode_row(tokenizer, _ask(world, name, relation, form), answer=True) for name in (person, other)]
        if rows[0].subject is None or rows[0].subject != rows[1].subject:
            continue
        ids, other_ids = (torch.tensor([row.ids[: row.start]]) for row in rows)
        start, stop = rows[0].subject
        case = Case(ids, other_ids, start, stop - 1, rows[0].ids[rows[0].start])
        if int(model(input_ids=ids).logits[0, -1].argmax()) == case.answer:
            cases.append(case)
        if len(cases) == count:
            break
    return cases


def _ask(world: World, person: str, relation: str, form: str) -> Prompt:
    answer = world.answers[person, relation]
    if form == "statement":
        return Prompt(v.statement_prefix(relation, person, 0), answer, person)
    return Prompt(v.RELATIONS[relation].questions[0].format(S=person), answer, person, form="question", chat=True)


@torch.no_grad()
def causal_trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    form: str,
    corruption: str,
    count: int = 20,
) -> dict[str, object]:
    """Probability of the answer regained by restoring one site of a corrupted run, averaged over facts.

    corruption: "swap" (another person's name) or "noise" (on the name's embeddings). Sites: residual stream at the
    last subject token and at the last token, MLP output at the last subject token over a window of layers.
    """
    cases = trace_cases(model, tokenizer, world, form, count)
    runs = [_trace_one(model, case, corruption) for case in cases]
    result: dict[str, object] = {"n": len(runs)}
    for key in runs[0]:
        values = torch.stack([run[key] for run in runs]).mean(0)
        result[key] = [round(x, 4) for x in values.tolist()] if values.ndim else round(float(values), 4)
    return result


def _trace_one(model: PreTrainedModel, case: Case, corruption: str) -> dict[str, Tensor]:
    layers, last = model.model.layers, case.ids.shape[1] - 1
    residual: dict[int, Tensor] = {}
    mlp: dict[int, Tensor] = {}
    store = {layer: keeper(residual, i) for i, layer in enumerate(layers)}
    store |= {layer.mlp: keeper(mlp, i) for i, layer in enumerate(layers)}
    with hooks(store):
        clean = _probability(model, case.ids, case.answer)
    ids, corrupt = case.other_ids, {}
    if corruption == "noise":
        ids = case.ids.repeat(NOISE_DRAWS, 1)
        corrupt = {model.model.embed_tokens: _noiser(model, case)}
    with hooks(corrupt):
        base = _probability(model, ids, case.answer)

    def effect(changes: dict[nn.Module, Callable[[Tensor], Tensor | None]]) -> Tensor:
        with hooks(corrupt | changes):
            return _probability(model, ids, case.answer) - base

    everywhere = range(len(layers))
    windows = [[j for j in everywhere if abs(i - j) <= WINDOW // 2] for i in everywhere]
    return {
        "clean": clean,
        "corrupted": base,
        "residual_last_subject": torch.stack(
            [effect({layers[i]: _putter(residual[i], case.last)}) for i in everywhere]
        ),
        "residual_last": torch.stack([effect({layers[i]: _putter(residual[i], last)}) for i in everywhere]),
        "mlp_last_subject": torch.stack(
            [effect({layers[j].mlp: _putter(mlp[j], case.last) for j in window}) for window in windows]
        ),
    }


def keeper(store: dict[int, Tensor], key: int) -> Callable[[Tensor], None]:
    """A function that keeps a copy of what it is shown under `key`."""

    def keep(state: Tensor) -> None:
        store[key] = state.clone()

    return keep


def _putter(state: Tensor, position: int) -> Callable[[Tensor], Tensor]:
    def put(current: Tensor) -> Tensor:
        current = current.clone()
        current[:, position] = state[:, position]
        return current

    return put


def _noiser(model: PreTrainedModel, case: Case) -> Callable[[Tensor], Tensor]:
    scale = NOISE_SCALE * float(model.model.embed_tokens.weight.std())
    shape = (NOISE_DRAWS, case.last + 1 - case.start, model.config.hidden_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale

    def add(state: Tensor) -> Tensor:
        state = state.clone()
        state[:, case.start : case.last + 1] += noise
        return state

    return add


def _probability(model: PreTrainedModel, ids: Tensor, answer: int) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits[:, -1].softmax(-1)[:, answer].mean()
