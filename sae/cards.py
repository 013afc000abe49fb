"""Feature cards: what a feature fires on, what it says to the output, how often it fires where it should and should not."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from excise.lens import decode
from excise.model import Model
from excise.page import Raw, document, esc, number, table, tag
from sae.dictionary import Dictionary
from sae.match import resolve
from sae.reading import Text, readings
from sae.statistics import FeatureStats, statistics

AROUND, BINS = 8, 12


@dataclass(frozen=True)
class Context:
    """Tokens around one firing. values: activations of the feature on them; at: index of the strongest token."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int


@dataclass(frozen=True)
class FeatureCard:
    """One feature.

    site: as a localization names it. rates: group -> share of tokens on which it fires. strength: mean activation where
    it fires. contexts: the strongest firings, one per text. promoted, suppressed: (token, change of its logit) when the
    feature is added at its mean strength to what no feature explains; empty where the hook is not the residual stream.
    edges, counts: histogram of its positive activations, len(edges) == len(counts) + 1.
    """

    site: str
    rates: dict[str, float]
    strength: float
    contexts: tuple[Context, ...]
    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate:.4f}" for name, rate in self.rates.items())
        lines = [f"{self.site}: fires on {rates} of the tokens, {self.strength:.3g} strong"]
        lines += [f"  {_marked(c)}" for c in self.contexts]
        for name, words in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            lines += [f"  {name} " + ", ".join(f"{w!r} {v:+.2f}" for w, v in words)] if words else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [tag("h4", self.site), tag("p", f"mean activation where it fires: {self.strength:.3g}")]
        parts.append(table(["text", "share of tokens on which it fires"], [[n, r] for n, r in self.rates.items()]))
        parts.append(_bars(self.edges, self.counts))
        parts += [tag("p", *(_shaded(t, v / max(max(c.values), 1e-9)) for t, v in zip(c.tokens, c.values, strict=True)))
                  for c in self.contexts]  # fmt: skip
        if self.promoted:
            rows = [[a, x, b, y] for (a, x), (b, y) in zip(self.promoted, self.suppressed, strict=True)]
            parts.append(table(["promotes", "logit", "suppresses", "logit"], rows))
        return tag("div", *parts, class_="card")


def cards(
    model: Model,
    dictionary: Dictionary,
    features: Sequence[int],
    texts: dict[str, Sequence[Text]],
    *,
    contexts: int = 4,
    words: int = 5,
) -> list[FeatureCard]:
    """One card per feature, from one pass over each group of texts, such as {"forget": ..., "retain": ...}.

    contexts: strongest texts shown; words: tokens promoted and suppressed. Special tokens and padding do not count.
    """
    resolve(dictionary, model)
    stats = {name: statistics(model, dictionary, group) for name, group in texts.items()}
    every = [t for group in texts.values() for t in group]
    kept, values = _strongest(model, dictionary, features, every, contexts)
    found = []
    for i, feature in enumerate(features):
        promoted, suppressed = _said(model, dictionary, feature, _strength(list(stats.values()), feature), words)
        edges, counts = _histogram(values[i])
        found.append(
            FeatureCard(
                str(dictionary.site(feature)),
                {name: float(s.rate[feature]) for name, s in stats.items()},
                _strength(list(stats.values()), feature),
                tuple(context for _, _, context in sorted(kept[i], key=lambda item: -item[0])),
                promoted,
                suppressed,
                edges,
                counts,
            )
        )
    return found


def page(shown: Sequence[FeatureCard], title: str) -> str:
    """The cards as one HTML page that needs nothing but itself."""
    body = [tag("h1", title), *(Raw(card._repr_html_()) for card in shown)]
    return document(title, [tag("main", *body)])


def _strength(stats: Sequence[FeatureStats], feature: int) -> float:
    count = sum(float(s.count[feature]) for s in stats)
    return sum(float(s.total[feature]) for s in stats) / max(count, 1.0)


def _strongest(
    model: Model, dictionary: Dictionary, features: Sequence[int], texts: Sequence[Text], contexts: int
) -> tuple[list[list[tuple[float, int, Context]]], list[Tensor]]:
    """The strongest contexts of each feature, and all its positive activations."""
    picked = torch.as_tensor(features, dtype=torch.long)
    kept: list[list[tuple[float, int, Context]]] = [[] for _ in features]
    values: list[list[Tensor]] = [[] for _ in features]
    for r in readings(model, texts, dictionary.hook):
        a = torch.where(r.counts[..., None], dictionary.encode(r.x)[..., picked], 0.0).cpu()
        for j, per_text in enumerate(a.unbind(-1)):
            values[j].append(per_text[per_text > 0])
            peaks, at = per_text.max(1)
            for row in peaks.topk(min(contexts, len(peaks))).indices.tolist():
                if peaks[row] > 0:
                    context = _context(model, r.batch.ids[row, : r.batch.lengths[row]], per_text[row], int(at[row]))
                    entry = (float(peaks[row]), -r.index[row], context)
                    (heapq.heappush if len(kept[j]) < contexts else heapq.heappushpop)(kept[j], entry)
    return kept, [torch.cat(v) for v in values]


def _context(model: Model, ids: Tensor, values: Tensor, at: int) -> Context:
    first, stop = max(0, at - AROUND), min(len(ids), at + AROUND // 2 + 1)
    tokens = tuple(model.tokenizer.decode([i]) for i in ids[first:stop].tolist())
    return Context(tokens, tuple(values[first:stop].tolist()), at - first)


def _said(
    model: Model, dictionary: Dictionary, feature: int, strength: float, words: int
) -> tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]:
    if dictionary.d != model.names.d_model or "hook_resid" not in dictionary.hook:
        return (), ()
    row = dictionary.decoder[feature] * max(strength, 1e-6)
    with_it, without = decode(model, torch.stack([dictionary.centre + row, dictionary.centre]))
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


def _marked(context: Context) -> str:
    return "".join(f"[{t}]" if i == context.at else t for i, t in enumerate(context.tokens)).replace("\n", " ")


def _shaded(token: str, share: float) -> Raw:
    strength = round(100 * max(0.0, min(1.0, share)))
    style = f"background: color-mix(in srgb, #e8a33d {strength}%, transparent)" if strength else None
    return tag("span", token, style=style)


def _bars(edges: Sequence[float], counts: Sequence[int]) -> Raw:
    """The histogram as an SVG; heights in logarithms, because most firings are weak."""
    high = max(max(counts), 1)
    heights = [48 * torch.tensor(c + 1.0).log().item() / torch.tensor(high + 1.0).log().item() for c in counts]
    bars = "".join(
        f'<rect x="{i * 16}" y="{50 - h:.1f}" width="14" height="{h:.1f}"><title>{esc(number(edges[i]))} to '
        f"{esc(number(edges[i + 1]))}: {counts[i]}</title></rect>"
        for i, h in enumerate(heights)
    )
    label = f"{sum(counts)} firings, up to {number(edges[-1])}"
    shape = f'viewBox="0 0 {16 * len(counts)} 50" width="{16 * len(counts)}" height="50" fill="#6b7f99"'
    return Raw(f'<svg role="img" aria-label="{esc(label)}" {shape}>{bars}</svg>')
