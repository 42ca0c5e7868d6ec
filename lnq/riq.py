r"""RIQ: one number sets every layer's step, and the smallest that keeps the output is found.

A uniform quantizer whose step is proportional to the norm of the layer,

.. math::
    \Delta_\ell = \lVert w_\ell \rVert \sqrt{24\,\epsilon_\ell / n_\ell}, \qquad
    \sqrt{\epsilon_\ell} = \epsilon_0 + \frac1k \sqrt{n_\ell / 24},

moves each layer by the cosine distance :math:`\epsilon_\ell`. This is the cheapest way, after
entropy coding, to spend a given sum of distances: large layers get fewer bits. The one free number
:math:`k` is the smallest whose *measured* output deviation (one minus cosine, mean of a few
calibration examples) stays below the caller's bound.

Source: Kampeas et al., `Rotation Invariant Quantization for Model Compression
<https://arxiv.org/abs/2303.03106>`_, 2023, and its authors' released code.

Differs from the released code in: k is found by bisection on log k (the published sweep is
:func:`sweep`) and is always feasible, an unreachable bound is an error; the stored step is the
least-squares one, which leaves every angle as it is; which leaves are quantized is judged by the
output channels of Flax (the last axis), per layer of a stacked leaf; ``k_max`` is finite at
``eps0 = 0``; the search goes on below ``k_min`` where that is feasible; the largest layer is
sought among the quantized leaves only.
"""

from collections.abc import Callable
from functools import partial
from math import ceil, exp, inf, log, prod, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lnq import ans, calibration, distortion, tree
from lnq.quantizer import QTensor, dequantize, make_qparams, narrow
from lnq.types import ApplyFn, Params, Progress, Select, UnreachableError

__all__ = [
    "Evaluation",
    "LeafRow",
    "RIQInfo",
    "angle_rule",
    "bisection",
    "compress",
    "compress_weights",
    "example_deviation",
    "k_bounds",
    "leaf_rows",
    "norm_rule",
    "predicted_deviation",
    "predicted_rate",
    "quantize",
    "quantize_array",
    "rate_bits",
    "step_size",
    "sweep",
    "weight_deviation",
]

MIN_SIZE = 512
"""A layer of no more entries than this stays as it is."""

Rule = Callable[[ArrayLike, ArrayLike, ArrayLike], jax.Array]
"""``rule(n, k, eps0)``: cosine distance that a layer of ``n`` entries is given."""

Search = Callable[[Callable[[float], bool], float, float], float]
"""``search(feasible, k_min, k_max)``: smallest feasible k found; ``k_max`` is feasible."""


class Evaluation(NamedTuple):
    """One measurement of the model: the bound holds on ``deviation`` + some ``standard_error``."""

    k: float
    deviation: float
    standard_error: float


class LeafRow(NamedTuple):
    """What became of one quantized leaf.

    Attributes:
      path: Leaf name.
      shape: Its shape.
      nonzeros: Number of non-zero codes.
      levels: Number of distinct codes.
      bits: Fixed width that holds its range; bits per entry, the widest of its layers.
      entropy_bits: Order-0 entropy and 32 bits per level; bits of the whole leaf.
      cosine_distance: Between the leaf and its reconstruction.
      predicted: The distance its step was chosen for, all entries counted.
    """

    path: str
    shape: tuple[int, ...]
    nonzeros: int
    levels: int
    bits: int
    entropy_bits: float
    cosine_distance: float
    predicted: float


class RIQInfo(NamedTuple):
    """Outcome of a search.

    Attributes:
      k: The number found.
      deviation: Mean deviation at k.
      standard_error: Of that mean.
      floor: Deviation that ``eps0`` alone leaves under the surrogate model, whatever k is.
      predicted_deviation: Of the surrogate model at k.
      predicted_rate: Of the surrogate model at k; bits per quantized weight.
      trace: Every model evaluation but that of the float model.
      rows: One per quantized leaf.
    """

    k: float
    deviation: float
    standard_error: float
    floor: float
    predicted_deviation: float
    predicted_rate: float
    trace: tuple[Evaluation, ...]
    rows: tuple[LeafRow, ...]

    @property
    def evaluations(self) -> int:
        """Passes of the model over the calibration set, the float model's included."""
        return len(self.trace) + 1

    @property
    def entropy_bits(self) -> float:
        """Estimated bits of all quantized leaves; the file's size comes from ``lnq.info``."""
        return sum(row.entropy_bits for row in self.rows)


