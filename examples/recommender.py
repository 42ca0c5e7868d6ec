"""LAPQ on a recommender: the clips of a small NeuMF, chosen together on labelled pairs.

    python examples/recommender.py --json docs/results/recommender.json

The case of the LAPQ paper that is not vision, in small and on made-up data: 2000 users like 50 of
1000 items each, by taste (both come in clusters) and by popularity. A minute or two on two CPU
cores, training included.

Calibration draws 1024 likes that were trained on, each with four random items; the loss is the
binary cross-entropy with their labels. The model must then rank one like of each user that was
kept back among 99 items that the user does not like; `change` is against the float model, by the
same users. All four dense layers have the same width (`edge_bits=None`); rows are means over three
calibration draws; `cost` is in evaluations of the loss.

* `widest`: nothing is clipped, as with the range of the values;
* `p = 2`: each clip has the least squared error on its own tensor;
* `p*`: the best of nine exponents, of p* and of no clipping, by the loss: `method="none"`;
* `coordinate` and `powell`: the loss is searched from there;
* `+ tables`: `powell`, and the embedding tables in 8 bits;
* `8-bit edges`: `powell` with the first and the last layer in 8 bits, which is the default.

Embedding tables are looked up, not multiplied: LAPQ lists them under `problem.sites.others` and
leaves them float, and here they are nearly all of the model. What they hold is rounded as the data
of a dense layer. To store it in fewer bits, hand the quantized tree on to
`lnq.aciq.quantize_weights`.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
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
from lnq import aciq, lapq, tree
from lnq.types import Params

Batch = dict[str, np.ndarray]
Row = dict[str, Any]

USERS, ITEMS, LIKES, CLUSTERS = 2000, 1000, 50, 12
NEGATIVES, RANKED, TOP = 4, 100, 10
STEPS, BATCH = 1500, 400
CALIB, DRAWS = 1024, 3
BITS = (8, 4, 3)


class NeuMF(nn.Module):
    """A product of factors beside an MLP; users and items ``[...]`` to logits ``[...]``."""

    @nn.compact
    def __call__(self, user: jax.Array, item: jax.Array) -> jax.Array:
        def embed(name: str, rows: int, features: int) -> nn.Embed:
            return nn.Embed(rows, features, embedding_init=nn.initializers.normal(0.05), name=name)

        factors = embed("gmf_user", USERS, 16)(user) * embed("gmf_item", ITEMS, 16)(item)
        both = embed("mlp_user", USERS, 32)(user), embed("mlp_item", ITEMS, 32)(item)
        x = jnp.concatenate(both, -1)  # (..., 64)
        for features in (64, 32, 16):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(1)(jnp.concatenate([factors, x], -1))[..., 0]  # (..., 16 + 16) -> (...)


@jax.jit
def apply_fn(params: Params, batch: Any) -> Any:
    return NeuMF().apply(params, batch["user"], batch["item"])


quantized_fn = jax.jit(lnq.quantized(apply_fn))


def loss_fn(logits: Any, batch: Any) -> jax.Array:
    return optax.sigmoid_binary_cross_entropy(logits, batch["label"]).mean()


class Data(NamedTuple):
    """Who likes what.

    Attributes:
      likes: Items of each user to train on, ``[users, likes - 1]``.
      liked: The same as a table of truth values, ``[users, items]``.
      ranked: To be ranked: a like that is not in ``likes``, then items that are none,
        ``[users, 100]``.
    """

    likes: np.ndarray
    liked: np.ndarray
    ranked: np.ndarray


def make_data(seed: int) -> Data:
    """Likes drawn with probabilities exp(taste + popularity), without replacement."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(CLUSTERS, 8))
    users, items = (
        centers[rng.integers(CLUSTERS, size=n)] + 0.7 * rng.normal(size=(n, 8))
        for n in (USERS, ITEMS)
    )
    popularity = -0.7 * np.log1p(rng.permutation(ITEMS))
    taste = 0.53 * users @ items.T + popularity
    order = np.argsort(-(taste + rng.gumbel(size=taste.shape)), 1)
    likes = rng.permuted(order[:, :LIKES], axis=1)
    ranked = [likes[:, :1], rng.permuted(order[:, LIKES:], axis=1)[:, : RANKED - 1]]
    liked = np.zeros(taste.shape, bool)
    np.put_along_axis(liked, likes[:, 1:], True, 1)
    return Data(likes[:, 1:], liked, np.concatenate(ranked, 1))


