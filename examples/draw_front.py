"""Draw what mixed widths are worth: a published instance of the integer program, all budgets.

    python examples/draw_front.py docs/allocation.svg

The instance is ResNet-18 without its first and last layer: 19 layers in 8 or 4 bits. The loss of a
choice is the average trace of the layer's Hessian times the squared error of its weights. Layers
that read the same value have the same width.

Source: Yao et al., `HAWQ-V3: Dyadic Neural Network Quantization <https://arxiv.org/abs/2011.10680>`_
and its authors' released code, which has these numbers.
"""

import sys

import numpy as np

from lnq import allocation

BITS = np.array([8, 4])

TRACES, *ERRORS, SIZES, MACS = np.array(
    [  # average trace, squared error in 8 and in 4 bits, weights, multiplications
        [0.06857826, 0.0235, 6.7430, 36864, 115605504],
        [0.03162379, 0.0125, 3.9691, 36864, 115605504],
        [0.03298575, 0.0102, 3.3281, 36864, 115605504],
        [0.01205663, 0.0082, 2.6796, 36864, 115605504],
        [0.02222431, 0.0145, 4.7277, 73728, 57802752],
        [0.00596336, 0.0344, 10.5966, 147456, 115605504],
        [0.06931772, 0.0023, 0.6827, 8192, 6422528],
        [0.00807129, 0.0287, 9.0942, 147456, 115605504],
        [0.00372905, 0.0148, 4.8857, 147456, 115605504],
        [0.00530698, 0.0333, 10.7599, 294912, 57802752],
        [0.00209011, 0.0682, 21.7546, 589824, 115605504],
        [0.00737569, 0.0027, 0.8603, 32768, 6422528],
        [0.00210454, 0.0448, 14.5324, 589824, 115605504],
        [0.00151197, 0.0336, 10.9651, 589824, 115605504],
        [0.00158041, 0.0576, 18.7706, 1179648, 57802752],
        [0.00078146, 0.1130, 36.4044, 2359296, 115605504],
        [0.00451841, 0.0102, 3.1572, 131072, 6422528],
        [0.00098745, 0.0947, 29.6994, 2359296, 115605504],
        [0.00072944, 0.0532, 17.4016, 2359296, 115605504],
    ]
).T

TIES = [(4, 6), (9, 11), (14, 16)]
"""A block's first convolution and the one on its shortcut."""

LOSS = TRACES[:, None] * np.stack(ERRORS, axis=1)
BYTES = np.outer(SIZES, BITS) / 8.0
BIT_OPERATIONS = allocation.bit_operations(MACS, BITS, BITS)


def ranked(cost: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Totals as layers go from 8 to 4 bits, one after the other by their score."""
    cost, loss = (
        table[:, 0].sum() + np.cumsum([0.0, *np.diff(table)[np.argsort(score), 0]])
        for table in (cost, LOSS)
    )
    return cost, loss


def main() -> None:
    """Write the picture to the file that is named."""
    from matplotlib.figure import Figure

    figure = Figure((9.0, 3.6), layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True),
        (BYTES / 1e6, BIT_OPERATIONS / 1e9),
        ("weights, MB", "bit operations, billions"),
        strict=True,
    )
    for ax, cost, name in panels:
        rules = {"largest layers first": -SIZES, "least loss first": np.diff(LOSS)[:, 0]}
        for (label, score), style in zip(rules.items(), ("x:", "+:"), strict=True):
            ax.plot(*ranked(cost, score), style, color="#8c8c8c", label=label, linewidth=0.8)
        for ties, label, color in ((), "front", "#2f6db3"), (TIES, "front with ties", "#c77f1b"):
            total, loss, _ = allocation.front(LOSS, cost, ties=ties)
            ax.plot(total, loss, drawstyle="steps-post", color=color, label=label)
        most, least = cost.sum(0)
        for share in (0.25, 0.5, 0.75):
            budget = least + share * (most - least)
            _, info = allocation.allocate_bits(LOSS, cost, budget, ties=TIES)
            label = "optimum at ¼, ½, ¾" if share == 0.5 else None
            ax.plot(float(info.cost), info.loss, "o", color="#c77f1b", label=label)
        ax.plot([most, least], LOSS.sum(0), "ks", label="all 8, all 4 bits")
        ax.set(xlabel=name, yscale="log")
    figure.axes[0].set_ylabel("predicted loss")
    figure.axes[1].legend()
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
