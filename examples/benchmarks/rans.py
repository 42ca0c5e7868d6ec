"""lnq's coder against constriction and zstandard: size, encoding and decoding speed.

    python examples/benchmarks/rans.py --json docs/results/rans.json

Codes the same rounded Laplace values with each, checks that all come back, then takes turns, so
that a slow moment of the machine hits every coder. What is timed:

* lnq: encoding is `classify`, `encode` and `pack_stream`, decoding `unpack_stream` and `decode`
  with its checks, on JAX's default device; tables are fitted (shown apart) and expanded before.
* constriction: `AnsCoder` with one `Categorical` model made from the histogram before, on int32.
* zstandard: int8 bytes in, bytes out; it models what it sees.

Sizes are everything a decoder needs: lnq's include its tables, constriction's 16 bits for each
count of the histogram.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import constriction
import jax
import jax.numpy as jnp
import numpy as np
import zstandard
from machine import write_json
from rich.console import Console
from rich.table import Table

from lnq import ans

coding: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]

SYMBOLS = 1 << 23
SMALL = (1 << 20, 1 << 14)
SPREADS = (0.45, 1.2, 6.0)  # Laplace diversity b in steps: about 1.4, 2.7 and 5 bits
SEGMENT = 1024
RUNS = 5


class Coder(NamedTuple):
    """One contestant: ``decode(encode())`` gives ``symbols`` back."""

    name: str
    symbols: np.ndarray
    encode: Callable[[], Any]
    decode: Callable[[Any], Any]
    table_bytes: int


def laplace_codes(b: float, count: int) -> np.ndarray:
    """Rounded Laplace values, int8."""
    values = np.random.default_rng(0).laplace(scale=b, size=count)
    return np.clip(np.round(values), -127, 127).astype(np.int8)


def entropy(codes: np.ndarray) -> float:
    """Order-0 entropy; bits in total."""
    return ans.entropy_bits(ans.histogram(codes)[1])


def lnq_coder(codes: np.ndarray) -> Coder:
    segments = codes.reshape(-1, SEGMENT)
    tables = ans.fit_tables([segments])
    expanded = ans.decode_tables(tables)
    per_lane = ans.lane_segments(entropy(codes), *segments.shape)
    lanes = -(-len(segments) // per_lane)

    def encode() -> tuple[bytes, int]:
        stream = ans.encode(segments, ans.classify(segments, tables), tables, per_lane)
        return ans.pack_stream(stream, tables), len(stream.escapes)

    def decode(coded: tuple[bytes, int]) -> jax.Array:
        data, escapes = coded
        stream = ans.unpack_stream(data, tables, len(segments), lanes, escapes, np.int8)
        return jax.block_until_ready(ans.decode(stream, expanded, SEGMENT, per_lane, jnp.int8))

    return Coder("lnq", codes, encode, decode, len(ans.pack_tables(tables)))


def constriction_coder(codes: np.ndarray) -> Coder:
    symbols = codes.astype(np.int32) - int(codes.min())
    counts = np.bincount(symbols)
    model = coding.model.Categorical(counts / counts.sum(), perfect=False)

    def encode() -> tuple[np.ndarray, int]:
        coder = coding.stack.AnsCoder()
        coder.encode_reverse(symbols, model)
        return coder.get_compressed(), 0

    def decode(coded: tuple[np.ndarray, int]) -> np.ndarray:
        return coding.stack.AnsCoder(coded[0]).decode(model, len(symbols))

    return Coder("constriction", symbols, encode, decode, 2 * len(counts))


def zstandard_coder(codes: np.ndarray, level: int) -> Coder:
    data = codes.tobytes()
    compressor, decompressor = zstandard.ZstdCompressor(level), zstandard.ZstdDecompressor()

    def decode(coded: tuple[bytes, int]) -> np.ndarray:
        return np.frombuffer(decompressor.decompress(coded[0]), np.int8)

    return Coder(
        f"zstandard {level}", codes, lambda: (compressor.compress(data), 0), decode, table_bytes=0
    )


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def size(coder: Coder, coded: Any) -> int:
    """Bytes of a stream and its tables."""
    return memoryview(coded[0]).nbytes + coder.table_bytes


def compare(b: float) -> list[dict[str, Any]]:
    """One row per coder on the same codes."""
    codes = laplace_codes(b, SYMBOLS)
    coders = [lnq_coder(codes), constriction_coder(codes)]
    coders += [zstandard_coder(codes, level) for level in (1, 3)]
    coded = [coder.encode() for coder in coders]
    for coder, found in zip(coders, coded, strict=True):
        if not np.array_equal(np.ravel(coder.decode(found)), coder.symbols):
            raise AssertionError(f"{coder.name} does not give back what it was given")
    rounds = [
        [(seconds(c.encode), seconds(lambda c=c, x=x: c.decode(x))) for c, x in contest]
        for contest in [list(zip(coders, coded, strict=True))] * RUNS
    ]
    rows = []
    for i, (coder, found) in enumerate(zip(coders, coded, strict=True)):
        encoding, decoding = (median(run[i][j] for run in rounds) for j in (0, 1))
        rows.append(
            {
                "b": b,
                "entropy": entropy(codes) / SYMBOLS,
                "coder": coder.name,
                "size_over_entropy": 8.0 * size(coder, found) / entropy(codes),
                "encode_msymbols": SYMBOLS / encoding / 1e6,
                "decode_msymbols": SYMBOLS / decoding / 1e6,
            }
        )
    rival = next(row for row in rows if row["coder"] == "constriction")
    for row in rows:
        for verb in ("encode", "decode"):
            row[f"{verb}_over_constriction"] = row[f"{verb}_msymbols"] / rival[f"{verb}_msymbols"]
    segments = codes.reshape(-1, SEGMENT)
    fitting = median(seconds(lambda: ans.fit_tables([segments])) for _ in range(RUNS))
    rows[0]["fit_msymbols"] = SYMBOLS / fitting / 1e6
    return rows


def small_leaf(b: float, count: int) -> dict[str, Any]:
    """What a leaf that is alone in its file takes over its entropy."""
    codes = laplace_codes(b, count)
    coder = lnq_coder(codes)
    coded = coder.encode()
    if not np.array_equal(np.ravel(coder.decode(coded)), codes):
        raise AssertionError("lnq does not give back what it was given")
    bits = entropy(codes)
    return {
        "symbols": count,
        "b": b,
        "entropy": bits / count,
        "stream_over_entropy": 8.0 * len(coded[0]) / bits,
        "size_over_entropy": 8.0 * size(coder, coded) / bits,
    }


def percent_over(ratio: float) -> str:
    return f"{100.0 * (ratio - 1.0):+.2f} %"


def speed_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "bits", "coder", "size", "encode", "decode", "encode/c.", "decode/c.", "fit",
        title=f"{SYMBOLS:,} int8 codes: bits of entropy and size over it; Msymbols/s, median of "
        f"{RUNS}, and over constriction's (/c.)",
    )  # fmt: skip
    for row in rows:
        table.add_row(
            f"{row['entropy']:.2f}",
            row["coder"],
            percent_over(row["size_over_entropy"]),
            f"{row['encode_msymbols']:.1f}",
            f"{row['decode_msymbols']:.1f}",
            f"{row['encode_over_constriction']:.2f}",
            f"{row['decode_over_constriction']:.2f}",
            f"{row['fit_msymbols']:.1f}" if "fit_msymbols" in row else "",
        )
    return table


def size_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("symbols", "bits", "stream", "with tables", title="lnq, one leaf; over entropy")
    for row in rows:
        table.add_row(
            f"{row['symbols']:,}",
            f"{row['entropy']:.2f}",
            percent_over(row["stream_over_entropy"]),
            percent_over(row["size_over_entropy"]),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    console = Console(width=110)
    speed = [row for b in SPREADS for row in compare(b)]
    console.print(speed_table(speed))
    small = [small_leaf(b, count) for count in SMALL for b in SPREADS]
    console.print(size_table(small))
    results = {"symbols": SYMBOLS, "runs": RUNS, "coders": speed, "small_leaves": small}
    write_json(args.json, results, "jax", "numpy", "constriction", "zstandard")


if __name__ == "__main__":
    main()
