"""The README's picture, from a run folder: where the facts were found, what is said of them, what is left inside.

excise demo && python docs/picture.py excise-demo
"""

import io
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from PIL import Image  # noqa: E402

from excise.figures import figure_png  # noqa: E402
from excise.maps import map_figures  # noqa: E402
from excise.plots import plot_before_after, plot_layers  # noqa: E402
from excise.scores import Localization  # noqa: E402
from excise.store import read_results  # noqa: E402

HEIGHT = 620


def main(folder: Path) -> None:
    """Write docs/picture.png."""
    where, results = Localization.load(folder / "localization.safetensors"), read_results(folder / "results.jsonl")
    drawn = [map_figures(where)[1], plot_before_after(results), plot_layers(results, "lens", measure="log-probability")]
    parts = [Image.open(io.BytesIO(figure_png(figure))).convert("RGB") for figure in drawn]
    parts = [p.resize((round(p.width * HEIGHT / p.height), HEIGHT), Image.Resampling.LANCZOS) for p in parts]
    whole = Image.new("RGB", (sum(p.width for p in parts), HEIGHT), "white")
    for i, part in enumerate(parts):
        whole.paste(part, (sum(p.width for p in parts[:i]), 0))
    whole.quantize(128).save(HERE / "picture.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
