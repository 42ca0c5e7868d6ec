r"""AdaQuant: each layer learns to give its old outputs with rounded weights and rounded data.

For one layer :math:`Y = XW + b` on cached calibration data,

.. math:: \min_{V, b', s_w, z_w, s_x, z_x} \;
          \lVert f(XW + b) - f(Q_x(X)\, Q_w(W + V) + b') \rVert^2,

where f is what the model does to the output by itself (batch-norm, ReLU); the steps s and zero
points z of the weights are one per channel, those of the data one for all. Each layer is a small
problem of its own: a few hundred examples determine it, unless it has more inputs than there are
rows of data.

*Sequential*: a layer reads what the quantized layers before it make, and still has the float
model's outputs for a target, so that it makes up for their errors. *Parallel*: it reads what the
float model reads, so that layers fitted at different widths can be put together
(:mod:`lnq.allocation`).

Source: Hubara et al., `Improving Post Training Neural Quantization: Layer-wise Calibration and
Integer Programming <https://arxiv.org/abs/2006.10518>`_, 2020, and its authors' released code.

Differs from the paper and the code in: the weights start where second-order rounding leaves them
(:mod:`lnq.feedback`); rates are relative to steps (:func:`published` has the absolute ones); a
convolution is fitted on sampled windows, not on images; the best iterate on rows held out is kept,
and the start if none is better; f is read off the model and is whatever function stands there (the
code takes a ReLU, by name); sequential means all examples (the code renews one batch in ten).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, pairwise
from math import prod
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from lnq import calibration, feedback, matrices, quantizer, sites, tree
from lnq.quantizer import FakeQuantTensor, QParams, QTensor, affine_grid, fake_quant
from lnq.sites import OtherUse, Site, Sites, Stat, Tail
from lnq.types import ApplyFn, Params, Progress, Select
from lnq.widths import Widths, require_weights, site_widths

__all__ = [
    "AdaQuantInfo",
    "Fit",
    "Layer",
    "LayerRow",
    "Options",
    "Outcome",
    "Problem",
    "Rates",
    "Weights",
    "begin",
    "best_grid",
    "fit",
    "fit_in_parallel",
    "fit_in_sequence",
    "harden",
    "improve",
    "outputs",
    "place",
    "problem",
    "published",
    "quantize",
]

Weights = Literal["free", "constrained", "fixed"]
"""How far weights may move: anywhere, to the other of their two nearest levels, or not at all."""

HELD_OUT = 10
"""One row in so many is not fitted on."""

CHUNKS = 10
"""How often the rows held out are looked at."""

LOOKED_AT = 2**22
"""About so many entries of a layer's data choose its grid."""


# One layer.


class Layer(NamedTuple):
    """One layer's problem: g groups, r rows, n inputs and o outputs to each group.

    Attributes:
      x: What the layer reads, ``[g, r, n]``.
      y: What it should return, before f: the float model's outputs, ``[g, r, o]``.
      w: Its weights, ``[g, n, o]``.
      factor: What the model multiplies each channel by, behind the product, ``[g, 1, o]``.
      shift: What it adds then, ``[g, 1, o]``.
      weight_bits: Width of the weights; bits, a number.
      act_bits: Width of the data; bits, a number; 0 leaves it in float.
      has_bias: 1 if there is a bias that may move, else 0.
    """

    x: jax.Array
    y: jax.Array
    w: jax.Array
    factor: jax.Array
    shift: jax.Array
    weight_bits: jax.Array
    act_bits: jax.Array
    has_bias: jax.Array


class Fit(NamedTuple):
    """What is learned of a layer.

    Attributes:
      w: Weights, to be rounded to nearest, ``[g, n, o]``.
      scale: Their step, ``[g, 1, o]``.
      zero_point: Their code of zero; rounded when used, ``[g, 1, o]``.
      act_scale: Step of the data, ``[1, 1, 1]``.
      act_zero_point: Its code of zero, ``[1, 1, 1]``.
      bias: What is added to :attr:`Layer.shift`, ``[g, 1, o]``.
    """

    w: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    act_scale: jax.Array
    act_zero_point: jax.Array
    bias: jax.Array


class Rates(NamedTuple):
    """Learning rates: how far Adam moves each thing in a turn, at first.

    In units of the weights' steps (weights, zero points), of the steps themselves, and of the root
    mean square of the channel's output (bias). ``absolute`` rates are in value units, as published.
    """

    weights: float = 3e-3
    grid: float = 1e-3
    act_grid: float = 1e-3
    bias: float = 3e-3
    absolute: bool = False


RATES = Rates()


@partial(jax.jit, static_argnames=("axes", "clip", "stride"))
def best_grid(
    x: jax.Array, bits: ArrayLike, axes: tuple[int, ...], clip: bool = True, stride: int = 1
) -> QParams:
    """The grid of least squared error among 32 that span 25 to 100 % of the range.

    Args:
      x: Values, any float dtype.
      bits: Width; bits, whole; may be traced.
      axes: Axes along which a grid runs.
      clip: Whether the range may be cut; without, the grid spans it.
      stride: Errors are those of one in so many entries along the last axis but one, which must
        be of ``axes``; the range is that of all.

    Example:
      >>> x = jnp.append(jnp.linspace(-1.0, 1.0, 1000), 3.0)
      >>> (2**2 - 1) * best_grid(x, 2, (0,)).scale < 3.0  # one outlier is not worth it
      Array([ True], dtype=bool)
    """
    x = x.astype(jnp.float32)
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    if not clip:
        return affine_grid(low, high, bits)

    some = x[..., ::stride, :] if stride > 1 else x

    def error(share: jax.Array) -> jax.Array:
        rounded = fake_quant(some, affine_grid(share * low, share * high, bits))
        return jnp.mean((rounded - some) ** 2, axes, keepdims=True)

    shares = jnp.linspace(1.0, 0.25, 32)
    best = shares[jnp.argmin(lax.map(error, shares), 0)]
    return affine_grid(best * low, best * high, bits)


