"""The coder against a scalar decoder, the entropy it must come close to, and damaged input."""

import functools
import hashlib

import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lnq import ans

PER_LANE = 3  # the last of three lanes is not full
SHAPE = (7, 1999)  # one for all, so that they share compiled programs


def laplace(b, shape=SHAPE, seed=0, dtype=np.int32):
    return np.round(np.random.default_rng(seed).laplace(0, b, shape)).astype(dtype)


def integers(low, high, dtype=np.int32):
    return np.random.default_rng(1).integers(low, high, SHAPE).astype(dtype)


def outliers():
    codes = integers(0, 4)
    codes[::2, 5] = [-(10**6), 10**6, 99_999, 10**6]
    return codes


SEGMENTS = {
    "constant": np.full(SHAPE, 7, np.int8),
    "zeros": np.zeros(SHAPE, np.int16),
    "one symbol": np.array([[-3]], np.int8),
    "two symbols, one of them rare": integers(0, 1000, np.int16) // 999,
    "a byte": integers(0, 256, np.uint8),
    "more symbols than slots": integers(0, 6000),
    "nothing but escapes": integers(-(2**31), 2**31),
    "the ends of int32": np.array([-(2**31), 2**31 - 1, -1])[integers(0, 3)].astype(np.int32),
    "rare outliers": outliers(),
    "two spreads": laplace(np.array([[0.3]] * 3 + [[40.0]] * 4), dtype=np.int16),
}
every_kind = pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS.keys())


def coded(segments, per_lane=PER_LANE, max_classes=64):
    tables = ans.fit_tables([segments], max_classes)
    return ans.encode(segments, ans.classify(segments, tables), tables, per_lane), tables


def payload_bits(stream):
    parts = (stream.words, stream.states, stream.lengths, stream.escapes)
    return 8 * sum(part.nbytes for part in parts)


def class_entropy_bits(segments, classes):
    return sum(oracles.entropy_bits(segments[classes == name]) for name in np.unique(classes))


@every_kind
def test_decoding_gives_back_every_integer(segments):
    stream, tables = coded(segments)
    decoded = ans.decode(stream, ans.decode_tables(tables), segments.shape[1], PER_LANE)
    np.testing.assert_array_equal(decoded, segments)


@every_kind
def test_a_scalar_decoder_reads_the_same_stream(segments):
    stream, tables = coded(segments)
    decoded = oracles.rans_decode(stream, tables, segments.shape[1], PER_LANE)
    np.testing.assert_array_equal(decoded, segments)


@settings(max_examples=10, deadline=None)
@given(
    hnp.arrays(np.int8, (7, 32), elements=st.integers(0, 7)),
    st.sampled_from([np.int8, np.int16, np.int32]),
    st.integers(-100, 100),
)
def test_decode_inverts_encode(segments, dtype, offset):
    every_symbol = np.arange(32) % 8  # so that all examples share compiled programs
    segments = (np.vstack([segments, every_symbol]) + offset).astype(dtype)
    stream, tables = coded(segments, max_classes=1)
    np.testing.assert_array_equal(oracles.rans_decode(stream, tables, 32, PER_LANE), segments)
    decoded = ans.decode(stream, ans.decode_tables(tables), 32, PER_LANE)
    np.testing.assert_array_equal(decoded, segments)


@every_kind
def test_packed_streams_and_tables_come_back(segments):
    stream, tables = coded(segments)
    again = ans.unpack_tables(ans.pack_tables(tables))
    assert again.precision == tables.precision
    for mine, theirs in zip(
        again.symbols + again.freqs, tables.symbols + tables.freqs, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs, strict=True)
    data = ans.pack_stream(stream, tables)
    sizes = len(segments), len(stream.states), len(stream.escapes)
    for mine, theirs in zip(
        ans.unpack_stream(data, tables, *sizes, segments.dtype), stream, strict=True
    ):
        np.testing.assert_array_equal(mine, theirs, strict=True)


