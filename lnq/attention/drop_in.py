"""An ``attention_fn`` for Flax: LLN+Diag or LLN attention in place of softmax, in one line.

``nn.MultiHeadDotProductAttention(..., attention_fn=attention_fn)`` in linen, the same with
``nnx.MultiHeadAttention``; options by :func:`functools.partial`. Parameters are those of softmax,
so a checkpoint fits.

What linear time cannot do is done exactly in quadratic time, or is an error; nothing is dropped:

* a mask of all queries alike, ``[..., 1, 1, m]``, is a mask of keys and stays linear;
* any other mask takes the quadratic form (``quadratic=False`` makes it an error);
* for a causal model give ``is_causal=True``, not a mask, and alpha and beta;
* one query against many keys is a step of decoding: linear, and needs alpha and beta;
* biases of weights, dropout of weights and einsum overrides are errors.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import and_
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from lnq.attention import lln
from lnq.attention.lln import PUBLISHED, Stats

__all__ = ["attention_fn"]


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: DTypeLike | None = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., Any] | None = None,
    qk_attn_weights_einsum: Callable[..., Any] | None = None,
    attn_weights_value_einsum: Callable[..., Any] | None = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    diagonal: bool = True,
    key_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    alpha: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    stats: Stats = "global",
    constants: tuple[float, float] = PUBLISHED,
    weights: tuple[ArrayLike, ArrayLike] = (0.5, 0.5),
    block_size: int | None = None,
    chunk_size: int = 32,
    quadratic: bool = True,
) -> jax.Array:
    """LLN+Diag attention (or LLN attention alone) with the arguments of Flax's own.

    Args:
      query: ``[..., n, h, d]``.
      key: ``[..., m, g, d]``; g divides h.
      value: ``[..., m, g, e]``.
      bias: Must be None.
      mask: To broadcast to ``[..., h, n, m]``; see the module.
      broadcast_dropout: Not used.
      dropout_rng: Not used.
      dropout_rate: Must be 0 unless deterministic.
      deterministic: Whether there is no dropout.
      dtype: Of queries, keys, values and the result; by default as they are.
      precision: Of the products, a :class:`jax.lax.Precision`, its name, or two that are equal.
      module: Sows the weights ``[..., h, n, m]`` as "attention_weights", in quadratic time.
      force_fp32_for_softmax: Not used: it always is.
      einsum_dot_general: Must be None.
      qk_attn_weights_einsum: Must be None.
      attn_weights_value_einsum: Must be None.
      promote_dtype: Used as in Flax.
      is_causal: Whether a token sees itself and what is before it only.
      diagonal: Whether softmax within blocks is added.
      key_mask: Which keys count, ``[..., m]``.
      segment_ids: As in :func:`~lnq.attention.lln.lln_attention`.
      alpha: As there.
      beta: As there.
      stats: As there.
      constants: As there.
      weights: As in :func:`~lnq.attention.lln.lln_diag_attention`.
      block_size: As there.
      chunk_size: As there.
      quadratic: Whether a mask of queries and keys may take the quadratic form.

    Returns:
      ``[..., n, h, e]``; 0 for a query that sees no key, where Flax has the mean of all values.

    Raises:
      ValueError: If something cannot be honoured, or axes do not fit.

    Example:
      >>> from flax import linen as nn
      >>> model = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn)
      >>> x = jax.random.normal(jax.random.key(0), (1, 30, 8))
      >>> variables = model.init(jax.random.key(1), x)  # those of softmax
      >>> real = jnp.arange(30) < 20
      >>> out = model.apply(variables, x, mask=real[None, None, None])
      >>> bool(jnp.allclose(out[:, :20], model.apply(variables, x[:, :20]), atol=1e-5))
      True
    """
    _refuse(
        bias=bias is not None,
        dropout_rate=dropout_rate > 0.0 and not deterministic,
        einsum_dot_general=einsum_dot_general is not None,
        qk_attn_weights_einsum=qk_attn_weights_einsum is not None,
        attn_weights_value_einsum=attn_weights_value_einsum is not None,
    )
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    elif dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    decoding = query.shape[-3] == 1 < key.shape[-3]
    ordered = diagonal or is_causal or segment_ids is not None
    lln.check_axes(query, key, value, same_length=ordered and not decoding)
    key_mask, mask = _keys_only(mask, key_mask, query, key)
    _refuse(
        alpha=decoding and alpha is None,
        segment_ids=decoding and segment_ids is not None,
        mask=mask is not None and (not quadratic or (decoding and diagonal)),
        weights=module is not None and diagonal and any(map(jnp.ndim, weights)),
    )
    order: Any = {"causal": is_causal and not decoding, "segment_ids": segment_ids}
    seen = None if mask is None else _seen(mask, key_mask, query, key, **order)
    real: Any = {"key_mask": key_mask}
    if seen is not None:  # padding is what nobody sees, or what sees nobody
        real = {"query_mask": seen.any((-3, -1)), "key_mask": seen.any((-3, -2))}
    measured = lln.given_or_measured(
        query, key, alpha, beta, stats=stats, constants=constants, **real
    )
    slopes: Any = dict(zip(("alpha", "beta"), measured, strict=True))

    def far(value: jax.Array) -> jax.Array:
        if seen is not None:
            return lln.quadratic_attention(query, key, value, mask=seen, **slopes)
        given: Any = {"key_mask": key_mask, "chunk_size": chunk_size, **order}
        return lln.lln_attention(query, key, value, **given, **slopes)

    def near(value: jax.Array) -> jax.Array:
        args = query, key, value
        if seen is not None:
            return lln.quadratic_diagonal_attention(*args, mask=seen, block_size=block_size)
        if decoding:
            return lln.last_block_attention(*args, key_mask=key_mask, block_size=block_size)
        return lln.diagonal_attention(*args, block_size=block_size, key_mask=key_mask, **order)

    def attend(value: jax.Array) -> jax.Array:
        return lln.combine(far(value), near(value), weights) if diagonal else far(value)

    with _precision(precision):
        if module is not None:
            _sow(module, attend(_unit(value)))
        return attend(value).astype(value.dtype)


REMEDY = {
    "bias": "has no linear form; add it to the queries or keys, or keep softmax",
    "dropout_rate": "of weights has no linear form; set it to 0 and drop outputs instead",
    "einsum_dot_general": "there is no product of queries and keys to override",
    "qk_attn_weights_einsum": "there is no product of queries and keys to override",
    "attn_weights_value_einsum": "there is no product of weights and values to override",
    "precision": "must be the same for both operands",
    "alpha": "decoding sees one query and cannot measure; give alpha and beta as in training",
    "segment_ids": "decoding has one segment; mask the keys of others",
    "mask": "one of queries and keys, or of each head, has no linear form; give is_causal=True, "
    "key_mask or segment_ids instead, or quadratic=True; in decoding with diagonal=False only",
    "weights": "of each channel make no attention weights to sow; give two numbers",
}


def _refuse(**given: bool) -> None:
    for name, wrong in given.items():
        if wrong:
            raise ValueError(f"{name}: {REMEDY[name]}")


def _keys_only(
    mask: jax.Array | None, key_mask: jax.Array | None, query: jax.Array, key: jax.Array
) -> tuple[jax.Array | None, jax.Array | None]:
    """A mask that all queries and heads share joins that of keys; any other stays."""
    if mask is None:
        return key_mask, None
    full = *query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3]
    try:
        fits = jnp.broadcast_shapes(mask.shape, full) == full and mask.ndim >= 2
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask: {mask.shape} must broadcast to [..., heads, n, m] {full}")
    if mask.shape[-2] != 1 or mask.shape[-3:-2] not in ((), (1,)):
        return key_mask, mask
    shared = mask.reshape(*mask.shape[:-3], mask.shape[-1])
    shared = jnp.broadcast_to(shared, (*full[:-3], full[-1])).astype(bool)
    return (shared if key_mask is None else shared & key_mask.astype(bool)), None


def _seen(
    mask: jax.Array,
    key_mask: jax.Array | None,
    query: jax.Array,
    key: jax.Array,
    causal: bool,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """All that forbids, ``[..., h, n, m]``."""
    full = *query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3]
    parts = [mask.astype(bool)]
    if key_mask is not None:
        parts.append(key_mask[..., None, None, :].astype(bool))
    if causal:
        parts.append(jnp.tri(*full[-2:], dtype=bool))
    if segment_ids is not None:
        same = segment_ids[..., :, None] == segment_ids[..., None, :]
        parts.append(same[..., None, :, :])
    return reduce(and_, (jnp.broadcast_to(part, full) for part in parts))


def _unit(value: jax.Array) -> jax.Array:
    """Values that show the weights: one of its own for each key."""
    count = value.shape[-3]
    unit = jnp.eye(count, dtype=value.dtype)[:, None]
    return jnp.broadcast_to(unit, (*value.shape[:-1], count))


def _sow(module: Any, weights: jax.Array) -> None:
    module.sow("intermediates", "attention_weights", jnp.swapaxes(weights, -3, -2))


def _precision(precision: Any) -> AbstractContextManager[Any]:
    both = set(precision) if isinstance(precision, tuple) else {precision}
    _refuse(precision=len(both) > 1)
    (one,) = both
    if one is None:
        return nullcontext()
    return jax.default_matmul_precision(jax.lax.Precision(one).name.lower())