def _grid(scale: jax.Array, zero_point: jax.Array, bits: jax.Array) -> QParams:
    """A grid whose zero point is whole; gradients pass the rounding."""
    half = jnp.exp2(bits.astype(jnp.float32)) / 2.0
    whole = zero_point + lax.stop_gradient(jnp.round(zero_point) - zero_point)
    return QParams(scale, whole, jnp.full_like(scale, -half), jnp.full_like(scale, half - 1.0))


def _on_grid(zero_point: jax.Array, bits: jax.Array) -> jax.Array:
    """Where zero is one of the levels."""
    half = jnp.exp2(bits.astype(jnp.float32)) / 2.0
    return jnp.clip(zero_point, -half, half - 1.0)


def outputs(layer: Layer, fit: Fit, rows: Any = slice(None)) -> jax.Array:
    """What the quantized layer returns, before f; ``[g, r, o]``."""
    x, grid = layer.x[:, rows], _grid(fit.act_scale, fit.act_zero_point, layer.act_bits)
    x = jnp.where(layer.act_bits > 0, fake_quant(x, grid), x)
    w = fake_quant(fit.w, _grid(fit.scale, fit.zero_point, layer.weight_bits))
    return layer.factor * _product(x, w) + layer.shift + fit.bias


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """``[g, r, n]`` by ``[g, n, o]``; with one output (depthwise) no matrix product is worth it."""
    if w.shape[-1] == 1:
        return jnp.sum(x * jnp.swapaxes(w, 1, 2), -1, keepdims=True)
    return x @ w


