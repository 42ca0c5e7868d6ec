r"""How a loss looks as a function of a few dozen clips: flat or sharp, and do they interact?

Everything here takes a loss L(x) of a vector x. For clips let x hold their logarithms,

.. math::
    x = \log(c_1, \dots, c_n), \qquad
    L(x + \delta) \approx L(x) + g^\top \delta + \tfrac12\, \delta^\top H\, \delta,

and derivatives are by relative steps: 0.1 in :math:`x_i` widens clip i by a tenth, and g and H have
the unit of the loss, whatever the sizes of the tensors. At many bits H is small and nearly
diagonal, and each clip can be chosen by itself; at few bits it is large and they interact.

A loss is ``f(x, *args)``, a pure JAX function with a scalar of float32. What it needs of data and
parameters are arrays in ``args``: no data ends up in compiled code, and ``f`` compiles once.
``parallel`` is how many evaluations run at once; one by one if None.

Source: Nahshan et al., `Loss Aware Post-training Quantization
<https://arxiv.org/abs/1911.07190>`_, 2019, and its authors' released code (separability).

Differs from the paper and the code in: steps are relative; differences are averaged over widths,
because codes jump; determinants are logarithms, as 33 small factors need; the interaction is
estimated from residuals, with a small fraction of the error.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Coupling",
    "Curvature",
    "Separability",
    "coupling",
    "draw_p",
    "draw_surface",
    "draw_trace",
    "gaussian_curvature",
    "hessian",
    "separability",
    "surface",
]

Loss: TypeAlias = Callable[..., jax.Array]


class Curvature(NamedTuple):
    """A curvature ``sign * exp(log)``; scalars, ``log`` in nats."""

    sign: jax.Array
    log: jax.Array


class Coupling(NamedTuple):
    r"""A Hessian in a few numbers; the first is in units of the loss.

    Attributes:
      trace: Sum of the eigenvalues.
      sign: Sign of the determinant.
      log: Logarithm of its magnitude, nats.
      condition: Largest over smallest magnitude of an eigenvalue.
      off_diagonal: Frobenius norm of what is off the diagonal over that of the diagonal.
      largest: Largest :math:`|H_{ij}| / \sqrt{H_{ii} H_{jj}}`; below 1 at a minimum.
      by_distance: Its mean over the pairs at distance :math:`|i - j| = 1 \dots n - 1`; ``[n - 1]``.
        Pairs whose diagonal entries are not both positive are left out of these two; where none is
        left they are 0 and nan.
    """

    trace: jax.Array
    sign: jax.Array
    log: jax.Array
    condition: jax.Array
    off_diagonal: jax.Array
    largest: jax.Array
    by_distance: jax.Array


class Separability(NamedTuple):
    """How far a loss is from a sum of functions of one variable each.

    Attributes:
      interaction: Variance beyond any such sum, squared units of the loss; 0 if the loss is one,
        to the rounding of float32. An estimate: it may come out negative.
      error: Its standard error.
      share: The same over the variance of the loss; 0 if that is constant.
    """

    interaction: float
    error: float
    share: float


def hessian(
    f: Loss,
    x: ArrayLike,
    *args: Any,
    width: float | Sequence[float] = (0.05, 0.075, 0.1),
    parallel: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Second and first derivatives of a loss, measured at a distance.

    .. math::
        g_i &= \frac{L(+_i) - L(-_i)}{2h}, \qquad
        H_{ii} = \frac{L(+_i) - 2L + L(-_i)}{h^2}, \\
        H_{ij} &= \frac{L(+_i +_j) - L(+_i -_j) - L(-_i +_j) + L(-_i -_j)}{4h^2}

    with :math:`\pm_i` a step of h along axis i, averaged over the widths h. A loss of quantized
    values is smooth at large and jumps where a code flips: automatic differentiation sees no jump,
    small steps see little else. The price is a bias of :math:`\tfrac{h^2}{12} L''''` in H.

    Args:
      f: ``f(x, *args)``.
      x: Where; float32 ``[n]``, logarithms of clips.
      *args: Pytrees of arrays for ``f``.
      width: One or several h, in units of ``x``; each takes :math:`1 + 2n^2` evaluations.
      parallel: Evaluations at once.

    Returns:
      H, symmetric ``[n, n]``, and g, ``[n]``.

    Raises:
      ValueError: If ``x`` is not a float vector, the loss not a scalar or not finite at one of the
        points, or a width not positive.

    Example:
      >>> H, g = hessian(lambda x: x[0] ** 2 + 3 * x[0] * x[1] + x[1] ** 2, [1.0, 2.0])
      >>> H.round(1), g.round(1)
      (Array([[2., 3.], [3., 2.]], dtype=float32), Array([8., 7.], dtype=float32))
    """
    x, widths = _vector("x", x), np.atleast_1d(width)
    if not (widths > 0.0).all():
        raise ValueError(f"width: expected positive steps, got {width}")
    found = []
    for h in widths:
        losses = _evaluate(f, np.asarray(x)[None] + h * _stencil(x.size), x.dtype, args, parallel)
        _check_finite(losses, f"x: the loss is not finite within {h:g} of it; move it or `width`")
        found.append(_differences(losses, x.size, h))
    second, first = (np.mean(parts, 0) for parts in zip(*found, strict=True))
    return jnp.asarray(second, x.dtype), jnp.asarray(first, x.dtype)


