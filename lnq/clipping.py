r"""Where to clip a bell-shaped channel, and how many bits each channel deserves.

A grid of M bits on :math:`[-\alpha, \alpha]` trades two errors: a wide clip makes coarse steps, a
narrow one cuts the tails. For a symmetric density f the clip minimises

.. math::
    D(\alpha) = 2 \int_\alpha^\infty (x - \alpha)^2 f(x)\, dx + \frac{\alpha^2}{3 \cdot 4^M},

and over channels of one model bits are dealt so that :math:`\sum_i \alpha_i^2 / 4^{M_i}` is small.

Three families of clips: :func:`laplace_clip` and :func:`gauss_clip` minimise D, as published.
:func:`laplace_grid_clip` and :func:`gauss_grid_clip` minimise the exact error of integer grids with
a code for zero, which pays at 1 to 3 bits. :func:`kld_clip` takes a histogram instead of a density;
it is a baseline. Three rules for bits: :func:`allocate_bins` shares levels, :func:`published_bits`
rounds it to a mean width, :func:`greedy_bits` shares storage and is better at equal storage.

Source: Banner et al., `Post training 4-bit quantization of convolutional networks for
rapid-deployment <https://arxiv.org/abs/1810.05723>`_, 2019, and its authors' released code.

Differs from the paper in: the equations are solved for any width, real ones included, where the
code has tables of two decimals; the clips for exact grids and the greedy rule are not in the paper;
channels without spread are allowed, they get a clip of zero and, if no channel has any, equal bins.
"""

from collections.abc import Callable
from functools import partial
from math import log, pi, sqrt
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lnq.distortion import wide

__all__ = [
    "allocate_bins",
    "gauss_clip",
    "gauss_grid_clip",
    "gauss_grid_mse",
    "gauss_mse",
    "greedy_bits",
    "kld_clip",
    "laplace_clip",
    "laplace_grid_clip",
    "laplace_grid_mse",
    "laplace_mse",
    "published_bits",
]

MAX_BITS = 16
"""The widest grid."""

_PANELS = 512  # of the quadrature, one side
_CANDIDATES = 64  # clips that kld_clip compares


def laplace_clip(b: ArrayLike, bits: ArrayLike, *, one_sided: bool = False) -> jax.Array:
    r"""The published clip for zero-mean Laplace values.

    Minimises :func:`laplace_mse`, whose stationary point satisfies

    .. math::
        \frac{\alpha}{b}\, e^{\alpha/b} = 3 \cdot 4^M, \qquad\text{so}\qquad
        \alpha = b\, W_0(3 \cdot 4^M)

    with Lambert's W. One-sided values (a fused ReLU) take the clip of one bit more.

    Args:
      b: Mean absolute value, value units; any shape.
      bits: Width M; bits, 0 to 16, real-valued for :math:`2^M` bins; broadcasts with ``b`` and
        may be traced.
      one_sided: Whether all levels are on [0, clip] and negative values become an exact zero.

    Returns:
      Clip, value units; the broadcast shape.

    Raises:
      ValueError: If ``bits`` is a Python number out of range.

    Example:
      >>> laplace_clip(jnp.array([1.0, 2.0]), bits=2).round(2)
      Array([2.83, 5.66], dtype=float32)

    References:
      Banner et al. 2019, section 2.
    """
    _check_bits(bits, 0)
    return _clip(_LAPLACE, b, bits, one_sided)


def gauss_clip(sigma: ArrayLike, bits: ArrayLike, *, one_sided: bool = False) -> jax.Array:
    r"""The published clip for zero-mean Gaussian values.

    Minimises :func:`gauss_mse`; with :math:`u = \alpha/\sigma` its stationary point satisfies

    .. math::
        u\, \mathrm{erfc}\frac{u}{\sqrt2} + \frac{u}{3 \cdot 4^M}
        = \sqrt{\frac2\pi}\, e^{-u^2/2}.

    Args:
      sigma: Standard deviation, value units; any shape.
      bits: Width M; bits, 1 to 16, otherwise as in :func:`laplace_clip`.
      one_sided: As in :func:`laplace_clip`.

    Returns:
      Clip, value units; the broadcast shape.

    Raises:
      ValueError: If ``bits`` is a Python number out of range.

    Example:
      >>> gauss_clip(10.0, jnp.array([2, 3, 4])).round(1)
      Array([17.1, 21.5, 25.6], dtype=float32)

    References:
      Banner et al. 2019, section 2.
    """
    _check_bits(bits, 1)
    return _clip(_GAUSS, sigma, bits, one_sided)


