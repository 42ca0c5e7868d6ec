"""LLN attention as an NNX module: self, cross, causal, decoding.

It is an ``nnx.MultiHeadAttention`` with other attention: parameters have the same names and shapes,
so the state of one is the state of the other.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lnq.attention import lln
from lnq.attention.linen import Near, check_batch, check_options, moved
from lnq.attention.lln import PUBLISHED, Block, State, Stats

__all__ = ["LLNAttention"]


class LLNAttention(nnx.MultiHeadAttention):
    """Multi-head LLN+Diag attention, or LLN attention alone.

    See :class:`lnq.attention.linen.LLNAttention`. Kept deviations are ``nnx.BatchStat``; the cache,
    made by :meth:`init_cache`, is ``nnx.Cache``.

    Args:
      num_heads: Heads of the queries.
      in_features: Of the input.
      near: How softmax within blocks joins, see :data:`~lnq.attention.linen.Near`.
      block_size: Tokens of a block; by default the size of a head.
      causal: Whether tokens see only what is before them, and themselves.
      momentum: How much of the kept deviations stays in each training step; None keeps none.
      stats: What a deviation is of, see :data:`~lnq.attention.lln.Stats`.
      constants: a and b; see :func:`~lnq.attention.lln.constants`.
      chunk_size: As in :func:`~lnq.attention.lln.extend`.
      decode: Whether calls append to the cache.
      rngs: For the parameters.
      **options: Others of ``nnx.MultiHeadAttention``; ``dropout_rate`` and ``attention_fn`` are
        errors.

    Raises:
      ValueError: If sizes do not divide or options contradict each other.

    Example:
      >>> softmax = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
      >>> linear = LLNAttention(2, 8, rngs=nnx.Rngs(1))
      >>> nnx.update(linear, nnx.state(softmax))
      >>> x = jax.random.normal(jax.random.key(0), (1, 50, 8))
      >>> bool(jnp.allclose(linear(x), softmax(x))), linear(x).shape
      (False, (1, 50, 8))
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        near: Near = "average",
        block_size: int | None = None,
        causal: bool = False,
        momentum: float | None = None,
        stats: Stats = "global",
        constants: tuple[float, float] = PUBLISHED,
        chunk_size: int = 32,
        decode: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        for name in {"dropout_rate", "attention_fn"} & set(options):
            raise ValueError(f"{name}: linear attention has no weights to treat; leave it out")
        check_options(near, stats, momentum, causal, decode)
        super().__init__(num_heads, in_features, decode=decode, rngs=rngs, **options)
        self.near: Near = near
        self.stats: Stats = stats
        self.block_size, self.causal, self.momentum = block_size, causal, momentum
        self.constants, self.chunk_size = constants, chunk_size
        learned, groups = (num_heads, self.head_dim), self.num_kv_heads if stats == "head" else 1

        def half() -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.full(learned, 0.5, self.param_dtype))

        def one() -> nnx.BatchStat[jax.Array]:
            return nnx.BatchStat(jnp.ones((1, groups, 1)))

        self.far_weight: Any = nnx.data(half() if near in ("scale", "ratio") else None)
        self.near_weight: Any = nnx.data(half() if near == "scale" else None)
        self.query_std: Any = nnx.data(None if momentum is None else one())
        self.key_std: Any = nnx.data(None if momentum is None else one())
        self.cached_far: dict[str, Any] | None = nnx.data(None)
        self.cached_near: Any = nnx.data(None)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        key_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        train: bool = False,
        decode: bool | None = None,
    ) -> jax.Array:
        """Attend; arguments as those of :class:`lnq.attention.linen.LLNAttention`.

        Raises:
          ValueError: If axes do not fit, or the cache was not initialized.
        """
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        q, k, v = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        alpha, beta = self._slopes(q, k, key_mask, inputs_k is inputs_q, train)
        options: Any = {"alpha": alpha, "beta": beta, "chunk_size": self.chunk_size}
        if self.decode if decode is None else decode:
            check_options(self.near, self.stats, self.momentum, self.causal, True)
            if key_mask is not None or segment_ids is not None:
                raise ValueError("key_mask, segment_ids: a cache holds real tokens of one segment")
            return self.out(self._append(q, k, v, options).astype(v.dtype))
        options |= {"causal": self.causal, "key_mask": key_mask, "segment_ids": segment_ids}
        attend = lln.lln_attention
        if self.near != "none":
            blocks: Any = {"weights": self._weights(), "block_size": self.block_size}
            attend = partial(lln.lln_diag_attention, **blocks)
        return self.out(attend(q, k, v, **options))

    def init_cache(self, input_shape: Sequence[int], dtype: Any = jnp.float32) -> None:
        """An empty cache.

        Args:
          input_shape: ``(..., n, f)`` of the input; n does not matter.
          dtype: Not used: sums are float32.
        """
        sizes = tuple(input_shape[:-2]), self.num_kv_heads, self.head_dim
        self.cached_far = nnx.data(_cached(lln.init_state(*sizes)))
        if self.near != "none":
            block = lln.init_block(*sizes, block_size=self.block_size)
            self.cached_near = nnx.data(_cached(block))

    def _slopes(
        self, q: jax.Array, k: jax.Array, key_mask: jax.Array | None, own: bool, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        given: Any = {"stats": self.stats, "key_mask": key_mask}
        if own:
            given["query_mask"] = key_mask
        if self.momentum is None:
            return lln.scales(q, k, constants=self.constants, **given)
        kept = self.query_std, self.key_std
        rank = (1,) * (q.ndim - 3)
        s_q, s_k = (std[...].reshape(rank + std.shape) for std in kept)
        if train:
            for std, new in zip(kept, lln.deviations(q, k, **given), strict=True):
                std[...] = moved(std[...], new, self.momentum)
        return lln.moment_match(s_q, s_k, *self.constants)

    def _append(self, q: jax.Array, k: jax.Array, v: jax.Array, options: Any) -> jax.Array:
        if self.cached_far is None:
            raise ValueError("decode: there is no cache; call init_cache first")
        check_batch(k, self.cached_far["peak"])
        x, state = lln.extend(State(**_values(self.cached_far)), q, k, v, **options)
        _keep(self.cached_far, state)
        if self.near == "none":
            return x
        near, block = lln.extend_diagonal(Block(**_values(self.cached_near)), q, k, v)
        _keep(self.cached_near, block)
        return lln.combine(x, near, self._weights())

    def _weights(self) -> tuple[Any, Any]:
        if self.near == "average":
            return 0.5, 0.5
        far = self.far_weight[...]
        return far, 1.0 - far if self.near == "ratio" else self.near_weight[...]


def _cached(state: State | Block) -> dict[str, Any]:
    return {name: nnx.Cache(value) for name, value in state._asdict().items()}


def _values(cached: dict[str, Any]) -> dict[str, Any]:
    return {name: value[...] for name, value in cached.items()}


def _keep(cached: dict[str, Any], state: State | Block) -> None:
    for name, value in state._asdict().items():
        cached[name][...] = value
