r"""Affine quantization: real numbers as integer codes, and the leaves that hold them.

.. math:: x \approx (q - \text{zero\_point}) \cdot \text{scale}, \qquad
          q \in \{\text{qmin}, \dots, \text{qmax}\}

A quantized model is the same parameter tree with some leaves replaced by :class:`QTensor`
(integer codes) or, while a method is still searching, by :class:`FakeQuantTensor` (float values).
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lnq.distortion import l2_norm, wide

__all__ = [
    "FakeQuantTensor",
    "QParams",
    "QTensor",
    "affine_grid",
    "correct_bias",
    "dequantize",
    "dequantize_array",
    "fake_quant",
    "is_quantized",
    "make_qparams",
    "match_moments",
    "narrow",
    "quantize",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QParams:
    """The grid of a quantized array.

    Every field is a float32 array of the rank of the codes, and each of its dimensions divides
    theirs: 1 is shared, n is one value per channel, n / g one value per group of g. An axis that
    ``vmap`` or ``scan`` is to slice must be there in full in every field.

    Attributes:
      scale: Step size, value units; positive.
      zero_point: The code of zero, code units; may be fractional.
      qmin: Smallest code.
      qmax: Largest code.
      in_scale: Optional second factor of the step, along the contracting axes; value units are
        those of ``scale * in_scale``.
      dtype: For the grid of an activation, the integer dtype in which its codes are multiplied;
        None where it is rounded in float. The only static field.
    """

    scale: jax.Array
    zero_point: jax.Array
    qmin: jax.Array
    qmax: jax.Array
    in_scale: jax.Array | None = None
    dtype: Any = field(default=None, metadata={"static": True})

    @property
    def bits(self) -> jax.Array:
        """Smallest fixed width that holds ``qmin .. qmax``; int32, shape of ``qmin``; bits."""
        return jnp.frexp(self.qmax - self.qmin)[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QTensor:
    """Integer codes and their grid: ``x ~ (codes - zero_point) * scale``.

    The shape is that of the codes, so that ``vmap``, ``scan`` and sharding may slice it.

    Attributes:
      codes: Integers, any shape.
      qparams: Their grid.
      acts: Grids of the activations that meet this leaf, one per use, in forward order.
      dtype: The dtype of the values; the only static field.
    """

    codes: jax.Array
    qparams: QParams
    acts: tuple[QParams | None, ...] = ()
    dtype: Any = field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def size(self) -> int:
        return self.codes.size


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FakeQuantTensor:
    """Float values that are rounded to their grid when used, with gradients to both.

    Attributes:
      values: Floats, any shape.
      qparams: Their grid; None where they stay as they are and only the data is rounded.
      acts: As in :class:`QTensor`.
      dtype: The dtype of the rounded values; the only static field.
    """

    values: jax.Array
    qparams: QParams | None
    acts: tuple[QParams | None, ...] = ()
    dtype: Any = field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size


def is_quantized(leaf: Any) -> bool:
    """Whether ``leaf`` is a :class:`QTensor` or a :class:`FakeQuantTensor`."""
    return isinstance(leaf, QTensor | FakeQuantTensor)


def make_qparams(
    scale: ArrayLike,
    *,
    qmin: ArrayLike,
    qmax: ArrayLike,
    zero_point: ArrayLike = 0.0,
    in_scale: ArrayLike | None = None,
) -> QParams:
    """Collect a grid: float32 fields, each raised to the rank of the largest.

    Example:
      >>> qparams = make_qparams(0.5 * jnp.ones((1, 8)), qmin=-8, qmax=7)
      >>> qparams.qmin.shape, int(qparams.bits[0, 0])
      ((1, 1), 4)
    """
    given = [scale, zero_point, qmin, qmax] + ([] if in_scale is None else [in_scale])
    fields = [jnp.asarray(x, jnp.float32) for x in given]
    rank = max(x.ndim for x in fields)
    return QParams(*(x.reshape((1,) * (rank - x.ndim) + x.shape) for x in fields))


@partial(jax.jit, inline=True)
def affine_grid(low: ArrayLike, high: ArrayLike, bits: ArrayLike) -> QParams:
    r"""The grid of :math:`2^M` levels that spans an interval and has a level at zero.

    .. math:: s = (\text{high} - \text{low}) / (2^M - 1), \qquad
              z = \text{qmin} - \mathrm{round}(\text{low} / s), \qquad \text{qmin} = -2^{M-1}

    Args:
      low: Its lower end, value units; zero if that is below.
      high: Its upper end, value units; zero if that is above.
      bits: Width M; bits, whole, at least 1; may be traced.

    Example:
      >>> grid = affine_grid(jnp.array([-1.0]), jnp.array([2.0]), 2)
      >>> grid.scale, grid.zero_point, grid.qmin
      (Array([1.], dtype=float32), Array([-1.], dtype=float32), Array([-2.], dtype=float32))
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), 0.0)
    high = jnp.maximum(jnp.asarray(high, jnp.float32), 0.0)
    low, high, bits = jnp.broadcast_arrays(low, high, jnp.asarray(bits).astype(jnp.float32))
    levels = jnp.exp2(bits)
    step = (high - low) / (levels - 1.0)
    scale = jnp.where(step > 0.0, step, 1.0)
    qmin = -levels / 2.0
    zero_point = qmin - jnp.round(low / scale)
    return make_qparams(scale, zero_point=zero_point, qmin=qmin, qmax=levels + qmin - 1.0)