def norm_rule(n: ArrayLike, k: ArrayLike, eps0: ArrayLike) -> jax.Array:
    r"""The published distance of a layer, :math:`(\epsilon_0 + \sqrt{n/24}/k)^2`.

    Example:
      >>> norm_rule(2400, 100.0, 0.0)  # sqrt(100)/100 squared
      Array(0.01, dtype=float32)
    """
    return jnp.square(eps0 + jnp.sqrt(jnp.asarray(n, float) / 24.0) / k)


def angle_rule(n: ArrayLike, k: ArrayLike, eps0: ArrayLike) -> jax.Array:
    r"""The exact optimum of the surrogate, :math:`\tan\theta = \sqrt n / \kappa`.

    With :math:`\kappa = \sqrt{12}\,k` it agrees with :func:`norm_rule` at small angles; the
    distance :math:`1 - \cos\theta` stays below 1 at every k.
    """
    theta = jnp.arctan(jnp.sqrt(jnp.asarray(n, float) / 12.0) / k)
    return jnp.square(eps0 + sqrt(2.0) * jnp.sin(theta / 2.0))


def step_size(
    norm: ArrayLike, n: ArrayLike, k: ArrayLike, eps0: ArrayLike = 0.01, rule: Rule = norm_rule
) -> jax.Array:
    r"""Step of a layer, :math:`\lVert w\rVert\sqrt{24\,\epsilon/n}`.

    Args:
      norm: Euclidean norm of the layer, value units.
      n: Its number of entries.
      k: The model's one number, positive.
      eps0: Floor of the root distance of every layer.
      rule: Distance of a layer, :func:`norm_rule` or :func:`angle_rule`.

    Returns:
      Step, value units; for :func:`norm_rule` it is
      ``norm / k + eps0 * norm * sqrt(24 / n)``.

    Example:
      >>> step_size(2.0, 600, k=100.0, eps0=0.01).round(6)  # 0.02 + 0.01 * 2 * 0.2
      Array(0.024, dtype=float32)
    """
    return jnp.multiply(norm, jnp.sqrt(24.0 * rule(n, k, eps0) / n))


def k_bounds(largest: int, eps0: float = 0.01) -> tuple[float, float]:
    r"""Range of k for a model whose largest layer has ``largest`` entries.

    At ``k_min`` that layer is destroyed (distance 1); above ``k_max`` less than
    :math:`\sqrt{\epsilon_0}` of its root distance depends on k. Where ``eps0`` is so small that
    the latter would never come, ``k_max`` stops at a root distance of 1e-4.

    Example:
      >>> low, high = k_bounds(102_760_448)  # VGG16
      >>> round(low, 1), round(high)
      (2090.1, 2069223)
    """
    root = sqrt(largest / 24.0)
    return root / (1.0 - eps0), root / max(eps0**1.5, 1e-4)


def predicted_deviation(
    sizes: ArrayLike, k: ArrayLike, eps0: ArrayLike = 0.01, rule: Rule = norm_rule
) -> jax.Array:
    r"""Deviation of the surrogate, independent random rotations: :math:`1 - \prod(1-\epsilon)`.

    Args:
      sizes: Entries of each layer, shape ``[layers]``.
    """
    epsilon = jnp.minimum(rule(sizes, k, eps0), 1.0)
    return -jnp.expm1(jnp.sum(jnp.log1p(-epsilon)))


