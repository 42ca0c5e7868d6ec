"""The few words that every module shares.

Letters for dimensions, used in all docstrings:

====  =======================================================
b     examples of a batch
l     layers of a stacked leaf
n     entries of one layer's tensor
i, o  input and output channels of a kernel (Flax: last two axes)
====  =======================================================
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

__all__ = ["ApplyFn", "LossFn", "Params", "Progress", "Select", "UnreachableError"]

Params: TypeAlias = Any
"""Any pytree of arrays: a linen variable dict, an NNX state, a dataclass."""

ApplyFn: TypeAlias = Callable[[Params, Any], Any]
"""``apply_fn(params, batch) -> outputs``, any JAX function."""

LossFn: TypeAlias = Callable[[Any, Any], Any]
"""``loss_fn(outputs, batch) -> scalar``, the mean over the examples of the batch."""

Progress: TypeAlias = Callable[[int, int | None, str], None]
"""``progress(done, total, what)``, called as work proceeds; the total is None where unknown."""

Select: TypeAlias = str | Mapping[str, Any] | Callable[[str], Any]
"""A regular expression on leaf paths, a mapping from such to values, or a function of the path."""


class UnreachableError(ValueError):
    """A bound that no setting of the method meets.

    Attributes:
      best: The smallest value that can be reached, in the unit of the bound.
    """

    def __init__(self, message: str, best: float):
        super().__init__(message)
        self.best = best
