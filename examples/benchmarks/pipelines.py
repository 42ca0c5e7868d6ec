"""Light and advanced: what a model loses at which size.

    python examples/benchmarks/pipelines.py light advanced --json docs/results/pipelines.json
    python examples/benchmarks/pipelines.py additivity repairs --json docs/results/pipelines.json

On the demo's Fashion-MNIST ResNet, 256 calibration images (the first draw). Sizes are those of
files with codes of fixed length over that of the float32 model; accuracy and divergence from the
float model (nats) are on the 10 000 test images.

* `light`, `advanced`: the pipeline at budgets from 0.08 to 0.25, and the same with one width for
  all layers: no program, but fits and repairs alike. `8/8 and 4/4` are the paper's choices.
* `additivity`: 50 random allocations: the sum of the layers' losses against the loss measured, and
  their rank correlation; a picture for the page.
* `repairs`: ACIQ at three pairs of widths, repaired by each function alone and by two in turn.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from aciq import draw, run_parts, share
from scipy.stats import spearmanr

import lnq
from lnq import demo, distortion, pipelines, tuning
from lnq.demo.data import read_fashion_mnist
from lnq.demo.resnet import ResNet
from lnq.pipelines import Scored

Row = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"
BUDGETS = (0.08, 0.09, 0.1, 0.11, 0.13, 0.16, 0.2, 0.25)
UNIFORM = (2, 3, 4, 6, 8)


def judge(args: argparse.Namespace, apply_fn: Any, variables: Any) -> Callable[[Any], Row]:
    images, labels = read_fashion_mnist(args.data, "t10k")
    run = jax.jit(lnq.quantized(apply_fn))

    def logits(params: Any) -> np.ndarray:
        return np.concatenate([run(params, images[i : i + 500]) for i in range(0, 10_000, 500)])

    reference = logits(variables)

    def of(qtree: Any) -> Row:
        out = logits(qtree)
        kl = float(distortion.kl(jax.numpy.asarray(reference), jax.numpy.asarray(out)))
        return share(out.argmax(-1) == labels, "accuracy") | {"kl": kl}

    return of


def network() -> tuple[Any, Any, np.ndarray]:
    loaded = demo.load()
    return loaded.apply_fn, loaded.variables, loaded.calib[draw(len(loaded.calib), 256)[0]]


def outcome(qtree: Any, info: pipelines.PipelineInfo, of: Callable[[Any], Row]) -> Row:
    return {
        "fraction": info.fraction,
        "paper_fraction": info.paper_fraction,
        "widths": "".join(str(weights) for weights, _ in info.widths.values()),
        "steps": [(s.name, s.before, s.after, s.kept) for s in info.steps],
        **of(qtree),
    }


def curve(method: Callable[..., Any], args: argparse.Namespace) -> Iterator[Row]:
    """A pipeline at all budgets, then with one width for all layers, then with the paper's two."""
    apply_fn, variables, calib = network()
    of = judge(args, apply_fn, variables)
    yield {"name": "float", **of(variables)}
    scored, one = None, f"{method.__name__}, one width"
    for budget in BUDGETS:
        begun = time.perf_counter()
        qtree, info = method(apply_fn, variables, calib, budget=budget, scored=scored)
        scored, seconds = info.scored, time.perf_counter() - begun
        cost = {"name": method.__name__, "budget": budget, "seconds": seconds}
        yield cost | outcome(qtree, info, of)
    for bits in UNIFORM:
        qtree, info = method(apply_fn, variables, calib, budget=1.0, choices=((bits, 8),))
        yield {"name": one} | outcome(qtree, info, of)
    options: Any = {"budget": 0.14, "choices": pipelines.PUBLISHED}
    qtree, info = method(apply_fn, variables, calib, **options)
    yield {"name": f"{method.__name__}, 8/8 and 4/4"} | outcome(qtree, info, of)


def additivity(args: argparse.Namespace) -> Iterator[Row]:
    from matplotlib.figure import Figure

    apply_fn, variables, calib = network()
    options: Any = {"second_order": False, "steps": 0, "weights": "fixed"}
    scored = pipelines.score(apply_fn, variables, calib, **options)
    predicted, measured = np.array(list(random_losses(scored, 50))).T
    yield {
        "rank_correlation": float(np.asarray(spearmanr(predicted, measured))[0]),
        "median_ratio": float(np.median(measured / predicted)),
        "predicted": predicted.tolist(),
        "measured": measured.tolist(),
    }
    figure = Figure((4.0, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.loglog(predicted, measured, "o", markersize=4, color="#444")
    ends = [min(predicted.min(), measured.min()), max(predicted.max(), measured.max())]
    axes.loglog(ends, ends, color="#bbb", linewidth=1)
    axes.set(xlabel="sum of the layers' losses", ylabel="loss of the model")
    figure.savefig(DOCS / "additivity.svg")


def random_losses(scored: Scored, count: int) -> Iterator[tuple[float, float]]:
    """Predicted and measured loss of allocations drawn at random, from fine to coarse."""
    rng, scores = np.random.default_rng(0), scored.scores
    sites, choices = scores.loss.shape
    for number in range(count):
        share_of_coarse = (number + 1) / count
        coarse = rng.random(sites) < share_of_coarse
        choice = np.where(coarse, rng.integers(1, choices, sites), 0)
        loss = scored.loss(pipelines.tree_of(scored, choice))
        yield scores.base + scores.loss[np.arange(sites), choice].sum(), loss


def repairs(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib = network()
    of, key = judge(args, apply_fn, variables), jax.random.key(0)

    def train_fn(params: Any, batch: Any) -> Any:
        return ResNet().apply(params, batch, train=True, mutable=["batch_stats"])[1]

    steps: dict[str, Callable[[Any], Any]] = {
        "reestimate": lambda q: tuning.reestimate(train_fn, q, calib)[0],
        "reconstruct": lambda q: tuning.reconstruct(apply_fn, variables, q, calib)[0],
        "tune_biases": lambda q: tuning.tune_biases(apply_fn, variables, q, calib, key=key)[0],
    }
    alone = [(), *((name,) for name in steps)]
    together = [("reestimate", "tune_biases"), ("reconstruct", "tune_biases")]
    for bits in (4, 3, 2):
        start, _ = lnq.aciq.quantize(
            apply_fn, variables, calib, weight_bits=bits, act_bits=max(bits, 3)
        )
        for names in (*alone, *together):
            qtree = start
            for name in names:
                qtree = steps[name](qtree)
            widths = f"W{bits}A{max(bits, 3)}"
            yield {"widths": widths, "name": ", ".join(names) or "none", **of(qtree)}


PARTS = {
    "light": partial(curve, pipelines.light),
    "advanced": partial(curve, pipelines.advanced),
    "additivity": additivity,
    "repairs": repairs,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
