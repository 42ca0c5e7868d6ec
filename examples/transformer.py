"""A small transformer with exchangeable attention: softmax, LLN, and kernels with features.

For the examples and benchmarks that train one. All have the parameters of softmax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from lnq.attention import concentration, lln
from lnq.attention.concentration import Kernel
from lnq.attention.linen import LLNAttention

Features = Callable[[jax.Array], jax.Array]  # [..., d] -> [..., features], positive
HEADS, SIZE = 4, 16  # a block of LLN+Diag is as long as a head is wide


class AllPairs(nn.Module):
    """Any attention function of Flax's kind, with a mask of keys or of the past."""

    attention_fn: Callable[..., jax.Array]
    causal: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: Any = None, train: bool = False) -> jax.Array:
        keys = None if key_mask is None else key_mask[:, None, None, :]
        past = nn.make_causal_mask(x[..., 0], dtype=bool) if self.causal else None
        attend = nn.MultiHeadDotProductAttention(HEADS, attention_fn=self.attention_fn)
        return attend(x, mask=nn.combine_masks(keys, past))


class Transformer(nn.Module):
    """Norms first, then attention or two dense layers; logits of all tokens, or of their mean.

    Positions repeat after `period` tokens, so that no sequence is too long.
    """

    attention: Callable[[], nn.Module]
    embed: nn.Module  # [b, n, ...] -> [b, n, width]
    outputs: int
    pooled: bool = False
    layers: int = 2
    period: int = 128

    @nn.compact
    def __call__(
        self, x: jax.Array, key_mask: Any = None, start: Any = 0, train: bool = False
    ) -> jax.Array:
        x = self.embed(x)
        length, width = x.shape[1:]
        normal = nn.initializers.normal(0.02)
        table = self.param("positions", normal, (self.period, width))
        x += table[None, (start + jnp.arange(length)) % self.period]
        for _ in range(self.layers):
            x += self.attention()(nn.LayerNorm()(x), key_mask=key_mask, train=train)
            x += nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))
        x = nn.LayerNorm()(x)
        if self.pooled:
            x = x.mean(1, where=None if key_mask is None else key_mask[..., None])
        return nn.Dense(self.outputs)(x)


def split(variables: Any) -> tuple[Any, Any]:
    """Parameters, and what a model keeps beside them: running deviations, if there are any."""
    return variables["params"], {k: v for k, v in variables.items() if k != "params"}


def make_step(model: nn.Module, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """``step(params, kept, opt_state, batch) -> params, kept, opt_state, loss``, compiled."""

    def loss_fn(params: Any, kept: Any, batch: Any) -> tuple[jax.Array, Any]:
        x, key_mask, labels = batch
        variables = {"params": params, **kept}
        logits, kept = model.apply(variables, x, key_mask, train=True, mutable=list(kept))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), kept

    @jax.jit
    def step(params: Any, kept: Any, opt_state: Any, batch: Any) -> tuple[Any, ...]:
        (loss, kept), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, kept, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), kept, opt_state, loss

    return step


def adam(steps: int, rate: float) -> optax.GradientTransformation:
    """Adam with 50 steps of warm-up and half a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 50, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def elu_features(x: jax.Array) -> jax.Array:
    return nn.elu(x) + 1.0


def relu_features(x: jax.Array) -> jax.Array:
    """With Performer's constant, without which a query may see no key."""
    return nn.relu(x) + 1e-3


def random_features(x: jax.Array, count: int = 64) -> jax.Array:
    """Performer's (FAVOR+), of one fixed draw; relative to the largest, which cancels."""
    d = x.shape[-1]
    turns = jax.random.orthogonal(jax.random.key(0), d, (count // d,))
    lengths = jnp.linalg.norm(jax.random.normal(jax.random.key(1), (count, d)), axis=-1)
    x = x / d**0.25
    products = x @ (lengths[:, None] * turns.reshape(count, d)).T
    exponents = products - 0.5 * jnp.sum(x**2, -1, keepdims=True)
    return jnp.exp(exponents - jax.lax.stop_gradient(exponents.max())) + 1e-6


def feature_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    features: Features,
    **_: Any,
) -> jax.Array:
    """Weights φ(q) · φ(k) over their sum, all of them written out; ``[b, n, heads, d]``."""
    weights = jnp.einsum("bqhf,bkhf->bhqk", features(query), features(key))
    weights = weights if mask is None else jnp.where(mask, weights, 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


def lln_attention(causal: bool = False, heads: int = HEADS, **options: Any) -> nn.Module:
    """Deviations of each batch, as published; kept ones where the future must not be seen."""
    kept = {"causal": True, "momentum": 0.95} if causal else {}
    return LLNAttention(heads, constants=lln.constants(SIZE), **kept, **options)


class Kind(NamedTuple):
    """One of the attentions to compare.

    Attributes:
      attention: ``attention(causal=...)`` makes a layer's.
      log_weights: ``log_weights(q, k, mask, key_mask)``: its ln P, from ``[b, heads, n, d]``, the
        pairs that count ``[b, 1, n, n]`` and the tokens that do ``[b, n]``.
    """

    attention: Callable[..., nn.Module]
    log_weights: Callable[..., jax.Array]


def _kind(attention_fn: Callable[..., jax.Array], kernel: Kernel) -> Kind:
    def log_weights(q: jax.Array, k: jax.Array, mask: Any, key_mask: Any) -> jax.Array:
        return concentration.log_attention(q, k, kernel, mask)

    return Kind(partial(AllPairs, attention_fn), log_weights)


def _features(features: Features) -> Kind:
    kernel = concentration.feature_kernel(lambda x: jnp.log(features(x)))
    return _kind(partial(feature_attention, features=features), kernel)


def _far(q: jax.Array, k: jax.Array, mask: jax.Array, key_mask: Any) -> jax.Array:
    tokens_first = (jnp.swapaxes(x, 1, 2) for x in (q, k))
    masks: Any = {"key_mask": key_mask, "query_mask": key_mask}
    kernel = concentration.lln(*lln.scales(*tokens_first, constants=lln.constants(SIZE), **masks))
    return concentration.log_attention(q, k, kernel, mask)


def _far_and_near(q: jax.Array, k: jax.Array, mask: jax.Array, key_mask: Any) -> jax.Array:
    block = jnp.arange(q.shape[-2]) // SIZE
    same = (block[:, None] == block[None])[None, None]
    near = concentration.log_attention(q, k, mask=same & mask)
    return jnp.logaddexp(_far(q, k, mask, key_mask), near) - jnp.log(2.0)


KINDS = {
    "softmax": _kind(nn.dot_product_attention, concentration.softmax),
    "LLN+Diag": Kind(lln_attention, _far_and_near),
    "LLN": Kind(partial(lln_attention, near="none"), _far),
    "elu + 1": _features(elu_features),
    "ReLU": _features(relu_features),
    "Performer": _features(random_features),
}
