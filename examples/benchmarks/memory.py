"""Peak memory of `riq.quantize`, in units of leaves, op by op and under `jit`.

    python examples/benchmarks/memory.py --json docs/results/memory.json

The tree has eight equal float32 leaves, and its int32 codes are as large. Each measurement runs in
a process of its own: eager, the growth of the process's peak resident memory over what it holds
once the input is there; under `jit`, what XLA says of the compiled program.
"""

import argparse
import json
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
SHAPE = (4096, 4096)
LEAF_BYTES = 4 * SHAPE[0] * SHAPE[1]
K = 1000.0


def make_tree(leaves: int, shape: tuple[int, int]) -> dict[str, jax.Array]:
    """Normal weights, made in place so that the peak before the measurement is the tree."""
    rng = np.random.default_rng(0)
    return {
        f"leaf{i}": jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for i in range(leaves)
    }


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def eager() -> dict[str, float]:
    """Growth of the peak while a tree is quantized, codes included."""
    jax.block_until_ready(riq.quantize(make_tree(1, (64, 64)), K))  # XLA and its threads
    params = make_tree(LEAVES, SHAPE)
    before = peak_bytes()
    qtree = jax.block_until_ready(riq.quantize(params, K))
    output = sum(x.nbytes for x in jax.tree.leaves(qtree))
    return report(LEAVES * LEAF_BYTES, output, peak_bytes() - before - output)


def compiled() -> dict[str, float]:
    """Sizes of input, output and scratch memory of the whole tree's program."""
    leaf = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    params = {f"leaf{i}": leaf for i in range(LEAVES)}
    memory = jax.jit(riq.quantize).lower(params, jnp.float32(K)).compile().memory_analysis()
    return report(
        memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    )


def report(given: int, output: int, extra: int) -> dict[str, float]:
    sizes = {"input": given, "output": output, "extra": extra}
    return {name: size / LEAF_BYTES for name, size in sizes.items()}


MODES = {"eager": eager, "jit": compiled}


def in_subprocess(mode: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", mode]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MODES[args.measure]()))
        return

    rows = {mode: in_subprocess(mode) for mode in MODES}
    table = Table(
        "mode", "input", "output", "extra",
        title=f"Memory of riq.quantize in leaves of {LEAF_BYTES >> 20} MiB",
    )  # fmt: skip
    for mode, row in rows.items():
        table.add_row(mode, *(f"{row[name]:.2f}" for name in ("input", "output", "extra")))
    Console().print(table)
    results = {"leaves": LEAVES, "leaf_bytes": LEAF_BYTES, "unit": "leaves", **rows}
    write_json(args.json, results, "jax")


if __name__ == "__main__":
    main()
