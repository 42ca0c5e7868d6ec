r"""Interleaved rANS: integer codes to as many bits as their entropy, decoded on the accelerator.

A rANS coder is a stack: it keeps one integer, the state, and pushing a symbol of probability
:math:`p` multiplies it by about :math:`1/p`. Whole symbols thus cost fractions of bits, which a
Huffman code cannot do, and unlike an arithmetic coder's the inner loop is one multiplication.

A *segment* is a run of ``S`` symbols that shares one static table, named by its *class*: segments
of alike spread share a class, which is where the adaptive gain comes from. Class 0 is the table
in which zero is certain; it costs nothing and fills up what is not there. Segments are dealt in
order to *lanes*, ``R`` to each; every lane has its own state (32 bits, at least 2**16) and its own
words (16 bits), so that a decoding step is two gathers over all lanes and nothing crosses them:

.. math::
    \text{slot} = x \bmod 2^P, \qquad
    x \leftarrow f \lfloor x / 2^P \rfloor + \text{slot} - c, \qquad
    x < 2^{16} \Rightarrow x \leftarrow 2^{16} x + \text{word},

where the symbol that owns the slot has frequency :math:`f / 2^P` and starts at slot :math:`c`.
Symbols too rare to earn a slot are coded as an escape and stored raw.

Source: Duda, `Asymmetric numeral systems <https://arxiv.org/abs/1311.2540>`_, 2013; Giesen,
`Interleaved entropy coders <https://arxiv.org/abs/1402.3392>`_, 2014. RIQ's authors use tANS with
one small table per tensor. On Gaussian and Laplace codes this coder stays within 0.5 % of the
entropy (``examples/benchmarks/rans.py``); very heavy tails cost more.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

__all__ = [
    "ESCAPE",
    "DecodeTables",
    "Stream",
    "Tables",
    "classify",
    "decode",
    "decode_tables",
    "encode",
    "entropy_bits",
    "fit_tables",
    "histogram",
    "lane_segments",
    "pack_stream",
    "pack_tables",
    "unpack_stream",
    "unpack_tables",
]

ESCAPE = -(2**31)
"""The symbol that stands for all that a table leaves out."""
STATE_MIN = 1 << 16
MAX_LANE = (1 << 16) - 1
"""Symbols per lane at most, so that its number of words fits 16 bits."""
LANE_BITS = 16_000
"""Aimed at: lanes enough to be fast, the 48 bits of state and length per lane at most 0.4 %."""
ENTRY_BITS = 12
"""What one entry of a stored table costs."""
RAW_BITS = 16
"""What an escaped symbol is taken to cost beside its escape."""
COST_UNIT = 1 << 8
"""Code lengths are counted in whole 256ths of a bit: such sums are exact on every machine."""
NEVER = 1 << 24
"""Code length of what a table cannot code, in that unit."""
CELLS = 1 << 22
"""Entries of the largest table of counts held at once."""


class Tables(NamedTuple):
    """Static tables of all classes; class 0, in which zero is certain, included.

    Attributes:
      precision: P; the frequencies of a class sum to ``2**P``.
      symbols: Per class, sorted distinct int32; :data:`ESCAPE` sorts first where present.
      freqs: Per class, int64, at least 1 each.
    """

    precision: int
    symbols: tuple[np.ndarray, ...]
    freqs: tuple[np.ndarray, ...]


class Stream(NamedTuple):
    """Coded segments.

    Attributes:
      classes: Class of each segment; uint8, ``[segments]``.
      lengths: Words of each lane; uint16, ``[lanes]``.
      states: State of each lane before the first symbol is decoded; uint32, ``[lanes]``.
      words: The lanes' words, one lane after the other; uint16.
      escapes: Raw symbols in order, in the dtype they came in.
    """

    classes: np.ndarray
    lengths: np.ndarray
    states: np.ndarray
    words: np.ndarray
    escapes: np.ndarray


class DecodeTables(NamedTuple):
    """Tables as a decoder wants them, one entry per class and slot.

    Attributes:
      precision: P.
      steps: Frequency minus one above, slot minus start in the low 16 bits; uint32, ``[C << P]``.
      symbols: int32, ``[C << P]``.
    """

    precision: int
    steps: jax.Array
    symbols: jax.Array


def histogram(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct integers, sorted, and how often each occurs.

    Example:
      >>> histogram(np.array([3, -1, 3]))
      (array([-1,  3]), array([1, 2]))
    """
    codes = np.asarray(codes).ravel()
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if high - low > max(codes.size, 1 << 16):
        return np.unique(codes, return_counts=True)
    counts = np.bincount(codes.astype(np.int64) - low) if codes.size else np.zeros(0, np.int64)
    present = np.flatnonzero(counts)
    return present + low, counts[present]


