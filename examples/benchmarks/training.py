"""Six attentions in one small transformer, trained on three tasks.

    python examples/benchmarks/training.py images --json docs/results/training.json
    python examples/benchmarks/training.py plays --json docs/results/training.json
    python examples/benchmarks/training.py reviews --json docs/results/training.json

Softmax, LLN+Diag, LLN, elu + 1, ReLU (+ 0.001) and Performer (64 positive random features): 2
layers, width 64, 4 heads of 16, norms first, Adam at 2e-3 with 50 steps of warm-up and half a
cosine, three seeds each; a seed draws parameters and batches. LLN takes alpha and beta from each
batch, but in `plays` from running deviations.

* `images`: Fashion-MNIST as 49 patches of 4 x 4; accuracy on the 10 000 test images.
* `plays`: Shakespeare by character, 128 at a time; nats for each character of three plays that are
  left out.
* `reviews`: is a snippet of a film review kind or not? 48 words at most, those that the training
  texts have twice; accuracy on one text in five.

Rows have a curve: the loss on test examples, entropy (nats) and spectral gap of each layer, means
over heads and 16 test examples. A causal matrix has its weights of tokens on themselves for
eigenvalues, so its gap says only how much the strongest of these keeps.
"""

import argparse
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from aciq import example, run_parts
from flax import linen as nn
from flax.traverse_util import flatten_dict

from lnq.attention import concentration
from lnq.demo.data import read_fashion_mnist

Row = dict[str, Any]
WIDTH, SEEDS, LOOKS = 64, 3, 9
shakespeare, texts, transformer = map(example, ("shakespeare", "texts", "transformer"))


class Task(NamedTuple):
    """What to learn.

    Attributes:
      model: ``model(attention)`` makes the transformer.
      draw: ``draw(rng)`` gives a training batch: x, key_mask or None, labels.
      test: Batches of the same kind.
      steps: Training steps.
      causal: Whether a token may not see those behind it.
    """

    model: Callable[..., nn.Module]
    draw: Callable[[np.random.Generator], tuple[Any, ...]]
    test: list[tuple[Any, ...]]
    steps: int
    causal: bool = False


def compare(task: Task) -> Iterator[Row]:
    """A row for each attention and seed."""
    for name, kind in transformer.KINDS.items():
        for seed in range(SEEDS):
            begun = time.perf_counter()
            row = train(task, kind, seed)
            yield {"name": name, "seed": seed, "seconds": time.perf_counter() - begun, **row}


def train(task: Task, kind: Any, seed: int) -> Row:
    """One model: its losses on the way, and what it is like at the end."""
    model = task.model(partial(kind.attention, causal=task.causal))
    rng, batch = np.random.default_rng(seed), task.test[0]
    params, kept = transformer.split(model.init(jax.random.key(seed), *batch[:2]))
    optimizer = transformer.adam(task.steps, 2e-3)
    step, opt_state = transformer.make_step(model, optimizer), optimizer.init(params)
    judge = jax.jit(partial(test_batch, model))
    looks = set(np.linspace(0, task.steps, LOOKS).astype(int).tolist())
    curve = []
    for number in range(task.steps + 1):
        if number in looks:
            values = judge(params, kept, batch)[0]
            seen = look(task, kind, model, params, kept)
            curve.append({"step": number, "loss": float(values), **seen})
        if number < task.steps:
            params, kept, opt_state, _ = step(params, kept, opt_state, task.draw(rng))
    found = np.mean([judge(params, kept, batch) for batch in task.test], 0)
    return {"loss": float(found[0]), "accuracy": float(found[1]), "curve": curve}