def draw_pairs(data: Data, rng: np.random.Generator, count: int) -> Batch:
    """Likes, each with random items, in random order; labels are 1 for likes."""
    user = rng.integers(USERS, size=count)
    like = data.likes[user, rng.integers(LIKES - 1, size=count)]
    item = np.column_stack([like, rng.integers(ITEMS, size=(count, NEGATIVES))]).ravel()
    user = np.repeat(user, 1 + NEGATIVES)
    order = rng.permutation(len(user))
    user, item = user[order], item[order]
    return {"user": user, "item": item, "label": data.liked[user, item].astype(np.float32)}


def train(data: Data, seed: int) -> Params:
    """One cycle of Adam."""
    rng = np.random.default_rng(seed)
    optimizer = optax.adam(optax.cosine_onecycle_schedule(STEPS, 3e-3))

    @jax.jit
    def step(params: Params, state: optax.OptState, batch: Any):
        grads = jax.grad(lambda params: loss_fn(apply_fn(params, batch), batch))(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    nobody = np.zeros(1, int)
    params = NeuMF().init(jax.random.key(seed), nobody, nobody)
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state = step(params, state, draw_pairs(data, rng, BATCH))
    return params


def top_share(scores: np.ndarray) -> np.ndarray:
    """Probability that the first item is among the ten best, ties in random order; ``[users]``."""
    better = (scores[:, 1:] > scores[:, :1]).sum(1)
    equal = (scores[:, 1:] == scores[:, :1]).sum(1)
    return np.clip((TOP - better) / (1 + equal), 0.0, 1.0)


def rank(qtree: Params, data: Data) -> tuple[float, np.ndarray]:
    """Loss of the likes kept back, with four other items each, and :func:`top_share`."""
    user = np.broadcast_to(np.arange(USERS)[:, None], data.ranked.shape)
    scores = np.asarray(quantized_fn(qtree, {"user": user, "item": data.ranked}))
    label = np.broadcast_to(np.arange(1 + NEGATIVES) == 0, (USERS, 1 + NEGATIVES))
    return float(loss_fn(scores[:, : 1 + NEGATIVES], {"label": label})), top_share(scores)


def file_bytes(qtree: Params) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recommender.lnq"
        lnq.save(path, qtree)
        return lnq.info(path).bytes


def measure(qtree: Params, data: Data, calib: Batch) -> Row:
    loss, top = rank(qtree, data)
    calib_loss = float(loss_fn(quantized_fn(qtree, calib), calib))
    size = file_bytes(qtree)
    return {"calib_loss": calib_loss, "held_out_loss": loss, "top": top, "bytes": size}


def variants(params: Params, calib: Batch, bits: int) -> Iterator[tuple[str, Params, Row]]:
    """Quantized trees of one width, with what was found out on the way."""
    default: dict[str, Any] = {
        "loss_fn": loss_fn,
        "weight_bits": bits,
        "act_bits": bits,
        "batch_size": 512,
    }
    options: dict[str, Any] = {**default, "edge_bits": None}
    made = lapq.problem(apply_fn, params, calib, **options)
    yield "widest", made.tree(made.widest), {}
    yield "p = 2", made.tree(jax.jit(made.start)(2.0, made.data)), {}
    qtree, info = lapq.quantize(apply_fn, params, calib, method="none", **options)
    yield "p*", qtree, {"p": info.p, "cost": info.cost}
    for method in ("coordinate", "powell"):
        qtree, found = lapq.quantize(
            apply_fn, params, calib, method=method, state=info.state, **options
        )
        yield method, qtree, {"p": found.p, "cost": found.cost}
    yield "+ tables", aciq.quantize_weights(qtree, 8, select="embedding$"), {}
    if bits < 8:
        qtree, found = lapq.quantize(apply_fn, params, calib, **default)
        yield "8-bit edges", qtree, {"p": found.p, "cost": found.cost}


def mean_row(setting: str, name: str, draws: list[Row], float_top: np.ndarray) -> Row:
    """One row from those of all draws; rates with standard errors over the users."""
    top = np.mean([draw["top"] for draw in draws], 0)
    rate, change = float(top.mean()), top - float_top
    keys = [key for key in draws[0] if key != "top"]
    return {
        "setting": setting,
        "name": name,
        **{key: float(np.mean([draw[key] for draw in draws])) for key in keys},
        "hit_rate": (rate, math.sqrt(rate * (1.0 - rate) / USERS)),
        "change": (float(change.mean()), float(change.std(ddof=1)) / math.sqrt(USERS)),
        "draws": [
            {key: draw[key] for key in keys} | {"hit_rate": float(draw["top"].mean())}
            for draw in draws
        ],
    }


def compare(params: Params, data: Data) -> list[Row]:
    """The table, row by row."""
    calibs = [draw_pairs(data, np.random.default_rng([1, i]), CALIB) for i in range(DRAWS)]
    floats = [measure(params, data, calib) for calib in calibs]
    float_top = floats[0]["top"]
    rows = [mean_row("float", "", floats, float_top)]
    for bits in BITS:
        draws: dict[str, list[Row]] = {}
        for calib in calibs:
            for name, qtree, facts in variants(params, calib, bits):
                draws.setdefault(name, []).append(measure(qtree, data, calib) | facts)
        setting = f"W{bits}A{bits}"
        rows += [mean_row(setting, name, found, float_top) for name, found in draws.items()]
    return rows


def table_bytes(params: Params, calib: Batch) -> tuple[int, int]:
    """Bytes of the leaves that are looked up, and of all."""
    made = lapq.problem(apply_fn, params, calib, loss_fn=loss_fn)
    looked_up = {use.path for use in made.sites.others if use.primitive == "gather"}
    sizes = {name: leaf.nbytes for name, leaf in tree.named_leaves(params)}
    return sum(sizes[name] for name in looked_up), sum(sizes.values())


def show(rows: list[Row], tables: int, total: int, popular: float) -> None:
    """Print the results."""
    table = Table(
        "widths", "clips", "cost", "calib loss", "kept back",
        f"hit-rate@{TOP}", "change", "bytes",
        title=f"embedding tables: {tables:,} of {total:,} bytes; losses in nats, rates in % "
        "± standard error",
        caption=f"The most popular items have a hit-rate of {100.0 * popular:.2f} %.",
    )  # fmt: skip
    for column in table.columns[2:]:
        column.justify = "right"
    last = {row["setting"]: row["name"] for row in rows}
    for row in rows:
        table.add_row(
            row["setting"],
            row["name"],
            f"{row['cost']:.0f}" if "cost" in row else "",
            f"{row['calib_loss']:.4f}",
            f"{row['held_out_loss']:.4f}",
            "{:.2f} ± {:.2f}".format(*(100.0 * x for x in row["hit_rate"])),
            "{:+.2f} ± {:.2f}".format(*(100.0 * x for x in row["change"])) if row["name"] else "",
            f"{row['bytes']:,.0f}",
            end_section=row["name"] == last[row["setting"]],
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    began = time.perf_counter()
    data = make_data(args.seed)
    params = train(data, args.seed)
    trained = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder:
        # Every call of lapq.quantize compiles the same programs: widths are data.
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        rows = compare(params, data)
        tables, total = table_bytes(params, draw_pairs(data, np.random.default_rng(1), 8))
    popular = float(top_share(data.liked.sum(0)[data.ranked]).mean())
    show(rows, tables, total, popular)
    results = {
        "bytes": total,
        "table_bytes": tables,
        "popularity_hit_rate": popular,
        "train_seconds": trained,
        "seconds": time.perf_counter() - began,
    }
    write_json(args.json, {**results, "rows": rows}, "jax", "flax", "optax", "numpy")


if __name__ == "__main__":
    main()
