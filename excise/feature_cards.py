"""Feature cards as plain values: for a terminal, a notebook, the report, and a file. `sae.cards` makes them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.errors import DamagedFile
from excise.files import write_text
from excise.jsonfile import decoded
from excise.page import Raw, document, esc, number, table, tag

# Where `excise sae features --out` writes, and what `excise report` looks for in a run folder.
FILE, PAGE = "features.json", "features.html"
# A card stands in a notebook, too, where no style sheet of ours is: colours of the page with a fallback.
BOX = "border: 1px solid var(--line, #8884); border-radius: 6px; padding: .3rem 1rem .8rem; margin: .8rem 0"
SIDE = "display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start"
SOFT = "color: var(--soft, #777); font-size: .85em"
HEAD = "margin: .5rem 0; overflow-wrap: anywhere"
WIDE, HIGH = 18, 64


@dataclass(frozen=True)
class Context:
    """Tokens around one firing. values: activations of the feature on them; at: index of the strongest token; group: of
    the text."""

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    at: int
    group: str = ""

    def __str__(self) -> str:
        return "".join(f"[{t}]" if i == self.at else t for i, t in enumerate(self.tokens)).replace("\n", " ")


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
        lines += [f"  {c.group + ': ' if c.group else ''}{c}" for c in self.contexts]
        for name, words in (("promotes", self.promoted), ("suppresses", self.suppressed)):
            lines += [f"  {name} " + ", ".join(f"{w!r} {v:+.2f}" for w, v in words)] if words else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rates = table(["text", "tokens on which it fires"], [[n, f"{100 * r:.2f} %"] for n, r in self.rates.items()])
        columns = [tag("div", rates, _bars(self), style="flex: 1 1 15rem")]
        if self.promoted:
            rows = [
                [_visible(a), x, _visible(b), y] for (a, x), (b, y) in zip(self.promoted, self.suppressed, strict=True)
            ]
            columns.append(
                tag("div", table(["promotes", "logit", "suppresses", "logit"], rows), style="flex: 2 1 24rem")
            )
        said = [_shaded(c) for c in self.contexts] or [tag("p", "It fires on none of these texts.", style=SOFT)]
        return tag("article", tag("h4", self.site, style=HEAD), tag("div", *columns, style=SIDE), *said, style=BOX)


class FeatureCards(list[FeatureCard]):
    """A list of cards that a notebook shows one below the other."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def _repr_html_(self) -> str:
        return tag("div", *(Raw(card._repr_html_()) for card in self))

    def page(self, title: str) -> str:
        """The cards as one HTML page that needs nothing but itself."""
        return document(title, [tag("main", tag("h1", title), *cards_section(self))])

    def save(self, folder: str | Path, title: str = "Features of the dictionary") -> Path:
        """Write features.json and features.html, and return the path of the page."""
        rows = [dataclasses.asdict(card) for card in self]
        write_text(Path(folder) / FILE, json.dumps(rows, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
        return write_text(Path(folder) / PAGE, self.page(title))

    @classmethod
    def load(cls, folder: str | Path) -> FeatureCards:
        """The cards that `save` wrote there; none where there is no such file. Raises DamagedFile."""
        path = Path(folder) / FILE
        if not path.is_file():
            return cls()
        rows = decoded(path.read_bytes(), path)
        try:
            return cls(_card(row) for row in rows)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise DamagedFile(f"{path}: not a file of feature cards ({error!r}); make it again") from error


def cards_section(cards: Sequence[FeatureCard]) -> list[Raw]:
    """What a report says of features: how to read a card, and the cards."""
    if not cards:
        return []
    note = (
        "Features of a sparse dictionary: on what share of the tokens each fires, its strongest firings (darker: stronger), "
        "the histogram of its activations, and which words it raises and lowers when it is added at its mean strength."
    )
    return [tag("p", note, class_="soft"), *(Raw(card._repr_html_()) for card in cards)]


def _card(row: Any) -> FeatureCard:
    """One card from what JSON made of it; raises where anything is of another kind."""
    contexts = tuple(
        Context(tuple(map(_word, c["tokens"])), tuple(map(_real, c["values"])), int(c["at"]), _word(c["group"]))
        for c in row["contexts"]
    )
    promoted, suppressed = (tuple((_word(w), _real(v)) for w, v in row[k]) for k in ("promoted", "suppressed"))
    card = FeatureCard(
        _word(row["site"]), {_word(k): _real(v) for k, v in row["rates"].items()}, _real(row["strength"]), contexts,
        promoted, suppressed, tuple(map(_real, row["edges"])), tuple(map(int, row["counts"])),
    )  # fmt: skip
    fits = all(len(c.tokens) == len(c.values) and 0 <= c.at < len(c.tokens) for c in contexts)
    if not fits or len(promoted) != len(suppressed) or len(card.edges) != len(card.counts) + 1 or min(card.counts) < 0:
        raise ValueError("lists of different lengths")
    return card


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _real(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _visible(token: str) -> str:
    return token.replace(" ", "␣").replace("\n", "↵") or "(nothing)"


def _shaded(context: Context) -> Raw:
    """The tokens, each the darker the stronger the feature is on it."""
    most = max(*context.values, 1e-9)
    words = [tag("span", t, style=_shade(v / most)) for t, v in zip(context.tokens, context.values, strict=True)]
    group = tag("small", f"{context.group} ", style=SOFT) if context.group else Raw("")
    return tag("p", group, *words, title=f"strongest: {number(context.values[context.at])}")


def _shade(share: float) -> str | None:
    strength = round(100 * max(0.0, min(1.0, share)))
    ink = "; color: #1c2126" if strength >= 50 else ""  # on a dark page, too
    return f"background: color-mix(in srgb, #e8a33d {strength}%, transparent){ink}" if strength else None


def _bars(card: FeatureCard) -> Raw:
    """The histogram as an SVG; heights in logarithms, because most firings are weak."""
    if not sum(card.counts):
        return Raw("")
    high = math.log(max(card.counts) + 1)
    bars = ""
    for i, count in enumerate(card.counts):
        tall = HIGH * math.log(count + 1) / high
        title = f"{number(card.edges[i])} to {number(card.edges[i + 1])}: {count}"
        bars += (
            f'<rect x="{i * WIDE}" y="{HIGH - tall:.1f}" width="{WIDE - 2}" height="{tall:.1f}">'
            f"<title>{esc(title)}</title></rect>"
        )
    width, top = WIDE * len(card.counts), number(card.edges[-1])
    ends = f'<text x="0" y="{HIGH + 14}">0</text><text x="{width}" y="{HIGH + 14}" text-anchor="end">{esc(top)}</text>'
    note = f"{sum(card.counts)} firings, mean {number(card.strength)} (heights: logarithm of the count)"
    shape = f'viewBox="0 0 {width} {HIGH + 18}" width="{width}" height="{HIGH + 18}" fill="#6b7f99" font-size="12"'
    drawn = Raw(f'<svg role="img" aria-label="{esc(note)}" {shape}>{bars}{ends}</svg>')
    return tag("div", drawn, tag("p", note, style=SOFT))
