"""What every method owes its user; a new method joins by a row in METHODS."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import lnq
from lnq import distortion, quantizer, tree

METHODS = {  # (apply_fn, params, calib, strength) -> qtree; more strength is a finer model
    "riq.quantize": lambda f, p, x, strength: lnq.riq.quantize(p, 25.0 * 4**strength),
    "riq.compress": lambda f, p, x, strength: lnq.riq.compress(
        f, p, x, max_deviation=0.02 / 4**strength, eps0=0.001
    )[0],
    "riq.compress_weights": lambda f, p, x, strength: lnq.riq.compress_weights(
        p, max_deviation=0.02 / 4**strength, eps0=0.001
    )[0],
    "aciq.quantize_weights": lambda f, p, x, strength: lnq.aciq.quantize_weights(
        p, 3 + 2 * strength
    ),
    "aciq.quantize": lambda f, p, x, strength: lnq.aciq.quantize(
        f, p, x, weight_bits=3 + 2 * strength, edge_bits=None
    )[0],
    "lapq.quantize": lambda f, p, x, strength: lnq.lapq.quantize(
        f,
        p,
        x[:4],  # too few to hold any out: the loss compiles once
        weight_bits=3 + 2 * strength,
        act_bits=None,
        edge_bits=None,
        ps=(2.0,),
        method="none",
    )[0],
    "adaquant.quantize": lambda f, p, x, strength: lnq.adaquant.quantize(
        f,
        p,
        x,
        weight_bits=3 + 2 * strength,
        act_bits=None,
        edge_bits=None,
        weights="fixed",  # there are fewer examples than inputs
        second_order=False,
        steps=0,
        rows=64,
    )[0],
}
JITTABLE = ("riq.quantize", "aciq.quantize_weights")

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
jittable = pytest.mark.parametrize("method", [METHODS[name] for name in JITTABLE], ids=JITTABLE)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        return nn.Dense(24)(nn.relu(x).reshape(len(x), -1))


@functools.cache
def model(dtype="float32"):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(12, 8, 8, 2)), jnp.float32)
    params = Net().init(jax.random.key(1), x)
    return jax.jit(Net().apply), jax.tree.map(lambda w: w.astype(dtype), params), x.astype(dtype)


def outputs(method, strength, dtype="float32"):
    apply_fn, params, x = model(dtype)
    return apply_fn(lnq.dequantize(method(apply_fn, params, x, strength)), x)


@every_method
def test_structure_shapes_and_dtypes_are_kept(method):
    apply_fn, params, x = model()
    restored = lnq.dequantize(method(apply_fn, params, x, 1))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    for (name, before), (_, after) in zip(
        tree.named_leaves(params), tree.named_leaves(restored), strict=True
    ):
        assert (before.shape, before.dtype) == (after.shape, after.dtype), name
        if before.any():
            assert np.corrcoef(np.ravel(before), np.ravel(after))[0, 1] > 0.9, name


@every_method
def test_same_input_gives_the_same_codes(method):
    apply_fn, params, x = model()
    first, second = (jax.tree.leaves(method(apply_fn, params, x, 1)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@jittable
def test_jitted_equals_not_jitted(method):
    apply_fn, params, x = model()
    plain = method(apply_fn, params, x, 1)
    jitted = jax.jit(lambda p: method(apply_fn, p, x, 1))(params)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    shapes = jax.eval_shape(lambda p: method(apply_fn, p, x, 1), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), jitted
    )


@every_method
def test_finer_models_deviate_less(method):
    apply_fn, params, x = model()
    reference = apply_fn(params, x)
    errors = [float(distortion.mse(reference, outputs(method, s))) for s in (0, 1, 2)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0.0


@every_method
def test_a_bfloat16_model_stays_bfloat16_and_close(method):
    apply_fn, params, x = model("bfloat16")
    restored = lnq.dequantize(method(apply_fn, params, x, 2))
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {jnp.dtype("bfloat16")}
    distance = distortion.cosine_distance(apply_fn(params, x), apply_fn(restored, x))
    assert 1e-5 < float(distance) < 0.01


@every_method
def test_sharding_in_is_sharding_out(method):
    apply_fn, params, x = model()
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))

    def place(leaf):
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), "d") if leaf.ndim > 1 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    sharded = jax.tree.map(place, params)
    inputs = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    qtree = method(apply_fn, sharded, inputs, 1)
    plain = dict(tree.named_leaves(method(apply_fn, params, x, 1)))
    quantized = 0
    for (name, leaf), (_, before) in zip(
        tree.named_leaves(qtree), tree.named_leaves(sharded), strict=True
    ):
        if quantizer.is_quantized(leaf):
            quantized += 1
            assert leaf.codes.sharding.is_equivalent_to(before.sharding, before.ndim), name
            # Sums over shards round differently; a code at a tie may move.
            different = np.asarray(leaf.codes) != np.asarray(plain[name].codes)
            assert different.mean() < 0.01
    assert quantized


@every_method
def test_weights_that_are_not_finite_are_an_error_that_names_the_leaf(method):
    apply_fn, params, x = model()
    bad = jax.tree.map(lambda w: w, params)
    bad["params"]["Dense_0"]["kernel"] = bad["params"]["Dense_0"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="params/Dense_0/kernel"):
        method(apply_fn, bad, x, 1)


@every_method
def test_an_nnx_model_keeps_its_structure_and_runs(method):
    net = nnx.Sequential(
        nnx.Linear(16, 48, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(48, 20, rngs=nnx.Rngs(1))
    )
    graphdef, state = nnx.split(net)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(6, 16)), jnp.float32)
    qtree = method(lambda s, x: nnx.merge(graphdef, s)(x), state, x, 2)
    assert [name for name, leaf in tree.named_leaves(qtree) if quantizer.is_quantized(leaf)] == [
        "layers/0/kernel",
        "layers/2/kernel",
    ]
    restored = nnx.merge(graphdef, lnq.dequantize(qtree))
    distance = float(distortion.cosine_distance(net(x), restored(x)))
    assert 0.0 < distance < 0.01


@every_method
def test_the_file_restores_what_the_method_made(method, tmp_path):
    apply_fn, params, x = model()
    qtree = method(apply_fn, params, x, 1)
    lnq.save(tmp_path / "net.lnq", qtree)
    for a, b in zip(
        jax.tree.leaves(qtree), jax.tree.leaves(lnq.load(tmp_path / "net.lnq")), strict=True
    ):
        np.testing.assert_array_equal(a, b)
