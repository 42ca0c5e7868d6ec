"""Calibration data: what a user hands over, as a list of batches."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

__all__ = ["as_batches", "batch_size"]


def as_batches(calib: Any) -> list[Any]:
    """Batches of a calibration set.

    An array, dict or tuple is one pytree of examples (leading axis) and becomes one batch; a list
    or an iterator holds batches.

    Raises:
      ValueError: If there is no batch, no example, or leading axes disagree.

    Example:
      >>> [batch_size(batch) for batch in as_batches([np.ones((4, 2)), np.ones((3, 2))])]
      [4, 3]
    """
    batches = list(calib) if isinstance(calib, list | Iterator) else [calib]
    if not batches:
        raise ValueError("calib: no batch; give at least one example")
    for batch in batches:
        batch_size(batch)
    return batches


def batch_size(batch: Any) -> int:
    """Number of examples in one batch: the leading axis that all its arrays share."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "calib: the arrays of a batch must share a leading axis of examples, but their "
            f"shapes are {[np.shape(x) for x in jax.tree.leaves(batch)]}"
        )
    return sizes.pop()[0]