def laplace_mse(
    clip: ArrayLike, b: ArrayLike, bits: ArrayLike, *, one_sided: bool = False
) -> jax.Array:
    r"""The paper's mean squared error of clipped and quantized Laplace values.

    .. math::
        D(\alpha) = 2 b^2 e^{-\alpha/b} + \frac{\alpha^2}{3 \cdot 4^M}

    A model: at the published clip the true error of the paper's grid, the midpoints of
    :math:`2^M` cells, is 1.40 times as large at 2 bits, 1.11 at 4 and 1.007 at 8.

    Args:
      clip: Clip, value units, not negative.
      b: Mean absolute value, value units.
      bits: Width M; bits. The three broadcast, and all may be traced.
      one_sided: As in :func:`laplace_clip`; the error of the positive half, over all values.

    Returns:
      Squared value units; the broadcast shape.

    Example:
      >>> laplace_mse(2.0, 1.0, bits=1).round(4)  # 2 / e^2 + 4 / 12
      Array(0.604, dtype=float32)
    """
    return _mse(_LAPLACE, clip, b, bits, one_sided)


def gauss_mse(
    clip: ArrayLike, sigma: ArrayLike, bits: ArrayLike, *, one_sided: bool = False
) -> jax.Array:
    r"""The paper's mean squared error of clipped and quantized Gaussian values.

    .. math::
        D(\alpha) = (\sigma^2 + \alpha^2)\, \mathrm{erfc}\frac{\alpha}{\sigma\sqrt2}
        - \sqrt{\frac2\pi}\, \alpha\sigma\, e^{-\alpha^2/2\sigma^2} + \frac{\alpha^2}{3 \cdot 4^M}

    Args:
      clip: Clip, value units, not negative.
      sigma: Standard deviation, value units.
      bits: Width M; bits. The three broadcast, and all may be traced.
      one_sided: As in :func:`laplace_mse`.

    Returns:
      Squared value units; the broadcast shape.

    Example:
      >>> gauss_mse(jnp.array([0.0, 6.0]), 1.0, bits=1)  # all is clipped; only 36 / 12 is left
      Array([1., 3.], dtype=float32)
    """
    return _mse(_GAUSS, clip, sigma, bits, one_sided)


def laplace_grid_clip(b: ArrayLike, bits: ArrayLike, *, one_sided: bool = False) -> jax.Array:
    r"""The clip of least *exact* error for Laplace values on an integer grid with a zero.

    Minimises :func:`laplace_grid_mse`, which says what the grid is, by Newton's method from
    :func:`laplace_clip`.

    Args:
      b: Mean absolute value, value units; any shape.
      bits: Width; whole bits, 1 to 16; broadcasts with ``b`` and may be traced.
      one_sided: As in :func:`laplace_clip`.

    Returns:
      Clip, value units; the broadcast shape.

    Raises:
      ValueError: If ``bits`` is a Python number out of range.

    Example:
      >>> laplace_grid_clip(1.0, 1, one_sided=True).round(4)  # {0, c}: the tail's mean, c/2 + 1 = c
      Array(2., dtype=float32)
    """
    _check_bits(bits, 1, whole=True)
    return _grid_clip(_LAPLACE, b, bits, one_sided)


def gauss_grid_clip(sigma: ArrayLike, bits: ArrayLike, *, one_sided: bool = False) -> jax.Array:
    r"""The clip of least *exact* error for Gaussian values on an integer grid with a zero.

    As :func:`laplace_grid_clip`.

    Args:
      sigma: Standard deviation, value units; any shape.
      bits: Width; whole bits, 1 to 16; broadcasts with ``sigma`` and may be traced.
      one_sided: As in :func:`laplace_clip`.

    Returns:
      Clip, value units; the broadcast shape.

    Raises:
      ValueError: If ``bits`` is a Python number out of range.

    Example:
      >>> float(gauss_grid_clip(1.0, 1, one_sided=True))  # Max's quantizer of three levels
      1.2240...

    References:
      Max, *Quantizing for minimum distortion*, 1960, table I.
    """
    _check_bits(bits, 1, whole=True)
    return _grid_clip(_GAUSS, sigma, bits, one_sided)