def gaussian_curvature(hessian: jax.Array, gradient: jax.Array, exponent: float = 2.0) -> Curvature:
    r"""Curvature of a loss at a point: near 0 if flat, of order 1 if sharp; jit-able.

    .. math:: K = \frac{\det H}{(1 + \lVert g \rVert^2)^e}

    with H ``[n, n]`` and g ``[n]``. The paper has the exponent e = 2 for any n; the product of the
    principal curvatures of the graph (Gauss-Kronecker) has e = (n + 2) / 2, the same only for
    n = 2. At a minimum g vanishes and e does not matter.

    Example:
      >>> K = gaussian_curvature(jnp.array([[2.0, 0.0], [0.0, 2.0]]), jnp.array([1.0, 0.0]))
      >>> float(K.sign * jnp.exp(K.log))  # 4 / (1 + 1)²
      1.0
    """
    sign, log = jnp.linalg.slogdet(hessian)
    return Curvature(sign, log - exponent * jnp.log1p(jnp.sum(gradient**2)))


@jax.jit
def coupling(hessian: jax.Array) -> Coupling:
    """Size of a symmetric Hessian ``[n, n]`` and how far it is from diagonal.

    Example:
      Two activation clips of ResNet-18 at 2 bits, from the authors' released code:

      >>> found = coupling(jnp.array([[0.3132, 0.3986], [0.3986, 2.1945]]))
      >>> float(found.trace), float(found.largest)  # .3986 / sqrt(.3132 * 2.1945)
      (2.507..., 0.480...)
    """
    n, diagonal = len(hessian), jnp.diagonal(hessian)
    off = hessian - jnp.diag(diagonal)
    root = jnp.sqrt(jnp.where(diagonal > 0.0, diagonal, jnp.inf))
    distance = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    pairs = (jnp.maximum(root[:, None], root[None]) < jnp.inf) & (distance > 0)
    scaled = jnp.where(pairs, jnp.abs(off) / root[:, None] / root[None], 0.0)

    def by_distance(entries: jax.Array) -> jax.Array:
        return jnp.bincount(distance.ravel(), entries.ravel().astype(off.dtype), length=n)[1:]

    eigenvalues = jnp.linalg.eigvalsh(hessian)
    sizes = jnp.abs(eigenvalues)
    return Coupling(
        trace=jnp.trace(hessian),
        sign=jnp.prod(jnp.sign(eigenvalues)),
        log=jnp.sum(jnp.log(sizes)),
        condition=jnp.max(sizes) / jnp.min(sizes),
        off_diagonal=jnp.linalg.norm(off) / jnp.linalg.norm(diagonal),
        largest=jnp.max(scaled),
        by_distance=by_distance(scaled) / by_distance(pairs),
    )


