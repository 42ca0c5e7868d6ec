"""Every place where a leaf meets data is found, seen and rewritten, in models of every kind."""

import functools
import time
from dataclasses import replace

import gallery
import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from gallery import GALLERY, ROWS, array
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import PartitionSpec

from lnq import tree
from lnq.quantizer import FakeQuantTensor, QTensor, dequantize, is_quantized, make_qparams
from lnq.sites import Stat, find_sites, perturbed, quantized, tails, tap

every_model = pytest.mark.parametrize("model", GALLERY, ids=lambda model: model.name)
MODELS = {model.name: model for model in GALLERY}


def distance(a, b):
    """Norm of the difference of two trees, relative to the second."""
    a, b = (
        np.concatenate([np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(x)])
        for x in (a, b)
    )
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def found(name):
    model = MODELS[name]
    return find_sites(model.apply_fn, model.params, *model.args)


def quantized_leaf(w, shared, bits, acts=(), dtype=jnp.int16):
    """Codes from the smallest to the largest value, one grid where axes are not shared."""
    w = np.asarray(w, np.float64)
    low, high = w.min(shared, keepdims=True), w.max(shared, keepdims=True)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = np.maximum(high - low, 1e-3) / (qmax - qmin)
    qparams = make_qparams(scale, qmin=qmin, qmax=qmax, zero_point=qmin - low / scale)
    return QTensor(jnp.asarray(oracles.quantize(w, qparams), dtype), qparams, acts)


def act_grid(site, bits):
    """One grid for all data from -5 to 6; a sliced leaf has one for each slice."""
    lengths = tuple(site.shape[axis] for axis in site.sliced)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 11 / (qmax - qmin) * np.ones(lengths + (1,) * len(site.act.shape))
    zero_point = np.round(qmin + 5 / scale)
    return make_qparams(scale, qmin=qmin, qmax=qmax, zero_point=zero_point)


def quantized_tree(model, coarse=None, coarse_act=None):
    """Every site's leaf and data in 16 bits; one leaf, or the data of one site, in 2."""

    def leaf(name, w):
        sites = [site for site in found(model.name).sites if site.path == name]
        if not sites:
            return w
        shared = sorted({axis for site in sites for axis in site.contracting})
        acts = tuple(act_grid(site, 2 if site.name == coarse_act else 16) for site in sites)
        return quantized_leaf(w, tuple(shared), 2 if name == coarse else 16, acts)

    return tree.map_named(leaf, model.params)


def weights_only(model):
    return tree.map_named(
        lambda _, leaf: replace(leaf, acts=()) if is_quantized(leaf) else leaf,
        quantized_tree(model),
    )


@functools.cache
def jitted(name):
    """The float model and the quantized one; each compiles once per structure of its leaves."""
    model = MODELS[name]
    return jax.jit(model.apply_fn), jax.jit(quantized(model.apply_fn))


def outputs(run, params, model):
    """On the model's arguments and, for the other branch, on their negatives."""
    opposite = [-x if tree.is_float(x) else x for x in model.args]
    return jax.device_get([run(params, *model.args), run(params, *opposite)])


# What is found.


@every_model
def test_all_sites_and_all_other_uses_are_listed(model):
    sites, others = found(model.name)
    assert tuple(site.name for site in sites) == model.sites
    assert {(use.path, use.reason) for use in others} == model.others


@every_model
def test_shapes_are_enough(model):
    params, args = jax.eval_shape(lambda *x: x, model.params, model.args)
    assert find_sites(model.apply_fn, params, *args) == found(model.name)


# What is computed.


@every_model
def test_sixteen_bits_are_close_to_floats(model):
    float_model, int_model = jitted(model.name)
    expected = outputs(float_model, model.params, model)
    error = distance(outputs(int_model, quantized_tree(model), model), expected)
    assert error < 1e-3
    assert (error > 0) == bool(model.sites)


@every_model
def test_a_coarse_grid_at_any_one_site_shows(model):
    run = jitted(model.name)[1]
    fine = outputs(run, quantized_tree(model), model)
    for site in found(model.name).sites:
        for coarse in ({"coarse": site.path}, {"coarse_act": site.name}):
            changed = outputs(run, quantized_tree(model, **coarse), model)
            assert distance(changed, fine) > 1e-3, coarse


# Products of integers.


def integer_grid(low, high, rank, qmin=-128, qmax=127):
    """An int8 grid for data, its zero point a code."""
    scale = (high - low) / (qmax - qmin) * np.ones((1,) * rank)
    grid = make_qparams(scale, qmin=qmin, qmax=qmax, zero_point=np.round(qmin - low / scale))
    return replace(grid, dtype=jnp.dtype("int8"))


def conv(layout, *, strides=(1, 1), padding="SAME", dilation=(1, 1), groups=1):
    def product(w, x):
        return lax.conv_general_dilated(
            x,
            w,
            strides,
            padding,
            lhs_dilation=dilation,
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    return product


def scanned(ws, x):
    return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]


NCHW = ("NCHW", "OIHW", "NCHW")
INTEGER_PRODUCTS = {
    # name: product, shape of the leaf, axes summed over, shape of the data
    "dot": (lambda w, x: x @ w, (6, 5), (0,), (4, 6)),
    "dot, leaf on the left": (lambda w, x: w @ x.T, (5, 6), (1,), (4, 6)),
    "dot, two axes": (
        lambda w, x: jnp.einsum("thk,hkd->td", x, w),
        (2, 3, 5),
        (0, 1),
        (4, 2, 3),
    ),
    "dot, batched": (lambda w, x: jnp.einsum("teh,ehd->edt", x, w), (3, 6, 5), (1,), (4, 3, 6)),
    "dot, batched, leaf on the left": (
        lambda w, x: lax.dot_general(w, x, (((1,), (2,)), ((0,), (0,)))),
        (3, 6, 5),
        (1,),
        (3, 4, 6),
    ),
    "convolution": (conv(gallery.NHWC), (3, 3, 2, 5), (0, 1, 2), (2, 6, 5, 2)),
    "convolution, strided": (
        conv(gallery.NHWC, strides=(2, 3), padding=((0, 2), (1, 1))),
        (3, 3, 2, 5),
        (0, 1, 2),
        (2, 6, 5, 2),
    ),
    "convolution, transposed": (
        conv(gallery.NHWC, padding=((1, 2), (2, 1)), dilation=(2, 3)),
        (3, 3, 2, 5),
        (0, 1, 2),
        (2, 4, 3, 2),
    ),
    "convolution, NCHW, grouped": (
        conv(NCHW, strides=(1, 2), groups=2),
        (6, 2, 3, 2),
        (1, 2, 3),
        (2, 4, 5, 6),
    ),
    "convolution, depthwise": (conv(gallery.NHWC, groups=4), (3, 3, 1, 8), (0, 1, 2), (1, 5, 5, 4)),
}


