"""Draw how concentrated attention is: six kernels by temperature, and two distributions.

    python examples/draw_concentration.py docs/concentration.svg

Queries and keys are normal, 512 tokens with heads of 64; medians of 5 draws. About a minute.
"""

import sys

import jax
import numpy as np

from lnq.attention import concentration

KERNELS = {
    "softmax": concentration.softmax,
    "LLN": concentration.lln_matched,
    "exp": concentration.exp,
    "Performer": concentration.performer(jax.random.key(1), 256),
    "elu + 1": concentration.elu,
    "ReLU": concentration.relu,
}


def main() -> None:
    """Write the picture to the file that is named."""
    from matplotlib.figure import Figure

    figure = Figure((11.0, 3.4), layout="constrained")
    *panels, last = figure.subplots(1, 3)
    key, stds = jax.random.key(0), np.geomspace(2.0, 0.5, 9).tolist()
    concentration.draw_sweep(panels, concentration.sweep(KERNELS, stds, key, repeats=5))
    q, k = jax.random.normal(key, (2, 512, 64))
    for name in ("softmax", "LLN"):
        log_p = concentration.log_attention(q, k, KERNELS[name])
        concentration.draw_log_normal(last, log_p, f"{name}, temperature 1")
    panels[0].legend()
    last.legend(fontsize="small")
    figure.savefig(sys.argv[1], metadata={"Date": None})


if __name__ == "__main__":
    main()
