r"""ACIQ: post-training quantization in closed form, weights and activations, no search.

Three tools that work on one tensor at a time, with no labels and no gradient:

* a clip :math:`\alpha` from the spread of the values, so that overload and rounding balance,

  .. math:: \min_\alpha \; \mathbb{E}\,(x - Q_\alpha(x))^2,

  solved for Laplace and Gaussian densities (:mod:`lnq.clipping`), the density judged by the
  measured error;
* widths per channel, so that :math:`\sum_i \alpha_i^2 4^{-M_i}` is small at a given average;
* bias correction: each channel of the rounded weights gets back its mean, or its mean and norm.

Source: Banner et al., `Post training 4-bit quantization of convolutional networks for
rapid-deployment <https://arxiv.org/abs/1810.05723>`_, 2019, and its authors' released code.

Differs from the paper and the code in: statistics are those of what a product reads, behind the
ReLU, on calibration data (the code's come from the batch under test, before the ReLU); clips are
optimal for the exact grid; a channel of 0 bits becomes its mean; bias correction goes into scale
and zero point, in the code's order (the paper's leaves the mean off); that of activations goes into
the bias leaf that follows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lnq import calibration, clipping, distortion, sites, tree
from lnq.calibration import ActStats, Calibration
from lnq.quantizer import (
    QParams,
    QTensor,
    affine_grid,
    correct_bias,
    dequantize_array,
    fake_quant,
    narrow,
)
from lnq.quantizer import quantize as round_to
from lnq.sites import OtherUse, Site
from lnq.types import ApplyFn, Params, Progress, Select
from lnq.widths import require_weights, site_widths

__all__ = [
    "ACIQInfo",
    "Clip",
    "Correct",
    "SiteRow",
    "act_grid",
    "quantize",
    "quantize_array",
    "quantize_weights",
]

Clip = Literal["auto", "laplace", "gauss", "mix", "kld", "max"]
"""How a clip is found: ``auto`` takes the least measured error of the exact Laplace and Gaussian
optima and no clip. The others are baselines: the published Laplace and Gauss clips, ``mix`` the
least error of those two and no clip, ``kld`` the divergence of histograms (activations only), and
``max`` no clip."""

Correct = Literal["mean", "norm", "none"]
"""What rounding weights must not change: the mean of each channel (as in the published results),
its mean and norm (the full rule), or nothing."""

Allocate = Callable[[jax.Array, ArrayLike], jax.Array]
"""``allocate(spread [n], mean bits) -> bits [n]``: a rule of :mod:`lnq.clipping`, the published
``published_bits`` or ``greedy_bits``, which keeps to the average and has less error."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "auto": ("laplace grid", "gauss grid", "max"),
    "laplace": ("laplace",),
    "gauss": ("gauss",),
    "mix": ("laplace", "gauss", "max"),
    "kld": ("kld",),
    "max": ("max",),
}
"""Clips among which the measured error decides."""


class SiteRow(NamedTuple):
    """What became of one site.

    Attributes:
      path: Name of the leaf.
      use: Which of the leaf's sites.
      kind: Primitive.
      shape: Shape of the leaf.
      macs: Multiplications and additions of one call on the calibration batch.
      weight_bits: Mean width of the codes; 32 for floats.
      act_bits: Mean width of the data's codes; 32 for floats.
      clip: Largest magnitude that the data's grid holds, value units (largest of its grids).
      distribution: Which clip had the least error for the data (in most of its grids).
      weight_sqnr: Signal to noise of the weights, decibels.
      act_sqnr: The same of the data, on the calibration set.
      status: ``int8`` (integers multiplied), ``fake-quant`` (rounded floats multiplied),
        ``weights only`` or ``float``.
      reason: Why it is not ``int8``, or empty.
    """

    path: str
    use: int
    kind: str
    shape: tuple[int, ...]
    macs: int
    weight_bits: float
    act_bits: float
    clip: float
    distribution: str
    weight_sqnr: float
    act_sqnr: float
    status: str
    reason: str


class ACIQInfo(NamedTuple):
    """Outcome of :func:`quantize`.

    Attributes:
      rows: One per site, in forward order.
      others: Uses of leaves, and products of data, that are not quantized.
      calibration: The statistics; pass them as ``calib`` to quantize again with other options.
    """

    rows: tuple[SiteRow, ...]
    others: tuple[OtherUse, ...]
    calibration: Calibration


