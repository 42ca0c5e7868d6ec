r"""A site as products of matrices: rows of its data, times a matrix of its leaf.

Every product with a whole leaf, dense, batched or a convolution of any kind, is for each layer l of
a sliced leaf and each of g groups

.. math:: Y_{lg} = X_{lg} W_{lg}, \qquad X_{lg} \in \mathbb{R}^{r \times n}, \;
          W_{lg} \in \mathbb{R}^{n \times o},

where a row of :math:`X` is what one place of the output is computed from: for a convolution the
window there, zeros of the padding included. So whatever fits a layer to its data has one form, a
sample of r rows is all that it needs of the data, and layers of equal n and o can be fitted
together.
"""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lnq.sites import Site, Window

__all__ = ["count_rows", "from_matrix", "reason", "rows", "to_matrix"]


def reason(site: Site) -> str:
    """Why a site has no such form, or an empty string."""
    if site.shards:
        return "inside shard_map"
    return "" if site.whole else "the product reads a part of the leaf, or is ragged"


def count_rows(site: Site) -> int:
    """Number of rows in one call: places of the output, its channels not counted."""
    groups = prod(site.shape[axis] for axis in site.batch)
    return prod(site.out.shape) // (prod(site.shape[axis] for axis in site.channels) * groups)


def to_matrix(w: jax.Array, site: Site) -> jax.Array:
    """A leaf, or a field of its grid, as matrices.

    Args:
      w: Of the leaf's rank; each dimension that of the leaf, or 1 for all entries along
        ``site.contracting`` (and the layers, and the groups) together.
      site: Where it is used.

    Returns:
      ``[l, g, n, o]``; l, g and n are 1 where they are shared.

    Example:
      >>> from lnq.sites import find_sites
      >>> w, x = jnp.ones((5, 3)), jnp.ones((7, 3))
      >>> site, = find_sites(lambda p, x: x @ p.T, w, x).sites
      >>> to_matrix(w, site).shape, count_rows(site)
      ((1, 1, 3, 5), 7)
    """
    order = (*site.sliced, *site.batch, *site.contracting, *site.channels)
    sizes = (prod(w.shape[i] for i in axes) for axes in _roles(site))
    layers, batch, summed, channels = sizes
    w = w.transpose(order).reshape(layers, batch, summed, channels)
    if site.window is None or site.window.groups == 1:
        return w
    groups = site.window.groups
    return jnp.swapaxes(w.reshape(layers, summed, groups, channels // groups), 1, 2)


def from_matrix(m: jax.Array, site: Site) -> jax.Array:
    """The inverse of :func:`to_matrix`: a leaf, or a field of its grid.

    Args:
      m: ``[l, g, n, o]``; l or n may be 1 for a field that is shared along it.
      site: Where the leaf is used.
    """
    if site.window is not None and site.window.groups > 1:
        m = jnp.swapaxes(m, 1, 2).reshape(m.shape[0], 1, m.shape[2], -1)
    shape, order = [], []
    for size, axes in zip(m.shape, _roles(site), strict=True):
        full = tuple(site.shape[i] for i in axes)
        shape += full if prod(full) == size else (1,) * len(full)
        order += axes
    return m.reshape(shape).transpose(np.argsort(order))


def _roles(site: Site) -> tuple[tuple[int, ...], ...]:
    return site.sliced, site.batch, site.contracting, site.channels


def rows(x: jax.Array, site: Site, places: jax.Array) -> jax.Array:
    """Rows of the data at some places of the output.

    Args:
      x: The data, as the site reads it.
      site: The site.
      places: Numbers from 0 to :func:`count_rows` (of data of this size), ``[r]``.

    Returns:
      ``[g, r, n]``, dtype of ``x``.

    Example:
      >>> from lnq.sites import find_sites
      >>> conv = lambda p, x: jax.lax.conv_general_dilated(x, p, (1,), "SAME")
      >>> x = jnp.arange(1.0, 5.0).reshape(1, 1, 4)
      >>> site, = find_sites(conv, jnp.ones((1, 1, 3)), x).sites
      >>> rows(x, site, jnp.array([0, 2]))
      Array([[[0., 1., 2.],
              [2., 3., 4.]]], dtype=float32)
    """
    if site.window is not None:
        return _windows(x, site, site.window, places)
    free = [i for i in range(x.ndim) if i not in (*site.act_batch, *site.act_channels)]
    groups, summed = (prod(x.shape[i] for i in a) for a in (site.act_batch, site.act_channels))
    x = x.transpose(*site.act_batch, *free, *site.act_channels)
    return x.reshape(groups, -1, summed)[:, places]


def _windows(x: jax.Array, site: Site, window: Window, places: jax.Array) -> jax.Array:
    """What the kernel sees at some places of the output, by features and then by place in it."""
    (feature,) = site.act_channels
    (example,) = set(range(x.ndim)) - {feature, *window.axes}
    x = x.transpose(example, feature, *window.axes)
    edges = [
        (low, high, step - 1)
        for (low, high), step in zip(window.padding, window.dilation, strict=True)
    ]
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *edges])
    reach = [1 + (k - 1) * d for k, d in zip(window.kernel, window.kernel_dilation, strict=True)]
    sizes = [
        (n - r) // stride + 1
        for n, r, stride in zip(x.shape[2:], reach, window.strides, strict=True)
    ]

    def one(place: jax.Array) -> jax.Array:
        which, *at = jnp.unravel_index(place, (x.shape[0], *sizes))
        corner = [i * stride for i, stride in zip(at, window.strides, strict=True)]
        zero = jnp.zeros_like(which)
        cut = lax.dynamic_slice(x, (which, zero, *corner), (1, x.shape[1], *reach))[0]
        return cut[(slice(None), *(slice(None, None, d) for d in window.kernel_dilation))]

    found = jax.vmap(one)(places)
    return jnp.swapaxes(found.reshape(len(places), window.groups, -1), 0, 1)