@partial(jax.jit, static_argnames="dtype", inline=True)
def quantize(x: jax.Array, qparams: QParams, dtype: DTypeLike = jnp.int32) -> QTensor:
    """Round ``x`` to the nearest code, ties to even, and clip to the range.

    Args:
      x: Values, any float dtype; NaN is not a number to this function either.
      qparams: The grid.
      dtype: Integer dtype of the codes; the caller sees to it that ``qmin .. qmax`` fits.

    Example:
      >>> x = jnp.array([-1.0, 0.26, 0.74, 9.0])
      >>> quantize(x, make_qparams([0.5], qmin=-8, qmax=7)).codes
      Array([-2,  1,  1,  7], dtype=int32)
    """
    levels = jnp.round(_levels(x, qparams))
    codes = jnp.clip(levels, *_range(qparams, levels))
    return QTensor(codes.astype(dtype), qparams, dtype=x.dtype)


@partial(jax.jit, inline=True)
def fake_quant(x: jax.Array, qparams: QParams) -> jax.Array:
    """Quantize and dequantize, with gradients that training and searching can use.

    The rounding passes gradients straight through, so ``x`` receives them inside the range only,
    and ``scale`` and ``zero_point`` receive those of the learned step size: ``round(x/s) - x/s``
    inside, the clipped level outside. (Esser et al., *Learned Step Size Quantization*, 2020.)

    Example:
      >>> qparams = make_qparams([0.5], qmin=-8, qmax=7)
      >>> jax.grad(lambda x: fake_quant(x, qparams).sum())(jnp.array([0.3, 9.0]))
      Array([1., 0.], dtype=float32)
    """
    levels = _levels(x, qparams)
    qmin, qmax = _range(qparams, levels)
    # Not jnp.clip: at a tie it would halve the gradient, and whole codes tie often.
    levels = jnp.where(levels <= qmin, qmin, jnp.where(levels >= qmax, qmax, levels))
    codes = levels + jax.lax.stop_gradient(jnp.round(levels) - levels)
    return _values(codes, qparams).astype(x.dtype)