class _Spread(NamedTuple):
    """What a clip is computed from; arrays of one shape."""

    mean: jax.Array
    low: jax.Array
    high: jax.Array
    b: jax.Array
    sigma: jax.Array
    one_sided: jax.Array


def quantize_array(
    w: jax.Array,
    bits: ArrayLike,
    *,
    axes: tuple[int, ...] | None = None,
    stacked: int = 0,
    group_size: int | None = None,
    clip: Clip = "max",
    allocate: Allocate | None = None,
    correct: Correct = "mean",
) -> QTensor:
    """Quantize one weight array, per channel or per group.

    Args:
      w: Weights, any float dtype; the first ``stacked`` axes count layers.
      bits: Width; bits, whole; a number, or one for each layer, shape ``w.shape[:stacked]``.
        May be traced.
      axes: The axes that a product sums over; default all but the last and the stacked ones. All
        others are channels.
      stacked: Number of stacked axes.
      group_size: Entries of the longest of ``axes`` that share a grid; None for all.
      clip: How the clip is found, see :data:`Clip`.
      allocate: A rule that shares the average ``bits`` among the channels of a layer.
      correct: What rounding must not change, see :data:`Correct`.

    Returns:
      int16 codes.

    Raises:
      ValueError: If ``bits`` is out of 1 .. 16, ``group_size`` does not divide, or ``clip`` is
        unknown.

    Example:
      >>> w = jax.random.laplace(jax.random.key(0), (512, 8))
      >>> q = quantize_array(w, 4, clip="auto", correct="none")
      >>> distortion.sqnr_db(w, dequantize_array(q)).round(0)  # 10 log10(2 / 0.0505) is 16.0
      Array(16., dtype=float32)
    """
    _check(bits, clip, ("kld",))
    if correct not in get_args(Correct):
        raise ValueError(f"correct: must be one of {', '.join(get_args(Correct))}, not {correct!r}")
    axes = tuple(range(stacked, w.ndim - 1)) if axes is None else axes
    shape, x = w.shape, distortion.wide(w).astype(jnp.float32)
    split = None
    if group_size is not None:
        x, axes, split = _grouped(x, axes, group_size)
    width = jnp.asarray(bits)
    width = width.reshape(width.shape + (1,) * (x.ndim - width.ndim))
    spread = _array_spread(x, axes)
    width = jnp.broadcast_to(width, spread.mean.shape)
    if allocate is not None:
        width = _allocated(allocate, spread.sigma, width, stacked)

    def error(grid: QParams) -> jax.Array:
        return jnp.mean((x - fake_quant(x, grid)) ** 2, axes, keepdims=True)

    grid, _ = _least(spread, width, clip, error)
    q = round_to(x, _chosen(width == 0, spread.mean, grid), jnp.int16)
    if correct != "none":
        grid = correct_bias(x, q, axes, norm=correct == "norm").qparams
        q = replace(q, qparams=_chosen(width == 0, spread.mean, grid))
    if split is not None:
        fields = jax.tree.map(lambda a: jnp.squeeze(a, split), q.qparams)
        q = replace(q, codes=q.codes.reshape(shape), qparams=fields)
    return replace(q, dtype=w.dtype)