def predicted_rate(
    sizes: ArrayLike, k: ArrayLike, eps0: ArrayLike = 0.01, rule: Rule = norm_rule
) -> jax.Array:
    r"""Rate of the surrogate, :math:`\sum n \log_2(1/\sin\theta) / \sum n`; bits per weight.

    The uniform quantizer with ideal entropy coding needs about 0.25 bit more.
    """
    n = jnp.asarray(sizes, float)
    cosine = 1.0 - jnp.minimum(rule(n, k, eps0), 1.0)
    return jnp.sum(n * -0.5 * jnp.log2(1.0 - cosine**2)) / jnp.sum(n)


def rate_bits(codes: ArrayLike) -> float:
    """The authors' estimate of a coded tensor: order-0 entropy and 32 bits per level; bits.

    Example:
      >>> rate_bits(np.array([0, 0, 1, -1]))  # 4 * 1.5 + 32 * 3
      102.0
    """
    symbols, counts = ans.histogram(np.asarray(codes))
    return ans.entropy_bits(counts) + 32.0 * len(symbols)


def quantize_array(
    w: jax.Array,
    k: ArrayLike,
    *,
    eps0: ArrayLike = 0.01,
    rule: Rule = norm_rule,
    stacked: int = 0,
    ignore_zeros: bool = False,
) -> QTensor:
    """Quantize one leaf.

    Args:
      w: Weights; the first ``stacked`` axes count layers, each with a step of its own.
      k: The model's one number.
      eps0: Floor of the root distance.
      rule: Distance of a layer.
      stacked: Number of stacked axes.
      ignore_zeros: Count only non-zero weights as a layer's entries (finer steps for pruned ones).

    Returns:
      int32 codes, zero where ``w`` is; the least-squares step ``<w, q> / <q, q>``, shape
      ``w.shape[:stacked] + (1, ...)``; ``qmin`` and ``qmax`` are the codes' own.
    """
    axes = tuple(range(stacked, w.ndim))
    x = distortion.wide(w)
    n = _entries(x, axes) if ignore_zeros else prod(w.shape[stacked:])
    step = step_size(distortion.l2_norm(x, axes), n, k, eps0, rule).astype(x.dtype)
    q = jnp.round(x / jnp.where(step > 0.0, step, 1.0))
    energy = jnp.sum(q * q, axes, keepdims=True)
    fitted = jnp.sum(x * q, axes, keepdims=True) / jnp.where(energy > 0.0, energy, 1.0)
    scale = jnp.where(energy > 0.0, fitted, jnp.where(step > 0.0, step, 1.0))
    qparams = make_qparams(
        scale,
        qmin=q.min(axes, keepdims=True),
        qmax=q.max(axes, keepdims=True),
        zero_point=jnp.zeros_like(scale),
    )
    return QTensor(q.astype(jnp.int32), qparams, dtype=w.dtype)


def quantize(
    params: Params,
    k: ArrayLike,
    *,
    eps0: ArrayLike = 0.01,
    rule: Rule = norm_rule,
    select: Select | None = None,
    stacked: Select | None = None,
    ignore_zeros: bool = False,
) -> Params:
    """Quantize the weights of a whole tree at a given k; works under ``jit`` with k as data.

    Args:
      params: Any tree; leaves that are not chosen, and those that are not floats, stay.
      k: The model's one number; larger is finer.
      eps0: Floor of the root distance of every layer.
      rule: Distance of a layer.
      select: Which leaves; default: more than 512 entries, two axes and one output channel (last
        axis) in each layer.
      stacked: Which leaves hold layers along their first axis (``True``), or first few (a number).
      ignore_zeros: Count only non-zero weights as a layer's entries.

    Returns:
      The tree with :class:`~lnq.quantizer.QTensor` leaves.

    Raises:
      ValueError: If no leaf is chosen or, outside ``jit``, a weight is not finite.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> qtree = quantize({"kernel": w, "bias": jnp.zeros(64)}, k=100.0, eps0=0.0)
      >>> round(float(qtree["kernel"].qparams.scale[0, 0]), 1)  # about |w| / k = 64 / 100
      0.6
    """
    tree.check_finite(params)
    options = {"eps0": eps0, "rule": rule, "ignore_zeros": ignore_zeros}
    return _map_chosen(
        lambda w, axes: _quantize_array(w, k, stacked=axes, **options), params, select, stacked
    )


