"""Draw what six attentions become in training: loss, entropy and spectral gap by step.

    python examples/draw_training.py docs/training.svg

From docs/results/training.json, which `benchmarks/training.py` writes; means of seeds, heads and
layers. A second.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "training.json"
PANELS = {"loss": "test loss, nats", "entropy": "entropy, nats", "gap": "spectral gap"}


def curves(rows: list[dict[str, Any]], measure: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, steps and means of each attention."""
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row["curve"] for row in rows if row["name"] == name]
        values = [[np.mean(look[measure]) for look in curve] for curve in found]
        yield name, [look["step"] for look in found[0]], np.mean(values, 0)


def main() -> None:
    """Write the picture to the file that is named."""
    from matplotlib.figure import Figure

    results = json.loads(RESULTS.read_text())
    tasks = [name for name in ("images", "plays", "reviews") if name in results]
    figure = Figure((10.0, 2.6 * len(tasks)), layout="constrained")
    for line, task in zip(figure.subplots(len(tasks), 3, squeeze=False), tasks, strict=True):
        for axes, (measure, label) in zip(line, PANELS.items(), strict=True):
            begun = 1 if measure == "loss" else 0  # untrained it is several times the others
            for name, steps, values in curves(results[task]["rows"], measure):
                axes.plot(steps[begun:], values[begun:], label=name)
            axes.set(xlabel="step", ylabel=label, title=task)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
