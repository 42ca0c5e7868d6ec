r"""Linear Log-Normal attention: softmax's distribution and concentration in linear time.

.. math::
    o_i = \frac{\sum_j p_{ij} v_j}{\sum_j p_{ij}}, \qquad
    p_{ij} = \sum_m e^{\alpha q_{im} + \beta k_{jm}} = \phi(\alpha q_i)^\top \phi(\beta k_j)

The sums over keys do not depend on the query, so they are taken once: :math:`O(N d^2)` time and
:math:`O(N d)` memory. Softmax weights of Gaussian queries and keys are log-normal, with
log-variance :math:`\sigma_q^2 \sigma_k^2`; so are these, with log-variance
:math:`a(\alpha^2\sigma_q^2 + \beta^2\sigma_k^2) + b`. :func:`moment_match` makes the two equal.

Layout as in Flax: ``[..., length, heads, head_dim]``, any leading axes, fewer heads of keys and
values than of queries if these divide those. Everything is computed in float32 at least.

No epsilon is anywhere. Sums over keys are kept as :class:`State`, relative to the largest exponent
of each feature, and every query divides by its own largest one, so a denominator is at least 1
before what the mask forbids. States add up (:func:`merge`), which is how chunks, decoding and
shards of a sequence give the same result.

Source: Nahshan, Kampeas, Haleva, `Linear Log-Normal Attention with Unbiased Concentration
<https://arxiv.org/abs/2311.13541>`_, ICLR 2024, and its authors' released code.

Differs from the paper in: no epsilon; maxima of each feature and not of all; masks of keys apart
from causality, and padding is no part of statistics; packed segments; half precision is summed in
float32; alpha and beta per head, per example or given. Defaults are the paper's.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lnq.distortion import wide

__all__ = [
    "PUBLISHED",
    "Block",
    "State",
    "Stats",
    "check_axes",
    "combine",
    "constants",
    "deviations",
    "diagonal_attention",
    "extend",
    "extend_diagonal",
    "given_or_measured",
    "init_block",
    "init_state",
    "last_block_attention",
    "lln_attention",
    "lln_diag_attention",
    "merge",
    "moment_match",
    "quadratic_attention",
    "quadratic_diagonal_attention",
    "read",
    "scales",
    "step",
    "summarize",
]

Stats = Literal["global", "head", "example"]
"""What one standard deviation is of: everything, each head, or each head of each example."""

PUBLISHED = (0.14855178144710912, -0.35487039130661086)
"""a and b of the authors' code, which fit heads of size 64."""

FITTED = {
    16: (0.2086, -0.320),
    32: (0.1770, -0.346),
    64: (0.1488, -0.344),
    80: (0.1403, -0.340),
    96: (0.1332, -0.331),
    128: (0.1240, -0.325),
}
"""The same fit by :func:`lnq.attention.concentration.fit_constants`, for sizes of heads."""

FLOOR = -1e30
"""The exponent of a key that is not there; finite, so that differences are."""

NOWHERE = FLOOR / 2
"""The least maximum where some of them may not be there: their exponentials are 0 beside it."""


# How steep the exponentials are.


def constants(head_dim: int) -> tuple[float, float]:
    """a and b for a size of heads, between those of :data:`FITTED` by the logarithm of the size.

    Example:
      >>> constants(128), constants(32)
      ((0.124, -0.325), (0.177, -0.346))
    """
    sizes = np.log(list(FITTED))
    a, b = (
        np.interp(np.log(head_dim), sizes, column) for column in np.transpose(list(FITTED.values()))
    )
    return float(a), float(b)


def moment_match(
    s_q: ArrayLike, s_k: ArrayLike, a: float = PUBLISHED[0], b: float = PUBLISHED[1]
) -> tuple[jax.Array, jax.Array]:
    r"""alpha and beta that give the logarithm of the weights the variance they have in softmax.

    .. math:: \tilde s = \sqrt{(s_q^2 s_k^2 - b) / 2a}, \qquad
              \alpha = \tilde s / s_q, \quad \beta = \tilde s / s_k

    Args:
      s_q: Standard deviation of the queries, any shape.
      s_k: Of the keys. Where one is 0 nothing is to be matched, and its factor is 1.
      a: Slope of the log-variance.
      b: Its intercept, negative.

    Example:
      >>> alpha, beta = moment_match(0.5, 2.0)
      >>> print(f"{alpha:.3f} {beta:.4f}")
      4.271 1.0677

    References:
      Section on moment matching of the paper.
    """
    s_q, s_k = (wide(jnp.asarray(s)) for s in (s_q, s_k))
    s = jnp.sqrt((s_q**2 * s_k**2 - b) / (2.0 * a))
    alpha, beta = (
        jnp.where(own > 0.0, s / jnp.where(own > 0.0, own, 1.0), 1.0) for own in (s_q, s_k)
    )
    return alpha, beta


