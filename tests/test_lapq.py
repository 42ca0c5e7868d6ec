"""LAPQ against the numbers of its specification, twins in NumPy, and what its search promises."""

import functools
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from scipy import special
from scipy import stats as densities

from lnq import calibration, distortion, landscape, lapq, search, sites
from lnq.quantizer import FakeQuantTensor, QTensor, dequantize_array, fake_quant

# Grids.

KINDS = {
    "integer": {},
    "even": {"even": True},
    "one-sided": {"signed": False},
    "one-sided, weights even": {"signed": False, "even": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def levels(bits, clip, **kind):
    grid = lapq.clipped(lapq.make_grid(bits, **kind), clip)
    codes = np.arange(float(grid.qmin), float(grid.qmax) + 1)
    return (codes - float(grid.zero_point)) * float(grid.scale)


def flat(grid):
    return jax.tree.map(jnp.ravel, grid)


@every_kind
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 16])
def test_a_grid_has_as_many_levels_as_its_bits_say_and_reaches_its_clip(kind, bits):
    found = levels(bits, 3.5, **kind)
    assert len(found) == len(np.unique(found)) == 2**bits
    assert int(lapq.make_grid(bits, **kind).bits) == bits
    np.testing.assert_allclose(np.diff(found), found[1] - found[0], rtol=1e-6)
    assert np.abs(found).max() == pytest.approx(3.5, rel=1e-6)


def test_levels_are_those_of_the_paper_and_of_its_authors_code():
    np.testing.assert_allclose(levels(2, 3.0, even=True), [-3, -1, 1, 3])
    np.testing.assert_allclose(levels(1, 3.0, even=True), [-3, 3])
    np.testing.assert_allclose(levels(2, 3.0), [-3, -1.5, 0, 1.5])
    np.testing.assert_allclose(levels(2, 3.0, signed=False), [0, 1, 2, 3])
    for bits in (1, 2, 3, 8):
        even = levels(bits, 3.0, even=True)
        np.testing.assert_allclose(even, -even[::-1])
        assert 0.0 not in even
        assert 0.0 in levels(bits, 3.0)
        np.testing.assert_allclose(levels(bits, 3.0, signed=False)[[0, -1]], [0, 3], rtol=1e-6)


@every_kind
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_goes_to_the_nearest_level_and_a_second_time_changes_nothing(kind, bits):
    grid = lapq.clipped(lapq.make_grid(bits, **kind), 1.7)
    x = np.linspace(-3.0, 3.0, 501, dtype=np.float32)
    found = np.asarray(fake_quant(jnp.asarray(x), flat(grid)))
    every = levels(bits, 1.7, **kind)
    nearest = np.abs(x[:, None] - every).min(1)
    np.testing.assert_allclose(np.abs(found - x), nearest, atol=1e-5)
    inside = (x >= every[0]) & (x <= every[-1])
    assert (np.abs(found - x)[inside] <= (every[1] - every[0]) / 2 + 1e-6).all()
    np.testing.assert_array_equal(fake_quant(jnp.asarray(found), flat(grid)), found)


@pytest.mark.parametrize("clip", [1e-12, 1e-30, 1e-38, 0.0])
def test_a_clip_that_vanishes_leaves_numbers(clip):
    x = jnp.array([-1e9, -2.0, -0.1, 0.0, 0.1, 7.0, 1e9])
    even = fake_quant(x, flat(lapq.clipped(lapq.make_grid(3, even=True), clip)))
    np.testing.assert_allclose(np.abs(even[x != 0]), max(clip, 1e-30), rtol=1e-5)
    np.testing.assert_array_equal(np.sign(even[x != 0]), np.sign(x[x != 0]))
    for kind in KINDS.values():
        out = fake_quant(x, flat(lapq.clipped(lapq.make_grid(3, **kind), clip)))
        assert (jnp.abs(out) <= 1.01e-12).all()


def test_width_sign_and_clip_are_data():
    @jax.jit
    def run(bits, signed, clip):
        return fake_quant(
            jnp.array([-1.9, 0.2, 1.1]),
            flat(lapq.clipped(lapq.make_grid(bits, signed=signed), clip)),
        )

    np.testing.assert_allclose(run(2, True, 2.0), [-2, 0, 1])
    np.testing.assert_allclose(run(3, True, 2.0), [-2, 0, 1])
    np.testing.assert_allclose(run(2, False, 3.0), [0, 0, 1])
    assert run._cache_size() == 1


# Derivatives by a clip.


@every_kind
@pytest.mark.parametrize("bits", [2, 4])
def test_the_derivative_by_the_logarithm_of_a_clip(kind, bits):
    clip, grid = 1.2345, lapq.make_grid(bits, **kind)
    x = np.linspace(-2.9, 3.1, 401, dtype=np.float32)

    def rounded(log_clip):
        return fake_quant(jnp.asarray(x), flat(lapq.clipped(grid, jnp.exp(log_clip))))

    q, slope = jax.jvp(rounded, (jnp.log(jnp.float32(clip)),), (jnp.float32(1.0),))
    low, high = levels(bits, clip, **kind)[[0, -1]]
    expected = np.where((x > low) & (x < high), q - x, np.where(x > 0, high, low))
    np.testing.assert_allclose(slope, expected, atol=1e-6)


DENSE = np.linspace(-9.0, 9.0, 720_001)
"""Points of N(0, 1), for integrals."""


