"""What all figures share: ink, arm styles, and export to SVG and PNG that is the same to the byte every time."""

from __future__ import annotations

import functools
import hashlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import matplotlib
from matplotlib.figure import Figure

from excise.comparison import arm_role
from excise.page import plain

P = ParamSpec("P")
R = TypeVar("R")

GREY, BLUE, ORANGE, GREEN = "#767676", "#0072b2", "#e08214", "#1b8a5a"
# Further edits beside the first.
MORE = ("#56b4e9", "#8856a7", "#c51b7d")
# One ink for text and axes; it becomes `currentColor` in an SVG, so that a figure suits a light and a dark page.
INK = "#1a2b3c"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.labelcolor": INK,
    "hatch.linewidth": 0.6,
}


class Picture(Figure):
    """A figure that shows itself in a notebook without a plotting session."""

    def _repr_svg_(self) -> str:
        return figure_svg(self)

    def _repr_png_(self) -> bytes:
        return figure_png(self)


def drawn(function: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function under the shared style; the reader's own settings stay as they are."""

    @functools.wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        with matplotlib.rc_context(STYLE):
            return function(*args, **kwargs)

    return styled


def picture(width: float, height: float) -> Picture:
    """An empty figure, inches."""
    return Picture(figsize=(width, height), layout="constrained")


def short(text: str, width: int = 40) -> str:
    """The text without control characters, cut to `width`."""
    text = plain(text)
    return text if len(text) <= width else text[: width - 1] + "…"


def arm_style(arms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker, line and hatch of each arm: before grey, edited blue, control orange, oracle green, by name."""
    fixed = {
        "before": dict(color=GREY, marker="o", linestyle=":", hatch=""),
        "control": dict(color=ORANGE, marker="^", linestyle="-.", hatch="\\\\\\"),
        "oracle": dict(color=GREEN, marker="D", linestyle="--", hatch="..."),
    }
    others = [a for a in arms if arm_role(a) == "edited"]
    colours = dict(zip(others, (BLUE, *MORE * (1 + len(others) // len(MORE))), strict=False))
    edited = {
        a: dict(color=c, marker="sPX*"[i % 4], linestyle="-", hatch="///") for i, (a, c) in enumerate(colours.items())
    }
    return {arm: edited[arm] if arm in edited else fixed[arm_role(arm)] for arm in arms}


def quiet(axes: Any, axis: str = "y") -> None:
    """Faint lines behind the data, along one axis or "both"."""
    axes.grid(axis=axis, color="#999999", alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)


def figure_svg(figure: Figure) -> str:
    """The figure as an SVG element for inlining: same bytes every time, ids of its own, ink that follows the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "excise", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # glyphs that the measuring font lacks; the reader's font draws them
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    prefix = f"x{hashlib.sha256(text.encode()).hexdigest()[:8]}-"
    text = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}", text)
    text = re.sub(r"font: ([^;\"]*?)'?DejaVu Sans'?[^;\"]*", r"font: \1system-ui, sans-serif", text)
    return text.replace(INK, "currentColor")


def figure_png(figure: Figure, *, dpi: int = 144) -> bytes:
    """The figure as a PNG on white, without a date."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write .svg or .png, by the ending of `path`."""
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"{path.name}: figures are written as .svg or .png")
    path.write_bytes(figure_svg(figure).encode() if path.suffix == ".svg" else figure_png(figure))
    return path
