"""Attention by length: seconds, memory and operations, softmax beside linear.

    python examples/benchmarks/attention.py lengths decode --json docs/results/attention.json

12 heads of 64, one sequence, float32 on a CPU and bfloat16 on an accelerator; queries, keys and
values are standard normal. alpha and beta are from the data, and given where attention is causal.

* `lengths`: forward, and forward and backward (gradients of all three). Seconds are the least of
  three calls; a method ends where XLA wants more than 8 GB beside its arguments. Memory is what
  XLA allocates, operations what it counts.
* `decode`: one token of LLN+Diag after 1000 and after 100 000 others, and of softmax with a cache
  of that length.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from aciq import run_parts
from flax import linen as nn

from lnq.attention import lln

Row = dict[str, Any]
HEADS, SIZE, MOST = 12, 64, 8e9
GIVEN: Any = {"alpha": 2.1355, "beta": 2.1355}

METHODS: dict[str, Callable[..., jax.Array]] = {
    "softmax, jax.nn": jax.nn.dot_product_attention,
    "softmax, Flax": nn.dot_product_attention,
    "LLN": lln.lln_attention,
    "LLN+Diag": lln.lln_diag_attention,
    "softmax, jax.nn, causal": partial(jax.nn.dot_product_attention, is_causal=True),
    "LLN, causal": partial(lln.lln_attention, causal=True, **GIVEN),
    "LLN+Diag, causal": partial(lln.lln_diag_attention, causal=True, **GIVEN),
}


def measured(function: Callable[..., Any], *args: Any) -> Row:
    """Seconds, bytes and operations of a compiled function; only what is compiled, if too large."""
    compiled: Any = jax.jit(function).lower(*args).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    row: Row = {"bytes": memory, "operations": compiled.cost_analysis().get("flops")}
    if memory > MOST:
        return row
    jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - begun)
    return row | {"seconds": min(seconds)}


def inputs(length: int, dtype: Any) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, length, HEADS, SIZE), dtype) for key in keys]


def lengths(args: argparse.Namespace) -> Iterator[Row]:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    ended: set[tuple[str, str]] = set()
    for length in (2**i for i in range(9, 17)):
        arrays = inputs(length, dtype)
        for name, attend in METHODS.items():

            def total(*arrays: jax.Array, attend: Callable[..., jax.Array] = attend) -> jax.Array:
                return attend(*arrays).astype(jnp.float32).sum()

            passes = {"forward": attend, "forward and backward": jax.grad(total, (0, 1, 2))}
            for way, function in passes.items():
                if (name, way) in ended:
                    continue
                row = measured(function, *arrays)
                if "seconds" not in row:
                    ended.add((name, way))
                yield {"length": length, "name": name, "pass": way, **row}


def decode(args: argparse.Namespace) -> Iterator[Row]:
    q, k, v = inputs(1, jnp.float32)

    def linear(state: lln.State, block: lln.Block, q: Any, k: Any, v: Any) -> Any:
        far, state = lln.extend(state, q, k, v, **GIVEN)
        near, block = lln.extend_diagonal(block, q, k, v)
        return lln.combine(far, near, (0.5, 0.5)), state, block

    def softmax(keys: Any, values: Any, at: Any, q: Any, k: Any, v: Any) -> Any:
        place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
        keys, values = place(keys, k), place(values, v)
        seen = (jnp.arange(keys.shape[1]) <= at)[None, None, None]
        return jax.nn.dot_product_attention(q, keys, values, mask=seen), keys, values

    for length in (1000, 100_000):
        block = lln.init_block((1,), HEADS, SIZE)._replace(length=jnp.int32(length))
        state = lln.init_state((1,), HEADS, SIZE)
        cache = [jnp.zeros((1, length + 1, HEADS, SIZE))] * 2
        yield {"length": length, "name": "LLN+Diag", **measured(linear, state, block, q, k, v)}
        row = measured(softmax, *cache, jnp.int32(length), q, k, v)
        yield {"length": length, "name": "softmax", **row}


PARTS = {"lengths": lengths, "decode": decode}


if __name__ == "__main__":
    run_parts(__doc__, PARTS)
