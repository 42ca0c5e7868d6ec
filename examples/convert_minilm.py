"""Linear attention in a trained encoder: all-MiniLM-L6-v2 converted, then distilled for a while.

    python examples/convert_minilm.py --json docs/results/convert_minilm.json

The weights of the softmax model serve LLN or LLN+Diag attention as they are; see `minilm.py` for
the model and `texts.py` for the opinions. Ten minutes of processor time.

* `softmax`: the float model.
* `converted`: nothing trained. alpha and beta are measured over everything, over each head, or over
  each head of each sentence, with the published constants or those for the size of a head; of these
  six the one with the least deviation on the first 64 sentences goes on.
* `distilled`: the layers, and not the embedding tables, have been trained to give the embeddings of
  the softmax model, on news and opinions without labels.

`deviation` is 1 - cosine of the embeddings from the softmax model's, on 128 sentences that nothing
was chosen or trained by; `WordSim353` the correlation with people's similarity of words.
"""

import argparse
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, get_args

import jax
import minilm
import numpy as np
import optax
from benchmarks.machine import write_json
from minilm import ApplyFn, Batch
from rich.console import Console
from rich.table import Table
from texts import opinions

from lnq.attention import attention_fn, lln
from lnq.types import Params

Row = dict[str, Any]

VARIANTS = {"LLN": False, "LLN+Diag": True}  # whether softmax within blocks is added
HEAD_DIM = minilm.MiniLM.width // minilm.MiniLM.heads
CONSTANTS = {"published": lln.PUBLISHED, "of the size": lln.constants(HEAD_DIM)}
CHOSEN, HELD_OUT = slice(64), slice(512, 640)  # of the news
BATCH, LENGTH = 32, 40  # sentences, tokens
RATE = 3e-4


def convert(**options: Any) -> ApplyFn:
    """The model with linear attention; parameters are those of softmax."""
    model = minilm.MiniLM(attention_fn=partial(attention_fn, **options))

    def apply_fn(params: dict, batch: Batch) -> jax.Array:
        embedded: Any = model.apply({"params": params}, batch["ids"], batch["mask"])
        return embedded

    return apply_fn


def loss_fn(embedded: jax.Array, wanted: jax.Array) -> jax.Array:
    """1 - mean cosine of embeddings ``[b, 384]`` of unit length."""
    return 1 - (embedded * wanted).sum(-1).mean()


def unlabelled() -> list[str]:
    """News and opinions to train on."""
    news = minilm.sentences()
    return news[CHOSEN.stop : HELD_OUT.start] + news[HELD_OUT.stop :] + [t for _, t in opinions()]


def batches(texts: list[str], steps: int, seed: int) -> Iterator[Batch]:
    """Random texts, cut and padded to one length."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(texts), BATCH, replace=False)
        yield minilm.tokenize([texts[i] for i in chosen], LENGTH)


def distill(
    student: ApplyFn, teacher: ApplyFn, params: dict, given: Iterator[Batch], steps: int
) -> tuple[dict, list[float]]:
    """Weights that make the student's embeddings the teacher's, and the loss of each step."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, RATE, steps // 10, steps)
    optimizer = optax.adam(schedule)
    layers = {name: leaves for name, leaves in params.items() if name.startswith("layer_")}

    @jax.jit
    def step(layers: Params, state: optax.OptState, batch: Batch):
        def loss(layers: Params) -> jax.Array:
            return loss_fn(student({**params, **layers}, batch), wanted)

        wanted = teacher(params, batch)
        value, grads = jax.value_and_grad(loss)(layers)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(layers, updates), state, value

    state, losses = optimizer.init(layers), []
    for batch in given:
        layers, state, value = step(layers, state, batch)
        losses.append(value)
    return {**params, **layers}, [float(value) for value in losses]


def compare(steps: int, seed: int) -> Iterator[Row]:
    """The table, row by row."""
    teacher, params = minilm.load()
    news = minilm.sentences()
    chosen, held_out = minilm.tokenize(news[CHOSEN]), minilm.tokenize(news[HELD_OUT])
    wanted = [jax.jit(teacher)(params, batch) for batch in (chosen, held_out)]
    pool = unlabelled()

    def measure(apply_fn: ApplyFn, params: dict) -> Row:
        run = jax.jit(apply_fn)
        found = [run(params, batch) for batch in (chosen, held_out)]
        deviations = [float(loss_fn(*pair)) for pair in zip(found, wanted, strict=True)]
        rho = minilm.wordsim353(run, params)
        return {"choice": deviations[0], "deviation": deviations[1], "wordsim353": rho}

    yield {"name": "softmax", "stage": "softmax", **measure(teacher, params)}
    for name, diagonal in VARIANTS.items():
        rows = []
        for stats, constants in product(get_args(lln.Stats), CONSTANTS):
            options = {"stats": stats, "constants": constants}
            student = convert(diagonal=diagonal, stats=stats, constants=CONSTANTS[constants])
            row = {"name": name, "stage": "converted", **options, **measure(student, params)}
            rows.append((row["choice"], options, student))
            yield row
        _, options, student = min(rows, key=lambda row: row[0])
        began = time.perf_counter()
        trained, losses = distill(student, teacher, params, batches(pool, steps, seed), steps)
        seconds = time.perf_counter() - began
        row = {"name": name, "stage": "distilled", **options, **measure(student, trained)}
        yield {**row, "steps": steps, "seconds": seconds, "losses": losses[::10]}


def show(rows: list[Row], one_block: float) -> None:
    """Print the results."""
    table = Table(
        "attention", "stage", "stats", "constants", "choice", "deviation", "WordSim353", "seconds",
        caption=f"{100.0 * one_block:.0f} % of the sentences are no longer than a block.",
    )  # fmt: skip
    for column in table.columns[4:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            row["stage"],
            row.get("stats", ""),
            row.get("constants", ""),
            f"{row['choice']:.4f}",
            f"{row['deviation']:.4f}",
            f"{row['wordsim353']:.4f}",
            f"{row['seconds']:.0f}" if "seconds" in row else "",
            end_section=row["stage"] != "converted",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=120, help="of distillation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    began = time.perf_counter(), time.process_time()
    rows = list(compare(args.steps, args.seed))
    lengths = minilm.tokenize(minilm.sentences()[HELD_OUT])["mask"].sum(1)
    one_block = float((lengths <= HEAD_DIM).mean())
    show(rows, one_block)
    wall, processor = time.perf_counter() - began[0], time.process_time() - began[1]
    results = {"seconds": wall, "processor_seconds": processor, "one_block": one_block}
    write_json(args.json, {**results, "rows": rows}, "jax", "flax", "optax", "numpy")


if __name__ == "__main__":
    main()