def quantize_weights(
    params: Params,
    bits: ArrayLike = 4,
    *,
    select: Select | None = None,
    stacked: Select | None = None,
    group_size: int | None = None,
    clip: Clip = "max",
    allocate: Allocate | None = None,
    correct: Correct = "mean",
) -> Params:
    """Quantize the weights of a tree without a model; works under ``jit`` with bits as data.

    Args:
      params: Any tree; leaves that are not chosen, and those that are not floats, stay.
      bits: Width; bits, whole, a number.
      select: Which leaves; default those of two axes or more (stacked ones not counted).
      stacked: Which leaves hold layers along their first axis (``True``), or first few (a number).
      group_size: As in :func:`quantize_array`, as is all that follows.
      clip: How the clip is found.
      allocate: A rule that shares the bits among the channels of each leaf.
      correct: What rounding must not change.

    Returns:
      The tree with :class:`~lnq.quantizer.QTensor` leaves, int16 codes, one grid per channel (last
      axis); :func:`~lnq.quantizer.narrow` shortens a leaf's codes.

    Raises:
      ValueError: If no leaf is chosen, or, outside ``jit``, a weight is not finite.

    Example:
      >>> qtree = quantize_weights({"kernel": jnp.array([[0.0], [1.0], [2.0], [3.0]])}, bits=2)
      >>> dequantize_array(qtree["kernel"]).ravel()
      Array([0., 1., 2., 3.], dtype=float32)
    """
    tree.check_finite(params)
    options = {"group_size": group_size, "clip": clip, "allocate": allocate, "correct": correct}
    chosen = {}
    for name, w in tree.named_leaves(params):
        layers = 0 if stacked is None else int(tree.lookup(stacked, name, 0))
        if tree.is_float(w) and w.size and w.ndim > layers:
            default = w.ndim - layers >= 2
            if default if select is None else tree.lookup(select, name, False):
                chosen[name] = layers
    if not chosen:
        raise ValueError("params: no leaf to quantize; the default takes float leaves of two axes")

    def leaf(name: str, w: Any) -> Any:
        if name not in chosen:
            return w
        with _named(name):
            return _quantize_array(w, bits, stacked=chosen[name], **options)

    return tree.map_named(leaf, params)


@partial(jax.jit, static_argnames=("clip", "allocate"))
def act_grid(
    stats: ActStats, bits: ArrayLike, *, clip: Clip = "auto", allocate: Allocate | None = None
) -> tuple[QParams, jax.Array, jax.Array]:
    """Grids for data of known statistics, one per channel of ``stats``.

    Args:
      stats: As collected, or :func:`~lnq.calibration.pooled` for one grid.
      bits: Width, bits, whole; a number.
      clip: How the clip is found, see :data:`Clip`.
      allocate: A rule that shares ``bits`` among the channels; 0 bits make a channel its mean.

    Returns:
      The grids, fields ``[c]``; the index of the family of :data:`FAMILIES` taken, int32 ``[c]``;
      the mean squared error ``[c]``, squared value units.

    Example:
      >>> x = jax.random.laplace(jax.random.key(0), (10000, 1))
      >>> grid, family, error = act_grid(calibration.observe(x, (1,)), 4)
      >>> FAMILIES["auto"][int(family[0])], error.round(2)
      ('laplace grid', Array([0.05], dtype=float32))
    """
    spread = _stats_spread(stats)
    width = jnp.broadcast_to(jnp.asarray(bits, jnp.int32), spread.mean.shape)
    if allocate is not None:
        width = _allocated(allocate, spread.sigma, width, 0)
    error = partial(calibration.grid_error, stats)
    if clip == "kld":
        grid = affine_grid(*_kld_interval(stats, spread, width), width)
        family = jnp.zeros(spread.mean.shape, jnp.int32)
    else:
        grid, family = _least(spread, width, clip, error)
    grid = _chosen(width == 0, spread.mean, grid)
    return grid, family, error(grid)