def laplace_grid_mse(
    clip: ArrayLike, b: ArrayLike, bits: ArrayLike, *, one_sided: bool = False
) -> jax.Array:
    r"""The exact mean squared error of Laplace values on an integer grid with a zero.

    The levels are :math:`k\Delta` and every value goes to the nearest:

    .. math::
        \text{signed:}\quad & \Delta = \frac{2\alpha}{2^M - 1},
            \quad k = -2^{M-1}, \dots, 2^{M-1} - 1 \\
        \text{one-sided:}\quad & \Delta = \frac{\alpha}{2^M - 1},
            \quad k = 0, \dots, 2^M - 1

    Args:
      clip: Clip :math:`\alpha`, value units, not negative.
      b: Mean absolute value, value units.
      bits: Width M; whole bits. The three broadcast, and all may be traced.
      one_sided: As in :func:`laplace_mse`.

    Returns:
      Squared value units; the broadcast shape.

    Example:
      >>> laplace_grid_mse(2.0, 1.0, 1, one_sided=True).round(4)  # 1 - 2 / e
      Array(0.2642, dtype=float32)
    """
    return _grid_mse(_LAPLACE, clip, b, bits, one_sided)


def gauss_grid_mse(
    clip: ArrayLike, sigma: ArrayLike, bits: ArrayLike, *, one_sided: bool = False
) -> jax.Array:
    r"""The exact mean squared error of Gaussian values on an integer grid with a zero.

    The grid is that of :func:`laplace_grid_mse`.

    Args:
      clip: Clip, value units, not negative.
      sigma: Standard deviation, value units.
      bits: Width; whole bits. The three broadcast, and all may be traced.
      one_sided: As in :func:`laplace_mse`.

    Returns:
      Squared value units; the broadcast shape.

    Example:
      >>> (2 * gauss_grid_mse(1.224, 1.0, 1, one_sided=True)).round(4)  # Max 1960, three levels
      Array(0.1902, dtype=float32)
    """
    return _grid_mse(_GAUSS, clip, sigma, bits, one_sided)


def allocate_bins(alpha: ArrayLike, bits: ArrayLike) -> jax.Array:
    r"""Share a number of levels among channels for the least total noise.

    Minimises :math:`\sum_i \alpha_i^2 / B_i^2` over :math:`\sum_i B_i = n 2^M`:

    .. math::
        B_i = n 2^M\, \alpha_i^{2/3} / \textstyle\sum_j \alpha_j^{2/3}

    The noise is :math:`\overline{\alpha^{2/3}}^3 / \overline{\alpha^2}` of that of equal widths.

    Args:
      alpha: Spread of each channel (range, standard deviation or b), value units; shape ``[n]``.
      bits: Width M of a uniform allocation; bits, a number, may be traced.

    Returns:
      Bins, real-valued, shape ``[n]``; their log2 are real-valued bits. If no channel has any
      spread they are equal.

    Raises:
      ValueError: If ``bits`` is a Python number out of range, or ``alpha`` has not one axis.

    Example:
      >>> allocate_bins(jnp.array([8.0**0.5 * 3, 3.0]), bits=4).round(2)  # two thirds, one third
      Array([21.33, 10.67], dtype=float32)

    References:
      Banner et al. 2019, section 3.
    """
    _check_bits(bits, 0)
    return _allocate_bins(_channels(alpha), bits)


def published_bits(alpha: ArrayLike, bits: ArrayLike, max_bits: int = 8) -> jax.Array:
    r"""Whole bits by rounding :func:`allocate_bins`, as in the authors' code.

    Rounded widths do not average to M, so their target t is moved, at most ten widths in all:

    .. math::
        M_i = \mathrm{clip}(\mathrm{round} \log_2 B_i(t),\, 0,\, \text{max\_bits}), \qquad
        t \leftarrow t + \tfrac12 (M - \overline{M_i})
        \quad\text{while}\quad |M - \overline{M_i}| > 0.01

    Args:
      alpha: Spread of each channel, value units; shape ``[n]``.
      bits: Mean width M aimed at; bits, a number, may be traced.
      max_bits: Widest channel, 1 to 16.

    Returns:
      Bits of each channel; int32, shape ``[n]``. Their mean need not be M.

    Raises:
      ValueError: If ``bits`` or ``max_bits`` is out of range, or ``alpha`` has not one axis.

    Example:
      >>> published_bits(jnp.array([8.0, 1.0, 1.0, 1.0]), bits=4)
      Array([5, 3, 3, 3], dtype=int32)
    """
    _check_mean(bits, max_bits)
    return _published_bits(_channels(alpha), bits, max_bits)