@every_kind
def test_every_class_has_a_whole_table(segments):
    tables = ans.fit_tables([segments])
    assert tables.symbols[0].tolist() == [0]
    for symbols, freqs in zip(tables.symbols, tables.freqs, strict=True):
        assert freqs.sum() == 1 << tables.precision
        assert freqs.min() >= 1
        assert (np.diff(symbols.astype(np.int64)) > 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=60), st.integers(6, 12))
def test_frequencies_fill_the_slots_and_are_no_worse_than_rounding(counts, precision):
    counts = np.array(counts, np.float64)
    freqs = ans._frequencies(counts, precision)
    assert freqs.sum() == 1 << precision
    assert freqs.min() >= 1
    saved = counts @ np.log2(freqs / oracles.largest_remainder(counts, precision))
    assert saved >= -1e-9 * counts.sum()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(50, 1000), min_size=1, max_size=12))
def test_frequencies_are_the_best_where_every_symbol_earns_a_slot(counts):
    counts = np.array(counts, np.float64)
    saved = counts @ np.log2(ans._frequencies(counts, 8) / oracles.best_frequencies(counts, 8))
    assert saved >= -1e-9 * counts.sum()


@pytest.mark.parametrize(
    ("counts", "bits"),
    [([], 0), ([5], 0), ([0, 5, 0], 0), ([1] * 256, 2048), ([2, 1, 1], 6), ([4, 2, 1, 1], 14)],
    ids=["none", "one", "zeros", "uniform", "halves", "geometric"],
)
def test_entropy_of_known_histograms(counts, bits):
    assert ans.entropy_bits(np.array(counts)) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    "codes",
    [*SEGMENTS.values(), np.zeros(0, np.int8), np.array([-128, 127], np.int8)],
    ids=[*SEGMENTS.keys(), "empty", "the ends of int8"],
)
def test_histogram_and_entropy_match_a_dict(codes):
    symbols, counts = ans.histogram(codes)
    expected = np.unique(codes, return_counts=True)
    np.testing.assert_array_equal(symbols, expected[0])
    np.testing.assert_array_equal(counts, expected[1])
    assert ans.entropy_bits(counts) == pytest.approx(oracles.entropy_bits(codes), rel=1e-12)


@functools.cache
def laplace_stream(b, shape):
    segments = laplace(b, shape, dtype=np.int16)
    per_lane = ans.lane_segments(oracles.entropy_bits(segments), *shape)
    return segments, per_lane, *coded(segments, per_lane)


@pytest.mark.parametrize(("b", "bits"), [(0.43, 1.4), (1.18, 2.7), (6.0, 5.0)])
@pytest.mark.parametrize(
    ("shape", "excess", "bytes_per_lane"),
    [((1024, 1024), 0.005, 0), ((64, 256), 0.01, 4)],
    ids=["2^20 codes", "2^14 codes"],
)
def test_a_stream_is_as_long_as_the_entropy(b, bits, shape, excess, bytes_per_lane):
    segments, _, stream, _ = laplace_stream(b, shape)
    assert oracles.entropy_bits(segments) / segments.size == pytest.approx(bits, abs=0.1)
    ideal = class_entropy_bits(segments, stream.classes)
    most = (1 + excess) * ideal + 8 * bytes_per_lane * len(stream.states)
    assert ideal - 1 <= payload_bits(stream) <= most


def test_a_million_codes_come_back():
    segments, per_lane, stream, tables = laplace_stream(1.18, (1024, 1024))
    decoded = ans.decode(stream, ans.decode_tables(tables), 1024, per_lane, segments.dtype)
    np.testing.assert_array_equal(decoded, segments, strict=True)


def test_segments_of_zeros_cost_their_lanes_and_nothing_else():
    stream, _ = coded(SEGMENTS["zeros"])
    assert payload_bits(stream) == 48 * len(stream.states) == 48 * 3
    half = np.concatenate([SEGMENTS["zeros"][:3], laplace(3)[3:]])
    assert (coded(half)[0].lengths == 0).tolist() == [True, False, False]