@pytest.mark.parametrize(
    ("bits", "clip", "exact", "straight"),
    [(2, 2.0, 0.12377, 0.10899), (3, 2.0, -0.00503, -0.00793), (4, 2.5, -0.00038, -0.00070)],
)
def test_codes_held_still_give_the_derivative_of_the_squared_error(bits, clip, exact, straight):
    """The straight-through one is smaller, by about step² / 6 times the density at the clip."""
    weight = densities.norm.pdf(DENSE)
    weight /= weight.sum()

    def rounded(c):
        return fake_quant(
            jnp.asarray(DENSE, jnp.float32), flat(lapq.clipped(lapq.make_grid(bits, even=True), c))
        )

    def mean(x):
        return float(weight @ np.asarray(x, np.float64))

    q, slope = jax.jvp(rounded, (jnp.float32(clip),), (jnp.float32(1.0),))
    error = np.asarray(q, np.float64) - DENSE
    h = 0.01
    wider, narrower = (
        (np.asarray(rounded(jnp.float32(clip + s)), np.float64) - DENSE) ** 2 for s in (h, -h)
    )
    difference = mean(wider - narrower) / (2 * h)
    assert difference == pytest.approx(exact, abs=1e-4)
    assert mean(2 * error * q / clip) == pytest.approx(difference, abs=1e-4)
    assert mean(2 * error * slope) == pytest.approx(straight, abs=1e-4)
    step = 2 * clip / (2**bits - 1)
    gap = step**2 * densities.norm.pdf(clip) / 6
    assert exact - straight == pytest.approx(gap, rel=0.1)


# Phase 1: one tensor.

PS = (2.0, 2.5, 3.0, 3.5, 4.0)
IDEAL = {  # density, grid, bits: clips for each p, over sigma or b; error at p = 2
    ("normal", "even", 2): ([1.494, 1.598, 1.694, 1.785, 1.870], 0.11885),
    ("normal", "even", 3): ([2.051, 2.200, 2.339, 2.468, 2.590], 0.03744),
    ("normal", "even", 4): ([2.514, 2.707, 2.886, 3.053, 3.211], 0.01154),
    ("normal", "integer", 2): ([2.097, 2.285, 2.462, 2.629, 2.786], 0.14943),
    ("normal", "integer", 3): ([2.407, 2.599, 2.778, 2.946, 3.106], 0.04064),
    ("normal", "integer", 4): ([2.709, 2.923, 3.123, 3.310, 3.488], 0.01186),
    ("laplace", "even", 2): ([2.307, 2.643, 2.974, 3.301, 3.622], 0.39247),
    ("laplace", "even", 3): ([3.618, 4.164, 4.700, 5.227, 5.741], 0.14339),
    ("laplace", "even", 4): ([4.889, 5.661, 6.416, 7.147, 7.836], 0.05062),
    ("half", "one-sided", 2): ([1.952, 2.093, 2.223, 2.345, 2.461], 0.04686),
    ("half", "one-sided", 3): ([2.474, 2.663, 2.838, 3.002, 3.156], 0.01289),
    ("half", "one-sided", 4): ([2.899, 3.133, 3.349, 3.551, 3.742], 0.00369),
}
DENSITIES = {"normal": densities.norm, "laplace": densities.laplace, "half": densities.halfnorm}


def stacked_grids(grids):
    return jax.tree.map(lambda *a: jnp.stack([jnp.reshape(x, ()) for x in a]), *grids)


lp_clips = jax.jit(jax.vmap(lapq.lp_clip, (None, None, 0)))
"""By p and channel."""


@functools.cache
def ideal():
    """Statistics, grids and clips ``[p, row]`` for the rows of the table.

    A million samples that are quantiles: random ones have a tail of their own, which moves the clip
    of the fourth power by 5 %.
    """
    places = (np.arange(1_000_000) + 0.5) / 1_000_000
    x = np.stack([density.ppf(places) for density in DENSITIES.values()], 1)
    stats = jax.jit(calibration.observe, static_argnums=1)(jnp.asarray(x, jnp.float32), (1,))
    which = np.array([list(DENSITIES).index(density) for density, _, _ in IDEAL])
    stats = jax.tree.map(lambda a: a[which], stats)
    grids = stacked_grids([lapq.make_grid(bits, **KINDS[kind]) for _, kind, bits in IDEAL])
    return stats, grids, np.asarray(lp_clips(stats, grids, jnp.array(PS)))


def test_clips_of_ideal_densities_are_the_published_ones():
    stats, grids, clips = ideal()
    expected = np.array([row for row, _ in IDEAL.values()]).T
    # Values are known to a sixteenth of a power of two; and the last of a million quantiles stands
    # for a tail that has a fourth of the fourth power.
    tolerance = np.full(expected.shape, 0.011)
    tolerance[4, [row[2] == 4 for row in IDEAL]] = 0.02
    assert (np.abs(clips / expected - 1.0) <= tolerance).all()
    errors = calibration.grid_error(stats, lapq.clipped(grids, clips[0]), 4)
    np.testing.assert_allclose(errors, [error for _, error in IDEAL.values()], rtol=0.01)


def test_a_larger_exponent_has_a_wider_clip_and_its_own_error_is_the_least():
    stats, grids, clips = ideal()
    assert (np.diff(clips, axis=0) > 0.0).all()
    error = jax.jit(
        jax.vmap(
            lambda p, c: calibration.grid_error(stats, lapq.clipped(grids, c), 4, p), (None, 0)
        )
    )
    for i, p in enumerate(PS):
        errors = np.asarray(error(jnp.float32(p), clips))
        assert (errors[i] <= errors * (1 + 1e-4)).all()