def greedy_bits(alpha: ArrayLike, bits: ArrayLike, max_bits: int = 8) -> jax.Array:
    r"""Whole bits of exactly the given mean, each where it removes most noise.

    Minimises :math:`\sum_i \alpha_i^2\, 4^{-M_i}` over :math:`\sum_i M_i = \mathrm{round}(nM)`:
    every bit goes to the channel with the largest :math:`\alpha_i^2\, 4^{-M_i}` so far, the first
    among equals. A channel's priorities fall, so the bits given are the largest
    :math:`\mathrm{round}(nM)` of all n times ``max_bits`` priorities.

    Args:
      alpha: Spread of each channel, value units; shape ``[n]``.
      bits: Mean width M; bits, a number, may be traced.
      max_bits: Widest channel, 1 to 16.

    Returns:
      Bits of each channel; int32, shape ``[n]``. Zero-spread channels are filled last.

    Raises:
      ValueError: If ``bits`` or ``max_bits`` is out of range, or ``alpha`` has not one axis.

    Example:
      >>> greedy_bits(jnp.array([9.0, 3.0, 1.0]), bits=2)  # 9 4.5 3 2.25 1.5 1.1
      Array([4, 2, 0], dtype=int32)
    """
    _check_mean(bits, max_bits)
    return _greedy_bits(_channels(alpha), bits, max_bits)


def kld_clip(counts: ArrayLike, limit: ArrayLike, bits: ArrayLike) -> jax.Array:
    r"""The clip that keeps a histogram's shape: least divergence, a baseline.

    For each of 64 clips, P is the histogram up to the clip with all that lies beyond added to its
    last bin, and Q is the same bins without it, merged into :math:`2^M` levels and spread evenly
    over the filled bins of each level. The clip minimises

    .. math::
        \mathrm{KL}(P \Vert Q) = \sum_j p_j \log(p_j / q_j).

    Nothing is smoothed: a clip whose last bin is empty while something lies beyond is out.

    Args:
      counts: Histogram of magnitudes on equal bins of [0, ``limit``]; shape ``[bins]``.
      limit: Upper end of the last bin, value units; a number.
      bits: Width M of the magnitudes; whole bits, 1 to 8, may be traced. One less than a signed
        grid's.

    Returns:
      Clip, value units, a number; at least :math:`2^M` bins wide.

    Raises:
      ValueError: If ``bits`` is a Python number out of range, or ``counts`` has not one axis.

    Example:
      >>> kld_clip(jnp.array([4, 4, 4, 4, 0, 0, 0, 0]), 8.0, bits=2)  # four levels hold it all
      Array(4., dtype=float32)

    References:
      Migacz, *8-bit inference with TensorRT*, 2017.
    """
    _check_bits(bits, 1, 8, whole=True)
    if (shape := np.shape(counts))[1:] or not sum(shape):
        raise ValueError(f"counts: must have one axis of bins, not shape {shape}; use jax.vmap")
    return _kld_clip(counts, limit, bits)


class _Density(NamedTuple):
    """A density of unit spread, symmetric about zero, seen from its positive side."""

    clip: Callable[[jax.Array], jax.Array]  # of least modelled error, from real-valued bits
    pdf: Callable[[jax.Array], jax.Array]
    slope: float  # of the pdf, just right of zero
    inside: Callable[[jax.Array], jax.Array]  # probability of (0, clip)
    overload: Callable[[jax.Array], jax.Array]  # integral of (x - clip)^2 pdf over (clip, inf)


def _laplace_unit(bits: jax.Array) -> jax.Array:
    """Lambert's W of 3 * 4^bits, from its logarithm: Newton on u + log u."""
    target = log(3.0) + log(4.0) * bits

    def newton(_: int, u: jax.Array) -> jax.Array:
        return u * (1.0 + target - jnp.log(u)) / (1.0 + u)

    # W(x) < log(1 + x): from above the first step lands below, and all others rise.
    return jax.lax.fori_loop(0, 6, newton, jnp.logaddexp(target, 0.0))


