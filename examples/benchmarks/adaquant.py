"""AdaQuant: what second order, fitting and reading the quantized layers gain, and what each costs.

    python examples/benchmarks/adaquant.py resnet encoder --json docs/results/adaquant.json

Other parts: draws, calibration, minilm, efficientnet, grouping.

WxAy are the widths of weights and data; first and last site have 8 bits; batch-norm is folded.
`nearest` rounds to nearest on the grids of least squared error; `second order alone` takes no
turns. KL (nats) is that of the logits from the float model's.

* `resnet`: the demo's Fashion-MNIST ResNet at four pairs of widths. KL on the 256 calibration
  images and on the 10 000 test images, mean over three draws (one for LAPQ); accuracy on the test
  images, first draw; seconds, mean over the draws, where the first one compiles. Processor seconds
  add up those of all cores: a busy machine changes them less.
* `draws`: the same with data in 8 bits, six methods, three draws of each.
* `calibration`: the same at W3A8, three methods, with 8 to 1024 calibration images; of these 1024
  half are images that the model was trained on.
* `minilm`: all-MiniLM-L6-v2 at W4A8, 512 sentences: 1 - cosine of the embeddings of 128 others,
  WordSim353, seconds in all, and how many fits were compiled. Parallel: 1000 turns of 512 rows.
* `encoder`: the same model at four pairs of widths, seven methods, 128 sentences, 200 turns of 256
  rows; LAPQ's loss is 1 - cosine.
* `efficientnet`: EfficientNet-Lite0 at four pairs of widths, seven methods, 100 turns, 128
  calibration crops of 96 x 96: agreement with the float model's top-1 and KL, on 128 crops of
  other photographs.
* `grouping`: MiniLM's 24 square matrices, 100 turns of 512 rows each: seconds of one call for all
  and of a call for each, cold and once more.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from aciq import draw, example, real_tokens, run_parts, share

import lnq
from lnq import aciq, adaquant, demo, distortion, lapq, tuning
from lnq.demo.data import read_fashion_mnist
from lnq.demo.resnet import ResNet
from lnq.widths import site_widths

Row = dict[str, Any]
Widths = tuple[int, int]

METHODS: dict[str, Callable[..., Any]] = {
    "nearest": partial(adaquant.quantize, second_order=False, steps=0, sequential=False),
    "ACIQ": aciq.quantize,
    "LAPQ": partial(lapq.quantize, rough=2, sweeps=0),
    "published": partial(adaquant.quantize, **adaquant.published(), sequential=False),
    "parallel": partial(adaquant.quantize, sequential=False),
    "sequential without second order": partial(adaquant.quantize, second_order=False),
    "second order alone": partial(adaquant.quantize, steps=0),
    "second order, damping 1": partial(adaquant.quantize, steps=0, damping=1.0),
    "sequential": adaquant.quantize,
    "constrained": partial(adaquant.quantize, weights="constrained"),
}
SIX = "nearest", "ACIQ", "second order alone", "parallel", "sequential", "constrained"
TURNS = "parallel", "sequential", "constrained"
LONG = {"steps": 1000, "batch": 512}


class Task(NamedTuple):
    """A classifier and what to judge it by.

    Attributes:
      apply_fn: ``apply_fn(params, images) -> logits``.
      params: Batch-norm folded.
      calib: Calibration images.
      draws: Which of them to use, one array of indices for each draw.
      images: Images to judge by.
      labels: Their classes; None takes those that the float model finds.
      batch: Images per call.
    """

    apply_fn: Callable[..., Any]
    params: Any
    calib: np.ndarray
    draws: list[np.ndarray]
    images: np.ndarray
    labels: np.ndarray | None
    batch: int


def compare(
    task: Task, widths: Iterable[Widths], methods: Iterable[str], turns: int = 500
) -> Iterator[Row]:
    """The float model's row, then one for each method and pair of widths."""
    run = jax.jit(lnq.quantized(task.apply_fn))

    def logits(params: Any, images: np.ndarray) -> jax.Array:
        starts = range(0, len(images), task.batch)
        return jnp.concatenate([run(params, images[i : i + task.batch]) for i in starts])

    reference = logits(task.params, task.images)
    labels = np.asarray(reference.argmax(-1)) if task.labels is None else task.labels

    def judge(out: jax.Array) -> Row:
        name = "agreement" if task.labels is None else "accuracy"
        return share(np.asarray(out.argmax(-1)) == labels, name)

    def measure(name: str, pair: Widths, images: np.ndarray) -> Row:
        options = {"steps": turns} if name in TURNS else {}
        qtree, cost = quantize(name, pair, task.apply_fn, task.params, images, **options)
        seen, out = logits(task.params, images), logits(qtree, task.images)
        return {
            "calibration_kl": float(distortion.kl(seen, logits(qtree, images))),
            "kl": float(distortion.kl(reference, out)),
            **cost,
            **judge(out),
        }

    yield {"name": "float", **judge(reference)}
    for name, pair in product(methods, widths):
        draws = task.draws[:1] if name == "LAPQ" else task.draws
        rows = [measure(name, pair, task.calib[chosen]) for chosen in draws]
        yield {"widths": "W{}A{}".format(*pair), "name": name, **mean(rows)}


def mean(rows: list[Row]) -> Row:
    """Mean numbers of the draws, but for how many predictions are right: those of the first."""
    names = "calibration_kl", "kl", "seconds", "processor_seconds"
    seeds = {k: [row[k] for row in rows] for k in names}
    means = {k: float(np.mean(v)) for k, v in seeds.items()}
    return rows[0] | means | {f"{k}_seeds": v for k, v in seeds.items()}


