"""Draw what a model loses at which size, by the light and the advanced pipeline.

    python examples/draw_curves.py docs/curves.svg

From docs/results/pipelines.json, which `benchmarks/pipelines.py` writes. A second.
"""

import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "pipelines.json"
MODELS = {"Fashion-MNIST ResNet": "", "EfficientNet-Lite0": "_efficientnet"}
STYLES = {"light": "#2f6db3", "advanced": "#c77f1b"}


def points(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Percent of the size and divergence of the rows of this name, by size."""
    found = sorted((100 * row["fraction"], row["kl"]) for row in rows if row["name"] == name)
    return [size for size, _ in found], [loss for _, loss in found]


def main() -> None:
    """Write the picture to the file that is named."""
    from matplotlib.figure import Figure

    results = json.loads(RESULTS.read_text())
    figure = Figure((9.0, 3.6), layout="constrained")
    panels = zip(figure.subplots(1, len(MODELS)), MODELS.items(), strict=True)
    for ax, (model, suffix) in panels:
        for name, color in STYLES.items():
            rows = results[name + suffix]["rows"]
            ax.plot(*points(rows, name), "o-", color=color, markersize=4, label=name)
            one = f"{name}, one width"
            ax.plot(*points(rows, one), "s", color=color, fillstyle="none", label=one)
        ax.set(xlabel="size, % of float32", yscale="log", title=model)
    figure.axes[0].set_ylabel("divergence from the float model, nats")
    figure.axes[0].legend()
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
