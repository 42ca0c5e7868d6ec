r"""How concentrated is attention, on how many keys, and on whose?

With rows of weights that sum to one, P ``[..., n, m]`` of n queries and m keys, entropy says on how
many keys a query looks, and the spectral gap whether all queries look at the same ones:

.. math::
    H = -\frac1n \sum_{ij} P_{ij} \ln P_{ij}, \qquad
    \gamma = 1 - |\lambda_2(P)|

Low entropy with a gap near 1 is *biased*: the same few keys for all. With a gap near 0 it is
*unbiased*: each query has keys of its own. Softmax of Gaussian queries and keys is log-normal, with
:math:`\operatorname{Var} \ln P = \sigma^2 = \sigma_q^2 \sigma_k^2 = 1/\tau^2`, and as the
temperature τ falls entropy and gap fall together. An attention that is to replace it should do the
same; here is what it takes to see whether it does.

A kernel gives the logarithm of weights before rows are divided by their sums. Nothing here is
linear in time: matrices are built in full, to be looked at. Layout is ``q [..., n, d]`` and
``k [..., m, d]``, heads among the leading axes; logarithms are natural.

Source: Nahshan, Kampeas, Haleva, `Linear Log-Normal Attention with Unbiased Concentration
<https://arxiv.org/abs/2311.13541>`_, ICLR 2024.

Differs from the paper in: everything is computed from ln P, with no epsilon; the variance of logits
is also had for queries and keys that are not isotropic; a mask may hide keys.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from lnq.attention.lln import PUBLISHED, moment_match
from lnq.distortion import wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Call",
    "Concentration",
    "Constants",
    "Kernel",
    "LogNormal",
    "Recorder",
    "SweepRow",
    "attention_matrix",
    "draw_log_normal",
    "draw_sweep",
    "elu",
    "entropy",
    "entropy_of",
    "exp",
    "feature_kernel",
    "fenton_wilkinson",
    "fit_constants",
    "gap_of",
    "lln",
    "lln_matched",
    "log_attention",
    "log_normal",
    "logit_variance",
    "measure",
    "performer",
    "relu",
    "softmax",
    "spectral_gap",
    "square",
    "sweep",
    "temperature",
    "variance",
]

Kernel: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""``kernel(q [..., n, d], k [..., m, d])``: logarithms of weights ``[..., n, m]``."""


class LogNormal(NamedTuple):
    """Moments of ln P, nats; each ``[...]``. The last two are 0 if it is normal."""

    mean: jax.Array
    variance: jax.Array
    skew: jax.Array
    excess_kurtosis: jax.Array


class Concentration(NamedTuple):
    """What :func:`measure` sees in P ``[..., n, n]``; each ``[...]``.

    Attributes:
      entropy: Mean over rows, nats.
      gap: Spectral gap, 0 to 1.
      variance: Of the entries of n P.
      log: Moments of ln P.
    """

    entropy: jax.Array
    gap: np.ndarray
    variance: jax.Array
    log: LogNormal


class Constants(NamedTuple):
    """The line a T + b that is ``Var(ln P)`` of LLN; scalars."""

    a: jax.Array
    b: jax.Array


class SweepRow(NamedTuple):
    """One kernel at one temperature.

    Attributes:
      kernel: Its name.
      std: Standard deviation of queries and of keys.
      temperature: Of softmax there, 1 / std².
      entropy: Nats, the median of the draws.
      gap: Likewise.
      variance: Of ln P, likewise.
    """

    kernel: str
    std: float
    temperature: float
    entropy: float
    gap: float
    variance: float


class Call(NamedTuple):
    """What one attention of a model was given.

    Attributes:
      q: ``[batch..., heads, n, d]``.
      k: ``[batch..., heads, m, d]``; keys shared by several heads are repeated.
      mask: True where a query may look, ``[batch..., heads, n, m]``, or None.
    """

    q: jax.Array
    k: jax.Array
    mask: jax.Array | None


# Kernels.


def softmax(q: jax.Array, k: jax.Array) -> jax.Array:
    r"""Softmax attention: :math:`q_i \cdot k_j / \sqrt d`.

    Example:
      >>> softmax(jnp.ones((1, 4)), jnp.ones((1, 4)))  # 4 / √4
      Array([[2.]], dtype=float32)
    """
    return jnp.matmul(q, k.mT, precision="highest") / q.shape[-1] ** 0.5