def quantize(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    weight_bits: int | Select = 4,
    act_bits: int | Select | None = 4,
    edge_bits: int | None = 8,
    skip: Select | None = None,
    group_size: int | None = None,
    per_channel: bool = False,
    weight_clip: Clip = "max",
    act_clip: Clip = "auto",
    allocate: Allocate | None = None,
    correct: Correct = "mean",
    correct_acts: bool = False,
    mask: Callable[[Any], jax.Array] | None = None,
    strict: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, ACIQInfo]:
    """Quantize weights and activations at every site of a model.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples, or a :class:`~lnq.calibration.Calibration` of this model.
      weight_bits: Width of the weights, 1 to 16: a number, a mapping from regular expressions on
        leaf names to numbers, or a function of the name; 4 where none matches. Layer ``i`` of a
        leaf that a ``scan`` slices is asked for as ``name[i]``.
      act_bits: Width of the data at the sites of a leaf, likewise; None leaves data in float.
      edge_bits: Least width at the first and the last site, as in the paper; None for no exception.
      skip: Leaves that stay float, with the data at their sites. Single layers of a sliced leaf
        get 16 bits, since a leaf is one array.
      group_size: Entries along the sum that share a grid of weights; None for all.
      per_channel: Whether every channel of the data has a grid of its own (the paper's setting).
        Such data is multiplied in float; with one grid for all it is multiplied in int8.
      weight_clip: See :data:`Clip`.
      act_clip: See :data:`Clip`.
      allocate: A rule that shares widths below 8 bits among the output channels of a leaf and,
        with ``per_channel``, among those of the data, such as ``clipping.greedy_bits``.
      correct: What rounding weights must not change, see :data:`Correct`.
      correct_acts: Whether the shift that rounding gives the mean of each output is taken off the
        bias leaf that follows, where there is one. The statistics are those of the float model,
        so this helps while the quantized one is close to it, and hurts where it is not.
      mask: ``mask(batch)``: which examples or tokens count, see
        :func:`~lnq.calibration.calibrate`.
      strict: Whether a site that no calibration data reaches is an error; otherwise its data stays
        float, and its row says so.
      progress: Called after every batch and leaf.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`ACIQInfo`.

    Raises:
      ValueError: If a weight is not finite, a width is out of range, ``group_size`` does not
        divide, there is no site, ``calib`` belongs to another model, or, with ``strict``, a site
        saw no data.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> x = jax.random.normal(jax.random.key(1), (256, 64))
      >>> apply_fn = lambda p, x: x @ p["w"]
      >>> qtree, info = quantize(apply_fn, {"w": w}, x, edge_bits=None)
      >>> y = sites.quantized(apply_fn)(qtree, x)
      >>> info.rows[0].status, info.rows[0].distribution, distortion.sqnr_db(x @ w, y) > 16.0
      ('int8', 'gauss grid', Array(True, dtype=bool))
    """
    _check(4, weight_clip, ("kld",), "weight_clip")
    _check(4, act_clip, (), "act_clip")
    tree.check_finite(params)
    found = calib if isinstance(calib, Calibration) else None
    if found is None:
        found = calibration.calibrate(apply_fn, params, calib, mask=mask, progress=progress)
    originals = dict(tree.named_leaves(params))
    _check_sites(found, originals, strict)
    plan = site_widths(found.sites.sites, weight_bits, act_bits, edge_bits, skip)
    require_weights(found.sites.sites, plan)
    options = {"clip": weight_clip, "allocate": allocate, "correct": correct}
    acts = {
        site.name: _act(site, found.stats[site.name], bits, per_channel, act_clip, allocate)
        for site in found.sites.sites
        if (bits := plan.acts.get(site.name)) is not None and _reached(found, site)
    }
    weights: dict[str, QTensor] = {}
    for path, bits in plan.weights.items():
        uses = [site for site in found.sites.sites if site.path == path]
        leaf = _weight(originals[path], bits, uses, group_size=group_size, **options)
        grids = tuple(acts[s.name].grid if s.name in acts else None for s in uses)
        weights[path] = replace(leaf, acts=grids if any(grids) else ())
        if progress:
            progress(len(weights), len(plan.weights), path)
    shifts = _shifts(found, originals, weights, acts) if correct_acts else {}
    rows = [
        _row(site, originals[site.path], weights.get(site.path), acts.get(site.name), found)
        for site in found.sites.sites
    ]

    def new(name: str, leaf: Any) -> Any:
        return leaf + shifts[name] if name in shifts else weights.get(name, leaf)

    return tree.map_named(new, params), ACIQInfo(tuple(rows), found.sites.others, found)


_quantize_array = jax.jit(
    quantize_array,
    static_argnames=("axes", "stacked", "group_size", "clip", "allocate", "correct"),
)


# Arrays.


def _check(bits: ArrayLike, clip: str, without: Sequence[str], name: str = "clip") -> None:
    known = [family for family in get_args(Clip) if family not in without]
    if clip not in known:
        raise ValueError(f"{name}: must be one of {', '.join(known)}, not {clip!r}")
    if isinstance(bits, int | float) and bits not in range(1, 17):
        raise ValueError(f"bits: must be a whole number from 1 to 16, not {bits}")


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors in a leaf say which."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"leaf {path!r}: {error}") from error