def _gauss_unit(bits: jax.Array) -> jax.Array:
    """Newton for the stationary point; its step has this form, in which nothing cancels."""
    noise = jnp.exp2(-2.0 * bits) / 3.0

    def newton(_: int, u: jax.Array) -> jax.Array:
        return sqrt(2.0 / pi) * jnp.exp(-0.5 * u**2) / (jax.lax.erfc(u / sqrt(2.0)) + noise)

    start = jnp.sqrt(2.0 * log(2.0) * jnp.maximum(bits, 1.0))
    return jax.lax.fori_loop(0, 16, newton, start)


def _gauss_pdf(x: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * x**2) / sqrt(2.0 * pi)


def _gauss_overload(clip: jax.Array) -> jax.Array:
    """By quadrature: the closed form cancels, in float32 it is wrong by 1e-3 at 6 sigma."""
    reach = 80.0 / (clip + jnp.sqrt(clip**2 + 80.0))  # here the density has fallen by e^40

    def part(node: jax.Array, weight: jax.Array) -> jax.Array:
        beyond = 0.5 * (1.0 + node) * reach
        return 0.5 * weight * beyond**2 * _gauss_pdf(clip + beyond)

    rule = (jnp.asarray(x, clip.dtype) for x in np.polynomial.legendre.leggauss(32))
    return reach * jnp.sum(jax.vmap(part)(*rule), axis=0)


_LAPLACE = _Density(
    clip=_laplace_unit,
    pdf=lambda x: 0.5 * jnp.exp(-x),
    slope=-0.5,
    inside=lambda clip: -0.5 * jnp.expm1(-clip),
    overload=lambda clip: jnp.exp(-clip),
)
_GAUSS = _Density(
    clip=_gauss_unit,
    pdf=_gauss_pdf,
    slope=0.0,
    inside=lambda clip: 0.5 * jax.lax.erf(clip / sqrt(2.0)),
    overload=_gauss_overload,
)


@partial(jax.jit, static_argnums=(0, 3))
def _clip(density: _Density, spread: ArrayLike, bits: ArrayLike, one_sided: bool) -> jax.Array:
    bits, spread = _broadcast(bits, spread)
    return spread * density.clip(bits + float(one_sided))


@partial(jax.jit, static_argnums=(0, 4))
def _mse(
    density: _Density, clip: ArrayLike, spread: ArrayLike, bits: ArrayLike, one_sided: bool
) -> jax.Array:
    bits, clip, spread = _broadcast(bits, clip, spread)
    overload = 2.0 * spread**2 * density.overload(_relative(clip, spread))
    granular = clip**2 * jnp.exp2(-2.0 * (bits + float(one_sided))) / 3.0
    return (overload + granular) * (0.5 if one_sided else 1.0)


@partial(jax.jit, static_argnums=(0, 3))
def _grid_clip(density: _Density, spread: ArrayLike, bits: ArrayLike, one_sided: bool) -> jax.Array:
    bits, spread = _broadcast(bits, spread)
    index = jnp.clip(bits.astype(jnp.int32), 1, MAX_BITS) - 1
    with jax.ensure_compile_time_eval():  # solved once, not in every program that clips
        table = _grid_table(density, one_sided, spread.dtype)
    return spread * table[index]


@partial(jax.jit, static_argnums=(0, 4))
def _grid_mse(
    density: _Density, clip: ArrayLike, spread: ArrayLike, bits: ArrayLike, one_sided: bool
) -> jax.Array:
    bits, clip, spread = _broadcast(bits, clip, spread)
    unit = jnp.vectorize(partial(_unit_grid_mse, density, one_sided))
    return spread**2 * unit(_relative(clip, spread), bits.astype(jnp.int32))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _grid_table(density: _Density, one_sided: bool, dtype: jnp.dtype) -> jax.Array:
    """Best clips of unit density at 1 .. 16 bits: Newton from those of the model."""
    bits = jnp.arange(1, MAX_BITS + 1, dtype=jnp.int32)
    model = density.clip(bits.astype(dtype) + float(one_sided))
    errors = jax.vmap(partial(_unit_grid_mse, density, one_sided))

    def newton(_: int, clip: jax.Array) -> jax.Array:
        slope = jax.grad(lambda clip: jnp.sum(errors(clip, bits)))
        gradient, curvature = jax.jvp(slope, (clip,), (jnp.ones_like(clip),))
        return clip - gradient / curvature

    # At one bit the model is far off: one level, or none, is left for the tail.
    return jax.lax.fori_loop(0, 6, newton, model * (1.0 - 2.0 * 0.25 ** bits.astype(dtype)))


