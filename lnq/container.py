"""The ``.lnq`` file: a parameter tree, quantized leaves entropy-coded, in one safetensors file.

Any safetensors reader can list it. A leaf that is not quantized is a tensor of its own dtype; a
coded one is a U8 blob: its grids in float32, then its rANS stream (:mod:`lnq.ans`). Leaves of
fewer than 65536 codes share one stream, ``__shared__``; all streams share the tables in
``__tables__``; ``__digest__`` is the SHA-256 of the file with the digest itself taken as zeros. The
metadata key ``lnq`` holds canonical JSON that says the rest; ``docs/format.md`` gives every field.

Loading never runs code from the file, and checks every length against the bytes that are there
before it takes memory.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from safetensors.numpy import save_file

from lnq import ans, tree
from lnq.quantizer import FakeQuantTensor, QParams, QTensor, is_quantized, narrow, quantize
from lnq.types import Params, Progress

__all__ = ["FileInfo", "FormatError", "LeafInfo", "info", "load", "save"]

VERSION = 1
SHARED_SIZE = 1 << 16
"""Leaves with fewer codes share a stream."""
SEGMENT_SIZES = (256, 4096)
"""Least and most symbols of a segment: enough to earn a class name, few enough for a lane."""
NATIVE = {"BOOL": "bool", "BF16": "bfloat16"} | {
    letter + str(bits): f"{kind}{bits}"
    for letter, kind, widths in (("I", "int", 8), ("U", "uint", 8), ("F", "float", 16))
    for bits in (8, 16, 32, 64)
    if bits >= widths
}
"""Dtypes that safetensors has, by its names; a leaf of another one is kept as bytes."""
SHARED, TABLES, DIGEST = "__shared__", "__tables__", "__digest__"
UNSOUND = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
    safetensors.SafetensorError,
)
"""What reading a malformed header or blob may raise."""


class FormatError(ValueError):
    """A file that is not a sound ``.lnq`` file."""


class LeafInfo(NamedTuple):
    """One row of :func:`info`.

    Attributes:
      path: Leaf name; ``(tables)`` and ``(header)`` for what belongs to none.
      shape: Its shape.
      dtype: The dtype it dequantizes to.
      codes: The dtype of its codes; empty for a leaf stored as it is.
      bytes: What it takes in the file; leaves that share a stream are charged by their entropy.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    codes: str
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the file per entry of this leaf."""
        return 8.0 * self.bytes / max(1, math.prod(self.shape))


class FileInfo(NamedTuple):
    """What a file holds; its ``rows`` add up to its ``bytes``.

    Attributes:
      bytes: Size of the file.
      weights: Entries of all leaves.
      original_bytes: Those entries in the dtypes they dequantize to.
      rows: One per leaf, the tables and the header last.
    """

    bytes: int
    weights: int
    original_bytes: int
    rows: tuple[LeafInfo, ...]

    @property
    def bits_per_weight(self) -> float:
        """Everything in the file over all weights."""
        return 8.0 * self.bytes / max(1, self.weights)

    @property
    def ratio(self) -> float:
        """Size of the checkpoint in its own dtypes over the size of the file."""
        return self.original_bytes / self.bytes


def save(path: str | os.PathLike, qtree: Params, *, progress: Progress | None = None) -> int:
    """Write a tree to a ``.lnq`` file, all or nothing.

    Args:
      path: Where to; a file that is already there survives a failure.
      qtree: Dicts, lists, tuples, NNX states, dataclasses; leaves quantized or not. A
        :class:`~lnq.quantizer.FakeQuantTensor` is rounded to its codes.
      progress: Called after every coded leaf.

    Returns:
      Size of the file, bytes.

    Raises:
      ValueError: If a leaf is neither an array nor a Python number or string.
      OSError: If the file cannot be written.

    Example:
      >>> import lnq
      >>> size = lnq.save("/tmp/doc.lnq", {"bias": jnp.zeros(3), "steps": 7})
      >>> lnq.load("/tmp/doc.lnq")
      {'bias': Array([0., 0., 0.], dtype=float32), 'steps': 7}
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    tensors, header = _encode_tree(qtree, progress)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # the user's default, which safetensors does not keep
        save_file(tensors, draft, metadata={"lnq": text})
        draft.chmod(mode)
        with open(draft, "r+b") as file:
            digest, place = _digest(file)
            file.seek(place)
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
    return path.stat().st_size


