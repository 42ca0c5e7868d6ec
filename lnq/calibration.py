r"""Calibration: batches of examples in, statistics of the data at every site out.

One pass over any number of batches. What is kept of the values of a channel is

* how many, their mean and the sum of squares about it, the smallest and the largest, exactly;
* a histogram whose bins are floating-point themselves: 16 to each power of two from 2^-20 to 2^16,
  and one for zero. It never has to be rescaled, so merging is adding; an outlier costs the other
  values no precision; the zeros behind a ReLU are counted as zeros.

From the histogram follow the mean distance :math:`b`, the error of any grid and of any clip, for
any number of bits, without the model: statistics are saved and used again.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lnq import quantizer
from lnq.quantizer import QParams
from lnq.sites import OtherUse, Site, Sites, Stat, Window, find_sites, tap
from lnq.types import ApplyFn, Params, Progress

__all__ = [
    "ActStats",
    "Calibration",
    "as_batches",
    "batch_size",
    "bin_values",
    "calibrate",
    "grid_error",
    "load",
    "mean_distance",
    "merge",
    "observe",
    "pooled",
    "rounded_mean",
    "save",
]

LOWEST, HIGHEST, STEPS = -20, 16, 16
"""Powers of two that the histogram spans, and its bins per power."""

BINS = (HIGHEST - LOWEST) * STEPS
"""Bins of either sign."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ActStats:
    """What is known of the data at one site, per channel; ``[l.., c]``, l for stacked layers.

    Attributes:
      count: Number of values; 0 where no data came by.
      mean: Their mean, value units.
      squares: Sum of squared distances from it, squared value units.
      low: The smallest, value units.
      high: The largest.
      histogram: Counts, int32 ``[l.., c, 1 + 2 BINS]``: zero, positive bins, negative bins.
    """

    count: jax.Array
    mean: jax.Array
    squares: jax.Array
    low: jax.Array
    high: jax.Array
    histogram: jax.Array

    @property
    def sigma(self) -> jax.Array:
        """Standard deviation (unbiased), value units."""
        return jnp.sqrt(self.squares / jnp.maximum(self.count - 1.0, 1.0))


class Calibration(NamedTuple):
    """Statistics of a model's sites.

    Attributes:
      sites: The sites and other uses of the leaves.
      stats: By site name; sites that read the same value share them.
    """

    sites: Sites
    stats: Mapping[str, ActStats]


def as_batches(calib: Any, size: int | None = None) -> list[Any]:
    """Batches of a calibration set.

    An array, dict or tuple is one pytree of examples (leading axis) and becomes one batch; a list
    or an iterator holds batches.

    Args:
      calib: The set.
      size: Cut batches into parts of so many examples; what is left over is a smaller one.

    Raises:
      ValueError: If there is no batch, no example, or leading axes disagree.

    Example:
      >>> [batch_size(batch) for batch in as_batches([np.ones((4, 2)), np.ones((3, 2))])]
      [4, 3]
    """
    batches = list(calib) if isinstance(calib, list | Iterator) else [calib]
    if not batches:
        raise ValueError("calib: no batch; give at least one example")
    counts = [batch_size(batch) for batch in batches]
    if size is None or max(counts) <= size:
        return batches
    return [
        jax.tree.map(lambda a, i=i, n=n: a[i : i + n], batch)
        for batch, n in zip(batches, (size or count for count in counts), strict=True)
        for i in range(0, batch_size(batch), n)
    ]


def batch_size(batch: Any) -> int:
    """Number of examples in one batch: the leading axis that all its arrays share."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes or (0,) in sizes:
        raise ValueError(
            "calib: the arrays of a batch must share a leading axis of examples, but their "
            f"shapes are {[np.shape(x) for x in jax.tree.leaves(batch)]}"
        )
    return sizes.pop()[0]


def bin_values(samples: int = 1) -> jax.Array:
    """Values that stand for each bin, evenly inside it; float32 ``[1 + 2 BINS, samples]``.

    Example:
      >>> bin_values()[1 + 20 * 16, 0]  # the bin of 1 .. 17/16
      Array(1.03125, dtype=float32)
    """
    powers = 2.0 ** np.repeat(np.arange(LOWEST, HIGHEST), STEPS)[:, None]
    inside = (np.arange(samples) + 0.5) / samples
    values = powers * (
        1.0 + (np.tile(np.arange(STEPS), HIGHEST - LOWEST)[:, None] + inside) / STEPS
    )
    return jnp.asarray(np.concatenate([np.zeros((1, samples)), values, -values]), jnp.float32)


def _bins(x: jax.Array) -> jax.Array:
    """Bin of each value: the exponent and the first four bits of the fraction, as they stand."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32)
    places = jnp.clip((bits >> 19) - ((127 + LOWEST) << 4) + 1, 0, BINS)
    return jnp.where((x < 0.0) & (places > 0), places + BINS, places)


