"""AdaQuant against twins in NumPy, and what layers, alone or one after another, were promised."""

import functools

import gallery
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import linen as nn
from jax import lax
from scipy import special

import lnq
from lnq import adaquant, feedback, matrices, tree
from lnq.adaquant import Fit, Layer, Rates
from lnq.quantizer import QParams, QTensor, dequantize_array, fake_quant
from lnq.widths import site_widths


def normal(seed, *shape, mean=0.0, spread=1.0):
    return np.float32(np.random.default_rng(seed).normal(mean, spread, shape))


def wide(values):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), values)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def leaves(params):
    return dict(tree.named_leaves(params))


# One layer.

GROUPS, ROWS, INPUTS, OUTPUTS = 2, 40, 6, 3


@functools.cache
def layer(weight_bits=3, act_bits=4, positive=False):
    """Skewed data, a factor of either sign, a shift; ``positive`` data is far from zero."""
    x = np.random.default_rng(1).gamma(1.5, 1.0, (GROUPS, ROWS, INPUTS)) - 1.0
    x = np.float32(1.0 + x / np.abs(x).max() if positive else x)
    w = normal(2, GROUPS, INPUTS, OUTPUTS, mean=0.1)
    factor = normal(3, GROUPS, 1, OUTPUTS, mean=1.0, spread=0.7)
    shift = normal(4, GROUPS, 1, OUTPUTS, spread=0.5)
    numbers = [factor * (x @ w) + shift, w, factor, shift]
    return Layer(*map(jnp.asarray, [x, *numbers, weight_bits, act_bits]), jnp.float32(1.0))


begin = jax.jit(adaquant.begin, static_argnames=("second_order", "clip"))
outputs = jax.jit(adaquant.outputs)


def straight_through(v, scale, zero_point, bits, held):
    """Rounding in NumPy: what it adds, and what is clipped, are as they were at ``held``."""
    values, step, offset = held
    half, whole = 2.0 ** float(bits) / 2.0, np.round(offset)
    levels = values / step + whole
    added = np.round(levels) - levels
    end = (np.clip(levels, -half, half - 1.0) - (zero_point + whole - offset)) * scale
    return np.where((levels > -half) & (levels < half - 1.0), v + added * scale, end)


def surrogate(layer, fit, x, held, held_x):
    """What ``outputs`` returns, in NumPy, smooth around ``held``."""
    if layer.act_bits > 0:
        act = held_x, held.act_scale, held.act_zero_point
        x = straight_through(x, fit.act_scale, fit.act_zero_point, layer.act_bits, act)
    weights = held.w, held.scale, held.zero_point
    w = straight_through(fit.w, fit.scale, fit.zero_point, layer.weight_bits, weights)
    return layer.factor * (x @ w) + layer.shift + fit.bias


def slopes(function, values, h=1e-6):
    """Central differences by each entry of each array."""
    found = []
    for k, a in enumerate(values):
        slope = np.zeros_like(a)
        for i in np.ndindex(a.shape):
            ends = []
            for sign in (1.0, -1.0):
                moved = a.copy()
                moved[i] += sign * h
                ends.append(function([*values[:k], moved, *values[k + 1 :]]))
            slope[i] = (ends[0] - ends[1]) / (2.0 * h)
        found.append(slope)
    return found


@functools.cache
def moved_fit():
    """Grids that clip at both ends, zero points between whole numbers, a bias."""
    fit = begin(layer(), second_order=False)
    rng = np.random.default_rng(5)
    fit = jax.tree.map(lambda a: a * jnp.float32(1.0) + np.float32(rng.uniform(-0.2, 0.2)), fit)
    return fit._replace(
        scale=0.8 * jnp.abs(fit.scale), act_scale=0.7 * fit.act_scale, bias=fit.bias + 0.3
    )


sensitivity = jax.jit(
    lambda layer, fit, seen: jax.grad(
        lambda fit, x: jnp.sum(adaquant.outputs(layer._replace(x=x), fit) * seen), (0, 1)
    )(fit, layer.x)
)


@pytest.mark.parametrize("act_bits", [4, 0], ids=["data rounded", "data float"])
def test_slopes_are_those_of_the_function_with_its_rounding_held(act_bits):
    one, fit = layer(3, act_bits), moved_fit()
    seen = normal(6, GROUPS, ROWS, OUTPUTS)
    exact, held = wide(one), wide(fit)
    np.testing.assert_allclose(
        outputs(one, fit), surrogate(exact, held, exact.x, held, exact.x), rtol=1e-4, atol=1e-4
    )

    def function(values):
        *fields, x = values
        return np.sum(surrogate(exact, Fit(*fields), x, held, exact.x) * seen)

    by_fit, by_x = sensitivity(one, fit, seen)
    for name, found, expected in zip(
        [*Fit._fields, "x"], [*by_fit, by_x], slopes(function, [*held, exact.x]), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3, err_msg=name)


def test_beyond_the_range_data_has_no_slope_and_a_larger_step_means_more():
    grid = {"act_scale": 0.5, "act_zero_point": -1.0}
    one = Layer(*(jnp.zeros((1, 1, 1)) for _ in range(5)), jnp.array(2), jnp.array(2), jnp.ones(()))
    one = one._replace(w=jnp.ones((1, 1, 1)), factor=jnp.ones((1, 1, 1)))
    one = one._replace(x=jnp.array([-3.0, -0.4, 0.3, 0.9, 7.0]).reshape(1, 5, 1))
    fields = {"w": 1.0, "scale": 1.0, "zero_point": -1.0, "bias": 0.0} | grid
    fit = Fit(**{name: jnp.full((1, 1, 1), value) for name, value in fields.items()})
    np.testing.assert_allclose(outputs(one, fit).ravel(), [-0.5, -0.5, 0.5, 1.0, 1.0])
    _, slope = sensitivity(one, fit, jnp.ones((1, 5, 1)))
    np.testing.assert_array_equal(slope.ravel(), [0, 1, 1, 1, 0])
    for place, expected in ((0, -1.0), (4, 2.0)):  # code less zero point, where it is clipped
        by_fit, _ = sensitivity(one, fit, jnp.zeros((1, 5, 1)).at[0, place].set(1.0))
        assert float(by_fit.act_scale.ravel()[0]) == expected


MIXED = np.stack(
    [
        np.random.default_rng(7).gamma(0.8, 1.0, 300),
        -np.random.default_rng(8).gamma(0.8, 1.0, 300),
        normal(9, 300, mean=-0.3),
        np.full(300, 0.7),
        np.zeros(300),
        np.append(normal(10, 299), 40.0),
    ],
    1,
).astype(np.float32)


