r"""LLN attention of a sequence that is split over devices.

Inside ``jax.shard_map`` every device has a piece of the sequence, in order along one mesh axis.
States of pieces add up, so devices exchange one :class:`~lnq.attention.lln.State` each, whatever
the length: a sum over all of them for bidirectional attention, over those before it for causal.

    >>> from functools import partial
    >>> from jax.sharding import Mesh, PartitionSpec as P
    >>> mesh = Mesh(jax.devices(), ("sequence",))
    >>> piece = P(None, "sequence")
    >>> attend = partial(lln_attention, axis_name="sequence", causal=True, alpha=2.1, beta=2.1)
    >>> attend = jax.shard_map(attend, mesh=mesh, in_specs=(piece,) * 3, out_specs=piece)
    >>> q = jax.random.normal(jax.random.key(0), (2, 64, 4, 8))
    >>> attend(q, q, q).shape
    (2, 64, 4, 8)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from lnq.attention import lln
from lnq.attention.lln import FLOOR, State

__all__ = ["lln_attention", "lln_diag_attention", "state_before", "state_of_all"]


def lln_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    alpha: ArrayLike,
    beta: ArrayLike,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    chunk_size: int = 32,
) -> jax.Array:
    """:func:`lnq.attention.lln.lln_attention` of all pieces, for the queries of this one.

    Args:
      q: ``[..., n, h, d]``, this device's.
      k: ``[..., m, g, d]``; g divides h.
      v: ``[..., m, g, e]``.
      axis_name: Of the mesh, along which the sequence is split.
      alpha: A number, or as from :func:`~lnq.attention.lln.scales`; the same on all devices.
      beta: Likewise.
      causal: Whether a token sees itself and what is before it only; n = m then.
      key_mask: Which keys count, ``[..., m]``.
      chunk_size: As in :func:`~lnq.attention.lln.extend`.

    Returns:
      ``[..., n, h, e]``, dtype of v.
    """
    lln.check_axes(q, k, v, same_length=causal)
    own = lln.summarize(k, v, beta=beta, key_mask=key_mask)
    if causal:
        slopes: Any = {"alpha": alpha, "beta": beta}
        before = state_before(own, axis_name)
        out, _ = lln.extend(before, q, k, v, key_mask=key_mask, chunk_size=chunk_size, **slopes)
    else:
        out = lln.read(state_of_all(own, axis_name), q, alpha=alpha)
    return out.astype(v.dtype)


def lln_diag_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    weights: tuple[ArrayLike, ArrayLike] = (0.5, 0.5),
    block_size: int | None = None,
    causal: bool = False,
    key_mask: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """:func:`lnq.attention.lln.lln_diag_attention` of all pieces; blocks stay within a piece.

    Args:
      q: As in :func:`lln_attention`; n is a multiple of the block size.
      k: Likewise.
      v: Likewise.
      weights: As in :func:`lnq.attention.lln.lln_diag_attention`.
      block_size: Likewise.
      causal: As in :func:`lln_attention`.
      key_mask: Likewise.
      **options: Others of :func:`lln_attention`.

    Raises:
      ValueError: If a block would reach into the next piece.
    """
    block = block_size or q.shape[-1]
    if q.shape[-3] % block:
        raise ValueError(
            f"block_size: {block} must divide the {q.shape[-3]} tokens of a device; "
            "pad the sequence, or choose another block_size"
        )
    given: Any = {"causal": causal, "key_mask": key_mask}
    near = lln.diagonal_attention(q, k, v, block_size=block, **given)
    far = lln_attention(q, k, v, **given, **options)
    return lln.combine(far, near, weights).astype(v.dtype)


def state_of_all(own: State, axis_name: str) -> State:
    """The state of the keys of all devices."""
    peak = lax.pmax(lax.stop_gradient(own.peak), axis_name)
    return State(peak, lax.psum(own.sums * jnp.exp(own.peak - peak)[..., None], axis_name))


def state_before(own: State, axis_name: str) -> State:
    """The state of the keys of the devices before this one."""
    every = lax.all_gather(own, axis_name)  # one state each: their size, not the sequence's
    earlier = jnp.arange(every.peak.shape[0]) < lax.axis_index(axis_name)
    peaks = jnp.where(_along(earlier, every.peak), every.peak, FLOOR)
    peak = lax.stop_gradient(peaks.max(0))
    shares = jnp.where(_along(earlier, peaks), jnp.exp(peaks - peak[None]), 0.0)
    return State(peak, (shares[..., None] * every.sums).sum(0))


def _along(chosen: jax.Array, like: jax.Array) -> jax.Array:
    return chosen.reshape(-1, *[1] * (like.ndim - 1))
