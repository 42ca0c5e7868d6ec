"""Peak memory of `riq.quantize`, in units of leaves, op by op and under `jit`.

    python examples/benchmarks/memory.py --json docs/results/memory.json

The tree has eight equal float32 leaves, and its int32 codes are as large; extra is what is needed
beside the two. Leaves are so large (5 GB in all) that the compiler's own memory hardly counts. Each
measurement runs in a process of its own: eager, the growth of the process's peak resident memory;
under `jit`, what XLA says of the compiled program, also with its CPU scheduler set to run one
operation after the other.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import write_json
from rich.console import Console
from rich.table import Table

from lnq import riq

LEAVES = 8
SHAPE = (8192, 8192)
LEAF_BYTES = 4 * SHAPE[0] * SHAPE[1]
K = 1000.0


def make_tree(leaves: int, shape: tuple[int, int]) -> dict[str, jax.Array]:
    """Normal weights."""
    rng = np.random.default_rng(0)
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for i in range(leaves)
    }


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def eager() -> dict[str, float]:
    """Growth of the peak while a tree is made and quantized, less the tree and its codes."""
    jax.block_until_ready(riq.quantize(make_tree(1, (64, 64)), K))  # XLA and its threads
    before = peak_bytes()
    params = make_tree(LEAVES, SHAPE)
    qtree = jax.block_until_ready(riq.quantize(params, K))
    given, output = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (params, qtree))
    return report(given, output, peak_bytes() - before - given - output)


def compiled() -> dict[str, float]:
    """Sizes of input, output and scratch memory of the whole tree's program."""
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    params = {f"leaf{i}": leaf for i in range(LEAVES)}
    program = jax.jit(riq.quantize).lower(params, jnp.float32(K)).compile()
    memory: Any = program.memory_analysis()
    return report(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    )


def report(given: int, output: int, extra: int) -> dict[str, float]:
    sizes = {"input": given, "output": output, "extra": extra}
    return {name: size / LEAF_BYTES for name, size in sizes.items()}


MEASURES = {"eager": eager, "jit": compiled}
SEQUENTIAL = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
MODES = {"eager": ("eager", ""), "jit": ("jit", ""), "jit, sequential": ("jit", SEQUENTIAL)}


def in_subprocess(measure: str, xla_flags: str) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", measure]
    env = os.environ | ({"XLA_FLAGS": xla_flags} if xla_flags else {})
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=MEASURES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure]()))
        return

    rows = {mode: in_subprocess(*how) for mode, how in MODES.items()}
    table = Table(
        "mode", "input", "output", "extra",
        title=f"Memory of riq.quantize in leaves of {LEAF_BYTES >> 20} MiB",
    )  # fmt: skip
    for mode, row in rows.items():
        table.add_row(mode, *(f"{row[name]:.2f}" for name in ("input", "output", "extra")))
    Console().print(table)
    results = {"leaves": LEAVES, "leaf_bytes": LEAF_BYTES, "unit": "leaves", "modes": rows}
    write_json(args.json, results, "jax")


if __name__ == "__main__":
    main()