def load(
    path: str | os.PathLike, like: Params | None = None, *, progress: Progress | None = None
) -> Params:
    """Read a ``.lnq`` file; codes are expanded on JAX's default device.

    Args:
      path: The file.
      like: A tree of the structure to rebuild (an NNX state, a dataclass; arrays or shapes), its
        leaves matched by name. Without it, what was a dict, list or tuple is one again, and any
        other node is a dict.
      progress: Called after every leaf.

    Returns:
      The tree, with :class:`~lnq.quantizer.QTensor` leaves where it had them.

    Raises:
      FormatError: If the file is not a sound ``.lnq`` file; the message names the leaf.
      ValueError: If ``like`` has other leaves or other shapes than the file.
    """
    with _opened(path) as (file, structure, entries):
        _verify(path)
        leaves = _decode_leaves(path, file, entries, progress)
    with _unsound(path, "structure"):
        skeleton = _skeleton(structure)
        names = {name for name, _ in tree.named_leaves(skeleton)}
        if names != set(leaves):
            raise ValueError(f"does not fit the leaves: {sorted(names ^ set(leaves))[:3]}")
        if like is None:
            return tree.map_named(lambda name, _: leaves[name], skeleton)
    wanted = dict(tree.named_leaves(like))
    if set(wanted) != names:
        raise ValueError(f"like: other leaves than {path}: {sorted(set(wanted) ^ names)[:3]}")
    for name, leaf in wanted.items():
        if np.shape(leaf) != np.shape(leaves[name]):
            raise ValueError(
                f"like: {name!r} has shape {np.shape(leaf)}, in {path} {np.shape(leaves[name])}"
            )
    return tree.map_named(lambda name, _: leaves[name], like)


def info(path: str | os.PathLike) -> FileInfo:
    """What a file holds and where its bytes go, read from its header alone.

    Raises:
      FormatError: If the file is not an ``.lnq`` file.
    """
    with _opened(path) as (_, _, entries), open(path, "rb") as raw:
        listing, _ = _listing(raw)
    sizes = {name: stop - start for name, (_, _, (start, stop)) in listing.items()}
    rows = []
    with _unsound(path, "leaves"):
        sharers = sum(entry["bits"] for entry in entries.values() if "offset" in entry)
        for name, (native, dims, _) in sorted(listing.items()):
            if not name.startswith("__"):
                entry = entries.get(name, {})
                if "codes" not in entry:
                    entry = {"shape": tuple(dims), "dtype": NATIVE.get(native, native)} | entry
                taken = sizes[name]
                if "offset" in entry:
                    taken += entry["bits"] * sizes.get(SHARED, 0) // sharers
                dtype, codes = str(entry["dtype"]), str(entry.get("codes", ""))
                rows.append(LeafInfo(name, entry["shape"], dtype, codes, taken))
    total = os.path.getsize(path)
    weights = sum(math.prod(row.shape) for row in rows)
    original = sum(math.prod(row.shape) * jnp.dtype(row.dtype).itemsize for row in rows)
    rest = total - sizes[TABLES] - sum(row.bytes for row in rows)
    rows.append(LeafInfo("(tables)", (), "uint8", "", sizes[TABLES]))
    rows.append(LeafInfo("(header)", (), "uint8", "", rest))
    return FileInfo(total, weights, original, tuple(rows))


class _Layout(NamedTuple):
    """How codes are cut: output channels moved to the front or not, symbols of a segment."""

    moved: bool
    segment: int