@partial(jax.jit, static_argnames="axes", inline=True)
def observe(x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None = None) -> ActStats:
    """Statistics of one array.

    Args:
      x: Values, any float dtype.
      axes: Its channel axes; flattened to one, in this order.
      mask: Which values count; of the shape of the first axes of ``x``, or flat over them; one
        that fits neither way is about something else, and all values count.

    Example:
      >>> stats = observe(jnp.array([[1.0, -4.0], [3.0, 0.0]]), axes=(1,))
      >>> stats.mean, stats.high, stats.count
      (Array([ 2., -2.], dtype=float32), Array([3., 0.], ...), Array([2., 2.], ...))
    """
    channels = np.prod([x.shape[axis] for axis in axes], dtype=int)
    rest = [axis for axis in range(x.ndim) if axis not in axes]
    weight = _mask(x.shape, axes, mask).transpose(*rest, *axes).reshape(-1, channels)
    x = jnp.asarray(x, jnp.float32).transpose(*rest, *axes).reshape(-1, channels)
    count = jnp.sum(weight, 0, dtype=jnp.float32)
    mean = jnp.sum(jnp.where(weight, x, 0.0), 0) / jnp.maximum(count, 1.0)
    places = _bins(x) + jnp.arange(channels)[None] * (1 + 2 * BINS)
    flat = jnp.zeros(channels * (1 + 2 * BINS), jnp.int32)
    return ActStats(
        count,
        mean,
        jnp.sum(jnp.where(weight, (x - mean[None]) ** 2, 0.0), 0),
        jnp.min(jnp.where(weight, x, jnp.inf), 0, initial=jnp.inf),
        jnp.max(jnp.where(weight, x, -jnp.inf), 0, initial=-jnp.inf),
        flat.at[places.ravel()].add(weight.ravel().astype(jnp.int32)).reshape(channels, -1),
    )


