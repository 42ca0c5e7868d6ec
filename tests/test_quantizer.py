"""Grids, rounding and its gradients, and what JAX does to quantized leaves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from lnq import quantizer
from lnq.quantizer import FakeQuantTensor, QTensor, make_qparams

SHAPE = (6, 8)
LAYOUTS = {
    "per tensor": ((1, 1), None),
    "per output channel": ((1, 8), None),
    "per input channel": ((6, 1), None),
    "groups of rows": ((3, 8), None),
    "groups both ways": ((2, 4), None),
    "one scale per entry": (SHAPE, None),
    "outer product": ((1, 8), (6, 1)),
    "grouped in_scale": ((1, 1), (3, 1)),
}
RANGES = {
    "unsigned": (0, 255, 0.0),
    "signed with an offset": (-128, 127, 3.0),
    "narrow and real": (-7, 7, 0.37),
    "even grid": (-2, 1, -0.5),
    "zero below the range": (0, 15, -20.0),
    "zero above the range": (-8, 7, 30.0),
}


def grid(layout, limits, seed=0):
    rng = np.random.default_rng(seed)
    shape, in_shape = LAYOUTS[layout]
    qmin, qmax, zero_point = RANGES[limits]
    in_scale = None if in_shape is None else rng.uniform(0.5, 2, in_shape)
    scale = rng.uniform(0.01, 0.1, shape)
    return make_qparams(scale, qmin=qmin, qmax=qmax, zero_point=zero_point, in_scale=in_scale)


def values(qparams, dtype=jnp.float32, seed=1):
    """Real numbers that reach beyond both ends of the grid."""
    low, high = (float(x.ravel()[0]) for x in (qparams.qmin, qparams.qmax))
    margin = 0.2 * (high - low)
    levels = np.random.default_rng(seed).uniform(low - margin, high + margin, SHAPE)
    return jnp.asarray(oracles.dequantize(levels, qparams), dtype)


@pytest.mark.parametrize("noise", [0.0, 1e-7, -1e-7])
def test_every_code_of_a_byte_is_hit_exactly(noise):
    x = jnp.arange(256) / 255 + noise
    leaf = quantizer.quantize(x, make_qparams([1 / 255], qmin=0, qmax=255))
    np.testing.assert_array_equal(leaf.codes, np.arange(256))
    np.testing.assert_allclose(quantizer.dequantize(leaf), np.arange(256) / 255, rtol=2e-7)


@pytest.mark.parametrize("limits", RANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_values_match_the_oracle(layout, limits):
    qparams = grid(layout, limits)
    x = values(qparams)
    leaf = quantizer.quantize(x, qparams)
    np.testing.assert_array_equal(leaf.codes, oracles.quantize(x, qparams))
    expected = oracles.dequantize(leaf.codes, qparams)
    np.testing.assert_allclose(quantizer.dequantize(leaf), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_computed_in_float32_and_comes_back(dtype):
    qparams = grid("outer product", "signed with an offset")
    x = values(qparams, dtype)
    leaf = quantizer.quantize(x, qparams)
    np.testing.assert_array_equal(leaf.codes, oracles.quantize(x.astype(jnp.float32), qparams))
    back = quantizer.dequantize(leaf)
    expected = jnp.asarray(oracles.dequantize(leaf.codes, qparams), jnp.float32).astype(dtype)
    assert back.dtype == expected.dtype == quantizer.fake_quant(x, qparams).dtype
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize(
    ("qmin", "qmax", "bits"),
    [(5, 5, 0), (0, 1, 1), (-2, 1, 2), (-127, 127, 8), (-128, 127, 8), (-32768, 32767, 16)],
)
def test_bits_is_the_smallest_width_that_holds_the_range(qmin, qmax, bits):
    assert make_qparams([1.0], qmin=qmin, qmax=qmax).bits.tolist() == [bits]


@pytest.mark.parametrize("zero_point", [0.0, 0.5, -3.0])
def test_ties_go_to_the_even_code(zero_point):
    x = jnp.array([-1.5, -0.5, 0.5, 1.5, 2.5]) - zero_point
    leaf = quantizer.quantize(x, make_qparams([1.0], qmin=-8, qmax=7, zero_point=zero_point))
    np.testing.assert_array_equal(leaf.codes, [-2, 0, 0, 2, 2])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-8, 7, width=32), min_size=8, max_size=8),
    st.floats(2**-20, 2**20, width=32),
    st.floats(-10, 10, width=32),
)
def test_error_is_at_most_half_a_step_and_a_second_rounding_changes_nothing(levels, scale, zero):
    qparams = make_qparams([scale], qmin=-8, qmax=7, zero_point=zero)
    x = jnp.asarray((np.array(levels) - zero) * scale, jnp.float32)
    leaf = quantizer.quantize(x, qparams)
    back = quantizer.dequantize(leaf)
    error = np.abs(np.asarray(back, np.float64) - np.asarray(x, np.float64))
    assert (error <= scale * (0.5 + 1e-5)).all()  # 1e-5: levels near 20 in float32
    np.testing.assert_array_equal(quantizer.quantize(back, qparams).codes, leaf.codes)


@pytest.mark.parametrize("limits", RANGES)
@pytest.mark.parametrize("layout", ["per tensor", "outer product"])
def test_fake_quant_is_dequantize_of_quantize(layout, limits):
    qparams = grid(layout, limits)
    x = values(qparams)
    expected = quantizer.dequantize(quantizer.quantize(x, qparams))
    np.testing.assert_array_equal(quantizer.fake_quant(x, qparams), expected)
    held = FakeQuantTensor(x, qparams, dtype=jnp.dtype("bfloat16"))
    np.testing.assert_array_equal(quantizer.dequantize(held), expected.astype(jnp.bfloat16))


gradients = jax.jit(
    jax.grad(lambda x, grid, weights: (weights * quantizer.fake_quant(x, grid)).sum(), (0, 1))
)


@pytest.mark.parametrize(
    ("qmin", "qmax", "zero_point"),
    [(-8, 7, 2.0), (0, 3, -5.5), (0, 1, 0.0)],
    ids=["4 bits", "2 bits, zero outside", "1 bit"],
)
def test_gradients_are_those_of_the_learned_step_size(qmin, qmax, zero_point):
    scale, inside = 0.25, np.linspace(qmin + 0.1, qmax - 0.1, 7)
    levels = np.concatenate([[qmin - 5, qmin - 0.8], inside, [qmax + 0.8, qmax + 5]])
    x = jnp.asarray((levels - zero_point) * scale, jnp.float32)
    qparams = make_qparams([scale], qmin=qmin, qmax=qmax, zero_point=zero_point)
    weights = jnp.arange(1.0, len(levels) + 1)
    by_x, by_grid = gradients(x, qparams, weights)
    within = (levels > qmin) & (levels < qmax)
    clipped = np.clip(np.round(levels), qmin, qmax) - zero_point
    by_scale = np.where(within, np.round(levels) - levels, clipped)
    by_zero = np.where(within, 0, -scale)
    np.testing.assert_allclose(by_x, np.where(within, weights, 0), atol=1e-5)
    np.testing.assert_allclose(by_grid.scale, [weights @ by_scale], rtol=1e-5)
    np.testing.assert_allclose(by_grid.zero_point, [weights @ by_zero], rtol=1e-5)


def test_gradient_of_a_scale_adds_up_over_its_group():
    qparams = grid("groups of rows", "signed with an offset")
    x = values(qparams)
    single = replace(qparams, scale=jnp.asarray(oracles.spread(qparams.scale, SHAPE), jnp.float32))
    one = jnp.ones(SHAPE)
    expected = gradients(x, single, one)[1].scale.reshape(3, 2, 8).sum(1)
    by_scale = gradients(x, qparams, one)[1].scale
    np.testing.assert_allclose(by_scale, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "use",
    [
        lambda qparams: quantizer.quantize(jnp.ones(SHAPE), qparams),
        lambda qparams: quantizer.fake_quant(jnp.ones(SHAPE), qparams),
        lambda qparams: quantizer.dequantize(QTensor(jnp.ones(SHAPE, jnp.int8), qparams)),
    ],
    ids=["quantize", "fake_quant", "dequantize"],
)
@pytest.mark.parametrize("name", ["scale", "zero_point", "in_scale"])
@pytest.mark.parametrize("shape", [(), (8,), (1, 1, 8), (4, 8), (6, 3), (12, 8)], ids=str)
def test_a_field_that_does_not_fit_the_codes_is_an_error_that_says_so(use, name, shape):
    qparams = replace(grid("outer product", "unsigned"), **{name: jnp.ones(shape)})
    with pytest.raises(
        ValueError, match=r"qparams: a field of shape \(.*each dimension must divide"
    ):
        use(qparams)


@pytest.mark.parametrize(
    ("qmin", "qmax", "dtype"),
    [
        (-128, 127, "int8"),
        (0, 128, "int16"),
        (-129, 0, "int16"),
        (-32768, 32767, "int16"),
        (0, 32768, "int32"),
        (-32769, 0, "int32"),
        (-(2**31), 2**31 - 128, "int32"),
    ],
)
def test_narrow_takes_the_smallest_integers_that_hold_the_range(qmin, qmax, dtype):
    qparams = make_qparams([1.0], qmin=qmin, qmax=qmax)
    leaf = quantizer.quantize(jnp.array([qmin, 0.0, qmax]), qparams)
    narrow = quantizer.narrow(leaf)
    assert narrow.codes.dtype == dtype
    np.testing.assert_array_equal(narrow.codes, [qmin, 0, qmax])


def test_narrow_looks_at_the_widest_channel():
    qparams = make_qparams(jnp.ones((1, 8)), qmin=0, qmax=np.array([[15, 255, 3, 1, 7, 7, 7, 7]]))
    assert quantizer.narrow(quantizer.quantize(jnp.ones(SHAPE), qparams)).codes.dtype == jnp.int16


@pytest.mark.parametrize(("qmin", "qmax"), [(0, 2**31), (-(2**31) - 256, 0)])
def test_narrow_refuses_what_int32_cannot_hold(qmin, qmax):
    leaf = quantizer.quantize(jnp.ones(1), make_qparams([1.0], qmin=qmin, qmax=qmax))
    with pytest.raises(ValueError, match="do not fit int32; use a larger scale"):
        quantizer.narrow(leaf)


def stacked():
    """Three layers as one leaf; every field of the grid has an entry per layer."""
    x = np.random.default_rng(2).normal(0, 2, (3, 4, 8)).astype(np.float32)
    scale, qmin, zero_point = np.reshape(
        [[0.1, 0.5, 2.0], [-8, -128, -2], [0, -3, 1.5]], (3, 3, 1, 1)
    )
    return jnp.asarray(x), make_qparams(scale, qmin=qmin, qmax=-qmin - 1, zero_point=zero_point)


def layer(i):
    x, qparams = stacked()
    return x[i], jax.tree.map(lambda field: field[i], qparams)


def test_jit_gives_the_same_codes_and_values():
    x, qparams = stacked()
    leaf = quantizer.quantize(x, qparams)
    jitted = jax.jit(quantizer.quantize)(x, qparams)
    np.testing.assert_array_equal(jitted.codes, leaf.codes)
    np.testing.assert_array_equal(jax.jit(quantizer.dequantize)(jitted), quantizer.dequantize(leaf))


def test_another_grid_of_the_same_shape_does_not_compile_again():
    x, qparams = stacked()
    jitted = jax.jit(lambda x, qparams: quantizer.quantize(x, qparams))
    jitted(x, qparams)
    jitted(x, replace(qparams, qmin=qparams.qmin - 1, scale=qparams.scale * 2))
    assert jitted._cache_size() == 1


@pytest.mark.parametrize("kind", [QTensor, FakeQuantTensor])
def test_vmap_and_scan_slice_a_stacked_leaf_by_layer(kind):
    x, qparams = stacked()
    leaf = quantizer.quantize(x, qparams)
    expected = quantizer.dequantize(leaf)
    leaf = kind(leaf.codes if kind is QTensor else x, qparams, acts=(None, qparams))
    np.testing.assert_array_equal(jax.vmap(quantizer.dequantize)(leaf), expected)
    _, (layers, act_scales) = jax.lax.scan(
        lambda carry, leaf: (carry, (quantizer.dequantize(leaf), leaf.acts[1].scale)), 0, leaf
    )
    np.testing.assert_array_equal(layers, expected)
    np.testing.assert_array_equal(act_scales, qparams.scale)


def test_vmap_of_quantize_equals_the_stacked_call():
    x, qparams = stacked()
    leaf = jax.vmap(quantizer.quantize)(x, qparams)
    np.testing.assert_array_equal(leaf.codes, quantizer.quantize(x, qparams).codes)
    assert leaf.shape == (3, 4, 8)


def test_tree_map_stacks_leaves_into_a_leaf():
    layers = [quantizer.quantize(*layer(i)) for i in range(3)]
    leaf = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    expected = quantizer.dequantize(quantizer.quantize(*stacked()))
    np.testing.assert_array_equal(quantizer.dequantize(leaf), expected, strict=True)


def test_eval_shape_says_what_quantize_returns():
    x, qparams = stacked()
    shapes = jax.eval_shape(quantizer.quantize, x.astype(jnp.bfloat16), qparams)
    leaf = quantizer.quantize(x.astype(jnp.bfloat16), qparams)
    assert shapes == jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape, y.dtype), leaf)
    assert shapes.dtype == jnp.bfloat16


def test_codes_can_be_donated():
    leaf = quantizer.quantize(*stacked())
    expected = np.asarray(leaf.codes) + 1
    add = jax.jit(lambda leaf: replace(leaf, codes=leaf.codes + 1), donate_argnums=0)
    np.testing.assert_array_equal(add(leaf).codes, expected)
    assert leaf.codes.is_deleted()


def test_an_nnx_param_may_hold_a_quantized_leaf():
    class Layer(nnx.Module):
        def __init__(self, leaf):
            self.kernel = nnx.Param(leaf)

        def __call__(self, x):
            return x @ quantizer.dequantize(self.kernel.get_value())

    leaf = quantizer.quantize(*layer(0))
    graphdef, state = nnx.split(Layer(leaf))
    out = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, jnp.ones((2, 4)))
    np.testing.assert_allclose(out, np.ones((2, 4)) @ quantizer.dequantize(leaf), rtol=1e-6)


@pytest.mark.parametrize("layout", ["per tensor", "per output channel", "groups both ways"])
@pytest.mark.parametrize("spec", [("d", None), (None, "d")], ids=["rows", "columns"])
def test_codes_and_values_keep_the_sharding_of_the_input(layout, spec):
    sharding = NamedSharding(jax.make_mesh((2,), ("d",)), PartitionSpec(*spec))
    qparams = grid(layout, "unsigned")
    x = values(qparams)
    leaf = jax.jit(quantizer.quantize)(jax.device_put(x, sharding), qparams)
    assert leaf.codes.sharding.is_equivalent_to(sharding, 2)
    assert jax.jit(quantizer.dequantize)(leaf).sharding.is_equivalent_to(sharding, 2)
    np.testing.assert_array_equal(leaf.codes, quantizer.quantize(x, qparams).codes)


def test_dequantize_touches_quantized_leaves_only():
    leaf = quantizer.quantize(jnp.array([0.3, 1.2]), make_qparams([0.5], qmin=-8, qmax=7))
    bias = jnp.ones(2)
    tree = quantizer.dequantize({"kernel": leaf, "bias": bias, "steps": 3, "name": "x", "no": None})
    assert tree["bias"] is bias
    assert (tree["steps"], tree["name"], tree["no"]) == (3, "x", None)
    np.testing.assert_array_equal(tree["kernel"], [0.5, 1.0])


# Means and norms.


def rounded_weights(seed=3, axes=(0, 1)):
    """Channels (last axis) of different means and spreads, and what 3 bits make of them."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.gamma(0.5, size=(5, 4, 3)) * [0.1, 1.0, 4.0] - [0.3, 0.0, 2.0], jnp.float32)
    scale = np.abs(x).max(axes, keepdims=True) / 4
    return x, quantizer.quantize(x, make_qparams(scale, qmin=-4, qmax=3))