def feature_kernel(log_features: Callable[[jax.Array], jax.Array]) -> Kernel:
    r"""The kernel :math:`\phi(q_i) \cdot \phi(k_j)` of positive features, in logarithms throughout.

    Args:
      log_features: ln φ, from ``[..., d]`` to ``[..., features]``; -inf where φ is 0.

    Example:
      >>> cubes = feature_kernel(lambda x: 3.0 * jnp.log(x))
      >>> jnp.exp(cubes(jnp.array([[1.0, 2.0]]), jnp.array([[2.0, 1.0]])))  # 1·8 + 8·1
      Array([[16.]], dtype=float32)
    """
    return lambda q, k: _log_matmul(log_features(q), log_features(k))


def elu(q: jax.Array, k: jax.Array) -> jax.Array:
    r"""The Linear Transformer's :math:`\phi(x) = \mathrm{elu}(x) + 1`.

    References:
      Katharopoulos et al., `Transformers are RNNs <https://arxiv.org/abs/2006.16236>`_, 2020.
    """
    return feature_kernel(lambda x: jnp.log1p(jnp.maximum(x, 0.0)) + jnp.minimum(x, 0.0))(q, k)


def relu(q: jax.Array, k: jax.Array) -> jax.Array:
    r""":math:`\phi(x) = \max(x, 0)`: the same P for queries and keys of any size."""
    return feature_kernel(lambda x: jnp.log(jnp.maximum(x, 0.0)))(q, k)


def square(q: jax.Array, k: jax.Array) -> jax.Array:
    r""":math:`\phi(x) = x^2`: the same P for queries and keys of any size."""
    return feature_kernel(lambda x: 2.0 * jnp.log(jnp.abs(x)))(q, k)


def exp(q: jax.Array, k: jax.Array) -> jax.Array:
    r""":math:`\phi(x) = e^x`: LLN with nothing matched."""
    return lln(1.0, 1.0)(q, k)


def lln(alpha: ArrayLike, beta: ArrayLike) -> Kernel:
    r"""LLN attention: :math:`\phi_q = e^{\alpha q}, \phi_k = e^{\beta k}`, with scalar α and β.

    Example:
      >>> q, k = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
      >>> lln(2.0, 3.0)(q, k)  # ln(e³ + e²)
      Array([[3.31...]], dtype=float32)
    """
    return lambda q, k: _log_matmul(q * jnp.asarray(alpha, q.dtype), k * jnp.asarray(beta, k.dtype))


def lln_matched(
    q: jax.Array, k: jax.Array, a: float = PUBLISHED[0], b: float = PUBLISHED[1]
) -> jax.Array:
    r"""LLN attention as published: α and β from the standard deviations of all of q and all of k.

    Other constants, such as those of :func:`fit_constants`, are bound by ``partial``.
    """
    return lln(*moment_match(jnp.std(q, ddof=1), jnp.std(k, ddof=1), a, b))(q, k)


def performer(key: jax.Array, features: int = 256) -> Kernel:
    r"""FAVOR+: positive random features, of which softmax is the mean.

    .. math::
        \phi_f(x) = m^{-1/2} \exp(\omega_f \cdot x' - \lVert x' \rVert^2 / 2),
        \qquad x' = x / d^{1/4}

    The :math:`\omega_f` are normal, and orthogonal within blocks of d.

    Args:
      key: PRNG key.
      features: Their number m.

    Example:
      >>> q, k = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 0.5]])
      >>> jnp.exp(performer(jax.random.key(0), 4096)(q, k)).round(1)  # exp(0.5 / √2) = 1.42
      Array([[1.4]], dtype=float32)

    References:
      Choromanski et al., `Rethinking Attention with Performers
      <https://arxiv.org/abs/2009.14794>`_, 2021.
    """

    def log_features(x: jax.Array) -> jax.Array:
        x = x / x.shape[-1] ** 0.25
        products = jnp.einsum(
            "...d,fd->...f", x, _directions(key, features, x), precision="highest"
        )
        return products - 0.5 * jnp.sum(x**2, -1, keepdims=True) - 0.5 * math.log(features)

    return feature_kernel(log_features)


