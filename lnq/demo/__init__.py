"""A trained network and data that ship with lnq, and what compression does to them."""

from functools import cache, partial
from importlib.resources import as_file, files
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.table import Table

import lnq
from lnq.types import ApplyFn, Params, Progress

__all__ = ["Demo", "load", "run", "zstd_bytes"]


class Demo(NamedTuple):
    """A residual CNN trained on Fashion-MNIST.

    Attributes:
      apply_fn: ``apply_fn(variables, images) -> logits [b, 10]``, jitted.
      variables: ``params`` and ``batch_stats``, float32.
      calib: 512 training images that it was not trained on, uint8 ``[b, 28, 28]``.
      images: The first 1000 test images.
      labels: Their classes, int32.
    """

    apply_fn: ApplyFn
    variables: Params
    calib: np.ndarray
    images: np.ndarray
    labels: np.ndarray


def load() -> Demo:
    """The network and data from inside the package."""
    from lnq.demo.resnet import ResNet

    with as_file(files("lnq.demo") / "fashion_mnist_resnet.safetensors") as path:
        variables = lnq.checkpoint.read(path)
    with as_file(files("lnq.demo") / "fashion_mnist.npz") as path, np.load(path) as data:
        calib, images, labels = data["calib"], data["test_images"], data["test_labels"]
    return Demo(jax.jit(ResNet().apply), variables, calib, images, labels.astype(np.int32))


def run(target: Path, progress: Progress | None = None, *, full: bool = False) -> Table:
    """Compress, write, read back and measure; one row per method.

    Args:
      target: The ``.lnq`` file of the last row.
      progress: Called as work proceeds.
      full: Whether LAPQ and the pipelines have all examples, and these all their choices; without,
        the two pipelines share one pass of scores.
    """
    demo = load()
    apply_quantized = jax.jit(lnq.quantized(demo.apply_fn))
    reference = demo.apply_fn(demo.variables, demo.images)
    table = Table(title="A ResNet on Fashion-MNIST", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for column in ("bytes", "bits/w", "vs f32", "vs zstd", "deviation", "accuracy %"):
        table.add_column(column, justify="right")
    size = sum(w.nbytes for w in jax.tree.leaves(demo.variables))
    table.add_row("float32", f"{size:,}", "32.00", "", "", "", _accuracy(reference, demo.labels))
    for name, method in _methods(demo, full).items():
        qtree, _ = method(progress=progress)
        lnq.save(target, qtree, progress=progress)
        found = lnq.info(target)
        outputs = apply_quantized(lnq.load(target), demo.images)
        table.add_row(
            name,
            f"{found.bytes:,}",
            f"{found.bits_per_weight:.2f}",
            f"{found.ratio:.1f}x",
            f"{zstd_bytes(qtree) / found.bytes:.2f}x",
            f"{lnq.riq.example_deviation(reference, outputs).mean():.4f}",
            _accuracy(outputs, demo.labels),
        )
    few = "512 images" if full else "128 images"
    table.caption = (
        "bytes: the whole file; vs zstd: the same codes, best of levels 1, 3, 19;\n"
        "W4A4: weights and data in 4 bits, first and last layer in 8; max: no clip;\n"
        f"LAPQ: one scale per tensor, chosen on {few} (others: per channel);\n"
        f"light, advanced: at most 10 % of the size, layers scored on {few};\n"
        "deviation: 1 - cosine of logits on 1000 test images, bound set on others"
    )
    return table


def zstd_bytes(qtree: Params) -> int:
    """The peer: codes, scales, zero points and floats in a safetensors file, compressed by zstd.

    The whole file, the best of levels 1, 3 and 19.
    """
    import zstandard
    from safetensors.numpy import save

    tensors = {}
    for name, leaf in lnq.tree.named_leaves(qtree):
        if isinstance(leaf, lnq.QTensor):
            tensors[f"{name}/scale"] = np.asarray(leaf.qparams.scale)
            tensors[f"{name}/zero_point"] = np.asarray(leaf.qparams.zero_point)
            leaf = leaf.codes
        tensors[name] = np.asarray(leaf)
    raw = save(tensors)
    return min(len(zstandard.compress(raw, level)) for level in (1, 3, 19))


def _methods(demo: Demo, full: bool) -> dict[str, Any]:
    """Function of ``progress`` of each row; RIQ last: the file left behind is one with a bound."""
    everything = demo.apply_fn, demo.variables, demo.calib
    some = demo.apply_fn, demo.variables, demo.calib[:128]
    choices: Any = {"choices": ((8, 8), (4, 8), (2, 8)), "rows": 1024, "steps": 0}
    scored = cache(partial(lnq.pipelines.score, *some, **choices))

    def sized(pipeline: Any, **options: Any) -> Any:
        def run(progress: Progress | None) -> Any:
            small = {} if full else {"scored": scored(), **options}
            return pipeline(*everything, budget=0.1, coded=True, progress=progress, **small)

        return run

    def within(bound: float) -> Any:
        return partial(lnq.riq.compress, *everything, max_deviation=bound, eps0=0.003)

    aciq, lapq = lnq.aciq.quantize, lnq.lapq.quantize
    return {
        "W4A4 max": partial(aciq, *everything, act_clip="max", correct="none"),
        "W4A4 ACIQ": partial(aciq, *everything),
        "W4A4 LAPQ": partial(
            lapq, *(everything if full else some), ps=(2.0, 2.5, 3.0), rough=1, sweeps=0
        ),
        "light": sized(lnq.pipelines.light),
        "advanced": sized(lnq.pipelines.advanced, swaps=0),
        "RIQ < 0.001": within(0.001),
        "RIQ < 0.005": within(0.005),
    }


def _accuracy(logits: jax.Array, labels: np.ndarray) -> str:
    share = float((np.asarray(logits).argmax(-1) == labels).mean())
    return f"{100 * share:.1f} ± {100 * sqrt(share * (1 - share) / len(labels)):.1f}"