def scales(
    q: jax.Array,
    k: jax.Array,
    *,
    stats: Stats = "global",
    query_mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    constants: tuple[float, float] = PUBLISHED,
) -> tuple[jax.Array, jax.Array]:
    """alpha and beta from the queries and keys themselves; no gradient flows through them.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., m, g, d]``; g divides h.
      stats: What one deviation is of, see :data:`Stats`.
      query_mask: Which queries are real, ``[..., n]``.
      key_mask: Which keys are real, ``[..., m]``.
      constants: a and b.

    Returns:
      For :func:`lln_attention`: ``[..., 1, g, 1]`` with sizes of 1 where one deviation serves.

    Example:
      >>> q = jnp.array([[[1.0]], [[-1.0]]]) / 2**0.5  # standard deviation 1
      >>> alpha, beta = scales(q, 2.0 * q)
      >>> print(alpha.shape, float(alpha[0, 0, 0] / beta[0, 0, 0]))
      (1, 1, 1) 2.0
    """
    found = deviations(q, k, stats=stats, query_mask=query_mask, key_mask=key_mask)
    return moment_match(*found, *constants)


def deviations(
    q: jax.Array,
    k: jax.Array,
    *,
    stats: Stats = "global",
    query_mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Standard deviations of queries and keys, ``[..., 1, g, 1]``, as :func:`scales` takes them."""
    if stats not in get_args(Stats):
        raise ValueError(f"stats: must be one of {', '.join(get_args(Stats))}, not {stats!r}")
    heads, groups = q.shape[-2], k.shape[-2]
    q = q.reshape(*q.shape[:-2], groups, heads // groups * q.shape[-1])
    q, k = lax.stop_gradient((q, k))
    return _deviation(q, query_mask, stats), _deviation(k, key_mask, stats)


def _deviation(x: jax.Array, mask: jax.Array | None, stats: Stats) -> jax.Array:
    """Unbiased, of real tokens; axes stay, with size 1 or 0 of them reduced."""
    x = wide(x)
    axes = {
        "global": tuple(range(x.ndim)),
        "head": tuple(i for i in range(x.ndim) if i != x.ndim - 2),
        "example": (x.ndim - 3, x.ndim - 1),
    }[stats]
    x, real = _zeroed(x, mask), _zeroed(jnp.ones_like(x), mask)
    most = jnp.max(x, axes, keepdims=True, initial=FLOOR, where=real > 0.0)
    x = _zeroed(x - most, mask)  # so that constants become 0
    count = real.sum(axes, keepdims=True)
    mean = (real * x).sum(axes, keepdims=True) / jnp.maximum(count, 1.0)
    square = (real * (x - mean) ** 2).sum(axes, keepdims=True)
    return jnp.sqrt(square / jnp.maximum(count - 1.0, 1.0))


# Sums over keys.


class State(NamedTuple):
    """Sums over keys, all that a query needs to know of them.

    Attributes:
      peak: The largest exponent of each feature, ``[..., g, d]``.
      sums: Of each feature times the values, and of the feature, relative to that,
        ``[..., g, d, e + 1]``.
    """

    peak: jax.Array
    sums: jax.Array


def init_state(
    batch: Sequence[int], heads: int, head_dim: int, value_dim: int | None = None
) -> State:
    """No keys yet.

    Args:
      batch: Leading axes.
      heads: Of keys and values.
      head_dim: Size of a key.
      value_dim: Size of a value; by default the same.
    """
    shape = (*batch, heads, head_dim)
    value_dim = head_dim if value_dim is None else value_dim
    return State(jnp.full(shape, FLOOR), jnp.zeros((*shape, value_dim + 1)))


def summarize(
    k: jax.Array, v: jax.Array, *, beta: ArrayLike, key_mask: jax.Array | None = None
) -> State:
    """The state of some keys and their values.

    Args:
      k: ``[..., m, g, d]``.
      v: ``[..., m, g, e]``.
      beta: Broadcasts against k.
      key_mask: Which keys count, ``[..., m]``.

    Example:
      >>> state = summarize(jnp.zeros((3, 1, 2)), jnp.ones((3, 1, 1)), beta=2.0)
      >>> state.sums[0, 0]  # the sum of three values of 1, and of three weights
      Array([3., 3.], dtype=float32)
    """
    real = _tokens(k, key_mask, None).real
    k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    y, v = (jnp.swapaxes(a, -3, -2) for a in (wide(k) * beta, _with_ones(v)))
    return _state(y + _gone(real[..., None, :, None]), v)


def _state(y: jax.Array, v: jax.Array) -> State:
    """Of exponents ``[..., g, m, d]`` and values with ones ``[..., g, m, e + 1]``."""
    peak = lax.stop_gradient(jnp.max(y, -2, initial=NOWHERE))
    return State(peak, jnp.einsum("...md,...me->...de", jnp.exp(y - peak[..., None, :]), v))


def _gone(seen: jax.Array) -> jax.Array:
    """What to add to exponents that only some may see; vectorizes where a choice would not."""
    return jnp.where(seen, 0.0, FLOOR)


def merge(a: State, b: State) -> State:
    """The state of the keys of both."""
    peak = lax.stop_gradient(jnp.maximum(a.peak, b.peak))
    sums = [s.sums * jnp.exp(s.peak - peak)[..., None] for s in (a, b)]
    return State(peak, sums[0] + sums[1])


class _Part(NamedTuple):
    """Weighted sums of values and of ones, relative to the exponential of ``top``."""

    top: jax.Array
    sums: jax.Array


def _read(state: State, x: jax.Array) -> _Part:
    """What queries with exponents ``[..., g, r, n, d]`` find."""
    x = x + state.peak[..., None, None, :]
    top = lax.stop_gradient(jnp.max(x, -1, keepdims=True))
    return _Part(top, jnp.einsum("...grnd,...gde->...grne", jnp.exp(x - top), state.sums))


def _join(a: _Part, b: _Part) -> _Part:
    top = jnp.maximum(a.top, b.top)
    return _Part(top, a.sums * jnp.exp(a.top - top) + b.sums * jnp.exp(b.top - top))


def _mean(part: _Part) -> jax.Array:
    """Mean value ``[..., g, r, n, e]``; without any key 0."""
    total = part.sums[..., -1:]
    return part.sums[..., :-1] / jnp.where(total > 0.0, total, 1.0)


def read(state: State, q: jax.Array, *, alpha: ArrayLike) -> jax.Array:
    """Attention of queries to all keys of a state.

    Args:
      state: From :func:`summarize`, :func:`extend` or :func:`merge`.
      q: ``[..., n, h, d]``; the heads of the state divide h.
      alpha: As from :func:`scales`.

    Returns:
      ``[..., n, h, e]``, in float32 at least; 0 where there is no key.
    """
    x = _heads_first(_queries(q, alpha, state.peak.shape[-2]))
    return _flat_heads(_length_first(_mean(_read(state, x))))


def extend(
    state: State,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    alpha: ArrayLike,
    beta: ArrayLike,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    chunk_size: int = 32,
) -> tuple[jax.Array, State]:
    """Causal attention to the keys of a state and to new ones, and the state of them all.

    Earlier chunks are states; within a chunk halves of halves meet, each with maxima of its own.
    The backward pass starts from the states between chunks and computes all else again.

    Args:
      state: Keys so far, all before these; :func:`init_state` for none.
      q: ``[..., n, h, d]``.
      k: ``[..., n, g, d]``; g divides h.
      v: ``[..., n, g, e]``.
      alpha: A number, or ``[..., 1, g, 1]`` as from :func:`scales`.
      beta: Likewise.
      key_mask: Which keys count, ``[..., n]``.
      segment_ids: A query meets keys of its own segment only, ``[..., n]``, each segment in one
        piece; ``state`` belongs to the first.
      chunk_size: Tokens in a chunk, at least; a power of 2 is taken. A matter of speed and memory
        only.

    Returns:
      ``[..., n, h, e]``, in float32 at least, and the state (of the last segment).

    Raises:
      ValueError: If axes do not fit.

    Example:
      >>> k = jax.random.normal(jax.random.key(0), (5, 1, 4))
      >>> start = init_state((), 1, 4)
      >>> whole, _ = extend(start, k, k, k, alpha=2.0, beta=2.0)
      >>> first, state = extend(start, k[:3], k[:3], k[:3], alpha=2.0, beta=2.0)
      >>> last, _ = extend(state, k[3:], k[3:], k[3:], alpha=2.0, beta=2.0)
      >>> bool(jnp.allclose(whole, jnp.concatenate([first, last]), atol=1e-6))
      True
    """
    check_axes(q, k, v, same_length=True)
    tokens = _tokens(k, key_mask, segment_ids)
    k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    out, state = _causal(state, q, k, v, alpha, beta, tokens, chunk_size)
    return _flat_heads(out), state


def step(
    state: State,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    alpha: ArrayLike,
    beta: ArrayLike,
) -> tuple[jax.Array, State]:
    """One token: :func:`extend` by ``q [..., h, d]``, ``k [..., g, d]`` and ``v [..., g, e]``.

    alpha and beta are as there, ``[..., 1, g, 1]`` if they are no numbers.
    """
    q, k, v = (x[..., None, :, :] for x in (q, k, v))
    new = summarize(k, v, beta=beta)
    state = merge(State(*(a.astype(new.peak.dtype) for a in state)), new)
    return read(state, q, alpha=alpha)[..., 0, :, :], state


class _Tokens(NamedTuple):
    """What keys are beside numbers: whether they count, and any segment, ``[..., m]``."""

    real: jax.Array
    segment: jax.Array | None


def _tokens(k: jax.Array, key_mask: jax.Array | None, segment_ids: jax.Array | None) -> _Tokens:
    real = jnp.ones((), bool) if key_mask is None else jnp.asarray(key_mask, bool)
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    tokens = _Tokens(real, ids)
    for name, a in zip(("key_mask", "segment_ids"), tokens, strict=True):
        if a is not None and a.ndim and a.shape != k.shape[:-2]:
            raise ValueError(f"{name}: must be [..., length] {k.shape[:-2]}, not {a.shape}")
    return jax.tree.map(partial(jnp.broadcast_to, shape=k.shape[:-2]), tokens)


def _zeroed(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Without what stands in padding, ``[..., n, h, d]`` by ``[..., n]``."""
    if mask is None:
        return x
    return jnp.where(jnp.asarray(mask, bool)[..., None, None], x, jnp.zeros((), x.dtype))


def _causal(
    state: State,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: ArrayLike,
    beta: ArrayLike,
    tokens: _Tokens,
    chunk_size: int,
    *,
    finish: Callable[[_Part], Any] = _mean,
    strict: bool = False,
) -> tuple[Any, State]:
    """What ``finish`` makes of the keys up to each query, or before it, ``[..., n, g, r, e]``."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size: must be at least 1, not {chunk_size}")
    size = k.shape[-3]
    x, y, v = _queries(q, alpha, k.shape[-2]), wide(k) * beta, _with_ones(v)
    state = State(*(a.astype(y.dtype) for a in state))

    def done(part: _Part) -> Any:
        return jax.tree.map(_length_first, finish(part))

    if not size:
        return done(_read(state, _heads_first(x))), state
    chunk = 2 ** (min(chunk_size, size) - 1).bit_length()
    x, y, v = (_cut(a, axis, chunk) for a, axis in ((x, -4), (y, -3), (v, -3)))
    real, ids = _cut(tokens.real, -1, chunk), tokens.segment
    begun = None if ids is None else ids[..., :1, None, None]
    ids = None if ids is None else _cut(ids, -1, chunk, mode="edge")[..., None, :, None]

    @jax.checkpoint
    def turn(carry: tuple[State, Any], chunk: tuple[Any, ...]) -> Any:
        (state, begun), (x, y, v, real, ids) = carry, chunk
        x, y, v = _heads_first(x), jnp.swapaxes(y, -3, -2), jnp.swapaxes(v, -3, -2)
        y = y + _gone(real[..., None, :, None])
        near, far, kept = _within(x, y, v, ids, strict), _read(state, x), y
        if ids is not None:
            last = ids[..., -1:, :]
            far = _Part(far.top + _gone(ids == begun)[..., None, :, :], far.sums)
            state = State(state.peak + _gone(begun == last)[..., 0], state.sums)
            begun, kept = last, y + _gone(ids == last)
        return (merge(state, _state(kept, v)), begun), done(_join(far, near))

    (state, _), part = lax.scan(turn, (state, begun), (x, y, v, real, ids))
    return jax.tree.map(partial(_whole, size=size), part), state


def _within(x: jax.Array, y: jax.Array, v: jax.Array, ids: jax.Array | None, strict: bool) -> _Part:
    """Sums over the keys of a chunk of 2^i tokens up to each query, or before it.

    A token meets itself, the second of two the first, the second two of four the first two: a
    query sees all the keys that a maximum is of, or none, and later ones touch no bit of it.
    """
    own = x + (FLOOR if strict else y[..., None, :, :])
    top, meetings = own.max(-1, keepdims=True), []
    for half in (2**i for i in range(x.shape[-2].bit_length() - 1)):
        first, second = _halves(y, half)[0], _halves(x, half)[1]
        if ids is not None:
            before, after = _halves(ids, half)
            border = before[..., -1:, :]
            first = first + _gone(before == border)
            second = second + _gone(after == border)[..., None, :, :, :]
        peak = lax.stop_gradient(first.max(-2, keepdims=True, initial=NOWHERE))
        second = second + peak[..., None, :, :, :]
        highest = second.max(-1, keepdims=True)
        highest = jnp.stack([jnp.full_like(highest, FLOOR), highest], -3)
        top = jnp.maximum(top, highest.reshape(top.shape))
        meetings.append((half, second, first - peak))
    top = lax.stop_gradient(jnp.maximum(top, NOWHERE))
    weights = jnp.exp(own - top).sum(-1)[..., None, None]  # [..., g, r, n, 1, 1]
    for half, second, first in meetings:
        second = jnp.exp(second - _halves(top, half)[1])
        new = jnp.einsum("...grbnd,...gbmd->...grbnm", second, jnp.exp(first))
        a, b = weights[..., ::2, :, :], weights[..., 1::2, :, :]
        weights = jnp.block([[a, jnp.zeros_like(new)], [new, b]])
    return _Part(top, jnp.einsum("...grnm,...gme->...grne", weights[..., 0, :, :], v))


def _halves(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    """Of ``[..., n, d]`` every first and every second block, ``[..., b, half, d]``."""
    x = x.reshape(*x.shape[:-2], x.shape[-2] // (2 * half), 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _heads_first(x: jax.Array) -> jax.Array:
    """``[..., n, g, r, d]`` as ``[..., g, r, n, d]``, in which products are fast."""
    return jnp.moveaxis(x, -4, -2)


def _length_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -2, -4)


def _queries(q: jax.Array, alpha: ArrayLike, groups: int) -> jax.Array:
    """Exponents ``[..., n, g, r, d]``."""
    heads, size = q.shape[-2:]
    return wide(q).reshape(*q.shape[:-2], groups, heads // groups, size) * _for_groups(alpha)


def _scaled(q: jax.Array, groups: int) -> jax.Array:
    """As softmax takes them."""
    return _queries(q, q.shape[-1] ** -0.5, groups)


def _for_groups(alpha: ArrayLike) -> ArrayLike:
    return alpha if jnp.ndim(alpha) == 0 else jnp.expand_dims(jnp.asarray(alpha), -2)


def _flat_heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


def _with_ones(v: jax.Array) -> jax.Array:
    v = wide(v)
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _cut(x: jax.Array, axis: int, chunk: int, mode: str = "constant") -> jax.Array:
    """The axis as ``[chunks, chunk]``, chunks in front; padded."""
    axis += x.ndim
    pad = [(0, -x.shape[axis] % chunk if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, pad, mode=mode)
    x = x.reshape(*x.shape[:axis], x.shape[axis] // chunk, chunk, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _whole(x: jax.Array, size: int) -> jax.Array:
    """Undo that, for ``[c, ..., chunk, g, r, e]``."""
    x = jnp.moveaxis(x, 0, -5)
    x = x.reshape(*x.shape[:-5], x.shape[-5] * x.shape[-4], *x.shape[-3:])
    return x[..., :size, :, :, :]


# Attention.


def lln_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    query_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    stats: Stats = "global",
    constants: tuple[float, float] = PUBLISHED,
    chunk_size: int = 32,
) -> jax.Array:
    """Linear Log-Normal attention.

    With alpha and beta from the data (the default, as published) a token's output depends on all
    tokens that these are measured on, also later ones. To be causal in truth, give both.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., m, g, d]``; g divides h.
      v: ``[..., m, g, e]``.
      causal: Whether a token sees itself and what is before it only; n = m then.
      key_mask: Which keys count, ``[..., m]``; others change nothing, whatever is in them.
      query_mask: Which queries count in the statistics, ``[..., n]``; by default the same as keys
        if there are as many.
      segment_ids: Tokens see tokens of their own segment only, ``[..., n]``, each segment in one
        piece; n = m then.
      alpha: Steepness of the queries; a number, or as from :func:`scales`. None measures.
      beta: Of the keys, likewise; both or none.
      stats: What they are measured over, see :data:`Stats`.
      constants: a and b; :func:`constants` has them for other sizes of heads.
      chunk_size: As in :func:`extend`.

    Returns:
      ``[..., n, h, e]``, dtype of v; 0 for a query that sees no key.

    Raises:
      ValueError: If axes do not fit, or only one of alpha and beta is given.

    Example:
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 100, 2, 8))
      >>> out = lln_attention(q, k, jnp.ones_like(v))  # weights add up to 1
      >>> out.shape, bool(jnp.allclose(out, 1.0))
      ((100, 2, 8), True)

    References:
      Section on LLN attention of the paper.
    """
    check_axes(q, k, v, same_length=causal or segment_ids is not None)
    tokens = _tokens(k, key_mask, segment_ids)
    k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    alpha, beta = given_or_measured(
        q,
        k,
        alpha,
        beta,
        stats=stats,
        constants=constants,
        query_mask=query_mask,
        key_mask=key_mask,
    )
    if causal:
        out = _flat_heads(_from_start(q, k, v, alpha, beta, tokens, chunk_size))
    elif segment_ids is not None:
        out = _flat_heads(_from_both_ends(q, k, v, alpha, beta, tokens, chunk_size))
    else:
        out = read(summarize(k, v, beta=beta, key_mask=key_mask), q, alpha=alpha)
    return out.astype(v.dtype)


def _from_start(q: jax.Array, k: jax.Array, v: jax.Array, *args: Any, **options: Any) -> Any:
    start = init_state(k.shape[:-3], k.shape[-2], k.shape[-1], v.shape[-1])
    return _causal(start, q, k, v, *args, **options)[0]


def _from_both_ends(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: Any,
    beta: Any,
    tokens: _Tokens,
    chunk_size: int,
) -> jax.Array:
    """The keys up to each query and the keys behind it."""
    sums: Any = {"finish": lambda part: part}
    up_to = _from_start(q, k, v, alpha, beta, tokens, chunk_size, **sums)
    q, k, v = (jnp.flip(a, -3) for a in (q, k, v))
    tokens = jax.tree.map(partial(jnp.flip, axis=-1), tokens)
    behind = _from_start(q, k, v, alpha, beta, tokens, chunk_size, strict=True, **sums)
    return _mean(_join(up_to, _Part(*(jnp.flip(a, -4) for a in behind))))


def diagonal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_size: int | None = None,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention within consecutive blocks; the last one may be shorter.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., n, g, d]``; g divides h.
      v: ``[..., n, g, e]``.
      block_size: Tokens of a block; by default d, as published.
      causal: As in :func:`lln_attention`.
      key_mask: Likewise.
      segment_ids: Likewise; need not be in one piece.

    Returns:
      ``[..., n, h, e]``, dtype of v; 0 for a query that sees no key.

    Raises:
      ValueError: If axes do not fit.

    Example:
      >>> v = jnp.array([1.0, 3.0, 7.0])[:, None, None]
      >>> diagonal_attention(jnp.zeros((3, 1, 1)), jnp.zeros((3, 1, 1)), v, block_size=2).ravel()
      Array([2., 2., 7.], dtype=float32)

    References:
      Section on LLN+Diag of the paper.
    """
    check_axes(q, k, v, same_length=True)
    size, tokens = q.shape[-3], _tokens(k, key_mask, segment_ids)
    k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    block = max(1, min(_block_size(block_size, q), size))
    x = _scaled(q, k.shape[-2])
    x, y, w = (_cut(a, i, block) for a, i in ((x, -4), (wide(k), -3), (wide(v), -3)))
    real = _cut(tokens.real, -1, block)
    seen = jnp.broadcast_to(real[..., None, :], (*real.shape, block))
    if tokens.segment is not None:
        ids = _cut(tokens.segment, -1, block)
        seen &= ids[..., :, None] == ids[..., None, :]
    if causal:
        seen &= jnp.broadcast_to(jnp.tri(block, dtype=bool), seen.shape)
    out = _softmax(x, y, w, seen[..., None, None, :, :])
    return _flat_heads(_whole(out, size)).astype(v.dtype)