def _grouped(
    x: jax.Array, axes: tuple[int, ...], size: int
) -> tuple[jax.Array, tuple[int, ...], int]:
    """Split the longest summed axis into groups; the new axes, and which of them is a group's."""
    axis = max(axes, key=lambda i: x.shape[i])
    length = x.shape[axis]
    if size < 1 or length % size:
        raise ValueError(
            f"group_size: {size} does not divide the {length} entries along the sum; choose a "
            "divisor, or name the leaf in `skip`"
        )
    shape = (*x.shape[:axis], length // size, size, *x.shape[axis + 1 :])
    return x.reshape(shape), tuple(i + (i >= axis) for i in axes), axis + 1


def _array_spread(x: jax.Array, axes: tuple[int, ...]) -> _Spread:
    over = {"axis": axes, "keepdims": True}
    mean = jnp.mean(x, **over)
    low, high = jnp.min(x, **over), jnp.max(x, **over)
    b, sigma = jnp.mean(jnp.abs(x - mean), **over), jnp.std(x, **over)
    return _Spread(mean, low, high, b, sigma, jnp.zeros(mean.shape, bool))


def _stats_spread(stats: ActStats) -> _Spread:
    """Behind a ReLU the spread is that of the values above zero; their mean is Laplace's b."""
    one_sided = stats.low >= 0.0
    above = jnp.maximum(stats.count - stats.histogram[..., 0].astype(jnp.float32), 1.0)
    b = stats.mean * stats.count / above
    sigma = jnp.sqrt((stats.squares + stats.count * stats.mean**2) / above)
    return _Spread(
        stats.mean,
        stats.low,
        stats.high,
        jnp.where(one_sided, b, calibration.mean_distance(stats)),
        jnp.where(one_sided, sigma, stats.sigma),
        one_sided,
    )


CLIPS = {
    "laplace": (clipping.laplace_clip, "b"),
    "gauss": (clipping.gauss_clip, "sigma"),
    "laplace grid": (clipping.laplace_grid_clip, "b"),
    "gauss grid": (clipping.gauss_grid_clip, "sigma"),
}
"""Clip of each family, and the spread that it is computed from."""


def _interval(family: str, spread: _Spread, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a grid is to span; never more than the values do."""
    if family == "max":
        return spread.low, spread.high
    function, name = CLIPS[family]
    both, above = (function(getattr(spread, name), bits, one_sided=side) for side in (False, True))
    low = jnp.where(spread.one_sided, 0.0, spread.mean - both)
    high = jnp.where(spread.one_sided, above, spread.mean + both)
    return jnp.maximum(spread.low, low), jnp.minimum(spread.high, high)


def _kld_interval(stats: ActStats, spread: _Spread, bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The baseline that compares histograms of magnitudes, 2048 bins each; zeros do not count."""
    limit = jnp.maximum(-stats.low, stats.high)
    values = jnp.abs(calibration.bin_values()[:, 0])

    def one(counts: jax.Array, limit: jax.Array, bits: jax.Array) -> jax.Array:
        place = jnp.clip((values / jnp.where(limit > 0.0, limit, 1.0) * 2048.0), 0.0, 2047.0)
        even = jnp.zeros(2048).at[place.astype(jnp.int32)[1:]].add(counts[1:].astype(jnp.float32))
        return clipping.kld_clip(even, limit, bits)

    magnitude_bits = jnp.clip(bits - jnp.where(spread.one_sided, 0, 1), 1, 8)
    clip = jax.vmap(one)(stats.histogram, limit, magnitude_bits)
    return jnp.maximum(stats.low, -clip), jnp.minimum(stats.high, clip)


def _least(
    spread: _Spread, width: jax.Array, clip: str, error: Callable[[QParams], jax.Array]
) -> tuple[QParams, jax.Array]:
    """The grid of least error among the families of ``clip``, and which one that is."""
    bits = jnp.maximum(width, 1)
    grids = [affine_grid(*_interval(name, spread, bits), bits) for name in FAMILIES[clip]]
    best = jnp.argmin(jnp.stack([error(grid) for grid in grids]), 0).astype(jnp.int32)

    def taken(*fields: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.stack(fields), best[None], 0)[0]

    return jax.tree.map(taken, *grids), best


def _allocated(allocate: Allocate, spread: jax.Array, width: jax.Array, stacked: int) -> jax.Array:
    """Widths by a rule, layer by layer; those of 8 bits and more stay."""
    layers = prod(spread.shape[:stacked])
    alpha, mean = spread.reshape(layers, -1), width.reshape(layers, -1)
    shared = jax.vmap(allocate)(alpha, mean[:, 0].astype(jnp.float32))
    return jnp.where(mean < 8, shared.astype(mean.dtype), mean).reshape(width.shape)


def _constant(mean: jax.Array) -> QParams:
    """The grid of 0 bits: one code, at the mean."""
    zero = jnp.zeros_like(mean)
    return QParams(zero + 1.0, -mean, zero, zero)


def _chosen(empty: jax.Array, mean: jax.Array, grid: QParams) -> QParams:
    return jax.tree.map(partial(jnp.where, empty), _constant(mean), grid)


# Sites.


def _weight(w: jax.Array, bits: np.ndarray, uses: Sequence[Site], **options: Any) -> QTensor:
    """A leaf in the smallest codes, and what is the same in all channels of its grid only once."""
    axes = tuple(sorted({axis for site in uses for axis in site.contracting}))
    stacked = len(uses[0].sliced)
    with _named(uses[0].path):
        q = narrow(_quantize_array(w, bits, axes=axes, stacked=stacked, **options))

    def shared(a: jax.Array) -> jax.Array:
        inner = tuple(range(stacked, a.ndim))
        low, high = a.min(inner, keepdims=True), a.max(inner, keepdims=True)
        return low if bool((low == high).all()) else a

    return replace(q, qparams=jax.tree.map(shared, q.qparams))


class _Act(NamedTuple):
    """The grid of the data at a site, as its leaf holds it and flat, and what it costs."""

    grid: QParams
    flat: QParams
    family: jax.Array
    error: jax.Array
    distribution: str
    per_channel: bool


def _check_sites(found: Calibration, originals: dict[str, Any], strict: bool) -> None:
    if not found.sites.sites:
        raise ValueError("apply_fn: no leaf of params meets data in a product; nothing to quantize")
    for site in found.sites.sites:
        if site.path not in originals or np.shape(originals[site.path]) != site.shape:
            raise ValueError(
                f"calib: has statistics of a leaf {site.path!r} of shape {site.shape}, which "
                "params lack; calibrate with these params"
            )
    unseen = [site.name for site in found.sites.sites if not _reached(found, site)]
    if strict and unseen:
        raise ValueError(
            f"calib: no data reached {', '.join(unseen)}; add examples that do, or strict=False"
        )


def _act(
    site: Site,
    stats: ActStats,
    bits: np.ndarray,
    per_channel: bool,
    clip: Clip,
    allocate: Allocate | None,
) -> _Act:
    """Grids for the data at a site, one for each layer of a sliced leaf."""
    stats = stats if per_channel else calibration.pooled(stats)
    method = partial(act_grid, clip=clip, allocate=allocate if per_channel else None)
    for _ in bits.shape:
        method = jax.vmap(method)
    flat, family, error = method(stats, jnp.asarray(bits))
    names = FAMILIES[clip]
    distribution = names[np.bincount(np.ravel(family), minlength=len(names)).argmax()]
    order = np.argsort(site.act_channels)
    sizes = (
        [site.act.shape[axis] for axis in site.act_channels] if per_channel else [1] * len(order)
    )
    rank = len(site.act.shape)

    def placed(a: jax.Array) -> jax.Array:
        layers = a.shape[:-1]
        a = a.reshape(*layers, *sizes).transpose(*range(len(layers)), *(order + len(layers)))
        where = dict(zip(sorted(site.act_channels), a.shape[len(layers) :], strict=True))
        return a.reshape(*layers, *(where.get(axis, 1) for axis in range(rank)))

    dtype = None if per_channel else sites.integer_dtype(site, bits)
    return _Act(
        replace(jax.tree.map(placed, flat), dtype=dtype),
        flat,
        family,
        error,
        distribution,
        per_channel,
    )


def _reached(found: Calibration, site: Site) -> bool:
    return bool(found.stats[site.name].count.min() > 0)


def _row(
    site: Site, w: jax.Array, q: QTensor | None, act: _Act | None, found: Calibration
) -> SiteRow:
    stats = found.stats[site.name]
    status, reason = _status(site, q, act, _reached(found, site))
    power = jnp.mean(stats.squares / jnp.maximum(stats.count, 1.0) + stats.mean**2)
    noise = None if act is None or q is None else jnp.mean(act.error)
    sqnr = np.inf if q is None else distortion.sqnr_db(w, dequantize_array(q))
    edge = None if act is None else (act.flat.qmax - act.flat.zero_point) * act.flat.scale
    return SiteRow(
        path=site.path,
        use=site.use,
        kind=site.primitive,
        shape=site.shape,
        macs=site.macs,
        weight_bits=32.0 if q is None else float(q.qparams.bits.mean()),
        act_bits=32.0 if noise is None or act is None else float(act.flat.bits.mean()),
        clip=float("inf") if noise is None or edge is None else float(edge.max()),
        distribution="" if noise is None or act is None else act.distribution,
        weight_sqnr=float(sqnr),
        act_sqnr=float("inf") if noise is None else float(10.0 * jnp.log10(power / noise)),
        status=status,
        reason=reason,
    )


def _status(site: Site, q: QTensor | None, act: _Act | None, reached: bool) -> tuple[str, str]:
    if q is None:
        return "float", "skipped"
    if act is None:
        return "weights only", "act_bits is None" if reached else "no calibration data reached it"
    if site.primitive not in sites.INTEGER_PRODUCTS:
        return "fake-quant", f"{site.primitive} has no integer form"
    if act.per_channel:
        return "fake-quant", "grid per channel"
    if act.grid.dtype is None or q.codes.dtype != jnp.int8:
        return "fake-quant", "more than 8 bits"
    if any(q.qparams.scale.shape[axis] > 1 for axis in site.contracting):
        return "fake-quant", "weights in groups"
    return "int8", ""


def _shifts(
    found: Calibration,
    originals: dict[str, Any],
    weights: dict[str, QTensor],
    acts: dict[str, _Act],
) -> dict[str, jax.Array]:
    """What to add to the bias leaves so that the means of the sites' outputs stay."""
    shifts: dict[str, jax.Array] = {}
    for site in found.sites.sites:
        name = site.bias or ""
        bias = originals.get(name)
        if site.path in weights and bias is not None and name not in weights:
            stats, w, q = found.stats[site.name], originals[site.path], weights[site.path]
            shift = site.bias_sign * _shift(site, w, q, stats, acts.get(site.name))
            if shift.size == bias.size:
                shift = shift.reshape(bias.shape).astype(bias.dtype)
                shifts[name] = shift + shifts.get(name, jnp.zeros_like(shift))
    return shifts


def _shift(site: Site, w: jax.Array, q: QTensor, stats: ActStats, act: _Act | None) -> jax.Array:
    r"""Mean that rounding takes off each output: :math:`W\,\mathbb{E}x - \hat W\,\mathbb{E}\hat x`.

    A convolution's edges are taken for its middle.
    """
    rounded = stats.mean
    if act is not None:
        method = calibration.rounded_mean
        for _ in site.sliced:
            method = jax.vmap(method)
        rounded = method(stats, act.flat)
    return _applied(site, w, stats.mean) - _applied(site, dequantize_array(q), rounded)


def _applied(site: Site, w: jax.Array, mean: jax.Array) -> jax.Array:
    """What a site makes of the same vector everywhere; ``[l.., o]``."""
    layers, summed = len(site.sliced), site.contracting[: len(site.act_channels)]
    spatial = site.contracting[len(site.act_channels) :]
    if site.primitive != "conv_general_dilated":
        summed, spatial = site.contracting, ()
    outputs = [axis for axis in range(w.ndim) if axis not in (*site.sliced, *site.contracting)]
    w = jnp.sum(
        w.transpose(*site.sliced, *summed, *outputs, *spatial),
        tuple(range(w.ndim - len(spatial), w.ndim)),
    )
    inner, outer = (
        prod(w.shape[a:b])
        for a, b in ((layers, layers + len(summed)), (layers + len(summed), None))
    )
    groups = mean.shape[-1] // inner
    w = w.reshape(*w.shape[:layers], inner, groups, outer // groups)
    mean = mean.reshape(*mean.shape[:-1], groups, inner)
    return jnp.einsum("...gc,...cgo->...go", mean, w).reshape(*w.shape[:layers], outer)
