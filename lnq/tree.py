"""Parameter trees: names of leaves, choosing among them, mapping over them.

A leaf's name is its path joined by ``/``, the same for linen dicts and NNX states: an NNX variable
goes by the name of its place, and a ``/`` inside a key is written ``~1`` (``~`` as ``~0``), as in
JSON pointers.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lnq.quantizer import is_quantized
from lnq.types import Params, Select

__all__ = ["check_finite", "is_float", "leaf_name", "lookup", "map_named", "named_leaves"]


def leaf_name(path: tuple[Any, ...]) -> str:
    """Name of a key path.

    Example:
      >>> (path, _), = jax.tree_util.tree_leaves_with_path({"a/b": [{7: 0.0}]})
      >>> leaf_name(path)
      'a~1b/0/7'
    """
    keys = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return "/".join(key.replace("~", "~0").replace("/", "~1") for key in keys)


def named_leaves(tree: Params) -> list[tuple[str, Any]]:
    """Names and leaves in JAX's order; a quantized leaf counts as one."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_node)
    return [pair for path, node in pairs for pair in _inside(path, node)]


def map_named(fn: Callable[..., Any], tree: Params, *rest: Params) -> Params:
    """Map ``fn(name, leaf, *others)`` over a tree; a quantized leaf counts as one."""
    names = iter([name for name, _ in named_leaves(tree)])
    return jax.tree.map(lambda *leaves: fn(next(names), *leaves), tree, *rest, is_leaf=is_quantized)


def _is_node(x: Any) -> bool:
    return is_quantized(x) or isinstance(x, nnx.Variable)


def _inside(path: tuple[Any, ...], node: Any) -> list[tuple[str, Any]]:
    """The leaf itself or, in an NNX variable, the leaves of its value."""
    if not isinstance(node, nnx.Variable):
        return [(leaf_name(path), node)]
    pairs = jax.tree_util.tree_leaves_with_path(node, is_leaf=is_quantized)
    return [(leaf_name((*path, *inner[1:])), leaf) for inner, leaf in pairs]


def lookup(select: Select, name: str, default: Any = None) -> Any:
    """The value that ``select`` gives a leaf.

    A regular expression gives True where it is found in the name, a mapping the value of the first
    of its expressions that is found, a function whatever it returns; ``default`` where none is.

    Example:
      >>> lookup({"head": 8, "conv": 4}, "block1/conv1/kernel", default=32)
      4
    """
    if callable(select):
        return select(name)
    pairs = select if isinstance(select, Mapping) else {select: True}
    return next((v for pattern, v in pairs.items() if re.search(pattern, name)), default)


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers."""
    return not is_quantized(leaf) and jnp.issubdtype(
        getattr(leaf, "dtype", np.dtype(object)), jnp.floating
    )


def check_finite(params: Params) -> None:
    """Raise ``ValueError`` with the name of the first float leaf that holds NaN or infinity.

    Under ``jit`` there are no values to look at, and nothing is checked.
    """
    leaves = {
        name: leaf
        for name, leaf in named_leaves(params)
        if is_float(leaf) and not isinstance(leaf, jax.core.Tracer)
    }
    with jax.ensure_compile_time_eval():  # a constant of a function being traced has values too
        finite = jax.device_get(_all_finite(leaves))
    for name in leaves:
        if not finite[name]:
            raise ValueError(f"params: {name!r} holds NaN or infinity; nothing was quantized")


@jax.jit
def _all_finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), leaves)