@partial(jax.jit, static_argnames=("axes", "norm"), inline=True)
def match_moments(
    x: jax.Array, rounded: jax.Array, axes: tuple[int, ...], *, norm: bool = True
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""What gives each channel of rounded values the mean and the norm of the original.

    .. math:: \hat x \leftarrow \xi\,(\hat x - \mathbb{E}\hat x) + \mathbb{E} x, \qquad
              \xi = \lVert x - \mathbb{E} x\rVert \,/\, \lVert\hat x - \mathbb{E}\hat x\rVert

    Args:
      x: The original.
      rounded: The same, rounded.
      axes: The axes that a channel runs along.
      norm: Whether the norm is restored too; otherwise :math:`\xi = 1`.

    Returns:
      :math:`\xi`, the mean of ``rounded`` and that of ``x``; the axes kept as 1.

    Example:
      >>> x = jnp.array([[0.0, 1.0, 2.0, 5.0]])
      >>> factor, mean_rounded, mean = match_moments(x, 2.0 * x, (1,))
      >>> factor, mean_rounded, mean
      (Array([[0.5]], dtype=float32), Array([[4.]], dtype=float32), Array([[2.]], dtype=float32))
    """
    mean, mean_rounded = (jnp.mean(a, axes, keepdims=True) for a in (x, rounded))
    if not norm:
        return jnp.ones_like(mean), mean_rounded, mean
    before, after = (l2_norm(a, axes) for a in (x - mean, rounded - mean_rounded))
    usable = (before > 0.0) & (after > 0.0)
    return (
        jnp.where(usable, before / jnp.where(after > 0.0, after, 1.0), 1.0),
        mean_rounded,
        mean,
    )


@partial(jax.jit, static_argnames=("axes", "norm"), inline=True)
def correct_bias(x: jax.Array, q: QTensor, axes: tuple[int, ...], *, norm: bool = True) -> QTensor:
    r"""Give each channel of rounded weights the mean and the norm of the original.

    The codes stay; the factor of :func:`match_moments` goes into the scale, the shift into the zero
    point, which is then no whole number.

    Args:
      x: The original.
      q: Its codes; one grid along ``axes``.
      axes: The axes that a channel runs along.
      norm: Whether the norm is restored too.

    Example:
      >>> x = jnp.array([[0.0, 1.0, 2.0, 5.0]])
      >>> q = correct_bias(x, quantize(x, make_qparams([[5.0]], qmin=0, qmax=1)), (1,))
      >>> dequantize_array(q).mean(), (jnp.std(dequantize_array(q)) / jnp.std(x)).round(4)
      (Array(2., dtype=float32), Array(1., dtype=float32))
    """
    grid = q.qparams
    rounded = dequantize_array(replace(q, dtype=jnp.float32))
    factor, mean_rounded, mean = match_moments(x, rounded, axes, norm=norm)
    scale = factor * grid.scale
    zero_point = grid.zero_point + mean_rounded / grid.scale - mean / scale
    return replace(q, qparams=replace(grid, scale=scale, zero_point=zero_point))


def dequantize(qtree: Any) -> Any:
    """Replace every quantized leaf of a tree by its float array; other leaves stay.

    Example:
      >>> leaf = quantize(jnp.array([0.3, 1.2]), make_qparams([0.5], qmin=-8, qmax=7))
      >>> dequantize({"kernel": leaf, "bias": 3})
      {'bias': 3, 'kernel': Array([0.5, 1. ], dtype=float32)}
    """
    return jax.tree.map(
        lambda x: dequantize_array(x) if is_quantized(x) else x, qtree, is_leaf=is_quantized
    )


@partial(jax.jit, inline=True)
def dequantize_array(leaf: QTensor | FakeQuantTensor) -> jax.Array:
    """The float array of one quantized leaf."""
    if isinstance(leaf, QTensor):
        return _values(leaf.codes.astype(jnp.float32), leaf.qparams).astype(leaf.dtype)
    values = leaf.values if leaf.qparams is None else fake_quant(leaf.values, leaf.qparams)
    return values.astype(leaf.dtype)


def narrow(leaf: QTensor) -> QTensor:
    """Store the codes in the smallest of int8, int16 and int32 that holds their range.

    The result's dtype depends on values, so this one does not work under ``jit``.
    """
    low, high = int(leaf.qparams.qmin.min()), int(leaf.qparams.qmax.max())
    for dtype in (jnp.int8, jnp.int16, jnp.int32):
        if jnp.iinfo(dtype).min <= low <= high <= jnp.iinfo(dtype).max:
            return replace(leaf, codes=leaf.codes.astype(dtype))
    raise ValueError(f"narrow: codes in {low} .. {high} do not fit int32; use a larger scale")


def _expand(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeat the groups of a field of a grid, so that it broadcasts against the codes."""
    if x.ndim != len(shape) or any(n % m for m, n in zip(x.shape, shape, strict=True)):
        raise ValueError(
            f"qparams: a field of shape {x.shape} does not fit codes of shape {shape}; "
            "it must have the same rank, and each dimension must divide that of the codes"
        )
    for axis, (groups, size) in enumerate(zip(x.shape, shape, strict=True)):
        if groups not in (1, size):
            x = jnp.repeat(x, size // groups, axis)
    return x


def _step(qparams: QParams, shape: tuple[int, ...]) -> jax.Array:
    step = _expand(qparams.scale, shape)
    return step if qparams.in_scale is None else step * _expand(qparams.in_scale, shape)


def _range(qparams: QParams, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    qmin, qmax = _expand(qparams.qmin, levels.shape), _expand(qparams.qmax, levels.shape)
    return qmin.astype(levels.dtype), qmax.astype(levels.dtype)


def _levels(x: jax.Array, qparams: QParams) -> jax.Array:
    """Real-valued codes, at least float32."""
    x = wide(x)
    zero_point = _expand(qparams.zero_point, x.shape).astype(x.dtype)
    return x / _step(qparams, x.shape).astype(x.dtype) + zero_point


def _values(codes: jax.Array, qparams: QParams) -> jax.Array:
    zero_point = _expand(qparams.zero_point, codes.shape).astype(codes.dtype)
    return (codes - zero_point) * _step(qparams, codes.shape).astype(codes.dtype)
