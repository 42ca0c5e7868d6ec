"""The file: exact round trips, honest sizes, and no damage that goes unnoticed.

``golden.lnq`` was written by ``lnq.save(GOLDEN, every_kind())``. It must load for ever: where a
change of the code cannot read it, raise the format's version. Where an encoder merely chooses
better, its bytes change and a new file is pinned.
"""

import hashlib
import json
import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import save_file

import lnq
from lnq import container, quantizer, tree
from lnq.quantizer import FakeQuantTensor, QTensor, make_qparams

GOLDEN = Path(__file__).with_name("golden.lnq")
GOLDEN_SHA256 = "2cd39be378754caa33b8d099a638c0a0b2a987304e9f2b0ae008ebef3fe8e3c4"


@jax.tree_util.register_dataclass
@dataclass
class Layer:
    kernel: object
    value: object


def grid(scale_shape, qmin=-8, qmax=7, **fields):
    scale = np.arange(1.0, 1 + np.prod(scale_shape)).reshape(scale_shape) / 8
    return make_qparams(scale, qmin=qmin, qmax=qmax, **fields)


def plain_leaves(rng):
    x = rng.integers(-99, 99, (2, 3)) / 8
    narrow = ("float32", "bfloat16", "float16", "int32", "uint8", "bool", "complex64", "int4")
    wide = ("float64", "int64", "complex128")
    return {
        "arrays": {name: jnp.asarray(np.abs(x) % 8).astype(name) for name in narrow},
        "numpy": {name: x.astype(name) for name in wide},
        "scalars": {"int": -7, "long": 2**70, "float": 0.1, "inf": np.inf, "yes": True, "s": 'ä"/'},
        "empty": {"dict": {}, "list": [], "tuple": (), "none": None, "rows": jnp.zeros((0, 3))},
        "rank 0": jnp.array(2.5),
        "int keys": {1: jnp.ones(1), 10: (jnp.zeros(1), [3, None])},
        "a/b": {"~": 1, "!dict": jnp.ones(2), "": 3},
        "key": jax.random.wrap_key_data(np.array([[1, 2], [3, 4]], np.uint32)),
    }


def quantized_leaves(rng):
    def codes(*shape, dtype="int8", low=-8, high=8):
        return jnp.asarray(rng.integers(low, high, shape), dtype)

    def sparse(*shape):
        share = np.linspace(0.001, 0.03, shape[-1])
        return jnp.asarray((rng.random(shape) < share) * rng.integers(-2, 3, shape), jnp.int8)

    act = make_qparams([1 / 32], qmin=0, qmax=255, zero_point=3)
    return {
        "per tensor": QTensor(codes(7), grid((1,), zero_point=-0.5)),
        "per channel": QTensor(codes(5, 4), grid((1, 4)), (None, act, act), jnp.dtype("bfloat16")),
        "groups": QTensor(codes(6, 4), grid((3, 2), in_scale=np.ones((6, 1)) / 4)),
        "stacked": QTensor(codes(3, 5, 4), grid((3, 1, 4)), dtype=jnp.dtype("float16")),
        "rank 0": QTensor(codes(), grid(())),
        "none": QTensor(codes(0, 3), grid((1, 3))),
        "uint8": QTensor(codes(9, dtype="uint8", low=0, high=256), grid((1,), 0, 255)),
        "int16": QTensor(codes(9, dtype="int16", low=-999, high=999), grid((1,), -999, 999)),
        "int32": QTensor(jnp.array([-(2**31), 2**31 - 1, 0]), grid((1,), -(2.0**31), 2.0**31)),
        "int4": QTensor(codes(9, dtype="int4"), grid((1,))),
        "own stream": QTensor(sparse(256, 256), grid((1, 256))),
        "own stream, rows": QTensor(sparse(256, 257).T, grid((257, 1))),
    }


def held_leaf(rng):
    """A leaf not yet rounded, and what it is after a file."""
    codes, qparams = rng.integers(-8, 8, (4, 3)), grid((1, 3), zero_point=2)
    noise = rng.integers(-3, 4, (4, 3)) / 64
    values = (codes - 2 + noise) * np.asarray(qparams.scale)
    rounded = QTensor(jnp.asarray(codes, jnp.int8), qparams, (None,), jnp.dtype("bfloat16"))
    return FakeQuantTensor(jnp.asarray(values, jnp.bfloat16), *rounded_fields(rounded)), rounded