def _block_size(given: int | None, q: jax.Array) -> int:
    block = q.shape[-1] if given is None else given
    if block < 1:
        raise ValueError(f"block_size: must be at least 1, not {block}")
    return block


def _softmax(x: jax.Array, y: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """``[..., n, g, r, e]`` from scaled queries, keys, values and who sees whom ``[..., n, m]``."""
    logits = jnp.einsum("...ngrd,...mgd->...grnm", x, y)
    logits = jnp.where(seen, logits, FLOOR)
    top = lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.where(seen, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0.0, total, 1.0)
    return jnp.einsum("...grnm,...mge->...ngre", weights, v)


def lln_diag_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    weights: tuple[ArrayLike, ArrayLike] = (0.5, 0.5),
    block_size: int | None = None,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """LLN attention for what is far, softmax within blocks for what is near.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., n, g, d]``; g divides h.
      v: ``[..., n, g, e]``.
      weights: Of the two, numbers or ``[h, e]``: (1/2, 1/2) is the published average, (r, p) its
        learnable scale, (r, 1 - r) its learnable ratio.
      block_size: As in :func:`diagonal_attention`.
      causal: As in :func:`lln_attention`.
      key_mask: Likewise.
      segment_ids: Likewise.
      **options: Others of :func:`lln_attention`.

    Returns:
      ``[..., n, h, e]``, dtype of v.

    Raises:
      ValueError: If axes do not fit.

    References:
      Section on LLN+Diag of the paper.
    """
    given: Any = {"causal": causal, "key_mask": key_mask, "segment_ids": segment_ids}
    near = diagonal_attention(q, k, v, block_size=block_size, **given)
    far = lln_attention(q, k, v, **given, **options)
    return combine(far, near, weights).astype(v.dtype)


def combine(far: jax.Array, near: jax.Array, weights: tuple[ArrayLike, ArrayLike]) -> jax.Array:
    """Two outputs ``[..., n, h, e]`` as :func:`lln_diag_attention` weighs them; float32 or more."""
    parts = [wide(out) * _per_head(w, out) for w, out in zip(weights, (far, near), strict=True)]
    return parts[0] + parts[1]


def _per_head(weight: ArrayLike, out: jax.Array) -> ArrayLike:
    if jnp.ndim(weight) == 0:
        return weight
    return jnp.reshape(weight, (1,) * (out.ndim - 2) + jnp.shape(weight))


def quadratic_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: jax.Array | None = None,
    alpha: ArrayLike,
    beta: ArrayLike,
) -> jax.Array:
    """The same with every weight written out: for any mask, in quadratic time and memory.

    A query that may only see keys whose exponentials are e^80 below the largest sees none.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., m, g, d]``; g divides h.
      v: ``[..., m, g, e]``.
      mask: Which query sees which key, to broadcast to ``[..., h, n, m]``.
      alpha: A number, or as from :func:`scales`.
      beta: Likewise.

    Returns:
      ``[..., n, h, e]``, in float32 at least; 0 for a query that sees no key.
    """
    seen = _by_heads(jnp.ones((), bool) if mask is None else mask, q, k)
    used = _used(seen)
    k, v = _of_used(k, used), _of_used(v, used)
    x, y = _queries(q, alpha, k.shape[-2]), jnp.where(used, wide(k) * beta, FLOOR)
    peak = lax.stop_gradient(y.max(-3, keepdims=True, initial=FLOOR))
    x = x + peak[..., None, :]
    x = x - lax.stop_gradient(x.max(-1, keepdims=True))
    weights = jnp.einsum("...ngrd,...mgd->...grnm", jnp.exp(x), jnp.exp(y - peak))
    weights = jnp.where(seen, weights, 0.0)
    sums = jnp.einsum("...grnm,...mge->...ngre", weights, _with_ones(v))
    return _flat_heads(_mean(_Part(jnp.zeros(()), sums)))


