"""Which widths the weights and the data at each site get, from what a user asks for by name."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lnq import tree
from lnq.sites import Site
from lnq.types import Select

__all__ = ["Widths", "require_weights", "site_widths"]


class Widths(NamedTuple):
    """Bits, int32 of shape ``[l..]``: one for each layer of a leaf that scans slice.

    Attributes:
      weights: By leaf; leaves that stay float are not in it.
      acts: Those of the data, by site; likewise.
    """

    weights: dict[str, np.ndarray]
    acts: dict[str, np.ndarray]


def site_widths(
    sites: Sequence[Site],
    weight_bits: int | Select | None,
    act_bits: int | Select | None,
    edge_bits: int | None = None,
    skip: Select | None = None,
) -> Widths:
    """Widths of weights and data at every site.

    Args:
      sites: All sites, in forward order.
      weight_bits: A number, a mapping from regular expressions on leaf names to numbers, or a
        function of the name; 4 where none matches. None, also as one of the values, is float.
      act_bits: The same for the data at the sites of a leaf.
      edge_bits: Least width at the first and the last site, where they are not float.
      skip: Leaves that stay float, with their data. Layers of a sliced leaf are asked for as
        ``name[i]``; where not all of them are to stay float, those that are get 16 bits.

    Raises:
      ValueError: If a width is not a whole number from 1 to 16.
    """
    found = Widths({}, {})
    for site in sites:
        lengths = tuple(site.shape[axis] for axis in site.sliced)
        names = [site.path + "".join(f"[{i}]" for i in at) for at in np.ndindex(*lengths)]
        skipped = [skip is not None and bool(tree.lookup(skip, name, False)) for name in names]
        for bits, key, widths in (
            (weight_bits, site.path, found.weights),
            (act_bits, site.name, found.acts),
        ):
            asked = [None if s else _asked(bits, n) for s, n in zip(skipped, names, strict=True)]
            if any(asked):
                width = np.array([16 if b is None else b for b in asked], np.int32)
                if edge_bits is not None:
                    width[:1] = np.maximum(width[:1], edge_bits * (site is sites[0]))
                    width[-1:] = np.maximum(width[-1:], edge_bits * (site is sites[-1]))
                widths[key] = np.maximum(width.reshape(lengths), widths.get(key, 1))
    return found


def require_weights(sites: Sequence[Site], widths: Widths) -> None:
    """Raise ``ValueError`` where data is to be rounded beside float weights."""
    floats = {site.path for site in sites if site.name in widths.acts} - set(widths.weights)
    if floats:
        raise ValueError(f"weight_bits: None for {sorted(floats)}; name them in `skip`")


def _asked(bits: int | Select | None, name: str) -> int | None:
    width: Any = bits
    if isinstance(bits, str | Mapping) or callable(bits):
        width = tree.lookup(bits, name, 4)
    if width is not None and width not in range(1, 17):
        raise ValueError(f"bits: {name!r} has {width!r}, not a number from 1 to 16 (None is float)")
    return None if width is None else int(width)