def _mask(shape: tuple[int, ...], axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
    """Which values count, in the shape of the data."""
    if mask is not None and mask.shape == shape[: mask.ndim] and mask.ndim <= min(axes):
        mask = mask.astype(bool)
    elif mask is not None and (mask.size,) == shape[:1] and min(axes) > 0:
        mask = mask.astype(bool).ravel()
    else:
        mask = jnp.ones((), bool)
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def merge(a: ActStats, b: ActStats) -> ActStats:
    """Statistics of both together; in any order and grouping, up to rounding."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1.0)
    shift = b.mean - a.mean
    return ActStats(
        count,
        a.mean + shift * share,
        a.squares + b.squares + shift**2 * a.count * share,
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        a.histogram + b.histogram,
    )


def _nothing(like: ActStats) -> ActStats:
    """Identity of :func:`merge`."""
    empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    low = jnp.full(like.low.shape, jnp.inf)
    return ActStats(empty.count, empty.mean, empty.squares, low, -low, empty.histogram)


POOLED = Stat(lambda x, site: observe(x, ()), _nothing, merge)
"""For :func:`~lnq.sites.tap`: statistics of all data at a site as one channel."""


@partial(jax.jit, inline=True)
def pooled(stats: ActStats) -> ActStats:
    """All channels as one; ``[l.., c]`` to ``[l.., 1]``."""
    count = jnp.sum(stats.count, -1, keepdims=True)
    mean = jnp.sum(stats.mean * stats.count, -1, keepdims=True) / jnp.maximum(count, 1.0)
    between = jnp.sum(stats.count * (stats.mean - mean) ** 2, -1, keepdims=True)
    return ActStats(
        count,
        mean,
        jnp.sum(stats.squares, -1, keepdims=True) + between,
        jnp.min(stats.low, -1, keepdims=True),
        jnp.max(stats.high, -1, keepdims=True),
        jnp.sum(stats.histogram, -2, keepdims=True),
    )


def mean_distance(stats: ActStats) -> jax.Array:
    """Laplace's b: mean distance from the mean, to the width of a bin; value units."""
    values = bin_values()[:, 0].reshape((1,) * stats.mean.ndim + (-1,))
    distance = jnp.abs(values - stats.mean[..., None])
    return jnp.minimum(_expected(stats, distance), stats.sigma)


def grid_error(
    stats: ActStats, qparams: QParams, samples: int = 2, p: ArrayLike = 2.0
) -> jax.Array:
    """Mean error of rounding the data to a grid, to the power p; value units to that power.

    Args:
      stats: Statistics, ``[c]``.
      qparams: The grid, fields ``[c]``.
      samples: Points per bin of the histogram.
      p: The power; may be traced.
    """
    values, rounded = _rounded(stats, qparams, samples)
    return _expected(stats, jnp.mean(jnp.abs(rounded - values) ** p, -1))


def rounded_mean(stats: ActStats, qparams: QParams, samples: int = 8) -> jax.Array:
    """Mean of the data rounded to a grid; value units, ``[c]``."""
    return _expected(stats, jnp.mean(_rounded(stats, qparams, samples)[1], -1))


def _rounded(stats: ActStats, qparams: QParams, samples: int) -> tuple[jax.Array, jax.Array]:
    """Values of each bin, none beyond the data, and what they round to; ``[.., c, bins, s]``."""
    values = bin_values(samples).reshape((1,) * stats.count.ndim + (-1, samples))
    values = jnp.clip(values, stats.low[..., None, None], stats.high[..., None, None])
    grid = jax.tree.map(lambda a: a[..., None, None], qparams)
    return values, quantizer.fake_quant(values, grid)


def _expected(stats: ActStats, of_bins: jax.Array) -> jax.Array:
    """Mean over the data of a function of the bin."""
    counts = stats.histogram.astype(jnp.float32)
    return jnp.sum(counts * of_bins, -1) / jnp.maximum(stats.count, 1.0)


def calibrate(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    mask: Callable[[Any], jax.Array] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the model over calibration data, once, and keep statistics of what each site reads.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples: an array, dict or tuple is one batch, a list holds batches.
      mask: ``mask(batch)``: which examples, or which tokens of them, are real and not padding;
        bool ``[b]`` or ``[b, t]``.
      progress: Called after every batch.

    Raises:
      ValueError: If ``calib`` is not a set of batches.

    Example:
      >>> found = calibrate(lambda p, x: x @ p["w"], {"w": jnp.eye(2)}, np.array([[1.0, 2.0]]))
      >>> found.stats["w"].mean
      Array([1., 2.], dtype=float32)
    """
    batches = as_batches(calib)
    sites = find_sites(apply_fn, params, batches[0])
    first = {}
    for site in sites.sites:
        first.setdefault(_source(site), site.name)
    names = set(first.values())

    @jax.jit
    def run(params: Params, batch: Any) -> dict[str, ActStats]:
        which = None if mask is None else mask(batch)
        stat = Stat(
            lambda x, site: observe(x, site.act_channels, None if site.shards else which),
            _nothing,
            merge,
        )
        return tap(apply_fn, stat, lambda site: site.name in names)(params, batch)[1]

    total = None
    for done, batch in enumerate(batches, 1):
        found = run(params, batch)
        total = found if total is None else _merge_all(total, found)
        if progress:
            progress(done, len(batches), "calibration")
    assert total is not None
    return Calibration(sites, {site.name: total[first[_source(site)]] for site in sites.sites})


def _source(site: Site) -> tuple[Any, ...]:
    """Equal where sites see the same data; of two branches only one may see it."""
    return site.input, site.stack, site.act_channels, site.name if site.loops else ""


@jax.jit
def _merge_all(a: dict[str, ActStats], b: dict[str, ActStats]) -> dict[str, ActStats]:
    return {name: merge(a[name], b[name]) for name in a}


def save(path: str | os.PathLike, calibration: Calibration) -> None:
    """Write statistics to an ``.npz`` file, for other bit widths and other methods."""
    owners = {id(stats): name for name, stats in reversed(list(calibration.stats.items()))}
    arrays = {
        f"{name}/{field.name}": np.asarray(getattr(calibration.stats[name], field.name))
        for name in owners.values()
        for field in fields(ActStats)
    }
    header = {
        "sites": [_plain_site(site) for site in calibration.sites.sites],
        "others": calibration.sites.others,
        "owner": {name: owners[id(stats)] for name, stats in calibration.stats.items()},
    }
    with open(path, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, **{HEADER: json.dumps(header)})


def load(path: str | os.PathLike) -> Calibration:
    """Read what :func:`save` wrote.

    Raises:
      ValueError: If the file is something else.
    """
    with np.load(path, allow_pickle=False) as file:
        if HEADER not in file:
            raise ValueError(f"{os.fspath(path)}: not a file of calibration statistics")
        header = json.loads(str(file[HEADER]))
        names = set(header["owner"].values())
        owned = {
            name: ActStats(
                *(jnp.asarray(file[f"{name}/{field.name}"]) for field in fields(ActStats))
            )
            for name in names
        }
    sites = tuple(_site(site) for site in header["sites"])
    others = tuple(OtherUse(a, b, c, tuple(shape)) for a, b, c, shape in header["others"])
    return Calibration(
        Sites(sites, others), {name: owned[owner] for name, owner in header["owner"].items()}
    )


HEADER = "__calibration__"


def _plain_site(site: Site) -> dict[str, Any]:
    """A site as JSON has it."""
    arrays = {k: [getattr(site, k).shape, str(getattr(site, k).dtype)] for k in ("act", "out")}
    return site._asdict() | arrays


def _site(plain: dict[str, Any]) -> Site:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
    fields |= {k: jax.ShapeDtypeStruct(*plain[k]) for k in ("act", "out")}
    fields["stack"] = tuple(map(tuple, plain["stack"]))
    if plain["window"]:
        window = Window(*plain["window"])
        lists = {k: tuple(v) for k, v in window._asdict().items() if isinstance(v, list)}
        padding = tuple(map(tuple, window.padding))
        fields["window"] = window._replace(**(lists | {"padding": padding}))
    return Site(**fields)