def moments(x, axes=(0, 1)):
    x = np.asarray(x, np.float64)
    mean = x.mean(axes, keepdims=True)
    return mean, np.linalg.norm((x - mean).reshape(-1, x.shape[-1]), axis=0)


@pytest.mark.parametrize("norm", [False, True])
def test_matched_moments_are_those_of_the_original(norm):
    x, leaf = rounded_weights()
    rounded = quantizer.dequantize(leaf)
    factor, mean_rounded, mean = quantizer.match_moments(x, rounded, (0, 1), norm=norm)
    assert factor.shape == mean_rounded.shape == mean.shape == (1, 1, 3)
    fixed = factor * (rounded - mean_rounded) + mean
    codes = quantizer.correct_bias(x, leaf, (0, 1), norm=norm)
    np.testing.assert_array_equal(codes.codes, leaf.codes)
    np.testing.assert_allclose(quantizer.dequantize(codes), fixed, atol=2e-6)
    for found in (fixed, quantizer.dequantize(codes)):
        np.testing.assert_allclose(moments(found)[0], moments(x)[0], atol=1e-6)
        kept = x if norm else rounded
        np.testing.assert_allclose(moments(found)[1], moments(kept)[1], rtol=1e-5)
    again = quantizer.correct_bias(x, codes, (0, 1), norm=norm)
    np.testing.assert_allclose(again.qparams.scale, codes.qparams.scale, rtol=1e-6)
    np.testing.assert_allclose(again.qparams.zero_point, codes.qparams.zero_point, atol=1e-5)