def by_hand(x, bits, clip, kind="integer"):
    """Rounded in float64."""
    half = 2.0 ** (bits - 1)
    step = clip / {"integer": half, "even": half - 0.5, "one-sided": 2 * half - 1}[kind]
    if kind == "even":
        return (np.clip(np.floor(x / step), -half, half - 1) + 0.5) * step
    low, high = (-half, half - 1) if kind == "integer" else (0, 2 * half - 1)
    return np.clip(np.round(x / step), low, high) * step


def by_scan(x, bits, p, kind="integer"):
    """The clip of least error among many, the errors of all, and all."""
    x = np.asarray(x, np.float64).ravel()
    clips = np.abs(x).max() * np.exp(np.linspace(np.log(0.01), 0.0, 400))
    errors = np.array([np.mean(np.abs(by_hand(x, bits, c, kind) - x) ** p) for c in clips])
    return clips[np.argmin(errors)], errors, clips


SKEWED = np.random.default_rng(4).gamma(0.7, 1.3, size=(3000, 3)) * [1.0, -1.0, 0.2] + [0.3, 0, -2]


def test_no_other_clip_has_a_smaller_error_on_skewed_data():
    stats = calibration.observe(jnp.asarray(SKEWED, jnp.float32), (1,))
    rows = [(3, "one-sided"), (2, "integer"), (4, "even")]
    grids = stacked_grids([lapq.make_grid(bits, **KINDS[kind]) for bits, kind in rows])
    clips = np.asarray(lp_clips(stats, grids, jnp.array(PS)))
    for i, p in enumerate(PS):
        for k, (bits, kind) in enumerate(rows):
            _, errors, tried = by_scan(SKEWED[:, k], bits, p, kind)
            # 1/16 of a power of two is all that is known of a value, and p is up to 4.
            assert np.interp(clips[i, k], tried, errors) <= 1.1 * errors.min(), (p, k)


def test_clips_scale_with_the_data():
    grids = stacked_grids([lapq.make_grid(3, even=True)] * 3)
    x = jnp.asarray(SKEWED[:, :1], jnp.float32)
    stats = calibration.observe(jnp.concatenate([x, 0.25 * x, -3.7 * x], 1), (1,))
    one, quarter, more = np.asarray(lp_clips(stats, grids, jnp.array(PS))).T
    # Golden sections stop at an interval of 2 * 0.073 * 0.618 ** 16.
    np.testing.assert_allclose(quarter, 0.25 * one, rtol=7e-5)
    np.testing.assert_allclose(more, 3.7 * one, rtol=0.02)  # other bins


def test_where_all_is_zero_the_clip_is_a_number():
    stats = calibration.observe(jnp.array([[0.0, 0.0, 2.0]] * 5), (1,))
    grids = stacked_grids([lapq.make_grid(3, **KINDS[kind]) for kind in list(KINDS)[:3]])
    clips = lp_clips(stats, grids, jnp.array(PS))
    assert jnp.isfinite(clips).all()
    assert (clips > 0.0).all()
    rounded = fake_quant(jnp.full((3,), 2.0), lapq.clipped(grids, clips[0]))
    assert rounded[2] == pytest.approx(2.0, rel=0.01)


# Phase 2: one exponent.


@pytest.mark.parametrize("window", [5, None, 3, 9, 100])
def test_the_lowest_point_of_a_parabola_is_found_exactly(window):
    losses = [0.3 * (p - 2.7) ** 2 + 4.0 for p in lapq.EXPONENTS]
    assert lapq.best_p(lapq.EXPONENTS, losses, window) == pytest.approx(2.7, abs=1e-9)


@pytest.mark.parametrize("shift", [1.8, 1.2, 4.6])
def test_an_optimum_outside_of_the_papers_range_is_found(shift):
    """MobileNet's is below 2."""
    losses = [abs(p - shift) ** 3 + 0.02 * np.sin(9 * p) for p in lapq.EXPONENTS]
    assert lapq.best_p(lapq.EXPONENTS, losses) == pytest.approx(shift, abs=0.3)


FALLBACKS = {
    "concave": ([2.0, 2.5, 3.0, 3.5, 4.0], [1.0, 2.0, 2.5, 2.0, 0.9], 4.0),
    "falling": ([2.0, 3.0, 4.0], [3.0, 2.0, 1.0], 4.0),
    "rising": ([2.0, 3.0, 4.0], [1.0, 2.0, 3.5], 2.0),
    "two": ([2.0, 3.0], [2.0, 1.0], 3.0),
    "one": ([2.5], [1.0], 2.5),
    "equal": ([2.0, 3.0, 4.0], [1.0, 1.0, 1.0], 2.0),
    "infinite": ([2.0, 3.0, 4.0], [np.inf, 1.0, 2.0], 3.0),
    "not a number": ([2.0, 3.0, 4.0, 5.0], [np.nan, 3.0, 1.0, 2.0], 4.0),
}


@pytest.mark.parametrize(("ps", "losses", "expected"), FALLBACKS.values(), ids=FALLBACKS)
def test_without_a_lowest_point_inside_the_best_scanned_exponent_is_taken(ps, losses, expected):
    assert lapq.best_p(ps, losses) == expected


def test_only_the_neighbours_of_the_best_are_fitted():
    losses = [(p - 2.2) ** 2 if p <= 3.5 else 100.0 for p in lapq.EXPONENTS]
    assert lapq.best_p(lapq.EXPONENTS, losses, 5) == pytest.approx(2.2, abs=1e-9)
    assert lapq.best_p(lapq.EXPONENTS, losses, None) != pytest.approx(2.2, abs=0.1)


