"""LLN attention as a linen module: self, cross, causal, decoding.

Parameters are those of ``nn.MultiHeadDotProductAttention`` by name and shape, so a checkpoint of
one is a checkpoint of the other.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from lnq.attention import lln
from lnq.attention.lln import PUBLISHED, Block, State, Stats

__all__ = ["LLNAttention", "Near"]

Near = Literal["none", "average", "scale", "ratio"]
"""How softmax within blocks joins: not, 1/2 and 1/2, r and p learned, r and 1 - r learned."""


class LLNAttention(nn.Module):
    """Multi-head LLN+Diag attention, or LLN attention alone.

    alpha and beta come from the standard deviations of queries and keys. Without ``momentum`` each
    call measures its own, as published. With it they are kept in the collection "attention_stats",
    a causal model is causal in truth, and decoding gives what training gave: a call with
    ``train=True`` first uses them and then moves them towards those of its batch, if the collection
    is mutable.

    With ``decode=True`` the collection "cache" holds the sums over all keys so far, of a size that
    does not depend on their number. ``init`` makes an empty one; every call appends its tokens, one
    or more.

    Attributes:
      num_heads: Heads of the queries.
      num_kv_heads: Heads of keys and values; by default the same.
      qkv_features: Of all heads together; by default those of the input.
      out_features: Likewise.
      near: How softmax within blocks joins, see :data:`Near`; it needs as many keys as queries.
      block_size: Tokens of a block; by default the size of a head.
      causal: Whether tokens see only what is before them, and themselves.
      decode: Whether to append to the cache; needs ``causal`` and ``momentum``.
      momentum: How much of the kept deviations stays in each training step, such as 0.99.
      stats: What a deviation is of, see :data:`~lnq.attention.lln.Stats`; not "example" if kept.
      constants: a and b; see :func:`~lnq.attention.lln.constants`.
      chunk_size: As in :func:`~lnq.attention.lln.extend`.
      normalize_qk: Whether queries and keys pass a layer norm.
      use_bias: Whether projections have biases.
      dtype: Of the computation; by default that of inputs and parameters.
      param_dtype: Of the parameters.
      precision: Of the projections.
      kernel_init: Of the projections.
      bias_init: Likewise.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 50, 8))
      >>> softmax = nn.MultiHeadDotProductAttention(num_heads=2)
      >>> variables = softmax.init(jax.random.key(1), x)
      >>> LLNAttention(num_heads=2).apply(variables, x).shape
      (1, 50, 8)
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    near: Near = "average"
    block_size: int | None = None
    causal: bool = False
    decode: bool = False
    momentum: float | None = None
    stats: Stats = "global"
    constants: tuple[float, float] = PUBLISHED
    chunk_size: int = 32
    normalize_qk: bool = False
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        key_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Attend.

        Args:
          inputs_q: ``[..., n, f]``.
          inputs_k: ``[..., m, f']``; by default ``inputs_q``.
          inputs_v: ``[..., m, f']``; by default ``inputs_k``.
          key_mask: Which keys count, ``[..., m]``.
          segment_ids: As in :func:`~lnq.attention.lln.lln_attention`.
          train: Whether kept deviations move; a Python bool, to be fixed by an outer module under
            ``nn.remat``.

        Returns:
          ``[..., n, out_features]``.

        Raises:
          ValueError: If sizes do not divide, options contradict each other, or axes do not fit.
        """
        check_options(self.near, self.stats, self.momentum, self.causal, self.decode)
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        q, k, v = self._project(inputs_q, inputs_k, inputs_v)
        alpha, beta = self._slopes(q, k, key_mask, inputs_k is inputs_q, train)
        options: Any = {"alpha": alpha, "beta": beta, "chunk_size": self.chunk_size}
        if self.decode:
            _refuse_in_cache(key_mask, segment_ids)
            x = self._append(q, k, v, options)
        else:
            options |= {
                "causal": self.causal,
                "key_mask": key_mask,
                "segment_ids": segment_ids,
            }
            attend = lln.lln_attention
            if self.near != "none":
                blocks: Any = {"weights": self._weights(v), "block_size": self.block_size}
                attend = partial(lln.lln_diag_attention, **blocks)
            x = attend(q, k, v, **options)
        features = self.out_features or inputs_q.shape[-1]
        return self._dense(features=features, axis=(-2, -1), name="out")(x.astype(v.dtype))

    def _dense(self, **options: Any) -> nn.DenseGeneral:
        return nn.DenseGeneral(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            **options,
        )

    def _project(self, *inputs: jax.Array) -> list[jax.Array]:
        total = self.qkv_features or inputs[0].shape[-1]
        groups = self.num_kv_heads or self.num_heads
        check_heads(total, self.num_heads, groups)
        heads = self.num_heads, groups, groups
        names = "query", "key", "value"
        q, k, v = (
            self._dense(features=(h, total // self.num_heads), name=name)(x)
            for x, h, name in zip(inputs, heads, names, strict=True)
        )
        if self.normalize_qk:
            norm = partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            q, k = norm(name="query_ln")(q), norm(name="key_ln")(k)
        return [q, k, v]

    def _slopes(
        self, q: jax.Array, k: jax.Array, key_mask: jax.Array | None, own: bool, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        given: Any = {"stats": self.stats, "key_mask": key_mask}
        if own:
            given["query_mask"] = key_mask
        if self.momentum is None:
            return lln.scales(q, k, constants=self.constants, **given)
        groups = k.shape[-2] if self.stats == "head" else 1
        kept = [
            self.variable("attention_stats", name, jnp.ones, (1, groups, 1))
            for name in ("query_std", "key_std")
        ]
        old = [std.value for std in kept]
        if train and not self.is_initializing() and self.is_mutable_collection("attention_stats"):
            for std, new in zip(kept, lln.deviations(q, k, **given), strict=True):
                std.value = moved(std.value, new, self.momentum)
        rank = (1,) * (q.ndim - 3)
        s_q, s_k = (std.reshape(rank + std.shape) for std in old)
        return lln.moment_match(s_q, s_k, *self.constants)

    def _append(self, q: jax.Array, k: jax.Array, v: jax.Array, options: Any) -> jax.Array:
        batch, sizes = k.shape[:-3], (k.shape[-2], k.shape[-1], v.shape[-1])
        far = self.variable("cache", "far", lambda: lln.init_state(batch, *sizes)._asdict())
        check_batch(k, far.value["peak"])
        x, state = lln.extend(State(**far.value), q, k, v, **options)
        if not self.is_initializing():
            far.value = state._asdict()
        if self.near == "none":
            return x
        made = partial(lln.init_block, batch, *sizes, self.block_size)
        block = self.variable("cache", "near", lambda: made()._asdict())
        near, filled = lln.extend_diagonal(Block(**block.value), q, k, v)
        if not self.is_initializing():
            block.value = filled._asdict()
        return lln.combine(x, near, self._weights(v))

    def _weights(self, v: jax.Array) -> tuple[Any, Any]:
        if self.near == "average":
            return 0.5, 0.5
        half = nn.initializers.constant(0.5)
        shape = self.num_heads, v.shape[-1]
        far = self.param("far_weight", half, shape, self.param_dtype)
        if self.near == "ratio":
            return far, 1.0 - far
        return far, self.param("near_weight", half, shape, self.param_dtype)


def check_heads(features: int, heads: int, kv_heads: int) -> None:
    """Raise a ValueError unless sizes divide."""
    if features % heads:
        raise ValueError(f"qkv_features: {features} must be a multiple of num_heads {heads}")
    if heads % kv_heads:
        raise ValueError(f"num_heads: {heads} must be a multiple of num_kv_heads {kv_heads}")


def check_options(
    near: Near, stats: Stats, momentum: float | None, causal: bool, decode: bool
) -> None:
    """Raise a ValueError unless options go together."""
    if near not in get_args(Near):
        raise ValueError(f"near: must be one of {', '.join(get_args(Near))}, not {near!r}")
    if decode and not causal:
        raise ValueError("decode: needs causal=True")
    if decode and momentum is None:
        raise ValueError("decode: needs kept deviations; give momentum, in training too")
    if momentum is not None and stats not in ("global", "head"):
        raise ValueError(f"stats: {stats!r} has none to keep; use 'head' or 'global'")


def check_batch(k: jax.Array, peak: jax.Array) -> None:
    """Raise a ValueError unless keys have the leading axes of a cache."""
    if k.shape[:-3] != peak.shape[:-2]:
        raise ValueError(
            f"cache: is of a batch {peak.shape[:-2]}, not {k.shape[:-3]}; make another"
        )


def moved(old: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
    """Kept deviations ``[1, g, 1]`` after a batch ``[..., 1, g, 1]``."""
    return momentum * old + (1.0 - momentum) * new.reshape(old.shape)


def _refuse_in_cache(key_mask: jax.Array | None, segment_ids: jax.Array | None) -> None:
    if key_mask is not None or segment_ids is not None:
        raise ValueError("key_mask, segment_ids: a cache holds real tokens of one segment only")
