"""MiniLM at three bounds and three values of eps0: file size, deviation, time, word similarity.

    python examples/benchmarks/minilm.py --json docs/results/minilm.json

Every row is `examples/minilm.py` in a process of its own, so that each starts cold.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import write_json
from rich.console import Console
from rich.table import Table

EXAMPLE = Path(__file__).parent.parent / "minilm.py"


def run(bound: float, eps0: float) -> dict[str, float] | None:
    """The example's numbers; None where the bound cannot be reached."""
    with tempfile.TemporaryDirectory() as folder:
        out, numbers = Path(folder, "minilm.lnq"), Path(folder, "numbers.json")
        command = [sys.executable, str(EXAMPLE), "--max-deviation", str(bound)]
        command += ["--eps0", str(eps0), "--out", str(out), "--json", str(numbers)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode and "cannot be reached" not in done.stderr:
            raise RuntimeError(done.stderr)
        return None if done.returncode else json.loads(numbers.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.001, 0.005, 0.02])
    parser.add_argument("--eps0", type=float, nargs="+", default=[0.01, 0.003, 0.0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    table = Table("bound", "eps0", title="all-MiniLM-L6-v2, 32 calibration and 32 other sentences")
    names = ("bits/weight", "at the bound", "vs float32", "deviation", "search s", "coding s")
    for name in (*names, "evaluations", "WordSim353"):
        table.add_column(name, justify="right")
    rows = []
    for bound in args.bounds:
        for eps0 in args.eps0:
            found = run(bound, eps0)
            rows.append({"bound": bound, "eps0": eps0, "found": found})
            if found is None:
                table.add_row(f"{bound:g}", f"{eps0:g}", "unreachable")
                continue
            table.add_row(
                f"{bound:g}",
                f"{eps0:g}",
                f"{found['bits_per_weight']:.3f}",
                f"{found[f'bits_per_weight_at_{bound:g}']:.3f}",
                f"{found['ratio_to_float32']:.2f}x",
                f"{found['evaluation_deviation']:.5f}",
                f"{found['search_seconds']:.1f}",
                f"{found['coding_seconds']:.1f}",
                str(found["evaluations"]),
                f"{found['wordsim353_float']:.4f} to {found['wordsim353_compressed']:.4f}",
            )
    Console(width=130).print(table)
    write_json(args.json, {"rows": rows}, "jax", "flax")


if __name__ == "__main__":
    main()