def quadratic_diagonal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array, block_size: int | None = None
) -> jax.Array:
    """:func:`diagonal_attention` under any mask, in quadratic time and memory.

    Args:
      q: ``[..., n, h, d]``.
      k: ``[..., n, g, d]``; g divides h.
      v: ``[..., n, g, e]``.
      mask: Which query sees which key of its block, to broadcast to ``[..., h, n, n]``.
      block_size: By default d.

    Returns:
      ``[..., n, h, e]``, in float32 at least; 0 for a query that sees no key.
    """
    block = np.arange(q.shape[-3]) // _block_size(block_size, q)
    seen = _by_heads(mask, q, k)
    seen &= jnp.broadcast_to(jnp.asarray(block[:, None] == block), seen.shape)
    k, v = _of_used(k, _used(seen)), _of_used(v, _used(seen))
    x = _scaled(q, k.shape[-2])
    return _flat_heads(_softmax(x, wide(k), wide(v), seen))


def _by_heads(mask: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """A mask ``[..., h, n, m]`` as ``[..., g, r, n, m]``."""
    shape = *q.shape[:-3], q.shape[-2], q.shape[-3], k.shape[-3]
    mask = jnp.broadcast_to(mask, shape).astype(bool)
    groups = k.shape[-2]
    return mask.reshape(*q.shape[:-3], groups, q.shape[-2] // groups, *shape[-2:])


def _used(seen: jax.Array) -> jax.Array:
    """Which keys anybody sees, ``[..., m, g, 1]``."""
    return jnp.swapaxes(seen.any((-3, -2)), -1, -2)[..., None]


def _of_used(x: jax.Array, used: jax.Array) -> jax.Array:
    return jnp.where(used, x, jnp.zeros((), x.dtype))


# Decoding, a block of softmax at a time.


class Block(NamedTuple):
    """Keys and values of the block that is being filled, all that its softmax needs.

    Attributes:
      k: ``[..., b, g, d]``.
      v: ``[..., b, g, e]``.
      length: Tokens so far, of all blocks; a number.
    """

    k: jax.Array
    v: jax.Array
    length: jax.Array


def init_block(
    batch: Sequence[int],
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    block_size: int | None = None,
) -> Block:
    """No tokens yet; ``block_size`` is by default ``head_dim``."""
    shape = (*batch, head_dim if block_size is None else block_size, heads)
    value_dim = head_dim if value_dim is None else value_dim
    k, v = jnp.zeros((*shape, head_dim)), jnp.zeros((*shape, value_dim))
    return Block(k, v, jnp.zeros((), jnp.int32))


def extend_diagonal(
    block: Block, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, Block]:
    """Causal :func:`diagonal_attention` of tokens that follow those of a block.

    Args:
      block: From :func:`init_block` or this.
      q: ``[..., n, h, d]``.
      k: ``[..., n, g, d]``; g divides h.
      v: ``[..., n, g, e]``.

    Returns:
      ``[..., n, h, e]``, in float32 at least, and the block as it is then.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (7, 1, 4))
      >>> out, block = extend_diagonal(init_block((), 1, 4, block_size=3), x[:5], x[:5], x[:5])
      >>> last, _ = extend_diagonal(block, x[5:], x[5:], x[5:])
      >>> whole = diagonal_attention(x, x, x, block_size=3, causal=True)
      >>> bool(jnp.allclose(jnp.concatenate([out, last]), whole, atol=1e-6))
      True
    """
    size, new = block.k.shape[-3], k.shape[-3]
    room, begin = -(-(size - 1 + new) // size) * size, block.length % size

    def placed(old: jax.Array, x: jax.Array) -> jax.Array:
        pad = [(0, room - old.shape[-3] if i == x.ndim - 3 else 0) for i in range(x.ndim)]
        x = wide(x)
        return lax.dynamic_update_slice_in_dim(jnp.pad(old, pad).astype(x.dtype), x, begin, -3)

    k, v = placed(block.k, k), placed(block.v, v)
    if new == 1:
        seen = jnp.arange(size) <= begin
        x = _scaled(q, k.shape[-2])
        seen = jnp.broadcast_to(seen, (*x.shape[:-4], 1, 1, 1, size))
        out = _flat_heads(_softmax(x, k, v, seen))
    else:
        queries = placed(jnp.zeros((*q.shape[:-3], size, *q.shape[-2:])), q)
        out = diagonal_attention(queries, k, v, block_size=size, causal=True)
        out = lax.dynamic_slice_in_dim(out, begin, new, -3)
    at = (begin + new) // size * size  # may be the end: then all of it is over
    k, v = (lax.dynamic_slice_in_dim(x, jnp.minimum(at, room - size), size, -3) for x in (k, v))
    return out, Block(k, v, block.length + new)


def last_block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    block_size: int | None = None,
) -> jax.Array:
    """What :func:`diagonal_attention` gives the newest token, out of a cache of all keys.

    Args:
      q: Of the token, ``[..., 1, h, d]``.
      k: ``[..., m, g, d]``; g divides h.
      v: ``[..., m, g, e]``.
      key_mask: Which keys count, ``[..., m]``; the last of them is the token's own.
      block_size: By default d.

    Returns:
      ``[..., 1, h, e]``, in float32 at least.
    """
    real = _tokens(k, key_mask, None).real
    k, v = _zeroed(k, key_mask), _zeroed(v, key_mask)
    at = jnp.broadcast_to(jnp.arange(k.shape[-3]), real.shape)
    last = jnp.max(jnp.where(real, at, 0), -1, keepdims=True)
    size = _block_size(block_size, q)
    seen = (real & (at // size == last // size))[..., None, None, None, :]
    x = _scaled(q, k.shape[-2])
    return _flat_heads(_softmax(x, wide(k), wide(v), seen))


# Checks.


def given_or_measured(
    q: jax.Array,
    k: jax.Array,
    alpha: ArrayLike | None,
    beta: ArrayLike | None,
    *,
    stats: Stats = "global",
    constants: tuple[float, float] = PUBLISHED,
    query_mask: jax.Array | None = None,
    key_mask: jax.Array | None = None,
) -> tuple[ArrayLike, ArrayLike]:
    """alpha and beta as they are, or from :func:`scales` if both are None.

    Raises:
      ValueError: If one of the two is None.
    """
    if alpha is not None and beta is not None:
        return alpha, beta
    if alpha is not None or beta is not None:
        raise ValueError("alpha, beta: give both, or none to measure them")
    if query_mask is None and q.shape[-3] == k.shape[-3]:
        query_mask = key_mask
    masks: Any = {"query_mask": query_mask, "key_mask": key_mask}
    return scales(q, k, stats=stats, constants=constants, **masks)


def check_axes(q: jax.Array, k: jax.Array, v: jax.Array, *, same_length: bool = False) -> None:
    """Raise a ValueError unless the axes fit together."""
    if min(q.ndim, k.ndim, v.ndim) < 3 or not q.ndim == k.ndim == v.ndim:
        raise ValueError(
            f"q, k, v: must be [..., length, heads, head_dim] with as many axes each, not "
            f"{q.shape}, {k.shape}, {v.shape}; split the last axis into heads first"
        )
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v: {v.shape} must have length and heads of k: {k.shape}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k: axis -1, the size of a head, is {k.shape[-1]}; q has {q.shape[-1]}")
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"k: leading axes {k.shape[:-3]} must be those of q: {q.shape[:-3]}")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"k: axis -2, {k.shape[-2]} heads, must divide q's {q.shape[-2]} heads")
    if same_length and q.shape[-3] != k.shape[-3]:
        raise ValueError(
            f"k: axis -3, length {k.shape[-3]}, must be q's {q.shape[-3]} where order or place "
            "count (causal, segment_ids, blocks)"
        )