# A trained network of five layers; five batches, the last one held out.

LAYERS, SIZES = 5, (8, 24, 24, 24, 24, 4)
NAMES = [f"{kind} of layer{i}" for i in range(LAYERS) for kind in ("data", "weights")]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def examples(n, seed):
    """Four clouds, and which one each point is of."""
    rng, middles = np.random.default_rng(seed), np.random.default_rng(99).normal(size=(4, 8))
    label = rng.integers(0, 4, n)
    return np.float32(middles[label] + rng.normal(size=(n, 8))), label


def mlp(params, x):
    for i in range(LAYERS):
        x = (jnp.maximum(x, 0.0) if i else x) @ params[f"layer{i}"] + params[f"bias{i}"]
    return x


def cross_entropy(outputs, labels):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


@functools.cache
def trained():
    params = {}
    for i, (n, m) in enumerate(pairwise(SIZES)):
        params |= {f"layer{i}": normal(i, n, m) * (2 / n) ** 0.5, f"bias{i}": jnp.zeros((1, m))}
    (x, label), adam = examples(4000, 0), optax.adam(3e-3)

    @jax.jit
    def train(params, x, label):
        def step(carry, _):
            params, state = carry
            loss, grad = jax.value_and_grad(lambda p: cross_entropy(mlp(p, x), label))(params)
            updates, state = adam.update(grad, state)
            return (optax.apply_updates(params, updates), state), loss

        return lax.scan(step, (params, adam.init(params)), length=60)

    with jax.numpy_dtype_promotion("standard"):  # Adam counts in int32
        (params, _), losses = train(params, x, label)
    assert losses[-1] < 0.5 < 1.5 < losses[0]
    return params


BATCHES = [examples(128, 7 + i)[0] for i in range(5)]
SEARCHED, HELD_OUT = BATCHES[:4], BATCHES[4:]


@functools.cache
def toy(weight_bits, act_bits):
    return lapq.problem(
        mlp, trained(), BATCHES, weight_bits=weight_bits, act_bits=act_bits, edge_bits=None
    )


@functools.cache
def searched():
    """States at the start and after each of two sweeps, at 3 bits, and what was said meanwhile."""
    said = []

    def progress(*args):
        said.append(args)

    made = toy(3, 3)
    state = lapq.begin(made, ps=(2.0, 3.0, 4.0), progress=progress)
    return [state, *lapq.improve(made, state, 0, 2, progress=progress)], said


RUNS = {"float": jax.jit(mlp), "quantized": jax.jit(sites.quantized(mlp))}


def divergence(qtree, batches):
    """Of the integer tree from the floats, over some batches, in float64."""
    found = []
    for x in batches:
        outputs = (RUNS["float"](trained(), x), RUNS["quantized"](qtree, x))
        p, q = (special.log_softmax(np.asarray(out, np.float64), -1) for out in outputs)
        found += [*(np.exp(p) * (p - q)).sum(-1)]
    return np.mean(found)


def test_what_comes_back_is_better_than_the_best_start_and_no_worse_on_other_examples():
    states, _ = searched()
    state = states[-1]
    np.testing.assert_array_equal(state.trace[0, 1], state.losses.min())
    assert state.loss < 0.9 * state.losses.min()
    assert state.held_out <= state.trace[0, 2]
    assert [int(s.sweeps) for s in states] == [0, 1, 2]
    losses = [float(s.search.loss) for s in states]
    assert losses == sorted(losses, reverse=True)
    np.testing.assert_array_equal(state.ps[:-1], [np.inf, 2, 3, 4])
    assert 2.0 <= state.ps[-1] <= 4.0


def test_what_makes_other_examples_worse_is_not_taken():
    """The start is held to be exact on the examples held out: anything else is worse there."""
    made, begun = toy(3, 3), searched()[0][0]
    exact = RUNS["quantized"](made.tree(begun.start), HELD_OUT[0])
    made = made._replace(held_out=made.held_out._replace(references=(exact[None],)))
    *_, state = lapq.improve(made, lapq.begin(made, ps=(2.0, 3.0, 4.0)), 0, 1)
    assert state.trace[1, 1] < 0.9 * state.trace[0, 1]
    assert state.trace[1, 2] > 1e-3 > 1e-5 > state.trace[0, 2]
    np.testing.assert_array_equal(state.best, begun.start)
    assert (state.loss, state.held_out) == tuple(state.trace[0, 1:])


def test_the_integer_tree_has_the_loss_that_was_searched():
    made, state = toy(3, 3), searched()[0][-1]
    qtree = made.tree(state.best)
    assert divergence(qtree, HELD_OUT) == pytest.approx(float(state.held_out), rel=1e-4)
    found = float(jax.jit(made.loss)(state.best, made.data))
    assert divergence(qtree, SEARCHED) == pytest.approx(found, rel=1e-4)
    assert all(qtree[f"bias{i}"] is trained()[f"bias{i}"] for i in range(LAYERS))
    for i in range(LAYERS):
        leaf = qtree[f"layer{i}"]
        assert (leaf.codes.dtype, leaf.acts[0].dtype) == (jnp.int8, jnp.int8)
        assert (int(leaf.qparams.bits.max()), int(leaf.acts[0].bits.max())) == (3, 3)
        means = [
            np.asarray(w, np.float64).mean(0)
            for w in (dequantize_array(leaf), trained()[f"layer{i}"])
        ]
        np.testing.assert_allclose(*means, atol=1e-6)
    one_sided = [float(qtree[f"layer{i}"].acts[0].zero_point.max()) == -4.0 for i in range(LAYERS)]
    assert one_sided == [False, True, True, True, True]


