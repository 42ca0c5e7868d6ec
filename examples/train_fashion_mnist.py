"""Train the demo's residual CNN on Fashion-MNIST and write the two files that ship in `lnq/demo`.

    python examples/train_fashion_mnist.py --out lnq/demo

About half an hour on two CPU cores. The four IDX files are read from `--data`, else from
`$LNQ_DATA`, else from where Debian's package `dataset-fashion-mnist` puts them.
"""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from lnq.demo.data import read_fashion_mnist
from lnq.demo.resnet import ResNet

BATCH = 256
DEBIAN = "/usr/share/datasets/fashion-mnist"


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Mirror half of the images and shift each by up to two pixels."""
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    rows, columns = rng.integers(0, 5, (2, len(images), 1))
    columns = columns + np.arange(28)
    mirrored = rng.random((len(images), 1)) < 0.5
    columns = np.where(mirrored, columns[:, ::-1], columns)
    return padded[
        np.arange(len(images))[:, None, None], (rows + np.arange(28))[:, :, None], columns[:, None]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("LNQ_DATA", DEBIAN)))
    parser.add_argument("--out", type=Path, default=Path("lnq/demo"))
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, labels = read_fashion_mnist(args.data, "train")
    test_images, test_labels = read_fashion_mnist(args.data, "t10k")
    # Calibration images come out of the training file and are not trained on.
    calib, images, labels = images[:512], images[512:], labels[512:]

    model = ResNet()
    variables = model.init(jax.random.key(args.seed), images[:1])
    steps = args.epochs * (len(images) // BATCH)
    optimizer = optax.chain(
        optax.add_decayed_weights(5e-4, mask=lambda p: jax.tree.map(lambda w: w.ndim > 1, p)),
        optax.sgd(optax.cosine_onecycle_schedule(steps, 0.2), momentum=0.9, nesterov=True),
    )
    opt_state = optimizer.init(variables["params"])

    @jax.jit
    def step(variables, opt_state, x, y):
        def loss_fn(params):
            logits, updated = model.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

        (loss, updated), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = optimizer.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, **updated}, opt_state, loss

    @jax.jit
    def correct(variables, x, y):
        logits: Any = model.apply(variables, x)
        return (logits.argmax(-1) == y).sum()

    rng = np.random.default_rng(args.seed)
    for epoch in range(args.epochs):
        start, losses = time.perf_counter(), []
        order = rng.permutation(len(images))
        for i in range(len(images) // BATCH):
            batch = order[i * BATCH : (i + 1) * BATCH]
            variables, opt_state, loss = step(
                variables, opt_state, augment(rng, images[batch]), labels[batch]
            )
            losses.append(loss)
        hits = sum(
            int(correct(variables, test_images[i : i + 1000], test_labels[i : i + 1000]))
            for i in range(0, len(test_images), 1000)
        )
        print(
            f"epoch {epoch + 1:2d}  loss {jnp.stack(losses).mean():.4f}  "
            f"test accuracy {hits / len(test_images):.4f}  {time.perf_counter() - start:.0f} s",
            flush=True,
        )

    flat = {k: np.asarray(v) for k, v in flatten_dict(variables, sep="/").items()}
    save_file(flat, args.out / "fashion_mnist_resnet.safetensors")
    np.savez_compressed(
        args.out / "fashion_mnist.npz",
        calib=calib,
        test_images=test_images[:1000],
        test_labels=test_labels[:1000].astype(np.uint8),
    )


if __name__ == "__main__":
    main()