def _directions(key: jax.Array, features: int, like: jax.Array) -> jax.Array:
    """Normal vectors ``[features, d]``, orthogonal within blocks of d."""
    d, (turn, stretch) = like.shape[-1], jax.random.split(key)
    blocks = jax.random.orthogonal(turn, d, (-(-features // d),), dtype=like.dtype)
    lengths = jnp.linalg.norm(jax.random.normal(stretch, (features, d), like.dtype), axis=-1)
    return lengths[:, None] * blocks.reshape(-1, d)[:features]


def _log_matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """``ln(exp(x) @ exp(y).T)`` for ``x [..., n, f]`` and ``y [..., m, f]``."""
    tops = [jnp.max(z, -1, keepdims=True, initial=-1e30) for z in (x, y)]
    a, b = (jnp.exp(z - top) for z, top in zip((x, y), tops, strict=True))
    total = jnp.matmul(a, b.mT, precision="highest")
    return lax.cond(  # sums so small that terms may have vanished are worth a slow path
        jnp.min(total) > 1e-30,
        lambda: jnp.log(total) + tops[0] + tops[1].mT,
        lambda: _log_sum_by_feature(x, y),
    )


def _log_sum_by_feature(x: jax.Array, y: jax.Array) -> jax.Array:
    def add(total: jax.Array, feature: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        a, b = feature
        return jnp.logaddexp(total, a[..., :, None] + b[..., None, :]), None

    start = jnp.full((*x.shape[:-1], y.shape[-2]), -jnp.inf, x.dtype)
    return lax.scan(add, start, (jnp.moveaxis(x, -1, 0), jnp.moveaxis(y, -1, 0)))[0]


# The matrix and its measures.


def log_attention(
    q: ArrayLike, k: ArrayLike, kernel: Kernel = softmax, mask: ArrayLike | None = None
) -> jax.Array:
    """ln P, exact where P itself would round to 0; jit-able.

    Args:
      q: Queries, ``[..., n, d]``; statistics are of float32 at least.
      k: Keys, ``[..., m, d]``, with the leading axes of ``q``.
      kernel: Of this module or your own.
      mask: True where a query may look, broadcast to ``[..., n, m]``.

    Returns:
      ``[..., n, m]``, nats; -inf where a weight is 0. A row with no weight at all is -inf
      throughout, and no measure counts it.

    Raises:
      ValueError: If shapes do not agree.

    Example:
      >>> jnp.exp(log_attention(jnp.zeros((1, 8)), jnp.zeros((4, 8))))
      Array([[0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    q, k = wide(jnp.asarray(q)), wide(jnp.asarray(k))
    if q.ndim < 2 or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        message = f"expected q [..., n, d] and k [..., m, d], got {q.shape} and {k.shape}"
        raise ValueError(f"q, k: {message}; move heads to the front and repeat shared keys")
    log_weights = kernel(q, k)
    if mask is not None:
        mask = jnp.broadcast_to(jnp.asarray(mask), log_weights.shape)
        log_weights = jnp.where(mask.astype(bool), log_weights, -jnp.inf)
    total = jax.nn.logsumexp(log_weights, -1, keepdims=True)
    return jnp.where(total > -jnp.inf, log_weights - total, -jnp.inf)


def attention_matrix(
    q: ArrayLike, k: ArrayLike, kernel: Kernel = softmax, mask: ArrayLike | None = None
) -> jax.Array:
    """P ``[..., n, m]`` itself, from the arguments of :func:`log_attention`.

    Example:
      >>> attention_matrix(jnp.array([[2.0, 0.0]]), jnp.array([[3.0, 5.0], [1.0, 7.0]]), relu)
      Array([[0.75, 0.25]], dtype=float32)
    """
    return jnp.exp(log_attention(q, k, kernel, mask))


@jax.jit
def entropy(log_p: ArrayLike) -> jax.Array:
    r"""Mean entropy of the rows of P, nats.

    .. math:: H = -\frac1n \sum_{ij} P_{ij} \ln P_{ij}, \qquad 0 \ln 0 = 0

    Args:
      log_p: ln P, ``[..., n, m]``.

    Returns:
      ``[...]``: 0 if each row is one key, ln m if all are uniform.

    Example:
      >>> entropy(jnp.log(jnp.array([[1.0, 0.0], [0.5, 0.5]])))  # (0 + ln 2) / 2
      Array(0.346..., dtype=float32)
    """
    log_p = wide(jnp.asarray(log_p))
    seen = log_p > -jnp.inf
    rows = -jnp.sum(jnp.exp(log_p) * jnp.where(seen, log_p, 0.0), -1)
    return jnp.mean(rows, -1, where=jnp.any(seen, -1))


@jax.jit
def variance(log_p: ArrayLike) -> jax.Array:
    r"""Variance of the entries of m P, which are 1 on average.

    .. math:: m^2 \operatorname{Var} P_{ij} \approx e^{\sigma^2} - 1

    for a log-normal P with :math:`\sigma^2 = \operatorname{Var} \ln P` well below ln m.

    Args:
      log_p: ln P, ``[..., n, m]``.

    Returns:
      ``[...]``: 0 if P is uniform, m - 1 if each row is one key.

    Example:
      >>> variance(jnp.log(jnp.eye(4)))
      Array(3., dtype=float32)
    """
    log_p = wide(jnp.asarray(log_p))
    return jnp.var(log_p.shape[-1] * jnp.exp(log_p), axis=(-2, -1))


@jax.jit
def log_normal(log_p: ArrayLike) -> LogNormal:
    r"""Mean, variance, skew and excess kurtosis of ln P, each ``[...]``.

    A row-normalised log-normal matrix has mean :math:`-\ln m - \sigma^2 / 2`.

    Args:
      log_p: ln P, ``[..., n, m]``, nats; weights of 0 are left out.

    Example:
      >>> log_normal(jnp.array([[0.0, 2.0], [4.0, -jnp.inf]])).variance  # of 0, 2, 4
      Array(2.666..., dtype=float32)
    """
    log_p = wide(jnp.asarray(log_p))
    over: dict[str, Any] = {"axis": (-2, -1), "where": log_p > -jnp.inf}
    mean = jnp.mean(log_p, **over)
    off = log_p - mean[..., None, None]
    second, third, fourth = (jnp.mean(off**power, **over) for power in (2, 3, 4))
    return LogNormal(mean, second, third / second**1.5, fourth / second**2 - 3.0)


def spectral_gap(p: ArrayLike) -> np.ndarray:
    r"""One less the second largest modulus of an eigenvalue; runs on the host, cubic in n.

    .. math:: \gamma = 1 - |\lambda_2(P)| = 1 - \rho(P - \tfrac1n \mathbf 1 \mathbf 1^\top)

    P has :math:`\lambda_1 = 1` with the eigenvector :math:`\mathbf 1`, and the subtraction removes
    it and no other, so that only a spectral radius is needed. One of 1024 tokens takes a second at
    most. One draw may have one large entry and twice the |λ₂| of others: use medians.

    Args:
      p: Rows that sum to 1, ``[..., n, n]``, not under ``jit``.

    Returns:
      ``[...]``, float64: 1 if all rows are the same, 0 if P is a permutation.

    Raises:
      ValueError: If the matrices are not square, or traced.

    Example:
      >>> spectral_gap([[0.9, 0.1], [0.2, 0.8]])  # the eigenvalues are 1 and 0.9 + 0.8 - 1
      array(0.3)
    """
    if isinstance(p, Tracer):
        raise ValueError("p: the gap is found on the host, but it is traced; leave `jit` before")
    p = np.asarray(p, np.float64)
    if p.ndim < 2 or p.shape[-2] != p.shape[-1]:
        raise ValueError(f"p: expected [..., n, n], got {p.shape}; cross-attention has no gap")
    rows = p.sum(-1, keepdims=True)  # 1, or 0 where a mask hides everything
    rest = p - rows * rows.mT / rows.sum(-2, keepdims=True)
    radii = [_spectral_radius(matrix) for matrix in rest.reshape(-1, *p.shape[-2:])]
    return np.clip(1.0 - np.array(radii), 0.0, 1.0).reshape(p.shape[:-2])


def _spectral_radius(matrix: np.ndarray) -> float:
    """Largest modulus of an eigenvalue; by Arnoldi iteration where that converges."""
    from scipy.sparse.linalg import ArpackError, eigs

    if len(matrix) < 64:
        return np.abs(np.linalg.eigvals(matrix)).max()
    start = np.random.default_rng(0).normal(size=len(matrix))
    options: dict[str, Any] = {"maxiter": 100, "tol": 1e-8, "return_eigenvectors": False}
    try:  # a tenth of the time of all eigenvalues
        return np.abs(eigs(matrix, 6, v0=start, **options)).max()
    except ArpackError:  # a circle of them, or none but 0
        return np.abs(np.linalg.eigvals(matrix)).max()


def measure(log_p: ArrayLike) -> Concentration:
    """All measures of ln P ``[..., n, n]``; the gap is found on the host.

    Raises:
      ValueError: If the matrices are not square, or traced.

    Example:
      >>> found = measure(jnp.log(jnp.eye(4)))  # each token looks at itself
      >>> print(f"entropy {found.entropy:.1f}, gap {found.gap:.1f}")
      entropy 0.0, gap 0.0
    """
    log_p = wide(jnp.asarray(log_p))
    gap = spectral_gap(jnp.exp(log_p))
    return Concentration(entropy(log_p), gap, variance(log_p), log_normal(log_p))


# Closed forms.


def temperature(q: ArrayLike, k: ArrayLike) -> jax.Array:
    r"""Temperature of softmax attention, a statistic of its inputs; jit-able.

    .. math:: \tau = 1 / \sqrt{\sigma_q^2 \sigma_k^2}

    for independent, isotropic queries and keys; else see :func:`logit_variance`.

    Args:
      q: Queries, ``[..., n, d]``.
      k: Keys, ``[..., m, d]``.

    Returns:
      ``[...]``; infinite if either is constant.

    Example:
      >>> temperature(jnp.array([[3.0, 5.0, 4.0]]), jnp.array([[2.0, 6.0, 4.0]]))  # 1 / (1 · 2)
      Array(0.5, dtype=float32)
    """
    s_q, s_k = (jnp.std(wide(jnp.asarray(x)), axis=(-2, -1), ddof=1) for x in (q, k))
    return 1.0 / (s_q * s_k)


def logit_variance(q: ArrayLike, k: ArrayLike) -> jax.Array:
    r"""Variance of the logits of softmax within its rows, in time linear in tokens; jit-able.

    .. math:: \frac1d \operatorname{tr}(M_q C_k) = \frac1n \sum_i \operatorname{Var}_j
              \frac{q_i \cdot k_j}{\sqrt d}

    with the second moment :math:`M_q` of the queries and the covariance :math:`C_k` of the keys.
    It is :math:`1/\tau^2` if both are isotropic and centred; of trained heads it may be many times
    that. An identity, with no assumption on distributions.

    Args:
      q: Queries, ``[..., n, d]``.
      k: Keys, ``[..., m, d]``.

    Returns:
      ``[...]``, squared nats.

    Example:
      >>> logit_variance(jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 7.0], [-1.0, 9.0]]))  # of ±√2
      Array(2., dtype=float32)
    """
    q, k = wide(jnp.asarray(q)), wide(jnp.asarray(k))
    k = k - jnp.mean(k, -2, keepdims=True)
    moments = (jnp.matmul(x.mT, x, precision="highest") / x.shape[-2] for x in (q, k))
    return jnp.sum(jnp.multiply(*moments), axis=(-2, -1)) / q.shape[-1]


def entropy_of(sigma2: ArrayLike, n: int) -> jax.Array:
    r"""Entropy of log-normal weights of n keys, :math:`\ln n - \sigma^2/2`, nats.

    Args:
      sigma2: ``Var(ln P)``, any shape; valid while half of it is well below ln n.
      n: Keys.

    Example:
      >>> entropy_of(1.0, 512)  # 6.238 - 0.5
      Array(5.738..., dtype=float32)
    """
    return math.log(n) - jnp.asarray(sigma2, float) / 2.0


def gap_of(sigma2: ArrayLike, n: int) -> jax.Array:
    r"""Spectral gap of a row-normalised matrix of n² independent log-normal entries.

    .. math:: \gamma = 1 - \sqrt{(e^{\sigma^2} - 1) / n}

    Softmax follows it up to :math:`\sigma^2` of about 2.5 at 512 tokens. LLN has a smaller gap.

    Args:
      sigma2: ``Var(ln P)``, any shape.
      n: Tokens.

    Example:
      >>> gap_of(jnp.log(5.0), 400)  # 1 - √(4 / 400)
      Array(0.9, dtype=float32)

    References:
      Bordenave, Caputo, Chafaï, `Circular law theorem for random Markov matrices
      <https://arxiv.org/abs/0808.1502>`_, 2012.
    """
    return 1.0 - jnp.sqrt(jnp.expm1(jnp.asarray(sigma2, float)) / n)


def fenton_wilkinson(sigma2: ArrayLike, d: int) -> jax.Array:
    r"""Variance of the logarithm of a sum of d independent log-normal values.

    .. math:: \ln\bigl(1 + (e^{\sigma^2} - 1) / d\bigr)

    Good while :math:`\sigma^2` is below about 1 at d = 64, and far too large above 3, where
    LLN works: hence the line of :func:`fit_constants`.

    Args:
      sigma2: Variance of the logarithm of each, any shape; to 88 in float32.
      d: Terms.

    Example:
      >>> fenton_wilkinson(2.0, 64)
      Array(0.095..., dtype=float32)

    References:
      Fenton, The Sum of Log-Normal Probability Distributions in Scatter Transmission Systems, 1960.
    """
    return jnp.log1p(jnp.expm1(jnp.asarray(sigma2, float)) / d)


# Experiments.


@partial(jax.jit, static_argnames=("head_dim", "n", "points", "repeats"))
def fit_constants(
    head_dim: int,
    key: jax.Array,
    *,
    n: int = 1024,
    points: int = 25,
    repeats: int = 4,
    low: float = 0.08,
    high: float = 19.2,
) -> Constants:
    r"""The line that gives the log-variance of LLN for heads of another size.

    .. math::
        \operatorname{Var} \ln P \approx a T + b, \qquad
        T = \alpha^2 \sigma_q^2 + \beta^2 \sigma_k^2

    by least squares over a uniform grid of T, with normal queries and keys that have half of it
    each. Heads of 64 have the constants of the authors' code, to a few percent; the number of
    tokens matters little. The curve is not a line: above T = 20 it is steeper, and at 0 it is 0.

    Args:
      head_dim: Size of heads, d.
      key: PRNG key.
      n: Tokens of each simulated matrix.
      points: Values of T.
      repeats: Matrices of each.
      low: Smallest T.
      high: Largest T.

    Returns:
      a and b, float32 scalars.

    Example:
      >>> fit = fit_constants(64, jax.random.key(0), n=256)
      >>> print(f"{fit.a:.2f} {fit.b:.1f}")  # 0.1486 and -0.355 in the authors' code
      0.15 -0.3
    """
    totals = jnp.repeat(jnp.linspace(low, high, points), repeats)

    def log_variance(draw: tuple[jax.Array, jax.Array]) -> jax.Array:
        total, key = draw
        q, k = jnp.sqrt(total / 2.0) * jax.random.normal(key, (2, n, head_dim))
        return log_normal(log_attention(q, k, exp)).variance

    found = lax.map(log_variance, (totals, jax.random.split(key, len(totals))))
    off = totals - jnp.mean(totals)
    a = jnp.sum(off * found) / jnp.sum(off**2)
    return Constants(a, jnp.mean(found) - a * jnp.mean(totals))


def sweep(
    kernels: Mapping[str, Kernel],
    stds: Sequence[float],
    key: jax.Array,
    *,
    n: int = 512,
    d: int = 64,
    repeats: int = 1,
) -> list[SweepRow]:
    """Entropy and gap of kernels as normal queries and keys grow; the same draws, rescaled.

    Args:
      kernels: Kernels by name.
      stds: Standard deviations of both queries and keys.
      key: PRNG key.
      n: Tokens.
      d: Size of heads.
      repeats: Draws, of whose measures the medians are taken.

    Returns:
      A row for each kernel and each standard deviation.

    Example:
      >>> rows = sweep({"softmax": softmax}, [0.5, 1.5], jax.random.key(0), n=64)
      >>> rows[0].entropy > rows[1].entropy and rows[0].gap > rows[1].gap
      True
    """
    pairs = jax.random.normal(key, (repeats, 2, n, d))
    build = jax.jit(log_attention, static_argnums=2)
    return [
        _sweep_row(name, std, [build(q, k, kernel) for q, k in std * pairs])
        for name, kernel in kernels.items()
        for std in stds
    ]


def _sweep_row(name: str, std: float, log_ps: Sequence[jax.Array]) -> SweepRow:
    found = [measure(log_p) for log_p in log_ps]
    medians = np.median([[one.entropy, one.gap, one.log.variance] for one in found], 0)
    return SweepRow(name, std, 1.0 / std**2, *map(float, medians))


def draw_sweep(axes: Sequence["Axes"], rows: Sequence[SweepRow]) -> Sequence["Axes"]:
    """Draw entropy and gap of a :func:`sweep` by temperature on two axes, a curve per kernel."""
    for ax, measured, unit in zip(axes, ("entropy", "gap"), (", nats", ""), strict=True):
        for name in dict.fromkeys(row.kernel for row in rows):
            curve = [
                (row.temperature, getattr(row, measured)) for row in rows if row.kernel == name
            ]
            ax.plot(*zip(*curve, strict=True), ".-", label=name)
        ax.set_xscale("log", base=2)
        ax.set(xlabel="temperature", ylabel=measured + unit)
    return axes


def draw_log_normal(ax: "Axes", log_p: ArrayLike, label: str | None = None) -> "Axes":
    """Draw a histogram of ln P ``[..., n, m]``, and the normal of the same mean and variance."""
    values = np.asarray(log_p, float).ravel()
    values = values[np.isfinite(values)]
    mean, std = values.mean(), values.std()
    x = np.linspace(mean - 4.0 * std, mean + 4.0 * std, 201)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * np.sqrt(2.0 * np.pi))
    (line,) = ax.plot(x, density, label=label)
    look: dict[str, Any] = {"histtype": "stepfilled", "color": line.get_color(), "alpha": 0.3}
    ax.hist(values, 100, density=True, **look)
    ax.set(xlabel="ln P", ylabel="density")
    return ax


# Models.


class Recorder:
    """An ``attention_fn`` that passes everything on to another one and keeps what it was given.

    It has the other's signature, so that Flax gives it exactly what it would give that one: give a
    linen layer a Recorder of a linen function, an NNX layer of an NNX function, either of
    :func:`lnq.attention.attention_fn`.

    Attributes:
      calls: A :class:`Call` for each time a layer ran, in order.

    Args:
      attention_fn: The layer's own, such as ``flax.linen.dot_product_attention``.

    Raises:
      ValueError: When a layer runs under a transform: there is nothing to keep but tracers.

    Example:
      >>> from flax import linen as nn
      >>> recorder = Recorder(nn.dot_product_attention)
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=recorder)
      >>> x = jax.random.normal(jax.random.key(0), (1, 16, 8))
      >>> _, variables = layer.init_with_output(jax.random.key(1), x)
      >>> [call.q.shape for call in recorder.calls]  # 2 heads, 16 tokens, 8 / 2 features
      [(1, 2, 16, 4)]
    """

    def __init__(self, attention_fn: Callable[..., jax.Array]):
        self.attention_fn = attention_fn
        self.calls: list[Call] = []
        self.__signature__ = inspect.signature(attention_fn)

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, *args: Any, **options: Any
    ) -> jax.Array:
        """The other function's result; ``query [batch..., n, heads, d]`` and so on."""
        if isinstance(query, Tracer):
            raise ValueError(
                "query: it is traced, and a Recorder keeps arrays; run the model without `jit`, "
                "and layers of a scan one by one"
            )
        given = self.__signature__.bind(query, key, value, *args, **options).arguments
        self.calls.append(_as_call(query, key, given.get("mask"), given.get("is_causal", False)))
        return self.attention_fn(query, key, value, *args, **options)


def _as_call(query: jax.Array, key: jax.Array, mask: jax.Array | None, is_causal: bool) -> Call:
    key = jnp.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    q, k = (jnp.swapaxes(x, -2, -3) for x in (query, key))
    masks: list[ArrayLike] = [] if mask is None else [mask]
    if is_causal:
        masks.append(np.tri(q.shape[-2], k.shape[-2]))
    shape = *q.shape[:-1], k.shape[-2]
    seen = [jnp.broadcast_to(jnp.asarray(part, bool), shape) for part in masks]
    return Call(q, k, jnp.all(jnp.stack(seen), 0) if seen else None)
