"""Light and advanced: what a model loses at which size.

    python examples/benchmarks/pipelines.py light advanced --json docs/results/pipelines.json
    python examples/benchmarks/pipelines.py additivity repairs --json docs/results/pipelines.json
    python examples/benchmarks/pipelines.py light_efficientnet advanced_efficientnet

On the demo's Fashion-MNIST ResNet, 256 calibration images (the first draw). Sizes are those of
files with codes of fixed length over that of the float32 model; accuracy and divergence from the
float model (nats) are on the 10 000 test images.

* `light`, `advanced`: the pipeline at budgets from 0.08 to 0.25, and the same with one width for
  all layers: no program, but fits and repairs alike. `8/8 and 4/4` are the paper's choices.
* `light_efficientnet`, `advanced_efficientnet`: the same for EfficientNet-Lite0 at four budgets,
  64 calibration crops of 96 x 96, 128 of other photographs to judge by; no turns of Adam, ten
  swaps.
* `additivity`: 50 random allocations: the sum of the layers' losses against the loss measured, and
  their rank correlation; a picture for the page.
* `repairs`: ACIQ at three pairs of widths, repaired by each function alone and by two in turn.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from aciq import draw, example, run_parts, share
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


class Model(NamedTuple):
    """A model, what to calibrate it with, how to judge a tree, and what a curve shows of it.

    Attributes:
      apply_fn: ``apply_fn(variables, images) -> logits``.
      variables: Float.
      calib: Calibration images.
      judge: Accuracy, or agreement with the float model, and divergence from it.
      budgets: Fractions of the float32 size.
      uniform: Widths to give to all layers.
      two: Budget of the paper's two choices; None leaves them out.
      advanced: Options of the advanced pipeline.
    """

    apply_fn: Callable[..., Any]
    variables: Any
    calib: np.ndarray
    judge: Callable[[Any], Row]
    budgets: Sequence[float]
    uniform: Sequence[int]
    two: float | None
    advanced: Row


def judge(
    apply_fn: Any, variables: Any, images: np.ndarray, labels: np.ndarray | None, batch: int
) -> Callable[[Any], Row]:
    """Without labels those that the float model finds."""
    run = jax.jit(lnq.quantized(apply_fn))

    def logits(params: Any) -> np.ndarray:
        starts = range(0, len(images), batch)
        return np.concatenate([run(params, images[i : i + batch]) for i in starts])

    reference = logits(variables)
    name = "agreement" if labels is None else "accuracy"
    right = reference.argmax(-1) if labels is None else labels

    def of(qtree: Any) -> Row:
        out = logits(qtree)
        kl = float(distortion.kl(jax.numpy.asarray(reference), jax.numpy.asarray(out)))
        return share(out.argmax(-1) == right, name) | {"kl": kl}

    return of


def resnet(args: argparse.Namespace) -> Model:
    loaded = demo.load()
    calib = loaded.calib[draw(len(loaded.calib), 256)[0]]
    of = judge(loaded.apply_fn, loaded.variables, *read_fashion_mnist(args.data, "t10k"), 500)
    return Model(loaded.apply_fn, loaded.variables, calib, of, BUDGETS, UNIFORM, 0.14, {})


def efficientnet(args: argparse.Namespace) -> Model:
    net = example("efficientnet")
    apply_fn, variables = net.load()
    calib, images = net.crops(96, 64, 128)
    of = judge(apply_fn, variables, images, None, 32)
    options = {"steps": 0, "swaps": 10}
    return Model(apply_fn, variables, calib, of, (0.1, 0.13, 0.16, 0.2), (4,), None, options)


def outcome(qtree: Any, info: pipelines.PipelineInfo, of: Callable[[Any], Row]) -> Row:
    return {
        "fraction": info.fraction,
        "paper_fraction": info.paper_fraction,
        "widths": "".join(str(weights) for weights, _ in info.widths.values()),
        "steps": [(s.name, s.before, s.after, s.kept) for s in info.steps],
        **of(qtree),
    }


def curve(
    load: Callable[[argparse.Namespace], Model],
    method: Callable[..., Any],
    args: argparse.Namespace,
) -> Iterator[Row]:
    """A pipeline at all budgets, then with one width for all layers, then with the paper's two."""
    model, name = load(args), method.__name__
    options = model.advanced if method is pipelines.advanced else {}
    run = partial(method, model.apply_fn, model.variables, model.calib, **options)
    yield {"name": "float", **model.judge(model.variables)}
    scored = None
    for budget in model.budgets:
        begun = time.perf_counter()
        qtree, info = run(budget=budget, scored=scored)
        scored, seconds = info.scored, time.perf_counter() - begun
        cost = {"name": name, "budget": budget, "seconds": seconds}
        yield cost | outcome(qtree, info, model.judge)
    for bits in model.uniform:
        qtree, info = run(budget=1.0, choices=((bits, 8),))
        yield {"name": f"{name}, one width"} | outcome(qtree, info, model.judge)
    if model.two:
        qtree, info = run(budget=model.two, choices=pipelines.PUBLISHED)
        yield {"name": f"{name}, 8/8 and 4/4"} | outcome(qtree, info, model.judge)


def additivity(args: argparse.Namespace) -> Iterator[Row]:
    from matplotlib.figure import Figure

    model = resnet(args)
    options: Any = {"second_order": False, "steps": 0, "weights": "fixed"}
    scored = pipelines.score(model.apply_fn, model.variables, model.calib, **options)
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
    apply_fn, variables, calib, of, *_ = resnet(args)
    key = jax.random.key(0)

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
    "light": partial(curve, resnet, pipelines.light),
    "advanced": partial(curve, resnet, pipelines.advanced),
    "light_efficientnet": partial(curve, efficientnet, pipelines.light),
    "advanced_efficientnet": partial(curve, efficientnet, pipelines.advanced),
    "additivity": additivity,
    "repairs": repairs,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