def products_of(jaxpr):
    """Dtypes of operands and result of each product in a jaxpr, inner ones too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield tuple(str(var.aval.dtype) for var in (*eqn.invars, *eqn.outvars))
        for inner in jex.jaxprs_in_params(eqn.params):
            yield from products_of(inner)


INTEGER = {("int8", "int8", "int32")}


@pytest.mark.parametrize("case", INTEGER_PRODUCTS.values(), ids=INTEGER_PRODUCTS)
def test_products_of_int8_equal_those_of_the_rounded_floats(case):
    product, shape, summed, data = case
    w, x = array(shape, 5, 0.4, 0.5), array(data, 6, 3.0, 2.0)
    grid = integer_grid(-1.0, 7.0, len(data))
    leaf = quantized_leaf(w, summed, 8, (grid,), jnp.int8)
    assert abs(leaf.qparams.zero_point % 1 - 0.5).min() < 0.4
    assert abs(grid.zero_point).min() > 90
    rounded = oracles.dequantize(oracles.quantize(x, grid), grid)
    expected = product(*map(jnp.float32, (oracles.dequantize(leaf.codes, leaf.qparams), rounded)))
    run = jax.jit(quantized(product)).trace(leaf, x)
    assert distance(run.lower().compile()(leaf, x), expected) < 1e-5
    assert set(products_of(run.jaxpr.jaxpr)) == INTEGER


def test_scanned_products_of_int8_use_the_grids_of_their_layer():
    ws, x = array((3, 6, 6), 5, 0.1, 0.5), array((4, 6), 6, 3.0, 2.0)
    grids = [integer_grid(-1.0, 7.0, 2), integer_grid(-9.0, 12.0, 2), integer_grid(-15.0, 9.0, 2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *grids)
    leaf = quantized_leaf(ws, (1,), 8, (stacked,), jnp.int8)
    expected = x
    for w, grid in zip(oracles.dequantize(leaf.codes, leaf.qparams), grids, strict=True):
        expected = oracles.dequantize(oracles.quantize(expected, grid), grid) @ w
    run = jax.jit(quantized(scanned)).trace(leaf, x)
    assert distance(run.lower().compile()(leaf, x), expected) < 1e-5
    assert set(products_of(run.jaxpr.jaxpr)) == INTEGER


@pytest.mark.parametrize("grid", ["groups along the sum", "a factor along the sum", "data"])
def test_where_no_one_factor_stands_before_the_sum_floats_are_multiplied(grid):
    w, x = array((6, 5), 5, 0.4, 0.5), array((4, 6), 6, 3.0, 2.0)
    act = integer_grid(-1.0, 7.0, 2)
    if grid == "data":
        act = replace(act, scale=act.scale * jnp.arange(1.0, 7.0)[None] / 6)
    leaf = quantized_leaf(w, (0,), 8, (act,), jnp.int8)
    if grid == "groups along the sum":
        scale = jnp.repeat(leaf.qparams.scale, 3, 0) * jnp.arange(1.0, 4.0)[:, None]
        leaf = replace(leaf, qparams=replace(leaf.qparams, scale=scale))
    if grid == "a factor along the sum":
        leaf = replace(leaf, qparams=replace(leaf.qparams, in_scale=jnp.arange(1.0, 7.0)[:, None]))
    rounded = oracles.dequantize(oracles.quantize(x, act), act)
    expected = rounded @ oracles.dequantize(leaf.codes, leaf.qparams)
    run = quantized(lambda w, x: x @ w)
    assert distance(run(leaf, x), expected) < 1e-5
    jaxpr = jax.make_jaxpr(run)(leaf, x).jaxpr
    assert set(products_of(jaxpr)) == {("float32", "float32", "float32")}


LEAF_VIEWS = {
    "transpose": (lambda w: w.T, (5, 6), (1,)),
    "heads merged": (lambda w: w.reshape(6, 5), (2, 3, 5), (0, 1)),
    "channels split and merged": (lambda w: w.reshape(6, 2, 2).reshape(6, 4), (6, 4), (0,)),
    "squeeze": (lambda w: w[None].squeeze(0), (6, 5), (0,)),
    "slice": (lambda w: w[:, 1:5:2], (6, 5), (0,)),
    "reversal": (lambda w: w[::-1, ::-1], (6, 5), (0,)),
    "split": (lambda w: jnp.split(w, 2, 1)[1], (6, 4), (0,)),
    "one of a stack": (lambda w: w[1], (3, 6, 5), (1,)),
    "traced place": (
        lambda w: lax.dynamic_index_in_dim(w, jnp.int32(2), 0, False),
        (3, 6, 5),
        (1,),
    ),
    "cast": (lambda w: w.astype(jnp.float16).astype(jnp.float32), (6, 5), (0,)),
    "call": (lambda w: jax.jit(lambda w: w.T)(w), (5, 6), (1,)),
    "broadcast": (lambda w: jnp.broadcast_to(w[:, None], (6, 3, 5))[:, 1], (6, 5), (0,)),
}


@pytest.mark.parametrize("case", LEAF_VIEWS.values(), ids=LEAF_VIEWS)
def test_codes_stay_codes_through_views(case):
    view, shape, summed = case
    act = integer_grid(-1.0, 7.0, 2)
    w, x = array(shape, 5, 0.4, 0.5), array((4, 6), 6, 3.0, 2.0)
    leaf = quantized_leaf(w, summed, 8, (act,), jnp.int8)
    run = jax.jit(quantized(lambda w, x: x @ view(w))).trace(leaf, x)
    rounded = oracles.dequantize(oracles.quantize(x, act), act)
    floats = jnp.float32(oracles.dequantize(leaf.codes, leaf.qparams))
    expected = rounded @ np.float64(view(floats))
    tolerance = 1e-3 if view is LEAF_VIEWS["cast"][0] else 1e-5  # the cast itself rounds
    assert distance(run.lower().compile()(leaf, x), expected) < tolerance
    assert set(products_of(run.jaxpr.jaxpr)) == INTEGER


DIVISORS = {n: [m for m in range(1, n + 1) if n % m == 0] for n in range(1, 13)}
RESHAPED = ((4, 6), (24,), (2, 2, 6), (4, 3, 2), (8, 3), (1, 12, 2), (6, 4), (2, 1, 3, 4), (3, 8))


@st.composite
def one_view(draw, shape):
    """A view as a function of the library (NumPy or JAX) and an array of this shape."""
    axis = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[axis] - 1))
    stop = draw(st.integers(start + 1, shape[axis]))
    step = draw(st.sampled_from([1, 1, 2]))
    cut = (slice(None),) * axis + (slice(start, stop, step),)
    order = draw(st.permutations(range(len(shape))))
    reshaped = [s for s in RESHAPED if np.prod(s) == np.prod(shape)] or [shape]
    size = draw(st.sampled_from(reshaped))
    views = {
        "transpose": lambda lib, a: lib.transpose(a, order),
        "reshape": lambda lib, a: lib.reshape(a, size),
        "slice": lambda lib, a: a[cut],
        "rev": lambda lib, a: lib.flip(a, axis),
        "expand": lambda lib, a: lib.expand_dims(a, axis),
        "broadcast": lambda lib, a: lib.broadcast_to(a, (2, *shape)),
        "squeeze": lambda lib, a: lib.squeeze(a),
    }
    return views[draw(st.sampled_from(sorted(views)))]


@st.composite
def grids(draw, shape):
    """Shared, per channel or in groups, each field in its own way; every number exact in float."""

    def numbers(low, high, unit):
        groups = tuple(draw(st.sampled_from(DIVISORS[n])) for n in shape)
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        return rng.integers(low, high, groups) * unit

    factor = 2.0 ** numbers(-2, 2, 1) if draw(st.booleans()) else None
    scale, zero_point = 2.0 ** numbers(-3, 3, 1), numbers(-99, 99, 0.5)
    return make_qparams(scale, qmin=-128, qmax=127, zero_point=zero_point, in_scale=factor)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_views_of_a_quantized_leaf_are_views_of_its_floats(data):
    codes = np.random.default_rng(3).integers(-128, 128, (4, 6)).astype(np.int8)
    qparams = data.draw(grids(codes.shape))
    expected = oracles.dequantize(codes, qparams)
    views = []
    for _ in range(data.draw(st.integers(1, 3))):
        views.append(data.draw(one_view(expected.shape)))
        expected = views[-1](np, expected)
        if not expected.shape:
            break

    def chain(w):
        return functools.reduce(lambda a, view: view(jnp, a), views, w)

    out = jax.jit(quantized(chain))(QTensor(jnp.asarray(codes), qparams))
    np.testing.assert_array_equal(out, expected)


# Models once more, written out: `see(site, x, out, *turn)` stands where a site is.


def mlp(p, see, x):
    first, last = p["params"]["Dense_1"], p["params"]["Dense_0"]  # in the order of their making
    x = see("params/Dense_1/kernel", x, x @ first["kernel"]) + first["bias"][None]
    x = jnp.maximum(x, 0)
    return see("params/Dense_0/kernel", x, x @ last["kernel"]) + last["bias"][None]


def cnn(p, see, x):
    norm, moments = p["params"]["BatchNorm_0"], p["batch_stats"]["BatchNorm_0"]
    kernel, dense = p["params"]["Conv_0"]["kernel"], p["params"]["Dense_0"]
    edges = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    out = sum(
        edges[:, i : i + 5 : 2, j : j + 5 : 2] @ kernel[i, j] for i in range(3) for j in range(3)
    )
    x = see("params/Conv_0/kernel", x, out) - moments["mean"][None, None, None]
    x = x / jnp.sqrt(moments["var"] + 1e-5)[None, None, None] * norm["scale"][None, None, None]
    x = jnp.maximum(x + norm["bias"][None, None, None], 0).mean((1, 2))
    return see("params/Dense_0/kernel", x, x @ dense["kernel"]) + dense["bias"][None]


def last_axis(p, see, x):
    p = p["params"]["dense"]
    for i in range(2):
        out = see("params/dense/kernel", x, x @ p["kernel"][..., i], i)
        x = jnp.tanh(out + p["bias"][None, :, i])
    return x


def lstm(p, see, x):
    p = p["params"]["cell"]
    c = h = jnp.zeros((x.shape[0], 6))
    hidden = []
    for t in range(x.shape[1]):
        gate = {}
        for name in "ifgo":
            ii, hh = p[f"i{name}"], p[f"h{name}"]
            gate[name] = see(f"params/cell/i{name}/kernel", x[:, t], x[:, t] @ ii["kernel"])
            gate[name] += see(f"params/cell/h{name}/kernel", h, h @ hh["kernel"]) + hh["bias"][None]
        i, f, o = (jax.nn.sigmoid(gate[name]) for name in "ifo")
        c = f * c + i * jnp.tanh(gate["g"])
        h = o * jnp.tanh(c)
        hidden.append(h)
    return jnp.stack(hidden, 1)


def while_turns(p, see, x):
    for _ in range(3):
        x = jnp.tanh(see("w", x, x @ p["w"]) + p["b"])
    return see("out", x, x @ p["out"])


def one_branch(p, see, x):
    if np.asarray(x).sum() > 0:
        return see("yes@1", x, x @ p["yes"])
    x = jnp.tanh(see("no", x, x @ p["no"]))
    return see("yes", x, x @ p["yes"])


def indexed_turns(p, see, x):
    for i in range(3):
        x = jnp.tanh(see("w", x, x @ p["w"][i]))
    return x


def nested_turns(p, see, x):
    for i in range(2):
        for j in (2, 1, 0):
            x = jnp.tanh(see("w", x, x @ p["w"][i, j], i, j))
    return x


def deep_rnn_turns(p, see, xs):
    h, xs = jnp.zeros((4, 6)), jnp.cumsum(xs, 0)
    for x in xs:
        h = h + see("start", x, x @ p["start"])
        for i in range(2):
            h = jnp.tanh(see("w", h, h @ p["w"][i], i))
    return h


def two_devices(p, see, x):
    parts = []
    for i, part in enumerate(jnp.split(x, 2)):
        part = jnp.tanh(see("w", part, part @ p["w"], i) + p["b"])
        part = see("v", part, part @ p["v"], i)
        parts.append(see("out", part, part @ p["out"], i))
    return jnp.concatenate(parts)


def rnn_on_two_devices(p, see, xs):
    parts = []
    for i, part in enumerate(jnp.split(xs, 2, 1)):
        h = jnp.zeros((2, 6))
        for x in part:
            h = jnp.tanh(see("w", h + x, (h + x) @ p["w"], i))
        parts.append(h)
    return jnp.concatenate(parts)


TWINS = {
    "linen MLP": mlp,
    "linen CNN": cnn,
    "linen stack on the last axis": last_axis,
    "linen LSTM": lstm,
    "while": while_turns,
    "cond": one_branch,
    "indexed stack": indexed_turns,
    "nested scan": nested_turns,
    "deep RNN": deep_rnn_turns,
    "FSDP": two_devices,
    "sharded RNN": rnn_on_two_devices,
}
every_twin = pytest.mark.parametrize("name", TWINS)


def seen_by_twin(name, sign=1.0):
    """``{site: {turn: [data]}}``."""
    model, seen = MODELS[name], {}

    def see(site, x, out, *turn):
        seen.setdefault(site, {}).setdefault(turn, []).append(np.asarray(x))
        return out

    TWINS[name](model.params, see, *[sign * x for x in model.args])
    return seen


@every_twin
def test_deltas_are_added_to_the_outputs_of_sites(name):
    model, sites = MODELS[name], found(name).sites
    deltas = {s.name: array(s.delta.shape, i, 0.1, 0.1) for i, s in enumerate(sites)}

    def twin(deltas):
        return TWINS[name](
            model.params, lambda site, x, out, *turn: out + deltas[site][turn], *model.args
        )

    def moved(deltas):
        return perturbed(model.apply_fn)(model.params, deltas, *model.args)

    def loss(run, deltas):
        return ((out := run(deltas)) * array(out.shape, 9)).sum()

    if name == "while":  # has no gradient
        assert distance(jax.jit(moved)(deltas), twin(deltas)) < 1e-5
        return
    value, slopes = jax.jit(jax.value_and_grad(functools.partial(loss, moved)))(deltas)
    expected, expected_slopes = jax.jit(jax.value_and_grad(functools.partial(loss, twin)))(deltas)
    assert distance(value, expected) < 1e-5
    for site in sites:
        if np.any(expected_slopes[site.name]):
            assert distance(slopes[site.name], expected_slopes[site.name]) < 1e-5, site.name
        else:  # a branch not taken
            assert not np.any(slopes[site.name])


def test_sites_without_a_delta_stay():
    model = MODELS["linen MLP"]
    delta = {"params/Dense_0/kernel": jnp.ones((4, 3))}
    out = perturbed(model.apply_fn)(model.params, delta, *model.args)
    np.testing.assert_allclose(out, model.apply_fn(model.params, *model.args) + 1, rtol=1e-6)


TOTAL = Stat(
    lambda x, _: {"sum": x.sum(), "max": x.max()},
    lambda like: {
        "sum": jnp.zeros(like["sum"].shape),
        "max": jnp.full(like["max"].shape, -jnp.inf),
    },
    lambda a, b: {"sum": a["sum"] + b["sum"], "max": jnp.maximum(a["max"], b["max"])},
)


@functools.cache
def tapped(name):
    return jax.jit(tap(MODELS[name].apply_fn, TOTAL))


@every_twin
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["", "negated"])
def test_statistics_are_those_of_all_data_that_came_by(name, sign):
    model, seen = MODELS[name], seen_by_twin(name, sign)
    out, stats = tapped(name)(model.params, *[sign * x for x in model.args])
    expected = TWINS[name](
        model.params, lambda site, x, out, *turn: out, *[sign * x for x in model.args]
    )
    assert distance(out, expected) < 1e-5
    assert set(stats) == set(model.sites)
    for site in found(name).sites:
        turns = seen.get(site.name, {(): []})
        if site.shards:  # all devices together
            turns = {(): [x for part in turns.values() for x in part]}
        lengths = tuple(np.max(list(turns), axis=0) + 1) if () not in turns else ()
        total = np.zeros(lengths)
        largest = np.full(lengths, -np.inf)
        for turn, xs in turns.items():
            total[turn] = sum(x.sum(dtype=np.float64) for x in xs)
            largest[turn] = max((x.max() for x in xs), default=-np.inf)
        np.testing.assert_allclose(stats[site.name]["sum"], total, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(stats[site.name]["max"], largest, rtol=1e-5)


def test_every_layer_merges_its_own_results():
    def largest(a, b):
        return jnp.where(a.sum() > b.sum(), a, b)

    model = MODELS["deep RNN"]
    stat = Stat(lambda x, _: x, lambda like: jnp.full(like.shape, -jnp.inf), largest)
    kept = jax.jit(tap(model.apply_fn, stat))(model.params, *model.args)[1]["w"]
    turns = seen_by_twin("deep RNN")["w"]
    expected = [max(turns[i,], key=np.sum) for i in range(2)]
    best = [int(np.argmax([x.sum() for x in turns[i,]])) for i in range(2)]
    assert best[0] != best[1]
    np.testing.assert_allclose(kept, expected, rtol=1e-5)


RAW = Stat(lambda x, _: x)


@pytest.mark.parametrize(
    "name", ["linen MLP", "linen stack on the last axis", "linen LSTM", "FSDP"]
)
def test_raw_data_is_stacked_by_loops_and_devices(name):
    model, seen = MODELS[name], seen_by_twin(name)
    _, data = jax.jit(tap(model.apply_fn, RAW))(model.params, *model.args)
    for site, turns in seen.items():
        expected = [x for turn in sorted(turns) for x in turns[turn]]
        x = np.reshape(data[site], np.shape(expected))
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["while", "cond"])
def test_raw_data_cannot_leave_a_while_or_a_branch(name):
    model = MODELS[name]
    with pytest.raises(ValueError, match="Stat with `init` and `merge`"):
        tap(model.apply_fn, RAW)(model.params, *model.args)


def test_only_chosen_sites_are_observed():
    model = MODELS["while"]
    run = tap(model.apply_fn, RAW, only=lambda site: site.path == "out")
    data = run(model.params, *model.args)[1]
    assert list(data) == ["out"]
    np.testing.assert_allclose(data["out"], seen_by_twin("while")["out"][()][0], rtol=1e-5)


@pytest.mark.parametrize("name", ["linen MLP", "nested scan"])
def test_under_jit_statistics_are_the_same(name):
    model = MODELS[name]
    eager = tap(model.apply_fn, TOTAL)(model.params, *model.args)
    assert distance(tapped(name)(model.params, *model.args), eager) < 1e-6


# Gradients to grids.


def rounded_by_hand(x, scale, zero_point, qmin, qmax):
    """Straight through the rounding, constant outside the range."""
    levels = jnp.clip(x / scale + zero_point, qmin, qmax)
    return (levels + lax.stop_gradient(jnp.round(levels) - levels) - zero_point) * scale


def test_gradients_reach_the_grids_of_weights_and_data():
    model = MODELS["linen MLP"]
    kernels = dict(tree.named_leaves(model.params))
    ranges = {"weight": {"qmin": -4, "qmax": 3}, "act": {"qmin": -16, "qmax": 15}}
    grids = {
        "weight": {"scale": jnp.full((1, 1), 0.17), "zero_point": jnp.full((1, 1), 1.3)},
        "act": {"scale": jnp.full((1, 1), 0.11), "zero_point": jnp.full((1, 1), -3.0)},
    }

    def by_hand(grids):
        def see(site, x, out):
            x = rounded_by_hand(x, **grids["act"], **ranges["act"])
            return x @ rounded_by_hand(kernels[site], **grids["weight"], **ranges["weight"])

        return mlp(model.params, see, *model.args).sum()

    def by_leaves(grids):
        weight, act = (make_qparams(**grids[name], **ranges[name]) for name in ("weight", "act"))
        qtree = tree.map_named(
            lambda name, w: FakeQuantTensor(w, weight, (act,)) if name in model.sites else w,
            model.params,
        )
        return quantized(model.apply_fn)(qtree, *model.args).sum()

    found_value, found_slopes = jax.jit(jax.value_and_grad(by_leaves))(grids)
    value, slopes = jax.jit(jax.value_and_grad(by_hand))(grids)
    assert distance(found_value, value) < 1e-6
    for found_slope, slope in zip(*map(jax.tree.leaves, (found_slopes, slopes)), strict=True):
        assert distance(found_slope, slope) < 1e-5


# What surrounds a site.


def by_path(apply_fn, params, *args):
    return {site.path: site for site in find_sites(apply_fn, params, *args).sites}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_queries_keys_and_values_share_their_input(dtype):
    module = nn.MultiHeadDotProductAttention(2, dtype=dtype)
    params = jax.eval_shape(module.init, jax.random.key(0), gallery.SEQUENCE)
    sites = by_path(module.apply, params, gallery.SEQUENCE)
    query, key, value, out = (sites[f"params/{name}/kernel"].input for name in gallery.ATTENTION)
    assert query == key == value != out


def test_other_data_is_another_input():
    sites = by_path(
        lambda p, x: x @ p["a"] + x @ p["b"] + jnp.tanh(x) @ p["c"] + x.reshape(6, 4).T @ p["d"],
        gallery.weights(a=(6, 5), b=(6, 5), c=(6, 5), d=(6, 5)),
        ROWS,
    )
    a, b, c, d = (sites[name].input for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


EPILOGUES = {
    # name: what follows a product h with x; bias, sign, affine leaves, functions
    "bias": (lambda p, x, h: jax.nn.relu(h + p["b"]), ("b", 1, (), ("relu",))),
    "bias first": (lambda p, x, h: jnp.tanh(p["b"] + h), ("b", 1, (), ("tanh",))),
    "subtracted": (lambda p, x, h: jnp.exp(h - p["b"]), ("b", -1, (), ("exp",))),
    "from a leaf": (lambda p, x, h: p["b"] - h, (None, 1, (), ())),
    "norm": (lambda p, x, h: h * p["s"] + p["b"], (None, 1, ("s", "b"), ())),
    "bias and norm": (lambda p, x, h: (h + p["c"]) / p["s"] + p["b"], ("c", 1, ("s", "b"), ())),
    "two functions": (
        lambda p, x, h: jax.nn.silu(jnp.abs(h)) + p["b"],
        (None, 1, (), ("abs", "silu")),
    ),
    "residual": (lambda p, x, h: jnp.tanh(x + (h + p["b"])), ("b", 1, (), ())),
    "fork": (lambda p, x, h: jnp.tanh(h) * h, (None, 1, (), ())),
    "sum over rows": (lambda p, x, h: jnp.tanh(h.sum(0)), (None, 1, (), ())),
}


@pytest.mark.parametrize("case", EPILOGUES.values(), ids=EPILOGUES)
def test_what_follows_a_product(case):
    rest, expected = case
    params = gallery.weights(w=(6, 6), b=(1, 6), s=(1, 6), c=(1, 6))
    site = by_path(lambda p, x: rest(p, x, x @ p["w"]), params, ROWS)["w"]
    assert (site.bias, site.bias_sign, site.affine, site.chain) == expected


def test_batch_norm_follows_its_convolution():
    site, dense = found("linen CNN").sites
    norm, moments = "params/BatchNorm_0", "batch_stats/BatchNorm_0"
    assert (site.bias, site.bias_sign) == (f"{moments}/mean", -1)
    assert site.affine == (f"{moments}/var", f"{norm}/scale", f"{norm}/bias")
    assert site.chain == ("relu",)
    assert (dense.bias, dense.affine, dense.chain) == ("params/Dense_0/bias", (), ())


def test_a_site_says_where_its_axes_are_and_how_often_it_runs():
    (site,) = found("nested scan").sites
    assert (site.sliced, site.contracting, site.channels, site.batch) == ((0, 1), (2,), (3,), ())
    assert site.macs == 2 * 3 * 4 * 6 * 6
    assert tuple(length for _, length in site.stack) == (2, 3)
    w, conv = found("vmapped experts").sites
    assert (w.batch, w.contracting, w.channels, w.act_channels) == ((0,), (1,), (2,), (3,))
    assert conv.path == "conv"
    assert conv.macs == 3 * (2 * 4 * 2) * (3 * 5)
    oihw, iwo = found("unusual convolutions").sites
    assert (oihw.contracting, oihw.channels, oihw.act_channels) == ((1, 2, 3), (0,), (1,))
    assert (iwo.contracting, iwo.channels, iwo.act_channels) == ((0, 1), (2,), (1,))


# With other transformations.


@functools.cache
def small():
    """An MLP's quantized tree with int8 products in the second layer."""
    grid = integer_grid(-0.5, 4.0, 2)
    params = MODELS["linen MLP"].params["params"]

    def leaf(name, acts):
        w = params[name]["kernel"]
        return {**params[name], "kernel": quantized_leaf(w, (0,), 8, acts, jnp.int8)}

    qtree = {"params": {"Dense_0": leaf("Dense_0", (grid,)), "Dense_1": leaf("Dense_1", ())}}
    return MLP, qtree, MLP(qtree, ROWS)


