r"""Error feedback: round a matrix one row at a time, and let later rows make up for the error.

For outputs :math:`Y = XW` the rounding error costs

.. math:: \tfrac1r \lVert X (\hat W - W) \rVert^2 = \mathrm{tr}\,(\hat W - W)^\top H (\hat W - W),
          \qquad H = \tfrac1r X^\top X,

and once a row is rounded, the best real values of the others are known in closed form. With
:math:`H^{-1} = U^\top U`, U upper triangular, rounding row j by :math:`e` calls for

.. math:: w_k \leftarrow w_k - e \, U_{jk} / U_{jj}, \qquad k > j.

Source: Frantar et al., *Optimal Brain Compression*, 2022, and *GPTQ*, 2023. (`Hubara et al.
<https://arxiv.org/abs/2006.10518>`_ learn by gradient what this finds in one pass.)

Differs from the papers in: what is returned is not codes but the values that each row had when it
was rounded, so that any method may go on from there.
"""

import jax
import jax.numpy as jnp
from jax import lax

from lnq.quantizer import QParams, fake_quant

__all__ = ["compensate", "least_squares", "second_moment"]


def second_moment(x: jax.Array, damping: float = 0.01) -> jax.Array:
    r""":math:`H = X^\top X / r + \lambda I`, with :math:`\lambda` a share of its mean diagonal.

    Args:
      x: Rows ``[..., r, n]``.
      damping: That share; more of it trusts few rows less.

    Returns:
      ``[..., n, n]``, float32.

    Example:
      >>> second_moment(jnp.array([[1.0, 0.0], [0.0, 3.0]]), damping=0.0)
      Array([[0.5, 0. ],
             [0. , 4.5]], dtype=float32)
    """
    x = x.astype(jnp.float32)
    h = jnp.einsum("...ri,...rj->...ij", x, x) / x.shape[-2]
    mean = jnp.trace(h, axis1=-2, axis2=-1)[..., None, None] / x.shape[-1]
    return h + jnp.maximum(damping * mean, 1e-12) * jnp.broadcast_to(jnp.eye(x.shape[-1]), h.shape)


def least_squares(x: jax.Array, y: jax.Array, w: jax.Array, damping: float = 0.01) -> jax.Array:
    r"""The matrix that takes other data to the same outputs.

    .. math:: \min_{W'} \tfrac1r \lVert X W' - Y \rVert^2 + \lambda \lVert W' - W \rVert^2

    Args:
      x: Rows that the layer will read, ``[..., r, n]``.
      y: What they should become, ``[..., r, o]``.
      w: The matrix it has, ``[..., n, o]``.
      damping: As in :func:`second_moment`.

    Example:
      >>> x = jnp.array([[1.0], [2.0]])
      >>> least_squares(x, 3.0 * x, jnp.zeros((1, 1)), damping=0.0).round(4)
      Array([[3.]], dtype=float32)
    """
    h = second_moment(x, damping)
    residual = jnp.einsum("...ri,...ro->...io", x, y - x @ w) / x.shape[-2]
    return w + jnp.linalg.solve(h, residual)


def compensate(w: jax.Array, h: jax.Array, grid: QParams) -> jax.Array:
    """Weights that make up for the rounding of those before them.

    Args:
      w: ``[n, o]``.
      h: Second moment of the data, ``[n, n]``, positive definite.
      grid: One per column, fields ``[1, o]``.

    Returns:
      ``[n, o]``: round it to nearest.

    Example:
      >>> from lnq.quantizer import affine_grid
      >>> w, h = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 0.99], [0.99, 1.0]])
      >>> grid = affine_grid(jnp.array([[-4.0]]), jnp.array([[3.0]]), 3)
      >>> fake_quant(compensate(w, h, grid), grid).ravel()  # 0.8 together: one of them becomes 1
      Array([0., 1.], dtype=float32)
    """
    w = w.astype(jnp.float32)
    upper = jnp.linalg.cholesky(jnp.linalg.inv(h), upper=True)
    later = jnp.arange(len(w))[:, None]

    def turn(j: jax.Array, w: jax.Array) -> jax.Array:
        row = lax.dynamic_slice_in_dim(w, j, 1)
        error = (row - fake_quant(row, grid)) / upper[j, j]
        return w - jnp.where(later > j, upper[j][:, None] * error, 0.0)

    return lax.fori_loop(0, len(w), turn, w)
