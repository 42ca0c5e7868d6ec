r"""LAPQ: all clips of a model chosen together, against its loss.

The loss of a quantized model is a function of one vector, a clip for every quantized leaf and for
the data at every site,

.. math:: \min_{\theta} L(\theta), \qquad \theta = \log(c_1, \dots, c_n),

and nothing else is learned: weights are rounded to nearest. At 8 bits L is flat and almost a sum of
functions of one clip each, so that any rule for single tensors will do; at 4 bits and below the
best clip of a layer depends on the others. Three phases:

1. for an exponent p, each clip minimises :math:`\mathbb{E}|Q_c(x) - x|^p` of its tensor, in one
   pass in which every tensor is what the quantized layers before it make of it;
2. a parabola through the loss as a function of p gives the start;
3. the loss itself is searched, along all directions in turn (:mod:`lnq.search`).

Source: Nahshan et al., `Loss Aware Post-training Quantization
<https://arxiv.org/abs/1911.07190>`_, 2019, and its authors' released code.

Differs from the paper and the code in: data is quantized where a product reads it, once for all
products that read it, not behind each ReLU; clips are searched in logarithms; p is scanned in
1 .. 5 and the parabola goes through the best and its neighbours; the search starts from the best of
all that were tried, first on a quarter of the batches; what is returned is the best point seen that
is no worse than the start on examples held out; without labels the loss is the divergence from the
float model; the first and the last layer have 8 bits (:func:`published` has the paper's choice, and
its grid).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, prod
from typing import Any, Literal, NamedTuple, TypedDict, Unpack, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike

from lnq import calibration, distortion, quantizer, reuse, search, sites, tree
from lnq.calibration import ActStats
from lnq.quantizer import FakeQuantTensor, QParams, QTensor, fake_quant, make_qparams
from lnq.search import Move, SearchState
from lnq.sites import Site, Sites, Stat
from lnq.types import ApplyFn, LossFn, Params, Progress, Select
from lnq.widths import Widths, site_widths

__all__ = [
    "ClipRow",
    "Correct",
    "Data",
    "Grid",
    "LAPQInfo",
    "LAPQState",
    "Options",
    "Problem",
    "begin",
    "best_p",
    "clipped",
    "improve",
    "lp_clip",
    "make_grid",
    "problem",
    "published",
    "quantize",
]

Grid = Literal["integer", "even"]
"""Levels of weights: whole multiples of the step, or (the authors' code) an even number of levels,
symmetric and without zero."""

Correct = Literal["mean", "norm", "none"]
"""What rounding weights must not change: the mean of each channel (the paper), its mean and norm,
or nothing."""

Search = Literal["powell", "coordinate", "none"]
"""Phase 3: conjugate directions, one clip at a time, or none."""

Distance = Callable[[Any, Any], jax.Array]
"""``distance(outputs of the float model, outputs) -> scalar``, a mean over the examples."""

EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)
HELD_OUT = 5
"""One batch in so many is not searched on."""

WIDTH = 1.2
"""How far clips are moved at first, for 0 bits, in logarithms; half as far for two bits more."""

TINY = 1e-30


# Grids and clips of single tensors.


def make_grid(bits: ArrayLike, *, signed: ArrayLike = True, even: bool = False) -> QParams:
    r"""The levels of a grid, with a step of 1; :func:`clipped` gives it a clip.

    Signed, integer: :math:`-2^{M-1} \dots 2^{M-1} - 1`. Signed, even: :math:`\pm\tfrac12,
    \pm\tfrac32, \dots, \pm\tfrac{2^M-1}2`. One-sided: :math:`0 \dots 2^M - 1`.

    Args:
      bits: Width M; bits, whole; may be traced.
      signed: Whether values have both signs; may be traced.
      even: Whether signed levels are symmetric and without zero.

    Example:
      >>> grid = clipped(make_grid(2, even=True), 3.0)
      >>> fake_quant(jnp.array([-9.0, -0.1, 0.1, 2.1]), jax.tree.map(jnp.ravel, grid))
      Array([-3., -1.,  1.,  3.], dtype=float32)
    """
    half = jnp.exp2(jnp.asarray(bits).astype(jnp.float32)) / 2.0
    zero_point = jnp.where(signed, -0.5 if even else 0.0, -half)
    scale = jnp.ones_like(zero_point)
    return make_qparams(scale, zero_point=zero_point, qmin=-half, qmax=half - 1.0)


def clipped(grid: QParams, clip: ArrayLike) -> QParams:
    """The grid with the step at which its largest magnitude is ``clip`` times ``grid.scale``.

    Args:
      grid: Its levels; its scale is 1, or the reach of each channel relative to the others.
      clip: Value units; positive, below 1e-30 it counts as that.
    """
    levels = jnp.maximum(grid.zero_point - grid.qmin, grid.qmax - grid.zero_point)
    return replace(grid, scale=grid.scale * jnp.maximum(clip, TINY) / levels)


def lp_clip(stats: ActStats, grid: QParams, p: ArrayLike) -> jax.Array:
    r"""The clip of least :math:`\mathbb{E}|Q_c(x) - x|^p`; larger for a larger p.

    64 clips between 1 % and 100 % of the largest magnitude, then golden sections around the best:
    the error has small ripples, which a search from one end would stop at.

    Args:
      stats: Of the values, ``[c]``.
      grid: Levels, fields ``[c]``.
      p: The exponent; may be traced.

    Returns:
      Clips, value units, ``[c]``; 1 where all values are zero.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (100_000, 1))
      >>> grid = jax.tree.map(lambda a: a.reshape(1), make_grid(2, even=True))
      >>> lp_clip(calibration.observe(x, (1,)), grid, 2.0).round(1)  # 1.494 for the ideal density
      Array([1.5], dtype=float32)
    """
    limit = _limit(stats.low, stats.high)
    empty = jnp.maximum(-stats.low, stats.high) <= 0.0

    def error(log_share: jax.Array) -> jax.Array:
        return calibration.grid_error(stats, clipped(grid, limit * jnp.exp(log_share)), 4, p)

    shares = jnp.linspace(jnp.log(0.01), 0.0, 64, dtype=jnp.float32)
    errors = lax.map(lambda share: error(jnp.broadcast_to(share, limit.shape)), shares)
    best, width = shares[jnp.argmin(errors, 0)], shares[1] - shares[0]
    share = jnp.exp(_golden(error, best - width, jnp.minimum(best + width, 0.0)))
    return jnp.where(empty, 1.0, limit * share)


GOLDEN = (5**0.5 - 1) / 2


def _golden(f: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Minimise entry by entry; each turn leaves 0.62 of the interval."""

    def turn(_: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        a, b = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        left = f(a) < f(b)
        return jnp.where(left, low, a), jnp.where(left, b, high)

    low, high = lax.fori_loop(0, 16, turn, (low, high))
    return (low + high) / 2.0


def _limit(low: jax.Array, high: jax.Array) -> jax.Array:
    """Largest magnitude; 1 where there is none."""
    limit = jnp.maximum(-low, high).astype(jnp.float32)
    return jnp.where((limit > 0.0) & jnp.isfinite(limit), limit, 1.0)


def best_p(ps: Sequence[float], losses: Sequence[float], window: int | None = 5) -> float:
    r"""The exponent at which a parabola through the losses is lowest.

    .. math:: \ell \approx a p^2 + b p + d \ \text{(least squares)}, \qquad p^* = -b / 2a

    The best scanned exponent instead if :math:`a \le 0` or :math:`p^*` is not among those fitted.

    Args:
      ps: Exponents, ascending, ``[k]``.
      losses: The loss of each, ``[k]``.
      window: How many of them, around the best, are fitted; None for all (the paper).

    Example:
      >>> round(best_p(EXPONENTS, [(p - 2.7) ** 2 for p in EXPONENTS]), 5)
      2.7
      >>> best_p(EXPONENTS, [-p for p in EXPONENTS])
      5.0
    """
    best = int(np.nanargmin(losses))
    size = len(ps) if window is None else min(window, len(ps))
    first = int(np.clip(best - size // 2, 0, len(ps) - size))
    x, y = (np.asarray(a, float)[first : first + size] for a in (ps, losses))
    if size < 3 or not np.isfinite(y).all():
        return float(ps[best])
    a, b, _ = np.polyfit(x, y, 2)
    inside = a > 0.0 and x[0] <= -b / (2.0 * a) <= x[-1]
    return float(-b / (2.0 * a) if inside else ps[best])


# The loss as a function of the clips.


Clips = OrderedDict[str, jax.Array]
"""By :func:`_weights` of a leaf and :func:`_data` of the first site that reads it, in forward
order."""


def _weights(path: str) -> str:
    return f"weights of {path}"


def _data(site: str) -> str:
    return f"data of {site}"


class Data(NamedTuple):
    """What a loss is taken over: arrays, so that a compiled loss serves other data of its shape.

    Attributes:
      params: The float model.
      grids: Levels of weights and data, by name; other bits are other data.
      batches: Examples; one pytree of leaves ``[m, b, ...]`` for each shape of batch.
      references: Outputs of the float model, likewise; None where the loss does not need them.
    """

    params: Params
    grids: Mapping[str, QParams]
    batches: tuple[Any, ...]
    references: tuple[Any, ...]


class Stage(NamedTuple):
    """The part of a loss that depends on the last entries of ``theta``.

    Attributes:
      first: The first of these entries.
      share: Of the multiplications that this part makes.
      keep: ``keep(theta, data) -> kept``: the model's values where the part begins.
      loss: ``loss(theta[first:], kept, theta, data) -> scalar``: the loss, from there on.
    """

    first: int
    share: float
    keep: Callable[[jax.Array, Data], Any]
    loss: Callable[[jax.Array, Any, jax.Array, Data], jax.Array]


class Problem(NamedTuple):
    """The loss of a quantized model as a function of its clips' logarithms, ``theta [n]``.

    Attributes:
      names: What each entry of ``theta`` is the clip of.
      bits: Its width, ``[n]``.
      loss: ``loss(theta, data) -> scalar``, pure; jit it.
      start: ``start(p, data) -> theta``, phase 1; likewise.
      widest: ``theta`` with every clip at the largest magnitude seen. (The top level of a signed
        integer grid is a step below.)
      data: What is searched on.
      held_out: What is accepted on: one batch in five, or all if they are fewer.
      sites: Of the model.
      tree: ``tree(theta) -> qtree`` of integer codes.
      stages: Parts of the loss, each at most 0.7 of the one before; the first is all of it.
    """

    names: tuple[str, ...]
    bits: np.ndarray
    loss: Callable[[jax.Array, Data], jax.Array]
    start: Callable[[ArrayLike, Data], jax.Array]
    widest: jax.Array
    data: Data
    held_out: Data
    sites: Sites
    tree: Callable[[jax.Array], Params]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class _Plan:
    """What stays the same while clips change.

    Attributes:
      uses: Sites of each leaf that has a grid of its own or of its data.
      owner: For each site with a grid, the first that reads the same data: its clip is theirs.
      correct: As in :func:`quantize`.
    """

    uses: dict[str, list[Site]]
    owner: dict[str, str]
    correct: Correct

    def acts(
        self, path: str, grids: Mapping[str, QParams], clips: Clips
    ) -> tuple[QParams | None, ...]:
        """Grids of the data at each site of a leaf; empty if there is none."""
        names = [site.name for site in self.uses[path]]
        found = tuple(
            clipped(grids[_data(name)], clips[_data(self.owner[name])])
            if name in self.owner
            else None
            for name in names
        )
        return found if any(found) else ()

    def summed(self, path: str) -> tuple[int, ...]:
        """Axes along which a channel of a leaf runs."""
        return tuple(sorted({axis for site in self.uses[path] for axis in site.contracting}))

    def fake(self, params: Params, grids: Mapping[str, QParams], clips: Clips) -> Params:
        """The tree in floats, differentiable."""

        def leaf(path: str, w: Any) -> Any:
            if path not in self.uses:
                return w
            name = _weights(path)
            if name in grids:
                grid = clipped(grids[name], clips[name])
                w = _rounded(w, grid, self.summed(path), self.correct)
            acts = self.acts(path, grids, clips)
            return FakeQuantTensor(w, None, acts, w.dtype) if acts else w

        return tree.map_named(leaf, params)

    def hard(self, params: Params, grids: Mapping[str, QParams], clips: Clips) -> Params:
        """The tree in integers."""

        def leaf(path: str, w: Any) -> Any:
            if path not in self.uses:
                return w
            acts = tuple(
                act and replace(act, dtype=sites.integer_dtype(site, act.bits))
                for site, act in zip(self.uses[path], self.acts(path, grids, clips), strict=False)
            )
            name = _weights(path)
            if name not in grids:
                return FakeQuantTensor(w, None, acts, w.dtype)
            grid = clipped(grids[name], clips[name])
            q = _codes(w, grid, axes=self.summed(path), correct=self.correct)
            return replace(quantizer.narrow(q), acts=acts)

        return tree.map_named(leaf, params)


def _rounded(w: jax.Array, grid: QParams, axes: tuple[int, ...], correct: Correct) -> jax.Array:
    """Weights as floats on their grid, corrected."""
    x = distortion.wide(w)
    out = fake_quant(x, grid)
    if correct != "none":
        norm = correct == "norm"
        factor, mean_out, mean = quantizer.match_moments(x, out, axes, norm=norm)
        out = factor * (out - mean_out) + mean
    return out.astype(w.dtype)


@partial(jax.jit, static_argnames=("axes", "correct"))
def _codes(w: jax.Array, grid: QParams, *, axes: tuple[int, ...], correct: Correct) -> QTensor:
    """The same as codes."""
    x = distortion.wide(w)
    q = quantizer.quantize(x, grid, jnp.int32)
    if correct != "none":
        q = quantizer.correct_bias(x, q, axes, norm=correct == "norm")
    return replace(q, dtype=w.dtype)


def published(
    found: Sites, *, weight_bits: int | None = 4, act_bits: int | None = 4
) -> dict[str, Any]:
    """The options of :func:`problem` and :func:`quantize` with which the authors' code works.

    The even grid. Weights of all convolutions but the first and the last; no dense layer. Data of
    all convolutions but the first, which reads the images, and those that read what it makes: the
    first activation. The last activation is what the dense layer reads. Batch-norm is not to be
    folded.

    Args:
      found: Sites of the model, in forward order.
      weight_bits: Width of weights; None leaves them float.
      act_bits: Width of data; likewise.

    Example:
      >>> conv = lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "SAME")
      >>> net = lambda p, x: conv(conv(conv(x, p["a"]), p["b"]), p["c"]).sum((2, 3)) @ p["head"]
      >>> p = {k: jnp.ones((4, 4, 3, 3)) for k in "abc"} | {"head": jnp.ones((4, 2))}
      >>> options = published(sites.find_sites(net, p, jnp.ones((1, 4, 8, 8))))
      >>> [(name, options["weight_bits"](name), options["act_bits"](name)) for name in p]
      [('a', None, None), ('b', 4, None), ('c', None, 4), ('head', None, None)]
    """
    convolutions = [site for site in found.sites if site.primitive == "conv_general_dilated"]
    second = convolutions[1].input if len(convolutions) > 1 else -1
    inner = {site.path for site in convolutions[1:-1]}
    behind = {site.path for site in convolutions[1:] if site.input != second}
    return {
        "weight_bits": lambda path: weight_bits if path.partition("[")[0] in inner else None,
        "act_bits": lambda path: act_bits if path.partition("[")[0] in behind else None,
        "edge_bits": None,
        "grid": "even",
        "correct": "mean",
    }


class Options(TypedDict, total=False):
    """Options of :func:`problem`, which :func:`quantize` hands on."""

    loss_fn: LossFn | None
    distance: Distance
    weight_bits: int | Select | None
    act_bits: int | Select | None
    edge_bits: int | None
    skip: Select | None
    grid: Grid
    per_channel: bool
    correct: Correct
    batch_size: int


def problem(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    loss_fn: LossFn | None = None,
    distance: Distance = distortion.kl,
    weight_bits: int | Select | None = 4,
    act_bits: int | Select | None = 4,
    edge_bits: int | None = 8,
    skip: Select | None = None,
    grid: Grid = "integer",
    per_channel: bool = False,
    correct: Correct = "mean",
    batch_size: int = 128,
) -> Problem:
    """The loss of a model as a function of its clips, for a search, a plot or SciPy.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Examples, a few hundred; with labels if ``loss_fn`` needs them. An array, dict or tuple
        is one pytree of examples and is shuffled, a list holds batches.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean over the batch. Without it, labels
        are not needed: the loss is ``distance``.
      distance: ``distance(outputs of the float model, outputs)``, by default the divergence of
        their softmax; for embeddings, say, :func:`~lnq.distortion.mse`.
      weight_bits: Width of the weights at sites, 1 to 16: a number, a mapping from regular
        expressions on leaf names to numbers, or a function of the name; None is float. Leaves that
        are no factor of a product (an embedding) stay as they are.
      act_bits: Width of the data at the sites of a leaf, likewise.
      edge_bits: Least width at the first and the last site; None for no exception.
      skip: Leaves that stay float, with the data at their sites.
      grid: Levels of the weights, see :data:`Grid`.
      per_channel: Whether each channel of the weights has a step of its own (the paper has one for
        a tensor): all clip the same share of their largest magnitude, and that share is searched.
      correct: What rounding must not change, see :data:`Correct`; in force in every evaluation.
      batch_size: Examples in one call of the model.

    Raises:
      ValueError: If a weight is not finite, a width is out of range, there is no site, ``loss_fn``
        fails (labels may be missing), or the default ``distance`` does not fit the outputs.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (16, 4))
      >>> x = jax.random.normal(jax.random.key(1), (100, 16))
      >>> made = problem(lambda p, x: x @ p["w"], {"w": w}, x, edge_bits=None)
      >>> made.names, made.loss(made.widest, made.data) > made.loss(made.widest - 0.2, made.data)
      (('data of w', 'weights of w'), Array(True, dtype=bool))
    """
    for name, given, kinds in (("grid", grid, Grid), ("correct", correct, Correct)):
        if given not in get_args(kinds):
            raise ValueError(f"{name}: must be one of {', '.join(get_args(kinds))}, not {given!r}")
    tree.check_finite(params)
    pieces = _pieces(calib, batch_size)
    found = sites.find_sites(apply_fn, params, pieces[0])
    widths = site_widths(found.sites, weight_bits, act_bits, edge_bits, skip)
    if not widths.weights and not widths.acts:
        raise ValueError("apply_fn: no site is to be quantized; find_sites lists what there is")
    plan = _plan(found.sites, widths, correct)
    outputs, ranges = _observed(apply_fn, params, pieces, plan.owner)
    grids, widest = _grids(params, found.sites, plan, widths, ranges, grid, per_channel)
    flat, unravel = ravel_pytree(widest)
    run = sites.quantized(apply_fn)

    def of_batch(qtree: Params, batch: Any, reference: Any) -> jax.Array:
        out = run(qtree, batch)
        found = distance(reference, out) if loss_fn is None else loss_fn(out, batch)
        if np.shape(found) != ():
            raise TypeError(f"returns shape {np.shape(found)}; return one number, the mean")
        return jnp.asarray(found, jnp.float32)

    def loss(theta: jax.Array, data: Data) -> jax.Array:
        qtree = plan.fake(data.params, data.grids, unravel(jnp.exp(theta)))
        pairs = zip(data.batches, data.references, strict=True)
        return _mean([lax.map(lambda pair: of_batch(qtree, *pair), pair) for pair in pairs], data)

    def whole(clips: Clips, data: Data, batch: Any) -> jax.Array:
        return of_batch(plan.fake(data.params, data.grids, clips), *batch)

    def start(p: ArrayLike, data: Data) -> jax.Array:
        batch = jax.tree.map(lambda a: a[0], data.batches[0])
        clips = _lp_clips(apply_fn, plan, widest, p, data, batch)
        return jnp.log(ravel_pytree(clips)[0])

    def split(held: bool) -> Data:
        chosen = [i for i in range(len(pieces)) if (i % HELD_OUT == HELD_OUT - 1) == held]
        chosen = chosen or list(range(len(pieces)))
        pairs = [(pieces[i], None if loss_fn else outputs[i]) for i in chosen]
        batches, references = zip(*_stacked(pairs), strict=True)
        return Data(params, grids, batches, references)

    data, held_out = split(False), split(True)
    if loss_fn is None and distance is distortion.kl:
        _check_softmax(outputs[0])
    _check_loss(loss, jnp.log(flat), data)
    return Problem(
        names=_names(widest),
        bits=np.concatenate([np.ravel(grids[name].bits) for name in widest]),
        loss=loss,
        start=start,
        widest=jnp.log(flat),
        data=data,
        held_out=held_out,
        sites=found,
        tree=lambda theta: plan.hard(params, grids, unravel(jnp.exp(theta))),
        stages=tuple(
            _stage(whole, widest, *begins) for begins in _stage_starts(widest, found.sites)
        ),
    )


def _mean(losses: Sequence[jax.Array], data: Data) -> jax.Array:
    """Mean over the examples from the means of the batches."""
    sizes = [jax.tree.leaves(batch)[0].shape[1] for batch in data.batches]
    totals = [size * jnp.sum(of) for size, of in zip(sizes, losses, strict=True)]
    return jnp.sum(jnp.stack(totals)) / _examples(data)


def _examples(data: Data) -> int:
    return sum(prod(jax.tree.leaves(batch)[0].shape[:2]) for batch in data.batches)


def _stage(
    of_batch: Callable[[Clips, Data, Any], jax.Array], widest: Clips, first: int, share: float
) -> Stage:
    """The part of a loss from entry ``first`` of ``theta`` on."""

    def halves(theta: jax.Array, data: Data, batch: Any) -> reuse.Halves:
        def whole(fixed: Any, moving: jax.Array) -> jax.Array:
            theta, data, batch = fixed
            return of_batch(_joined(widest, theta, moving, first), data, batch)

        return reuse.split(whole, (theta, data, batch), theta[first:])

    def keep(theta: jax.Array, data: Data) -> Any:
        fixed = data._replace(batches=(), references=())

        def of(batch: Any) -> Any:
            return halves(theta, fixed, batch)[0]((theta, fixed, batch))

        return [lax.map(of, group) for group in zip(data.batches, data.references, strict=True)]

    def loss(moving: jax.Array, kept: Any, theta: jax.Array, data: Data) -> jax.Array:
        fixed = data._replace(batches=(), references=())

        def of(pair: Any) -> jax.Array:
            kept, batch = pair
            return halves(theta, fixed, batch)[1](kept, (theta, fixed, batch), moving)

        groups = zip(kept, zip(data.batches, data.references, strict=True), strict=True)
        return _mean([lax.map(of, group) for group in groups], data)

    return Stage(first, share, keep, loss)


def _joined(widest: Clips, theta: jax.Array, moving: jax.Array, first: int) -> Clips:
    """Clips from the head of ``theta`` and, from ``first`` on, from ``moving``; never of both."""
    clips, place = OrderedDict(), 0
    for name, like in widest.items():
        source, at = (theta, place) if place < first else (moving, place - first)
        clips[name] = jnp.exp(source[at : at + like.size]).reshape(like.shape)
        place += like.size
    return clips


def _stage_starts(widest: Clips, every: Sequence[Site]) -> list[tuple[int, float]]:
    """Where in ``theta`` a stage may begin, and what share of the work is left there."""
    left = np.cumsum([site.macs for site in every][::-1])[::-1] / sum(s.macs for s in every)
    place, starts = 0, [(0, 1.0)]
    work = {_weights(site.path): share for site, share in zip(every[::-1], left[::-1], strict=True)}
    work |= {_data(site.name): share for site, share in zip(every, left, strict=True)}
    for name, like in widest.items():
        if work[name] <= 0.7 * starts[-1][1]:
            starts.append((place, float(work[name])))
        place += like.size
    return starts


def _plan(every: Sequence[Site], widths: Widths, correct: Correct) -> _Plan:
    uses: dict[str, list[Site]] = {}
    owner: dict[str, str] = {}
    first: dict[Any, str] = {}
    quantized = {site.path for site in every if site.name in widths.acts} | set(widths.weights)
    for site in every:
        if site.path in quantized:
            uses.setdefault(site.path, []).append(site)
        if site.name in widths.acts:
            owner[site.name] = first.setdefault((site.input, site.stack), site.name)
    return _Plan(uses, owner, correct)


def _grids(
    params: Params,
    every: Sequence[Site],
    plan: _Plan,
    widths: Widths,
    ranges: Mapping[str, tuple[jax.Array, jax.Array]],
    grid: Grid,
    per_channel: bool,
) -> tuple[dict[str, QParams], Clips]:
    """Levels of all grids, and the clips at which nothing is clipped."""
    levels: dict[str, QParams] = {}
    widest: Clips = OrderedDict()
    leaves = dict(tree.named_leaves(params))
    for site in every:
        if (bits := widths.acts.get(site.name)) is not None:
            low, high = ranges[plan.owner[site.name]]
            shape = low.shape + (1,) * len(site.act.shape)
            found = _make_grid(np.broadcast_to(bits, low.shape), signed=low < 0.0)
            levels[_data(site.name)] = _spread(found, shape)
            if plan.owner[site.name] == site.name:
                widest[_data(site.name)] = _limit(low, high).reshape(shape)
        name = _weights(site.path)
        if (bits := widths.weights.get(site.path)) is not None and name not in levels:
            w = leaves[site.path]
            layer = tuple(i for i in range(w.ndim) if i not in site.sliced)
            widest[name] = _reach(w, layer)
            found = _spread(_make_grid(bits, even=grid == "even"), widest[name].shape)
            summed = plan.summed(site.path) if per_channel else layer
            levels[name] = replace(found, scale=_reach(w, summed) / widest[name])
    return levels, widest


def _reach(w: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest magnitude along axes, kept as 1."""
    return _limit(w.min(axes, keepdims=True), w.max(axes, keepdims=True))


_make_grid = jax.jit(make_grid, static_argnames="even")


def _spread(grid: QParams, shape: tuple[int, ...]) -> QParams:
    """Fields, one for each layer, in the shape of the clips."""
    return jax.tree.map(lambda a: jnp.broadcast_to(a.ravel(), prod(shape)).reshape(shape), grid)


def _lp_clips(
    apply_fn: ApplyFn, plan: _Plan, widest: Clips, p: ArrayLike, data: Data, batch: Any
) -> Clips:
    """Phase 1: weights, then one pass through the model, clip after clip."""
    grids, clips = data.grids, OrderedDict(widest)
    for path, w in tree.named_leaves(data.params):
        name = _weights(path)
        if name in clips:
            layers = tuple(i for i, n in enumerate(clips[name].shape) if n > 1)
            stats = calibration.observe(distortion.wide(w) / grids[name].scale, layers)
            clips[name] = _clip_of(stats, grids[name], p)

    def through(x: jax.Array, act: QParams | None, stats: ActStats) -> jax.Array:
        if act is None:
            return x
        levels = replace(act, scale=jnp.ones_like(act.scale))
        return fake_quant(x, clipped(levels, _clip_of(stats, act, p)))

    rounded = plan.fake(data.params, grids, clips)
    _, seen = sites.tap(apply_fn, calibration.POOLED, None, through)(rounded, batch)
    merged: dict[str, ActStats] = {}
    for site, owner in plan.owner.items():
        found = merged.get(owner)
        merged[owner] = seen[site] if found is None else calibration.merge(found, seen[site])
    of_data = {
        _data(site): _clip_of(stats, grids[_data(site)], p) for site, stats in merged.items()
    }
    clips.update(of_data)
    return clips


def _clip_of(stats: ActStats, grid: QParams, p: ArrayLike) -> jax.Array:
    """:func:`lp_clip` in the shape of the grid, of values relative to its scale."""
    count, grid = grid.qmin.size, replace(grid, scale=jnp.ones_like(grid.qmin))
    flat = jax.tree.map(lambda a: a.reshape(count, *a.shape[stats.mean.ndim :]), stats)
    clip = lp_clip(flat, jax.tree.map(jnp.ravel, grid), p)
    return clip.reshape(grid.qmin.shape)


def _observed(
    apply_fn: ApplyFn, params: Params, pieces: Sequence[Any], owner: Mapping[str, str]
) -> tuple[list[Any], dict[str, tuple[jax.Array, jax.Array]]]:
    """Outputs of the float model, and by owner of a clip the range of its data.

    Sites in two branches share an owner, and either may see no data.
    """
    observe = jax.jit(sites.tap(apply_fn, RANGES))
    seen = [observe(params, piece) for piece in pieces]
    stacked = _stack([ranges for _, ranges in seen])
    ranges: dict[str, tuple[jax.Array, jax.Array]] = {}
    for site, name in owner.items():
        low, high = stacked[site]
        before = ranges.get(name, (jnp.inf, -jnp.inf))
        ranges[name] = jnp.minimum(before[0], low.min(0)), jnp.maximum(before[1], high.max(0))
    return [out for out, _ in seen], ranges


RANGES = Stat(
    lambda x, site: (jnp.min(x).astype(jnp.float32), jnp.max(x).astype(jnp.float32)),
    lambda like: (jnp.float32(jnp.inf), jnp.float32(-jnp.inf)),
    lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
)
"""For :func:`~lnq.sites.tap`: smallest and largest value."""


def _pieces(calib: Any, size: int) -> list[Any]:
    """Batches, at least five if there are as many examples, so that some can be held out."""
    if size < 1:
        raise ValueError(f"batch_size: must be at least 1, not {size}")
    batches = calibration.as_batches(calib)
    if len(batches) >= HELD_OUT:
        return batches
    least = ceil(HELD_OUT / len(batches))
    return [piece for batch in batches for piece in _cut(batch, size, least)]


def _cut(batch: Any, size: int, least: int) -> list[Any]:
    """Equal parts, shuffled (always alike); a few examples that are left over are dropped."""
    examples = calibration.batch_size(batch)
    parts = min(examples, max(least, ceil(examples / size)))
    order = np.random.default_rng(0).permutation(examples)
    chosen = order[: examples // parts * parts].reshape(parts, -1)
    return [jax.tree.map(lambda a, part=part: _array(a)[part], batch) for part in chosen]


def _array(a: Any) -> Any:
    """As it is on a device (a PRNG key is nothing else), or in NumPy."""
    return a if isinstance(a, jax.Array) else np.asarray(a)


def _stacked(pieces: Sequence[Any]) -> list[Any]:
    """Pieces of equal shapes stacked."""
    groups: dict[Any, list[Any]] = {}
    for piece in pieces:
        leaves, structure = jax.tree.flatten(piece)
        shapes = tuple((np.shape(a), _array(a).dtype) for a in leaves)
        groups.setdefault((structure, shapes), []).append(piece)
    return [_stack(group) for group in groups.values()]


@jax.jit
def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.stack(a), *trees)


def _names(clips: Clips) -> tuple[str, ...]:
    """One for each entry of ``theta``; entries of stacked leaves and channels are numbered."""
    return tuple(
        name if a.size == 1 else f"{name}[{i}]" for name, a in clips.items() for i in range(a.size)
    )


def _check_softmax(outputs: Any) -> None:
    shapes = [np.shape(out) for out in jax.tree.leaves(outputs)]
    if len(shapes) != 1 or len(shapes[0]) < 2 or shapes[0][-1] < 2:
        raise ValueError(
            "distance: the default compares the softmax of one array of logits, but the outputs "
            f"have shapes {shapes}; give `loss_fn`, or a `distance` such as distortion.mse"
        )


def _check_loss(loss: Callable[..., jax.Array], theta: jax.Array, data: Data) -> None:
    try:
        jax.eval_shape(loss, theta, data)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        shapes = jax.tree.map(np.shape, data.batches[0])
        raise ValueError(
            "loss_fn: fails on the outputs and a batch of calib, whose shapes are "
            f"{shapes} with the batches first; if it needs labels, calib must hold them: {error}"
        ) from error


# The three phases.


class ClipRow(NamedTuple):
    """What became of one clip.

    Attributes:
      name: Of the leaf, or of the site whose data it is.
      bits: Width.
      widest: Largest magnitude seen, value units.
      start: Its clip at the start of the search.
      clip: Its clip.
    """

    name: str
    bits: int
    widest: float
    start: float
    clip: float


class LAPQState(NamedTuple):
    """Where a run is after a sweep: arrays only, so that anything can save it.

    Attributes:
      search: Of :mod:`lnq.search`, in the present one of the two stages, rough and fine.
      sweeps: How many were made, of both.
      cost: Evaluations so far, those on a quarter of the batches counted as that.
      start: Where the search began, ``theta [n]``.
      best: The best point of the start and what each sweep found, of those that are no worse than
        the start on the examples held out, ``[n]``.
      loss: The loss there, on the examples searched on.
      held_out: The same on those held out.
      ps: Exponents tried, ``[k]``; infinity for no clipping.
      losses: Loss of each on the examples searched on, ``[k]``.
      held_out_losses: The same on those held out.
      trace: Cost, loss, and loss held out, at the start and after each sweep, ``[s, 3]``.
    """

    search: SearchState
    sweeps: np.ndarray
    cost: np.ndarray
    start: np.ndarray
    best: np.ndarray
    loss: np.ndarray
    held_out: np.ndarray
    ps: np.ndarray
    losses: np.ndarray
    held_out_losses: np.ndarray
    trace: np.ndarray


class LAPQInfo(NamedTuple):
    """Outcome of :func:`quantize`.

    Attributes:
      rows: One for each clip.
      p: The exponent of the start; infinity if clipping nothing was the best.
      loss: Of the result, on the examples searched on.
      held_out: The same on those held out.
      cost: How often the loss was evaluated, on all batches or as many times on a part of them.
      state: Pass it as ``state`` to go on; it has the losses of all starts and the trace.
    """

    rows: tuple[ClipRow, ...]
    p: float
    loss: float
    held_out: float
    cost: float
    state: LAPQState


def begin(
    made: Problem,
    *,
    ps: Sequence[float] = EXPONENTS,
    window: int | None = 5,
    progress: Progress | None = None,
) -> LAPQState:
    """Phases 1 and 2: the best of no clipping, of each exponent, and of the parabola's.

    Arguments and errors are those of :func:`quantize`.
    """
    if not len(ps):
        raise ValueError("ps: give at least one exponent")
    start, loss = jax.jit(made.start), jax.jit(made.loss)
    tried = [np.inf, *map(float, ps)]
    thetas, losses, held_out = [], [], []
    while len(thetas) < len(tried):
        p = tried[len(thetas)]
        theta = made.widest if p == np.inf else start(jnp.float32(p), made.data)
        thetas.append(np.asarray(theta))
        losses.append(float(loss(theta, made.data)))
        held_out.append(float(loss(theta, made.held_out)))
        if progress:
            progress(len(thetas), len(ps) + 2, f"p = {p:.3g}: loss {losses[-1]:.4g}")
        if len(thetas) == len(ps) + 1 and np.isfinite(losses[1:]).any():
            tried.append(best_p(ps, losses[1:], window))
    if np.isnan(losses).any():
        raise ValueError(
            f"loss_fn: is {losses} at the starts p = {tried}; it must be a number for every "
            "quantized model: try it on the float model, and with more bits"
        )
    if len(set(losses)) == 1:
        raise ValueError(f"loss_fn: is {losses[0]} whatever the clips; it must depend on outputs")
    first = int(np.argmin(losses))
    return LAPQState(
        search=search.start(thetas[first], losses[first]),
        sweeps=np.array(0),
        cost=np.array(len(tried), np.float32),
        start=thetas[first],
        best=thetas[first],
        loss=np.array(losses[first], np.float32),
        held_out=np.array(held_out[first], np.float32),
        ps=np.array(tried, np.float32),
        losses=np.array(losses, np.float32),
        held_out_losses=np.array(held_out, np.float32),
        trace=np.array([[len(tried), losses[first], held_out[first]]], np.float32),
    )


def improve(
    made: Problem,
    state: LAPQState,
    rough: int = 2,
    sweeps: int = 2,
    *,
    joint: bool = True,
    reuse_prefixes: bool = False,
    progress: Progress | None = None,
) -> Iterator[LAPQState]:
    """Phase 3: sweeps on a part of the batches, then on all; yields the state after each.

    Args:
      made: The loss.
      state: From :func:`begin`, or yielded before.
      rough: As in :func:`quantize`.
      sweeps: Likewise.
      joint: Whether directions are renewed; without it this is coordinate descent.
      reuse_prefixes: Whether to compute the layers before those whose clips move only once; each
        of ``made.stages`` is compiled for that.
      progress: Called after each line.
    """
    width = WIDTH * 2.0 ** (-made.bits.min() / 2.0)
    part = _part(made.data)
    stages = (part, 0, rough, width), (made.data, rough, rough + sweeps, width / 2.0)
    loss = jax.jit(made.loss)
    for data, first, last, width in stages:
        if not first <= state.sweeps < last:
            continue
        found = state.search
        if state.sweeps == first:
            points = [(float(loss(x, data)), x) for x in (state.start, found.x)]
            at_x, x = min(points, key=lambda point: point[0])
            found = search.start(x, at_x, width)
        line = _staged_line(made.stages) if reuse_prefixes else None
        states = search.powell(made.loss, found, data, joint=joint, line=line, progress=progress)
        while state.sweeps < last:
            before, found = found, next(states)
            share = _examples(data) / _examples(made.data)
            cost = share * float(found.evaluations - before.evaluations) + (share < 1.0)
            yield (state := _accepted(made, loss, state, found, cost))


def _staged_line(stages: Sequence[Stage]) -> search.Line:
    """A line search that evaluates no more than the direction needs."""
    lines = [jax.jit(partial(search.line_search, stage.loss)) for stage in stages]
    keeps = [jax.jit(stage.keep) for stage in stages]
    held: dict[int, Any] = {}

    def line(x: np.ndarray, at_x: Any, direction: np.ndarray, width: Any, data: Data) -> Move:
        begins = np.flatnonzero(direction)[0]
        k = max(i for i, stage in enumerate(stages) if stage.first <= begins)
        stage, head, cost = stages[k], x[: stages[k].first].tobytes(), 0.0
        if held.get(k, (None,))[0] != head:
            held.clear()
            held[k] = head, keeps[k](x, data)
            cost = 1.0 - stage.share
        tail = slice(stage.first, None)
        move = lines[k](x[tail], at_x, direction[tail], width, held[k][1], x, data)
        return move._replace(evaluations=cost + stage.share * float(move.evaluations))

    return line


def _part(data: Data) -> Data:
    """A quarter of the batches."""
    some = jax.tree.map(lambda a: a[:: min(4, len(a))], (data.batches, data.references))
    return data._replace(batches=some[0], references=some[1])


def _accepted(
    made: Problem, loss: Callable[..., jax.Array], state: LAPQState, found: SearchState, cost: float
) -> LAPQState:
    """The state after one more sweep."""
    here, held_out = (np.asarray(loss(found.x, data)) for data in (made.data, made.held_out))
    better = here < state.loss and held_out <= state.trace[0, 2]
    total = state.cost + np.float32(cost)
    return state._replace(
        search=found,
        sweeps=state.sweeps + 1,
        cost=total,
        best=found.x if better else state.best,
        loss=here if better else state.loss,
        held_out=held_out if better else state.held_out,
        trace=np.concatenate([state.trace, np.array([[total, here, held_out]], np.float32)]),
    )


def _check_state(made: Problem, state: LAPQState) -> None:
    same = np.shape(state.best) == np.shape(made.widest)
    if not same or not np.isclose(jax.jit(made.loss)(state.best, made.held_out), state.held_out):
        raise ValueError(
            "state: its best point has another loss here; continue with the arguments it began with"
        )


def _info(made: Problem, state: LAPQState) -> LAPQInfo:
    values = (np.exp(np.asarray(theta)) for theta in (made.widest, state.start, state.best))
    return LAPQInfo(
        rows=tuple(
            ClipRow(name, int(bits), *map(float, clips))
            for name, bits, *clips in zip(made.names, made.bits, *values, strict=True)
        ),
        p=float(state.ps[np.argmin(state.losses)]),
        loss=float(state.loss),
        held_out=float(state.held_out),
        cost=float(state.cost),
        state=state,
    )


def quantize(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    ps: Sequence[float] = EXPONENTS,
    window: int | None = 5,
    method: Search = "powell",
    rough: int = 2,
    sweeps: int = 2,
    state: LAPQState | None = None,
    on_sweep: Callable[[LAPQState], None] | None = None,
    progress: Progress | None = None,
    **options: Unpack[Options],
) -> tuple[Params, LAPQInfo]:
    """Quantize weights and data of a model with clips that minimise its loss.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Examples, a few hundred; with labels if ``loss_fn`` needs them. An array, dict or tuple
        is one pytree of examples and is shuffled, a list holds batches.
      ps: Exponents of phase 1 to try, ascending.
      window: How many of them the parabola goes through; None for all.
      method: How phase 3 searches: ``powell``, ``coordinate``, or ``none``.
      rough: Sweeps on a quarter of the batches, before the others: far moves need no fine loss.
      sweeps: Sweeps on all batches; the paper's code makes 1 or 2, and no rough ones.
      state: Of an earlier run with the same arguments: its sweeps count, and phases 1 and 2 are not
        repeated.
      on_sweep: Called with the state after each sweep, to save it.
      progress: Called after each start and each line.
      **options: Those of :func:`problem`: what the loss is, and which widths and grids.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, never worse than the start, neither on the examples
      searched on nor on those held out; and :class:`LAPQInfo`.

    Raises:
      ValueError: If a weight is not finite, a width is out of range, there is no site, ``loss_fn``
        fails (labels may be missing), the default ``distance`` does not fit the outputs, ``state``
        is of another run, or the loss is NaN or the same at every start.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (16, 4))
      >>> x = jax.random.normal(jax.random.key(1), (100, 16))
      >>> qtree, info = quantize(lambda p, x: x @ p["w"], {"w": w}, x, edge_bits=None)
      >>> bool(info.held_out <= info.state.trace[0, 2])
      True
    """
    if method not in get_args(Search):
        raise ValueError(f"method: must be one of {', '.join(get_args(Search))}, not {method!r}")
    made = problem(apply_fn, params, calib, **options)
    if state is not None:
        _check_state(made, state)
    first = begin(made, ps=ps, window=window, progress=progress) if state is None else state
    latest, turns = first, (rough, sweeps) if method != "none" else (0, 0)
    for latest in improve(made, first, *turns, joint=method == "powell", progress=progress):
        if on_sweep:
            on_sweep(latest)
    return made.tree(jnp.asarray(latest.best)), _info(made, latest)