def test_starts_are_wider_for_larger_exponents_and_never_wider_than_what_there_is():
    made = toy(3, 3)
    start = jax.jit(made.start)
    two, four = (start(jnp.float32(p), made.data) for p in (2.0, 4.0))
    assert (two < four).all()
    assert (four <= made.widest + 1e-5).all()
    largest = [np.abs(np.concatenate(BATCHES)).max(), np.abs(trained()["layer0"]).max()]
    np.testing.assert_allclose(np.exp(made.widest[:2]), largest, rtol=1e-5)
    assert list(made.names) == NAMES
    np.testing.assert_array_equal(made.bits, np.full(2 * LAYERS, 3))


def test_a_line_search_reports_the_loss_itself():
    made, x = toy(3, 3), searched()[0][0].search.x
    loss = jax.jit(made.loss)
    direction = np.linspace(-1.0, 0.7, x.size, dtype=np.float32)
    line = jax.jit(lambda *args: search.line_search(made.loss, *args))
    move = line(x, loss(x, made.data), direction, jnp.float32(0.2), made.data)
    there = loss(x + np.asarray(move.distance) * direction, made.data)
    assert float(move.loss) == pytest.approx(float(there), rel=1e-5)


def test_progress_is_told_losses_and_evaluations():
    states, said = searched()
    starts, first, second = said[:5], said[5:15], said[15:]
    assert [args[:2] for args in starts] == [(i, 5) for i in range(1, 6)]
    assert starts[1][2] == f"p = 2: loss {states[0].losses[1]:.4g}"
    for state, lines in zip(states[1:], (first, second), strict=True):
        assert [args[:2] for args in lines] == [(i, 10) for i in range(1, 11)]
        matches = [re.fullmatch(r"loss (\S+) after (\d+) evaluations", args[2]) for args in lines]
        losses, evaluations = np.array([match.groups() for match in matches], float).T
        assert (np.diff(losses) <= 0.0).all()
        assert (np.diff(evaluations) >= 3).all()
        assert (np.diff(evaluations) <= 8).all()
        # A joint direction follows.
        assert losses[-1] >= float(f"{state.search.loss:.4g}")
        assert 0 <= state.search.evaluations - evaluations[-1] <= 9
    assert states[-1].cost == 5 + states[-1].search.evaluations


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def test_a_second_start_is_the_same_to_the_bit():
    again = lapq.begin(toy(3, 3), ps=(2.0, 3.0, 4.0))
    assert_equal_trees(again, searched()[0][0])


def test_a_run_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    states, _ = searched()
    leaves, structure = jax.tree.flatten(states[1])
    np.savez(tmp_path / "state.npz", *leaves)
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        restored = jax.tree.unflatten(structure, [file[name] for name in file.files])
    seen, options = [], {"weight_bits": 3, "act_bits": 3, "edge_bits": None, "rough": 0}
    qtree, info = lapq.quantize(
        mlp, trained(), BATCHES, **options, sweeps=2, state=restored, on_sweep=seen.append
    )
    assert_equal_trees(seen, states[2:])
    assert_equal_trees(info.state, states[2])
    assert_equal_trees(qtree, toy(3, 3).tree(states[2].best))

    best = states[2].best
    assert info.held_out == states[2].held_out
    assert info.loss == pytest.approx(divergence(qtree, SEARCHED), rel=1e-4)
    assert info.p == states[0].ps[np.argmin(states[0].losses)]
    assert info.cost == states[2].cost
    assert [row.name for row in info.rows] == NAMES
    np.testing.assert_allclose([row.clip for row in info.rows], np.exp(best), rtol=1e-6)
    assert all(0.0 < row.clip < 3 * row.widest for row in info.rows)
    assert all(0.0 < row.start <= row.widest for row in info.rows)
    assert {row.bits for row in info.rows} == {3}


