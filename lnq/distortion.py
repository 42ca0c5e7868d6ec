"""How far ``x`` is from ``reference``: one number each, in float32 at least.

The measures take ``(reference, x)`` of equal shape.
"""

from functools import partial

import jax
import jax.numpy as jnp

__all__ = [
    "cosine_distance",
    "kl",
    "l2_norm",
    "lp_error",
    "mse",
    "sqnr_db",
    "top1_agreement",
    "wide",
]


def wide(x: jax.Array) -> jax.Array:
    """``x`` as float64 if it is that, else as float32: no statistic is taken in less."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


@partial(jax.jit, static_argnames="axes", inline=True)
def l2_norm(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean norm over ``axes`` (kept as 1; all and dropped by default), value units.

    Divided by the largest entry first, so that no square overflows or vanishes.

    Example:
      >>> l2_norm(jnp.array([[3e30, 4e30], [0.0, 0.0]]), axes=(1,))
      Array([[5.e+30],
             [0.e+00]], dtype=float32)
    """
    x, keepdims = wide(x), axes is not None
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)
    squares = (x / jnp.where(largest == 0.0, 1.0, largest)) ** 2
    norm = largest * jnp.sqrt(jnp.sum(squares, axis=axes, keepdims=True))
    return norm if keepdims else norm.reshape(())


def mse(reference: jax.Array, x: jax.Array) -> jax.Array:
    """Mean squared error, squared value units."""
    return lp_error(reference, x, 2)


def lp_error(reference: jax.Array, x: jax.Array, p: float) -> jax.Array:
    """Mean of ``|reference - x| ** p``, value units to the power p."""
    return jnp.mean(jnp.abs(wide(reference) - wide(x)) ** p)


@partial(jax.jit, inline=True)
def cosine_distance(reference: jax.Array, x: jax.Array) -> jax.Array:
    r"""One minus the cosine of the angle between the flattened arrays, in [0, 2].

    Computed as :math:`\tfrac12 \lVert a/\lVert a\rVert - b/\lVert b\rVert \rVert^2`, which loses
    no digits at small angles. Two zero arrays are at distance 0, one zero array is at distance 1.

    Example:
      >>> cosine_distance(jnp.array([3.0, 0.0]), jnp.array([1.0, 1.0])).round(4)
      Array(0.2929, dtype=float32)
    """
    a, a_zero = _direction(reference)
    b, b_zero = _direction(x)
    return jnp.where(a_zero ^ b_zero, 1.0, 0.5 * jnp.sum((a - b) ** 2))


@partial(jax.jit, inline=True)
def sqnr_db(reference: jax.Array, x: jax.Array) -> jax.Array:
    """Signal to quantization-noise ratio, decibels; infinite where ``x`` is exact.

    Example:
      >>> sqnr_db(jnp.array([1.0, 1.0]), jnp.array([0.9, 1.1])).round(2)
      Array(20., dtype=float32)
    """
    signal, noise = l2_norm(reference), l2_norm(wide(reference) - wide(x))
    return jnp.where(noise == 0.0, jnp.inf, 20.0 * (jnp.log10(signal) - jnp.log10(noise)))


def top1_agreement(reference: jax.Array, x: jax.Array) -> jax.Array:
    """Share of rows whose largest entry (last axis) stands at the same place, in [0, 1]."""
    return jnp.mean(reference.argmax(-1) == x.argmax(-1), dtype=jnp.float32)


@partial(jax.jit, inline=True)
def kl(reference: jax.Array, x: jax.Array) -> jax.Array:
    """Divergence KL(softmax(reference) || softmax(x)) over the last axis, mean of rows, nats.

    Example:
      >>> float(kl(jnp.log(jnp.array([[0.5, 0.5]])), jnp.log(jnp.array([[0.8, 0.2]]))))  # log 5/4
      0.22314...
    """
    log_p, log_q = jax.nn.log_softmax(wide(reference)), jax.nn.log_softmax(wide(x))
    terms = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * (log_p - log_q))
    return jnp.mean(jnp.sum(terms, -1))


def _direction(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vector, and whether ``x`` is zero."""
    norm = l2_norm(x)
    return wide(x) / jnp.where(norm == 0.0, 1.0, norm), norm == 0.0
