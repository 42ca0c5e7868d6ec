"""RIQ on a VGG-type net for Fashion-MNIST, dense and pruned to a tenth of its weights.

    python examples/vgg.py --json docs/results/vgg.json

Trains the net, compresses it, prunes it, fine-tunes what is left and compresses that: about six
minutes on two CPU cores. The four IDX files are read from `--data`, else from `$LNQ_DATA`, else
from where Debian's package `dataset-fashion-mnist` puts them. Compression sees 512 images that
are not trained on, and no label.
"""

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmarks.machine import write_json
from rich.console import Console
from rich.table import Table

import lnq
from lnq.demo.data import read_fashion_mnist
from lnq.types import Params

BATCH = 128
CALIB = 512
DEBIAN = "/usr/share/datasets/fashion-mnist"
MAX_DEVIATION = 0.005
SPARSITY = 0.9


class VGG(nn.Module):
    """3x3 convolutions, then one matrix that holds nearly all weights, as in VGG16.

    Images ``[b, 28, 28]``, uint8, to logits ``[b, 10]``.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.astype(jnp.float32)[..., None] / 127.5 - 1.0
        for widths in (32,), (64, 64):
            for features in widths:
                x = nn.relu(nn.Conv(features, (3, 3))(x))
            b, h, w, c = x.shape
            # Max pooling by 2; its gradient is several times faster than that of nn.max_pool.
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))
        x = nn.relu(nn.Dense(512)(x.reshape(b, -1)))  # (b, 7 * 7 * 64) -> (b, 512)
        return nn.Dense(10)(x)


class Data(NamedTuple):
    """Fashion-MNIST; the calibration images come out of the training file."""

    calib: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_data(folder: Path) -> Data:
    images, labels = read_fashion_mnist(folder, "train")
    return Data(images[:CALIB], images[CALIB:], labels[CALIB:], *read_fashion_mnist(folder, "t10k"))


@jax.jit
def apply_fn(params: Params, images: Any) -> Any:
    return VGG().apply(params, images)


def batches(data: Data, epochs: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Shuffled training batches."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(data.images))
        for i in range(len(order) // BATCH):
            chosen = order[i * BATCH : (i + 1) * BATCH]
            yield data.images[chosen], data.labels[chosen]


def train(params: Params, mask: Params, data: Data, epochs: int, peak: float, seed: int) -> Params:
    """One cycle of Adam, its learning rate up to ``peak``; nothing moves where the mask is 0."""
    optimizer = optax.adam(
        optax.cosine_onecycle_schedule(epochs * (len(data.images) // BATCH), peak)
    )

    @jax.jit
    def step(params: Params, state: optax.OptState, x: jax.Array, y: jax.Array):
        def loss_fn(params: Params) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(apply_fn(params, x), y)
            return losses.mean()

        updates, state = optimizer.update(jax.grad(loss_fn)(params), state)
        return optax.apply_updates(params, jax.tree.map(jnp.multiply, updates, mask)), state

    state = optimizer.init(params)
    for x, y in batches(data, epochs, seed):
        params, state = step(params, state, x, y)
    return params


def magnitude_mask(params: Params, sparsity: float) -> Params:
    """Ones where a weight stays: biases, and the kernels' entries of largest magnitude overall."""
    kernels = [np.abs(w).ravel() for w in jax.tree.leaves(params) if w.ndim > 1]
    threshold = np.quantile(np.concatenate(kernels), sparsity)
    return jax.tree.map(lambda w: jnp.float32((jnp.abs(w) > threshold) | (w.ndim == 1)), params)


def test_logits(params: Params, data: Data) -> np.ndarray:
    parts = np.split(data.test_images, 10)
    return np.concatenate([apply_fn(params, part) for part in parts])


def accuracy(logits: np.ndarray, data: Data) -> tuple[float, float]:
    """Share of test images that are classified correctly, and its standard error."""
    p = float((logits.argmax(-1) == data.test_labels).mean())
    return p, math.sqrt(p * (1.0 - p) / len(logits))


def compress(name: str, params: Params, data: Data, **options: Any) -> dict[str, Any]:
    """Compress to a file, read it back, and measure what came back."""
    qtree, found = lnq.riq.compress(
        apply_fn, params, data.calib, max_deviation=MAX_DEVIATION, **options
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg.lnq"
        lnq.save(path, qtree)
        size = lnq.info(path)
        restored = lnq.dequantize(lnq.load(path))
    before, after = test_logits(params, data), test_logits(restored, data)
    return {
        "name": name,
        **options,
        "bytes": size.bytes,
        "ratio": size.ratio,
        "bits_per_weight": size.bits_per_weight,
        "calib_deviation": found.deviation,
        "test_deviation": float(lnq.riq.example_deviation(before, after).mean()),
        "accuracy_before": accuracy(before, data),
        "accuracy_after": accuracy(after, data),
    }


def show(rows: list[dict[str, Any]], weights: int, zeros: float) -> None:
    """Print the results."""
    table = Table(
        "net", "eps0", "bytes", "ratio", "bits", "deviation", "accuracy (%)", "compressed (%)",
        title=f"{weights:,} weights, {4 * weights:,} bytes in float32, bound {MAX_DEVIATION}; "
        "bits per weight; deviation and accuracy on test images",
        caption=f"The pruned net's kernels hold {100.0 * zeros:.1f} % zeros.",
    )  # fmt: skip
    for row in rows:
        before, after = (
            "{:.2f} ± {:.2f}".format(*(100.0 * x for x in row[when]))
            for when in ("accuracy_before", "accuracy_after")
        )
        table.add_row(
            row["name"],
            f"{row['eps0']}",
            f"{row['bytes']:,}",
            f"x{row['ratio']:.1f}",
            f"{row['bits_per_weight']:.3f}",
            f"{row['test_deviation']:.4f}",
            before,
            after,
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LNQ_DATA", DEBIAN)))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    data = load_data(args.data)
    initial = VGG().init(jax.random.key(args.seed), data.calib[:1])
    all_ones = jax.tree.map(jnp.ones_like, initial)
    dense = train(initial, all_ones, data, args.epochs, 2e-3, args.seed)
    mask = magnitude_mask(dense, SPARSITY)
    pruned = jax.tree.map(jnp.multiply, dense, mask)
    pruned = train(pruned, mask, data, 1, 1e-3, args.seed)

    rows = []
    for eps0 in (0.01, 0.003):
        run = partial(compress, data=data, eps0=eps0)
        rows += [
            run("dense", dense),
            run("pruned", pruned),
            run("pruned, zeros ignored", pruned, ignore_zeros=True),
        ]
    kernels = [w for w in jax.tree.leaves(pruned) if w.ndim > 1]
    zeros = sum(int((w == 0.0).sum()) for w in kernels) / sum(w.size for w in kernels)
    weights = sum(w.size for w in jax.tree.leaves(dense))
    show(rows, weights, zeros)
    results = {"weights": weights, "kernel_zeros": zeros, "max_deviation": MAX_DEVIATION}
    write_json(args.json, {**results, "rows": rows}, "jax", "flax", "optax", "numpy")


if __name__ == "__main__":
    main()