def test_segments_of_unlike_spread_cost_less_in_classes_of_their_own():
    spreads = np.random.default_rng(2).permutation([0.4] * 300 + [9.0] * 300)
    segments = laplace(spreads[:, None], (600, 256))

    def size(max_classes):
        stream, tables = coded(segments, per_lane=60, max_classes=max_classes)
        return 8 * (len(ans.pack_stream(stream, tables)) + len(ans.pack_tables(tables)))

    apart = sum(oracles.entropy_bits(segments[spreads == b]) for b in (0.4, 9.0))
    assert size(64) < 1.01 * apart < oracles.entropy_bits(segments) < size(1)


def test_tables_depend_on_the_integers_only():
    segments = laplace([[0.5], [5.0]] * 20, (40, 256))
    tables = ans.pack_tables(ans.fit_tables([segments, segments[:3]]))
    narrow = segments.astype(np.int8)
    assert ans.pack_tables(ans.fit_tables([narrow, narrow[:3]])) == tables


def test_bytes_of_a_stream_are_pinned():
    """Regression values: a change of theirs is a change of the file format."""
    segments = np.concatenate([np.arange(6000) % 3 - 1, np.arange(6000) ** 2 % 41]).reshape(60, 200)
    segments[0, 0] = 99_999
    stream, tables = coded(segments, per_lane=20)
    assert (len(tables.freqs), stream.escapes.tolist()) == (3, [99_999])
    assert stream.words[:4].tolist() == [17823, 5613, 11924, 10804]
    data = ans.pack_tables(tables) + ans.pack_stream(stream, tables)
    assert (
        hashlib.sha256(data).hexdigest()
        == "ae7b3ad51ce635d68a8cf854755711e80b2a7d076da8c650e82186c5efb1c875"
    )


def test_tensors_of_one_shape_and_about_one_rate_share_a_compiled_decoder():
    shape = (44, 251)
    tensors = [laplace(b, shape, seed).clip(-5, 5) for seed, b in enumerate((0.98, 1.0, 1.02))]
    tables = ans.fit_tables(tensors)
    expanded = ans.decode_tables(tables)
    before = ans._pull._cache_size()
    for segments in tensors:
        per_lane = ans.lane_segments(oracles.entropy_bits(segments), *shape)
        stream = ans.encode(segments, ans.classify(segments, tables), tables, per_lane)
        np.testing.assert_array_equal(ans.decode(stream, expanded, shape[1], per_lane), segments)
    assert ans._pull._cache_size() == before + 1


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1e9), st.integers(1, 10**6), st.integers(1, ans.MAX_LANE))
def test_lanes_are_never_longer_than_their_counters(bits, segments, segment):
    per_lane = ans.lane_segments(bits, segments, segment)
    assert 1 <= per_lane <= segments
    assert per_lane * segment <= ans.MAX_LANE


def damaged(stream, field, index, bit):
    array = getattr(stream, field).copy()
    array[index % len(array)] ^= array.dtype.type(1 << bit % (8 * array.itemsize))
    return stream._replace(**{field: array})


damage = st.tuples(
    st.sampled_from(["words", "states", "lengths"]), st.integers(0, 1000), st.integers(0, 31)
)


@settings(max_examples=50, deadline=None)
@given(damage)
def test_a_damaged_stream_is_an_error_or_other_symbols(damage):
    segments = SEGMENTS["rare outliers"]
    stream, tables = coded(segments)
    try:
        decoded = ans.decode(
            damaged(stream, *damage), ans.decode_tables(tables), SHAPE[1], PER_LANE
        )
    except ValueError:
        return
    assert decoded.shape == segments.shape
    assert (np.asarray(decoded) != segments).any()