MLP = quantized(MODELS["linen MLP"].apply_fn)


def test_vmap_over_data():
    run, qtree, expected = small()
    out = jax.jit(jax.vmap(run, in_axes=(None, 0)))(qtree, ROWS[:, None])
    np.testing.assert_allclose(out[:, 0], expected, rtol=1e-6, atol=1e-6)


def test_vmap_over_models():
    run, qtree, expected = small()
    twice = jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), qtree)
    out = jax.jit(jax.vmap(run, in_axes=(0, None)))(twice, ROWS)
    other = run(jax.tree.map(lambda a: a[::-1], qtree), ROWS)
    np.testing.assert_allclose(out, jnp.stack([expected, other]), rtol=1e-6, atol=1e-6)


def test_checkpoint_keeps_values_and_gradients():
    model = MODELS["linen MLP"]
    qtree = weights_only(model)

    def loss(run, params):
        return jax.jit(jax.value_and_grad(lambda x: (run(params, x) ** 2).sum()))(ROWS)

    value, slope = loss(jax.checkpoint(quantized(model.apply_fn)), qtree)
    expected, expected_slope = loss(model.apply_fn, dequantize(qtree))
    assert distance(value, expected) < 1e-6
    assert distance(slope, expected_slope) < 1e-6


def test_export_round_trip():
    run, qtree, expected = small()
    leaves, structure = jax.tree.flatten(qtree)

    @jax.jit
    def flat(leaves, x):
        return run(jax.tree.unflatten(structure, leaves), x)

    out = jax.export.export(flat)(leaves, ROWS).call(leaves, ROWS)
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_inside_shards():
    run, qtree, expected = small()
    spec = PartitionSpec
    split = jax.shard_map(
        run, mesh=gallery.mesh(), in_specs=(spec(), spec("d")), out_specs=spec("d")
    )
    np.testing.assert_allclose(jax.jit(split)(qtree, ROWS), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_across_devices(groups):
    model = MODELS["FSDP"]
    qparams = make_qparams(0.01 * jnp.arange(1.0, groups + 1)[:, None], qmin=-128, qmax=127)
    codes = jnp.asarray(np.random.default_rng(3).integers(-99, 99, (6, 4)), jnp.int8)
    qtree = {**model.params, "w": QTensor(codes, qparams)}
    float_model, int_model = jitted(model.name)
    expected = float_model(dequantize(qtree), *model.args)
    assert distance(int_model(qtree, *model.args), expected) < 1e-6
    jaxpr = str(jax.make_jaxpr(int_model)(qtree, *model.args))
    assert jaxpr.count("i8[6,4]{V:d} = all_gather") == (groups == 1)


def test_one_grid_fits_data_of_any_rank():
    grid = make_qparams([0.25], qmin=-20, qmax=20, zero_point=3)
    leaf = quantized_leaf(array((6, 5)), (0,), 8, (grid,))
    rounded = oracles.dequantize(oracles.quantize(ROWS.ravel(), grid), grid).reshape(4, 6)
    expected = rounded @ oracles.dequantize(leaf.codes, leaf.qparams)
    assert distance(quantized(lambda w, x: x @ w)(leaf, ROWS), expected) < 1e-6


def test_python_arguments_and_results_stay_python():
    def model(p, x, *, train, power=1, mode="plain"):
        assert isinstance(train, bool)
        out = x @ p["w"] if train else x
        return {"out": out**power, "mode": mode, "none": None, "number": 3}

    params = {"w": quantized_leaf(array((6, 6)), (0,), 16)}
    out = quantized(model)(params, x=ROWS, train=True, power=2)
    assert (out["mode"], out["none"], out["number"]) == ("plain", None, 3)
    expected = (ROWS @ jnp.float32(oracles.dequantize(params["w"].codes, params["w"].qparams))) ** 2
    assert distance(out["out"], expected) < 1e-6
    assert quantized(model)(params, ROWS, train=False)["out"] is not None
    observed, stats = tap(model, TOTAL)({"w": array((6, 6))}, ROWS, train=True)
    assert observed["mode"] == "plain"
    assert distance(stats["w"]["sum"], ROWS.sum()) < 1e-6


def test_quantized_leaves_may_stand_in_any_argument():
    w, v = (quantized_leaf(array((6, 6), i), (0,), 8) for i in (1, 2))
    out = quantized(lambda x, w, *, v: x @ w @ v)(ROWS, w, v=v)
    expected = ROWS
    for leaf in (w, v):
        expected = expected @ jnp.float32(oracles.dequantize(leaf.codes, leaf.qparams))
    assert distance(out, expected) < 1e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_callbacks_run_once_and_in_order(compiled):
    model = MODELS["callbacks"]
    qtree = weights_only(model)
    run = quantized(model.apply_fn)
    run = jax.jit(run) if compiled else run
    for _ in range(2):
        gallery.LOG.clear()
        run(qtree, *model.args)
        jax.effects_barrier()
        total = float((ROWS @ model.params["first"]).sum())
        names = [name for name, _ in gallery.LOG]
        assert sorted(names) == ["debug", "first", "second"]
        assert names.index("first") < names.index("second")  # prints are in an order of their own
        np.testing.assert_allclose([x for _, x in gallery.LOG], total, rtol=1e-3)
    gallery.LOG.clear()
    find_sites(model.apply_fn, model.params, *model.args)
    assert not gallery.LOG


# Errors.


def test_a_model_that_fails_keeps_its_error_and_says_the_shapes():
    def model(p, x):
        raise KeyError("encoder")

    with pytest.raises(KeyError, match="encoder") as failure:
        quantized(model)({"w": quantized_leaf(array((6, 5)), (0,), 8)}, jnp.ones((4, 7)))
    (note,) = (note for note in failure.value.__notes__ if note.startswith("lnq"))
    assert "(6, 5)" in note
    assert "(4, 7)" in note


def test_wrong_deltas_are_named():
    run = perturbed(lambda p, x: x @ p["w"])
    with pytest.raises(ValueError, match=r"\['v'\] are no sites"):
        run({"w": array((6, 5))}, {"v": jnp.zeros((4, 5))}, ROWS)
    with pytest.raises(ValueError, match=r"'w' has shape \(5,\), the site's output has \(4, 5\)"):
        run({"w": array((6, 5))}, {"w": jnp.zeros(5)}, ROWS)


# Speed.


def cost(f, *args):
    numbers = jax.jit(f).lower(*args).compile().cost_analysis()
    return np.array([numbers["flops"], numbers["bytes accessed"]])


def test_weights_cost_what_dequantizing_by_hand_costs():
    leaf = quantized_leaf(array((64, 48), 5, 0.4), (0,), 8, dtype=jnp.int8)
    x, bias = array((32, 64)), array((1, 48))

    def by_hand(leaf, bias, x):
        w = (leaf.codes.astype(jnp.float32) - leaf.qparams.zero_point) * leaf.qparams.scale
        return x @ w + bias

    run = quantized(lambda w, bias, x: x @ w + bias)
    np.testing.assert_array_equal(cost(run, leaf, bias, x), cost(by_hand, leaf, bias, x))


def test_integer_products_cost_what_they_cost_by_hand():
    grid = integer_grid(-1.0, 7.0, 2)
    leaf = quantized_leaf(array((64, 48), 5, 0.4), (0,), 8, (grid,), jnp.int8)

    def by_hand(leaf, x):
        codes, act, w = leaf.codes, leaf.acts[0], leaf.qparams
        q = jnp.clip(jnp.round(x / act.scale + act.zero_point), act.qmin, act.qmax).astype(jnp.int8)
        total = jnp.matmul(q, codes, preferred_element_type=jnp.int32)
        z = act.zero_point.astype(jnp.int32)
        total -= z * codes.sum(0, keepdims=True, dtype=jnp.int32)
        sum_x = (q.sum(1, keepdims=True, dtype=jnp.int32) - 64 * z).astype(jnp.float32)
        return (total.astype(jnp.float32) - sum_x * w.zero_point) * (act.scale * w.scale)

    x = array((32, 64))
    ratio = cost(quantized(lambda w, x: x @ w), leaf, x) / cost(by_hand, leaf, x)
    assert (ratio < 1.05).all()


def test_tracing_takes_less_than_twice_as_long():
    class Transformer(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(12):
                x = gallery.Block()(x)
            return x

    module = Transformer()
    params = gallery.filled(jax.eval_shape(module.init, jax.random.key(0), gallery.SEQUENCE))

    def leaf(name, w):
        return (
            quantized_leaf(w, tuple(range(w.ndim - 1)), 8, dtype=jnp.int8)
            if name.endswith("kernel")
            else w
        )

    qtree = tree.map_named(leaf, params)

    def seconds(run, params):
        start = time.process_time()
        jax.jit(lambda *args: run(*args)).trace(params, gallery.SEQUENCE)
        return time.process_time() - start

    pairs = [
        (seconds(quantized(module.apply), qtree), seconds(module.apply, params)) for _ in range(3)
    ]
    ours, theirs = np.min(pairs, 0)
    assert ours < 2 * theirs


def test_a_leaf_in_the_condition_of_a_loop_is_listed():
    def apply_fn(params, x):
        def go_on(state):
            return (state[1] @ params["gate"]).sum() + state[0] < 14.0

        def turn(state):
            return state[0] + jnp.arange(1.0).sum() + 1.0, jnp.tanh(state[1] @ params["w"]) + 1.0

        return lax.while_loop(go_on, turn, (0.0, x))[1]

    params = {"gate": jnp.ones((4, 1)), "w": jnp.eye(4)}
    found = find_sites(apply_fn, params, jnp.ones((2, 4)))
    assert [site.name for site in found.sites] == ["w"]
    assert ("gate", "condition of a loop") in {(use.path, use.reason) for use in found.others}


# What a product reads in place of the data.


def halves(x):
    """Rounded to multiples of one half."""
    return jnp.round(2.0 * x) / 2.0


def test_later_sites_see_what_becomes_of_the_data():
    params = {"a": array((6, 5), 1), "b": array((5, 4), 2)}

    def model(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    largest = Stat(lambda x, site: jnp.abs(x).max())

    def through(x, grid, statistic):
        assert grid is None
        return halves(x) / statistic

    out, seen = tap(model, largest, None, through)(params, ROWS)
    top = jnp.abs(ROWS).max()
    hidden = jnp.tanh((halves(ROWS) / top) @ params["a"])
    assert distance(seen, {"a": top, "b": jnp.abs(hidden).max()}) < 1e-6
    assert distance(out, (halves(hidden) / jnp.abs(hidden).max()) @ params["b"]) < 1e-6
    out, seen = tap(model, largest, lambda site: site.path == "b", through)(params, ROWS)
    hidden = jnp.tanh(ROWS @ params["a"])
    assert set(seen) == {"b"}
    assert distance(out, (halves(hidden) / jnp.abs(hidden).max()) @ params["b"]) < 1e-6


def test_in_a_scan_each_layer_is_given_its_own_grid():
    ws = array((3, 6, 6), 4, spread=0.4)
    scales = np.array([0.25, 0.5, 1.0]).reshape(3, 1, 1)
    grid = make_qparams(scales, qmin=-8, qmax=7)
    leaf = FakeQuantTensor(ws, None, (grid,))

    def through(x, grid, statistic):
        assert grid.scale.shape == (1, 1)
        return jnp.clip(jnp.round(x / grid.scale), -8, 7) * grid.scale

    largest = Stat(lambda x, site: jnp.abs(x).max())
    out, seen = tap(scanned, largest, None, through)(leaf, ROWS)
    x, expected = ROWS, []
    for w, scale in zip(ws, scales.ravel(), strict=True):
        expected.append(float(jnp.abs(x).max()))
        x = jnp.float32(np.clip(np.round(x / scale), -8, 7) * scale) @ w
    assert distance(seen[""], np.array(expected)) < 1e-6
    assert distance(out, x) < 1e-6
    assert distance(quantized(scanned)(leaf, ROWS), x) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float_leaves_with_grids_for_their_data_round_the_data_alone(dtype):
    w, grid = array((6, 5), 1).astype(dtype), make_qparams([[0.25]], qmin=-8, qmax=7)
    x = ROWS.astype(dtype)
    leaf = FakeQuantTensor(w, None, (grid,), w.dtype)
    rounded = jnp.clip(jnp.round(x.astype(jnp.float32) / 0.25), -8, 7) * 0.25
    run = quantized(lambda w, x: x @ w)
    np.testing.assert_array_equal(jax.jit(run)(leaf, x), rounded.astype(dtype) @ w)
    grad = jax.grad(lambda leaf: run(leaf, x).astype(jnp.float32).sum())(leaf)
    assert (
        distance(grad.values, rounded.astype(jnp.float32).sum(0)[:, None] * np.ones((1, 5))) < 1e-2
    )
    assert float(jnp.abs(grad.acts[0].scale).max()) > 0.0


# What sites return.


def made_by_twin(name, sign=1.0):
    """The model's output, and ``{site: {turn: [output]}}``."""
    model, made = MODELS[name], {}

    def see(site, x, out, *turn):
        made.setdefault(site, {}).setdefault(turn, []).append(np.asarray(out))
        return out

    out = TWINS[name](model.params, see, *[sign * x for x in model.args])
    return out, made


@pytest.mark.parametrize(
    "name", ["linen stack on the last axis", "while", "cond", "deep RNN", "FSDP"]
)
def test_statistics_of_outputs_are_those_of_all_products(name):
    model = MODELS[name]
    run = jax.jit(tap(model.apply_fn, TOTAL, outputs=True))
    for sign in (1.0, -1.0) if name == "cond" else (1.0,):
        expected, made = made_by_twin(name, sign)
        out, stats = run(model.params, *[sign * x for x in model.args])
        assert distance(out, expected) < 1e-5
        for site in found(name).sites:
            turns = made.get(site.name, {(): []})
            if site.shards:  # all devices together
                turns = {(): [y for part in turns.values() for y in part]}
            parts = [turns[turn] for turn in sorted(turns)]
            total = [sum(y.sum(dtype=np.float64) for y in part) for part in parts]
            largest = [max((y.max() for y in part), default=-np.inf) for part in parts]
            stat = {key: np.ravel(a) for key, a in stats[site.name].items()}
            np.testing.assert_allclose(stat["sum"], total, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(stat["max"], largest, rtol=1e-5)


def test_raw_outputs_are_stacked_by_scans_and_cannot_leave_a_while():
    model = MODELS["linen stack on the last axis"]
    made = made_by_twin(model.name)[1]["params/dense/kernel"]
    _, outputs = jax.jit(tap(model.apply_fn, RAW, outputs=True))(model.params, *model.args)
    expected = np.concatenate([made[turn] for turn in sorted(made)])
    np.testing.assert_allclose(outputs["params/dense/kernel"], expected, rtol=1e-5, atol=1e-6)
    model = MODELS["while"]
    with pytest.raises(ValueError, match="Stat with `init` and `merge`"):
        tap(model.apply_fn, RAW, outputs=True)(model.params, *model.args)


LARGEST = Stat(lambda y, site: jnp.abs(y).max())


def test_later_sites_see_what_becomes_of_an_output():
    params = {"a": array((6, 5), 1), "b": array((5, 4), 2)}

    def model(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def through(y, grid, statistic):
        assert grid is None
        return jnp.round(8.0 * y / statistic) / 2.0

    out, seen = jax.jit(tap(model, LARGEST, None, through, outputs=True))(params, ROWS)
    first = np.float64(ROWS) @ params["a"]
    second = np.tanh(np.round(8.0 * first / np.abs(first).max()) / 2.0) @ params["b"]
    assert distance(seen, {"a": np.abs(first).max(), "b": np.abs(second).max()}) < 1e-6
    assert distance(out, np.round(8.0 * second / np.abs(second).max()) / 2.0) < 1e-6


def test_in_a_scan_each_output_is_changed_by_its_own_statistic():
    ws = array((3, 6, 6), 4, spread=0.4)
    run = tap(scanned, LARGEST, None, lambda y, grid, top: y / top - 0.5, outputs=True)
    out, seen = jax.jit(run)(ws, ROWS)
    x, expected = np.float64(ROWS), []
    for w in np.float64(ws):
        expected.append(np.abs(x @ w).max())
        x = x @ w / expected[-1] - 0.5
    assert distance(seen[""], np.array(expected)) < 1e-6
    assert distance(out, x) < 1e-6


# Quantized trees.


def test_later_sites_of_a_quantized_tree_see_what_the_quantized_model_computes():
    model = MODELS["linen MLP"]
    first, last = "params/Dense_1/kernel", "params/Dense_0/kernel"
    qtree = quantized_tree(model, coarse_act=first)  # data of the first layer in 2 bits
    layer = qtree["params"]["Dense_1"]
    w, (act,) = (
        oracles.dequantize(layer["kernel"].codes, layer["kernel"].qparams),
        layer["kernel"].acts,
    )
    product = oracles.dequantize(oracles.quantize(ROWS, act), act) @ w
    hidden = np.maximum(product + np.float64(layer["bias"]), 0.0)
    of_floats = np.maximum(np.float64(ROWS) @ w + np.float64(layer["bias"]), 0.0)
    assert distance(of_floats, hidden) > 0.1

    @jax.jit
    def run(qtree, x):
        out, data = tap(model.apply_fn, RAW)(qtree, x)
        return out, data, tap(model.apply_fn, RAW, outputs=True)(qtree, x)[1]

    out, data, made = run(qtree, ROWS)
    assert distance(data, {first: ROWS, last: hidden}) < 1e-6
    assert distance(made[first], product) < 1e-6
    assert distance(out, jitted(model.name)[1](qtree, ROWS)) < 1e-6


def test_outputs_of_products_of_int8_are_seen():
    _, qtree, expected = small()
    apply_fn = MODELS["linen MLP"].apply_fn
    out, made = jax.jit(tap(apply_fn, RAW, outputs=True))(qtree, ROWS)
    assert distance(out, expected) < 1e-6
    bias = qtree["params"]["Dense_0"]["bias"]
    assert distance(made["params/Dense_0/kernel"], expected - bias[None]) < 1e-5


def test_layers_of_a_quantized_scan_see_the_rounded_layers_before_them():
    ws, scales = array((3, 6, 6), 4, spread=0.4), np.array([0.25, 0.5, 1.0])
    grid = make_qparams(scales.reshape(3, 1, 1), qmin=-8, qmax=7)
    leaf = quantized_leaf(ws, (1,), 3, (grid,))
    out, data = jax.jit(tap(scanned, RAW))(leaf, ROWS)
    x, expected = np.float64(ROWS), []
    for w, scale in zip(oracles.dequantize(leaf.codes, leaf.qparams), scales, strict=True):
        expected.append(x)
        x = np.clip(np.round(x / scale), -8, 7) * scale @ w
    assert distance(data[""], np.array(expected)) < 1e-6
    assert distance(out, x) < 1e-6


# What becomes of a site's output.


def followed(tail, site, y):
    """A tail on outputs of its site: of each layer of its leaf, or of every turn."""
    layers, channels = tail.factor.shape
    own = [y.ndim - len(site.out.shape) + i for i in site.out_channels]
    moved = np.moveaxis(np.float32(y), own, range(-len(own), 0))
    factor, shift = (np.asarray(a)[:, None] for a in (tail.factor, tail.shift))
    flat = tail.follow(jnp.asarray(factor * moved.reshape(layers, -1, channels) + shift))
    assert flat.dtype == jnp.float32
    return np.moveaxis(np.asarray(flat).reshape(moved.shape), range(-len(own), 0), own)


def at_the_end(value):
    return jnp.flip(value, -1), value


def norm(p, h):
    return at_the_end(jax.nn.relu((h - p["c"]) / p["s"] - p["b"]))


def softmax_by_head(p, h):
    value = jnp.tanh(h.reshape(8, 3))
    return jax.nn.softmax(value), value


TAILS = {
    # name: what a model makes of h, and the value it goes on with behind the tail; bias, sign
    "bias": (lambda p, h: at_the_end(jax.nn.relu(h + p["b"])), "b", 1),
    "bias first": (lambda p, h: at_the_end(jnp.tanh(p["b"] + h)), "b", 1),
    "subtracted": (lambda p, h: at_the_end(jnp.exp(h - p["b"])), "b", -1),
    "scale and bias": (lambda p, h: at_the_end(h * p["s"] + p["b"]), "b", 1),
    "bias and scale": (lambda p, h: at_the_end(p["s"] * (h + p["b"])), None, 1),
    "norm": (norm, "b", -1),
    "two biases": (lambda p, h: at_the_end(h - p["c"] + p["b"]), "b", 1),
    "relu6": (lambda p, h: at_the_end(jax.nn.relu6(4.0 * (h + p["b"]))), "b", 1),
    "silu": (lambda p, h: at_the_end(jax.nn.silu(h + p["b"])), "b", 1),
    "hard swish": (lambda p, h: at_the_end(jax.nn.hard_swish(h - p["b"])), "b", -1),
    "leaky": (lambda p, h: at_the_end(jax.nn.leaky_relu(h + p["b"], 0.3)), "b", 1),
    "clip": (lambda p, h: at_the_end(jnp.clip(h + p["b"], -0.2, 0.3)), "b", 1),
    "numbers": (lambda p, h: at_the_end(0.3 - 2.0 * (h + p["b"]) ** 3), "b", 1),
    "no leaf": (lambda p, h: at_the_end(jax.nn.silu(jnp.abs(h))), None, 1),
    "one number": (lambda p, h: at_the_end(jnp.tanh(h + p["one"])), "one", 1),
    "made of leaves": (lambda p, h: at_the_end(h - (p["b"] + p["c"])), None, -1),
    # Where it ends.
    "function, then bias": (lambda p, h: ((a := jnp.tanh(h)) + p["b"], a), None, 1),
    "residual": (lambda p, h: (jnp.tanh((a := h + p["b"]) + ROWS), a), "b", 1),
    "fork": (lambda p, h: (jax.nn.gelu(a := h - p["b"]), a), "b", -1),
    "fork at once": (lambda p, h: (jnp.tanh(h) * h + p["b"], h), None, 1),
    "from a leaf": (lambda p, h: (p["b"] - h, h), None, 1),
    "larger of a leaf": (lambda p, h: (jnp.maximum(a := h + p["c"], p["b"]), a), "c", 1),
    "sum over rows": (lambda p, h: (jnp.tanh((a := h + p["c"]).sum(0)), a), "c", 1),
    "softmax": (lambda p, h: (jax.nn.softmax(a := h - p["c"]), a), "c", -1),
    "one for each row": (lambda p, h: (jnp.tanh(h + p["rows"]), h), None, 1),
    "bias, then one for each row": (lambda p, h: (h + p["b"] + p["rows"], h), None, 1),
    "reshape, then bias": (lambda p, h: (h.reshape(2, 2, 6) + p["b"][None], h), None, 1),
    "reshape, then function": (softmax_by_head, None, 1),
    "transpose, then bias": (lambda p, h: (h[:, :4].T + p["b"][:, :4], h), None, 1),
}


@functools.cache
def all_tails():
    """One model of them all; a site each. Run again with other biases, one at a time."""
    shapes = {"b": (1, 6), "s": (1, 6), "c": (1, 6), "one": (1, 1), "rows": (4, 1)}
    params = gallery.weights(**shapes) | {
        name: array((6, 6), i, 0.05, 0.4) for i, name in enumerate(TAILS)
    }

    def model(p, x):
        return {name: rest(p, x @ p[name]) for name, (rest, _, _) in TAILS.items()}

    run = jax.jit(tap(model, RAW, outputs=True))
    changes = {name: array(shapes[name], 77) for name in ("b", "c", "one")}
    runs = {
        name: run(params | {name: params[name] + change}, ROWS) for name, change in changes.items()
    }
    runs[None] = run(params, ROWS)
    return by_path(model, params, ROWS), tails(model, params, ROWS), runs, changes


@pytest.mark.parametrize("name", TAILS)
def test_a_tail_gives_what_the_model_goes_on_with(name):
    _, bias, sign = TAILS[name]
    sites, ends, runs, changes = all_tails()
    tail = ends[name]
    assert (tail.bias, tail.bias_sign) == (bias, sign)
    outs, made = runs[None]
    value = np.ravel(outs[name][1])
    assert distance(followed(tail, sites[name], made[name]).ravel(), value) < 1e-6
    if bias is None:
        return
    other = np.ravel(runs[bias][0][name][1])
    assert distance(other, value) > 1e-2
    moved = tail._replace(shift=tail.shift + sign * changes[bias])
    assert distance(followed(moved, sites[name], made[name]).ravel(), other) < 1e-5


def halved(p, x):
    half = jnp.bfloat16
    h = x.astype(half) @ p["w"].astype(half) + p["b"].astype(half)
    return at_the_end(jax.nn.silu(h).astype(jnp.float32))


def normed_conv(p, x):
    h = conv(NCHW, strides=(2, 1), groups=2)(p["w"], x)
    return at_the_end(jax.nn.relu(h * p["s"][None] + p["b"]))


def own_biases(p, x):
    h = jnp.einsum("ten,eno->eto", x, p["w"])
    return h + p["b"], h


SHAPED_TAILS = {
    # name: model, shapes of its leaves, shape of the data, bias
    "leaf on the left": (
        lambda p, x: at_the_end(jnp.tanh(p["w"] @ x.T + p["b"])),
        {"w": (5, 6), "b": (5, 1)},
        (4, 6),
        "b",
    ),
    "bias transposed": (
        lambda p, x: at_the_end(jnp.tanh(p["w"] @ x.T + p["b"].T)),
        {"w": (5, 6), "b": (1, 5)},
        (4, 6),
        "b",
    ),
    "heads": (
        lambda p, x: at_the_end(jnp.einsum("tk,khd->thd", x, p["w"]) + p["b"][None]),
        {"w": (6, 2, 3), "b": (2, 3)},
        (4, 6),
        "b",
    ),
    "NCHW, grouped": (
        normed_conv,
        {"w": (6, 2, 3, 2), "b": (1, 6, 1, 1), "s": (6, 1, 1)},
        (2, 4, 5, 6),
        "b",
    ),
    "experts, one bias": (
        lambda p, x: at_the_end(jnp.einsum("ten,eno->eto", x, p["w"]) + p["b"]),
        {"w": (3, 6, 5), "b": (1, 1, 5)},
        (4, 3, 6),
        "b",
    ),
    "experts, biases of their own": (
        own_biases,
        {"w": (3, 6, 5), "b": (3, 1, 5)},
        (4, 3, 6),
        None,
    ),
    "bfloat16": (halved, {"w": (6, 5), "b": (1, 5)}, (4, 6), "b"),
}


@functools.cache
def shaped_tails():
    params = {name: gallery.weights(**case[1]) for name, case in SHAPED_TAILS.items()}
    xs = {name: array(case[2], 3, 0.5) for name, case in SHAPED_TAILS.items()}

    def model(params, xs):
        return {name: case[0](params[name], xs[name]) for name, case in SHAPED_TAILS.items()}

    outs, made = jax.jit(tap(model, RAW, outputs=True))(params, xs)
    return by_path(model, params, xs), tails(model, params, xs), outs, made


@pytest.mark.parametrize("name", SHAPED_TAILS)
def test_a_tail_is_along_the_channels_wherever_they_are(name):
    bias = SHAPED_TAILS[name][-1]
    sites, ends, outs, made = shaped_tails()
    leaf = f"{name}/w"
    assert ends[leaf].bias == (f"{name}/{bias}" if bias else None)
    # In bfloat16 the model rounds the sum with the bias, the tail does not.
    tolerance = 5e-3 if name == "bfloat16" else 1e-6
    assert distance(followed(ends[leaf], sites[leaf], made[leaf]), outs[name][1]) < tolerance


@pytest.mark.parametrize(
    ("name", "kernel", "moments", "affine"),
    [
        ("linen CNN", "params/Conv_0/kernel", "batch_stats/BatchNorm_0", "params/BatchNorm_0"),
        ("nnx CNN", "conv/kernel", "norm", "norm"),
    ],
    ids=["linen", "nnx"],
)
def test_batch_norm_is_one_factor_and_one_shift(name, kernel, moments, affine):
    model = MODELS[name]
    leaves = {path: np.asarray(leaf) for path, leaf in tree.named_leaves(model.params)}
    tail = tails(model.apply_fn, model.params, *model.args)[kernel]
    factor = leaves[f"{affine}/scale"] / np.sqrt(leaves[f"{moments}/var"] + 1e-5)
    shift = leaves[f"{affine}/bias"] - factor * leaves[f"{moments}/mean"]
    np.testing.assert_allclose(tail.factor, factor[None], rtol=1e-5)
    np.testing.assert_allclose(tail.shift, shift[None], rtol=1e-4, atol=1e-6)
    assert (tail.bias, tail.bias_sign) == (f"{affine}/bias", 1)
    np.testing.assert_array_equal(tail.follow(jnp.array([-0.5, 0.5])), [0.0, 0.5])


LATEST = Stat(
    lambda x, _: x,
    lambda like: jnp.zeros(like.shape, like.dtype),
    lambda a, b: jnp.where(jnp.any(b != 0), b, a),
)
"""What came by last."""

NEXT = {
    # model: a site, what stands behind its tail, the site that reads it
    "linen CNN": ("params/Conv_0/kernel", lambda y: y.mean((1, 2)), "params/Dense_0/kernel"),
    "linen scanned transformer": (
        "params/layers/CheckpointBlock_0/Dense_1/kernel",
        jax.nn.gelu,
        "params/layers/CheckpointBlock_0/Dense_0/kernel",
    ),
    "dataclass": ("0/kernel", jnp.asarray, "1/kernel"),
    "unusual convolutions": ("oihw", jnp.asarray, "iwo"),
    "while": ("w", jnp.asarray, "out"),
    "FSDP": ("w", jnp.asarray, "v"),
}


@pytest.mark.parametrize("name", NEXT)
def test_the_tail_of_a_site_is_what_the_next_one_reads(name):
    model, (first, between, second) = MODELS[name], NEXT[name]
    site = next(site for site in found(name).sites if site.name == first)
    tail = tails(model.apply_fn, model.params, *model.args)[first]
    stat = LATEST if name == "while" else RAW

    @jax.jit
    def run(params, *args):
        made = tap(model.apply_fn, stat, lambda s: s.name == first, outputs=True)(params, *args)
        read = tap(model.apply_fn, stat, lambda s: s.name == second)(params, *args)
        return made[1][first], read[1][second]

    y, x = run(model.params, *model.args)
    assert distance(between(followed(tail, site, y)).ravel(), np.ravel(x)) < 1e-5


# Tails in loops.


def layer(x, leaves):
    """The value it goes on with is returned too."""
    w, s, b = leaves
    x = jnp.tanh((x @ w) * s - b)
    return x, x


def one_stack(p, x):
    return lax.scan(layer, x, (p["w"], p["s"], p["b"]))


def two_stacks(p, x):
    def stage(x, leaves):
        return lax.scan(layer, x, leaves, reverse=True)

    return lax.scan(stage, x, (p["w"], p["s"], p["b"]))


@pytest.mark.parametrize(
    ("model", "lengths"), [(one_stack, (3,)), (two_stacks, (2, 3))], ids=["scan", "nested scans"]
)
def test_each_layer_of_a_scan_has_its_own_tail(model, lengths):
    params = gallery.weights(w=(*lengths, 6, 6), s=(*lengths, 1, 6), b=(*lengths, 1, 6))
    tail, site = tails(model, params, ROWS)["w"], by_path(model, params, ROWS)["w"]
    np.testing.assert_allclose(tail.factor, params["s"].reshape(-1, 6), rtol=1e-6)
    np.testing.assert_allclose(tail.shift, -params["b"].reshape(-1, 6), rtol=1e-6)
    assert (tail.bias, tail.bias_sign) == ("b", -1)
    (_, value), made = jax.jit(tap(model, RAW, outputs=True))(params, ROWS)
    assert distance(followed(tail, site, made["w"]), value) < 1e-6


def constant_bias(p, x):
    def turn(x, i):
        value = jax.nn.relu(x @ p["w"] + p["b"])
        return value + i, value

    return lax.scan(turn, x, jnp.arange(3.0))


def one_bias_for_all_layers(p, x):
    def layer(x, w):
        h = x @ w
        return jnp.tanh(h + p["b"]), h

    return lax.scan(layer, x, p["w"])


def in_a_branch(p, x):
    def yes(x):
        value = jnp.tanh(x @ p["w"] + p["b"])
        return jnp.flip(value, 0), value

    return lax.cond(x.sum() > 0, yes, lambda x: (x, x), x)


@pytest.mark.parametrize(
    ("model", "layers", "bias"),
    [(constant_bias, (), "b"), (one_bias_for_all_layers, (3,), None), (in_a_branch, (), "b")],
    ids=["turns share a leaf", "a leaf of another size ends it", "branch"],
)
def test_in_loops_a_tail_is_what_its_leaves_and_their_sizes_say(model, layers, bias):
    params = gallery.weights(w=(*layers, 6, 6), b=(1, 6))
    tail, site = tails(model, params, ROWS)["w"], by_path(model, params, ROWS)["w"]
    assert (tail.bias, tail.bias_sign) == (bias, 1)
    stat = LATEST if model is in_a_branch else RAW
    (_, value), made = jax.jit(tap(model, stat, outputs=True))(params, ROWS)
    assert distance(followed(tail, site, made["w"]), value) < 1e-6


def test_a_tail_is_that_of_the_float_values_of_a_quantized_leaf():
    params = {"w": array((6, 5), 1), "b": array((1, 5), 2), "s": array((1, 5), 3, 1.0, 0.1)}
    qtree = params | {"s": quantized_leaf(params["s"], (0, 1), 4)}

    def model(p, x):
        return (x @ p["w"]) * p["s"] - p["b"]

    tail = tails(model, qtree, ROWS)["w"]
    s = oracles.dequantize(qtree["s"].codes, qtree["s"].qparams)
    np.testing.assert_allclose(tail.factor, s, rtol=1e-5)
    np.testing.assert_allclose(tail.shift, -params["b"], rtol=1e-6)


# Leaves in loops that have the size of the channels, and are something else.


def test_layers_on_the_last_axis_have_their_own_biases():
    model = MODELS["linen stack on the last axis"]
    tail = tails(model.apply_fn, model.params, *model.args)["params/dense/kernel"]
    bias = model.params["params"]["dense"]["bias"]
    np.testing.assert_array_equal(tail.shift, bias.T)


def one_for_each_place(p, x):
    def turn(x, i):
        h = x @ p["w"]
        return jnp.tanh(h + p["b"]) + i, h

    return lax.scan(turn, x, jnp.arange(2.0))


def one_number_for_each_turn(p, x):
    def turn(x, number):
        h = x @ p["w"]
        return jnp.tanh(h + number), h

    return lax.scan(turn, x, p["b"])


def layers_transposed(p, x):
    def layer(x, leaves):
        w, b = leaves
        value = jnp.tanh(x @ w + b[None])
        return value, value

    return lax.scan(layer, x, (p["w"], p["b"].T))


IN_LOOPS = {
    "one for each place": (one_for_each_place, {"w": (6, 6), "b": (6, 1)}),
    "one number for each turn": (one_number_for_each_turn, {"w": (6, 6), "b": (6, 1, 1)}),
    "layers on the last axis": (layers_transposed, {"w": (6, 6, 6), "b": (6, 6)}),
}


@pytest.mark.parametrize("case", IN_LOOPS.values(), ids=IN_LOOPS)
def test_in_a_loop_a_leaf_is_known_by_more_than_its_size(case):
    model, shapes = case
    params, x = gallery.weights(**shapes), array((6, 6), 2, 0.5)
    tail, site = tails(model, params, x)["w"], by_path(model, params, x)["w"]
    (_, value), made = jax.jit(tap(model, RAW, outputs=True))(params, x)
    assert distance(followed(tail, site, made["w"]), value) < 1e-6


def test_a_reshape_that_mixes_channels_ends_a_tail():
    def model(p, x):
        h = lax.conv_general_dilated(
            x, p["w"], (1,), "SAME", dimension_numbers=("NCW", "OIW", "NCW")
        )
        return h.reshape(3, 6, 2) + p["b"], h

    params = gallery.weights(w=(6, 2, 3), b=(1, 6, 1))
    x = array((2, 2, 3), 2, 0.5)
    tail, site = tails(model, params, x)["w"], by_path(model, params, x)["w"]
    (_, value), made = jax.jit(tap(model, RAW, outputs=True))(params, x)
    assert tail.bias is None
    assert distance(followed(tail, site, made["w"]), value) < 1e-6


TURNED = {
    "reversed": (lambda p, x: at_the_end(x @ p["w"] + p["b"][:, ::-1]), {"w": (6, 6), "b": (1, 6)}),
    "one of several": (
        lambda p, x: at_the_end(x @ p["w"] - p["b"][1]),
        {"w": (6, 6), "b": (2, 1, 6)},
    ),
    "heads last": (
        lambda p, x: at_the_end(jnp.einsum("tk,khd->thd", x, p["w"]) + p["b"].T[None]),
        {"w": (6, 2, 3), "b": (3, 2)},
    ),
}


@pytest.mark.parametrize("case", TURNED.values(), ids=TURNED)
def test_a_leaf_that_is_named_as_bias_takes_a_shift_in_the_order_of_the_channels(case):
    model, shapes = case
    params = gallery.weights(**shapes)
    tail, site = tails(model, params, ROWS)["w"], by_path(model, params, ROWS)["w"]
    if tail.bias is None:
        return
    change = array(tail.shift.shape, 5)
    moved = tail._replace(shift=tail.shift + tail.bias_sign * change)
    y = tap(model, RAW, outputs=True)(params, ROWS)[1]["w"]
    b = params["b"] + change.reshape(params["b"].shape)
    assert distance(followed(moved, site, y), model(params | {"b": b}, ROWS)[1]) < 1e-6