def _layouts(shape: tuple[int, ...]) -> list[_Layout]:
    """Segments along the rows as they are stored, and along the output channels."""
    low, high = SEGMENT_SIZES

    def segment(row: int) -> int:
        return row * -(-low // row) if row < low else -(-row // -(-row // high))

    moved = [_Layout(True, segment(shape[-2]))] if len(shape) > 1 else []
    return [_Layout(False, segment(shape[-1] if shape else 1)), *moved]


def _best_layout(codes: np.ndarray) -> _Layout:
    """The layout whose segments differ most in spread: about the cheapest to code by class."""
    if not codes.size:
        return _Layout(False, 1)

    def log_spread(layout: _Layout) -> float:
        segments = _cut(_flat(codes, layout.moved), layout.segment)
        return float(np.log2(np.abs(segments.astype(np.float32)).mean(1) + 0.3).mean())

    return min(_layouts(codes.shape), key=log_spread)


def _flat(codes: np.ndarray, moved: bool) -> np.ndarray:
    return (np.moveaxis(codes, -1, 0) if moved else codes).ravel()


def _cut(flat: np.ndarray, segment: int) -> np.ndarray:
    """Segments ``[segments, S]`` of a run of codes, zeros after the end."""
    return np.pad(flat, (0, -len(flat) % segment)).reshape(-1, segment)


def _encode_tree(
    qtree: Params, progress: Progress | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and header of a file."""
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    coded: dict[str, QTensor] = {}
    for name, leaf in tree.named_leaves(qtree):
        if name.startswith("__"):
            raise ValueError(f"save: leaf {name!r}: names that begin with '__' are reserved")
        if is_quantized(leaf):
            coded[name] = _hardened(name, leaf)
        else:
            _encode_plain(name, leaf, tensors, entries)
    layouts = {name: _best_layout(_codes(name, leaf)) for name, leaf in coded.items()}
    segments, offsets = _segments(coded, layouts)
    tables = ans.fit_tables(list(segments.values()))
    for name, leaf in coded.items():
        entries[name], tensors[name] = _encode_grids(leaf)
        entries[name] |= {"moved": True} if layouts[name].moved else {}
        if name in offsets:
            bits = ans.entropy_bits(ans.histogram(_codes(name, leaf))[1])
            entries[name] |= {"offset": offsets[name], "bits": 1 + int(bits)}
    for done, (name, cut) in enumerate(segments.items(), 1):
        fields, blob = _encode_stream(cut, tables)
        entries[name] = entries.get(name, {"dtype": cut.dtype.name, "size": cut.size}) | fields
        tensors[name] = np.concatenate([tensors.get(name, np.zeros(0, np.uint8)), blob])
        if progress:
            progress(done, len(segments), name)
    tensors[TABLES] = np.frombuffer(ans.pack_tables(tables), np.uint8)
    tensors[DIGEST] = np.zeros(32, np.uint8)
    return tensors, {"version": VERSION, "structure": _outline(qtree), "leaves": entries}


def _segments(
    coded: Mapping[str, QTensor], layouts: Mapping[str, _Layout]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Segments of every stream, and where in the shared one each small leaf begins."""
    segments: dict[str, np.ndarray] = {}
    offsets: dict[str, int] = {}
    small = [np.zeros(0, np.int8)]
    for name, leaf in coded.items():
        flat = _flat(_codes(name, leaf), layouts[name].moved)
        if len(flat) < SHARED_SIZE:
            offsets[name] = sum(map(len, small))
            small.append(flat)
        else:
            segments[name] = _cut(flat, layouts[name].segment)
    joined = np.concatenate(small, dtype=np.result_type(*small), casting="unsafe")
    return segments | ({SHARED: _cut(joined, SEGMENT_SIZES[0])} if joined.size else {}), offsets


def _encode_grids(leaf: QTensor) -> tuple[dict[str, Any], np.ndarray]:
    """Header fields of a leaf and the bytes of its grids."""
    grids = (leaf.qparams, *leaf.acts)
    entry = {
        "shape": leaf.shape,
        "dtype": jnp.dtype(leaf.dtype).name,
        "codes": leaf.codes.dtype.name,
        "grids": [grid and [x.shape for x in jax.tree.leaves(grid)] for grid in grids],
    }
    dtypes = [grid and grid.dtype and jnp.dtype(grid.dtype).name for grid in leaf.acts]
    entry |= {"acts": dtypes} if any(dtypes) else {}
    fields = [np.asarray(x).astype("<f4").ravel() for x in jax.tree.leaves(grids)]
    return entry, np.concatenate(fields).view(np.uint8)


def _encode_stream(segments: np.ndarray, tables: ans.Tables) -> tuple[dict[str, Any], np.ndarray]:
    """Header fields and bytes of a rANS stream."""
    classes = ans.classify(segments, tables)
    bits = ans.entropy_bits(ans.histogram(segments)[1])
    per_lane = ans.lane_segments(bits, *segments.shape)
    stream = ans.encode(segments, classes, tables, per_lane)
    fields = {"segment": segments.shape[1], "per_lane": per_lane}
    fields |= {"escapes": len(stream.escapes)} if len(stream.escapes) else {}
    return fields, np.frombuffer(ans.pack_stream(stream, tables), np.uint8)


def _codes(name: str, leaf: QTensor) -> np.ndarray:
    """Codes on the host, in a dtype that NumPy can count with."""
    bits = jnp.iinfo(leaf.codes.dtype).bits
    if bits > 32 or leaf.codes.dtype == jnp.uint32:
        raise ValueError(f"save: leaf {name!r} has {leaf.codes.dtype} codes; cast them to int32")
    return np.asarray(leaf.codes if bits >= 8 else leaf.codes.astype(jnp.int8))


def _hardened(name: str, leaf: QTensor | FakeQuantTensor) -> QTensor:
    if isinstance(leaf, QTensor):
        return leaf
    if leaf.qparams is None:
        raise ValueError(
            f"save: leaf {name!r} has float weights and grids for its data; a file holds codes: "
            "quantize the weights too, 16 bits lose next to nothing"
        )
    return narrow(replace(quantize(leaf.values, leaf.qparams), acts=leaf.acts, dtype=leaf.dtype))


def _encode_plain(
    name: str, leaf: Any, tensors: dict[str, np.ndarray], entries: dict[str, Any]
) -> None:
    """A leaf stored as it is: an array, a PRNG key, a Python number or string."""
    if isinstance(leaf, bool | int | float | str):
        entries[name] = {"value": leaf}
        return
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        entries[name] = {"key": str(jax.random.key_impl(leaf))}
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    if not (jnp.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise ValueError(f"save: leaf {name!r} is {type(leaf).__name__}, not an array of numbers")
    array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype.name not in NATIVE.values():
        entries[name] = {"shape": array.shape, "dtype": array.dtype.name}
        array = np.frombuffer(array.tobytes(), np.uint8)
    tensors[name] = np.ascontiguousarray(array).reshape(array.shape)


class _Decoder(NamedTuple):
    """What all coded leaves of a file need."""

    tables: ans.Tables
    expanded: ans.DecodeTables
    shared: np.ndarray


def _decode_leaves(
    path: str | os.PathLike, file: Any, entries: Mapping[str, Any], progress: Progress | None
) -> dict[str, Any]:
    """All leaves by name."""
    with _unsound(path, TABLES):
        tables = ans.unpack_tables(file.get_tensor(TABLES).tobytes())
        decoder = _Decoder(tables, ans.decode_tables(tables), np.zeros(0, np.int8))
    if SHARED in entries:
        with _unsound(path, SHARED):
            entry, blob = entries[SHARED], file.get_tensor(SHARED).tobytes()
            shared = _decode_stream(blob, entry["size"], entry["dtype"], entry, decoder)
            decoder = decoder._replace(shared=np.asarray(shared))
    leaves = {name: entry["value"] for name, entry in entries.items() if "value" in entry}
    stored = [name for name in list(file.keys()) if not name.startswith("__")]
    for done, name in enumerate(stored, 1):
        with _unsound(path, name):
            leaves[name] = _decode_leaf(file.get_tensor(name), entries.get(name, {}), decoder)
        if progress:
            progress(done, len(stored), name)
    return leaves


def _decode_leaf(array: np.ndarray, entry: Mapping[str, Any], decoder: _Decoder) -> Any:
    if "codes" in entry:
        return _decode_qtensor(array.tobytes(), entry, decoder)
    if "key" in entry:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=entry["key"])
    if "dtype" in entry:
        array = np.frombuffer(array.tobytes(), entry["dtype"]).reshape(entry["shape"])
    # NumPy's array itself where JAX would cut its dtype (64 bits).
    exact = jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype
    return jnp.asarray(array) if exact else array


def _decode_qtensor(blob: bytes, entry: Mapping[str, Any], decoder: _Decoder) -> QTensor:
    shape, size = entry["shape"], math.prod(entry["shape"])
    grids, used = _read_grids(blob, shape, entry["grids"])
    if "offset" in entry:
        flat = decoder.shared[entry["offset"] :][:size]
        if used != len(blob) or len(flat) != size:
            raise ValueError(f"{len(blob)} bytes and {len(flat)} codes do not make shape {shape}")
    else:
        flat = _decode_stream(blob[used:], size, entry["codes"], entry, decoder)
    codes = jnp.asarray(_unflat(flat, shape, entry.get("moved", False)), entry["codes"])
    qparams, *acts = grids
    dtypes = entry.get("acts", (None,) * len(acts))
    pairs = zip(acts, dtypes, strict=True)
    acts = tuple(grid and replace(grid, dtype=dtype) for grid, dtype in pairs)
    return QTensor(codes, qparams, acts, entry["dtype"])


def _decode_stream(
    data: bytes, size: int, dtype: np.dtype, entry: Mapping[str, Any], decoder: _Decoder
) -> jax.Array:
    """The symbols of a rANS stream, flat, with the zeros that fill its last segment."""
    segment, per_lane = entry["segment"], entry["per_lane"]
    if not (size and segment and 0 < segment * per_lane <= ans.MAX_LANE):
        raise ValueError(f"{size} symbols in segments of {segment}, {per_lane} per lane")
    segments = -(-size // segment)
    lanes = -(-segments // per_lane)
    kind = dtype if jnp.iinfo(dtype).bits >= 8 else jnp.dtype("int8")
    escapes = entry.get("escapes", 0)
    stream = ans.unpack_stream(data, decoder.tables, segments, lanes, escapes, kind)
    return ans.decode(stream, decoder.expanded, segment, per_lane, kind).ravel()


def _unflat(flat: Any, shape: tuple[int, ...], moved: bool) -> Any:
    """Undo :func:`_flat`, of a NumPy or a JAX array."""
    flat = flat[: math.prod(shape)]
    if moved:
        return flat.reshape(shape[-1:] + shape[:-1]).transpose(*range(1, len(shape)), 0)
    return flat.reshape(shape)


def _read_grids(
    data: bytes, shape: tuple[int, ...], described: tuple[Any, ...]
) -> tuple[list[Any], int]:
    """Grids of a leaf from the start of its blob, and how many bytes they take."""
    grids, used = [], 0
    for dims in described:
        fields = []
        for dim in dims or ():
            fields.append(np.frombuffer(data, "<f4", math.prod(dim), used).reshape(dim))
            used += 4 * math.prod(dim)
        grids.append(QParams(*map(jnp.asarray, fields)) if fields else None)
    fits = [len(dim) == len(shape) for dim in described[0]]
    if not all(fits):
        raise ValueError(f"grids of shapes {described[0]} do not fit shape {shape}")
    return grids, used


def _outline(node: Any) -> Any:
    """Structure of a tree as JSON: dicts and lists as they are, a leaf 0, None null.

    What JSON has no form for is a dict with one key: ``!tuple`` holds the entries, ``!dict`` pairs
    of key and value. Any other node is the dict of its attributes.
    """
    if node is None:
        return None
    if isinstance(node, list):
        return [_outline(x) for x in node]
    if isinstance(node, tuple) and not hasattr(node, "_fields"):
        return {"!tuple": [_outline(x) for x in node]}
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    if is_quantized(node) or any(child is node for _, child in children):
        return 0
    if isinstance(node, nnx.Variable):
        return _outline(children[0][1])
    pairs = [(_key(path[-1]), _outline(child)) for path, child in children]
    if all(isinstance(key, str) and not key.startswith("!") for key, _ in pairs):
        return dict(pairs)
    return {"!dict": pairs}


def _key(entry: Any) -> int | str:
    """Key of one step of a path."""
    for name in ("key", "name", "idx"):
        if isinstance(key := getattr(entry, name, None), int | str):
            return key
    raise ValueError(f"save: {entry} is neither a string nor an integer; such a key has no place")


def _skeleton(node: Any) -> Any:
    """Undo :func:`_outline`, with zeros for leaves."""
    if isinstance(node, list):
        return [_skeleton(x) for x in node]
    if not isinstance(node, dict):
        return node
    if list(node) == ["!tuple"]:
        return tuple(_skeleton(x) for x in node["!tuple"])
    pairs = node["!dict"] if list(node) == ["!dict"] else node.items()
    return {key: _skeleton(child) for key, child in pairs}


@contextmanager
def _unsound(path: str | os.PathLike, name: str) -> Iterator[None]:
    """Name the leaf in whatever goes wrong inside."""
    try:
        yield
    except UNSOUND as error:
        raise FormatError(f"{path}: {name}: {error}") from error


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, Any, dict[str, dict[str, Any]]]]:
    """The safetensors file, and the structure and checked entries of its lnq header."""
    with open(path, "rb"):  # a file that cannot be read is the system's error, not ours
        pass
    try:
        file = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise FormatError(f"{path}: not an lnq file, or cut short: {error}") from error
    with file:
        entries = {}
        with _unsound(path, "header"):
            text = (file.metadata() or {}).get("lnq")
            if text is None:
                raise ValueError("a safetensors file, but not one of lnq's")
            header = json.loads(text)
            if header["version"] != VERSION:
                raise ValueError(f"version {header['version']}; this lnq reads version {VERSION}")
            structure, leaves = header["structure"], header["leaves"].items()
            if TABLES not in set(file.keys()):
                raise ValueError(f"{TABLES} is missing")
        for name, entry in leaves:
            with _unsound(path, name):
                entries[name] = {field: _FIELDS[field](value) for field, value in entry.items()}
        yield file, structure, entries


def _natural(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a size")
    return value


def _dims(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a shape")
    return tuple(map(_natural, value))


def _number_dtype(value: Any) -> np.dtype:
    dtype = jnp.dtype(value) if isinstance(value, str) else np.dtype(object)
    if not (jnp.issubdtype(dtype, np.number) or dtype.kind == "b"):
        raise ValueError(f"{value!r} is not a dtype of numbers")
    return dtype


def _integer_dtype(value: Any) -> np.dtype:
    dtype = _number_dtype(value)
    if not jnp.issubdtype(dtype, np.integer) or jnp.iinfo(dtype).max >= 2**31:
        raise ValueError(f"{value!r} is not a dtype of codes")
    return dtype


def _grid_dims(value: Any) -> tuple[tuple[tuple[int, ...], ...] | None, ...]:
    grids = tuple(grid if grid is None else tuple(map(_dims, grid)) for grid in value)
    if not grids or grids[0] is None or any(len(grid) not in (4, 5) for grid in grids if grid):
        raise ValueError(f"{value!r} does not describe grids")
    return grids


def _act_dtypes(value: Any) -> tuple[np.dtype | None, ...]:
    return tuple(dtype if dtype is None else _integer_dtype(dtype) for dtype in value)


def _literal(*kinds: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) not in kinds:
            raise ValueError(f"{value!r} is not allowed here")
        return value

    return check


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "shape": _dims,
    "dtype": _number_dtype,
    "codes": _integer_dtype,
    "grids": _grid_dims,
    "acts": _act_dtypes,
    "moved": _literal(bool),
    "offset": _natural,
    "bits": _natural,
    "size": _natural,
    "segment": _natural,
    "per_lane": _natural,
    "escapes": _natural,
    "key": _literal(str),
    "value": _literal(bool, int, float, str),
}
"""How each field of an entry is checked, and what it is read as."""


def _listing(file: BinaryIO) -> tuple[dict[str, tuple[str, list[int], tuple[int, int]]], int]:
    """Dtype, shape and place of every tensor of a safetensors file, and where the data begin."""
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {k: (v["dtype"], v["shape"], tuple(v["data_offsets"])) for k, v in header.items()}
    return tensors, 8 + length


def _digest(file: BinaryIO) -> tuple[bytes, int]:
    """SHA-256 of a file with its digest taken as zeros, and where the digest stands."""
    file.seek(0)
    tensors, start = _listing(file)
    place = start + tensors[DIGEST][2][0]
    file.seek(0)
    state = hashlib.sha256(file.read(place))
    state.update(bytes(len(file.read(32))))
    while chunk := file.read(1 << 20):
        state.update(chunk)
    return state.digest(), place


def _verify(path: str | os.PathLike) -> None:
    with open(path, "rb") as file, _unsound(path, DIGEST):
        digest, place = _digest(file)
        file.seek(place)
        if file.read(32) != digest:
            raise ValueError("the content is damaged, its digest does not match")