def _unit_grid_mse(
    density: _Density, one_sided: bool, clip: jax.Array, bits: jax.Array
) -> jax.Array:
    codes = jnp.left_shift(1, bits)
    step = clip * (1.0 if one_sided else 2.0) / (codes - 1).astype(clip.dtype)
    cells = jnp.stack([codes - 1] if one_sided else [codes // 2, codes // 2 - 1])
    return jnp.sum(jax.vmap(partial(_side_mse, density, step))(cells))


def _side_mse(density: _Density, step: jax.Array, cells: jax.Array) -> jax.Array:
    """Error of x > 0 on levels 0 .. ``cells`` times ``step``; numbers in, a number out.

    By quadrature on half cells, whose ends are the kinks of the error. Only those below 40 spreads
    matter, and more panels each are left for them if they are few. If they are more than the panels
    the steps are small, and the Euler-Maclaurin sum's two terms agree with it to 5e-7.
    """
    step = jnp.minimum(step, 80.0)
    whole = cells.astype(step.dtype)
    halves = jnp.minimum(2.0 * whole, jnp.ceil(80.0 / jax.lax.stop_gradient(step)))
    fine = step**2 / 12.0 * density.inside(whole * step) + 7.0 / 2880.0 * step**4 * density.slope
    granular = jnp.where(halves <= _PANELS, _quadrature(density, step, halves), fine)
    return granular + density.overload(whole * step)


def _quadrature(density: _Density, step: jax.Array, halves: jax.Array) -> jax.Array:
    """Squared distance to the nearest multiple of ``step``, over so many half steps from zero."""
    nodes, weights = (jnp.asarray(x, step.dtype) for x in np.polynomial.legendre.leggauss(4))
    halves = halves.astype(jnp.int32)
    per_half = jnp.maximum(_PANELS // jnp.maximum(halves, 1), 1)
    panel = jnp.arange(_PANELS, dtype=jnp.int32)
    width = 0.5 / per_half.astype(step.dtype)  # in steps, as all that follows
    node = 0.5 * (1.0 + nodes)[:, None]
    place = (panel.astype(step.dtype)[None, :] + node) * width
    phase = ((panel % (2 * per_half)).astype(step.dtype)[None, :] + node) * width
    distance = jnp.minimum(phase, 1.0 - phase)
    terms = 0.5 * weights[:, None] * distance**2 * density.pdf(place * step)
    covered = (panel < halves * per_half)[None, :]
    return jnp.sum(jnp.where(covered, terms, 0.0)) * width * step**3


@jax.jit
def _allocate_bins(alpha: jax.Array, bits: ArrayLike) -> jax.Array:
    largest = jnp.max(alpha)
    weights = jnp.where(largest > 0.0, alpha / jnp.where(largest > 0.0, largest, 1.0), 1.0)
    weights = jnp.cbrt(weights**2)
    budget = alpha.size * jnp.exp2(jnp.asarray(bits, alpha.dtype))
    return budget * (weights / jnp.sum(weights))


@partial(jax.jit, static_argnums=2)
def _published_bits(alpha: jax.Array, bits: ArrayLike, max_bits: int) -> jax.Array:
    goal = jnp.asarray(bits, alpha.dtype)
    shares = jnp.log2(_allocate_bins(alpha, 0.0))

    def rounded(target: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(target + shares), 0.0, float(max_bits))

    def adjust(_: int, target: jax.Array) -> jax.Array:
        gap = goal - jnp.mean(rounded(target))
        return jnp.where(jnp.abs(gap) > 0.01, target + gap / 2.0, target)

    return rounded(jax.lax.fori_loop(0, 9, adjust, goal)).astype(jnp.int32)


@partial(jax.jit, static_argnums=2)
def _greedy_bits(alpha: jax.Array, bits: ArrayLike, max_bits: int) -> jax.Array:
    # Halves of alpha, not quarters of its square: exact, so that equal priorities compare equal.
    halves = jnp.asarray(0.5 ** np.arange(max_bits), alpha.dtype)
    order = jnp.argsort(-(alpha[:, None] * halves[None, :]).ravel(), stable=True)
    budget = jnp.round(alpha.size * jnp.asarray(bits, alpha.dtype)).astype(jnp.int32)
    given = jnp.arange(order.size, dtype=jnp.int32) < budget
    return jnp.zeros(alpha.shape, jnp.int32).at[order // max_bits].add(given.astype(jnp.int32))


@jax.jit
def _kld_clip(counts: ArrayLike, limit: ArrayLike, bits: ArrayLike) -> jax.Array:
    limit = wide(jnp.asarray(limit))
    counts = jnp.asarray(counts).astype(limit.dtype)
    levels = jnp.minimum(jnp.left_shift(1, jnp.asarray(bits, jnp.int32)), counts.size)
    steps = jnp.arange(_CANDIDATES, dtype=jnp.int32)
    kept = levels + (counts.size - levels) * steps // (_CANDIDATES - 1)
    best = jnp.argmin(jax.vmap(partial(_divergence, counts, levels))(kept))
    return limit * (kept[best].astype(limit.dtype) / counts.size)


def _divergence(counts: jax.Array, levels: jax.Array, kept: jax.Array) -> jax.Array:
    """KL of the first ``kept`` bins, outliers in the last, from their ``levels`` means; nats."""
    place = jnp.arange(counts.size, dtype=jnp.int32)
    inner = jnp.where(place < kept, counts, 0.0)
    outliers = jnp.sum(jnp.where(place < kept, 0.0, counts))
    p = jnp.where(place == kept - 1, inner + outliers, inner)
    level = jnp.minimum(place * levels // kept, 255)
    mass, filled = (
        jax.ops.segment_sum(x, level, 256) for x in (inner, (inner > 0.0).astype(inner.dtype))
    )
    q = jnp.where(inner > 0.0, (mass / jnp.maximum(filled, 1.0))[level], 0.0)
    p, q = (x / jnp.where(jnp.any(x > 0.0), jnp.sum(x), 1.0) for x in (p, q))
    return jnp.sum(jnp.where(p > 0.0, p * (jnp.log(p) - jnp.log(q)), 0.0))


def _broadcast(bits: ArrayLike, *values: ArrayLike) -> list[jax.Array]:
    """``bits`` and the values, as floats of one shape and of the values' dtype, widened."""
    dtype = jnp.result_type(*values)
    arrays = [wide(jnp.asarray(x, dtype)) for x in values]
    return jnp.broadcast_arrays(jnp.asarray(bits).astype(arrays[0].dtype), *arrays)


def _relative(clip: jax.Array, spread: jax.Array) -> jax.Array:
    """Clip in spreads; so large that nothing is beyond where there is no spread."""
    ratio = clip / jnp.where(spread > 0.0, spread, 1.0)
    return jnp.minimum(ratio, 1e7)  # whose square is still a number


def _channels(alpha: ArrayLike) -> jax.Array:
    """``alpha`` as a float array, checked."""
    alpha = wide(jnp.asarray(alpha))
    if alpha.ndim != 1 or not alpha.size:
        raise ValueError(
            f"alpha: must have one axis of channels, not shape {alpha.shape}; use jax.vmap"
        )
    return alpha


def _check_bits(bits: ArrayLike, lowest: int, highest: int = MAX_BITS, whole: bool = False) -> None:
    """Numbers only: arrays are not looked into."""
    if _is_number(bits) and (not lowest <= bits <= highest or (whole and bits % 1)):
        kind = "whole number" if whole else "number"
        raise ValueError(
            f"bits: must be a {kind} from {lowest} to {highest}, not {bits}; "
            "choose a width in that range or leave the array as it is"
        )


def _is_number(x: ArrayLike) -> TypeGuard[int | float | np.integer | np.floating]:
    return isinstance(x, int | float | np.integer | np.floating)


def _check_mean(bits: ArrayLike, max_bits: int) -> None:
    if max_bits not in range(1, MAX_BITS + 1):
        raise ValueError(f"max_bits: must be a whole number from 1 to {MAX_BITS}, not {max_bits}")
    if _is_number(bits) and not 0 <= bits <= max_bits:
        raise ValueError(
            f"bits: must be from 0 to max_bits = {max_bits}, not {bits}; lower it or raise max_bits"
        )