def begin(
    layer: Layer, *, second_order: bool = True, clip: bool = True, damping: float = 0.1
) -> Fit:
    """Grids of least squared error, and weights by second-order rounding or as they are.

    Second order: the weights that take the rounded data to the old outputs (least squares), and of
    these those that make up for the rounding of the ones before them. A layer without rows or with
    a factor of 0 keeps what it has there.

    Args:
      layer: The problem.
      second_order: Whether to do that.
      clip: As in :func:`best_grid`.
      damping: As in :func:`~lnq.feedback.second_moment`.
    """
    stride = max(layer.x.size // LOOKED_AT, 1)
    act = best_grid(layer.x, jnp.maximum(layer.act_bits, 1), (0, 1, 2), clip, stride)
    grid = best_grid(layer.w, layer.weight_bits, (1,), clip)
    zero = jnp.zeros_like(layer.shift)
    nearest = Fit(layer.w, grid.scale, grid.zero_point, act.scale, act.zero_point, zero)
    return _second_order(layer, nearest, clip, damping) if second_order else nearest


def _second_order(layer: Layer, nearest: Fit, clip: bool, damping: float) -> Fit:
    """The same data, and weights that give the old outputs with it and make up for rounding."""
    act = _grid(nearest.act_scale, nearest.act_zero_point, layer.act_bits)
    x = jnp.where(layer.act_bits > 0, fake_quant(layer.x, act), layer.x)
    factor = jnp.where(layer.factor == 0.0, 1.0, layer.factor)
    y = jnp.where(layer.factor == 0.0, layer.x @ layer.w, (layer.y - layer.shift) / factor)
    w = feedback.least_squares(x, y, layer.w, damping)
    grid = best_grid(w, layer.weight_bits, (1,), clip)
    w = jax.vmap(feedback.compensate)(w, feedback.second_moment(x, damping), grid)
    return nearest._replace(w=w, scale=grid.scale, zero_point=grid.zero_point)


def _units(layer: Layer, start: Fit, absolute: bool) -> Fit:
    """What a rate of 1 means."""
    if absolute:
        bits = layer.weight_bits, jnp.maximum(layer.act_bits, 1)
        levels = [jnp.exp2(b.astype(jnp.float32)) - 1.0 for b in bits]
        return Fit(
            w=jnp.ones_like(start.w),
            scale=jnp.ones_like(start.scale) / levels[0],
            zero_point=1.0 / start.scale,
            act_scale=jnp.ones_like(start.act_scale) / levels[1],
            act_zero_point=1.0 / start.act_scale,
            bias=jnp.ones_like(start.bias) * layer.has_bias,
        )
    return Fit(
        w=jnp.broadcast_to(start.scale, start.w.shape),
        scale=start.scale,
        zero_point=jnp.ones_like(start.zero_point),
        act_scale=start.act_scale,
        act_zero_point=jnp.ones_like(start.act_zero_point),
        bias=jnp.sqrt(jnp.mean(layer.y**2, 1, keepdims=True)) * layer.has_bias,
    )


def improve(
    layer: Layer,
    start: Fit,
    key: jax.Array,
    rates: Rates = RATES,
    *,
    follow: Callable[[jax.Array], jax.Array] = lambda y: y,
    weights: Weights = "free",
    steps: int = 1000,
    batch: int = 256,
) -> tuple[Fit, jax.Array]:
    r"""Adam with straight-through rounding, rates falling along half a cosine to zero.

    Args:
      layer: The problem; its first tenth of rows is held out.
      start: Where to begin.
      key: For the choice of rows.
      rates: Learning rates; numbers, may be traced but for ``absolute``.
      follow: f, entry by entry.
      weights: How far weights may move, see :data:`Weights`.
      steps: Number of turns; a multiple of 10.
      batch: Rows in one turn.

    Returns:
      The best of eleven iterates, ``start`` among them, and their losses ``[11]``: squared error of
      f's values on the rows held out over their mean square.
    """
    size, target = layer.x.shape[1], follow(layer.y)
    held = max(size // HELD_OUT, 1)
    power = jnp.mean(target**2) + 1e-30
    units = _units(layer, start, rates.absolute)
    of_weights = 0.0 if weights == "fixed" else rates.weights
    each = of_weights, rates.grid, rates.grid, rates.act_grid, rates.act_grid, rates.bias
    rate = Fit(*map(jnp.float32, each))
    levels = start.w / start.scale + start.zero_point

    def at(theta: Fit) -> Fit:
        fit = jax.tree.map(lambda begun, moved, unit: begun + moved * unit, start, theta, units)
        fit = fit._replace(
            scale=jnp.maximum(fit.scale, 1e-3 * start.scale),
            zero_point=_on_grid(fit.zero_point, layer.weight_bits),
            act_scale=jnp.maximum(fit.act_scale, 1e-3 * start.act_scale),
            act_zero_point=_on_grid(fit.act_zero_point, layer.act_bits),
        )
        if weights == "constrained":
            level = fit.w / fit.scale + fit.zero_point
            level = jnp.clip(level, jnp.floor(levels), jnp.floor(levels) + 1.0)
            fit = fit._replace(w=(level - fit.zero_point) * fit.scale)
        return fit

    def loss(theta: Fit, rows: Any) -> jax.Array:
        out = follow(outputs(layer, at(theta), rows))
        return jnp.mean((out - target[:, rows]) ** 2) / power

    adam = optax.scale_by_adam()

    def turn(carry: tuple[Fit, Any], i: jax.Array) -> tuple[tuple[Fit, Any], None]:
        theta, state = carry
        rows = jax.random.randint(jax.random.fold_in(key, i), (batch,), held, max(size, held + 1))
        slope = jax.grad(loss)(theta, rows)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers
            update, state = adam.update(slope, state)
        falling = 0.5 + 0.5 * jnp.cos(jnp.pi * i.astype(jnp.float32) / steps)
        return (jax.tree.map(lambda t, u, r: t - falling * r * u, theta, update, rate), state), None

    def chunk(carry: Any, turns: jax.Array) -> tuple[Any, jax.Array]:
        moving, best, least = carry
        moving, _ = lax.scan(turn, moving, turns)
        now = loss(moving[0], slice(held))
        best = jax.tree.map(partial(jnp.where, now < least), moving[0], best)
        return (moving, best, jnp.minimum(now, least)), now

    theta = jax.tree.map(jnp.zeros_like, start)
    first = loss(theta, slice(held))
    if not steps:  # nothing to compile
        return start, first[None]
    turns = jnp.arange(steps).reshape(CHUNKS, -1)
    (_, best, _), losses = lax.scan(chunk, ((theta, adam.init(theta)), theta, first), turns)
    return at(best), jnp.append(first, losses)


class _Settings(NamedTuple):
    """What a compiled fit depends on, but for shapes and f."""

    weights: Weights
    second_order: bool
    clip: bool
    damping: float
    steps: int
    batch: int
    absolute: bool
    together: int


@dataclass(frozen=True)
class _Follow:
    """f, the same to ``jit`` wherever it does the same."""

    text: str
    function: Callable[[jax.Array], jax.Array] = field(compare=False)

    def __call__(self, y: jax.Array) -> jax.Array:
        return self.function(y)


class Outcome(NamedTuple):
    """A fit, and losses on the rows held out: rounded to nearest, at the start, at the end."""

    fit: Fit
    nearest: jax.Array
    start: jax.Array
    loss: jax.Array


@partial(jax.jit, static_argnames=("follow", "how"))
def _fit(
    layers: Layer, keys: jax.Array, rates: Rates, *, follow: "_Follow", how: _Settings
) -> Outcome:
    """Fit layers of equal shape; a leading axis counts them."""
    rates = rates._replace(absolute=how.absolute)

    def one(pair: tuple[Layer, jax.Array]) -> Outcome:
        layer, key = pair
        size = layer.x.shape[1]
        held = min(max(size // HELD_OUT, 1), size - 1)
        fitted = layer._replace(x=layer.x[:, held:], y=layer.y[:, held:])
        nearest = begin(fitted, second_order=False, clip=how.clip)
        options: Any = {"follow": follow, "weights": how.weights, "batch": how.batch}
        _, of_nearest = improve(layer, nearest, key, rates, steps=0, **options)
        start = nearest
        if how.second_order:
            start = _second_order(fitted, nearest, how.clip, how.damping)
            _, of_start = improve(layer, start, key, rates, steps=0, **options)
            better = of_start[0] < of_nearest[0]
            start = jax.tree.map(partial(jnp.where, better), start, nearest)
        fit, losses = improve(layer, start, key, rates, steps=how.steps, **options)
        return Outcome(fit, of_nearest[0], losses[0], jnp.nanmin(losses))

    return lax.map(one, (layers, keys), batch_size=how.together if how.together > 1 else None)


# A model.


class Options(TypedDict, total=False):
    """Options of :func:`problem`, which :func:`quantize` hands on."""

    weights: Weights
    second_order: bool
    clip: bool
    damping: float
    steps: int
    batch: int
    rates: Rates
    rows: int
    memory: int
    together: int
    mask: Callable[[Any], jax.Array] | None
    key: jax.Array | None


class Problem(NamedTuple):
    """A model taken apart into layers.

    Attributes:
      params: Its parameters.
      leaves: The same by name.
      batches: Calibration data.
      sites: Its sites.
      layers: Those that can be fitted, by name, in forward order.
      left: Why the others are rounded to nearest, by name.
      sufficiency: Rows of data for each input of a layer.
      floats: The float model in the structure of :func:`place`.
      tails: What the model does to each site's output.
      biases: The leaf that the bias of a layer is in, by name, where there is one.
      sample: ``sample(names, params) -> {name: [l, g, r, n]}``: rows of what sites read.
      passes: Names of layers whose rows fit into memory together.
      rates: Learning rates.
      how: The other options.
      key: For rows and turns.
    """

    params: Params
    leaves: dict[str, Any]
    batches: list[Any]
    sites: Sites
    layers: dict[str, Site]
    left: dict[str, str]
    sufficiency: dict[str, float]
    floats: Params
    tails: dict[str, Tail]
    biases: dict[str, str]
    sample: Callable[[tuple[str, ...], Params], dict[str, jax.Array]]
    passes: list[tuple[str, ...]]
    rates: Rates
    how: _Settings
    key: jax.Array


def published() -> Options:
    """The options with which the authors' code works: no second order, absolute rates.

    It also takes fifty images for a turn, where this takes rows of many, and rounds biases: give
    ``round_biases=True`` to :func:`quantize`.

    Example:
      >>> published()["rates"].act_grid, published()["second_order"]
      (0.1, False)
    """
    rates = Rates(weights=1e-5, grid=1e-3, act_grid=1e-1, bias=1e-3, absolute=True)
    return {"second_order": False, "clip": False, "rates": rates, "steps": 1000}


def problem(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    weights: Weights = "free",
    second_order: bool = True,
    clip: bool = True,
    damping: float = 0.1,
    steps: int = 500,
    batch: int = 256,
    rates: Rates = RATES,
    rows: int = 4096,
    memory: int = 2**30,
    together: int = 1,
    mask: Callable[[Any], jax.Array] | None = None,
    key: jax.Array | None = None,
) -> Problem:
    """Take a model apart into layers that can be fitted at any width.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples, a few hundred. An array, dict or tuple is one pytree of examples,
        a list holds batches.
      weights: How far weights may move, see :data:`Weights`.
      second_order: Whether weights start where second-order rounding leaves them.
      clip: Whether grids start where they have least squared error, or span the range.
      damping: Of second-order rounding: more of it trusts few rows less.
      steps: Turns of Adam for each layer, a multiple of 10; 0 keeps the start.
      batch: Rows in one turn.
      rates: Learning rates.
      rows: Rows that are sampled of the data of each site.
      memory: Bytes that they may take: more sites are sampled in several passes, and a site that
        alone is larger has fewer rows.
      together: Layers of equal shape that are fitted side by side; 1 is best on a CPU.
      mask: ``mask(batch)``: which examples, or which tokens of them, are real and not padding.
      key: For the samples; by default ``jax.random.key(0)``.

    Raises:
      ValueError: If a weight is not finite, there is no site, or an option is out of range.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"weights: must be one of {', '.join(get_args(Weights))}, not {weights!r}")
    if steps < 0 or steps % CHUNKS:
        raise ValueError(f"steps: must be a multiple of {CHUNKS}, not {steps}")
    tree.check_finite(params)
    batches = calibration.as_batches(calib, 128)
    found = sites.find_sites(apply_fn, params, batches[0])
    if not found.sites:
        raise ValueError("apply_fn: no leaf of params meets data in a product; nothing to quantize")
    left, leaves = _left(found), dict(tree.named_leaves(params))
    layers = {site.name: site for site in found.sites if site.name not in left}
    tails = sites.tails(apply_fn, params, batches[0])
    key = jax.random.key(0) if key is None else key
    most = {name: min(rows, memory // _row_bytes(site)) for name, site in layers.items()}
    return Problem(
        params=params,
        leaves=leaves,
        batches=batches,
        sites=found,
        layers=layers,
        left=left,
        sufficiency={n: _sufficiency(site, batches, most[n]) for n, site in layers.items()},
        floats=_floats(params, layers.values()),
        tails=tails,
        biases=_biases(layers, tails, leaves, found.uses),
        sample=_sampler(apply_fn, batches, most, mask, key),
        passes=_passes(layers, most, memory),
        rates=rates,
        how=_Settings(weights, second_order, clip, damping, steps, batch, rates.absolute, together),
        key=key,
    )


def _left(found: Sites) -> dict[str, str]:
    """Sites that are no layer of their own, and why."""
    uses = found.uses
    reasons = {site.name: matrices.reason(site) for site in found.sites}
    shared = {s.name: "the leaf is used more than once" for s in found.sites if uses[s.path] > 1}
    return {name: why for name, why in reasons.items() if why} | shared


def _sufficiency(site: Site, batches: Sequence[Any], most: int) -> float:
    examples = [calibration.batch_size(batch) for batch in batches]
    inputs = prod(site.shape[i] for i in site.contracting)
    rows, share = matrices.count_rows(site) / examples[0], max(most // len(batches), 1)
    return sum(min(rows * count, share) for count in examples) / inputs


def _row_bytes(site: Site) -> int:
    """Of one row as a float32, as the float and the quantized model read it, and its output."""
    layers, groups = (prod(site.shape[i] for i in axes) for axes in (site.sliced, site.batch))
    inputs, channels = (prod(site.shape[i] for i in a) for a in (site.contracting, site.channels))
    kernels = 1 if site.window is None else site.window.groups
    return 4 * layers * groups * (2 * kernels * inputs + channels)


def _passes(
    layers: Mapping[str, Site], most: Mapping[str, int], memory: int
) -> list[tuple[str, ...]]:
    """Names in forward order, cut where memory is full."""
    passes: list[list[str]] = []
    room = 0
    for name, site in layers.items():
        size = most[name] * _row_bytes(site)
        if size > room:
            passes.append([])
            room = memory
        passes[-1].append(name)
        room -= size
    return [tuple(names) for names in passes]


def _biases(
    layers: Iterable[str],
    tails: Mapping[str, Tail],
    leaves: Mapping[str, Any],
    uses: Mapping[str, int],
) -> dict[str, str]:
    """Leaves that can take a layer's bias: of the size of its channels, and used only there."""
    return {
        name: bias
        for name in layers
        if (bias := tails[name].bias) is not None
        and uses[bias] == 1
        and leaves[bias].size == tails[name].shift.size
    }


class _Sample(NamedTuple):
    """Rows ``[g, r, n]`` of all data so far, and out of how many."""

    x: jax.Array
    of: jax.Array


def _sampler(
    apply_fn: ApplyFn,
    batches: Sequence[Any],
    most: Mapping[str, int],
    mask: Callable[[Any], jax.Array] | None,
    key: jax.Array,
) -> Callable[[tuple[str, ...], Params], dict[str, jax.Array]]:
    """Rows of what sites read: the same places in every call, whatever the parameters."""

    def observe(valid: jax.Array | None, key: jax.Array, x: jax.Array, site: Site) -> _Sample:
        count = matrices.count_rows(site)
        size = min(count, max(most[site.name] // len(batches), 1))
        if valid is not None and valid.shape == _free(x, site)[: valid.ndim]:
            real = jnp.repeat(valid.ravel(), count // valid.size).astype(jnp.float32)
            places = jax.random.choice(key, count, (size,), p=real / jnp.maximum(real.sum(), 1.0))
        else:
            places = _spread(key, count, size)
        return _Sample(matrices.rows(x, site, places).astype(jnp.float32), jnp.float32(count))

    def merge(key: jax.Array, a: _Sample, b: _Sample) -> _Sample:
        """Each row is from either, as likely as it has data."""
        total = a.of + b.of
        key = jax.random.fold_in(key, total.astype(jnp.int32))
        taken = jax.random.uniform(key, b.x.shape[-2:-1]) * total < b.of
        return _Sample(jnp.where(taken[None, :, None], b.x, a.x), total)

    @partial(jax.jit, static_argnames="names")
    def run(params: Params, batch: Any, key: jax.Array, names: tuple[str, ...]) -> Any:
        valid = None if mask is None else mask(batch)
        stat = Stat(partial(observe, valid, key), _no_rows, partial(merge, key))
        return sites.tap(apply_fn, stat, lambda site: site.name in names)(params, batch)[1]

    def sample(names: tuple[str, ...], params: Params) -> dict[str, jax.Array]:
        keys = jax.random.split(key, len(batches))
        parts = [run(params, b, k, names) for b, k in zip(batches, keys, strict=True)]
        rows = {name: jnp.concatenate([part[name].x for part in parts], -2) for name in names}
        return {name: x.reshape(-1, *x.shape[-3:]) for name, x in rows.items()}

    return sample


def _spread(key: jax.Array, count: int, size: int) -> jax.Array:
    """So many of ``count`` places in random order, one out of each of equal stretches."""
    edges = np.arange(size + 1, dtype=np.int64) * count // size
    within, order = jax.random.split(key)
    places = jax.random.randint(within, (size,), edges[:-1], edges[1:])
    return jax.random.permutation(order, places)


def _free(x: jax.Array, site: Site) -> tuple[int, ...]:
    """Sizes of the data's axes that tell its rows apart; of a convolution's, examples only."""
    places = () if site.window is None else site.window.axes
    others = *site.act_batch, *site.act_channels, *places
    return tuple(n for i, n in enumerate(x.shape) if i not in others)


def _no_rows(like: _Sample) -> _Sample:
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)


def fit(
    made: Problem,
    widths: Widths,
    rows: Mapping[str, jax.Array],
    targets: Mapping[str, jax.Array],
) -> Iterator[dict[str, Outcome]]:
    """Fit layers to what they read; those of equal shape and f are one compilation.

    Args:
      made: The model.
      widths: Of weights and data.
      rows: From ``made.sample``, of the layers to be fitted.
      targets: The same rows of the float model.

    Yields:
      Outcomes by name; a leading axis counts the layers of a sliced leaf.
    """
    alike: dict[Any, list[str]] = {}
    layers = {n: _layer(made, n, widths, x, targets[n]) for n, x in rows.items()}
    for name, layer in layers.items():
        function = made.tails[name].follow
        follow = _Follow(str(jax.make_jaxpr(function)(jnp.zeros(1))), function)
        alone = name if made.how.together == 1 else ""
        alike.setdefault((follow, alone, *(a.shape[1:] for a in layer)), []).append(name)
    order = list(made.layers)
    for (follow, *_), names in alike.items():
        stacked = Layer(*map(jnp.concatenate, zip(*(layers[n] for n in names), strict=True)))
        keys = [
            jax.random.split(jax.random.fold_in(made.key, order.index(n)), len(layers[n].w))
            for n in names
        ]
        found = _fit(stacked, jnp.concatenate(keys), made.rates, follow=follow, how=made.how)
        ends = np.cumsum([0, *map(len, keys)])
        yield {
            name: jax.tree.map(lambda a, i=i, j=j: a[i:j], found)
            for name, (i, j) in zip(names, pairwise(ends), strict=True)
        }


def _layer(made: Problem, name: str, widths: Widths, x: jax.Array, reference: jax.Array) -> Layer:
    """The problem of a layer, stacked for a sliced leaf, from what the two models read."""
    site, tail = made.layers[name], made.tails[name]
    w, has_bias = made.leaves[site.path], float(name in made.biases)
    tail, bits = (tail.factor, tail.shift), _bits(site, widths)
    return _layer_of(w, tail, bits, has_bias, x, reference, site=_form(site))


@partial(jax.jit, static_argnames="site")
def _layer_of(
    w: jax.Array,
    tail: tuple[jax.Array, jax.Array],
    bits: tuple[jax.Array, jax.Array],
    has_bias: jax.Array,
    x: jax.Array,
    reference: jax.Array,
    *,
    site: Site,
) -> Layer:
    w = matrices.to_matrix(w, site).astype(jnp.float32)
    factor, shift = (_by_channel(a, w) for a in tail)
    y = factor * jax.vmap(_product)(reference, w) + shift
    return Layer(x, y, w, factor, shift, *bits, jnp.broadcast_to(has_bias, len(w)))


def _form(site: Site) -> Site:
    """What of a site a compiled function needs to know."""
    return site._replace(
        path="", use=0, macs=0, input=-1, bias=None, bias_sign=1, affine=(), chain=(), note=""
    )._replace(loops=(), stack=(), shards=())


def _bits(site: Site, widths: Widths) -> tuple[jax.Array, jax.Array]:
    """Widths of weights and data for each layer of a sliced leaf, ``[l]``; 0 is float."""
    layers = prod(site.shape[i] for i in site.sliced)
    both = widths.weights[site.path], widths.acts.get(site.name, 0)
    weights, acts = (jnp.asarray(np.broadcast_to(np.ravel(b), layers), jnp.int32) for b in both)
    return weights, acts


def _by_channel(a: jax.Array, w: jax.Array) -> jax.Array:
    """``[l, channels]`` to ``[l, g, 1, o]``."""
    a = a.reshape(len(w), -1, 1, w.shape[-1])
    return jnp.broadcast_to(a, (len(w), w.shape[1], 1, w.shape[-1]))


def _wide() -> QParams:
    """The grid that leaves a float32 as it is."""
    return QParams(*map(jnp.float32, (2.0**-60, 0.0, -jnp.inf, jnp.inf)))


def _floats(params: Params, layers: Iterable[Site]) -> Params:
    """The float model as rounded leaves, so that the structure never changes."""
    uses = {site.path: site for site in layers}

    def leaf(path: str, w: Any) -> Any:
        if path not in uses:
            return w
        site = uses[path]
        act = jax.tree.map(lambda a: jnp.broadcast_to(a, _act_shape(site)), _wide())
        return FakeQuantTensor(w, None, (act,), w.dtype)

    return tree.map_named(leaf, params)


def _act_shape(site: Site) -> tuple[int, ...]:
    return tuple(site.shape[i] for i in site.sliced) + (1,) * len(site.act.shape)


def place(made: Problem, params: Params, fits: Mapping[str, Fit], widths: Widths) -> Params:
    """A model in which some layers are what was fitted, in floats.

    Args:
      made: The model.
      params: ``made.floats``, or what this returned before.
      fits: What to put in, by name.
      widths: Of these layers.

    Returns:
      A tree of the structure of ``made.floats``: a compiled function serves all.
    """
    leaves: dict[str, Any] = {}
    for name, fit in fits.items():
        site = made.layers[name]
        leaf = _soft(fit, _bits(site, widths), site=_form(site))
        dtype = made.leaves[site.path].dtype
        leaves[site.path] = replace(leaf, values=leaf.values.astype(dtype), dtype=dtype)
    leaves |= _moved_biases(made, fits)
    return tree.map_named(lambda path, leaf: leaves.get(path, leaf), params)


@partial(jax.jit, static_argnames="site")
def _soft(fit: Fit, bits: tuple[jax.Array, jax.Array], *, site: Site) -> FakeQuantTensor:
    """A leaf rounded in floats."""
    weights, act = _grids(fit, bits, site)
    return FakeQuantTensor(matrices.from_matrix(fake_quant(fit.w, weights), site), None, (act,))


@partial(jax.jit, static_argnames="site")
def _hard(fit: Fit, bits: tuple[jax.Array, jax.Array], *, site: Site) -> QTensor:
    """A leaf in codes."""
    weights, act = _grids(fit, bits, site)
    q = quantizer.quantize(fit.w, weights)
    return replace(jax.tree.map(lambda a: matrices.from_matrix(a, site), q), acts=(act,))


def _grids(fit: Fit, bits: tuple[jax.Array, jax.Array], site: Site) -> tuple[QParams, QParams]:
    """Of the weights, ``[l, g, 1, o]``, and of the data as the leaf holds it."""
    of_weights, of_acts = (b.reshape(-1, 1, 1, 1) for b in bits)
    act = _grid(fit.act_scale, fit.act_zero_point, of_acts)
    act = jax.tree.map(lambda a, wide: jnp.where(of_acts > 0, a, wide), act, _wide())
    act = jax.tree.map(lambda a: a.reshape(_act_shape(site)), act)
    return _grid(fit.scale, fit.zero_point, of_weights), act


def _moved_biases(made: Problem, fits: Mapping[str, Fit]) -> dict[str, jax.Array]:
    moved = {}
    for name, fit in fits.items():
        if name in made.biases:
            leaf = made.leaves[made.biases[name]]
            change = made.tails[name].bias_sign * fit.bias.reshape(leaf.shape)
            moved[made.biases[name]] = (leaf.astype(jnp.float32) + change).astype(leaf.dtype)
    return moved


def harden(
    made: Problem, fits: Mapping[str, Fit], widths: Widths, *, round_biases: bool = False
) -> Params:
    """The quantized model in integer codes; what was not fitted is rounded to nearest.

    Args:
      made: The model.
      fits: What was fitted, by name.
      widths: Of weights and data; leaves that are not in it stay float.
      round_biases: Whether the biases of these layers get as many bits as weights and data have
        together (16 beside float data), one grid for all channels.
    """
    leaves: dict[str, Any] = _moved_biases(made, fits)
    if round_biases:
        bits = {made.biases[n]: _bits(made.layers[n], widths) for n in fits if n in made.biases}
        for path, (of_weights, of_acts) in bits.items():
            total = int(of_weights.max() + of_acts.max()) if of_acts.any() else 16
            leaves[path] = _nearest(leaves[path], min(total, 16), tuple(range(leaves[path].ndim)))
    for name, fit in fits.items():
        site = made.layers[name]
        q = quantizer.narrow(_hard(fit, _bits(site, widths), site=_form(site)))
        acts = q.acts if site.name in widths.acts else ()
        acts = tuple(
            act and replace(act, dtype=sites.integer_dtype(site, act.bits)) for act in acts
        )
        leaves[site.path] = replace(q, acts=acts, dtype=made.leaves[site.path].dtype)
    for site in made.sites.sites:
        if site.name in made.left and site.path in widths.weights and site.path not in leaves:
            bits = widths.weights[site.path]
            bits = matrices.from_matrix(jnp.asarray(bits).reshape(-1, 1, 1, 1), site)
            leaves[site.path] = _nearest(made.leaves[site.path], bits, site.contracting)
    return tree.map_named(lambda path, leaf: leaves.get(path, leaf), made.params)


def _nearest(w: jax.Array, bits: ArrayLike, axes: tuple[int, ...]) -> QTensor:
    q = quantizer.quantize(w, best_grid(w, bits, axes))
    return replace(quantizer.narrow(q), dtype=w.dtype)


OnSite = Callable[[Mapping[str, Outcome]], None]


class LayerRow(NamedTuple):
    """What became of one site.

    Attributes:
      name: Of the site.
      shape: Of its leaf.
      weight_bits: Mean width of the weights; 32 for floats.
      act_bits: Mean width of the data; 32 for floats.
      sufficiency: Rows of data for each input; below 2 there is too little.
      nearest: Squared error behind the layer over its mean square, on rows held out: grids of least
        error, rounded to nearest.
      start: The same where the fit began.
      loss: The same at its end.
      note: Why it was not fitted, or empty.
    """

    name: str
    shape: tuple[int, ...]
    weight_bits: float
    act_bits: float
    sufficiency: float
    nearest: float
    start: float
    loss: float
    note: str


class AdaQuantInfo(NamedTuple):
    """Outcome of :func:`quantize`.

    Attributes:
      rows: One for each site, in forward order.
      others: Uses of leaves, and products of data, that are not quantized.
      state: Outcomes by layer; pass them as ``state`` to go on, or to fit other layers anew.
    """

    rows: tuple[LayerRow, ...]
    others: tuple[OtherUse, ...]
    state: Mapping[str, Outcome]


def _row(made: Problem, site: Site, widths: Widths, found: Outcome | None) -> LayerRow:
    def mean(loss: Any) -> float:
        return float(np.mean(loss))

    return LayerRow(
        name=site.name,
        shape=site.shape,
        weight_bits=mean(widths.weights.get(site.path, 32)),
        act_bits=mean(widths.acts.get(site.name, 32)) if found else 32.0,
        sufficiency=made.sufficiency.get(site.name, np.nan),
        nearest=mean(found.nearest) if found else np.nan,
        start=mean(found.start) if found else np.nan,
        loss=mean(found.loss) if found else np.nan,
        note=made.left.get(site.name, "") if site.path in widths.weights else "float",
    )


def _warn_of_few_rows(made: Problem, names: Iterable[str]) -> None:
    learns = made.how.weights != "fixed" or made.how.second_order
    few = [name for name in names if learns and made.sufficiency[name] < 2.0]
    if few:
        warnings.warn(
            f"calib: fewer than two rows of data for each input of {', '.join(few)}; "
            "give more examples (or raise rows or memory, where these bound them), "
            "or weights='fixed' and second_order=False",
            stacklevel=3,
        )


def fit_in_parallel(
    made: Problem,
    widths: Widths,
    done: Mapping[str, Outcome] | None = None,
    *,
    on_site: OnSite | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Fit every layer that has a width to what it reads in the float model.

    Args:
      made: The model.
      widths: Of weights and data.
      done: What is fitted already.
      on_site: Called with all outcomes after each layer, or layers of equal shape.
      progress: Called likewise.
    """
    names, done = _with_widths(made, widths), dict(done or {})
    for group in made.passes:
        wanted = [name for name in group if name in names and name not in done]
        rows = made.sample(group, made.floats) if wanted else {}
        rows = {name: rows[name] for name in wanted}
        for found in fit(made, widths, rows, rows):
            done |= found
            _report(done, names, found, on_site, progress)
    return done


def fit_in_sequence(
    made: Problem,
    widths: Widths,
    done: Mapping[str, Outcome] | None = None,
    *,
    on_site: OnSite | None = None,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Fit every layer that has a width to what it reads in the model quantized so far.

    Arguments are those of :func:`fit_in_parallel`.
    """
    names, done = _with_widths(made, widths), dict(done or {})
    current = place(made, made.floats, {n: o.fit for n, o in done.items()}, widths)
    for group in made.passes:
        wanted = [name for name in group if name in names and name not in done]
        targets = made.sample(group, made.floats) if wanted else {}
        for _, turn in groupby(wanted, lambda name: made.layers[name].input):
            rows = made.sample(group, current)
            for found in fit(made, widths, {name: rows[name] for name in turn}, targets):
                done |= found
                fits = {name: outcome.fit for name, outcome in found.items()}
                current = place(made, current, fits, widths)
                _report(done, names, found, on_site, progress)
    return done


def _with_widths(made: Problem, widths: Widths) -> list[str]:
    return [name for name, site in made.layers.items() if site.path in widths.weights]


def _report(
    done: Mapping[str, Outcome],
    names: Sequence[str],
    found: Iterable[str],
    on_site: OnSite | None,
    progress: Progress | None,
) -> None:
    if on_site:
        on_site(dict(done))
    if progress:
        progress(len(done), len(names), "fit " + ", ".join(found))


def quantize(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    weight_bits: int | Select = 4,
    act_bits: int | Select | None = 8,
    edge_bits: int | None = 8,
    skip: Select | None = None,
    sequential: bool = True,
    round_biases: bool = False,
    state: Mapping[str, Outcome] | None = None,
    on_site: OnSite | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> tuple[Params, AdaQuantInfo]:
    """Quantize weights and data of a model, each layer fitted to its old outputs.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples, a few hundred.
      weight_bits: Width of the weights, 1 to 16: a number, a mapping from regular expressions on
        leaf names to numbers, or a function of the name.
      act_bits: Width of the data at the sites of a leaf, likewise; None is float.
      edge_bits: Least width at the first and the last site; None for no exception.
      skip: Leaves that stay float, with the data at their sites.
      sequential: Whether a layer reads what the quantized layers before it make.
      round_biases: As in :func:`harden`.
      state: Of an earlier run with the same arguments: its layers are not fitted again.
      on_site: Called with the state after each layer (or layers of equal shape), to save it.
      progress: Called likewise.
      **options: Those of :func:`problem`.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`AdaQuantInfo`.

    Raises:
      ValueError: If a weight is not finite, a width or an option is out of range, there is no site,
        or ``state`` is of another model.

    Warns:
      UserWarning: If a layer whose weights are fitted has fewer than two rows for each input.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (16, 4))
      >>> x = jax.random.normal(jax.random.key(1), (200, 16)) @ jax.random.normal(
      ...     jax.random.key(2), (16, 16))
      >>> qtree, info = quantize(lambda p, x: x @ p["w"], {"w": w}, x, edge_bits=None)
      >>> info.rows[0].loss < info.rows[0].nearest
      True
    """
    made = problem(apply_fn, params, calib, **options)
    widths = site_widths(made.sites.sites, weight_bits, act_bits, edge_bits, skip)
    require_weights(made.sites.sites, widths)
    names = _with_widths(made, widths)
    _warn_of_few_rows(made, names)
    done = dict(state or {})
    if not set(done) <= set(names):
        raise ValueError(f"state: {sorted(set(done) - set(names))} are no layers to be fitted here")
    run = fit_in_sequence if sequential else fit_in_parallel
    done = run(made, widths, done, on_site=on_site, progress=progress)
    qtree = harden(made, {n: o.fit for n, o in done.items()}, widths, round_biases=round_biases)
    table = tuple(_row(made, s, widths, done.get(s.name)) for s in made.sites.sites)
    return qtree, AdaQuantInfo(table, made.sites.others, done)
