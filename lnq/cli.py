"""The ``lnq`` command: compress, decompress, info, demo.

Exit codes: 0 done, 1 the work failed (one line says why), 2 the command line was wrong.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Post-training compression of JAX models.",
)
out, err = Console(), Console(stderr=True)


@app.command()
def compress(
    source: Annotated[Path, typer.Argument(help=".safetensors, .npz, .msgpack, orbax directory")],
    target: Annotated[Path, typer.Argument(help="the .lnq file to write")],
    weight_deviation: Annotated[
        float | None, typer.Option(help="bound on the cosine distance of the weights")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="package.module:apply, called apply(params, batch)")
    ] = None,
    calib: Annotated[Path | None, typer.Option(help="examples for the model, .npy or .npz")] = None,
    max_deviation: Annotated[
        float | None, typer.Option(help="bound on 1 - cosine of the model's outputs")
    ] = None,
    eps0: Annotated[float, typer.Option(help="floor of each layer's root distance")] = 0.01,
    select: Annotated[str | None, typer.Option(help="regex of leaves to quantize")] = None,
    stacked: Annotated[str | None, typer.Option(help="regex of leaves that stack layers")] = None,
    dry_run: Annotated[bool, typer.Option(help="print the plan and sizes, write nothing")] = False,
) -> None:
    """Compress a checkpoint with RIQ, within a bound on its weights or on a model's outputs."""
    by_model = [x is not None for x in (model, calib, max_deviation)]
    if any(by_model) if weight_deviation is not None else not all(by_model):
        raise typer.BadParameter("give --weight-deviation, or --model, --calib and --max-deviation")
    with _one_line_errors():
        import lnq

        params = lnq.checkpoint.read(source)
        options = {"eps0": eps0, "select": select, "stacked": stacked}
        with _bar("search") as progress:
            if weight_deviation is not None:
                qtree, found = lnq.riq.compress_weights(
                    params, max_deviation=weight_deviation, progress=progress, **options
                )
            else:
                qtree, found = lnq.riq.compress(
                    _function(model),
                    params,
                    _examples(calib),
                    max_deviation=max_deviation or 0.0,
                    progress=progress,
                    **options,
                )
        with tempfile.TemporaryDirectory() as folder, _bar("code") as progress:
            path = Path(folder, "dry-run.lnq") if dry_run else target
            lnq.save(path, qtree, progress=progress)
            _print_info(path)
        out.print(
            f"k = {found.k:.6g}, deviation {found.deviation:.3g}, "
            f"{found.evaluations} evaluations" + (", nothing written" if dry_run else ""),
            highlight=False,
        )


@app.command()
def decompress(
    source: Annotated[Path, typer.Argument(help="an .lnq file")],
    target: Annotated[Path, typer.Argument(help=".safetensors, .npz, .msgpack, or a directory")],
) -> None:
    """Write the float checkpoint that an .lnq file stands for."""
    with _one_line_errors():
        import lnq

        with _bar("decode") as progress:
            params = lnq.dequantize(lnq.load(source, progress=progress))
        lnq.checkpoint.write(target, params)


@app.command()
def info(
    source: Annotated[Path, typer.Argument(help="an .lnq file")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what an .lnq file holds, leaf by leaf, without decoding it."""
    with _one_line_errors():
        import lnq

        if as_json:
            found = lnq.info(source)
            rows = [row._asdict() for row in found.rows]
            sys.stdout.write(json.dumps(found._asdict() | {"rows": rows}) + "\n")
        else:
            _print_info(source)


@app.command()
def demo(
    target: Annotated[Path, typer.Option("--out", help="the .lnq file to write")] = Path(
        "demo.lnq"
    ),
    every: Annotated[
        bool, typer.Option("--all", help="the pipelines in full: about four minutes")
    ] = False,
) -> None:
    """Compress a small trained network that ships with lnq, and measure what it costs."""
    with _one_line_errors():
        if not every:  # it compiles more than it computes
            os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
        from lnq import demo as shipped

        with _bar("demo") as progress:
            table = shipped.run(target, progress, full=every)
        out.print(table)
        out.print(f"the last row is {target}; see `lnq info {target}`", highlight=False)


def main() -> None:
    app()


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        err.print(
            f"lnq: {' '.join(str(error).split())}", style="red", highlight=False, markup=False
        )
        raise typer.Exit(1) from error


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on standard error, as a callback."""
    columns = (
        *Progress.get_default_columns()[:3],
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err, transient=True) as bars:
        task = bars.add_task(what, total=None, note="")
        yield lambda done, total, note: bars.update(task, completed=done, total=total, note=note)


def _function(name: str | None) -> Callable[[Any, Any], Any]:
    """What ``package.module:name`` names; the current folder is looked in too."""
    module, _, attribute = (name or "").partition(":")
    sys.path.insert(0, "")
    if not attribute or not hasattr(import_module(module), attribute):
        raise ValueError(f"--model {name}: give package.module:function, and let it exist")
    return getattr(import_module(module), attribute)


def _examples(path: Path | None) -> Any:
    import numpy as np

    if path is None or path.suffix not in (".npy", ".npz"):
        raise ValueError(f"--calib {path}: give a .npy array or an .npz of named arrays")
    loaded = np.load(path, allow_pickle=False)
    return loaded if path.suffix == ".npy" else dict(loaded)


def _print_info(path: Path) -> None:
    import lnq

    found = lnq.info(path)
    table = Table("leaf", "shape", "dtype", "codes", box=None, header_style="bold")
    for name in ("bytes", "bits/weight"):
        table.add_column(name, justify="right")
    for row in found.rows:
        shape = "x".join(map(str, row.shape))
        bits = f"{row.bits_per_weight:.2f}" if row.shape else ""
        table.add_row(row.path, shape, row.dtype, row.codes, f"{row.bytes:,}", bits)
    out.print(table)
    out.print(
        f"{found.bytes:,} bytes, {found.weights:,} weights, {found.bits_per_weight:.3f} bits per "
        f"weight, {found.ratio:.2f} times smaller than {found.original_bytes:,} bytes",
        highlight=False,
    )