def entropy_bits(counts: np.ndarray) -> float:
    """Order-0 entropy of a histogram; bits in total, not per symbol.

    Example:
      >>> entropy_bits(np.array([2, 1, 1]))
      6.0
    """
    counts = np.asarray(counts, np.float64)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) if counts.size else 0.0


def fit_tables(groups: Sequence[np.ndarray], max_classes: int = 64) -> Tables:
    """Tables for all segments of a file, in as many classes as pay for themselves.

    From a start that sorts segments by mean magnitude, gives in turn each segment the class that
    codes it in fewest bits and each class the histogram of its segments. The number of classes
    doubles while symbols, stored tables and class names together still shrink.

    Args:
      groups: Integer segments, arrays of shape ``[segments, S]`` with any S each.
      max_classes: Most classes tried, at most 128.
    """
    groups = [group for group in groups if group.size]
    alphabet, precision = _alphabet(groups)
    zero = Tables(precision, (np.zeros(1, np.int32),), (np.array([1 << precision]),))
    if not groups:
        return zero
    segments = sum(map(len, groups))
    stride = 1 + segments * len(alphabet) // CELLS
    sample = np.concatenate([_counts(group[::stride], alphabet) for group in groups])
    magnitude = np.abs(np.where(alphabet == ESCAPE, alphabet[-1], alphabet))
    order = np.argsort(sample @ magnitude / sample.sum(1), kind="stable")
    costs, best = _refine(sample, order, alphabet, 1, segments)
    classes = 2
    while classes <= min(max_classes, len(sample)):
        tried, bits = _refine(sample, order, alphabet, classes, segments)
        if bits >= best:
            break
        costs, best, classes = tried, bits, 2 * classes
    hists = _class_histograms(groups, alphabet, costs)[1:]
    built = [_table(alphabet, hist, precision) for hist in hists if hist.any()]
    return zero._replace(
        symbols=zero.symbols + tuple(symbols for symbols, _ in built),
        freqs=zero.freqs + tuple(freqs for _, freqs in built),
    )


def classify(segments: np.ndarray, tables: Tables) -> np.ndarray:
    """The class that codes each segment in fewest bits.

    Args:
      segments: Integers, ``[segments, S]``.
      tables: As fitted to these and other segments.

    Returns:
      uint8, ``[segments]``.

    Raises:
      ValueError: If a segment holds a symbol for which no class has a code.
    """
    if len(tables.freqs) == 2 and tables.symbols[1][0] == ESCAPE:
        return np.any(segments, axis=1).astype(np.uint8)  # one table, which codes everything
    alphabet = _union(tables)
    costs = _table_costs(tables, alphabet)
    members = []
    for chunk in _chunks(segments, len(alphabet)):
        bits = _counts(chunk, alphabet) @ costs.T
        members.append(bits.argmin(1))
        if (bits.min(1) >= NEVER).any():
            raise ValueError("classify: a segment holds a symbol that no class has a code for")
    return np.concatenate(members).astype(np.uint8) if members else np.zeros(0, np.uint8)


def lane_segments(bits: float, segments: int, segment: int) -> int:
    """How many segments of ``segment`` symbols to deal to a lane, so that its overhead is small.

    Rounded so that tensors of one shape and about one rate share a compiled decoder.
    """
    symbols = LANE_BITS / max(bits / max(segments * segment, 1), 0.1)
    symbols = min(2.0 ** round(math.log2(symbols)), MAX_LANE)
    return max(1, min(int(symbols / segment), segments))


