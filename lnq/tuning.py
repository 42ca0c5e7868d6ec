"""Repairs of a model around quantization. So far: batch-norm folded into the kernels before it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lnq.types import Params

__all__ = ["fold_batch_norm"]


def fold_batch_norm(
    variables: Params, pairs: Mapping[str, str], *, epsilon: float = 1e-5
) -> Params:
    r"""Move batch-norm's factor into the kernel before it; the model's function stays.

    .. math::
        w' = w \, \gamma / \sqrt{\sigma^2 + \epsilon}, \qquad
        \beta' = \beta - \mu\gamma/\sqrt{\sigma^2+\epsilon}

    The layer itself is kept, since the model's code calls it, as an identity plus bias:
    :math:`\gamma' = 1, \mu' = 0, \sigma'^2 = 1 - \epsilon`.

    Args:
      variables: Flax variables with ``params`` and ``batch_stats``.
      pairs: Path of each convolution or dense layer (no bias) to the path of the batch-norm that
        follows it, ``/``-separated.
      epsilon: Batch-norm's own.

    Returns:
      Variables of the same structure.

    Raises:
      ValueError: If a path is not there, or the layer has a bias.

    Example:
      >>> norm = {"scale": jnp.array([2.0]), "bias": jnp.array([0.0])}
      >>> stats = {"mean": jnp.array([3.0]), "var": jnp.array([4.0 - 1e-5])}
      >>> folded = fold_batch_norm(
      ...     {"params": {"conv": {"kernel": jnp.ones((1, 1))}, "bn": norm},
      ...      "batch_stats": {"bn": stats}}, {"conv": "bn"})
      >>> folded["params"]["conv"]["kernel"], folded["params"]["bn"]["bias"]
      (Array([[1.]], dtype=float32), Array([-3.], dtype=float32))
    """
    variables = jax.tree.map(lambda x: x, variables)  # new dicts around the same arrays
    for layer_path, norm_path in pairs.items():
        layer = _at(variables["params"], layer_path)
        norm, stats = _at(variables["params"], norm_path), _at(variables["batch_stats"], norm_path)
        if "bias" in layer:
            raise ValueError(f"pairs: {layer_path!r} has a bias; only layers without can be folded")
        factor = norm["scale"] / jnp.sqrt(stats["var"] + epsilon)
        kernel = layer["kernel"]
        layer["kernel"] = kernel * factor.reshape((1,) * (kernel.ndim - 1) + (-1,))
        norm["bias"] = norm["bias"] - stats["mean"] * factor
        norm["scale"] = jnp.ones_like(factor)
        stats["mean"] = jnp.zeros_like(factor)
        stats["var"] = jnp.full_like(factor, 1.0 - epsilon)
    return variables


def _at(node: Any, path: str) -> dict[str, Any]:
    for key in path.split("/"):
        if key not in node:
            raise ValueError(f"pairs: no {path!r} in the variables; {key!r} is missing")
        node = node[key]
    return node