def test_batch(model: nn.Module, params: Any, kept: Any, batch: Any) -> jax.Array:
    """Loss and accuracy."""
    x, key_mask, labels = batch
    logits: Any = model.apply({"params": params, **kept}, x, key_mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.stack([losses.mean(), (logits.argmax(-1) == labels).mean()])


def look(task: Task, kind: Any, model: nn.Module, params: Any, kept: Any) -> Row:
    """Entropy and gap of each layer."""
    x, key_mask, _ = jax.tree.map(lambda part: part[:16], task.test[0])
    capture: Any = {
        "capture_intermediates": lambda module, _: module.name in ("query", "key"),
        "mutable": ["intermediates"],
    }
    _, seen = model.apply({"params": params, **kept}, x, key_mask, **capture)
    real = np.ones(x.shape[:2], bool) if key_mask is None else key_mask
    mask = jnp.asarray(real[:, None, :, None] & real[:, None, None, :])
    if task.causal:
        mask &= jnp.tri(x.shape[1], dtype=bool)
    log_weights = [kind.log_weights(q, k, mask, real) for q, k in pairs(seen["intermediates"])]
    found = [concentration.measure(log_p) for log_p in log_weights]
    means = [(float(one.entropy.mean()), float(one.gap.mean())) for one in found]
    entropy, gap = zip(*means, strict=True)
    return {"entropy": entropy, "gap": gap}


def pairs(seen: Any) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Queries and keys ``[b, heads, n, d]`` of each layer, in their order."""
    flat: Any = flatten_dict(seen, sep="/")
    for name in sorted(name for name in flat if "query" in name):
        q, k = (jnp.swapaxes(flat[n][0], 1, 2) for n in (name, name.replace("query", "key")))
        yield q, k


def images(args: argparse.Namespace) -> Iterator[Row]:
    train_images, train_labels = patches(args, "train")
    test_images, test_labels = patches(args, "t10k")

    def draw(rng: np.random.Generator) -> tuple[Any, ...]:
        chosen = rng.integers(0, len(train_images), 128)
        return train_images[chosen], None, train_labels[chosen]

    test = [
        (test_images[i : i + 1000], None, test_labels[i : i + 1000]) for i in range(0, 10_000, 1000)
    ]
    model = partial(transformer.Transformer, embed=nn.Dense(WIDTH), outputs=10, pooled=True)
    yield from compare(Task(model, draw, test, 500))


def patches(args: argparse.Namespace, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images ``[b, 49, 16]`` of mean 0 and deviation 1, and their classes."""
    pixels, labels = read_fashion_mnist(args.data, split)
    cut = pixels.reshape(-1, 7, 4, 7, 4).swapaxes(2, 3).reshape(-1, 49, 16)
    return ((cut - 73.0) / 90.0).astype(np.float32), labels


def plays(args: argparse.Namespace) -> Iterator[Row]:
    train_text, test_text, letters = shakespeare.characters()

    def draw(rng: np.random.Generator) -> tuple[Any, ...]:
        return shakespeare.cut(train_text, rng.integers(0, len(train_text) - 129, 32), 128)

    starts = np.linspace(0, len(test_text) - 129, 512).astype(int)
    test = [shakespeare.cut(test_text, part, 128) for part in np.split(starts, 8)]
    embed = nn.Embed(len(letters), WIDTH)
    model = partial(transformer.Transformer, embed=embed, outputs=len(letters))
    yield from compare(Task(model, draw, test, 600, causal=True))


def reviews(args: argparse.Namespace) -> Iterator[Row]:
    scores, snippets = zip(*texts.opinions("movie"), strict=True)
    order = np.random.default_rng(0).permutation(len(snippets))
    test_chosen, chosen = np.split(order, [len(order) // 5])
    words = [re.findall(r"[a-z']+|[^\sa-z']", text.lower())[:48] for text in snippets]
    counts = Counter(word for i in chosen for word in words[i])
    numbers = {word: i + 2 for i, word in enumerate(w for w, n in counts.items() if n > 1)}
    ids = np.zeros((len(words), 48), np.int32)
    for row, known in zip(ids, words, strict=True):
        row[: len(known)] = [numbers.get(word, 1) for word in known]
    labels = (np.array(scores) > 0).astype(np.int32)

    def take(chosen: np.ndarray) -> tuple[Any, ...]:
        return ids[chosen], ids[chosen] > 0, labels[chosen]

    embed = nn.Embed(len(numbers) + 2, WIDTH)
    model = partial(transformer.Transformer, embed=embed, outputs=2, pooled=True)
    test = [take(part) for part in np.split(test_chosen[: len(test_chosen) // 8 * 8], 8)]
    yield from compare(Task(model, lambda rng: take(rng.choice(chosen, 64)), test, 250))


PARTS = {"images": images, "plays": plays, "reviews": reviews}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
