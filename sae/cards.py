"""Feature cards: what a feature fires on, what it says to the output, how often it fires where it should and should not."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from excise.edits import Edit
from excise.errors import ExciseError
from excise.facts import Facts
from excise.feature_cards import Context, FeatureCard, FeatureCards
from excise.lens import decode
from excise.model import Model
from sae.dictionary import Dictionary
from sae.load import load
from sae.match import other_width, resolve
from sae.reading import Reading, Text, readings

AROUND, BINS = 8, 12


def cards(
    model: Model,
    dictionary: Dictionary,
    features: Sequence[int],
    texts: dict[str, Sequence[Text]],
    *,
    contexts: int = 4,
    words: int = 5,
) -> FeatureCards:
    """One card per feature, from one pass over each group of texts, such as {"forget": ..., "retain": ...}.

    contexts: strongest texts shown; words: tokens promoted and suppressed. Special tokens and padding do not count.
    Raises ExciseError for a feature that the dictionary does not have, and as `sae.check` for another model's hook or width.
    """
    resolve(dictionary, model)
    if wrong := [i for i in features if not 0 <= i < dictionary.n]:
        raise ExciseError(f"{dictionary.name} has features 0 to {dictionary.n - 1}, not {', '.join(map(str, wrong))}")
    seen = [_Seen(contexts) for _ in features]
    tokens = {name: _read(model, dictionary, features, name, group, seen) for name, group in texts.items()}
    found = FeatureCards()
    for feature, each in zip(features, seen, strict=True):
        values = torch.cat([torch.zeros(0), *each.values])
        strength = float(values.mean()) if len(values) else 0.0
        promoted, suppressed = _said(model, dictionary, feature, strength, words)
        edges, counts = _histogram(values)
        rates = {name: each.fired.get(name, 0) / max(1, n) for name, n in tokens.items()}
        shown = tuple(context for _, _, context in sorted(each.kept, key=lambda entry: -entry[0]))
        site = str(dictionary.site(feature))
        found.append(FeatureCard(site, rates, strength, shown, promoted, suppressed, edges, counts))
    return found


def of_edit(model: Model, edit: Edit, facts: Facts, *, most: int = 8) -> FeatureCards:
    """Cards of the first `most` features that an edit of `sae_clamp` changes, on the facts that its editor was shown; none
    for another edit, or where its dictionary is no longer there."""
    source = edit.recipe.get("dictionary")
    chosen = edit.recipe.get("chosen")
    if not isinstance(source, dict) or not isinstance(chosen, list):
        return FeatureCards()
    try:
        dictionary = load(str(source.get("name")))
    except (FileNotFoundError, ExciseError):
        return FeatureCards()
    if dictionary.fingerprint != source.get("fingerprint"):
        return FeatureCards()
    return cards(model, dictionary, chosen[:most], by_group(facts))


def by_group(facts: Facts) -> dict[str, Sequence[Text]]:
    """The prompts to forget and those to keep, held-out wordings left out; a group without any is left out, too."""
    found = {group: facts.group(group).prompts(held_out=False) for group in ("forget", "retain", "neighbour")}
    return {group: prompts for group, prompts in found.items() if prompts}


class _Seen:
    """What was seen of one feature: firings by group, all positive activations, the `most` strongest contexts (a heap)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.fired: dict[str, int] = {}
        self.values: list[Tensor] = []
        self.kept: list[tuple[float, int, Context]] = []
        self.texts = 0

    def add(self, a: Tensor, group: str, context: Callable[[int, int], Context]) -> None:
        """a: activations, 0 where a token does not count, [texts, width]; context: of a row and a token of it."""
        positive = a[a > 0]
        self.values.append(positive)
        self.fired[group] = self.fired.get(group, 0) + len(positive)
        peaks, at = a.max(1)
        for row in peaks.topk(min(self.most, len(peaks))).indices.tolist():
            if peaks[row] > 0:
                self.texts += 1
                entry = (float(peaks[row]), -self.texts, context(row, int(at[row])))
                (heapq.heappush if len(self.kept) < self.most else heapq.heappushpop)(self.kept, entry)


def _read(
    model: Model,
    dictionary: Dictionary,
    features: Sequence[int],
    group: str,
    texts: Sequence[Text],
    seen: Sequence[_Seen],
) -> int:
    """Show every feature's record the texts of a group; the tokens that were read."""
    picked, tokens = torch.as_tensor(features, dtype=torch.long), 0
    for r in readings(model, texts, dictionary.hook):
        if r.x.shape[-1] != dictionary.d:
            raise other_width(dictionary, model, r.x.shape[-1])
        a = torch.where(r.counts[..., None], dictionary.encode(r.x)[..., picked], 0.0).cpu()
        tokens += int(r.counts.sum())
        for each, values in zip(seen, a.unbind(-1), strict=True):

            def context(row: int, at: int, r: Reading = r, values: Tensor = values) -> Context:
                return _context(model, r.batch.ids[row, : r.batch.lengths[row]], values[row], at, group)

            each.add(values, group, context)
    return tokens


def _context(model: Model, ids: Tensor, values: Tensor, at: int, group: str) -> Context:
    first, stop = max(0, at - AROUND), min(len(ids), at + AROUND // 2 + 1)
    tokens = tuple(model.tokenizer.decode([i]) for i in ids[first:stop].tolist())
    return Context(tokens, tuple(values[first:stop].tolist()), at - first, group)


def _said(
    model: Model, dictionary: Dictionary, feature: int, strength: float, words: int
) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    if dictionary.d != model.names.d_model or "hook_resid" not in dictionary.hook:
        return (), ()
    here = dictionary.to(model.device)
    row = here.decoder[feature] * max(strength, 1e-6)
    with_it, without = decode(model, torch.stack([here.centre + row, here.centre]))
    change = with_it - without
    best, worst = change.topk(words), (-change).topk(words)

    def named(values: Tensor, ids: Tensor) -> tuple[tuple[str, float], ...]:
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return tuple((model.tokenizer.decode([i]), v) for i, v in pairs)

    return named(best.values, best.indices), named(-worst.values, worst.indices)


def _histogram(values: Tensor) -> tuple[tuple[float, ...], tuple[int, ...]]:
    top = float(values.max()) if len(values) else 1.0
    edges = torch.linspace(0, top, BINS + 1)
    return tuple(edges.tolist()), tuple(int(c) for c in torch.histc(values.float(), BINS, 0, top).tolist())
