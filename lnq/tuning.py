r"""Repairs around quantization: batch-norm folded, statistics restored, biases tuned.

Rounding moves the mean and the spread of what each layer returns, and the layers behind add to
that. An affine map of each channel undoes it; where the model has batch-norm, it has such a map.
None of these changes a code:

* :func:`fold` moves the norm's factor into the kernel before it, where a grid per channel sees it;
* :func:`reestimate` takes a norm's statistics again, where the model's code still has the norm;
* :func:`reconstruct` does the same where it has not: each channel gets back its mean and deviation
  by a factor in the scale of the weights' grid and a shift in the bias;
* :func:`tune_biases` minimises the divergence from the float model over the biases.

The first three need a forward pass per batch, the last one gradients, and none needs labels.

Source: Hubara et al., `Improving Post Training Neural Quantization: Layer-wise Calibration and
Integer Programming <https://arxiv.org/abs/2006.10518>`_, 2020 (para-normalization and bias tuning),
and its authors' released code.

Differs from the paper and the code in: what :func:`reconstruct` restores is the mean and deviation
that the float model has on the same batch, not :math:`\beta` and :math:`|\gamma|` of a folded norm,
so that it also repairs networks without one and adds no sampling error; corrections are full (the
code's momentum makes 41 % of them); biases are tuned by Adam and stopped early, in inference mode,
on the divergence per example (the code's is per entry of the outputs).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lnq import calibration, distortion, sites, tree
from lnq.quantizer import FakeQuantTensor, QTensor, dequantize_array, is_quantized
from lnq.sites import Site, Sites, Stat, Tail
from lnq.types import ApplyFn, LossFn, Params, Progress, Select

__all__ = [
    "FoldInfo",
    "Moments",
    "NothingToRepairError",
    "ReconstructInfo",
    "ReestimateInfo",
    "TuneInfo",
    "fold",
    "reconstruct",
    "reestimate",
    "renormalizer",
    "tune_biases",
]

PATIENCE = 15
"""Epochs without a better loss on the examples held out, after which tuning stops."""


class NothingToRepairError(ValueError):
    """A model without a site, or a bias, that a repair could move."""


class FoldInfo(NamedTuple):
    """Outcome of :func:`fold`.

    Attributes:
      folded: Sites whose factor went into the leaf.
      left: Sites whose factor stayed, and why.
    """

    folded: tuple[str, ...]
    left: dict[str, str]


def fold(
    apply_fn: ApplyFn, params: Params, *args: Any, select: Select | None = None
) -> tuple[Params, FoldInfo]:
    r"""Move the factor of each channel behind a site, such as batch-norm's, into the site's leaf.

    .. math:: w' = f w, \qquad \gamma' = \gamma / f, \qquad f = \gamma / \sqrt{\sigma^2 + \epsilon}

    and the bias takes what that changes. The model's code and function stay; its norm has become
    one that multiplies by 1. (For inference: in training mode, where a norm divides by the
    deviation of the batch, the function is another. So :func:`reestimate` is not for folded models,
    :func:`reconstruct` is.) Which leaf is :math:`\gamma` follows from trial: f is proportional to
    it.

    Args:
      apply_fn: ``apply_fn(params, *args) -> outputs``.
      params: Its parameters.
      *args: Its other arguments; one example will do.
      select: Which leaves to fold into; all by default.

    Returns:
      Parameters of the same structure, and :class:`FoldInfo`.

    Raises:
      ValueError: If a leaf is quantized already, or if the outputs change: some leaf is used in a
        way that the trace does not show.

    Example:
      >>> model = lambda p, x: (x @ p["w"] - p["mean"]) * (p["scale"] / 2.0) + p["bias"]
      >>> p = {"w": 1.0, "mean": 3.0, "scale": 8.0, "bias": 5.0}
      >>> p = jax.tree.map(lambda a: jnp.full((1, 1), a), p)
      >>> folded, info = fold(model, p, jnp.ones((1, 1)))
      >>> {name: float(a[0, 0]) for name, a in folded.items()}, info.folded
      ({'bias': -4.0, 'mean': 3.0, 'scale': 2.0, 'w': 4.0}, ('w',))
    """
    found, leaves = sites.find_sites(apply_fn, params, *args), dict(tree.named_leaves(params))
    if any(map(is_quantized, leaves.values())):
        raise ValueError("params: has quantized leaves; fold first, then quantize")
    uses, before = found.uses, _tails(apply_fn, params, args)
    # A dead channel keeps its factor of 0.
    gains = {name: np.where(of.factor == 0.0, 1.0, of.factor) for name, of in before.items()}

    def wanted(site: Site) -> bool:
        chosen = select is None or tree.lookup(select, site.path, False)
        return bool(chosen) and not _close(gains[site.name], 1.0, 8.0 * _eps(site.out))

    todo, left = _multipliable(found, wanted)
    left |= dict.fromkeys(todo, "no leaf of its own that the factor is proportional to")
    new: dict[str, Any] = {}
    for paths in zip_longest(*(_candidates(site, gains, leaves, uses) for site in todo.values())):
        tried = {name: path for name, path in zip(todo, paths, strict=True) if path}
        tried = {name: path for name, path in tried.items() if name in left}
        if not tried:
            continue
        trial = {path: _divided(leaves[path], gains[name]) for name, path in tried.items()}
        after = _tails(apply_fn, _replaced(params, trial), args)
        for name, path in tried.items():
            gain, tail, site = gains[name], before[name], todo[name]
            if not _close(after[name].factor, tail.factor / gain, _eps(leaves[path]) ** 0.5):
                continue
            shift = tail.shift - after[name].shift
            moves = np.abs(shift).max() > 1e-6 * np.abs(tail.shift).max()
            if moves and not _has_bias(tail, leaves, uses):
                left[name] = "no bias of its own to take the shift"
                continue
            new |= {site.path: _times(leaves[site.path], site, gain), path: trial[path]}
            new |= _shifted_bias(tail, shift, leaves) if moves else {}
            del left[name]
    folded = _replaced(params, new)
    _check_same(apply_fn, params, folded, args)
    return folded, FoldInfo(tuple(name for name in todo if name not in left), left)


def _tails(apply_fn: ApplyFn, params: Params, args: tuple[Any, ...]) -> dict[str, Any]:
    """Tails of the sites; NumPy, so that sums of a few numbers compile nothing."""
    every = sites.tails(apply_fn, params, *args)
    return {
        name: tail._replace(factor=np.asarray(tail.factor), shift=np.asarray(tail.shift))
        for name, tail in every.items()
    }


def _candidates(
    site: Site, gains: Mapping[str, np.ndarray], leaves: Mapping[str, Any], uses: Mapping[str, int]
) -> list[str]:
    """Leaves behind a site, used nowhere else, with an entry for each channel; the last first."""
    size = gains[site.name].size
    return [path for path in site.affine[::-1] if uses[path] == 1 and leaves[path].size == size]


def _divided(leaf: Any, gain: np.ndarray) -> np.ndarray:
    return np.asarray(leaf, np.float32) / gain.reshape(leaf.shape)


def _multipliable(
    found: Sites, wanted: Callable[[Site], bool], loops: bool = True
) -> tuple[dict[str, Site], dict[str, str]]:
    """Sites whose leaf may be multiplied by a factor a channel, and why others may not."""
    todo, left, uses = {}, {}, found.uses
    for site in filter(wanted, found.sites):
        if site.loops and not loops:
            left[site.name] = "inside a loop"
        elif not site.whole:
            left[site.name] = "the product reads a part of the leaf"
        elif uses[site.path] > 1:
            left[site.name] = "the leaf is used elsewhere too"
        else:
            todo[site.name] = site
    return todo, left


def _has_bias(tail: Tail, leaves: Mapping[str, Any], uses: Mapping[str, int]) -> bool:
    """Whether each channel has an entry of a leaf that is added last, and nowhere else."""
    path = tail.bias
    return path is not None and uses[path] == 1 and leaves[path].size == tail.shift.size


def _shifted_bias(tail: Tail, shift: Any, leaves: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The bias leaf that adds ``shift`` too."""
    assert tail.bias is not None
    leaf = _wide(leaves[tail.bias])
    return {tail.bias: leaf + tail.bias_sign * shift.reshape(leaf.shape).astype(leaf.dtype)}