def bisection(
    feasible: Callable[[float], bool], k_min: float, k_max: float, rtol: float = 5e-3
) -> float:
    """Smallest feasible k to a relative ``rtol``, by bisection on log k.

    Needs ``log2(log(k_max / k_min) / rtol)`` evaluations, 11 at the default; returns a k that was
    evaluated and found feasible, or ``k_max``.

    Example:
      >>> 1234.0 <= bisection(lambda k: k >= 1234.0, 316.7, 313535.0) < 1234.0 * 1.005
      True
    """
    best = k_max
    low, high = log(k_min), log(k_max)
    for _ in range(ceil(log((high - low) / rtol, 2))):
        k = exp((low + high) / 2.0)
        if feasible(k):
            best, high = k, log(k)
        else:
            low = log(k)
    return best


def sweep(feasible: Callable[[float], bool], k_min: float, k_max: float) -> float:
    """Smallest feasible k by the published schedule.

    Walks upward in steps of ``s = sqrt(k_max - k_min)`` to the first feasible k, then again over
    the last ``s`` points below it with the step's square root, until the step is at most 3. Unlike
    the released code it returns the smallest k found feasible, not the last one tried.
    """
    best, low, high = k_max, k_min, k_max
    step, k = sqrt(k_max - k_min), k_min
    while step > 3.0 and k <= high:
        if feasible(k):
            best, high, step = min(best, k), k, sqrt(step)
            low = max(low, k - step * int(step))
            k = low
        else:
            k += step
    return best


@jax.jit
def example_deviation(reference: Any, outputs: Any) -> jax.Array:
    """One minus cosine of the flattened first output of each example; shape ``[b]``.

    The first output is the first leaf: of a tuple its first entry, of a dict the entry of its
    smallest key.
    """
    first, other = jax.tree.leaves(reference)[0], jax.tree.leaves(outputs)[0]
    return jax.vmap(distortion.cosine_distance)(first, other)


def weight_deviation(params: Params, qtree: Params) -> jax.Array:
    """Cosine distance of the quantized leaves from their originals, mean weighted by size."""
    pairs = [
        (w, dequantize(q))
        for w, q in zip(
            jax.tree.leaves(params), jax.tree.leaves(qtree, is_leaf=_is_qtensor), strict=True
        )
        if _is_qtensor(q)
    ]
    total = sum(w.size for w, _ in pairs)
    terms = [distortion.cosine_distance(w, x) * (w.size / total) for w, x in pairs]
    return jnp.sum(jnp.stack(terms))


def leaf_rows(
    params: Params, qtree: Params, k: float, *, eps0: float = 0.01, rule: Rule = norm_rule
) -> tuple[LeafRow, ...]:
    """One row per quantized leaf of ``qtree``, in order; ``params`` holds the originals."""
    originals = dict(tree.named_leaves(params))
    rows = []
    for name, q in tree.named_leaves(qtree):
        if _is_qtensor(q):
            codes = np.asarray(q.codes)
            symbols, counts = ans.histogram(codes)
            layer = q.codes.size // q.qparams.scale.size
            rows.append(
                LeafRow(
                    path=name,
                    shape=q.shape,
                    nonzeros=int(counts[symbols != 0].sum()),
                    levels=len(symbols),
                    bits=int(q.qparams.bits.max()),
                    entropy_bits=ans.entropy_bits(counts) + 32.0 * len(symbols),
                    cosine_distance=_distance(originals[name], codes * np.asarray(q.qparams.scale)),
                    predicted=float(rule(layer, k, eps0)),
                )
            )
    return tuple(rows)


