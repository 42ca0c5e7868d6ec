"""LAPQ: what a joint search of the clips gains, what it costs, and the landscape it walks in.

    python examples/benchmarks/lapq.py resnet ablation scipy modes --json docs/results/lapq.json
    python examples/benchmarks/lapq.py landscape efficientnet --json docs/results/lapq.json

The loss is the divergence (nats) of the logits from those of the float model: no labels. First and
last site have 8 bits, one clip per tensor, integer grid, means corrected, batch-norm folded, unless
said otherwise. WxAy are the widths of weights and data, 32 is float.

* `resnet`: the demo's Fashion-MNIST ResNet at five pairs of widths: no clipping, ACIQ (which has
  a grid for each channel of the weights), p = 2, the best of the starts (p*), and from there
  coordinate descent and the joint search. Losses on the held-out fifth of 256 calibration images
  and on those searched on, mean of three draws; accuracy on the 10 000 test images, first draw.
* `ablation`: W3A3 with either grid, means corrected or not, and the authors' setting.
* `scipy`: the same loss from the same start by `scipy.optimize.minimize(method="Powell")`, as it
  comes, 512 images, stopped after four iterations.
* `modes`: W2A4 with and without a rough phase, with reused prefixes, and what a gradient costs.
* `landscape`: at 8, 4, 3, 2 bits the Hessian in relative steps and the share of the variance that
  no sum of functions of one clip explains; pictures for the page.
* `efficientnet`: EfficientNet-Lite0, W4A4, 32 crops of 96 x 96 and 128 others: the same rows, with
  rough sweeps only, and SciPy capped at 400 evaluations.
* `channels`: the same at five pairs of widths, every channel of the weights with a step of its own.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aciq import draw, example, run_parts, share
from scipy.optimize import minimize

import lnq
from lnq import aciq, demo, distortion, landscape, lapq, tuning
from lnq.demo.data import read_fashion_mnist
from lnq.demo.resnet import ResNet

Row = dict[str, Any]
DEBIAN = "/usr/share/datasets/fashion-mnist"
WIDTHS = ((4, 32), (32, 4), (4, 4), (3, 3), (2, 4))
DOCS = Path(__file__).parents[2] / "docs"


def bits(weights: int, acts: int) -> Row:
    return {
        "weight_bits": None if weights == 32 else weights,
        "act_bits": None if acts == 32 else acts,
    }


def logits(apply: Callable[..., jax.Array], variables: Any, images: np.ndarray) -> jax.Array:
    return jnp.concatenate(
        [apply(variables, images[i : i + 500]) for i in range(0, len(images), 500)]
    )


def thetas(made: lapq.Problem, state: lapq.LAPQState, rough: int, sweeps: int) -> dict[str, Any]:
    """The points to compare, each with what it cost to get there from p*."""
    start = jax.jit(made.start)
    found = {
        "no clipping": (made.widest, 0.0),
        "p = 2": (start(jnp.float32(2.0), made.data), 0.0),
        "p*": (state.start, 0.0),
    }
    for name, joint in (("coordinate descent", False), ("joint search", True)):
        *_, last = lapq.improve(made, state, rough, sweeps, joint=joint)
        found[name] = (last.best, float(last.cost - state.cost))
    return found


def compare(
    apply_fn: Callable[..., Any],
    variables: Any,
    calib: np.ndarray,
    widths: tuple[int, int],
    judge: Callable[[Any], Row],
    rough: int = 2,
    sweeps: int = 2,
    batch_size: int = 128,
    per_channel: bool = False,
) -> Iterator[Row]:
    """One row per method for one calibration set."""
    settings: Any = {"batch_size": batch_size, "per_channel": per_channel}
    made = lapq.problem(apply_fn, variables, calib, **settings, **bits(*widths))
    state, loss = lapq.begin(made), jax.jit(made.loss)
    for name, (theta, cost) in thetas(made, state, rough, sweeps).items():
        yield {
            "name": name,
            "loss": float(loss(theta, made.data)),
            "held_out": float(loss(theta, made.held_out)),
            "cost": cost,
            "p": float(state.ps[-1]),
            **judge(made.tree(jnp.asarray(theta))),
        }
    options: Row = bits(*widths) | {"weight_bits": min(widths[0], 16)}
    qtree, _ = aciq.quantize(apply_fn, variables, calib, **options)
    run = jax.jit(lnq.quantized(apply_fn))
    yield {"name": "ACIQ", **aciq_losses(run, qtree, made), "cost": 0.0, **judge(qtree)}


def aciq_losses(run: Callable[..., Any], qtree: Any, made: lapq.Problem) -> Row:
    """Losses of a tree on the two parts of the calibration set."""

    def of(data: lapq.Data) -> float:
        (batches,), (references,) = data.batches, data.references
        losses = [distortion.kl(r, run(qtree, b)) for r, b in zip(references, batches, strict=True)]
        return float(np.mean(losses))

    return {"loss": of(made.data), "held_out": of(made.held_out)}


def mean_rows(draws: list[list[Row]]) -> Iterator[Row]:
    """Mean losses over the draws; everything else from the first."""
    for rows in zip(*draws, strict=True):
        seeds = {k: [row[k] for row in rows] for k in ("loss", "held_out", "cost")}
        means = {k: float(np.mean(v)) for k, v in seeds.items()}
        yield rows[0] | means | {f"{k}_seeds": v for k, v in seeds.items()}


def network() -> tuple[Callable[..., Any], Any, np.ndarray]:
    loaded = demo.load()
    folded, _ = tuning.fold(ResNet().apply, loaded.variables, loaded.calib[:1])
    return ResNet().apply, folded, loaded.calib


def accuracy(args: argparse.Namespace, apply_fn: Callable[..., Any]) -> Callable[[Any], Row]:
    images, labels = read_fashion_mnist(args.data, "t10k")
    run = jax.jit(lnq.quantized(apply_fn))

    def judge(qtree: Any) -> Row:
        return share(np.asarray(logits(run, qtree, images)).argmax(-1) == labels, "accuracy")

    return judge


def resnet(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib = network()
    judge = accuracy(args, apply_fn)
    yield {"name": "float", **judge(variables)}
    for widths in WIDTHS:
        draws = [
            list(compare(apply_fn, variables, calib[chosen], widths, judge if i == 0 else no_judge))
            for i, chosen in enumerate(draw(len(calib), 256))
        ]
        for row in mean_rows(draws):
            yield {"widths": "W{}A{}".format(*widths), **row}


def no_judge(qtree: Any) -> Row:
    return {}


def ablation(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib = network()
    unfolded = demo.load().variables
    judge = accuracy(args, apply_fn)
    chosen = calib[draw(len(calib), 256)[0]]
    settings: dict[str, tuple[Any, Row]] = {
        f"{grid} grid, {'means corrected' if correct == 'mean' else 'not corrected'}": (
            variables,
            {"grid": grid, "correct": correct},
        )
        for grid in ("integer", "even")
        for correct in ("none", "mean")
    }
    settings["even grid, means corrected, not folded"] = (unfolded, {"grid": "even"})
    found = lnq.find_sites(apply_fn, unfolded, chosen[:1])
    published = lapq.published(found, weight_bits=3, act_bits=3)
    settings["published: even grid, ends float, not folded"] = (unfolded, published)
    for name, (params, options) in settings.items():
        made = lapq.problem(apply_fn, params, chosen, **(bits(3, 3) | options))
        state, loss = lapq.begin(made), jax.jit(made.loss)
        *_, last = lapq.improve(made, state)
        for search, theta in (("p*", state.start), ("joint search", last.best)):
            yield {
                "widths": "W3A3",
                "setting": name,
                "name": search,
                "loss": float(loss(theta, made.data)),
                "held_out": float(loss(theta, made.held_out)),
                **judge(made.tree(jnp.asarray(theta))),
            }


def race(made: lapq.Problem, rough: int, sweeps: int, **limits: int) -> Iterator[Row]:
    """SciPy and then ours on one loss from one start; traces of (evaluations, seconds, loss)."""
    state, loss = lapq.begin(made), jax.jit(made.loss)
    at_start = float(loss(state.start, made.data))
    trace, begun = [(0.0, 0.0, at_start)], time.perf_counter()

    def measured(theta: np.ndarray) -> float:
        found = float(loss(jnp.asarray(theta, jnp.float32), made.data))
        found = found if np.isfinite(found) else 1e9
        seconds = time.perf_counter() - begun
        trace.append((float(len(trace)), seconds, min(found, trace[-1][2])))
        return found

    minimize(measured, state.start, method="Powell", options=limits)
    yield {"name": "SciPy", **summary(trace)}

    mine, begun = [(0.0, 0.0, at_start)], time.perf_counter()
    for last in lapq.improve(made, state, rough, sweeps):
        seconds = time.perf_counter() - begun
        mine.append((float(last.cost - state.cost), seconds, float(last.trace[-1, 1])))
    reached = next((row for row in mine[1:] if row[2] <= trace[-1][2]), None)
    yield {
        "name": "lnq",
        **summary(mine),
        "cost_ratio": reached and trace[-1][0] / reached[0],
        "seconds_ratio": reached and trace[-1][1] / reached[1],
    }


def summary(trace: list[tuple[float, float, float]]) -> Row:
    places = np.unique(np.geomspace(1, len(trace), 60).astype(int) - 1)
    evaluations, seconds, loss = trace[-1]
    return {
        "evaluations": evaluations,
        "seconds": seconds,
        "start": trace[0][2],
        "loss": loss,
        "trace": [trace[i] for i in places],
    }


def scipy(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib = network()
    for weights, acts in ((4, 4), (2, 4)):
        made = lapq.problem(apply_fn, variables, calib, **bits(weights, acts))
        for row in race(made, 2, 6, maxiter=4):
            yield {"widths": f"W{weights}A{acts}", **row}


def modes(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib = network()
    made = lapq.problem(apply_fn, variables, calib, **bits(2, 4))
    state = lapq.begin(made)
    for name, rough, sweeps, reuse in (
        ("all batches only", 0, 4, False),
        ("a quarter of them first", 2, 2, False),
        ("the same, prefixes reused", 2, 2, True),
    ):
        begun = time.perf_counter()
        *_, last = lapq.improve(made, state, rough, sweeps, reuse_prefixes=reuse)
        yield {
            "name": name,
            "cost": float(last.cost - state.cost),
            "seconds": time.perf_counter() - begun,
            "loss": float(last.trace[-1, 1]),
            "held_out": float(last.trace[-1, 2]),
            "trace": (last.trace[1:, :2] - [float(state.cost), 0.0]).tolist(),
        }
    plain, both = jax.jit(made.loss), jax.jit(jax.value_and_grad(made.loss))
    yield {
        "name": "gradient",
        "over_loss": seconds(both, state.start, made.data) / seconds(plain, state.start, made.data),
    }


def seconds(f: Callable[..., Any], *args: Any) -> float:
    """Of the second of two calls."""
    jax.block_until_ready(f(*args))
    begun = time.perf_counter()
    jax.block_until_ready(f(*args))
    return time.perf_counter() - begun


def photographs() -> tuple[Callable[..., Any], Any, np.ndarray, Callable[[Any], Row]]:
    """EfficientNet-Lite0, calibration crops, and what a tree does to crops of other pictures."""
    net = example("efficientnet")
    apply_fn, variables = net.load()
    calib, evaluation = net.crops(96, 32, 128)
    variables, _ = tuning.fold(apply_fn, variables, calib[:1])
    run = jax.jit(lnq.quantized(apply_fn))

    def outputs(params: Any) -> jax.Array:
        return jnp.concatenate([run(params, evaluation[i : i + 32]) for i in range(0, 128, 32)])

    reference = outputs(variables)

    def judge(qtree: Any) -> Row:
        out = outputs(qtree)
        same = np.asarray(out.argmax(-1) == reference.argmax(-1))
        return share(same, "agreement") | {"evaluation_kl": float(distortion.kl(reference, out))}

    return apply_fn, variables, calib, judge


def efficientnet(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib, judge = photographs()
    for row in compare(apply_fn, variables, calib, (4, 4), judge, 2, 0, batch_size=32):
        yield {"widths": "W4A4", **row}
    made = lapq.problem(apply_fn, variables, calib, batch_size=32)
    for row in race(made, 2, 0, maxiter=1, maxfev=400):
        yield {"widths": "W4A4", **row}


def channels(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, variables, calib, judge = photographs()
    for widths in WIDTHS:
        for row in compare(apply_fn, variables, calib, widths, judge, 2, 0, 32, per_channel=True):
            yield {"widths": "W{}A{}".format(*widths), **row}


def landscapes(args: argparse.Namespace) -> Iterator[Row]:
    from matplotlib.figure import Figure

    apply_fn, variables, calib = network()
    figure = Figure((9.0, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for width in (8, 4, 3, 2):
        made = lapq.problem(apply_fn, variables, calib[:128], edge_bits=None, **bits(width, width))
        state, loss = lapq.begin(made), made.loss
        *_, last = lapq.improve(made, state, 0, 2)
        point = jnp.asarray(last.best)
        hessian, gradient = landscape.hessian(loss, point, made.data, width=0.1)
        coupling = landscape.coupling(hessian)
        box = landscape.separability(
            loss, point - 0.2, point + 0.2, jax.random.key(0), made.data, points=60
        )
        curvature = landscape.gaussian_curvature(hessian, gradient)
        yield {
            "bits": width,
            "loss": float(last.trace[-1, 1]),
            "trace_of_hessian": float(coupling.trace),
            "largest_coupling": float(coupling.largest),
            "off_diagonal": float(coupling.off_diagonal),
            "log_curvature": float(curvature.log),
            "curvature_sign": float(curvature.sign),
            "interaction": box.interaction,
            "interaction_error": box.error,
            "interaction_share": box.share,
        }
        if width in (4, 2):
            i, j = (made.names.index(f"weights of params/block2/conv{k}/kernel") for k in (1, 2))
            found = landscape.surface(loss, point, i, j, made.data, span=0.7, points=13)
            ax = landscape.draw_surface(axes[0 if width == 4 else 1], *found)
            ax.set(title=f"{width} bits", xlabel="log clip, block2/conv1")
            ax.set_ylabel("log clip, block2/conv2")
        if width == 3:
            landscape.draw_p(axes[2], state.ps[1:-1], state.losses[1:-1], best=float(state.ps[-1]))
            axes[2].set(title="3 bits: loss by exponent")
    figure.savefig(DOCS / "landscape.svg")


PARTS = {
    "resnet": resnet,
    "ablation": ablation,
    "scipy": scipy,
    "modes": modes,
    "landscape": landscapes,
    "efficientnet": efficientnet,
    "channels": channels,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
