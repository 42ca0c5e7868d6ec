"""Slow obvious twins, in NumPy float64 and plain Python, of what lnq does fast."""

import math
from collections import Counter

import numpy as np

from lnq import ans


def spread(field, shape):
    """A field of a grid, one entry per code."""
    field = np.asarray(field, np.float64)
    places = [np.arange(n) * m // n for m, n in zip(field.shape, shape, strict=True)]
    return field[np.ix_(*places)]


def step(qparams, shape):
    scale = spread(qparams.scale, shape)
    return scale if qparams.in_scale is None else scale * spread(qparams.in_scale, shape)


def quantize(x, qparams):
    """Codes; ties to even, as NumPy rounds."""
    x = np.asarray(x, np.float64)
    q = np.round(x / step(qparams, x.shape) + spread(qparams.zero_point, x.shape))
    return np.clip(q, spread(qparams.qmin, x.shape), spread(qparams.qmax, x.shape))


def dequantize(codes, qparams):
    codes = np.asarray(codes, np.float64)
    return (codes - spread(qparams.zero_point, codes.shape)) * step(qparams, codes.shape)


def entropy_bits(values):
    """Order-0 entropy of integers, bits in total."""
    counts = Counter(np.asarray(values).ravel().tolist())
    total = sum(counts.values())
    return sum(-n * math.log2(n / total) for n in counts.values())


def rans_decode(stream, tables, segment, per_lane):
    """One symbol at a time, in Python's integers; asserts that every lane ends where it must."""
    classes, words = stream.classes.tolist(), stream.words.tolist()
    escapes = iter(stream.escapes.tolist())
    slots, place, rows = 1 << tables.precision, 0, []
    for lane, (state, length) in enumerate(
        zip(stream.states.tolist(), stream.lengths.tolist(), strict=True)
    ):
        end = place + length
        for name in classes[lane * per_lane : (lane + 1) * per_lane]:
            symbols, freqs = tables.symbols[name].tolist(), tables.freqs[name].tolist()
            row = []
            for _ in range(segment):
                slot, owner = state % slots, 0
                while slot >= freqs[owner]:
                    slot -= freqs[owner]
                    owner += 1
                state = freqs[owner] * (state // slots) + slot
                if state < 1 << 16:
                    state = state << 16 | words[place]
                    place += 1
                row.append(next(escapes) if symbols[owner] == ans.ESCAPE else symbols[owner])
            rows.append(row)
        assert state == 1 << 16
        assert place == end
    assert next(escapes, None) is None
    return np.array(rows, np.int64).reshape(-1, segment)


def largest_remainder(counts, precision):
    """Frequencies by rounding: floors, at least 1; the rest to the largest remainders."""
    slots = 1 << precision
    exact = counts * slots / counts.sum()
    freqs = np.maximum(1, np.floor(exact)).astype(np.int64)
    while freqs.sum() < slots:
        freqs[np.argmax(exact - freqs)] += 1
    while freqs.sum() > slots:
        freqs[np.argmax(freqs)] -= 1
    return freqs


def best_frequencies(counts, precision):
    """Frequencies of least cost: from 1 each, every slot to where it saves most (concave gains)."""
    freqs = np.ones(len(counts), np.int64)
    for _ in range((1 << precision) - len(counts)):
        freqs[np.argmax(counts * np.log2(1 + 1 / freqs))] += 1
    return freqs