def compress_weights(
    params: Params,
    *,
    max_deviation: float,
    eps0: float = 0.01,
    rule: Rule = norm_rule,
    search: Search = bisection,
    select: Select | None = None,
    stacked: Select | None = None,
    ignore_zeros: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, RIQInfo]:
    """Compress without a model: the coarsest weights within a size-weighted cosine distance.

    Args:
      params: Any tree.
      max_deviation: Bound on :func:`weight_deviation`; cosine distance.
      eps0: Floor of the root distance of every layer.
      rule: Distance of a layer.
      search: :func:`bisection`, :func:`sweep`, or one's own.
      select: Which leaves, as in :func:`quantize`.
      stacked: Which leaves hold layers, as in :func:`quantize`.
      ignore_zeros: As in :func:`quantize`.
      progress: Called after every evaluation.

    Returns:
      The tree with codes in the smallest integer dtype, and the :class:`RIQInfo`.

    Raises:
      ValueError: If a weight is not finite, or no leaf is chosen.
      UnreachableError: If even ``k_max`` deviates more.
    """
    method = partial(
        quantize, eps0=eps0, rule=rule, select=select, stacked=stacked, ignore_zeros=ignore_zeros
    )

    @jax.jit
    def deviation(params: Params, k: jax.Array) -> jax.Array:
        return weight_deviation(params, method(params, k))

    def deviations(k: float) -> np.ndarray:
        return np.array([deviation(params, jnp.float32(k))])

    _check(params, max_deviation, eps0)
    layers = _layers(params, select, stacked, ignore_zeros)
    k, trace = _search(deviations, layers, max_deviation, eps0, 0.0, search, progress)
    return _finish(params, k, trace, layers, **method.keywords)


def compress(
    apply_fn: ApplyFn,
    params: Params,
    calib: Any,
    *,
    max_deviation: float,
    eps0: float = 0.01,
    rule: Rule = norm_rule,
    deviation_fn: Callable[[Any, Any], jax.Array] = example_deviation,
    standard_errors: float = 0.0,
    search: Search = bisection,
    select: Select | None = None,
    stacked: Select | None = None,
    ignore_zeros: bool = False,
    progress: Progress | None = None,
) -> tuple[Params, RIQInfo]:
    r"""Compress to the coarsest weights whose output deviates by less than a bound.

    Minimises k over :math:`\overline{d(f(w, x), f(\hat w(k), x))} + z\,\mathrm{se} < D`.

    Args:
      apply_fn: ``apply_fn(params, batch) -> outputs``.
      params: Its parameters.
      calib: Unlabelled examples: an array, dict or tuple is one batch, a list holds batches.
      max_deviation: The bound D, in the unit of ``deviation_fn``.
      eps0: Floor of the root distance of every layer. The default is the paper's; 0.003 or less
        reaches tighter bounds, with smaller files on MiniLM and 1 % larger ones on a VGG.
      rule: Distance of a layer, :func:`norm_rule` or :func:`angle_rule`.
      deviation_fn: ``(reference, outputs) -> deviations``, shape ``[b]`` or a scalar.
      standard_errors: The z above; 2 asks for confidence instead of a mean.
      search: :func:`bisection`, :func:`sweep`, or one's own.
      select: Which leaves, as in :func:`quantize`.
      stacked: Which leaves hold layers, as in :func:`quantize`.
      ignore_zeros: As in :func:`quantize`.
      progress: Called after every evaluation.

    Returns:
      The tree with codes in the smallest integer dtype, and the :class:`RIQInfo`.

    Raises:
      ValueError: If a weight or a float output is not finite, no leaf is chosen, ``calib`` is not
        what ``apply_fn`` takes, or its outputs have no axis of examples.
      UnreachableError: If even ``k_max`` deviates more; its ``best`` is the deviation there.

    Example:
      >>> w = jax.random.normal(jax.random.key(0), (64, 64))
      >>> x = jax.random.normal(jax.random.key(1), (8, 64))
      >>> qtree, info = compress(lambda p, x: x @ p["w"], {"w": w}, x, max_deviation=0.01)
      >>> info.deviation < 0.01, info.rows[0].bits
      (True, 5)
    """
    method = partial(
        quantize, eps0=eps0, rule=rule, select=select, stacked=stacked, ignore_zeros=ignore_zeros
    )

    # One program for the float model and for every k: an infinite k leaves the weights alone.
    @jax.jit
    def run(params: Params, k: jax.Array, batch: Any) -> Any:
        def choose(w: Any, rounded: Any) -> Any:
            return w if w is rounded else jnp.where(jnp.isinf(k), w, rounded)

        return apply_fn(jax.tree.map(choose, params, dequantize(method(params, k))), batch)

    _check(params, max_deviation, eps0)
    layers = _layers(params, select, stacked, ignore_zeros)
    batches = calibration.as_batches(calib)
    references = [_reference(run, params, batch, deviation_fn) for batch in batches]

    def deviations(k: float) -> np.ndarray:
        pairs = zip(batches, references, strict=True)
        found = [deviation_fn(ref, run(params, jnp.float32(k), batch)) for batch, ref in pairs]
        return np.concatenate([np.atleast_1d(x) for x in found])

    k, trace = _search(deviations, layers, max_deviation, eps0, standard_errors, search, progress)
    return _finish(params, k, trace, layers, **method.keywords)