def compilations():
    """Grows with each function that is compiled, until the listener is taken away."""
    seen = []

    def listener(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    return seen, lambda: jax.monitoring.unregister_event_duration_listener(listener)


def test_other_widths_and_clips_compile_nothing_and_curvature_grows_as_bits_go():
    first, steps = toy(3, 3), (0.2, 0.3, 0.4)
    start, loss = jax.jit(first.start), jax.jit(first.loss)
    loss(start(jnp.float32(2.0), first.data), first.data)
    problems = [toy(8, bits) for bits in (6, 4, 2)]
    landscape.hessian(first.loss, first.widest, first.data, width=steps)
    data = np.array([name.startswith("data") for name in first.names])
    compiled, stop = compilations()
    traces = []
    for made in problems:
        clips = start(jnp.float32(2.0), made.data)
        found = loss(clips, made.data)
        hessian, _ = landscape.hessian(first.loss, clips, made.data, width=steps)
        traces.append(np.diagonal(hessian)[data].sum())
    stop()
    assert not compiled
    assert float(found) == pytest.approx(divergence(problems[-1].tree(clips), SEARCHED), rel=1e-4)
    assert 0.0 < 3 * traces[0] < traces[1] < traces[2] / 3


# Small models.


def pair(params, x):
    return jnp.maximum(x @ params["a"], 0.0) @ params["b"]


PAIR = {"a": normal(1, 6, 8), "b": normal(2, 8, 5) + 0.2}
SMALL = [np.float32(np.random.default_rng(i).gamma(1.0, 1.0, (40, 6)) - 0.5) for i in range(5)]
FREE = {"edge_bits": None, "distance": distortion.mse}


def deviation(apply_fn, params, qtree, batches):
    """Mean squared difference of the outputs."""
    run = jax.jit(sites.quantized(apply_fn))
    pairs = [(run(qtree, x), apply_fn(params, x)) for x in batches]
    return np.mean([np.mean(np.square(np.subtract(*map(np.float64, pair)))) for pair in pairs])


def started(made, p):
    """Clips of phase 1 by name."""
    theta = jax.jit(made.start)(jnp.float32(p), made.data)
    return theta, dict(zip(made.names, np.exp(np.asarray(theta, np.float64)), strict=True))


def test_each_clip_is_for_what_the_quantized_layers_before_it_make():
    made = lapq.problem(pair, PAIR, SMALL, weight_bits=2, act_bits=2, **FREE)
    theta, clips = started(made, 3.0)
    x, a, b = (np.asarray(v, np.float64) for v in (SMALL[0], PAIR["a"], PAIR["b"]))
    rounded = by_hand(a, 2, clips["weights of a"])
    rounded += a.mean(0) - rounded.mean(0)
    hidden = np.maximum(by_hand(x, 2, clips["data of a"]) @ rounded, 0.0)
    for name, values, kind in (
        ("data of a", x, "integer"),
        ("weights of a", a, "integer"),
        ("data of b", hidden, "one-sided"),
        ("weights of b", b, "integer"),
    ):
        _, errors, tried = by_scan(values, 2, 3.0, kind)
        assert np.interp(clips[name], tried, errors) <= 1.05 * errors.min(), name
    of_floats, *_ = by_scan(np.maximum(x @ a, 0.0), 2, 3.0, "one-sided")
    assert abs(clips["data of b"] / of_floats - 1.0) > 0.1
    found = float(jax.jit(made.loss)(theta, made.data))
    assert found == pytest.approx(deviation(pair, PAIR, made.tree(theta), SMALL[:4]), rel=1e-4)


def test_channels_clip_the_same_share_of_their_reach():
    options = {"per_channel": True, "grid": "even", "correct": "none", "skip": "b", **FREE}
    uneven = {"a": PAIR["a"] * 4.0 ** jnp.arange(8.0)[None], "b": PAIR["b"]}
    made = lapq.problem(pair, uneven, SMALL, act_bits=None, **options)
    assert made.names == ("weights of a",)
    theta, clips = started(made, 2.0)
    w = np.asarray(uneven["a"], np.float64)
    reach = np.abs(w).max(0)
    assert np.exp(made.widest) == pytest.approx([reach.max()], rel=1e-6)
    share = clips["weights of a"] / reach.max()
    _, errors, tried = by_scan(w / reach, 4, 2.0, "even")
    assert np.interp(share, tried, errors) <= 1.05 * errors.min()  # as above, by bins
    found = dequantize_array(made.tree(theta)["a"])
    expected = [by_hand(column, 4, share * r, "even") for column, r in zip(w.T, reach, strict=True)]
    np.testing.assert_allclose(found.T, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"weight_bits": None}, {"weight_bits": {"b": 3, "": None}, "act_bits": {"a": 5, "": None}}],
    ids=["data only", "weights of one and data of the other"],
)
def test_weights_or_data_may_stay_float(options):
    made = lapq.problem(pair, PAIR, SMALL, **options, **FREE)
    theta = made.widest - jnp.linspace(0.1, 0.3, made.widest.size)
    qtree = made.tree(theta)
    for name in "ab":
        leaf = qtree[name]
        assert isinstance(leaf, QTensor) == (f"weights of {name}" in made.names)
        assert (leaf.acts != ()) == (f"data of {name}" in made.names)
        if isinstance(leaf, FakeQuantTensor):
            assert leaf.qparams is None
            np.testing.assert_array_equal(dequantize_array(leaf), PAIR[name])
    found = float(jax.jit(made.loss)(theta, made.data))
    assert found == pytest.approx(deviation(pair, PAIR, qtree, SMALL[:4]), rel=1e-4)


def test_half_precision_stays_half_precision():
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), PAIR)
    batches = [jnp.asarray(x, jnp.bfloat16) for x in SMALL]
    made = lapq.problem(pair, params, batches, weight_bits=3, act_bits=3, **FREE)
    theta = made.widest - 0.3
    qtree = made.tree(theta)
    assert {leaf.dtype for leaf in qtree.values()} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(sites.quantized(pair), qtree, batches[0]).dtype == jnp.bfloat16
    found = jax.jit(made.loss)(theta, made.data)
    assert found.dtype == theta.dtype == jnp.float32
    # Codes are multiplied exactly, rounded floats to eight bits.
    assert float(found) == pytest.approx(deviation(pair, params, qtree, batches[:4]), rel=0.05)


def test_levels_without_zero_are_multiplied_as_integers():
    made = lapq.problem(pair, PAIR, SMALL, grid="even", correct="none", **FREE)
    theta = made.widest - 0.3
    qtree = made.tree(theta)
    for leaf in qtree.values():
        assert (leaf.qparams.zero_point == -0.5).all()
        assert leaf.codes.dtype == jnp.int8
    shown = str(jax.make_jaxpr(sites.quantized(pair))(qtree, SMALL[0]))
    assert shown.count("preferred_element_type=int32") == 2
    found = float(jax.jit(made.loss)(theta, made.data))
    assert found == pytest.approx(deviation(pair, PAIR, qtree, SMALL[:4]), rel=1e-4)