def rounded_fields(leaf):
    return leaf.qparams, leaf.acts, leaf.dtype


def every_kind(rounded=False):
    rng = np.random.default_rng(0)
    return {
        "plain": plain_leaves(rng),
        "quantized": quantized_leaves(rng),
        "held": held_leaf(rng)[rounded],
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (name, x), (_, y) in zip(
        *(jax.tree_util.tree_leaves_with_path(t) for t in (a, b)), strict=True
    ):
        if isinstance(y, bool | int | float | str):
            assert (type(x), x) == (type(y), y), name
            continue
        assert x.dtype == y.dtype, name
        if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.shape == y.shape, name
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A file with every kind of leaf."""
    path = tmp_path_factory.mktemp("whole") / "model.lnq"
    lnq.save(path, every_kind())
    return path


GRID = grid((1, 1))
SMALL = {
    "own": QTensor(jnp.asarray(np.arange(65536).reshape(256, 256) % 97 == 0, jnp.int8), GRID),
    "small": QTensor(jnp.ones((3, 4), jnp.int8), grid((1, 4))),
    "also": QTensor(jnp.zeros(5, jnp.int8), grid((1,))),
    "complex": jnp.ones(6, jnp.complex64),
    "key": jax.random.key(3),
    "bias": jnp.arange(3.0),
    "steps": 7,
}


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.lnq"
    lnq.save(path, SMALL)
    return path


def test_every_kind_of_leaf_comes_back_exactly(whole):
    assert_same(lnq.load(whole), every_kind(rounded=True))


def test_leaves_of_64_bits_stay_numpy_arrays(whole):
    leaves = lnq.load(whole)["plain"]["numpy"].values()
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)


@pytest.mark.parametrize(
    "leaf",
    [jnp.arange(3.0), QTensor(jnp.ones(3, jnp.int8), grid((1,))), 7, None, [], {}],
    ids=["array", "QTensor", "number", "None", "list", "dict"],
)
def test_a_tree_may_be_one_leaf_or_none(tmp_path, leaf):
    size = lnq.save(tmp_path / "one.lnq", leaf)
    assert_same(lnq.load(tmp_path / "one.lnq"), leaf)
    assert sum(row.bytes for row in lnq.info(tmp_path / "one.lnq").rows) == size


def test_the_golden_file_has_its_digest_and_loads_exactly():
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == GOLDEN_SHA256
    assert_same(lnq.load(GOLDEN), every_kind(rounded=True))


def test_saving_the_golden_tree_again_writes_the_same_bytes(whole):
    assert whole.read_bytes() == GOLDEN.read_bytes()


def test_the_order_of_keys_does_not_change_the_bytes(small, tmp_path):
    lnq.save(tmp_path / "other.lnq", dict(reversed(SMALL.items())))
    assert (tmp_path / "other.lnq").read_bytes() == small.read_bytes()


def nnx_state():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), rngs)
    return nnx.state(model)


def quantized(params):
    def leaf(name, x):
        if not name.endswith("kernel"):
            return x
        return quantizer.quantize(x, make_qparams([[0.1]], qmin=-8, qmax=7), jnp.int8)

    return tree.map_named(leaf, params)


@pytest.mark.parametrize("params", [nnx_state(), Layer([1, jnp.ones(2)], jnp.zeros(3))], ids=type)
def test_like_rebuilds_states_and_dataclasses(tmp_path, params):
    params = quantized(params)
    lnq.save(tmp_path / "model.lnq", params)
    restored = lnq.load(tmp_path / "model.lnq", like=params)
    assert type(restored) is type(params)
    assert_same(restored, params)


def test_like_may_be_shapes_of_the_float_model(tmp_path):
    params = quantized(nnx_state())
    lnq.save(tmp_path / "model.lnq", params)
    assert_same(lnq.load(tmp_path / "model.lnq", like=jax.eval_shape(nnx_state)), params)


@pytest.mark.parametrize(
    "node",
    [
        Layer(jnp.ones(2), jnp.zeros(3)),
        nnx.state(nnx.Sequential(nnx.Param(jnp.ones(2)), nnx.Param({"a": jnp.ones(2)}))),
    ],
    ids=["dataclass", "nnx"],
)
def test_without_like_other_nodes_become_dicts_with_the_same_leaves(tmp_path, node):
    lnq.save(tmp_path / "node.lnq", {"node": node})
    restored = lnq.load(tmp_path / "node.lnq")
    assert isinstance(restored["node"], dict)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(node), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda like: like | {"extra": 1}, r"like: other leaves than .*: \['extra'\]"),
        (lambda like: like | {"bias": None}, r"like: other leaves than .*: \['bias'\]"),
        (lambda like: like | {"bias": np.ones(4)}, r"like: 'bias' has shape \(4,\), in .* \(3,\)"),
        (lambda like: like | {"own": np.ones(9)}, r"like: 'own' has shape \(9,\), in .*256, 256\)"),
    ],
    ids=["a leaf more", "a leaf less", "another shape", "another shape of codes"],
)
def test_a_like_that_does_not_fit_is_an_error_that_names_the_leaf(small, change, message):
    with pytest.raises(ValueError, match=message) as error:
        lnq.load(small, like=change(SMALL))
    assert not isinstance(error.value, lnq.FormatError)


def test_sizes_add_up_to_the_file(whole, tmp_path):
    size = lnq.save(tmp_path / "again.lnq", every_kind())
    info = lnq.info(whole)
    assert size == info.bytes == sum(row.bytes for row in info.rows) == os.path.getsize(whole)
    assert info.bits_per_weight == pytest.approx(8 * size / info.weights)


def test_info_says_what_every_array_is(whole):
    leaves = tree.named_leaves(every_kind(rounded=True))
    arrays = {name: x for name, x in leaves if hasattr(x, "dtype") and name != "plain/key"}
    rows = {row.path: row for row in lnq.info(whole).rows}
    assert set(rows) - set(arrays) == {"plain/key", "(tables)", "(header)"}
    for name, leaf in arrays.items():
        codes = leaf.codes.dtype.name if quantizer.is_quantized(leaf) else ""
        expected = (leaf.shape, jnp.dtype(leaf.dtype).name, codes)
        assert (rows[name].shape, rows[name].dtype, rows[name].codes) == expected, name
    assert rows["plain/arrays/float32"].bytes == 24
    assert rows["quantized/own stream"].bits_per_weight < 1


def test_the_ratio_is_to_the_dtypes_of_the_checkpoint(small):
    info = lnq.info(small)
    original = 4 * (65536 + 12 + 5 + 3) + 8 * 6 + 4 * 2
    assert info.original_bytes == original
    assert info.ratio == pytest.approx(original / os.path.getsize(small))


def test_info_of_a_tree_whose_only_codes_are_none(tmp_path):
    path = tmp_path / "none.lnq"
    size = lnq.save(path, {"w": QTensor(jnp.zeros((0, 3), jnp.int8), grid((1, 3)))})
    assert sum(row.bytes for row in lnq.info(path).rows) == size


def test_info_does_not_read_the_blobs(small):
    before = lnq.info(small)
    data = bytearray(small.read_bytes())
    data[-40] ^= 1
    small.write_bytes(data)
    assert lnq.info(small) == before
    with pytest.raises(lnq.FormatError, match="digest"):
        lnq.load(small)


def test_any_safetensors_reader_lists_the_leaves(whole):
    with safetensors.safe_open(whole, framework="np") as file:
        names = set(file.keys())
        np.testing.assert_array_equal(file.get_tensor("plain/rank 0"), 2.5)
    arrays = {n for n, x in tree.named_leaves(every_kind()) if hasattr(x, "dtype")}
    assert names == arrays | {"__shared__", "__tables__", "__digest__"}


def test_progress_counts_the_leaves_and_its_errors_pass(small):
    calls = []
    lnq.save(small, SMALL, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, "own"), (2, 2, "__shared__")]
    calls.clear()
    lnq.load(small, progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == [1, 2, 3, 4, 5, 6]
    assert {what for _, _, what in calls} == set(SMALL) - {"steps"}

    def stop(*_):
        raise ValueError("stopped by the user")

    with pytest.raises(ValueError, match=r"^stopped by the user$"):
        lnq.load(small, progress=stop)


# Damage


def test_a_flipped_bit_anywhere_is_noticed(small):
    sound = small.read_bytes()
    for place in range(len(sound)):
        data = bytearray(sound)
        data[place] ^= 1 << place % 8
        small.write_bytes(data)
        with pytest.raises(lnq.FormatError):
            lnq.load(small)


def test_a_file_cut_anywhere_or_with_bytes_added_is_noticed(whole):
    sound = whole.read_bytes()
    bad = whole.with_name("cut.lnq")
    for length in [*range(16), *range(16, len(sound), 37), len(sound) - 1]:
        bad.write_bytes(sound[:length])
        with pytest.raises(lnq.FormatError):
            lnq.load(bad)
        with pytest.raises(lnq.FormatError):
            lnq.info(bad)
    bad.write_bytes(sound + b"\0")
    with pytest.raises(lnq.FormatError):
        lnq.load(bad)


@pytest.mark.parametrize("read", [lnq.load, lnq.info], ids=["load", "info"])
def test_files_of_another_kind_are_refused(tmp_path, read):
    path = tmp_path / "other.lnq"
    for content in (b"", b"A text.\n" * 50, bytes(100), b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(lnq.FormatError, match=r"other\.lnq: not an lnq file, or cut short"):
            read(path)
    for metadata in (None, {"format": "pt"}):
        save_file({"a": np.ones(2)}, path, metadata=metadata)
        with pytest.raises(lnq.FormatError, match="a safetensors file, but not one of lnq's"):
            read(path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.lnq")
    with pytest.raises(IsADirectoryError):
        read(tmp_path)


def forge(path, change):
    """Change the lnq header, as a value or as text, and make the digest right again."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, blobs = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    mine = json.loads(header["__metadata__"]["lnq"])
    changed = change(mine)
    text = changed if isinstance(changed, str) else json.dumps(mine)
    header["__metadata__"]["lnq"] = text
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    head = len(packed).to_bytes(8, "little") + packed
    start, stop = header["__digest__"]["data_offsets"]
    blobs[start:stop] = bytes(32)
    blobs[start:stop] = hashlib.sha256(head + blobs).digest()
    path.write_bytes(head + blobs)


def refused(path, read, message):
    """Is refused with this message, at once and without taking memory."""
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(lnq.FormatError, match=message):
        read(path)
    assert time.perf_counter() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # kB


def test_a_forged_header_without_a_change_is_accepted(small):
    forge(small, lambda header: None)
    assert_same(lnq.load(small), SMALL)


MISSING = object()
ENTRIES = {
    "shape, huge": ("own", "shape", [10**9, 10**9]),
    "shape, negative": ("own", "shape", [-256, -256]),
    "shape, one more": ("own", "shape", [256, 257]),
    "shape, unknown": ("small", "shape", [-1, 4]),
    "shape, no list": ("small", "shape", 12),
    "shape, fraction": ("small", "shape", [3.0, 4.0]),
    "shape, missing": ("small", "shape", MISSING),
    "plain shape, unknown": ("complex", "shape", [-1]),
    "plain shape, too large": ("complex", "shape", [10**12]),
    "plain shape, missing": ("complex", "shape", MISSING),
    "segment, smaller": ("own", "segment", 7),
    "segment, zero": ("own", "segment", 0),
    "segment, huge": ("own", "segment", 10**9),
    "segment, text": ("own", "segment", "256"),
    "segment, missing": ("own", "segment", MISSING),
    "per_lane, zero": ("own", "per_lane", 0),
    "per_lane, one": ("own", "per_lane", 1),
    "per_lane, negative": ("own", "per_lane", -1),
    "escapes, many": ("own", "escapes", 10**9),
    "escapes, negative": ("own", "escapes", -2),
    "shared size, huge": ("__shared__", "size", 10**15),
    "shared size, negative": ("__shared__", "size", -256),
    "shared size, missing": ("__shared__", "size", MISSING),
    "offset, far": ("small", "offset", 10**6),
    "offset, over the end": ("small", "offset", 250),
    "offset, negative": ("small", "offset", -12),
    "offset, text": ("small", "offset", "0"),
    "grids, larger than the blob": ("small", "grids", [[[10**6, 1]] * 4]),
    "grids, negative": ("small", "grids", [[[-1, -1]] * 4]),
    "grids, too few fields": ("small", "grids", [[[1, 4]]]),
    "grids, bytes left over": ("small", "grids", [[[1, 1]] * 4]),
    "grids, none": ("small", "grids", [None]),
    "grids, missing": ("small", "grids", MISSING),
    "codes, unknown": ("own", "codes", "nonsense"),
    "codes, real": ("own", "codes", "float32"),
    "codes, text": ("small", "codes", "S3"),
    "dtype, unknown": ("small", "dtype", "nonsense"),
    "dtype, object": ("small", "dtype", "object"),
    "dtype, null": ("small", "dtype", None),
    "plain dtype, object": ("complex", "dtype", "object"),
    "plain dtype, larger": ("complex", "dtype", "complex128"),
    "key, unknown": ("key", "key", "nonsense"),
}


@pytest.mark.parametrize(("name", "field", "value"), ENTRIES.values(), ids=ENTRIES.keys())
def test_a_malformed_entry_is_refused_by_the_name_of_its_leaf(small, name, field, value):
    def change(header):
        if value is MISSING:
            del header["leaves"][name][field]
        else:
            header["leaves"][name][field] = value

    forge(small, change)
    refused(small, lnq.load, rf"small\.lnq: {name}: ")


@pytest.mark.parametrize("read", [lnq.load, lnq.info], ids=["load", "info"])
@pytest.mark.parametrize("value", [None, 5, "text", [1]], ids=str)
def test_an_entry_that_is_no_object_is_refused(small, read, value):
    forge(small, lambda header: header["leaves"].update(small=value))
    refused(small, read, r"small\.lnq: ")


def test_info_refuses_an_entry_without_a_shape(small):
    forge(small, lambda header: header["leaves"]["small"].pop("shape") and None)
    refused(small, lnq.info, r"small\.lnq: ")


HEADERS = {
    "no JSON": lambda header: "{",
    "a list": lambda header: "[]",
    "a number": lambda header: "3",
    "text": lambda header: '"leaves"',
    "nested too deep": lambda header: "[" * 100_000,
    "no version": lambda header: header.pop("version") and None,
    "a later version": lambda header: header.update(version=2),
    "no leaves": lambda header: header.pop("leaves") and None,
    "leaves in a list": lambda header: header.update(leaves=[]),
}
TREES = {
    "no structure": lambda header: header.pop("structure") and None,
    "a leaf more": lambda header: header["structure"].update(extra=0),
    "a leaf less": lambda header: header["structure"].pop("bias") and None,
    "a value more": lambda header: header["leaves"].update(extra={"value": 1}),
    "no entry for the shared stream": lambda header: header["leaves"].pop("__shared__") and None,
    "keys of two kinds": lambda header: header["structure"].update(
        steps={"!dict": [[1, None], ["a", None], [2, 0]]}
    ),
    "keys in lists": lambda header: header["structure"].update(steps={"!dict": [[[], 0]]}),
    "a dict in halves": lambda header: header["structure"].update(steps={"!dict": [[1]]}),
    "a dict that is none": lambda header: header["structure"].update(steps={"!dict": "x"}),
    "a tuple that is none": lambda header: header["structure"].update(steps={"!tuple": 3}),
}


@pytest.mark.parametrize("read", [lnq.load, lnq.info], ids=["load", "info"])
@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_a_malformed_header_is_refused(small, read, change):
    forge(small, change)
    refused(small, read, r"small\.lnq: header: ")


@pytest.mark.parametrize("change", TREES.values(), ids=TREES.keys())
def test_a_structure_that_does_not_fit_the_leaves_is_refused(small, change):
    forge(small, change)
    refused(small, lnq.load, r"small\.lnq: ")


@pytest.mark.parametrize("depth", [300, 900, 980])
def test_a_structure_nested_too_deep_is_refused(small, depth):
    def change(header):
        header["structure"] = "HERE"
        return json.dumps(header).replace('"HERE"', '{"a":' * depth + "0" + "}" * depth)

    forge(small, change)
    refused(small, lnq.load, r"small\.lnq: ")


JUNK = [None, True, -1, 0, 10**6, 10**30, 1.5, "", "x", "float32", [], {}, [-1], [[1, 0]]]


def entries(node):
    """All entries of a JSON value, as what holds them and their key."""
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from entries(node[key])


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_junk_anywhere_in_the_header_is_an_error_or_another_tree(small, junk):
    sound, rng = small.read_bytes(), np.random.default_rng(JUNK.index(junk))

    def change(header):
        found = list(entries(header))
        node, key = found[rng.integers(len(found))]
        node[key] = junk

    for _ in range(12):
        small.write_bytes(sound)
        forge(small, change)
        for read in (lnq.load, lnq.info):
            try:
                read(small)
            except lnq.FormatError:
                continue


def test_a_later_version_says_which(small):
    forge(small, lambda header: header.update(version=2))
    with pytest.raises(lnq.FormatError, match="version 2; this lnq reads version 1"):
        lnq.load(small)


@pytest.mark.parametrize("name", ["__shared__", "__tables__", "__digest__", "bias"])
def test_a_tensor_that_is_missing_is_refused(small, name):
    data, before, after = small.read_bytes(), f'"{name}":{{"d', f'"{name.upper()}":{{"d'
    small.write_bytes(data.replace(before.encode(), after.encode()))
    if name != "__digest__":
        forge(small, lambda header: None)
    refused(small, lnq.load, r"small\.lnq: ")


@pytest.mark.parametrize("name", ["own", "__shared__", "__tables__"])
def test_damaged_blobs_with_the_right_digest_are_errors_or_other_codes(small, name):
    with safetensors.safe_open(small, framework="np") as file:
        blob = file.get_tensor(name).tobytes()
    start = small.read_bytes().index(blob)
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(blob), 12):
        lnq.save(small, SMALL)
        data = bytearray(small.read_bytes())
        data[start + place] ^= 1 << rng.integers(8)
        small.write_bytes(data)
        forge(small, lambda header: None)
        try:
            codes = lnq.load(small)["own"].codes
        except lnq.FormatError:
            continue
        assert codes.shape == (256, 256)