def test_where_the_mean_has_not_moved_nothing_is_corrected():
    x = jnp.array([[-1.25, 0.5], [1.25, -0.25], [0.5, 0.25], [-0.5, -0.5]])  # symmetric columns
    leaf = quantizer.quantize(x, make_qparams([[0.5]], qmin=-4, qmax=3))
    np.testing.assert_array_equal(quantizer.dequantize(leaf).mean(0), x.mean(0))
    corrected = quantizer.correct_bias(x, leaf, (0,), norm=False)
    np.testing.assert_array_equal(quantizer.dequantize(corrected), quantizer.dequantize(leaf))


def test_a_channel_that_is_constant_or_rounded_to_one_level_has_its_mean_and_no_factor():
    x = jnp.array([[3.0, 0.1, 0.0], [3.0, -0.2, 0.0]])
    leaf = quantizer.quantize(x, make_qparams([[2.0]], qmin=-4, qmax=3))
    factor, _, mean = quantizer.match_moments(x, quantizer.dequantize(leaf), (0,))
    np.testing.assert_array_equal(factor, [[1, 1, 1]])
    np.testing.assert_allclose(mean, [[3.0, -0.05, 0.0]], rtol=1e-6)
    found = quantizer.dequantize(quantizer.correct_bias(x, leaf, (0,)))
    np.testing.assert_allclose(found, [[3.0, -0.05, 0.0]] * 2, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_values_without_a_grid_stay_what_they_are(dtype):
    x, qparams = layer(0)
    leaf = FakeQuantTensor(x.astype(dtype), None, acts=(qparams,), dtype=jnp.dtype(dtype))
    np.testing.assert_array_equal(quantizer.dequantize({"w": leaf})["w"], x.astype(dtype))
    assert quantizer.is_quantized(leaf)
    assert leaf.shape == x.shape
    np.testing.assert_array_equal(
        jax.grad(lambda leaf: quantizer.dequantize(leaf).sum())(leaf).values,
        jnp.ones_like(leaf.values),
    )