best_grid = jax.jit(
    functools.partial(adaquant.best_grid, axes=(0,)), static_argnames=("clip", "stride")
)


@pytest.mark.parametrize("stride", [1, 4])
def test_the_best_grid_is_the_best_of_32_for_each_channel(stride):
    bits, x = 3, np.float64(MIXED)
    grid = best_grid(MIXED, bits, stride=stride)
    errors = []
    for share in np.linspace(1.0, 0.25, 32):
        low, high = share * np.minimum(x.min(0), 0.0), share * np.maximum(x.max(0), 0.0)
        step = np.where(high > low, (high - low) / (2**bits - 1), 1.0)
        offset = -(2 ** (bits - 1)) - np.round(low / step)
        codes = np.clip(np.round(x / step + offset), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append((((codes - offset) * step - x) ** 2)[::stride].mean(0))
    rounded = oracles.dequantize(oracles.quantize(MIXED, grid), grid)
    found = ((rounded - x) ** 2)[::stride].mean(0)
    np.testing.assert_allclose(found, np.min(errors, 0), rtol=1e-3, atol=1e-12)
    assert found[3] < 1e-12  # a constant is a level
    assert found[4] == 0.0
    assert (np.argmin(errors, 0) > 0).any()


def test_without_clipping_a_grid_spans_its_range():
    grid = best_grid(MIXED, 4, clip=False)
    spans = np.maximum(MIXED.max(0), 0.0) - np.minimum(MIXED.min(0), 0.0)
    np.testing.assert_allclose(15 * grid.scale[0], np.where(spans > 0.0, spans, 15.0), rtol=1e-6)


def test_a_channel_that_the_model_multiplies_by_zero_keeps_its_weights():
    one = layer(8, 0)
    dead = one._replace(factor=one.factor.at[1, 0, 2].set(0.0))
    dead = dead._replace(y=dead.factor * (dead.x @ dead.w) + dead.shift)
    fit = begin(dead)
    rounded = fake_quant(fit.w, adaquant._grid(fit.scale, fit.zero_point, dead.weight_bits))
    np.testing.assert_allclose(rounded, dead.w, atol=1.2 * float(fit.scale.max()))
    assert all(np.isfinite(a).all() for a in fit)


def test_a_second_order_start_takes_the_rounded_data_to_the_old_outputs():
    """With weights that hardly round: damped least squares, of data in 2 bits."""
    one = layer(16, 2)
    fit, exact = begin(one), wide(one)
    act = QParams(fit.act_scale, fit.act_zero_point, *(np.full((1, 1, 1), q) for q in (-2, 1)))
    for g in range(GROUPS):
        x = oracles.dequantize(oracles.quantize(one.x, act), act)[g]
        y = (exact.y[g] - exact.shift[g]) / exact.factor[g]
        h = x.T @ x / ROWS
        pull = 0.1 * np.trace(h) / INPUTS * np.eye(INPUTS)
        expected = np.linalg.solve(h + pull, x.T @ y / ROWS + pull @ exact.w[g])
        assert np.abs(expected - exact.w[g]).max() > 0.1
        np.testing.assert_allclose(fit.w[g], expected, atol=3e-3)


# Adam, by hand.


def adam_twin(layer, start, key, rates, batch=16):
    """Ten turns; their losses on the rows held out, and what they made of the start."""
    follow = functools.partial(leaky, slope=0.2)
    layer, start, held_out = wide(layer), wide(start), ROWS // 10
    target = follow(layer.y)
    power = np.mean(target**2)
    if rates.absolute:
        spans = 2.0**layer.weight_bits - 1.0, 2.0**layer.act_bits - 1.0
        units = [1.0, 1.0 / spans[0], 1.0 / start.scale, 1.0 / spans[1], 1.0 / start.act_scale, 1.0]
    else:
        size = np.sqrt(np.mean(layer.y**2, 1, keepdims=True))
        units = [start.scale, start.scale, 1.0, start.act_scale, 1.0, size]
    rate = [rates.weights, rates.grid, rates.grid, rates.act_grid, rates.act_grid, rates.bias]

    def loss(fit, held, rows):
        x = layer.x[:, rows]
        out = follow(surrogate(layer, fit, x, held, x))
        return np.mean((out - target[:, rows]) ** 2) / power

    theta, first, second = ([np.zeros_like(a) for a in start] for _ in range(3))
    losses, fits = [loss(start, start, slice(held_out))], [start]
    for turn in range(10):
        drawn = jax.random.fold_in(key, turn)
        rows = np.asarray(jax.random.randint(drawn, (batch,), held_out, ROWS))
        now = fits[-1]
        slope = slopes(lambda values, rows=rows, now=now: loss(Fit(*values), now, rows), list(now))
        falling = 0.5 + 0.5 * np.cos(np.pi * turn / 10)
        for i, unit in enumerate(units):
            g = slope[i] * unit
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            mean, square = first[i] / (1 - 0.9 ** (turn + 1)), second[i] / (1 - 0.999 ** (turn + 1))
            theta[i] = theta[i] - falling * rate[i] * mean / (np.sqrt(square) + 1e-8)
        fits.append(
            Fit(*(a + moved * unit for a, moved, unit in zip(start, theta, units, strict=True)))
        )
        losses.append(loss(fits[-1], fits[-1], slice(held_out)))
    return losses, fits


@functools.partial(jax.jit, static_argnames="absolute")
def ten_turns(one, start, key, rates, absolute):
    rates = Rates(*rates, absolute=absolute)
    follow = functools.partial(leaky, slope=0.2, maximum=jnp.maximum)
    return adaquant.improve(one, start, key, rates, follow=follow, steps=10, batch=16)


def leaky(x, slope=0.3, maximum=np.maximum):
    return maximum(x, slope * x)


ADAM = {  # absolute rates are those of the authors' code, ten times as large
    "absolute": Rates(1e-4, 1e-2, 1e-1, 1e-2, absolute=True),
    "relative": Rates(0.1, 0.02, 0.02, 0.02),
}


@pytest.mark.parametrize("rates", ADAM.values(), ids=ADAM)
def test_turns_are_those_of_adam_by_hand(rates):
    one, key = layer(), jax.random.key(3)
    start = begin(one, second_order=False)
    fit, losses = ten_turns(one, start, key, rates[:4], rates.absolute)
    expected, fits = adam_twin(one, start, key, rates)
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    best = fits[int(np.argmin(expected))]
    assert best is not fits[0]
    for name, found, a in zip(Fit._fields, fit, best, strict=True):
        np.testing.assert_allclose(found, a, rtol=1e-3, atol=1e-4, err_msg=name)


def test_constrained_weights_stay_between_their_two_levels_and_zero_stays_a_level():
    """Data between 1 and 2 would like a grid without zero."""
    one = layer(3, 2, positive=True)
    start = begin(one)

    @jax.jit
    def run(one, start):
        rates = Rates(0.3, 0.02, 0.05, 0.02)
        return adaquant.improve(
            one, start, jax.random.key(0), rates, weights="constrained", steps=200, batch=32
        )

    fit, losses = run(one, start)
    assert losses.min() < 0.8 * losses[0]
    level = start.w / start.scale + start.zero_point
    grid = adaquant._grid(fit.scale, fit.zero_point, one.weight_bits)
    codes = oracles.quantize(fit.w, grid)
    lower, upper = (np.clip(np.floor(level) + step, -4, 3) for step in (0, 1))
    assert ((codes == lower) | (codes == upper)).all()
    assert (codes != np.clip(np.round(level), -4, 3)).any()
    assert -2.0 <= float(fit.act_zero_point.ravel()[0]) <= 1.0
    assert (fit.zero_point >= -4.0).all()
    assert (fit.zero_point <= 3.0).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_learning_more_things_leaves_less_error(bits):
    """Ranges alone, with the bias, with the weights; from rounding to nearest, mean of 4 draws."""
    one = layer(bits, 8)
    start = begin(one, second_order=False)

    def loss(weights, bias):
        rates = weights, 0.02, 0.02, bias
        runs = [ten_turns(one, start, jax.random.key(i), rates, False)[1] for i in range(4)]
        return np.mean([found.min() for found in runs])

    losses = [float(ten_turns(one, start, jax.random.key(0), (0.0,) * 4, False)[1][0])]
    losses += [loss(0.0, 0.0), loss(0.0, 0.01), loss(0.03, 0.01)]
    assert losses == sorted(losses, reverse=True)
    assert losses[3] < 0.95 * losses[2]


# Layers of one shape, all of one model: 64 by 64, correlated inputs, one of them dead.

BITS, N = (2, 3, 4, 8, 16), 64


def correlated(rows, seed):
    causes, mix = normal(seed, rows, 8), normal(0, 8, N)
    x = causes @ mix + normal(seed + 1, rows, N, mean=0.4, spread=0.5)
    x[:, 7] = 0.0
    return x


FAN_W = normal(11, N, N, mean=0.02, spread=0.125)
FAN_W[:, 5] = 0.0
FAN = {f"w{bits}": jnp.asarray(FAN_W) for bits in BITS}
FAN |= {f"bias{bits}": jnp.asarray(normal(12, 1, N, spread=0.2)) for bits in BITS}


def fan(p, x):
    """The same layer five times; each to be rounded to as many bits as its name says."""
    return [x @ p[f"w{bits}"] + p[f"bias{bits}"] for bits in BITS]


@functools.cache
def fan_problem():
    x = correlated(640, 20)
    made = adaquant.problem(fan, FAN, x, rows=640, steps=100, batch=64)
    acts = {"w16": None, "": 8}
    return made, site_widths(made.sites.sites, lambda name: int(name[1:]), acts)


def fan_fitted(rows):
    made, widths = fan_problem()
    found = {}
    for outcome in adaquant.fit(made, widths, rows, rows):
        found |= outcome
    return found


@functools.cache
def fan_fit():
    made, _ = fan_problem()
    rows = made.sample(tuple(made.layers), made.floats)
    return jax.tree.map(np.asarray, rows), fan_fitted(rows)


def fan_error(x, outcome, bits):
    """Squared error of a fitted layer over the mean square of its old output; both in NumPy."""
    fit, half = jax.tree.map(lambda a: np.asarray(a)[0, 0], outcome.fit), 2.0**bits / 2
    codes = np.clip(np.round(fit.w / fit.scale + np.round(fit.zero_point)), -half, half - 1)
    w = (codes - np.round(fit.zero_point)) * np.float64(fit.scale)
    q = np.float64(x)
    if bits < 16:
        q = np.clip(np.round(q / fit.act_scale + np.round(fit.act_zero_point)), -128, 127)
        q = (q - np.round(fit.act_zero_point)) * np.float64(fit.act_scale)
    bias = np.float64(FAN["bias2"])
    y, found = np.float64(x) @ np.float64(FAN_W) + bias, q @ w + bias + np.float64(fit.bias)
    return np.mean((found - y) ** 2) / np.mean(y**2)


def losses(outcomes, field):
    return np.array([float(getattr(outcome, field)[0]) for outcome in outcomes.values()])


def test_a_fit_is_no_worse_than_its_start_and_that_no_worse_than_rounding_to_nearest():
    _, found = fan_fit()
    nearest, start, loss = (losses(found, field) for field in ("nearest", "start", "loss"))
    assert (loss <= start).all()
    assert (start <= nearest).all()
    assert (np.diff(loss) < 0.0).all()  # more bits
    assert loss[0] < 0.9 * start[0]  # learning counts at 2 bits
    ratio = nearest[2] / loss[2]
    assert ratio > 3.0
    assert ratio == pytest.approx(RATIO_AT_4_BITS, rel=0.1)


RATIO_AT_4_BITS = 6.2
"""Regression value: rounding to nearest has so many times the error at 4 bits."""


def test_eight_bits_are_nearly_exact_and_sixteen_leave_the_weights_alone():
    _, found = fan_fit()
    assert found["w8"].nearest[0] < 1e-2
    assert found["w8"].loss <= found["w8"].nearest
    assert found["w16"].loss[0] < 1e-6
    moved = np.abs(found["w16"].fit.w[0, 0] - FAN_W)[np.arange(N) != 7]
    assert moved.max() < 1e-3 * np.abs(FAN_W).max()


def test_losses_are_those_of_the_rows_held_out():
    rows, found = fan_fit()
    for bits in BITS[:4]:
        x = np.asarray(rows[f"w{bits}"])[0, 0]
        y = np.float64(x) @ np.float64(FAN_W) + np.float64(FAN["bias2"])
        share = np.mean(y[:64] ** 2) / np.mean(y**2)
        expected = fan_error(x[:64], found[f"w{bits}"], bits) * share
        assert found[f"w{bits}"].loss[0] == pytest.approx(expected, rel=2e-3)


def test_grids_that_are_learned_have_a_zero_few_levels_and_round_once():
    made, widths = fan_problem()
    _, found = fan_fit()
    qtree = adaquant.harden(made, {n: o.fit for n, o in found.items()}, widths)
    for bits in BITS:
        leaf = qtree[f"w{bits}"]
        grid, half = leaf.qparams, 2.0**bits / 2
        grids = [grid, *leaf.acts] if bits < 16 else [grid]
        assert leaf.acts == () or bits < 16
        for g, low in zip(grids, (-half, -128.0), strict=False):
            np.testing.assert_array_equal(g.zero_point, np.round(g.zero_point))
            assert (g.zero_point >= low).all()
            assert (g.zero_point < -low).all()
            assert (g.scale > 0.0).all()
            assert (fake_quant(jnp.zeros(g.scale.shape), g) == 0.0).all()
        rounded = dequantize_array(leaf)
        np.testing.assert_array_equal(fake_quant(rounded, grid), rounded)
        assert max(len(np.unique(column)) for column in np.asarray(leaf.codes).T) <= 2**bits
        np.testing.assert_array_equal(rounded[:, 5], 0.0)
        if bits < 16:
            assert (leaf.codes.dtype, leaf.acts[0].dtype) == (jnp.int8, jnp.int8)


def test_ten_rows_for_each_input_are_enough_and_a_fourth_of_one_is_not():
    fresh = correlated(2000, 90)
    ratios = {}
    for count in (640, 16):
        drawn = correlated(count, 30)
        x = np.tile(drawn, (640 // count, 1))
        found = fan_fitted(dict.fromkeys(FAN_LAYERS, jnp.asarray(x)[None, None]))
        ratios[count] = [
            fan_error(fresh, found[f"w{b}"], b) / fan_error(drawn, found[f"w{b}"], b)
            for b in BITS[:4]
        ]
    assert max(ratios[640][:3]) < 1.3
    assert min(ratios[16][:3]) > 1.7
    assert ratios[16][3] > 20 > 2 > ratios[640][3]


FAN_LAYERS = tuple(f"w{bits}" for bits in BITS)


def test_least_squares_on_few_rows_err_elsewhere_as_the_theory_says():
    """With noise on n rows of N inputs: n (n - 1) / ((n - N) (n - N - 1)) times as much."""
    inputs, outs, most = 16, 8, 320
    counts = np.repeat([3 * inputs, 6 * inputs, 20 * inputs], 20)
    x, noise = normal(40, 60, most, inputs), normal(41, 60, most, outs, spread=0.3)
    fresh = normal(42, 60, most, inputs), normal(43, 60, most, outs, spread=0.3)
    teacher = normal(44, inputs, outs)
    used = np.float32(np.arange(most) < counts[:, None])[..., None]  # rows of zeros say nothing
    solve = jax.jit(jax.vmap(functools.partial(feedback.least_squares, damping=1e-7)))
    found = solve(x * used, (x @ teacher + noise) * used, np.zeros((60, inputs, outs), np.float32))
    train = ((x @ np.asarray(found) - x @ teacher - noise) * used) ** 2
    test = (fresh[0] @ np.asarray(found) - fresh[0] @ teacher - fresh[1]) ** 2
    ratio = test.mean((1, 2)) / (train.sum((1, 2)) / counts / outs)
    for n in (3 * inputs, 6 * inputs, 20 * inputs):
        expected = n * (n - 1) / ((n - inputs) * (n - inputs - 1))
        assert ratio[counts == n].mean() == pytest.approx(expected, rel=0.1)


# Six layers after one another, three times: with other weights, as in other draws of a seed.

WIDTH, DEPTH, CHAINS = 12, 6, 3


def matrix(chain, i):
    return normal(100 * int(chain) + i, WIDTH, WIDTH, spread=1.3 / WIDTH**0.5)


STACKS = {f"chain{c}": np.stack([matrix(c, i) for i in range(DEPTH)]) for c in range(1, CHAINS + 1)}
TOY = {f"{name}_{i}": matrix(name[-1], i) for name in STACKS for i in range(DEPTH)}
TOY_X = normal(50, 512, 4) @ normal(51, 4, WIDTH) + normal(52, 512, WIDTH, spread=0.5)


def toy(p, x):
    """The activation reads its argument twice, so that f ends before it, as in a linear layer."""
    found = []
    for chain in range(1, CHAINS + 1):
        y = x
        for i in range(DEPTH):
            y = leaky(y @ p[f"chain{chain}_{i}"], maximum=jnp.maximum)
        found.append(y)
    return found


def scanned(p, x):
    def layer(x, w):
        return leaky(x @ w, maximum=jnp.maximum), None

    return [lax.scan(layer, x, p[name])[0] for name in STACKS]


TOY_OPTIONS = {"rows": 512, "steps": 20, "batch": 64}
"""One for all that have layers of this size, so that they share compiled fits."""


@functools.cache
def toy_problem():
    return adaquant.problem(toy, TOY, TOY_X, **TOY_OPTIONS)


def toy_widths(weight_bits=3, **options):
    return site_widths(toy_problem().sites.sites, weight_bits, 8, **options)


def programs():
    """Compiled fits, of whatever shape."""
    return adaquant._fit._cache_size()


@functools.cache
def sequence():
    """Outcomes in sequence, and how many programs were compiled for them."""
    before = programs()
    return adaquant.fit_in_sequence(toy_problem(), toy_widths()), programs() - before


@functools.cache
def one_by_one():
    """The same in parallel, and how many layers there were at each report."""
    before, said = programs(), []
    found = adaquant.fit_in_parallel(
        toy_problem(), toy_widths(), on_site=lambda state: said.append(len(state))
    )
    return found, programs() - before, said


def side_by_side(made):
    return made._replace(how=made.how._replace(together=2))


@functools.cache
def together():
    """The same, two layers at a time."""
    before, said = programs(), []
    found = adaquant.fit_in_parallel(
        side_by_side(toy_problem()), toy_widths(), on_site=lambda state: said.append(len(state))
    )
    return found, programs() - before, said


toy_runs = {"float": jax.jit(toy), "quantized": jax.jit(lnq.quantized(toy))}


def fits(outcomes):
    return {name: outcome.fit for name, outcome in outcomes.items()}


def divergences(outcomes):
    """Of each chain from its float model, nats."""
    qtree = adaquant.place(toy_problem(), toy_problem().floats, fits(outcomes), toy_widths())
    pairs = zip(toy_runs["float"](TOY, TOY_X), toy_runs["quantized"](qtree, TOY_X), strict=True)
    logs = [[special.log_softmax(np.float64(y), -1) for y in pair] for pair in pairs]
    return np.array([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in logs])


def test_in_sequence_layers_make_up_for_those_before_them():
    found, _ = sequence()
    assert list(found) == list(TOY)
    assert not any(outcome.fit.bias.any() for outcome in found.values())  # there is no leaf for it
    assert divergences(found).mean() < 0.7 * divergences(one_by_one()[0]).mean()


def test_layers_of_one_shape_compile_once_whatever_their_widths_and_rates():
    assert sequence()[1] <= 1
    for run, reports in ((one_by_one, [*range(1, len(TOY) + 1)]), (together, [len(TOY)])):
        _, compiled, said = run()
        assert compiled <= 1
        assert said == reports
    before = programs()
    made = toy_problem()._replace(rates=Rates(1e-2, 1e-2, 1e-2, 1e-2))
    adaquant.fit_in_parallel(side_by_side(made), toy_widths(5))
    adaquant.fit_in_sequence(made, toy_widths(5, skip="chain[23]"))
    assert programs() == before


def test_layers_side_by_side_are_fitted_as_one_by_one():
    (first, *_), (second, *_) = one_by_one(), together()
    for name in TOY:
        for a, b in zip(first[name].fit, second[name].fit, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(first[name].loss, second[name].loss, rtol=1e-4)


def test_a_layer_alone_is_fitted_alike_in_both_ways():
    widths = toy_widths(skip=lambda name: name != "chain2_3")
    runs = adaquant.fit_in_sequence, adaquant.fit_in_parallel
    first, second = (run(toy_problem(), widths) for run in runs)
    assert list(first) == ["chain2_3"]
    assert_equal_trees(first, second)


def test_the_same_key_gives_the_same_fit_and_another_one_another():
    made, widths = toy_problem(), toy_widths(2, skip=lambda name: name != "chain3_0")
    first, again, other = (
        adaquant.fit_in_parallel(made._replace(key=jax.random.key(seed)), widths)
        for seed in (4, 4, 5)
    )
    assert_equal_trees(first, again)
    assert (first["chain3_0"].fit.w != other["chain3_0"].fit.w).any()


def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped():
    def only_first(name):
        return not name.startswith("chain1")

    options = {"weight_bits": 3, "edge_bits": None, "skip": only_first, **TOY_OPTIONS}
    kept, said = [], []
    qtree, info = adaquant.quantize(
        toy,
        TOY,
        TOY_X,
        **options,
        on_site=kept.append,
        progress=lambda *args: said.append(args),
    )
    assert [len(state) for state in kept] == [1, 2, 3, 4, 5, 6]
    assert [args[:2] for args in said] == [(i, 6) for i in range(1, 7)]
    assert all(name in args[2] for name, args in zip(info.state, said, strict=True))
    more = []
    again, resumed = adaquant.quantize(
        toy, TOY, TOY_X, **options, state=kept[3], on_site=more.append
    )
    assert [list(state)[-1] for state in more] == ["chain1_4", "chain1_5"]  # no other is fitted
    assert_equal_trees(again, qtree)
    assert_equal_trees(dict(resumed.state), dict(info.state))
    rows = {row.name: row for row in info.rows}
    assert rows["chain1_2"].note == ""
    assert rows["chain2_2"].note == "float"
    assert rows["chain1_2"].loss <= rows["chain1_2"].start <= rows["chain1_2"].nearest
    assert rows["chain1_2"].sufficiency == 512 / WIDTH
    assert (rows["chain1_2"].weight_bits, rows["chain1_2"].act_bits) == (3.0, 8.0)
    assert (rows["chain2_2"].weight_bits, rows["chain2_2"].act_bits) == (32.0, 32.0)
    assert qtree["chain2_2"] is TOY["chain2_2"]


def test_layers_of_a_scan_are_fitted_as_layers_that_stand_alone():
    made = side_by_side(adaquant.problem(scanned, STACKS, TOY_X, **TOY_OPTIONS))
    widths = site_widths(made.sites.sites, 3, 8)
    found = adaquant.fit_in_parallel(made, widths)
    alone, *_ = one_by_one()
    for name in STACKS:
        for i in range(DEPTH):
            a, b = found[name], alone[f"{name}_{i}"]
            np.testing.assert_allclose(a.nearest[i], b.nearest[0], rtol=1e-4)
            np.testing.assert_allclose(a.start[i], b.start[0], rtol=1e-4)
            assert a.loss[i] <= a.start[i]  # on other rows in each turn
    same_in_codes_and_floats(jax.jit(lnq.quantized(scanned)), made, fits(found), widths, TOY_X)


# Padding, memory.


def padded(filler):
    tokens = normal(60, 64, 12, WIDTH)
    real = np.arange(12) < np.random.default_rng(61).integers(9, 13, 64)[:, None]
    return {"tokens": np.where(real[..., None], tokens, np.float32(filler)), "real": real}


@functools.cache
def padded_tree(filler):
    qtree, _ = adaquant.quantize(
        lambda p, batch: batch["tokens"] @ p,
        matrix(1, 0),
        padded(filler),
        weight_bits=3,
        edge_bits=None,
        mask=lambda batch: batch["real"],
        **TOY_OPTIONS,
    )
    return qtree


def test_padding_is_not_seen():
    assert_equal_trees(padded_tree(1e3), padded_tree(0.0))


@pytest.mark.parametrize("kind", ["convolution", "tokens of a masked example"])
def test_examples_that_are_padding_are_seen_by_no_kind_of_layer(kind):
    real = np.arange(20) % 3 > 0
    x = np.where(real[:, None, None], normal(62, 20, 9, 4), np.float32(1e3))

    def model(p, batch):
        if kind == "convolution":
            return lax.conv_general_dilated(batch["x"], p, (2,), "SAME", dimension_numbers=NWC)
        return batch["x"] @ p[0]

    made = adaquant.problem(
        model,
        jnp.asarray(normal(63, 3, 4, 5)) if kind == "convolution" else normal(63, 1, 4, 5),
        {"x": x, "real": real},
        rows=90,
        mask=lambda batch: batch["real"],
    )
    (site,) = made.sites.sites
    seen = made.sample((site.name,), made.floats)[site.name]
    assert 1.0 < np.abs(seen).max() < 100.0


NWC = ("NWC", "WIO", "NWC")


def test_memory_is_kept_by_passes_and_by_fewer_rows():
    def three(p, x):
        return [x @ p[name] for name in sorted(p)]

    params, row = {name: TOY[f"chain1_{name}"] for name in "012"}, 4 * (2 * WIDTH + WIDTH)
    for memory, passes, rows in (
        (2**30, [("0", "1", "2")], 512),
        (2 * 512 * row, [("0", "1"), ("2",)], 512),
        (100 * row, [("0",), ("1",), ("2",)], 100),
    ):
        made = adaquant.problem(three, params, TOY_X, rows=512, memory=memory)
        assert made.passes == passes
        assert made.sample(("2",), made.floats)["2"].shape == (1, 1, rows, WIDTH)


def test_rows_come_from_every_batch_and_every_turn_of_a_loop():
    """The data says where it is from."""

    def recurrent(p, x):
        def turn(h, x):
            return h + x @ p["w"], None

        return lax.scan(turn, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))[0]

    turns = np.arange(5, dtype=np.float32)[:, None]
    batches = [np.broadcast_to(100 * i + turns, (n, 5, 3)) for i, n in ((0, 120), (1, 60))]
    made = adaquant.problem(recurrent, {"w": normal(64, 3, 4)}, batches, rows=500)
    assert made.sufficiency == {"w": 180 / 3}
    seen = np.asarray(made.sample(("w",), made.floats)["w"])
    assert seen.shape == (1, 1, 180, 3)
    assert (seen == seen[..., :1]).all()
    values, counts = np.unique(seen[..., 0], return_counts=True)
    assert values.tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104]
    assert (np.abs(counts / np.repeat([24, 12], 5) - 1.0) < 0.7).all()


def test_rows_are_one_of_each_equal_stretch_in_random_order():
    """The data says where it is from: 1000 places, 90 rows."""
    x = jnp.arange(1000.0)[:, None] * jnp.ones((1, 3))
    made = adaquant.problem(lambda p, x: x @ p["w"], {"w": normal(64, 3, 4)}, x, rows=90)
    places = np.asarray(made.sample(("w",), made.floats)["w"])[0, 0, :, 0]
    per_batch = [places[i : i + 11] for i in range(0, 88, 11)]
    assert len(set(places.tolist())) == len(places)
    for i, found in enumerate(per_batch):
        size = min(128, 1000 - 128 * i)
        edges = 128 * i + np.arange(12) * size // 11
        assert (np.sort(found) >= edges[:-1]).all()
        assert (np.sort(found) < edges[1:]).all()
    assert not (np.diff(places) > 0).all()


def test_passes_change_nothing():
    made, widths = toy_problem(), toy_widths()
    whole, names = sequence()[0], tuple(TOY)
    found = adaquant.fit_in_sequence(made._replace(passes=[names[:2], names[2:3]]), widths)
    assert_equal_trees(found, {name: whole[name] for name in names[:3]})


# A convolutional network as MobileNet's: depthwise kernels, batch-norm, a linear bottleneck.


class Net(nn.Module):
    """Its dense layer has the shape of those above."""

    @nn.compact
    def __call__(self, x):
        depthwise = functools.partial(nn.Conv, WIDTH, (3, 3), feature_group_count=WIDTH)
        x = depthwise(strides=2, use_bias=False, name="first")(x)
        x = nn.relu6(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.relu6(depthwise(name="second")(x))
        return x + nn.Dense(WIDTH, name="dense")(x)


NET_X = normal(70, 64, 7, 7, WIDTH, mean=0.3)
NET = gallery.linen("net", Net(), (NET_X,), ())
NAMES = [f"params/{name}/kernel" for name in ("first", "second", "dense")]
BIASES = [f"params/{name}/bias" for name in ("norm", "second", "dense")]


@functools.cache
def net_fit():
    """The problem, widths, outcomes and the integer tree."""
    made = adaquant.problem(NET.apply_fn, NET.params, NET_X, **TOY_OPTIONS)
    widths = site_widths(made.sites.sites, {"first": 3, "second": 4, "dense": 2}, 6)
    found = adaquant.fit_in_sequence(made, widths)
    return made, widths, found, adaquant.harden(made, fits(found), widths)


net_run = jax.jit(lnq.quantized(NET.apply_fn))


def followed(name, y, params):
    """What the model makes of a layer's output ``[g, r, o]``, in NumPy."""
    leaf = {key: np.float64(a) for key, a in leaves(params).items() if not isinstance(a, QTensor)}
    if name == NAMES[2]:
        return y + leaf[BIASES[2]]
    groups = (WIDTH, 1, 1)
    if name == NAMES[0]:
        y = y - leaf["batch_stats/norm/mean"].reshape(groups)
        y = y / np.sqrt(leaf["batch_stats/norm/var"].reshape(groups) + 1e-5)
        y = y * leaf["params/norm/scale"].reshape(groups)
    bias = leaf[BIASES[NAMES.index(name)]]
    return np.clip(y + bias.reshape(groups), 0.0, 6.0)


@pytest.mark.parametrize("name", NAMES, ids=["depthwise and batch-norm", "depthwise", "dense"])
def test_the_target_stands_behind_bias_batch_norm_and_activation(name):
    """The loss that a fit reports, from the integer tree."""
    made, widths, found, qtree = net_fit()
    before = {n: found[n].fit for n in NAMES[: NAMES.index(name)]}
    current = adaquant.place(made, made.floats, before, widths)
    reads, read = (
        np.float64(made.sample(tuple(NAMES), p)[name][0]) for p in (current, made.floats)
    )
    leaf, site = leaves(qtree)[name], made.layers[name]
    act = jax.tree.map(lambda a: np.reshape(a, (1, 1, 1)), leaf.acts[0])
    reads = oracles.dequantize(oracles.quantize(reads, act), act)
    w, old = (
        np.float64(matrices.to_matrix(a, site)[0])
        for a in (dequantize_array(leaf), leaves(NET.params)[name])
    )
    out, target = followed(name, reads @ w, qtree), followed(name, read @ old, NET.params)
    loss = np.mean((out - target)[:, : 512 // 10] ** 2) / np.mean(target**2)
    assert found[name].loss[0] == pytest.approx(loss, rel=1e-3)
    assert found[name].loss <= found[name].start <= found[name].nearest


def test_codes_floats_and_what_a_file_keeps_are_one_model(tmp_path):
    made, widths, found, _ = net_fit()
    hard = same_in_codes_and_floats(net_run, made, fits(found), widths, NET_X)
    lnq.save(tmp_path / "net.lnq", hard)
    restored = lnq.load(tmp_path / "net.lnq")
    assert_equal_trees(jax.tree.leaves(restored), jax.tree.leaves(hard))
    out = net_run(hard, NET_X)
    np.testing.assert_array_equal(net_run(restored, NET_X), out)
    exact = NET.apply_fn(NET.params, NET_X)
    assert np.mean((out - exact) ** 2) < 0.05 * np.var(exact)


def test_biases_move_and_nothing_else_that_is_float():
    *_, found, qtree = net_fit()
    before, after = leaves(NET.params), leaves(qtree)
    rest = set(before) - {*NAMES, *BIASES}
    assert rest > {"params/norm/scale", "batch_stats/norm/mean"}
    assert all(after[name] is before[name] for name in rest)
    moves = [np.asarray(after[bias] - before[bias]) for bias in BIASES]
    for move, name in zip(moves, NAMES, strict=True):
        np.testing.assert_allclose(move, found[name].fit.bias.ravel(), atol=1e-6)
    assert any(move.any() for move in moves)


def test_biases_are_rounded_to_the_widths_of_weights_and_data_together():
    made, widths, found, floats = net_fit()
    for acts, bits in ((widths.acts, [9, 10, 8]), ({}, [16, 16, 16])):
        narrow = widths._replace(acts=acts)
        qtree = leaves(adaquant.harden(made, fits(found), narrow, round_biases=True))
        for name, width in zip(BIASES, bits, strict=True):
            leaf = qtree[name]
            assert isinstance(leaf, QTensor)
            assert int(leaf.qparams.bits.max()) == width
            assert leaf.qparams.scale.size == 1
            off = np.abs(dequantize_array(leaf) - leaves(floats)[name])
            assert off.max() <= 0.51 * leaf.qparams.scale.ravel()[0]


# Integer codes and floats are the same model, whatever the layers are.


def by_hand(made, widths, seed=0):
    """Fits that nothing was learned for: a grid of its own for each channel, biases that move."""
    rng, found = np.random.default_rng(seed), {}
    for name, site in made.layers.items():
        w = np.asarray(matrices.to_matrix(leaves(made.params)[site.path], site), np.float32)
        bits = np.broadcast_to(np.ravel(widths.weights[site.path]), len(w)).reshape(-1, 1, 1, 1)
        low, high = (np.float32(end(w, 2, keepdims=True)) for end in (np.min, np.max))
        low, high = np.minimum(low, -0.01), np.maximum(high, 0.01)
        scale = (high - low) / (2.0**bits - 1) * rng.uniform(1.0, 1.5, low.shape)
        zero_point = np.clip(-(2.0**bits) / 2 - low / scale, -(2.0**bits) / 2, 2.0**bits / 2 - 1)
        layers = (len(w), 1, 1, 1)
        numbers = {
            "w": w,
            "scale": scale,
            "zero_point": zero_point,
            "act_scale": rng.uniform(0.05, 0.1, layers),
            "act_zero_point": rng.uniform(-5, 5, layers),
            "bias": rng.normal(0.0, 0.1, low.shape),
        }
        found[name] = Fit(**{key: jnp.asarray(a, jnp.float32) for key, a in numbers.items()})
    return found


def same_in_codes_and_floats(run, made, fits, widths, x, tolerance=2e-5):
    soft = adaquant.place(made, made.floats, fits, widths)
    hard = adaquant.harden(made, fits, widths)
    assert jax.tree.structure(soft) == jax.tree.structure(made.floats)
    for a, b in zip(jax.tree.leaves(run(soft, x)), jax.tree.leaves(run(hard, x)), strict=True):
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(a).max())
    return hard


MODELS = {model.name: model for model in gallery.GALLERY}
EACH = {  # width of the data, and which axis of each leaf holds channels
    "nnx CNN": (7, (3, 1)),
    "vmapped experts": (7, ()),
    "linen stack on the last axis": (7, ()),
    "weight on the left": (None, (0,)),
}


@pytest.mark.parametrize("name", EACH)
def test_integer_codes_compute_what_floats_do(name):
    model, (act_bits, axes) = MODELS[name], EACH[name]
    made = adaquant.problem(model.apply_fn, model.params, *model.args)
    widths, run = site_widths(made.sites.sites, 3, act_bits), jax.jit(lnq.quantized(model.apply_fn))
    hard = same_in_codes_and_floats(run, made, by_hand(made, widths), widths, *model.args)
    assert all((leaves(hard)[s.path].acts == ()) == (act_bits is None) for s in made.sites.sites)
    for site, axis in zip(made.sites.sites, axes, strict=False):
        leaf, w = leaves(hard)[site.path], leaves(model.params)[site.path]
        off = np.abs(dequantize_array(leaf) - w).max(tuple({*range(w.ndim)} - {axis % w.ndim}))
        # Half a step, and as much for the rounding of the zero point.
        assert (off <= 1.01 * leaf.qparams.scale.ravel()).all()
        assert leaf.qparams.scale.size == w.shape[axis]


def test_half_precision_stays_half_precision():
    model = MODELS["nnx MLP"]
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), model.params)
    x = jnp.asarray(model.args[0], jnp.bfloat16)
    made = adaquant.problem(model.apply_fn, params, x)
    widths, run = site_widths(made.sites.sites, 3, 7), jax.jit(lnq.quantized(model.apply_fn))
    hard = same_in_codes_and_floats(run, made, by_hand(made, widths), widths, x, tolerance=2e-2)
    assert {leaf.dtype for leaf in leaves(hard).values()} == {jnp.dtype("bfloat16")}
    sampled = made.sample(tuple(made.layers), made.floats)
    assert {rows.dtype for rows in sampled.values()} == {jnp.dtype("float32")}


def test_the_float_model_in_the_structure_of_a_rounded_one_is_itself_in_any_unit():
    def model(p, x):
        return (x @ p["a"]) @ p["b"]

    x = normal(72, 20, 6)
    for unit in (1e-9, 1e6):
        params = {"a": normal(73, 6, 4, spread=unit), "b": normal(71, 4, 3)}
        made = adaquant.problem(model, params, x)
        out = lnq.quantized(model)(made.floats, x)
        np.testing.assert_allclose(out, model(params, x), rtol=1e-4, atol=1e-5 * unit)


# Biases that may not move, leaves that are no layer.

SQUARE = {name: jnp.asarray(normal(i, 6, 6)) for i, name in enumerate("abcd")}
SQUARE |= {"bias": jnp.asarray(normal(9, 1, 6)), "places": jnp.asarray(normal(8, 5, 6))}
SQUARE_X = normal(10, 20, 5, 6)


def biased(p, x):
    return jnp.tanh(x @ p["a"] - p["bias"][None])


def shared_by_two(p, x):
    return biased(p, x) @ p["b"] + p["bias"][None]


def used_elsewhere(p, x):
    return biased(p, x) * p["bias"][None]


def positional(p, x):
    return x @ p["a"] + p["places"][None]


def multiplied(p, x):
    return (x @ p["a"] + p["bias"][None]) * p["places"][0]


BIASED = {
    "its own": (biased, {"a": "bias"}),
    "shared by two layers": (shared_by_two, {}),
    "used elsewhere": (used_elsewhere, {}),
    "one for each place": (positional, {}),
    "multiplied later": (multiplied, {}),
}


@pytest.mark.parametrize(("model", "biases"), BIASED.values(), ids=BIASED)
def test_a_bias_moves_where_it_serves_one_layer_only(model, biases):
    with jax.numpy_rank_promotion("allow"):
        made = adaquant.problem(model, SQUARE, SQUARE_X)
    assert made.biases == biases
    widths = site_widths(made.sites.sites, 3, 7)
    fits = by_hand(made, widths)
    hard = adaquant.harden(made, fits, widths)
    for name in ("bias", "places"):
        if name in biases.values():
            np.testing.assert_allclose(hard[name], SQUARE[name] - fits["a"].bias[0, 0], atol=1e-6)
        else:
            assert hard[name] is SQUARE[name]


def tied(p, x):
    return (x @ p["a"]) @ p["a"].T


def looked_up(p, x):
    return p["a"][jnp.arange(5)] @ p["a"].T + x[0]


def in_part(p, x):
    return x[..., :3] @ p["a"][:3] + p["bias"][None]


def last_axis_twice(p, x):
    def layer(x, w):
        return x @ w @ w, None

    stack = jnp.stack([p["a"], p["b"]], -1) if "stack" not in p else p["stack"]
    return lax.scan(layer, x, jnp.moveaxis(stack, -1, 0))[0]


TWICE, PART = (
    "the leaf is used more than once",
    "the product reads a part of the leaf, or is ragged",
)
LEFT = {
    "tied": (tied, {"a": SQUARE["a"]}, {"a": TWICE, "a@1": TWICE}),
    "table": (looked_up, {"a": SQUARE["a"]}, {"a": TWICE}),
    "part": (in_part, {"a": SQUARE["a"], "bias": SQUARE["bias"]}, {"a": PART}),
    "stack on the last axis": (
        last_axis_twice,
        {"stack": jnp.asarray(normal(5, 6, 6, 2))},
        {"stack": TWICE, "stack@1": TWICE},
    ),
}


@pytest.mark.parametrize(("model", "params", "why"), LEFT.values(), ids=LEFT)
def test_what_is_no_layer_is_rounded_to_nearest_and_says_why(model, params, why):
    qtree, info = adaquant.quantize(model, params, SQUARE_X, weight_bits=3, edge_bits=None)
    assert {row.name: row.note for row in info.rows} == why
    assert {row.weight_bits for row in info.rows} == {3.0}
    assert {row.act_bits for row in info.rows} == {32.0}
    assert np.isnan([row.loss for row in info.rows]).all()
    assert info.state == {}
    leaf, w = (leaves(p)[info.rows[0].name] for p in (qtree, params))
    assert leaf.acts == ()
    assert int(leaf.qparams.bits.max()) == 3
    np.testing.assert_array_equal(leaf.codes, oracles.quantize(w, leaf.qparams))
    reach = np.abs(w).max()
    assert 0.0 < np.abs(dequantize_array(leaf) - w).mean() < 0.15 * reach


def test_the_first_and_the_last_site_have_more_bits_and_what_is_skipped_stays():
    params = {"a": SQUARE["a"]}
    qtree, info = adaquant.quantize(tied, params, SQUARE_X, weight_bits=3)
    assert {row.weight_bits for row in info.rows} == {8.0}
    assert int(qtree["a"].qparams.bits.max()) == 8
    qtree, info = adaquant.quantize(tied, params, SQUARE_X, weight_bits=3, skip="a")
    assert qtree["a"] is params["a"]
    assert [row.note for row in info.rows] == ["float", "float"]


# What is asked for wrongly, or what there is too little of.


def linear(p, x):
    return x @ p["w"]


LINEAR = {"w": SQUARE["a"]}
BAD = {
    "weights": ({"weights": "loose"}, "weights: must be one of free, constrained, fixed"),
    "steps": ({"steps": 15}, "steps: must be a multiple of 10, not 15"),
    "fewer steps": ({"steps": -10}, "steps: must be a multiple of 10, not -10"),
    "width": ({"weight_bits": 17}, "'w' has 17, not a number from 1 to 16"),
    "float weights": ({"weight_bits": lambda name: None}, r"weight_bits: None for \['w'\]"),
    "state": ({"state": {"v": None}}, r"state: \['v'\] are no layers to be fitted here"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        adaquant.quantize(linear, LINEAR, normal(1, 20, 6), **options)


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="params: 'w' holds NaN or infinity"):
        adaquant.problem(linear, {"w": LINEAR["w"].at[1, 2].set(jnp.nan)}, normal(1, 20, 6))


def test_a_model_without_products_is_named():
    with pytest.raises(ValueError, match="no leaf of params meets data in a product"):
        adaquant.problem(lambda p, x: x + p["w"][:1], LINEAR, normal(1, 20, 6))


def test_too_few_rows_are_a_warning_that_names_the_layer():
    with pytest.raises(UserWarning, match="fewer than two rows of data for each input of w;"):
        adaquant.quantize(linear, LINEAR, normal(1, 11, 6))


def test_rows_that_are_not_sampled_do_not_count():
    batches = [normal(i, count, 6) for i, count in enumerate((100, 3, 100))]
    made = adaquant.problem(linear, LINEAR, batches, rows=17)
    assert made.sample(("w",), made.floats)["w"].shape == (1, 1, 5 + 3 + 5, 6)
    assert made.sufficiency == {"w": 13 / 6}


def test_one_row_moves_grids_but_no_weights_and_is_no_warning_if_asked_for_as_the_warning_says():
    options = {"weights": "fixed", "second_order": False, "steps": 10, "edge_bits": None}
    options["rates"] = Rates(grid=0.1)
    qtree, info = adaquant.quantize(linear, LINEAR, normal(1, 1, 6), **options)
    assert info.rows[0].sufficiency == 1 / 6
    assert info.rows[0].loss < info.rows[0].start == info.rows[0].nearest
    np.testing.assert_array_equal(info.state["w"].fit.w[0, 0], LINEAR["w"])
    codes = oracles.quantize(LINEAR["w"], qtree["w"].qparams)
    np.testing.assert_array_equal(qtree["w"].codes, codes)


def test_published_options_are_those_of_the_authors_code():
    made = adaquant.problem(linear, LINEAR, normal(1, 20, 6), **adaquant.published())
    assert made.rates == Rates(1e-5, 1e-3, 1e-1, 1e-3, absolute=True)
    assert (made.how.steps, made.how.second_order, made.how.clip) == (1000, False, False)
    assert made.how.absolute
    assert made.how.weights == "free"