# Writing


class Opaque:
    pass


UNFIT = {
    "object": Opaque(),
    "bytes": b"abc",
    "strings": np.array(["a", "bc"]),
    "dates": np.array(["2020-01-01"], "datetime64[D]"),
    "records": np.zeros(2, [("a", "i4")]),
    "objects": np.array([None, 1], object),
}


@pytest.mark.parametrize("leaf", UNFIT.values(), ids=UNFIT.keys())
def test_a_leaf_that_no_file_can_hold_is_an_error_and_the_old_file_survives(small, leaf):
    before = small.read_bytes()
    with pytest.raises(ValueError, match="save: leaf 'a/b' "):
        lnq.save(small, {"a": {"b": leaf}})
    assert small.read_bytes() == before
    assert os.listdir(small.parent) == [small.name]


def test_a_failing_disk_leaves_the_old_file_and_nothing_else(small, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    before = small.read_bytes()
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space left on device"):
                lnq.save(small, {"a": 1})
        assert small.read_bytes() == before
        assert os.listdir(small.parent) == [small.name]
    lnq.save(small, {"a": 1})
    assert lnq.load(small) == {"a": 1}


def test_a_missing_folder_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        lnq.save(tmp_path / "missing" / "model.lnq", {"a": 1})


@pytest.mark.parametrize("name", ["__digest__", "__metadata__", "__x"])
def test_names_with_two_underscores_in_front_are_reserved(tmp_path, name):
    with pytest.raises(ValueError, match=f"save: leaf '{name}.*reserved"):
        lnq.save(tmp_path / "model.lnq", {name: jnp.ones(1)})


@pytest.mark.parametrize("key", [1.5, None, (1, 2), b"a"], ids=str)
def test_keys_that_json_has_no_place_for_are_errors(tmp_path, key):
    with pytest.raises(ValueError, match="neither a string nor an integer"):
        lnq.save(tmp_path / "model.lnq", {key: jnp.ones(1)})


def test_arrays_of_the_other_byte_order_come_back_as_numbers(tmp_path):
    big = {name: np.array([1, 2.5, -3], name) for name in (">f4", ">c8")}
    lnq.save(tmp_path / "big.lnq", big)
    restored = lnq.load(tmp_path / "big.lnq")
    for name, x in big.items():
        np.testing.assert_array_equal(restored[name], x)


def test_shared_and_own_streams_give_the_same_codes(tmp_path, monkeypatch):
    params = {"own": SMALL["own"], "small": SMALL["small"]}
    lnq.save(tmp_path / "one.lnq", params)
    monkeypatch.setattr(container, "SHARED_SIZE", 1)
    lnq.save(tmp_path / "two.lnq", params)
    assert_same(lnq.load(tmp_path / "one.lnq"), lnq.load(tmp_path / "two.lnq"))