def quantize(name: str, widths: Widths, *args: Any, **options: Any) -> tuple[Any, Row]:
    """A tree by one of the methods, and what that cost."""
    begun = time.perf_counter(), time.process_time()
    qtree, _ = METHODS[name](*args, weight_bits=widths[0], act_bits=widths[1], **options)
    jax.block_until_ready(qtree)
    ended = time.perf_counter(), time.process_time()
    wall, processor = np.subtract(ended, begun).tolist()
    return qtree, {"seconds": wall, "processor_seconds": processor}


def network(args: argparse.Namespace, count: int) -> Task:
    """The ResNet, with three draws of so many calibration images."""
    loaded, apply_fn = demo.load(), ResNet().apply
    params, _ = tuning.fold(apply_fn, loaded.variables, loaded.calib[:1])
    calib, _ = read_fashion_mnist(args.data, "train")
    calib = calib[: max(count, len(loaded.calib))]  # the first 512 are the demo's
    images, labels = read_fashion_mnist(args.data, "t10k")
    return Task(apply_fn, params, calib, draw(len(calib), count), images, labels, 500)


def resnet(args: argparse.Namespace) -> Iterator[Row]:
    yield from compare(network(args, 256), ((4, 4), (4, 8), (3, 8), (2, 8)), METHODS)


def draws(args: argparse.Namespace) -> Iterator[Row]:
    yield from compare(network(args, 256), ((2, 8), (3, 8), (4, 8)), SIX)


def sizes(args: argparse.Namespace) -> Iterator[Row]:
    for count in (8, 32, 128, 512, 1024):
        rows = compare(network(args, count), [(3, 8)], ("nearest", "sequential", "constrained"))
        next(rows)
        for row in rows:
            yield {"images": count, **row}


def efficientnet(args: argparse.Namespace) -> Iterator[Row]:
    net = example("efficientnet")
    apply_fn, variables = net.load()
    calib, evaluation = net.crops(96, 128, 128)
    params, _ = tuning.fold(apply_fn, variables, calib[:1])
    task = Task(apply_fn, params, calib, [np.arange(128)], evaluation, None, 32)
    methods = *SIX, "second order, damping 1"
    yield from compare(task, ((4, 8), (4, 4), (3, 8), (2, 8)), methods, turns=100)


def embeddings(count: int) -> tuple[Any, Any, Any, Callable[[Any], Row]]:
    """MiniLM, so many sentences to calibrate with, and how to judge a tree on 128 others."""
    model = example("minilm")
    apply_fn, params = model.load()
    texts = model.sentences()
    calib, others = model.tokenize(texts[:count]), model.tokenize(texts[512:640])
    reference, run = jax.jit(apply_fn)(params, others), jax.jit(lnq.quantized(apply_fn))

    def judge(qtree: Any) -> Row:
        deviation = float(1 - (reference * run(qtree, others)).sum(-1).mean())
        return {"deviation": deviation, "wordsim353": model.wordsim353(run, qtree)}

    return apply_fn, params, calib, judge


def minilm(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, params, calib, judge = embeddings(512)
    yield {"name": "float", **judge(params)}
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    methods: Row = {"nearest": {}, "ACIQ": {}, "parallel": LONG}
    for name, options in methods.items():
        compiled.clear()
        qtree, cost = quantize(name, (4, 8), apply_fn, params, calib, mask=real_tokens, **options)
        fits = sum("_fit" in function for function in compiled)
        yield {"widths": "W4A8", "name": name, **judge(qtree), **cost, "compiled_fits": fits}


def encoder(args: argparse.Namespace) -> Iterator[Row]:
    apply_fn, params, calib, judge = embeddings(128)
    yield {"name": "float", **judge(params)}
    given: dict[str, Row] = {name: {"mask": real_tokens} for name in SIX}
    for name in TURNS:
        given[name] |= {"steps": 200}
    given["LAPQ"] = {"distance": distortion.cosine_distance, "batch_size": 32}
    for (name, options), pair in product(given.items(), ((4, 8), (2, 8), (3, 8), (4, 4))):
        qtree, cost = quantize(name, pair, apply_fn, params, calib, **options)
        yield {"widths": "W{}A{}".format(*pair), "name": name, **judge(qtree), **cost}


def grouping(args: argparse.Namespace) -> Iterator[Row]:
    model = example("minilm")
    apply_fn, params = model.load()
    calib = model.tokenize(model.sentences()[:512])
    for together in (1, 4):
        options: Any = {"steps": 100, "batch": 512, "together": together}
        made = adaquant.problem(apply_fn, params, calib, mask=real_tokens, **options)
        names = [name for name, site in made.layers.items() if site.shape == (384, 384)]
        rows = jax.block_until_ready(made.sample(tuple(names), made.floats))
        calls = {"one call": [names], "a call for each": [[name] for name in names]}
        for name, groups in calls.items():
            cold, again = (fitting(made, rows, groups) for _ in range(2))
            yield {"together": together, "name": name, "cold_seconds": cold, "seconds": again}


def fitting(made: adaquant.Problem, rows: dict[str, jax.Array], groups: list[list[str]]) -> float:
    """Seconds of a call for each group of layers."""
    widths = site_widths(made.sites.sites, 4, 8, 8, None)
    begun = time.perf_counter()
    for names in groups:
        given = {name: rows[name] for name in names}
        jax.block_until_ready(list(adaquant.fit(made, widths, given, given)))
    return time.perf_counter() - begun


PARTS = {
    "resnet": resnet,
    "draws": draws,
    "calibration": sizes,
    "minilm": minilm,
    "encoder": encoder,
    "efficientnet": efficientnet,
    "grouping": grouping,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
