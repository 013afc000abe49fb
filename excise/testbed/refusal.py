"""The refusal direction of a trained model, and reading its residual stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from excise.encoding import collate, encode_row, length_groups
from excise.facts import Prompt
from excise.testbed import vocabulary as v
from excise.testbed.behaviour import refusal_starts
from excise.testbed.tracing import hooks, keeper
from excise.testbed.world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DOSES = (1.0, 2.0, 4.0)


@torch.no_grad()
def refusal_direction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, count: int = 80
) -> dict[str, object]:
    """Add and subtract the difference of means (unknown minus known questions) at the last token, layer by layer.

    known_refused, unknown_refused: refused share of other known and unknown questions, per layer and dose.
    """
    rng, layers = random.Random(0), model.model.layers
    fit_unknown = questions(world, rng.sample(world.refusal_people, count), rng)
    fit_known = questions(world, rng.sample(world.retain_people[:100], count), rng)
    known, unknown = questions(world, world.retain_people[100:], rng), questions(world, world.unknown_people[:60], rng)
    means = [states_at_end(model, tokenizer, prompts).mean(1) for prompts in (fit_unknown, fit_known)]
    direction = means[0] - means[1]
    result: dict[str, object] = {
        "known_before": _refused(model, tokenizer, known, {}),
        "unknown_before": _refused(model, tokenizer, unknown, {}),
        "doses": list(DOSES),
    }
    for name, prompts, sign in (("known_refused", known, 1.0), ("unknown_refused", unknown, -1.0)):
        result[name] = [
            [_refused(model, tokenizer, prompts, {layer: sign * dose * direction[i]}) for dose in DOSES]
            for i, layer in enumerate(layers)
        ]
    return result


def questions(world: World, names: Sequence[str], rng: random.Random) -> list[Prompt]:
    """One question per name, in a wording that training used."""
    prompts = []
    for name in names:
        words = v.PERSON_RELATIONS[rng.choice(tuple(v.PERSON_RELATIONS))].questions
        prompts.append(Prompt(rng.choice(words[:-1]).format(S=name), v.UNKNOWN, name, form="question", chat=True))
    return prompts


@torch.no_grad()
def states_at_end(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], *, subject: bool = False
) -> Tensor:
    """Residual stream after every layer at the last token, or at the subject's last one: (layer, prompt, d)."""
    states = []
    for prompt in prompts:
        row = encode_row(tokenizer, prompt, answer=False)
        kept: dict[int, Tensor] = {}
        position = row.subject[1] - 1 if subject and row.subject else len(row.ids) - 1
        with hooks({layer: keeper(kept, i) for i, layer in enumerate(model.model.layers)}):
            model.model(input_ids=torch.tensor([row.ids]), use_cache=False)
        states.append(torch.stack([kept[i][0, position] for i in range(len(kept))]))
    return torch.stack(states, dim=1)


def _refused(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    added: dict[nn.Module, Tensor],
) -> float:
    """Refused share when a vector is added at the last token of the given layers."""
    starts, refused = refusal_starts(tokenizer), 0
    rows = [encode_row(tokenizer, prompt, answer=False) for prompt in prompts]
    for group in length_groups([len(row.ids) for row in rows], tokens=4096):
        batch = collate([prompts[i] for i in group], [rows[i] for i in group], tokenizer.pad_token_id)
        ends = torch.tensor(batch.lengths) - 1
        here = torch.arange(len(group))

        def add(state: Tensor, vector: Tensor, here: Tensor = here, ends: Tensor = ends) -> Tensor:
            return state.index_put((here, ends), vector, accumulate=True)

        changes = {module: (lambda state, x=x, add=add: add(state, x)) for module, x in added.items()}
        with hooks(changes):
            logits = model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[here, ends]
        refused += sum(int(token) in starts for token in logits.argmax(-1))
    return round(refused / len(prompts), 4)
