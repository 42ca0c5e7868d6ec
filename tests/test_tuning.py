"""Folding, statistics and biases: exact cases, NumPy twins, and what must not move."""

import re
from dataclasses import replace
from functools import partial

import gallery
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from gallery import array
from jax import lax

from lnq import distortion, sites, tree, tuning
from lnq.quantizer import QTensor, dequantize_array, make_qparams, quantize
from lnq.tuning import Moments


class Net(nn.Module):
    """A convolution and a depthwise one with a bias, each with batch-norm, and a head."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = {"use_running_average": not train, "momentum": 0.9}
        x = nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)
        x = nn.relu(nn.BatchNorm(**norm, name="conv_norm")(x))
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.relu6(nn.BatchNorm(**norm, name="depthwise_norm")(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class Stack(nn.Module):
    """Three layers in a scan, and a head."""

    @nn.compact
    def __call__(self, x):
        def layer(dense, x, _):
            return nn.relu(dense(x)), None

        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        x = nn.scan(layer, length=3, **axes)(nn.Dense(6, name="layers"), x, None)[0]
        return nn.Dense(3, name="head")(x)


NET = gallery.linen("net", Net(), (array((16, 6, 6, 2), 1, 0.5),), ())
NNX = gallery.of_nnx("nnx", NnxNet, NET.args, ())
STACK = gallery.linen("stack", Stack(), (gallery.ROWS,), ())
IMAGES = array((60, 6, 6, 2), 4, 0.5)
ROWS = array((60, 6), 5, 0.5)


def leaves(params):
    return dict(tree.named_leaves(params))


def changed(before, after):
    """Names of leaves that are no longer the same, bit for bit."""
    after = leaves(after)
    same = {
        name: all(map(np.array_equal, jax.tree.leaves(leaf), jax.tree.leaves(after[name])))
        for name, leaf in leaves(before).items()
    }
    return {name for name in same if not same[name]}


def with_leaf(params, name, value):
    return tree.map_named(lambda n, leaf: value if n == name else leaf, params)


def divergence(reference, x):
    """Mean KL of the softmax, in float64."""
    p, q = (np.exp(np.asarray(a, np.float64)) for a in (reference, x))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return float((p * np.log(p / q)).sum(-1).mean())


def in_bits(params, bits, select="kernel$|w$|head$", reach=4.0):
    """Weights with a grid per channel, data with one from -reach to reach; all in NumPy."""
    half = 2 ** (bits - 1)
    act = make_qparams([reach / half], qmin=-half, qmax=half - 1)

    def leaf(name, w):
        if not re.search(select, name):
            return w
        axes = tuple(range("layers" in name, w.ndim - 1))
        scale = np.abs(w).max(axes, keepdims=True) / half
        codes = np.clip(np.round(w / scale), -half, half - 1).astype(np.int8)
        return QTensor(jnp.asarray(codes), make_qparams(scale, qmin=-half, qmax=half - 1), (act,))

    return tree.map_named(leaf, params)


# Folding.


def scaled_stack(params, x):
    def layer(x, p):
        return jnp.tanh((x @ p["w"]) * p["scale"] + p["bias"]), None

    return lax.scan(layer, x, params)[0]


def heads_on_the_left(params, x):
    """A kernel [h, k, d] on the left, channels in front."""
    y = jnp.einsum("hkd,bd->hkb", params["w"], x)
    return (y - params["mean"]) * params["scale"] + params["bias"]


FOLDABLE = {
    "linen": (
        NET.apply_fn,
        with_leaf(NET.params, "params/conv_norm/scale", jnp.array([-1.5, 0.0, 0.3, 2.0])),
        NET.args,
        ("params/conv/kernel", "params/depthwise/kernel"),
    ),
    "nnx": (NNX.apply_fn, NNX.params, NNX.args, ("conv/kernel",)),
    "channels first": (
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME") / p["scale"] - p["bias"],
        gallery.weights(w=(5, 2, 3, 3), scale=(1, 5, 1, 1), bias=(1, 5, 1, 1)),
        (array((2, 2, 6, 6), 1),),
        (),
    ),
    "scan": (
        scaled_stack,
        gallery.weights(w=(3, 6, 6), scale=(3, 1, 6), bias=(3, 1, 6)),
        (ROWS,),
        ("w",),
    ),
    "heads": (
        heads_on_the_left,
        gallery.weights(w=(2, 3, 6), mean=(2, 3, 1), scale=(2, 3, 1), bias=(2, 3, 1)),
        (ROWS,),
        ("w",),
    ),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_folding_keeps_the_function_and_leaves_factors_of_one(name):
    apply_fn, params, args, folds = FOLDABLE[name]
    folded, info = tuning.fold(apply_fn, params, *args)
    assert info.folded == folds
    assert set(info.left) == (set() if folds else {"w"})
    before, after = (jax.jit(apply_fn)(p, *args) for p in (params, folded))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    tails = [sites.tails(apply_fn, p, *args) for p in (params, folded)]
    for site in folds:  # a dead channel keeps its factor of 0
        np.testing.assert_allclose(tails[1][site].factor, tails[0][site].factor != 0.0, rtol=1e-6)
    again, info = tuning.fold(apply_fn, folded, *args)
    assert info.folded == ()
    assert not changed(folded, again)


def test_folded_leaves_are_those_of_the_formula():
    folded, _ = tuning.fold(NET.apply_fn, NET.params, *NET.args, select="/conv/")
    old, new = leaves(NET.params), leaves(folded)
    gamma, beta = (np.asarray(old[f"params/conv_norm/{k}"]) for k in ("scale", "bias"))
    mean, var = (np.asarray(old[f"batch_stats/conv_norm/{k}"]) for k in ("mean", "var"))
    factor = gamma / np.sqrt(var + 1e-5)
    kernel = np.asarray(old["params/conv/kernel"]) * factor
    np.testing.assert_allclose(new["params/conv/kernel"], kernel, rtol=1e-5)
    np.testing.assert_allclose(new["params/conv_norm/scale"], np.sqrt(var + 1e-5), rtol=1e-5)
    bias = beta - mean * factor + mean
    np.testing.assert_allclose(new["params/conv_norm/bias"], bias, rtol=1e-4, atol=1e-5)
    expected = {"params/conv/kernel", "params/conv_norm/scale", "params/conv_norm/bias"}
    assert changed(NET.params, folded) == expected


def normed(p, y):
    return (y - p["mean"]) * p["scale"] + p["bias"]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda p, x: (x @ p["w"] - p["mean"]) / jnp.sqrt(p["var"]) + p["bias"], "proportional"),
        (lambda p, x: (x @ p["w"] - p["mean"]) * p["scale"], "no bias of its own"),
        (lambda p, x: normed(p, x @ p["w"]) @ p["w"], "used elsewhere"),
        (lambda p, x: normed(p, x @ p["w"]) + p["w"].sum(), "used elsewhere"),
        (lambda p, x: normed(p, x @ p["w"]) + p["bias"], "no bias of its own"),
        (lambda p, x: normed(p, x @ p["w"]) * p["scale"].sum(), "proportional"),
        (lambda p, x: normed(p, x @ p["tall"][:6]), "a part of the leaf"),
    ],
)
def test_what_cannot_be_folded_stays_and_is_named(model, reason):
    vectors = dict.fromkeys(("mean", "scale", "bias"), (1, 6))
    params = gallery.weights(w=(6, 6), tall=(12, 6), **vectors) | {"var": jnp.full((1, 6), 4.0)}
    folded, info = tuning.fold(model, params, ROWS)
    assert info.folded == ()
    assert [reason in text for text in info.left.values()] == [True]
    assert not changed(params, folded)


def test_folding_that_would_change_the_outputs_is_an_error():
    def model(p, x):
        factor = p["scale"] / 2.0
        return (x @ p["w"]) * factor + p["bias"] + factor * x.sum()

    params = gallery.weights(w=(6, 6), scale=(1, 6), bias=(1, 6))
    with pytest.raises(ValueError, match="no longer the same"):
        tuning.fold(model, params, ROWS)
    quantized = in_bits(params, 4)
    with pytest.raises(ValueError, match="fold first"):
        tuning.fold(model, quantized, ROWS)


# Statistics of batch-norm.


def train_linen(variables, x):
    return Net().apply(variables, x, train=True, mutable=["batch_stats"])[1]


def train_nnx(state, x):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: NnxNet(nnx.Rngs(0))))
    model = nnx.merge(graphdef, state)
    model.train()
    model(x)
    return nnx.state(model, nnx.BatchStat)


NETS = {
    "linen": (NET, train_linen, "params/conv/kernel", "batch_stats/conv_norm"),
    "nnx": (NNX, train_nnx, "conv/kernel", "norm"),
}
ROUNDED = {kind: in_bits(net.params, 3) for kind, (net, *_) in NETS.items()}


@pytest.mark.parametrize("kind", NETS)
def test_statistics_are_those_of_the_quantized_layers_outputs(kind):
    (net, train_fn, kernel, stats), qtree = NETS[kind], ROUNDED[kind]
    new, info = tuning.reestimate(train_fn, qtree, [IMAGES[:20], IMAGES[20:]])
    raw = sites.Stat(lambda y, site: y)
    tapped = sites.tap(net.apply_fn, raw, lambda site: site.name == kernel, outputs=True)
    y = np.asarray(jax.jit(tapped)(qtree, IMAGES)[1][kernel], np.float64)
    y = y + np.asarray(leaves(qtree).get("conv/bias", 0.0), np.float64)
    var = (20 * y[:20].var((0, 1, 2)) + 40 * y[20:].var((0, 1, 2))) / 60
    np.testing.assert_allclose(
        leaves(new)[f"{stats}/mean"], y.mean((0, 1, 2)), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(leaves(new)[f"{stats}/var"], var, rtol=1e-4)
    statistics = {name for name in leaves(qtree) if name.endswith(("norm/mean", "norm/var"))}
    assert changed(qtree, new) == set(info.moved) == statistics


def test_a_momentum_is_the_models_own_running_mean():
    rounded = ROUNDED["linen"]
    batches = [IMAGES[i : i + 12] for i in range(0, 60, 12)]
    new, _ = tuning.reestimate(train_linen, rounded, batches, momentum=0.1)
    expected, update = dict(rounded), jax.jit(sites.quantized(train_linen))
    for batch in batches:
        expected |= update(expected, batch)
    for name, leaf in leaves(expected["batch_stats"]).items():
        np.testing.assert_allclose(leaves(new["batch_stats"])[name], leaf, rtol=1e-4, atol=1e-5)
    full, _ = tuning.reestimate(train_linen, rounded, batches[0])
    part, _ = tuning.reestimate(train_linen, rounded, [batches[0]] * 5, momentum=0.1)
    for name, old in leaves(rounded["batch_stats"]).items():
        ways = [np.asarray(leaves(v["batch_stats"])[name] - old) for v in (part, full)]
        np.testing.assert_allclose(ways[0], 0.40951 * ways[1], rtol=1e-4, atol=1e-5)


def test_large_statistics_are_as_exact_as_small_ones():
    def train_fn(p, x):
        return {"var": 0.99 * p["var"] + 0.01 * x.mean()}

    x = jnp.array([123_456.0, 123_458.0])
    new, _ = tuning.reestimate(train_fn, {"var": jnp.array([1.0])}, x)
    np.testing.assert_allclose(new["var"], 123_457.0, rtol=1e-5)


def test_statistics_taken_twice_are_the_same():
    once, _ = tuning.reestimate(train_linen, NET.params, IMAGES)
    _, info = tuning.reestimate(train_linen, once, IMAGES)
    assert max(info.moved.values()) < 1e-5


@pytest.mark.parametrize(
    ("train_fn", "calib", "message"),
    [
        (lambda v, x: {}, IMAGES, "no statistics; .* `reconstruct`"),
        (lambda v, x: {"batch_stats": v["batch_stats"]}, IMAGES, "does not move"),
        (lambda v, x: {"mean": x}, IMAGES, r"returns \['mean'\], which are no float leaves"),
        (train_linen, IMAGES.at[0].set(jnp.nan), "look for NaN in calib"),
        (train_linen, [], "no batch"),
    ],
)
def test_wrong_calls_of_reestimate_are_named(train_fn, calib, message):
    with pytest.raises(ValueError, match=message):
        tuning.reestimate(train_fn, NET.params, calib)


# Moments of sites.


def test_the_map_of_a_channel_with_its_own_moments_is_the_identity():
    rng = np.random.default_rng(3)
    beta, gamma = jnp.asarray(rng.normal(size=(2, 200)), jnp.float32)
    factor, shift = tuning.renormalizer(*[Moments(beta, gamma**2)] * 2)
    y = 3.0 * jnp.asarray(rng.normal(size=200), jnp.float32)
    np.testing.assert_allclose(factor * y + shift, y, atol=1e-6)


def test_factors_are_clamped_and_dead_channels_stay():
    seen = Moments(jnp.array([1.0, 1.0, 1.0, 7.0]), jnp.array([1.0, 400.0, 1.0, 0.0]))
    target = Moments(jnp.full(4, 3.0), jnp.array([25.0, 1.0, 0.0, 1.0]))
    factor, shift = tuning.renormalizer(seen, target)
    np.testing.assert_array_equal(factor, [2.0, 0.5, 1.0, 1.0])
    np.testing.assert_array_equal(shift, [1.0, 2.5, 0.0, -4.0])


def conv_pool_dense(params, x, outputs=False):
    """Folded layers: what each returns behind its bias can be looked at."""
    a = nn.Conv(6, (3, 3), strides=2).apply({"params": params["conv"]}, x)
    b = nn.Conv(6, (3, 3), feature_group_count=6).apply({"params": params["depthwise"]}, nn.relu(a))
    c = nn.Dense(5).apply({"params": params["dense"]}, nn.relu(b))
    y = nn.relu(c).mean((1, 2)) @ params["head"]
    return (y, a, b, c) if outputs else y


FOLDED = {
    "conv": gallery.weights(kernel=(3, 3, 2, 6), bias=(6,)),
    "depthwise": gallery.weights(kernel=(3, 3, 1, 6), bias=(6,)),
    "dense": gallery.weights(kernel=(6, 5), bias=(5,)),
    "head": array((5, 3), 9),
}
LAYERS = ("conv", "depthwise", "dense")


FOLDED4 = in_bits(FOLDED, 4)


def spoiled(qtree):
    """Gains from 0.7 to 1.5 and shifts in every folded layer."""
    rng, new = np.random.default_rng(8), dict(qtree)
    for name in LAYERS:
        kernel, bias = qtree[name]["kernel"], qtree[name]["bias"]
        gain = jnp.asarray(rng.uniform(0.7, 1.5, bias.size), jnp.float32)
        shift = jnp.asarray(rng.normal(size=bias.size), jnp.float32)
        scale = kernel.qparams.scale * gain.reshape((1,) * (len(kernel.shape) - 1) + (-1,))
        kernel = replace(kernel, qparams=replace(kernel.qparams, scale=scale))
        new[name] = {"kernel": kernel, "bias": gain * bias + shift}
    return new


RUN = jax.jit(sites.quantized(partial(conv_pool_dense, outputs=True)))


def moments(params):
    """Mean and deviation of each channel behind each folded layer, in float64."""
    layers = [np.asarray(y, np.float64) for y in RUN(params, IMAGES)[1:]]
    return [np.concatenate([of(y, (0, 1, 2)) for y in layers]) for of in (np.mean, np.std)]


def test_full_reconstruction_restores_means_and_deviations():
    worse = spoiled(FOLDED4)
    new, info = tuning.reconstruct(conv_pool_dense, FOLDED, worse, IMAGES)
    assert list(info.gap) == [f"{name}/kernel" for name in LAYERS]
    assert min(info.gap.values()) > 0.3
    for ideal, before, after in zip(*map(moments, (FOLDED, worse, new)), strict=True):
        assert np.abs(before - ideal).max() > 0.2
        np.testing.assert_allclose(after, ideal, atol=2e-4)
    for name in LAYERS:
        a, b = FOLDED4[name]["kernel"], new[name]["kernel"]
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_array_equal(a.qparams.zero_point, b.qparams.zero_point)
        assert not changed(a.acts, b.acts)
    every = {f"{name}/{leaf}" for name in LAYERS for leaf in ("kernel", "bias")}
    assert changed(worse, new) == every


def test_the_float_model_needs_no_repair_and_no_damping_none():
    same, info = tuning.reconstruct(conv_pool_dense, FOLDED, FOLDED, [IMAGES[:20], IMAGES[20:]])
    assert not changed(FOLDED, same)
    assert set(info.gap.values()) == {0.0}
    same, _ = tuning.reconstruct(conv_pool_dense, FOLDED, spoiled(FOLDED4), IMAGES, damping=0.0)
    for a, b in zip(*map(jax.tree.leaves, (same, spoiled(FOLDED4))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_damping_moves_the_first_layers_mean_that_far():
    worse = spoiled(FOLDED4)
    part, _ = tuning.reconstruct(conv_pool_dense, FOLDED, worse, IMAGES, damping=1 - 0.9**5)
    ideal, before, after = (moments(q)[0][:6] for q in (FOLDED, worse, part))
    var = [moments(q)[1][:6] ** 2 for q in (FOLDED, worse)]
    damped = 0.40951 * var[1] + (1 - 0.40951) * var[0]
    # mu' = f (mu - mu_d) + mu_t with mu_d and sigma_d moved 41 % of the way.
    expected = np.sqrt(var[0] / damped) * (1 - 0.40951) * (before - ideal) + ideal
    np.testing.assert_allclose(after, expected, atol=1e-4)


def normed_mlp(p, x):
    for layer in (p["first"], p["second"]):
        x = nn.relu(normed(layer, x @ layer["w"]))
    return x @ p["head"]


def mlp_params(seed=0):
    def layer(i):
        vectors = {name: array((1, 8), seed + i, 1.0, 0.3) for name in ("mean", "scale", "bias")}
        return vectors | {"w": array((6 + 2 * i, 8), seed + i, 0.1, 0.4)}

    return {"first": layer(0), "second": layer(1), "head": array((8, 3), seed)}


def test_a_norm_left_in_the_code_gives_the_same_repair_as_a_folded_one():
    folded, _ = tuning.fold(normed_mlp, mlp_params(), ROWS)
    outputs = []
    for params in (mlp_params(), folded):
        qtree = in_bits(params, 3)
        qtree, info = tuning.reconstruct(normed_mlp, params, qtree, ROWS)
        assert list(info.gap) == ["first/w", "second/w"]
        outputs.append(jax.jit(sites.quantized(normed_mlp))(qtree, ROWS))
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_grids_per_tensor_become_grids_per_channel_and_the_rest_is_named():
    def model(p, x):
        shared = x @ p["twice"] @ p["twice"]
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), shared, p["stack"])[0]
        return x @ p["plain"] @ p["head"]

    params = gallery.weights(twice=(6, 6), stack=(2, 6, 6), plain=(6, 6), head=(6, 3))
    grid = make_qparams(jnp.full((1, 1), 0.4), qmin=-2, qmax=1)
    qtree = params | {"plain": quantize(params["plain"], grid)}
    new, info = tuning.reconstruct(model, params, qtree, ROWS)
    assert (set(info.factor), info.shift) == ({"plain"}, {})
    twice = dict.fromkeys(("twice", "twice@1"), "the leaf is used elsewhere too")
    assert info.left == twice | {"stack": "inside a loop"}
    assert new["plain"].qparams.scale.shape == (1, 6)
    np.testing.assert_array_equal(new["plain"].codes, qtree["plain"].codes)
    x = model({**params, "plain": jnp.eye(6), "head": jnp.eye(6)}, ROWS)
    deviations = [jnp.std(x @ w, 0) for w in (params["plain"], dequantize_array(new["plain"]))]
    inside = np.abs(info.factor["plain"] - 1.25) < 0.749
    assert bool(inside.any())
    np.testing.assert_allclose(*[d[inside] for d in deviations], rtol=1e-4)


def test_repaired_models_are_nearer_to_the_float_one():
    gains, run = [], jax.jit(sites.quantized(normed_mlp))
    for seed in range(3):
        params = mlp_params(seed)
        qtree = in_bits(params, 3)
        new, _ = tuning.reconstruct(normed_mlp, params, qtree, ROWS)
        before, after = (divergence(run(params, ROWS), run(q, ROWS)) for q in (qtree, new))
        gains.append((before - after) / before)
    assert np.mean(gains) > 0.1, gains


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"head": FOLDED["head"].T}, {}, r"qtree: differs from params in \['head'\]"),
        ({"extra": FOLDED["head"]}, {}, r"qtree: differs from params in \['extra'\]"),
        ({}, {"select": "nothing"}, "no site to repair"),
        ({}, {"damping": 1.5}, "damping: must be from 0 to 1, not 1.5"),
        ({}, {"calib": IMAGES.at[0].set(jnp.nan)}, "look for NaN"),
    ],
)
def test_wrong_calls_of_reconstruct_are_named(change, options, message):
    options = {"calib": IMAGES} | options
    with pytest.raises(ValueError, match=message):
        tuning.reconstruct(conv_pool_dense, FOLDED, FOLDED | change, **options)


def test_parameters_that_are_no_numbers_are_named():
    params = FOLDED | {"head": FOLDED["head"].at[0].set(jnp.inf)}
    with pytest.raises(ValueError, match="'head' holds NaN or infinity"):
        tuning.reconstruct(conv_pool_dense, params, params, IMAGES)


# Biases.


TUNED = {
    "linen": (NET, IMAGES, {"params/conv_norm/bias", "params/depthwise_norm/bias"}),
    "nnx": (NNX, IMAGES, {"norm/bias"}),
    "scan": (STACK, ROWS, {"params/layers/bias"}),
}


@pytest.mark.parametrize("kind", TUNED)
def test_only_biases_move_and_the_loss_does_not_rise(kind):
    model, x, biases = TUNED[kind]
    qtree = tree.map_named(
        lambda name, leaf: leaf + 0.3 if name in biases else leaf,
        in_bits(model.params, 8),
    )
    tuned, info = tuning.tune_biases(
        model.apply_fn,
        model.params,
        qtree,
        x,
        key=jax.random.key(3),
        optimizer=optax.adam(0.02),
        batch_size=10,
        steps=18,
    )
    assert set(info.tuned) == changed(qtree, tuned) == biases
    assert info.loss[1] < info.loss[0]
    assert info.held_out[1] < info.held_out[0]
    assert info.trace[-1, 0] == 18
    run = jax.jit(sites.quantized(model.apply_fn))
    before, after = (divergence(run(model.params, x), run(q, x)) for q in (qtree, tuned))
    assert after < 0.8 * before
    # 50 examples were tuned on, 10 held out.
    np.testing.assert_allclose(after, (5 * info.loss[1] + info.held_out[1]) / 6, rtol=1e-3)


def test_one_step_follows_the_gradient():
    """b - b0 has the error (b - b0)^2 / 3 per entry, the gradient 2 (b - b0) / 3."""

    def model(p, x):
        return x @ p["w"] + p["b"]

    params = gallery.weights(w=(6, 3), b=(1, 3))
    off = jnp.array([[0.5, -1.0, 2.0]])
    qtree = {"w": params["w"], "b": params["b"] + off}
    options = {"select": "b", "batch_size": 20, "key": jax.random.key(0), "steps": 1}
    half = {"optimizer": optax.sgd(0.75), "distance": distortion.mse}
    tuned, info = tuning.tune_biases(model, params, qtree, ROWS, **half, **options)
    np.testing.assert_allclose(tuned["b"], params["b"] + off / 2, rtol=1e-5)
    np.testing.assert_allclose(info.loss, [1.75, 1.75 / 4], rtol=1e-5)
    labelled = {"x": ROWS, "y": model(params, ROWS)}
    by_labels, _ = tuning.tune_biases(
        lambda p, batch: model(p, batch["x"]),
        params,
        qtree,
        labelled,
        loss_fn=lambda out, batch: distortion.mse(batch["y"], out),
        optimizer=optax.sgd(0.75),
        **options,
    )
    np.testing.assert_allclose(by_labels["b"], tuned["b"], rtol=1e-5)


def one_hidden(p, x):
    return nn.relu(x @ p["w"] + p["b"]) @ p["head"]


SMALL = gallery.weights(w=(6, 6), b=(1, 6), head=(6, 3))


def test_a_key_gives_one_result_and_steps_that_only_harm_give_none():
    qtree = in_bits(SMALL, 8) | {"b": SMALL["b"] + 0.3}

    def tuned(seed, lr):
        options = {"key": jax.random.key(seed), "optimizer": optax.sgd(lr)}
        options |= {"batch_size": 10, "steps": 10}
        return tuning.tune_biases(one_hidden, SMALL, qtree, ROWS, **options)

    first, again, other = tuned(1, 0.1)[0], tuned(1, 0.1)[0], tuned(2, 0.1)[0]
    assert changed(qtree, first) == {"b"}
    assert not changed(first, again)
    assert changed(first, other)
    harmed, info = tuned(1, -1.0)
    assert not changed(qtree, harmed)
    assert info.loss[0] == info.loss[1]


def test_batches_in_a_list_stay_as_they_are():
    qtree, batches, seen = in_bits(SMALL, 2), [ROWS[:10], ROWS[10:15], ROWS[15:20]], []
    options = {"key": jax.random.key(0), "steps": 3, "progress": lambda *at: seen.append(at[:2])}
    _, info = tuning.tune_biases(one_hidden, SMALL, qtree, batches, **options)
    assert seen == [(2, 3), (3, 3)]
    run = jax.jit(sites.quantized(one_hidden))
    losses = [divergence(run(SMALL, x), run(qtree, x)) for x in batches]
    expected = [(10 * losses[0] + 5 * losses[1]) / 15, losses[2]]
    np.testing.assert_allclose([info.loss[0], info.held_out[0]], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (lambda p, x: x @ p["w"] @ p["head"], {}, "no bias to tune"),
        (lambda p, x: x @ p["w"] + p["b"], {}, r"behind the sites are \['b'\], of which the last"),
        (one_hidden, {"calib": ROWS[:15]}, "15 examples do not fill two batches of 10"),
        (one_hidden, {"calib": jnp.full_like(ROWS, jnp.nan)}, "not finite"),
    ],
)
def test_wrong_calls_of_tune_biases_are_named(model, options, message):
    options = {"calib": ROWS, "batch_size": 10, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        tuning.tune_biases(model, SMALL, SMALL, **options)