def encode(segments: np.ndarray, classes: np.ndarray, tables: Tables, per_lane: int) -> Stream:
    """Code segments.

    Args:
      segments: Integers, ``[segments, S]``; S times ``per_lane`` below 2**16.
      classes: Class of each, from :func:`classify`.
      tables: The tables.
      per_lane: Segments of a lane, from :func:`lane_segments`.

    Example:
      >>> segments = np.arange(3000).reshape(-1, 300) % 5
      >>> tables = fit_tables([segments])
      >>> stream = encode(segments, classify(segments, tables), tables, per_lane=10)
      >>> ideal = 3000 * np.log2(5) / 8
      >>> bool(ideal <= len(pack_stream(stream, tables)) <= 1.01 * ideal + 4)
      True
    """
    if not segments.size or segments.shape[1] * per_lane > MAX_LANE:
        raise ValueError(
            f"encode: segments of shape {segments.shape}, {per_lane} to a lane; there must be "
            f"some, and at most {MAX_LANE} symbols in a lane"
        )
    alphabet = _union(tables)
    index = _indices(segments, alphabet)
    pairs, escaped = _encode_pairs(tables, alphabet)
    raw = index == 0
    for kind in np.flatnonzero(escaped[:, 1:].any(1)):  # classes that lack what others have
        rows = classes == kind
        raw[rows] = escaped[kind][index[rows]]
    lanes = -(-len(segments) // per_lane)
    fill = lanes * per_lane - len(segments)
    index = np.pad(index, ((0, fill), (0, 0)), constant_values=np.searchsorted(alphabet, 0))
    states, words, mask = _push(
        index.reshape(lanes, per_lane, -1),
        np.pad(classes, (0, fill)).reshape(lanes, per_lane),
        pairs,
        precision=tables.precision,
    )
    mask = np.asarray(mask)
    return Stream(
        classes,
        np.count_nonzero(mask.reshape(lanes, -1), axis=1).astype(np.uint16),
        np.asarray(states),
        np.asarray(words)[mask],
        segments[raw],
    )


def decode_tables(tables: Tables) -> DecodeTables:
    """Expand tables to one entry per slot."""
    slots = np.arange(1 << tables.precision)
    steps, symbols = [], []
    for values, freqs in zip(tables.symbols, tables.freqs, strict=True):
        owner = np.repeat(np.arange(len(freqs)), freqs)
        starts = np.cumsum(freqs) - freqs
        steps.append((freqs[owner] - 1) << 16 | (slots - starts[owner]))
        symbols.append(values[owner])
    return DecodeTables(
        tables.precision,
        jnp.asarray(np.concatenate(steps), jnp.uint32),
        jnp.asarray(np.concatenate(symbols), jnp.int32),
    )


def decode(
    stream: Stream, tables: DecodeTables, segment: int, per_lane: int, dtype: DTypeLike = jnp.int32
) -> jax.Array:
    """Decode a stream on JAX's default device.

    Args:
      stream: From :func:`encode` or :func:`unpack_stream`.
      tables: Its tables, expanded.
      segment: S, symbols per segment.
      per_lane: Segments of a lane.
      dtype: Integer dtype of the result.

    Returns:
      Symbols, ``[segments, S]``.

    Raises:
      ValueError: If a lane does not end where it must: the stream is corrupt.
    """
    lanes, count = len(stream.states), len(stream.classes)
    ends = np.cumsum(stream.lengths, dtype=np.int64).astype(np.int32)
    classes = np.pad(stream.classes, (0, lanes * per_lane - count)).reshape(lanes, per_lane)
    symbols, states, positions = _pull(
        _padded(stream.words, 1 << 12, octaves=1),
        ends - stream.lengths,
        stream.states,
        classes,
        tables.steps,
        tables.symbols,
        _padded(stream.escapes, 1024 if stream.escapes.size else 0, octaves=2),
        precision=tables.precision,
        segment=segment,
        dtype=dtype,
    )
    if (np.asarray(states) != STATE_MIN).any() or (np.asarray(positions) != ends).any():
        raise ValueError("decode: a lane does not end where it must; the stream is corrupt")
    symbols = symbols.reshape(-1, segment)
    return symbols if len(symbols) == count else symbols[:count]


def pack_stream(stream: Stream, tables: Tables) -> bytes:
    """Little-endian bytes: class names, lengths but the last, states, words, escapes."""
    width = (len(tables.freqs) - 1).bit_length()
    names = np.packbits(stream.classes[:, None] >> np.arange(width) & 1, bitorder="little")
    parts = [names, stream.lengths[:-1], stream.states, stream.words, stream.escapes]
    return b"".join(part.astype(part.dtype.newbyteorder("<")).tobytes() for part in parts)


def unpack_stream(
    data: bytes,
    tables: Tables,
    segments: int,
    lanes: int,
    escapes: int = 0,
    dtype: DTypeLike = np.int32,
) -> Stream:
    """Undo :func:`pack_stream`, given what it does not store.

    Args:
      data: The bytes.
      tables: The tables.
      segments: Number of segments.
      lanes: Number of lanes.
      escapes: Number of escapes.
      dtype: Their dtype.

    Raises:
      ValueError: If the lengths do not add up, or a class does not exist.
    """
    width = (len(tables.freqs) - 1).bit_length()
    sizes = [-(-segments * width // 8), 2 * (lanes - 1), 4 * lanes]
    rest = len(data) - sum(sizes) - escapes * np.dtype(dtype).itemsize
    if lanes < 1 or min(segments, escapes) < 0 or rest < 0 or rest % 2:
        raise ValueError(f"{len(data)} bytes do not hold {segments} segments in {lanes} lanes")
    parts = np.split(np.frombuffer(data, np.uint8), np.cumsum([*sizes, rest]))
    kinds: tuple[DTypeLike, ...] = (np.uint8, np.uint16, np.uint32, np.uint16, dtype)
    _, lengths, states, words, raw = (
        part.copy().view(np.dtype(kind).newbyteorder("<"))
        for part, kind in zip(parts, kinds, strict=True)
    )
    planes = np.unpackbits(parts[0], count=segments * width, bitorder="little")
    classes = planes.reshape(segments, width) @ (1 << np.arange(width))
    last = len(words) - int(lengths.sum(dtype=np.int64))
    if not 0 <= last <= MAX_LANE or (classes >= len(tables.freqs)).any():
        raise ValueError("the lengths of the lanes or the classes of the segments are impossible")
    lengths = np.append(lengths, np.uint16(last))
    return Stream(classes.astype(np.uint8), lengths, states, words, raw)


def pack_tables(tables: Tables) -> bytes:
    """Tables as a run of LEB128 numbers; class 0 is not stored.

    The precision and the number of classes; then per class twice the number of symbols, plus one
    if there is an escape; the escape's frequency; the first symbol (zigzag); and a frequency per
    symbol, before which, if it is not one above the symbol before, stand a zero and the distance.
    """
    numbers = [tables.precision, len(tables.freqs) - 1]
    for symbols, freqs in zip(tables.symbols[1:], tables.freqs[1:], strict=True):
        escape = int(symbols[0] == ESCAPE)
        numbers += [2 * (len(symbols) - escape) + escape, *freqs[:escape].tolist()]
        values, counts = symbols[escape:].tolist(), freqs[escape:].tolist()
        if values:
            numbers += [2 * values[0] if values[0] >= 0 else -2 * values[0] - 1, counts[0]]
        for before, value, count in zip(values, values[1:], counts[1:], strict=False):
            numbers += [count] if value == before + 1 else [0, value - before, count]
    return b"".join(map(_leb128, numbers))


def unpack_tables(data: bytes) -> Tables:
    """Undo :func:`pack_tables`.

    Raises:
      ValueError: If the bytes are no tables.
    """
    numbers = _read_leb128(data)
    precision, classes = next(numbers), next(numbers)
    if not (1 <= precision <= 14 and classes < 256):
        raise ValueError(f"no tables: precision {precision}, {classes} classes")
    all_symbols, all_freqs = [[0]], [[1 << precision]]
    for _ in range(classes):
        count, escape = divmod(next(numbers), 2)
        symbols, freqs = [ESCAPE] * escape, [next(numbers) for _ in range(escape)]
        if count + escape > 1 << precision:
            raise ValueError(f"no tables: {count} symbols in {1 << precision} slots")
        if count:
            first = next(numbers)
            symbols.append(-(first + 1) // 2 if first % 2 else first // 2)
            freqs.append(next(numbers))
        for _ in range(count - 1):
            freq, gap = next(numbers), 1
            if freq == 0:
                gap, freq = next(numbers), next(numbers)
            symbols.append(symbols[-1] + gap)
            freqs.append(freq)
        if sum(freqs) != 1 << precision or 0 in freqs:
            raise ValueError("no tables: the frequencies of a class do not fill its slots")
        if symbols != sorted(set(symbols)) or symbols[0] < ESCAPE or symbols[-1] >= 2**31:
            raise ValueError("no tables: the symbols of a class are not distinct int32 in order")
        all_symbols.append(symbols)
        all_freqs.append(freqs)
    return Tables(
        precision,
        tuple(np.array(symbols, np.int32) for symbols in all_symbols),
        tuple(np.array(freqs, np.int64) for freqs in all_freqs),
    )


@partial(jax.jit, static_argnames="precision")
def _push(
    index: jax.Array, classes: jax.Array, pairs: jax.Array, *, precision: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Push all lanes' symbols, last first: final states, words and where a word was put out.

    ``index [lanes, R, S]`` into ``pairs [C, K]`` (frequency above, start in the low 16 bits).
    """
    flat, width = pairs.ravel(), pairs.shape[1]

    def push(base: jax.Array, x: jax.Array, symbol: jax.Array):
        pair = flat[base + symbol.astype(jnp.int32)]
        freq, start = pair >> 16, pair & 0xFFFF
        full = x >> (32 - precision) >= freq
        word = x.astype(jnp.uint16)
        x = jnp.where(full, x >> 16, x)
        quotient = x // freq
        return (quotient << precision) + (x - quotient * freq) + start, (word, full)

    def segment(x: jax.Array, inputs: tuple[jax.Array, jax.Array]):
        base, symbols = inputs
        return jax.lax.scan(partial(push, base), x, symbols, reverse=True)

    start = jnp.full(index.shape[0], STATE_MIN, jnp.uint32)
    inputs = (classes.T.astype(jnp.int32) * width, index.transpose(1, 2, 0))
    states, (words, full) = jax.lax.scan(segment, start, inputs, reverse=True)
    return states, words.transpose(2, 0, 1), full.transpose(2, 0, 1)


@partial(jax.jit, static_argnames=("precision", "segment", "dtype"))
def _pull(
    words: jax.Array,
    starts: jax.Array,
    states: jax.Array,
    classes: jax.Array,
    steps: jax.Array,
    symbols: jax.Array,
    escapes: jax.Array,
    *,
    precision: int,
    segment: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pull ``R * segment`` symbols from all lanes: symbols ``[lanes, R, S]``, states, positions."""

    def pull(base: jax.Array, carry: tuple[jax.Array, jax.Array], _: None):
        x, position = carry
        slot = x & ((1 << precision) - 1)
        step = jnp.take(steps, base + slot, mode="clip")
        x = ((step >> 16) + 1) * (x >> precision) + (step & 0xFFFF)
        word = jnp.take(words, position, mode="clip").astype(jnp.uint32)
        short = x < STATE_MIN
        position = position + short.astype(position.dtype)
        return (jnp.where(short, x << 16 | word, x), position), slot.astype(jnp.uint16)

    bases = classes.T.astype(jnp.uint32) << precision
    (states, ends), slots = jax.lax.scan(
        lambda carry, base: jax.lax.scan(partial(pull, base), carry, length=segment),
        (states, starts),
        bases,
    )
    found = jnp.take(symbols.astype(dtype), bases[:, None] + slots.astype(jnp.uint32), mode="clip")
    found = found.transpose(2, 0, 1)
    if escapes.size:
        reserved = (symbols.reshape(-1, 1 << precision) == ESCAPE).sum(1)  # slots of each class
        found = _put_escapes(found, slots, reserved[classes].astype(slots.dtype), escapes)
    return found, states, ends


def _put_escapes(
    found: jax.Array, slots: jax.Array, reserved: jax.Array, escapes: jax.Array
) -> jax.Array:
    """Put raw symbols where a slot is the escape's (the lowest); looks only at segments with one.

    ``found [lanes, R, S]``, ``slots [R, S, lanes]``, ``reserved [lanes, R]``.
    """
    segments, segment = reserved.size, found.shape[2]
    hit = (slots.min(1) < reserved.T).T.ravel()
    (rows,) = jnp.nonzero(hit, size=min(segments, escapes.size), fill_value=segments)
    lane, place = jnp.divmod(jnp.minimum(rows, segments - 1), found.shape[1])
    escaped = slots[place, :, lane] < reserved[lane, place][:, None]
    escaped &= (rows < segments)[:, None]
    order = jnp.cumsum(escaped.ravel()).reshape(escaped.shape) - 1
    raw = jnp.take(escapes, order, mode="clip").astype(found.dtype)
    flat = found.reshape(-1, segment)
    filled = jnp.where(escaped, raw, jnp.take(flat, rows, 0, mode="clip"))
    return flat.at[rows].set(filled, mode="drop").reshape(found.shape)


def _alphabet(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Symbols worth a slot, after ESCAPE and with 0, sorted; and the precision they need."""
    hists = [histogram(group) for group in groups]
    symbols, owner = np.unique(np.concatenate([[0], *(h[0] for h in hists)]), return_inverse=True)
    counts = np.bincount(owner[1:], np.concatenate([[], *(h[1] for h in hists)]), len(symbols))
    precision = 12 if counts.sum() < 1 << 20 else 14
    worth = counts * RAW_BITS >= _slot_bits(counts.sum(), precision)
    rank = np.argsort(np.argsort(-counts, kind="stable"), kind="stable")
    kept = symbols[(worth & (rank < 1 << precision - 1)) | (symbols == 0)]
    return np.union1d([ESCAPE], kept), precision


def _slot_bits(total: float, precision: int) -> float:
    """What keeping a rare symbol costs: its entry, and the slot it takes from all others."""
    return ENTRY_BITS + total * math.log2(math.e) / (1 << precision)


def _indices(codes: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
    """Place of each code in the alphabet; 0, the escape's, where it has none."""
    short = np.int16(-(2**15)), np.int16(2**15 - 1)
    if codes.itemsize > 2 and codes.size and short[0] <= codes.min() <= codes.max() <= short[1]:
        codes = codes.astype(np.int16)
    if codes.itemsize > 2:
        return _places(codes, alphabet)
    unsigned = np.dtype(f"u{codes.itemsize}")
    every = np.arange(1 << 8 * codes.itemsize).astype(unsigned).view(codes.dtype)
    return _places(every, alphabet)[codes.view(unsigned)]


def _places(codes: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
    kind = np.uint8 if len(alphabet) <= 256 else np.uint16
    found = np.minimum(np.searchsorted(alphabet, codes), len(alphabet) - 1)
    return np.where(alphabet[found] == codes, found, 0).astype(kind)


def _counts(segments: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
    """Histogram of each segment, float64 ``[segments, len(alphabet)]``."""
    index = _indices(segments, alphabet) + len(alphabet) * np.arange(len(segments))[:, None]
    flat = np.bincount(index.ravel(), minlength=len(segments) * len(alphabet))
    return flat.reshape(len(segments), len(alphabet)).astype(np.float64)


def _chunks(segments: np.ndarray, symbols: int) -> Iterator[np.ndarray]:
    rows = max(1, CELLS // max(symbols, segments.shape[1]))
    return (segments[i : i + rows] for i in range(0, len(segments), rows))


def _refine(
    sample: np.ndarray, order: np.ndarray, alphabet: np.ndarray, classes: int, segments: int
) -> tuple[np.ndarray, float]:
    """Lloyd's iterations: code length of each symbol in each class, and bits of all segments."""
    member = np.empty(len(order), np.int64)
    member[order] = 1 + np.arange(len(order)) * classes // len(order)
    by_class, costs = _update(sample, member, alphabet, classes)
    for _ in range(4):
        by_class, costs = _update(sample, (sample @ costs.T).argmin(1), alphabet, classes)
    coded = (sample @ costs.T).min(1).sum() / COST_UNIT * (segments / len(sample))
    return costs, coded + (by_class > 0).sum() * ENTRY_BITS + segments * classes.bit_length()


def _update(
    sample: np.ndarray, member: np.ndarray, alphabet: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    by_class = _sums(sample, member, classes + 1)[1:]
    return by_class, _smoothed_costs(by_class, alphabet)


def _sums(counts: np.ndarray, member: np.ndarray, classes: int) -> np.ndarray:
    """Histogram of each class, ``[classes, symbols]``."""
    order = np.argsort(member, kind="stable")
    present, starts = np.unique(member[order], return_index=True)
    sums = np.zeros((classes, counts.shape[1]))
    sums[present] = np.add.reduceat(counts[order], starts)
    return sums


def _smoothed_costs(hists: np.ndarray, alphabet: np.ndarray) -> np.ndarray:
    """Code length of each symbol in class 0 and in classes of these histograms, cost units."""
    zero = np.where(alphabet == 0, 0.0, NEVER)
    counts = hists + 0.1
    bits = np.log2(counts.sum(1, keepdims=True) / counts)
    bits[:, 0] += RAW_BITS
    return np.vstack([zero, np.round(bits * COST_UNIT)])


def _class_histograms(
    groups: Sequence[np.ndarray], alphabet: np.ndarray, costs: np.ndarray
) -> np.ndarray:
    """Histogram of each class over all segments, each in its cheapest class."""
    hists = np.zeros_like(costs)
    for group in groups:
        for chunk in _chunks(group, len(alphabet)):
            counts = _counts(chunk, alphabet)
            hists += _sums(counts, (counts @ costs.T).argmin(1), len(costs))
    return hists


def _table(alphabet: np.ndarray, hist: np.ndarray, precision: int) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and frequencies of one class."""
    worth = (hist > 0) & (hist * RAW_BITS >= _slot_bits(hist.sum(), precision))
    worth[0] = False
    if not worth.any():
        worth[1 + hist[1:].argmax()] = True
    rest = hist[~worth].sum()
    escape = [0] if rest else []
    kept = np.flatnonzero(worth)
    counts = np.concatenate([[rest] if rest else [], hist[kept]])
    return alphabet[escape + kept.tolist()].astype(np.int32), _frequencies(counts, precision)


def _frequencies(counts: np.ndarray, precision: int) -> np.ndarray:
    """Whole frequencies, at least 1 each, that sum to ``2**precision`` at least cost in bits.

    Slots change hands while the largest gain of one more exceeds the smallest loss of one less.
    """
    slots = 1 << precision
    freqs = np.maximum(1, np.floor(counts * (slots / counts.sum()))).astype(np.int64)
    while True:
        gain = counts * np.log2(1 + 1 / freqs)
        loss = np.where(freqs > 1, counts * np.log2(freqs / np.maximum(freqs - 1, 1)), np.inf)
        spare = slots - freqs.sum()
        if spare == 0 and gain.max() <= loss.min() * (1 + 1e-12):
            return freqs
        if spare >= 0:
            freqs[gain.argmax()] += 1
        if spare <= 0:
            freqs[loss.argmin()] -= 1


def _union(tables: Tables) -> np.ndarray:
    """All symbols of all classes, sorted, ESCAPE first."""
    return np.unique(np.concatenate([[ESCAPE], *tables.symbols]))


def _dense(tables: Tables, alphabet: np.ndarray, values: Sequence[np.ndarray]) -> np.ndarray:
    """One row per class with ``values`` at its symbols' places, -1 elsewhere."""
    rows = np.full((len(values), len(alphabet)), -1, np.int64)
    for row, symbols, value in zip(rows, tables.symbols, values, strict=True):
        row[np.searchsorted(alphabet, symbols)] = value
    return rows


def _table_costs(tables: Tables, alphabet: np.ndarray) -> np.ndarray:
    """Code length of each symbol in each class, cost units."""
    freqs = _dense(tables, alphabet, tables.freqs)
    bits = np.round(COST_UNIT * (tables.precision - np.log2(np.maximum(freqs, 1))))
    escape = np.where(freqs[:, :1] > 0, bits[:, :1] + RAW_BITS * COST_UNIT, NEVER)
    bits = np.where(freqs > 0, bits, escape)
    bits[:, 0] = escape[:, 0]
    return bits


def _encode_pairs(tables: Tables, alphabet: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and start of each symbol in each class, and whether it is escaped there."""
    starts = [np.cumsum(freqs) - freqs for freqs in tables.freqs]
    pairs = [freqs << 16 | start for freqs, start in zip(tables.freqs, starts, strict=True)]
    dense = _dense(tables, alphabet, pairs)
    escaped = (dense < 0) | (np.arange(len(alphabet)) == 0)
    dense = np.where(escaped, dense[:, :1], dense).astype(np.uint32)
    width = max(256, 1 << (len(alphabet) - 1).bit_length())  # few widths: few programs to compile
    return np.pad(dense, ((0, 0), (0, width - len(alphabet)))), escaped


def _padded(x: np.ndarray, least: int, octaves: int) -> np.ndarray:
    """Zeros up to one of few lengths, so that few programs are compiled."""
    size = least
    while size < len(x):
        size <<= octaves
    return np.pad(x, (0, size - len(x)))


def _leb128(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + _leb128(rest) if rest else bytes([low])


def _read_leb128(data: bytes) -> Iterator[int]:
    number = shift = 0
    for byte in data:
        number |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield number
            number = shift = 0
        elif shift > 63:
            break
    raise ValueError("no tables: the numbers end early")