def separability(
    f: Loss,
    low: ArrayLike,
    high: ArrayLike,
    key: jax.Array,
    *args: Any,
    points: int = 1000,
    parallel: int | None = None,
) -> Separability:
    r"""Variance of a loss over a box that no sum of functions of one variable explains.

    With x and z independent and uniform in the box, and :math:`z^{j \leftarrow x}` for z with
    coordinate j of x,

    .. math::
        \gamma^2 = \mathrm{Cov}\Bigl(L(x),\; L(x) + (n - 1) L(z)
            - \sum_j L(z^{j \leftarrow x})\Bigr) = \sum_{|u| \ge 2} \sigma_u^2,

    the variances of all ANOVA terms u of two and more variables: given x, the mean of the second
    argument is L(x) less its mean and its main effects. So nothing that is a sum over variables
    matters in the first argument, and its least-squares fit by parabolas is taken out of L(x).

    Args:
      f: ``f(x, *args)``.
      low: Lower corner, float32 ``[n]``; the authors' box is from the clips of p = 2 to p = 3.
      high: Upper corner.
      key: PRNG key.
      *args: Pytrees of arrays for ``f``.
      points: Pairs (x, z), each of n + 2 evaluations; many more than the 2n + 1 terms of the fit.
      parallel: Evaluations at once.

    Raises:
      ValueError: If the corners are not float vectors with low < high, the points too few, or the
        loss not a scalar or not finite at one of them.

    Example:
      >>> box = jnp.array([-1.0, -1.0]), jnp.array([1.0, 1.0])
      >>> found = separability(lambda x: x[0] * x[1], *box, jax.random.key(0), points=4000)
      >>> bool(abs(found.interaction - 1 / 9) < 3 * found.error)  # E x² = 1/3, twice
      True
    """
    low, high = _vector("low", low), _vector("high", high)
    if low.shape != high.shape or not np.all(np.less(low, high)):
        raise ValueError(f"low: expected to lie below `high` everywhere, got {low} and {high}")
    n = low.size
    if points <= 2 * n + 1:
        raise ValueError(f"points: expected more than {2 * n + 1}, for {n} variables, got {points}")
    unit, every = _pairs(key, low, high, points)
    losses = _evaluate(f, every, low.dtype, args, parallel).reshape(points, n + 2)
    _check_finite(losses, "low: the loss is not finite in the box; give a smaller one")
    at_x, at_z, at_swapped = losses[:, 0], losses[:, 1], losses[:, 2:].sum(1)
    terms = _residual(at_x, np.asarray(unit)) * (at_x + (n - 1) * at_z - at_swapped)
    freedom, variance = points - (2 * n + 1), losses[:, :2].var(ddof=1)
    interaction = terms.sum() / freedom
    error = terms.std(ddof=1) * np.sqrt(points) / freedom
    share = interaction / variance if variance > 0.0 else 0.0
    return Separability(float(interaction), float(error), float(share))


@partial(jax.jit, static_argnums=3)
def _pairs(
    key: jax.Array, low: jax.Array, high: jax.Array, points: int
) -> tuple[jax.Array, jax.Array]:
    """x in the unit box, ``[points, n]``; x, z and z with each coordinate of x, ``[.., n]``."""
    unit = jax.random.uniform(key, (2, points, low.size), low.dtype)
    x, z = low[None, None] + unit * (high - low)[None, None]
    swapped = jnp.where(jnp.eye(low.size, dtype=bool)[None], x[:, None], z[:, None])
    every = jnp.concatenate([x[:, None], z[:, None], swapped], 1)  # [points, n + 2, n]
    return unit[0], every.reshape(-1, low.size)


