"""The transformer of the examples: what is measured of an attention is what it does."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import shakespeare
import transformer
from flax import linen as nn

pytestmark = pytest.mark.slow


def output(kind, variables, seen, mask, real):
    """What a layer returns, from its projections and the weights that are measured."""
    q, k, v = (jnp.swapaxes(seen[name]["__call__"][0], 1, 2) for name in ("query", "key", "value"))
    mixed = jnp.exp(kind.log_weights(q, k, mask, real)) @ v
    out = variables["out"]
    return jnp.einsum("bhnd,hdf->bnf", mixed, out["kernel"]) + out["bias"][None, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["softmax", "LLN+Diag", "LLN", "elu + 1", "ReLU", "Performer"])
def test_measured_weights_are_those_of_the_layer(name, causal):
    kind = transformer.KINDS[name]
    layer = kind.attention(causal=causal)
    x = 1.5 * jax.random.normal(jax.random.key(1), (3, 40, 64)) + 0.3
    real = jnp.arange(40)[None] < jnp.array([[40], [31], [40]])
    variables = layer.init(jax.random.key(0), x)
    if "attention_stats" in variables:  # those of this batch, as the measure takes them
        apply = partial(layer.clone(momentum=0.0).apply, train=True, mutable="attention_stats")
        variables = {**variables, **apply(variables, x, key_mask=real)[1]}
    capture = {"capture_intermediates": True, "mutable": ["intermediates"]}
    found, seen = layer.apply(variables, x, key_mask=real, **capture)
    params, seen = variables["params"], seen["intermediates"]
    inner = "MultiHeadDotProductAttention_0"
    params, seen = params.get(inner, params), seen.get(inner, seen)
    mask = real[:, None, None, :] & (jnp.tri(40, dtype=bool) | (not causal))[None, None]
    expected = output(kind, params, seen, mask, real)
    np.testing.assert_allclose(found[real], expected[real], atol=2e-5)


@pytest.mark.parametrize("name", ["softmax", "LLN+Diag", "elu + 1"])
def test_padding_changes_nothing(name):
    model = transformer.Transformer(
        transformer.KINDS[name].attention, nn.Embed(9, 64), 3, pooled=True
    )
    tokens = jnp.arange(40).reshape(2, 20) % 9
    variables = jax.jit(model.init)(jax.random.key(0), tokens)
    apply = jax.jit(model.apply)
    real = jnp.ones((2, 20), bool)
    longer, mask = jnp.pad(tokens, ((0, 0), (0, 7))), jnp.pad(real, ((0, 0), (0, 7)))
    found = apply(variables, longer, mask)
    np.testing.assert_allclose(found, apply(variables, tokens, real), atol=2e-5)


def test_recurrent_writing_is_the_whole_sequence():
    letters = "abcdefghi"
    whole = shakespeare.decoder(letters)
    variables = jax.jit(whole.init)(jax.random.key(0), jnp.zeros((1, 8), int))
    prompt = jnp.array([[3, 1, 4, 1, 5]])
    written, logits = shakespeare.write(
        shakespeare.decoder(letters, decode=True),
        variables,
        prompt,
        140,  # positions repeat after 128
        lambda key, logits: jax.random.categorical(key, logits),
    )
    read = jax.jit(whole.apply)(variables, jnp.concatenate([prompt, written], 1))
    np.testing.assert_allclose(logits, read[:, 4:-1], atol=2e-5)
    assert len(set(written[0].tolist())) == len(letters)