def test_cut_or_misread_streams_are_errors():
    segments = SEGMENTS["rare outliers"]
    stream, tables = coded(segments)
    data = ans.pack_stream(stream, tables)
    sizes = len(segments), len(stream.states), len(stream.escapes)
    for length in [0, 1, 7, 100, len(data) // 2, len(data) - 1]:
        with pytest.raises(ValueError, match=r"bytes do not hold 7 segments|are impossible"):
            ans.unpack_stream(data[:length], tables, *sizes)
    one_word_less = ans.unpack_stream(data[:-2], tables, *sizes)
    with pytest.raises(ValueError, match="a lane does not end where it must; the stream is corr"):
        ans.decode(one_word_less, ans.decode_tables(tables), SHAPE[1], PER_LANE)
    for wrong in [(-1, 3, 0), (7, 0, 0), (7, 3, -1), (10**12, 3, 0), (7, 10**12, 0)]:
        with pytest.raises(ValueError, match="bytes do not hold"):
            ans.unpack_stream(data, tables, *wrong)


def test_a_class_without_a_table_is_an_error():
    tables = ans.Tables(1, (np.zeros(1, np.int32),) * 3, (np.array([2]),) * 3)
    assert ans.unpack_stream(b"\xaa" * 5, tables, segments=4, lanes=1).classes.tolist() == [2] * 4
    with pytest.raises(ValueError, match="classes of the segments are impossible"):
        ans.unpack_stream(b"\xff" * 5, tables, segments=4, lanes=1)


numbers = st.integers(0, 20) | st.integers(0, 2**40) | st.sampled_from([2**31, 2**32, 2**32 + 1])
tables_like = st.tuples(st.integers(1, 5), st.integers(0, 3), st.lists(numbers)).map(
    lambda parts: b"".join(map(ans._leb128, [parts[0], parts[1], *parts[2]]))
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | tables_like)
def test_any_bytes_are_sound_tables_or_an_error(data):
    try:
        tables = ans.unpack_tables(data)
    except ValueError:
        return
    assert 1 <= tables.precision <= 14
    for symbols, freqs in zip(tables.symbols, tables.freqs, strict=True):
        assert freqs.sum() == 1 << tables.precision
        assert freqs.min() >= 1
        assert (np.diff(symbols.astype(np.int64)) > 0).all()


@pytest.mark.parametrize(
    "numbers",
    [
        [4, 1, 2, 2**32 + 1, 16],
        [4, 1, 4, 0, 8, 0, 2**31, 8],
        [4, 1, 4, 0, 8, 0, 0, 8],
        [4, 1, 3, 8, 2**32 - 1, 8],
        [4, 1, 2, 0, 15],
        [4, 1, 0],
        [4, 1, 34],
        [15, 0],
        [4, 256],
        [4, 1, 2**100],
    ],
    ids=[
        "a symbol below int32",
        "a symbol above int32",
        "a symbol twice",
        "the escape twice",
        "slots left over",
        "no symbol",
        "more symbols than slots",
        "precision",
        "classes",
        "a number too long",
    ],
)
def test_impossible_tables_are_errors(numbers):
    with pytest.raises(ValueError, match="no tables"):
        ans.unpack_tables(b"".join(map(ans._leb128, numbers)))


def test_cut_tables_are_errors():
    data = ans.pack_tables(ans.fit_tables([SEGMENTS["rare outliers"]]))
    for length in range(len(data)):
        with pytest.raises(ValueError, match="the numbers end early"):
            ans.unpack_tables(data[:length])


def test_classify_refuses_a_symbol_without_a_code():
    tables = ans.fit_tables([np.full((3, 4), 5)])
    with pytest.raises(ValueError, match="holds a symbol that no class has a code for"):
        ans.classify(np.array([[5, 6]]), tables)


def test_encode_refuses_lanes_too_long_to_count():
    segments = np.zeros((2, 40_000), np.int8)
    with pytest.raises(ValueError, match="at most 65535 symbols in a lane"):
        coded(segments, per_lane=2)
