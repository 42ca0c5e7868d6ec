"""Float checkpoints in and out: safetensors, npz, flax msgpack, orbax directories.

Flat formats name a leaf by its path joined with ``/`` (:func:`lnq.tree.leaf_name`); reading turns
the names into nested dicts again. Lists and tuples become dicts with keys ``"0"``, ``"1"``, ...
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import serialization
from safetensors.numpy import load_file, save_file

from lnq import tree
from lnq.types import Params

__all__ = ["nested", "read", "write"]


def read(path: str | Path) -> Params:
    """Read a checkpoint; the format is told by the suffix, a directory is orbax's.

    Raises:
      ValueError: If the suffix is unknown, or the content is not of its format.
    """
    path = Path(path)
    if path.is_dir():
        return _read_orbax(path)
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz, ".msgpack": _read_msgpack}
    if path.suffix not in readers:
        raise ValueError(f"{path}: cannot read {path.suffix or 'this'}; give {_FORMATS}")
    with open(path, "rb"):  # a file that cannot be read is the system's error
        pass
    try:
        return readers[path.suffix](path)
    except Exception as error:
        raise ValueError(f"{path}: not a {path.suffix[1:]} checkpoint: {error}") from error


def write(path: str | Path, params: Params) -> None:
    """Write a checkpoint; the format is told by the suffix, a path without one is orbax's.

    Raises:
      ValueError: If the suffix is unknown.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        save_file(_flat(params), path)
    elif path.suffix == ".npz":
        np.savez(path, **_flat(params), allow_pickle=False)
    elif path.suffix == ".msgpack":
        path.write_bytes(serialization.msgpack_serialize(nested(_flat(params))))
    elif not path.suffix:
        _write_orbax(path, nested(_flat(params)))
    else:
        raise ValueError(f"{path}: cannot write {path.suffix}; give {_FORMATS}")


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaf names.

    Example:
      >>> nested({"dense/kernel": 1, "dense/bias": 2, "a~1b": 3})
      {'dense': {'kernel': 1, 'bias': 2}, 'a/b': 3}
    """
    root: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = (key.replace("~1", "/").replace("~0", "~") for key in name.split("/"))
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return root


_FORMATS = ".safetensors, .npz, .msgpack or an orbax directory (no suffix)"


def _flat(params: Params) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(leaf) for name, leaf in tree.named_leaves(params)}


def _read_safetensors(path: Path) -> Params:
    return nested(load_file(path))


def _read_npz(path: Path) -> Params:
    with np.load(path, allow_pickle=False) as arrays:
        return nested(dict(arrays))


def _read_msgpack(path: Path) -> Params:
    return serialization.msgpack_restore(path.read_bytes())


def _orbax() -> Any:
    try:
        from orbax import checkpoint
    except ImportError as error:
        raise ValueError("orbax checkpoints need orbax: pip install 'lnq[orbax]'") from error
    return checkpoint


def _read_orbax(path: Path) -> Params:
    with _orbax().PyTreeCheckpointer() as checkpointer:
        return jax.tree.map(np.asarray, checkpointer.restore(path.absolute()))


def _write_orbax(path: Path, params: Params) -> None:
    with _orbax().PyTreeCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params)