_quantize_array = jax.jit(quantize_array, static_argnames=("rule", "stacked", "ignore_zeros"))


def _distance(w: ArrayLike, x: np.ndarray) -> float:
    """Cosine distance on the host, float64."""
    a, b = (np.asarray(y).astype(np.float64).ravel() for y in (w, x))
    norms = sqrt((a @ a) * (b @ b))
    return float(1.0 - (a @ b) / norms) if norms else float(a.any() != b.any())


def _is_qtensor(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _entries(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Non-zero entries per layer, at least one; kept axes."""
    return jnp.maximum(jnp.sum(x != 0.0, axes, keepdims=True, dtype=jnp.float32), 1.0)


def _chosen(
    params: Params, select: Select | None, stacked: Select | None
) -> list[tuple[str, jax.Array, int]]:
    """Name, weights and number of stacked axes of every leaf to quantize."""
    chosen = []
    for name, leaf in tree.named_leaves(params):
        axes = 0 if stacked is None else int(tree.lookup(stacked, name, 0))
        if tree.is_float(leaf) and leaf.size and axes < max(leaf.ndim, 1):
            layer = leaf.shape[axes:]
            default = prod(layer) > MIN_SIZE and len(layer) >= 2 and layer[-1] > 1
            if default if select is None else tree.lookup(select, name, False):
                chosen.append((name, leaf, axes))
    if not chosen:
        raise ValueError(
            "params: no leaf to quantize; the default takes float leaves of two axes and more "
            f"than {MIN_SIZE} entries, `select` may name others"
        )
    return chosen


def _map_chosen(
    fn: Callable[[jax.Array, int], Any],
    params: Params,
    select: Select | None,
    stacked: Select | None,
) -> Params:
    """Replace every leaf to quantize by ``fn(leaf, stacked axes)``."""
    chosen = {name: axes for name, _, axes in _chosen(params, select, stacked)}
    return tree.map_named(lambda name, w: fn(w, chosen[name]) if name in chosen else w, params)


def _layers(
    params: Params, select: Select | None, stacked: Select | None, ignore_zeros: bool
) -> np.ndarray:
    """Entries of every quantized layer, stacked ones one by one."""
    sizes = []
    for _, w, axes in _chosen(params, select, stacked):
        count, size = prod(w.shape[:axes]), prod(w.shape[axes:])
        inner = tuple(range(axes, w.ndim))
        sizes.append(_entries(w, inner).ravel() if ignore_zeros else np.full(count, size))
    return np.concatenate(sizes)


def _check(params: Params, max_deviation: float, eps0: float) -> None:
    if not max_deviation > 0.0:
        raise ValueError(f"max_deviation: must be positive, not {max_deviation}")
    if not 0.0 <= eps0 < 1.0:
        raise ValueError(f"eps0: must be in [0, 1), not {eps0}")
    tree.check_finite(params)


def _reference(run: Callable, params: Params, batch: Any, deviation_fn: Callable) -> Any:
    """Outputs of the float model, checked."""
    try:
        outputs = run(params, jnp.float32(inf), batch)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        shapes = jax.tree.map(np.shape, batch)
        raise ValueError(
            f"calib: apply_fn(params, batch) fails on a batch of shapes {shapes}: {error}"
        ) from error
    leaves = jax.tree.leaves(outputs)
    if not leaves:
        raise ValueError("apply_fn: returns no array")
    if any(tree.is_float(x) and not jnp.isfinite(x).all() for x in leaves):
        raise ValueError("apply_fn: the float model's outputs hold NaN or infinity on `calib`")
    examples = calibration.batch_size(batch)
    if deviation_fn is example_deviation and leaves[0].shape[:1] != (examples,):
        raise ValueError(
            f"apply_fn: its first output has shape {leaves[0].shape}, but the batch has "
            f"{examples} examples; return one output per example or pass `deviation_fn`"
        )
    return outputs


def _search(
    deviations: Callable[[float], np.ndarray],
    layers: np.ndarray,
    max_deviation: float,
    eps0: float,
    standard_errors: float,
    search: Search,
    progress: Progress | None,
) -> tuple[float, tuple[Evaluation, ...]]:
    """Smallest feasible k, and every evaluation made; ``k_max`` first, so that failing is cheap."""
    trace: list[Evaluation] = []

    def feasible(k: float) -> bool:
        found = deviations(k)
        if standard_errors and found.size < 2:
            raise ValueError("standard_errors: needs at least two deviations; add calibration data")
        error = found.std(ddof=1) / sqrt(found.size) if found.size > 1 else 0.0
        trace.append(Evaluation(k, float(found.mean()), float(error)))
        if progress:
            progress(len(trace), None, f"deviation {trace[-1].deviation:.3g} at k = {k:.4g}")
        return trace[-1].deviation + standard_errors * trace[-1].standard_error < max_deviation

    k_min, k_max = k_bounds(int(layers.max()), eps0)
    if not feasible(k_max):
        best = trace[-1].deviation + standard_errors * trace[-1].standard_error
        raise UnreachableError(
            f"max_deviation: {max_deviation:.3g} cannot be reached, the best is {best:.3g}; "
            f"raise it, or lower eps0 = {eps0}, which alone is predicted to cost "
            f"{float(predicted_deviation(layers, inf, eps0)):.3g}",
            best,
        )
    k = search(feasible, k_min, k_max)
    # Heavy-tailed and pruned layers outlive k_min. Below 1/2 every code is zero.
    while k < 1.02 * k_min and k_min > 0.5:
        k_min, k_max = k_min / 16.0, k
        k = search(feasible, k_min, k_max)
    return k, tuple(trace)


def _finish(
    params: Params,
    k: float,
    trace: tuple[Evaluation, ...],
    layers: np.ndarray,
    *,
    eps0: float,
    rule: Rule,
    select: Select | None,
    stacked: Select | None,
    ignore_zeros: bool,
) -> tuple[Params, RIQInfo]:
    """The tree at k, narrowed leaf by leaf, and what a person wants to know about it."""
    options = {"eps0": eps0, "rule": rule, "ignore_zeros": ignore_zeros}
    qtree = _map_chosen(
        lambda w, axes: narrow(_quantize_array(w, jnp.float32(k), stacked=axes, **options)),
        params,
        select,
        stacked,
    )
    _, deviation, error = next(e for e in trace if e.k == k)
    return qtree, RIQInfo(
        k=k,
        deviation=deviation,
        standard_error=error,
        floor=float(predicted_deviation(layers, inf, eps0, rule)),
        predicted_deviation=float(predicted_deviation(layers, k, eps0, rule)),
        predicted_rate=float(predicted_rate(layers, k, eps0, rule)),
        trace=trace,
        rows=leaf_rows(params, qtree, k, eps0=eps0, rule=rule),
    )