def _residual(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """What a sum of parabolas, one in each variable, leaves of ``values [k]`` at ``x [k, n]``."""
    terms = np.concatenate([np.ones((len(x), 1)), x, np.square(x, dtype=float)], 1)
    return values - terms @ np.linalg.lstsq(terms, values)[0]


def surface(
    f: Loss,
    x: ArrayLike,
    i: int,
    j: int,
    *args: Any,
    span: float = 0.5,
    points: int = 15,
    parallel: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A loss as a function of variables i and j, the others held at ``x``.

    Args:
      f: ``f(x, *args)``.
      x: The middle, float32 ``[n]``.
      i: First variable; negative from the end.
      j: Second variable.
      *args: Pytrees of arrays for ``f``.
      span: Largest offset, in units of ``x``.
      points: Offsets per variable, k.
      parallel: Evaluations at once.

    Returns:
      Offsets from -span to span, ``[k]``, and losses ``[k, k]``, by the offset of i first.

    Raises:
      ValueError: If ``x`` is not a float vector, ``i`` and ``j`` are not two of its places, or the
        loss is not a scalar or not finite at ``x``; elsewhere it may be infinite.

    Example:
      >>> surface(lambda x: x[0] - x[1] ** 2, [1.0, 3.0], 0, 1, span=1.0, points=3)[1]
      array([[ -4.,  -9., -16.],
             [ -3.,  -8., -15.],
             [ -2.,  -7., -14.]])
    """
    x = _vector("x", x)
    if not (-x.size <= min(i, j) and max(i, j) < x.size and (i - j) % x.size):
        raise ValueError(f"i, j: expected two places of x [{x.size}], got {i} and {j}")
    offsets = span * np.linspace(-1.0, 1.0, points)
    moves = np.zeros((1 + points**2, x.size))  # the first is none: x itself
    moves[1:, i] = np.repeat(offsets, points)
    moves[1:, j] = np.tile(offsets, points)
    losses = _evaluate(f, np.asarray(x)[None] + moves, x.dtype, args, parallel)
    _check_finite(losses[:1], "x: the loss is not finite there; choose another middle")
    return offsets, losses[1:].reshape(points, points)


def draw_p(
    ax: "Axes",
    ps: ArrayLike,
    losses: ArrayLike,
    best: float | None = None,
    window: tuple[float, float] | None = None,
) -> "Axes":
    """Draw losses ``[k]`` against exponents p ``[k]``, their parabola, and a line at ``best``.

    The least-squares parabola is through the p of the ``window`` (lowest, highest), by default all.
    """
    ps, losses = np.asarray(ps, float), np.asarray(losses, float)
    low, high = window or (ps.min(), ps.max())
    used = np.isfinite(losses) & (ps >= low) & (ps <= high)
    ax.plot(ps, losses, "o", label="scanned")
    if used.sum() >= 3:
        curve = np.linspace(low, high, 101)
        ax.plot(curve, np.polyval(np.polyfit(ps[used], losses[used], 2), curve), label="parabola")
    if best is not None:
        ax.axvline(best, linestyle=":", color="black", label=f"p* = {best:.2f}")
    ax.set(xlabel="p", ylabel="loss")
    ax.legend()
    return ax


def draw_surface(ax: "Axes", offsets: ArrayLike, losses: ArrayLike) -> "Axes":
    """Draw a :func:`surface`, i to the right, a plus in its middle and a dot where it is lowest.

    Contours are at equal ratios of the loss above the lowest, down to a thousandth of the range;
    what is not finite stays blank.
    """
    offsets, seen = np.asarray(offsets), np.ma.masked_invalid(np.asarray(losses, float))
    low, high = seen.min(), seen.max()
    if high > low:
        levels = low + (high - low) * np.geomspace(1e-3, 1.0, 13)
        ax.contour(offsets, offsets, seen.T, levels=levels)
    a, b = np.unravel_index(np.argmin(seen), seen.shape)
    ax.plot(0.0, 0.0, "k+")
    ax.plot(offsets[a], offsets[b], "ko")
    ax.set(xlabel="offset i", ylabel="offset j")
    return ax


def draw_trace(ax: "Axes", evaluations: ArrayLike, losses: ArrayLike, start: float) -> "Axes":
    """Draw the best loss so far: ``start``, then ``losses [k]`` after ``evaluations [k]``."""
    best = np.fmin.accumulate(np.append(start, losses))  # nan is no loss
    ax.plot(np.append(0, evaluations), best, drawstyle="steps-post")
    ax.set(xlabel="evaluations", ylabel="best loss so far")
    return ax


def _vector(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.ndim != 1 or x.size == 0 or x.dtype not in (jnp.float32, jnp.float64):
        got = f"{x.dtype}{list(x.shape)}"
        raise ValueError(f"{name}: expected a float32 vector [n], got {got}; ravel and convert it")
    return x


def _evaluate(
    f: Loss, points: ArrayLike, dtype: Any, args: tuple, parallel: int | None
) -> np.ndarray:
    """Loss at points ``[k, n]``; float64 ``[k]``, so that differences lose nothing more."""
    return np.asarray(_losses(f, parallel, jnp.asarray(points, dtype), *args), np.float64)


@partial(jax.jit, static_argnums=(0, 1))
def _losses(f: Loss, parallel: int | None, points: jax.Array, *args: Any) -> jax.Array:
    def loss(x: jax.Array) -> jax.Array:
        value = f(x, *args)
        found = jax.tree.map(lambda a: f"{jnp.result_type(a)}{list(jnp.shape(a))}", value)
        if found not in ("float32[]", "float64[]"):
            raise ValueError(f"f: expected a scalar of float32, got {found}; return a mean")
        return value

    return lax.map(loss, points, batch_size=parallel)


def _check_finite(losses: np.ndarray, message: str) -> None:
    if not np.isfinite(losses).all():
        raise ValueError(message)


def _stencil(n: int) -> np.ndarray:
    """Offsets ``[1 + 2n², n]``: none, each axis both ways, each pair of axes in all four ways."""
    e, (i, j) = np.eye(n), np.triu_indices(n, 1)
    a, b = e[i], e[j]
    return np.concatenate([np.zeros((1, n)), e, -e, a + b, a - b, b - a, -a - b])


def _differences(losses: np.ndarray, n: int, h: float) -> tuple[np.ndarray, np.ndarray]:
    """H and g from the losses on the stencil."""
    i, j = np.triu_indices(n, 1)
    middle, up, down, *corners = np.split(losses, np.cumsum([1, n, n] + 3 * [len(i)]))
    second = np.diag((up - 2.0 * middle + down) / h**2)
    second[i, j] = second[j, i] = np.dot([1, -1, -1, 1], corners) / (4.0 * h**2)
    return second, (up - down) / (2.0 * h)
