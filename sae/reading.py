"""Activations of texts at one hook, batch by batch, with the tokens that count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from excise.encoding import Batch
from excise.facts import Prompt
from excise.model import Model
from excise.trace import read_batch

Text = Prompt | str
# Room for the special tokens that a tokenizer puts around a text.
SPARE = 4


@dataclass(frozen=True)
class Reading:
    """One batch. index: which texts; x: activations [batch, width, d]; counts: tokens that are content, [batch, width]."""

    index: list[int]
    batch: Batch
    x: Tensor
    counts: Tensor


def readings(
    model: Model, texts: Sequence[Text], hook: str, *, answers: bool = True, specials: bool = False
) -> Iterator[Reading]:
    """Every text at `hook`, in batches of similar length; the forward pass ends there. No gradient.

    answers: prompts are read with their answers; plain strings as they are. specials: count special tokens other than BOS
    too; padding never counts.
    """
    plain = [_without_bos(model, t) for t in texts]
    asked = [i for i, t in enumerate(plain) if isinstance(t, Prompt) and t.answer]
    silent = sorted(set(range(len(plain))) - set(asked))
    for chosen, with_answer in ((asked, answers), (silent, False)):
        if not chosen:
            continue
        for index, batch in model.batches([plain[i] for i in chosen], answers=with_answer):
            x = read_batch(model, batch, [hook])[hook]
            yield Reading([chosen[i] for i in index], batch, x, content(model, batch, specials=specials))


def content(model: Model, batch: Batch, *, specials: bool = False) -> Tensor:
    """Tokens that say something, [batch, width]: no padding, no BOS, and no other special token unless `specials`."""
    counts = batch.mask.bool()
    left_out = {model.tokenizer.bos_token_id} if specials else set(model.tokenizer.all_special_ids)
    unwanted = torch.tensor(sorted(i for i in left_out if i is not None), dtype=torch.long, device=batch.ids.device)
    return counts & ~torch.isin(batch.ids, unwanted)


def fitting(model: Model, texts: Iterable[Text], *, most: int = 1024) -> Iterator[Text]:
    """The texts in order; a plain one that is longer than the model's context, or than `most` tokens, in pieces that fit."""
    limit = min(model.context or most, most)
    for text in texts:
        # A token is a byte or more, so that few texts have to be tokenised to know.
        if isinstance(text, str) and len(text.encode("utf-8", "replace")) > limit - SPARE:
            yield from _pieces(model, text, limit)
        else:
            yield text


def _pieces(model: Model, text: str, limit: int) -> Iterator[str]:
    spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= limit - SPARE:
        yield text
        return
    # Tokenised alone, a piece can have some more tokens than it had in the middle.
    step = max(1, limit - limit // 8 - SPARE)
    starts = sorted({spans[i][0] for i in range(0, len(spans), step)})
    for first, stop in zip([0, *starts[1:]], [*starts[1:], len(text)], strict=True):
        yield text[first:stop]


def after(model: Model, texts: Sequence[Text], fillers: Sequence[Text]) -> list[Text]:
    """Each text once more, after one or two of `fillers` in turn: what it looks like in the middle of something else.

    Prompts stand as fillers with their answers. Special tokens in a filler stay, except inside a chat prompt's turn.
    """
    said = [f if isinstance(f, str) else f"{f.text} {f.answer}." for f in fillers]
    found: list[Text] = []
    for i, text in enumerate(texts):
        parts = [said[(i + j) % len(said)] for j in range(1 + i % 2)]
        chat = isinstance(text, Prompt) and text.chat
        before = "".join(_joined(model, _without_bos(model, p), plain=chat) for p in parts)
        if isinstance(text, Prompt):
            found.append(replace(text, text=before + text.text))
        else:
            found.append(before + str(_without_bos(model, text)))
    return found


def _joined(model: Model, filler: Text, *, plain: bool) -> str:
    """The filler with a space after it; none after a special token, which ends a text by itself."""
    words = str(filler)
    specials = tuple(model.tokenizer.all_special_tokens)
    if plain:
        for special in specials:
            words = words.replace(special, " ")
        return " ".join(words.split()) + " "
    return words if words.endswith(specials) else words + " "


def _without_bos(model: Model, text: Text) -> Text:
    bos = getattr(model.tokenizer, "bos_token", None)
    return text.removeprefix(bos) if isinstance(text, str) and bos else text