def _times(leaf: Any, site: Site, factor: Any) -> Any:
    """A leaf times a factor for each layer and channel, ``[l, o]``; codes stay."""
    axes = (*site.sliced, *site.channels)
    factor = factor.reshape([site.shape[i] for i in axes]).transpose(np.argsort(axes))
    factor = factor.reshape([n if i in axes else 1 for i, n in enumerate(site.shape)])
    if not is_quantized(leaf):
        return _wide(leaf) * factor.astype(_wide(leaf).dtype)
    if isinstance(leaf, FakeQuantTensor):
        leaf = replace(leaf, values=(_wide(leaf.values) * factor).astype(leaf.values.dtype))
    if (grid := leaf.qparams) is None:
        return leaf
    scale = grid.scale
    for axis, (groups, n) in enumerate(zip(scale.shape, factor.shape, strict=True)):
        scale = jnp.repeat(scale, n // groups, axis) if 1 < groups < n else scale
    return replace(leaf, qparams=replace(grid, scale=scale * factor))


def _replaced(params: Params, new: Mapping[str, Any]) -> Params:
    """A tree with other numbers in some of its leaves."""

    def leaf(name: str, old: Any) -> Any:
        if name not in new or is_quantized(new[name]):
            return new.get(name, old)
        return jnp.asarray(new[name], old.dtype).reshape(old.shape)

    return tree.map_named(leaf, params)


def _wide(a: Any) -> jax.Array:
    return distortion.wide(jnp.asarray(a))


def _eps(a: Any) -> float:
    return float(jnp.finfo(a.dtype).eps)


def _close(a: ArrayLike, b: ArrayLike, tolerance: float) -> bool:
    """Whether the largest difference is small beside the largest magnitude."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return bool(np.all(np.abs(a - b) <= tolerance * np.max(np.abs(b), initial=0.0)))


def _check_same(apply_fn: ApplyFn, params: Params, folded: Params, args: tuple) -> None:
    run = jax.jit(lambda params: apply_fn(params, *args))
    for a, b in zip(*(jax.tree.leaves(run(p)) for p in (params, folded)), strict=True):
        if tree.is_float(a) and not _close(b, a, _eps(a) ** 0.5):
            raise ValueError(
                "fold: the outputs are no longer the same, because a leaf behind some site is used "
                "in a way that the trace does not show; leave that site out with `select`"
            )


class ReestimateInfo(NamedTuple):
    """Outcome of :func:`reestimate`.

    Attributes:
      moved: By leaf: norm of the change over the norm of what it was, unless that was 0.
    """

    moved: dict[str, float]


def reestimate(
    train_fn: Callable[[Params, Any], Params],
    variables: Params,
    calib: Any,
    *,
    momentum: float | None = None,
    progress: Progress | None = None,
) -> tuple[Params, ReestimateInfo]:
    r"""Take the statistics of batch-norm again, in the quantized model; all other leaves stay.

    In training mode a batch with statistics s moves the running ones by
    :math:`r \to m r + (1 - m) s`. That map gives s, whatever m is, and what is returned is

    .. math:: r' = r + \sum_i a_i (s_i - r)

    with :math:`a_i` batch i's share of the examples, or that of a running mean. A variance is thus
    the mean of those within batches, as the model's own code takes them: make batches large.

    Args:
      train_fn: ``train_fn(variables, batch) -> statistics``, the running ones behind a forward pass
        in training mode and nothing else, by their names in ``variables``. In linen
        ``model.apply(variables, batch, train=True, mutable=["batch_stats"])[1]``; in NNX
        ``nnx.state(model, nnx.BatchStat)`` when ``model`` has been called.
      variables: Parameters and statistics, with quantized leaves; not folded.
      calib: Unlabelled examples: an array, dict or tuple is one batch, a list holds batches.
      momentum: Share by which each batch moves the statistics, in [0, 1] (Flax's momentum is one
        minus that); None weighs all examples alike. The authors' 0.1 and five batches make
        :math:`1 - 0.9^5 = 0.41` of the way.
      progress: Called after every batch.

    Raises:
      ValueError: If there are no statistics, or they do not move, or are not finite.

    Example:
      >>> def train_fn(p, x):
      ...     return {"mean": 0.9 * p["mean"] + 0.1 * (x @ p["w"]).mean(0)}
      >>> p = {"w": jnp.eye(1), "mean": jnp.array([1.0])}
      >>> new, info = reestimate(train_fn, p, [np.array([[2.0], [4.0]], np.float32)])
      >>> new["mean"].round(4), round(info.moved["mean"], 4)
      (Array([3.], dtype=float32), 2.0)
    """
    batches, run = calibration.as_batches(calib), sites.quantized(train_fn)
    old = _statistics(run, variables, batches[0])

    @jax.jit
    def of_batch(variables: Params, batch: Any) -> dict[str, jax.Array]:
        def updated(statistics: dict[str, jax.Array]) -> dict[str, jax.Array]:
            new = dict(tree.named_leaves(run(_replaced(variables, statistics), batch)))
            return {name: _wide(a) for name, a in new.items()}

        at_zero = updated(jax.tree.map(jnp.zeros_like, old))
        # Large beside (1 - m) s, so that m is found to its last digits.
        far = {name: 1.0 + 1e3 * jnp.max(jnp.abs(a)) for name, a in at_zero.items()}
        at_far = updated({name: jnp.full_like(a, far[name]) for name, a in old.items()})
        m = {name: jnp.mean(at_far[name] - at_zero[name]) / far[name] for name in old}
        return {name: at_zero[name] / (1.0 - m[name]) for name in old}

    new = dict(old)
    for i, (batch, share) in enumerate(zip(batches, _shares(batches, momentum), strict=True), 1):
        seen = jax.device_get(of_batch(variables, batch))
        new = {name: new[name] + share * (seen[name] - old[name]) for name in old}
        if progress:
            progress(i, len(batches), "batch-norm statistics")
    if wrong := [name for name in new if not np.isfinite(new[name]).all()]:
        raise ValueError(
            f"train_fn: {wrong[0]!r} does not move, or not to a number; run the model in training "
            "mode, and look for NaN in calib and variables"
        )
    norm = np.linalg.norm
    moved = {name: float(norm(new[name] - old[name]) / (norm(old[name]) or 1.0)) for name in old}
    return _replaced(variables, new), ReestimateInfo(moved)


def _statistics(run: Callable[..., Any], variables: Params, batch: Any) -> dict[str, np.ndarray]:
    """The leaves that a pass in training mode changes."""
    leaves = dict(tree.named_leaves(variables))
    names = [name for name, _ in tree.named_leaves(jax.eval_shape(run, variables, batch))]
    if not names:
        raise ValueError(
            "train_fn: returns no statistics; a model without batch-norm, or whose norms are "
            "folded, is repaired by `reconstruct`"
        )
    if unknown := [name for name in names if not tree.is_float(leaves.get(name))]:
        raise ValueError(
            f"train_fn: returns {unknown}, which are no float leaves of variables; return running "
            "statistics alone, by their names in variables"
        )
    return {name: np.asarray(_wide(leaves[name])) for name in names}


def _shares(batches: list[Any], momentum: float | None = None) -> list[float]:
    """Weight of each batch in a mean over all, or in a running one."""
    sizes = [calibration.batch_size(batch) for batch in batches]
    if momentum is None:
        return [size / sum(sizes) for size in sizes]
    _check_share("momentum", momentum)
    return [momentum * (1.0 - momentum) ** i for i in reversed(range(len(sizes)))]


def _check_share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: must be from 0 to 1, not {value}")


class Moments(NamedTuple):
    """Mean and variance of each channel, ``[o]``; value units and their square."""

    mean: jax.Array
    var: jax.Array


class ReconstructInfo(NamedTuple):
    """Outcome of :func:`reconstruct`, by site.

    Attributes:
      factor: By which each channel's weights were multiplied, ``[o]``.
      shift: What was added to each channel's bias, ``[o]``, value units; only sites that have one.
      gap: By how much the mean was off, in deviations; root mean square over the channels.
      left: Sites that could not be repaired, and why.
    """

    factor: dict[str, jax.Array]
    shift: dict[str, jax.Array]
    gap: dict[str, float]
    left: dict[str, str]


def renormalizer(
    seen: Moments, target: Moments, limit: tuple[float, float] = (0.5, 2.0)
) -> tuple[jax.Array, jax.Array]:
    r"""The affine map that gives a channel its mean and deviation back.

    .. math:: y \to f y + h, \qquad f = \sigma_t / \sigma, \qquad h = \mu_t - f \mu

    A channel that does not vary in the target is dead, and stays; one that does there, but not
    here, is only shifted.

    Args:
      seen: Moments of y.
      target: Moments that it is to have.
      limit: Between which f is clamped.

    Returns:
      f and h, ``[o]``.

    Example:
      >>> seen, target = Moments(jnp.ones(1), jnp.array([16.0])), Moments(jnp.ones(1), jnp.ones(1))
      >>> renormalizer(seen, target)
      (Array([0.5], dtype=float32), Array([0.5], dtype=float32))
    """
    alive, varies = (moments.var > 1e-10 * moments.mean**2 for moments in (target, seen))
    ratio = jnp.sqrt(jnp.where(varies, target.var / jnp.where(varies, seen.var, 1.0), 1.0))
    factor = jnp.where(alive, jnp.clip(ratio, *limit), 1.0)
    return factor, jnp.where(alive, target.mean - factor * seen.mean, 0.0)


def reconstruct(
    apply_fn: ApplyFn,
    params: Params,
    qtree: Params,
    calib: Any,
    *,
    damping: float = 1.0,
    limit: tuple[float, float] = (0.5, 2.0),
    select: Select | None = None,
    progress: Progress | None = None,
) -> tuple[Params, ReconstructInfo]:
    r"""Give each channel of a quantized model the mean and deviation that it has in the float one.

    As if behind each site stood a batch-norm of that mean :math:`\mu_t` and deviation
    :math:`\sigma_t`, whose statistics :math:`\mu, \sigma` are taken in the quantized model in
    training mode (each layer reads what earlier ones return, renormalized by the batch) and which
    is then folded:

    .. math:: s' = f s, \qquad b' = f (b - \mu) + \mu_t, \qquad f = \sigma_t / \sigma

    with s the scale of the weights' grid, which becomes one per channel, and b the bias leaf. Codes
    and zero points stay, and so do the grids of the data. Where a norm follows that is not folded,
    :math:`\mu, \sigma` are those behind it, and its own bias moves.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: The float parameters.
      qtree: The quantized ones.
      calib: Unlabelled examples: an array, dict or tuple is one batch, a list holds batches. Large
        ones are better: each is renormalized by its own statistics.
      damping: d in [0, 1]: the mean becomes :math:`\mu_t + d (\mu - \mu_t)`, the variance likewise.
        1 is the full correction, 0 none; the authors' is :math:`1 - 0.9^5`.
      limit: Between which f is clamped.
      select: Which leaves; by default all but the last site's.
      progress: Called after every batch.

    Returns:
      The tree for :func:`~lnq.sites.quantized`, and :class:`ReconstructInfo`.

    Raises:
      ValueError: If the trees differ in structure, no site can be repaired, or ``params`` or what
        comes of ``calib`` is not finite.

    Example:
      >>> model = lambda p, x: x @ p["w"] + p["b"]
      >>> p = {"w": jnp.array([[1.0]]), "b": jnp.array([[1.0]])}
      >>> worse = {"w": jnp.array([[1.25]]), "b": jnp.array([[3.0]])}
      >>> fixed, info = reconstruct(model, p, worse, jnp.array([[4.0], [6.0]]), select="w")
      >>> fixed, info.factor["w"], info.gap["w"]  # mean 9.25, not 6; deviation 1.25, not 1
      ({'b': Array([[1.]], ...), 'w': Array([[1.]], ...)}, Array([0.8], ...), 3.25)
    """
    _check_share("damping", damping)
    _check_trees(params, qtree)
    batches = calibration.as_batches(calib)
    found, leaves = sites.find_sites(apply_fn, qtree, batches[0]), dict(tree.named_leaves(qtree))
    uses = found.uses

    def wanted(site: Site) -> bool:
        if select is None:
            return site != found.sites[-1]
        return bool(tree.lookup(select, site.path, False))

    todo, left = _multipliable(found, wanted, loops=False)
    if not todo:
        raise NothingToRepairError(
            f"select: leaves no site to repair; those that cannot be: {left}"
        )
    ideal, tails = (sites.tails(apply_fn, each, batches[0]) for each in (params, qtree))
    plan = {
        name: _Repair(site, ideal[name], tails[name], _has_bias(tails[name], leaves, uses), limit)
        for name, site in todo.items()
    }
    observed = jax.jit(partial(_observed, apply_fn, plan))
    parts = []
    for i, (batch, share) in enumerate(zip(batches, _shares(batches), strict=True), 1):
        part = jax.device_get(observed(params, qtree, batch))
        parts.append(jax.tree.map(lambda a, share=share: share * a, part))
        if progress:
            progress(i, len(batches), "moments of sites")
    targets, seen = jax.tree.map(lambda *a: np.sum(a, 0, dtype=np.float32), *parts)
    damped = jax.tree.map(lambda a, b: a + np.float32(damping) * (b - a), targets, seen)
    new, factor, shift = jax.jit(partial(_repaired, plan))(leaves, targets, damped)
    gap = {name: _gap(name, targets[name], seen[name]) for name in plan}
    factor, shift = ({name: by[name] for name in plan if name in by} for by in (factor, shift))
    return _replaced(qtree, new), ReconstructInfo(factor, shift, gap, left)


class _Repair(NamedTuple):
    """What is known of a site: its tail in the float model and in the quantized one, and so on."""

    site: Site
    ideal: Tail
    tail: Tail
    biased: bool
    limit: tuple[float, float]

    def map(self, seen: Moments, target: Moments) -> tuple[jax.Array, jax.Array]:
        """Factor of the weights, and shift of the bias, from moments behind the tail."""
        factor, shift = renormalizer(seen, target, self.limit)
        shift = shift + (factor - 1.0) * self.tail.shift.ravel()
        return factor, shift if self.biased else jnp.zeros_like(shift)


def _observed(
    apply_fn: ApplyFn,
    plan: Mapping[str, _Repair],
    params: Params,
    qtree: Params,
    batch: Any,
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments behind the tail of each site, in the float model and in the renormalized one."""

    def only(site: Site) -> bool:
        return site.name in plan

    def ideal(y: jax.Array, site: Site) -> Moments:
        return _moments(y, site, plan[site.name].ideal)

    def renormalized(y: jax.Array, site: Site) -> tuple[Moments, jax.Array, jax.Array]:
        tail = plan[site.name].tail
        seen = _moments(y, site, tail)
        factor, shift = plan[site.name].map(seen, targets[site.name])
        shift = jnp.where(tail.factor == 0.0, 0.0, shift[None] / tail.factor)
        shape = [n if i in site.out_channels else 1 for i, n in enumerate(y.shape)]
        return seen, factor.reshape(shape), shift.reshape(shape)

    def through(y: jax.Array, _: Any, found: tuple[Moments, jax.Array, jax.Array]) -> jax.Array:
        return (found[1] * y.astype(jnp.float32) + found[2]).astype(y.dtype)

    _, targets = sites.tap(apply_fn, Stat(ideal), only, outputs=True)(params, batch)
    tapped = sites.tap(apply_fn, Stat(renormalized), only, through, outputs=True)
    return targets, {name: seen for name, (seen, *_) in tapped(qtree, batch)[1].items()}


def _moments(y: jax.Array, site: Site, tail: Tail) -> Moments:
    """Moments of each channel of a site's output behind its tail."""
    rest, y = tuple(i for i in range(y.ndim) if i not in site.out_channels), y.astype(jnp.float32)
    mean, var = jnp.mean(y, rest).ravel(), jnp.var(y, rest).ravel()
    factor, shift = tail.factor.ravel(), tail.shift.ravel()
    return Moments(factor * mean + shift, factor**2 * var)


def _repaired(
    plan: Mapping[str, _Repair],
    leaves: Mapping[str, Any],
    targets: Mapping[str, Moments],
    seen: Mapping[str, Moments],
) -> tuple[dict[str, Any], dict[str, jax.Array], dict[str, jax.Array]]:
    """New leaves, and the factor and shift of each site."""
    new, factors, shifts = {}, {}, {}
    for name, repair in plan.items():
        site = repair.site
        factors[name], shift = repair.map(seen[name], targets[name])
        new[site.path] = _times(leaves[site.path], site, factors[name])
        if repair.biased:
            shifts[name] = shift
            new |= _shifted_bias(repair.tail, shift, leaves)
    return new, factors, shifts


def _gap(name: str, target: Moments, seen: Moments) -> float:
    if not np.isfinite([*target, *seen]).all():
        raise ValueError(f"calib: gives {name!r} outputs that are no numbers; look for NaN in it")
    deviation = np.sqrt(np.where(target.var > 0.0, target.var, np.inf))
    return float(np.sqrt(np.mean(((seen.mean - target.mean) / deviation) ** 2)))


def _check_trees(params: Params, qtree: Params) -> None:
    tree.check_finite(params)
    shapes = [{n: np.shape(leaf) for n, leaf in tree.named_leaves(t)} for t in (params, qtree)]
    wrong = [name for name in shapes[0] | shapes[1] if shapes[0].get(name) != shapes[1].get(name)]
    if wrong:
        raise ValueError(
            f"qtree: differs from params in {sorted(wrong)}; it must be the same tree with some "
            "leaves quantized"
        )


class TuneInfo(NamedTuple):
    """Outcome of :func:`tune_biases`.

    Attributes:
      tuned: Names of the leaves.
      loss: On the examples tuned on, before and after.
      held_out: The same on those held out.
      trace: At the start and after each epoch: steps made, mean loss of the epoch's steps, loss on
        the examples held out; ``[e, 3]``.
    """

    tuned: tuple[str, ...]
    loss: tuple[float, float]
    held_out: tuple[float, float]
    trace: np.ndarray


def tune_biases(
    apply_fn: ApplyFn,
    params: Params,
    qtree: Params,
    calib: Any,
    *,
    key: jax.Array,
    loss_fn: LossFn | None = None,
    distance: Callable[[Any, Any], jax.Array] = distortion.kl,
    optimizer: optax.GradientTransformation | None = None,
    steps: int = 400,
    batch_size: int = 50,
    select: Select | None = None,
    progress: Progress | None = None,
) -> tuple[Params, TuneInfo]:
    """Minimise a quantized model's loss over the biases behind its sites; nothing else moves.

    Gradients pass straight through the rounding of data. Every fifth batch is held out, and what is
    returned is the best there of all epochs.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: The float parameters.
      qtree: The quantized ones.
      calib: Examples, a few hundred; with labels if ``loss_fn`` needs them. An array, dict or tuple
        is one pytree of examples, a list holds batches, which stay as they are.
      key: What examples and batches are shuffled by.
      loss_fn: ``loss_fn(outputs, batch) -> scalar``, the mean over the batch. Without it, labels
        are not needed: the loss is ``distance``.
      distance: ``distance(outputs of the float model, outputs)``, by default the divergence of
        their softmax; for embeddings, say, :func:`~lnq.distortion.mse`.
      optimizer: By default ``optax.adam(1e-3)``. The authors' is ``optax.sgd(0.1 / classes)`` for
        800 steps; its drops at epochs 10 and 15 lie behind its 10 epochs.
      steps: Most updates to make; fewer where the loss held out has long not fallen.
      batch_size: Examples in each.
      select: Which of the biases; by default all but the last site's, the classifier's.
      progress: Called after every epoch.

    Returns:
      The tree, never worse than before, neither on the examples tuned on nor on those held out; and
      :class:`TuneInfo`.

    Raises:
      ValueError: If the trees differ in structure, there is no bias to tune, ``calib`` does not
        fill two batches, or ``params`` or the loss is not finite.

    Example:
      >>> model = lambda p, x: jax.nn.relu(x @ p["w"] + p["b"]) @ p["head"]
      >>> p = {"w": jnp.eye(2), "b": jnp.zeros((1, 2)), "head": 3.0 * jnp.eye(2)}
      >>> x = np.random.default_rng(0).normal(size=(250, 2)).astype(np.float32)
      >>> worse = p | {"b": jnp.full((1, 2), 0.1)}
      >>> tuned, info = tune_biases(model, p, worse, x, key=jax.random.key(0))
      >>> info.tuned, bool(jnp.abs(tuned["b"]).max() < 0.03)
      (('b',), True)
    """
    _check_trees(params, qtree)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    pieces = _pieces(calib, batch_size, rng)
    start = _biases(apply_fn, qtree, pieces[0], select)
    soft = jax.tree.map(_soft, qtree, is_leaf=is_quantized)
    infer, optimizer = jax.jit(apply_fn), optimizer or optax.adam(1e-3)
    loss = _loss(apply_fn, loss_fn, distance)
    step, evaluate = jax.jit(_step(loss, optimizer)), jax.jit(loss)

    def mean_loss(biases: dict[str, jax.Array], pairs: list[Any]) -> float:
        losses = jax.device_get([evaluate(biases, soft, *pair) for pair in pairs])
        return float(np.average(losses, weights=_shares([batch for batch, _ in pairs])))

    pairs = [(piece, infer(params, piece) if loss_fn is None else None) for piece in pieces]
    at = range(4, len(pairs), 5) or [len(pairs) - 1]
    held, pairs = [pairs[i] for i in at], [pair for i, pair in enumerate(pairs) if i not in at]
    before = mean_loss(start, pairs), mean_loss(start, held)
    if not np.isfinite(before).all():
        raise ValueError("loss_fn: is not finite for qtree; look for NaN in calib and qtree")

    biases, best, state, trace = start, start, optimizer.init(start), [(0, *before)]
    while trace[-1][0] < steps and _epochs_since_best(trace) < PATIENCE:
        values = []
        for i in rng.permutation(len(pairs))[: steps - trace[-1][0]]:
            biases, state, value = step(biases, state, soft, *pairs[i])
            values.append(value)
        done = trace[-1][0] + len(values), float(np.mean(values)), mean_loss(biases, held)
        trace.append(done)
        best = best if _epochs_since_best(trace) else biases
        if progress:
            progress(done[0], steps, f"biases: loss {done[1]:.4g}, held out {done[2]:.4g}")
    after = mean_loss(best, pairs), mean_loss(best, held)
    if after[0] > before[0]:
        best, after = start, before
    losses, held_out = (before[0], after[0]), (before[1], after[1])
    return _replaced(qtree, best), TuneInfo(tuple(start), losses, held_out, np.array(trace))


def _loss(
    apply_fn: ApplyFn, loss_fn: LossFn | None, distance: Callable[[Any, Any], jax.Array]
) -> Callable[..., jax.Array]:
    """``loss(biases, soft tree, batch, reference) -> scalar``."""
    run = sites.quantized(apply_fn)

    def loss(biases: dict[str, jax.Array], soft: Params, batch: Any, reference: Any) -> jax.Array:
        out = run(_replaced(soft, biases), batch)
        found = distance(reference, out) if loss_fn is None else loss_fn(out, batch)
        return jnp.asarray(found, jnp.float32)

    return loss


def _step(
    loss: Callable[..., jax.Array], optimizer: optax.GradientTransformation
) -> Callable[..., tuple[Any, Any, jax.Array]]:
    """``step(biases, state, *what loss takes) -> (biases, state, loss before)``."""

    def step(biases: Any, state: Any, *data: Any) -> tuple[Any, Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(biases, *data)
        with jax.numpy_dtype_promotion("standard"):  # optax raises floats to whole powers
            updates, state = optimizer.update(gradient, state, biases)
        return optax.apply_updates(biases, updates), state, value

    return step


def _epochs_since_best(trace: list[tuple[int, float, float]]) -> int:
    return len(trace) - 1 - int(np.nanargmin([held_out for *_, held_out in trace]))


def _pieces(calib: Any, size: int, rng: np.random.Generator) -> list[Any]:
    """Batches; one given alone is shuffled and cut, and what does not fill one is dropped."""
    batches = calibration.as_batches(calib)
    if len(batches) > 1:
        return batches
    examples = calibration.batch_size(batches[0])
    if examples < 2 * size:
        raise ValueError(
            f"calib: {examples} examples do not fill two batches of {size}, one to tune on and one "
            "to hold out; give more, or a smaller batch_size"
        )
    order = rng.permutation(examples)[: examples // size * size]
    return [jax.tree.map(lambda a, i=i: a[i], batches[0]) for i in order.reshape(-1, size)]


def _biases(
    apply_fn: ApplyFn, qtree: Params, batch: Any, select: Select | None
) -> dict[str, jax.Array]:
    """The leaves to tune, at least float32."""
    found, leaves = sites.find_sites(apply_fn, qtree, batch), dict(tree.named_leaves(qtree))
    tails = sites.tails(apply_fn, qtree, batch)
    behind = [tails[site.name].bias for site in found.sites]
    every = [path for path in dict.fromkeys(behind) if path and tree.is_float(leaves[path])]
    default = [path for path in every if path != behind[-1]]
    chosen = [path for path in every if select is not None and tree.lookup(select, path, False)]
    if not (chosen := default if select is None else chosen):
        raise NothingToRepairError(
            f"select: leaves no bias to tune; behind the sites are {every}, of which the last "
            "site's needs `select`"
        )
    return {path: _wide(leaves[path]) for path in chosen}


def _soft(leaf: Any) -> Any:
    """A leaf through which gradients pass: codes as the floats that they stand for."""
    if not isinstance(leaf, QTensor):
        return leaf
    return FakeQuantTensor(dequantize_array(leaf), None, leaf.acts, leaf.dtype)