def test_what_is_read_twice_has_one_clip():
    def gated(params, x):
        return jnp.tanh(x @ params["a"]) * (x @ params["b"]) @ params["c"]

    params = {"a": PAIR["a"], "b": normal(5, 6, 8), "c": normal(6, 8, 3)}
    made = lapq.problem(gated, params, SMALL, **FREE)
    assert made.names == ("data of a", "weights of a", "weights of b", "data of c", "weights of c")
    qtree = made.tree(made.widest - 0.2)
    assert_equal_trees(qtree["a"].acts, qtree["b"].acts)
    np.testing.assert_array_equal(
        qtree["a"].acts[0].scale.ravel(), jnp.exp(made.widest[:1] - 0.2) / 8
    )


def test_layers_of_a_scanned_leaf_are_layers():
    layers = normal(3, 2, 6, 6) / 2

    def scanned(params, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["layers"])[0]

    def unrolled(params, x):
        for i in range(2):
            x = jnp.tanh(x @ params[f"layers[{i}]"])
        return x

    apart = {f"layers[{i}]": layers[i] for i in range(2)}
    options = {"weight_bits": {r"\[1\]": 2, "": 3}, "act_bits": {r"\[0\]": 3, "": 2}, **FREE}
    stacked = lapq.problem(scanned, {"layers": layers}, SMALL, **options)
    twin = lapq.problem(unrolled, apart, SMALL, **options)
    theta, clips = started(stacked, 2.5)
    _, expected = started(twin, 2.5)
    assert clips == pytest.approx(expected, rel=1e-4)
    bits = [dict(zip(made.names, made.bits, strict=True)) for made in (stacked, twin)]
    assert bits[0] == bits[1]
    assert [bits[0][f"weights of layers[{i}]"] for i in range(2)] == [3, 2]
    found = float(jax.jit(stacked.loss)(theta, stacked.data))
    outside = deviation(scanned, {"layers": layers}, stacked.tree(theta), SMALL[:4])
    assert found == pytest.approx(outside, rel=1e-4)


def test_the_published_choice_of_layers():
    """Inner convolutions; what follows each activation but the first and the last."""

    def conv(x, w):
        return lax.conv_general_dilated(x, w, (1, 1), "SAME")

    def net(p, x):
        x = jnp.maximum(conv(x, p["first"]), 0.0)
        y = jnp.maximum(conv(x, p["second"]), 0.0)
        x = jnp.maximum(conv(y, p["third"]) + conv(x, p["side"]), 0.0)
        x = jnp.maximum(conv(x, p["last"]), 0.0)
        return x.mean((2, 3)) @ p["dense"]

    params = {
        name: normal(i, 3, 3, 3, 3)
        for i, name in enumerate(["first", "second", "third", "side", "last"])
    }
    params["dense"] = normal(7, 3, 4)
    x = np.float32(np.random.default_rng(3).normal(size=(10, 3, 5, 5)))
    options = lapq.published(sites.find_sites(net, params, x), weight_bits=3, act_bits=2)
    made = lapq.problem(net, params, x, **options)
    assert dict(zip(made.names, made.bits, strict=True)) == {
        "weights of second": 3,
        "data of third": 2,
        "weights of third": 3,
        "weights of side": 3,
        "data of last": 2,
    }
    qtree = made.tree(made.widest - 0.1)
    assert qtree["first"] is params["first"]
    assert qtree["dense"] is params["dense"]
    assert isinstance(qtree["last"], FakeQuantTensor)
    assert float(qtree["second"].qparams.qmax[0, 0, 0, 0]) == 3
    floats = lapq.published(made.sites, weight_bits=None)
    assert lapq.problem(net, params, x, **floats).names == ("data of third", "data of last")


def linear(params, batch):
    return batch["x"] @ params["w"] + params["b"]


def labelled(n, seed):
    x, label = examples(n, seed)
    return {"x": x, "label": label}


LINEAR = {"w": normal(4, 8, 4), "b": normal(5, 1, 4)}
RAGGED = [labelled(n, i) for i, n in enumerate([48, 48, 48, 20, 48, 48])]  # the fifth is held out


def likelihood(outputs, batch):
    return cross_entropy(outputs, batch["label"])


@pytest.mark.slow
def test_labels_may_come_with_the_data_in_batches_of_any_size():
    seen = []
    qtree, info = lapq.quantize(
        linear,
        LINEAR,
        RAGGED,
        loss_fn=likelihood,
        weight_bits=2,
        act_bits=2,
        edge_bits=None,
        ps=(2.0, 3.0),
        rough=1,
        sweeps=1,
        method="coordinate",
        on_sweep=seen.append,
    )
    run = jax.jit(sites.quantized(linear))
    losses = [float(likelihood(run(qtree, batch), batch)) for batch in RAGGED]
    assert info.held_out == pytest.approx(losses.pop(4), rel=1e-4)
    assert info.loss == pytest.approx(np.average(losses, weights=[48, 48, 48, 20, 48]), rel=1e-4)
    assert info.loss <= info.state.losses.min()
    assert info.held_out <= info.state.trace[0, 2]
    assert [int(state.sweeps) for state in seen] == [1, 2]
    np.testing.assert_array_equal(seen[-1].search.directions, np.eye(2))
    # The rough sweep sees the first of four batches, and the smaller one.
    share, rough = (48 + 20) / (4 * 48 + 20), float(seen[0].search.evaluations)
    assert seen[0].cost == pytest.approx(4 + share * rough + 1)
    assert seen[1].cost == seen[0].cost + seen[1].search.evaluations


def test_nothing_but_zeros_at_a_site_and_in_a_leaf_is_exact():
    """Although the grid has no zero: the mean is restored."""
    params = {"a": jnp.zeros((6, 5)), "b": PAIR["a"][:, :5], "c": normal(8, 6, 5)}

    def net(p, x):
        return x @ p["a"] + x @ p["b"] + (0.0 * x) @ p["c"]

    made = lapq.problem(net, params, SMALL, grid="even", **FREE)
    assert np.isfinite(made.widest).all()
    qtree = made.tree(made.widest - 0.2)
    np.testing.assert_allclose(dequantize_array(qtree["a"]), 0.0, atol=1e-7)
    out = jax.jit(sites.quantized(net))(qtree, SMALL[0])
    x = fake_quant(jnp.asarray(SMALL[0]), qtree["b"].acts[0])
    np.testing.assert_allclose(out, x @ dequantize_array(qtree["b"]), atol=1e-5)


def test_few_examples_are_searched_on_and_accepted_on():
    made = lapq.problem(linear, LINEAR, jax.tree.map(lambda a: a[:3], RAGGED[0]))
    assert_equal_trees(made.data, made.held_out)
    assert made.data.batches[0]["x"].shape == (3, 1, 8)


def test_one_batch_is_cut_and_a_fifth_held_out():
    made = lapq.problem(linear, LINEAR, RAGGED[0], batch_size=20)
    searched, held_out = made.data.batches[0]["x"], made.held_out.batches[0]["x"]
    assert (searched.shape, held_out.shape) == ((4, 9, 8), (1, 9, 8))
    found = {tuple(row) for x in (searched, held_out) for row in np.reshape(x, (-1, 8)).tolist()}
    assert len(found) == 45  # none twice; three are left over
    assert found <= {tuple(row) for row in RAGGED[0]["x"].tolist()}


def fail(**options):
    return lapq.quantize(linear, LINEAR, options.pop("calib", RAGGED[0]), ps=(2.0,), **options)


BAD = {
    "method": ({"method": "brent"}, "method: must be one of powell, coordinate, none, not 'brent'"),
    "grid": ({"grid": "odd"}, "grid: must be one of integer, even, not 'odd'"),
    "correct": ({"correct": "bias"}, "correct: must be one of mean, norm, none, not 'bias'"),
    "width": ({"weight_bits": 17}, "'w' has 17, not a number from 1 to 16"),
    "no bit": ({"act_bits": 0}, "'w' has 0, not a number from 1 to 16"),
    "all skipped": ({"skip": "w"}, "no site is to be quantized; find_sites lists"),
    "all float": ({"weight_bits": None, "act_bits": None}, "no site is to be quantized"),
    "no data": ({"calib": []}, "calib: no batch; give at least one example"),
    "empty": ({"calib": {"x": np.ones((0, 8))}}, "share a leading axis of examples"),
    "batch size": ({"batch_size": 0}, "batch_size: must be at least 1, not 0"),
    "no labels": (
        {"calib": {"x": RAGGED[0]["x"]}, "loss_fn": likelihood},
        "if it needs labels, calib must hold them: .*label",
    ),
    "not a number": (
        {"loss_fn": lambda out, batch: jnp.nan * out.sum(), "act_bits": None},
        r"loss_fn: is \[nan.* at the starts p = \[inf, 2.0\]",
    ),
    "constant": (
        {"loss_fn": lambda out, batch: jnp.float32(3.5), "act_bits": None},
        "is 3.5 whatever the clips",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        fail(**options)


def test_a_loss_for_each_example_is_refused():
    with pytest.raises(ValueError, match=r"returns shape \(9,\)"):
        lapq.problem(linear, LINEAR, RAGGED[0], loss_fn=lambda out, batch: out[:, 0])


def test_outputs_that_are_no_logits_need_a_distance():
    with pytest.raises(
        ValueError, match=r"distance: the default compares .* shapes \[\(40,\)\]; give"
    ):
        lapq.problem(lambda p, x: (x @ p["a"]).sum(1), PAIR, SMALL)


def test_the_state_of_another_run_is_refused():
    for state in (searched()[0][0], searched()[0][0]._replace(best=np.zeros(2, np.float32))):
        with pytest.raises(ValueError, match="state: its best point has another loss here"):
            fail(state=state)


def test_weights_that_are_not_finite_are_named():
    with pytest.raises(ValueError, match="params: 'w' holds NaN or infinity"):
        lapq.problem(linear, LINEAR | {"w": LINEAR["w"].at[1, 2].set(jnp.inf)}, RAGGED)


def test_a_branch_that_no_data_takes_does_not_clip_what_another_reads():
    def branching(params, x):
        return lax.cond(x.sum() < 1e6, lambda: x @ params["taken"], lambda: x @ params["rare"])

    params = {"taken": PAIR["a"], "rare": -PAIR["a"]}
    made = lapq.problem(branching, params, SMALL, **FREE)
    _, clips = started(made, 3.0)
    _, errors, tried = by_scan(SMALL[0], 4, 3.0)
    name = next(name for name in ("data of taken", "data of rare") if name in made.names)
    assert np.interp(clips[name], tried, errors) <= 1.1 * errors.min()
