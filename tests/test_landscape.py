"""Curvature, coupling and separability against formulas, and two matrices against an integral."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from lnq import landscape

KEY = jax.random.key(3)
every_path = pytest.mark.parametrize("parallel", [None, 4, 100], ids=["single", "some", "all"])

AT = [1.3, -0.7, 2.1]


def waves(x):
    a, b, c = x
    return jnp.sin(0.5 * a + 0.25 * b) + b**2 * c / 4 + 0.5 * jnp.exp(0.2 * c)


def waves_by_hand(a, b, c):
    s, k, e = math.sin(0.5 * a + 0.25 * b), math.cos(0.5 * a + 0.25 * b), math.exp(0.2 * c)
    H = [[-s / 4, -s / 8, 0], [-s / 8, c / 2 - s / 16, b / 2], [0, b / 2, e / 50]]
    return np.array(H), np.array([k / 2, k / 4 + b * c / 2, b**2 / 4 + e / 10])


# --- Hessian --------------------------------------------------------------------------------


@every_path
def test_derivatives_of_an_analytic_function(parallel):
    H, g = landscape.hessian(waves, AT, parallel=parallel)
    expected = waves_by_hand(*AT)
    np.testing.assert_allclose(H, expected[0], atol=1e-3)
    np.testing.assert_allclose(g, expected[1], atol=1e-3)
    np.testing.assert_array_equal(H, H.T)


def test_permuting_the_variables_permutes_the_derivatives():
    order = np.array([2, 0, 1])
    back = np.argsort(order)
    H, g = landscape.hessian(lambda x: waves(x[back]), np.array(AT)[order])
    expected = waves_by_hand(*AT)
    np.testing.assert_allclose(H, expected[0][np.ix_(order, order)], atol=1e-3)
    np.testing.assert_allclose(g, expected[1][order], atol=1e-3)


def test_widths_are_averaged():
    # Central differences of x^4 are 12 x² + 2 h² and 4 x³ + 4 x h²; here the mean of h² is 0.07.
    H, g = landscape.hessian(lambda x: x[0] ** 4, [1.5], width=(0.1, 0.2, 0.4))
    np.testing.assert_allclose([H[0, 0], g[0]], [27.14, 13.92], rtol=1e-4)


def test_the_trend_is_measured_across_jumps():
    def steps(x):  # a thousand jumps to a unit: no derivative anywhere, and x² from afar
        return jnp.sum(jnp.round(500.0 * x**2) / 500.0)

    H, _ = landscape.hessian(steps, [0.9, -1.1], width=(0.3, 0.35, 0.4))
    np.testing.assert_allclose(H, 2 * np.eye(2), atol=0.05)


def test_evaluations_are_as_documented_and_compiled_once():
    ran, traced = [], []

    def f(x, data):
        traced.append(1)
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum((x - data) ** 2)

    for data in (1.0, 2.0):
        landscape.hessian(f, [data, 3.0, 4.0], jnp.full(3, data))
    jax.effects_barrier()
    assert (len(ran), len(traced)) == (2 * 3 * (1 + 2 * 3**2), 1)
    ran.clear()
    landscape.separability(f, jnp.zeros(3), jnp.ones(3), KEY, jnp.ones(3), points=11)
    jax.effects_barrier()
    assert len(ran) == 11 * (3 + 2)


# --- its summaries --------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.0, 2.0, 2.5])
def test_curvature_at_the_minimum_of_a_paraboloid_is_the_determinant(exponent):
    A = jnp.array([[2.0, 0.3, -0.2], [0.3, 1.0, 0.1], [-0.2, 0.1, 0.5]])
    middle = jnp.array([0.4, -1.2, 2.0])
    H, g = landscape.hessian(lambda x, a: (x - middle) @ a @ (x - middle) / 2, middle, A)
    curvature = landscape.gaussian_curvature(H, g, exponent)
    # 2 (0.5 - 0.01) - 0.3 (0.15 + 0.02) - 0.2 (0.03 + 0.2)
    np.testing.assert_allclose(curvature.sign * jnp.exp(curvature.log), 0.883, rtol=1e-3)


def test_a_sphere_is_curved_alike_everywhere():
    def cap(x):
        return -jnp.sqrt(4.0 - jnp.sum(x**2))

    H, g = landscape.hessian(cap, [0.5, -0.3, 0.8])
    curvature = landscape.gaussian_curvature(H, g, exponent=(3 + 2) / 2)
    assert curvature.sign == 1
    np.testing.assert_allclose(curvature.log, -3 * math.log(2), atol=0.02)  # 1 / radius³


def test_logarithms_stay_finite_where_determinants_do_not():
    H, g = 0.01 * jnp.eye(33), jnp.zeros(33)
    assert np.linalg.det(np.asarray(H)) == 0  # in float32
    curvature = jax.jit(landscape.gaussian_curvature)(H, g)
    for sign, log in [curvature, landscape.coupling(H)[1:3]]:
        assert sign == 1
        np.testing.assert_allclose(log, 33 * math.log(0.01), rtol=1e-5)


PUBLISHED = {
    "L1-L2": ([[1.8627, 0.8969], [0.8969, 1.9392]], 0.4719),
    "L14-L15": ([[0.3132, 0.3986], [0.3986, 2.1945]], 0.4808),
    "L12-L13": ([[0.5543, 0.0928], [0.0928, 1.2329]], 0.1123),
    "L1-L15": ([[1.4588, -0.0009], [-0.0009, 1.6736]], 0.0006),
}


@pytest.mark.parametrize(("block", "coupling"), PUBLISHED.values(), ids=PUBLISHED)
def test_coupling_of_the_blocks_in_the_papers_figures(block, coupling):
    (a, b), (_, d) = block
    found = landscape.coupling(jnp.array(block))
    np.testing.assert_allclose([found.largest, found.by_distance[0]], coupling, atol=5e-5)
    np.testing.assert_allclose(found.sign * jnp.exp(found.log), a * d - b**2, rtol=1e-5)
    np.testing.assert_allclose(found.off_diagonal, 2**0.5 * abs(b) / math.hypot(a, d), rtol=1e-5)


def test_coupling_by_hand():
    H = jnp.array([[4.0, 1.0, -0.6], [1.0, 1.0, 0.1], [-0.6, 0.1, 0.25]])
    found = landscape.coupling(H)
    np.testing.assert_allclose(found.by_distance, [(1 / 2 + 1 / 5) / 2, 3 / 5], rtol=1e-6)
    assert (found.trace, found.largest) == (5.25, 0.6)
    np.testing.assert_allclose(found.condition, np.linalg.cond(H), rtol=1e-4)


def test_no_coupling_is_made_up_where_the_diagonal_is_not_positive():
    H = jnp.array([[4.0, 9.0, 1.0], [9.0, -1.0, 9.0], [1.0, 9.0, 1.0]])
    found = landscape.coupling(H)
    np.testing.assert_array_equal(found.by_distance, [np.nan, 0.5])
    assert found.largest == 0.5
    assert landscape.coupling(-jnp.eye(3)).largest == 0


# --- separability ---------------------------------------------------------------------------


def unit_box(n):
    return jnp.zeros(n), jnp.ones(n)


ADDITIVE = {
    "squares": lambda x: jnp.sum(x**2),
    "others": lambda x: jnp.sum(jnp.exp(x)) + jnp.abs(x[1]),
}


@pytest.mark.parametrize("f", ADDITIVE.values(), ids=ADDITIVE)
def test_a_sum_of_functions_of_one_variable_has_no_interaction(f):
    low, high = jnp.arange(4.0) - 3.0, jnp.arange(4.0) + 1.0
    found = landscape.separability(f, low, high, KEY)
    rounding = 2.0**-24 * float(f(high))  # of a float32 is no sum over variables
    assert abs(found.interaction) < 3 * found.error + rounding**2
    assert abs(found.share) < 1e-6


@every_path
def test_interaction_of_a_squared_sum(parallel):
    def f(x):
        return jnp.sum(x) ** 2

    found = landscape.separability(f, *unit_box(10), KEY, points=3000, parallel=parallel)
    assert abs(found.interaction - 1.25) < 3 * found.error  # n (n - 1) / 72
    assert found.error < 0.1 * 1.25  # 0.6 with no more than the mean taken out


def test_interaction_of_rosenbrocks_valley():
    def f(x, a):
        return jnp.sum(a * (x[1:] - x[:-1] ** 2) ** 2 + (1.0 - x[:-1]) ** 2)

    box = jnp.full(5, -2.0), jnp.full(5, 2.0)
    found = landscape.separability(f, *box, KEY, jnp.float32(100.0), points=4000)
    pair = 200**2 * (16 / 5 - 16 / 9) * 4 / 3  # the cross term: Var x² Var x
    assert round(4 * pair) == 303407
    assert abs(found.interaction - 4 * pair) < 4 * found.error
    assert found.error < 0.1 * found.interaction


def test_share_is_of_the_variance_whatever_the_unit():
    def f(x, unit):
        return unit * (7.0 + x[0] + x[1] + 3.0 * x[0] * x[1])  # 1/3 + 1/3, and 9/9 jointly

    box = -jnp.ones(2), jnp.ones(2)
    one, ten = (
        landscape.separability(f, *box, KEY, jnp.float32(unit), points=4000) for unit in (1, 10)
    )
    assert abs(one.interaction - 1.0) < 3 * one.error
    np.testing.assert_allclose(one.share, 0.6, atol=0.05)
    np.testing.assert_allclose(ten, np.multiply(one, [100, 100, 1]), rtol=1e-4)


def test_standard_error_is_the_spread_over_keys():
    def f(x):
        return jnp.exp(x[0]) + x[0] * x[1]

    keys = jax.random.split(KEY, 64)
    runs = [landscape.separability(f, *unit_box(2), key, points=50) for key in keys]
    values, errors, _ = np.array(runs).T
    np.testing.assert_allclose(values.std(), errors.mean(), rtol=0.25)  # 64 draws: 9 % each
    assert abs(values.mean() - 1 / 144) < 3 * errors.mean() / 8


def test_constant_loss_has_nothing_to_share():
    constant = landscape.separability(lambda x: 2.0 + 0.0 * x[0], *unit_box(2), KEY, points=6)
    assert constant == (0.0, 0.0, 0.0)


# --- surfaces -------------------------------------------------------------------------------


@every_path
def test_surface_holds_the_other_variables(parallel):
    def f(x):
        return x @ jnp.array([1.0, 10.0, 100.0])

    x = jnp.array([1.0, 2.0, 3.0])
    offsets, losses = landscape.surface(f, x, 2, -3, span=2.0, points=3, parallel=parallel)
    np.testing.assert_array_equal(offsets, [-2, 0, 2])
    np.testing.assert_allclose(losses, 321 + np.add.outer([-200, 0, 200], [-2, 0, 2]))


def test_surface_may_be_infinite_away_from_the_middle():
    _, losses = landscape.surface(lambda x: jnp.log(x[0]) + x[1], [0.4, 0.0], 0, 1)
    assert np.isfinite(losses[7]).all()
    assert not np.isfinite(losses[0]).any()


# Two matrices, their product, and what is left of it after rounding both: section 3 of the paper.
# For entries of N(0, 1), Q rounded to a clip exp(u), P = E Q² and C = E xQ, the expected error of
# the product, over its mean square, is P₁ P₂ - 2 C₁ C₂ + 1. So where both clips minimise the
# error of their own tensor (then P = C) the product has its minimum too, at any width. What
# couples them is the way there: next to a clip that is wrong, the other's best is elsewhere.
GRID = {"span": 1.015, "points": 30, "parallel": 32}
MIDDLE, UNCLIPPED = -0.805, 26  # the clip at that offset is 1, the largest magnitude


def product_error(x, a, b, levels):
    def rounded(x, clip):  # the paper's even grid: -clip .. clip in equal steps
        step = 2 * clip / (levels - 1)
        return jnp.round(jnp.clip((x + clip) / step, 0, levels - 1)) * step - clip

    clip = jnp.exp(x)
    error = rounded(a, clip[0]) @ rounded(b, clip[1]) - a @ b
    return jnp.mean(error**2) / jnp.mean((a @ b) ** 2)


def matrices():
    a, b = np.random.default_rng(0).normal(size=(2, 100, 100))
    return a / np.abs(a).max(), b / np.abs(b).max()


def normal_moments(u, bits):
    step = 2 * math.exp(u) / (2**bits - 1)
    edges = [*(step * np.arange(2 ** (bits - 1))), np.inf]
    below = np.array([0.5 * math.erf(t / 2**0.5) for t in edges])
    density = np.exp(-np.square(edges) / 2) / (2 * math.pi) ** 0.5
    level = step * (np.arange(2 ** (bits - 1)) + 0.5)
    return 2 * np.sum(level**2 * np.diff(below)), -2 * np.sum(level * np.diff(density))


def expected_error(u, v, bits):
    (P1, C1), (P2, C2) = normal_moments(u, bits), normal_moments(v, bits)
    return P1 * P2 - 2 * C1 * C2 + 1


@pytest.fixture(scope="module", params=[2, 4, 8], ids="{} bits".format)
def toy(request):
    a, b = matrices()
    data = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(2**request.param)
    middle = jnp.full(2, MIDDLE)
    return request.param, *landscape.surface(product_error, middle, 0, 1, *data, **GRID)


def test_surface_of_a_product_is_the_integral(toy):
    bits, offsets, losses = toy
    us, vs = (MIDDLE + offsets - math.log(m.std()) for m in matrices())
    expected = np.array([[expected_error(u, v, bits) for v in vs] for u in us])
    np.testing.assert_allclose(losses, expected, atol=0.04 * expected.max())
    best, best_expected = (np.unravel_index(x.argmin(), x.shape) for x in (losses, expected))
    assert np.abs(np.subtract(best, best_expected)).max() <= 1


def test_clips_chosen_one_by_one_are_the_best_pair_only_at_many_bits(toy):
    bits, offsets, losses = toy
    assert offsets[UNCLIPPED] == pytest.approx(-MIDDLE)
    best = np.unravel_index(losses.argmin(), losses.shape)
    alone = losses[:, UNCLIPPED].argmin(), losses[UNCLIPPED].argmin()  # the other left unclipped
    away = np.abs(np.subtract(best, alone))
    if bits == 2:
        assert away.min() > 5
        assert losses[alone] > 2 * losses.min()
    if bits == 8:
        assert away.max() <= 1


# Normalised coupling of the two clips at the best pair, from second derivatives of the integral.
COUPLED = {2: (1.494, 0.456), 4: (2.514, 0.085), 8: (3.922, 0.001)}


@pytest.mark.parametrize("bits", COUPLED)
def test_coupling_of_a_product_grows_as_bits_go(bits):
    best, expected = COUPLED[bits]
    u, h = math.log(best), 0.01
    same = expected_error(u + h, u, bits) + expected_error(u - h, u, bits)
    diagonal = same - 2 * expected_error(u, u, bits)
    across = expected_error(u + h, u + h, bits) + expected_error(u - h, u - h, bits)
    mixed = (across - 2 * expected_error(u + h, u - h, bits)) / 4
    assert mixed / diagonal == pytest.approx(expected, abs=2e-3)

    a, b = matrices()
    data = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(2**bits)
    x = jnp.asarray(np.log([best * a.std(), best * b.std()]), jnp.float32)
    H, _ = landscape.hessian(product_error, x, *data, width=(0.2, 0.3, 0.4))
    # 10 000 entries have an error of their own, and wide steps lose a little of the peak.
    assert landscape.coupling(H).largest == pytest.approx(expected, rel=0.25, abs=0.02)


# --- drawings -------------------------------------------------------------------------------


def axes():
    return Figure().subplots()


def line(ax, index):
    return np.transpose(ax.lines[index].get_data())


def test_drawn_parabola_is_that_of_the_window():
    ps = np.arange(1.0, 6.0)
    losses = (ps - 2.7) ** 2 + 0.5
    losses[-1] = 100.0  # outside
    ax = axes()
    assert landscape.draw_p(ax, jnp.asarray(ps), losses, best=2.7, window=(1.0, 4.5)) is ax
    np.testing.assert_allclose(line(ax, 0), np.transpose([ps, losses]), rtol=1e-6)
    p, curve = line(ax, 1).T
    np.testing.assert_allclose(curve, (p - 2.7) ** 2 + 0.5, atol=1e-9)
    assert (p.min(), p.max()) == (1.0, 4.5)
    assert set(line(ax, 2)[:, 0]) == {2.7}


def test_no_parabola_through_two_points_and_no_mark_unless_given():
    assert len(landscape.draw_p(axes(), [1, 2, 3], [1, np.inf, 3]).lines) == 1


def test_contours_lie_where_the_loss_has_their_level():
    offsets = np.linspace(-1, 1, 41)
    u, v = np.meshgrid(offsets - 0.3, offsets, indexing="ij")
    ax = axes()
    assert landscape.draw_surface(ax, offsets, u**2 + 4 * v**2) is ax
    (contours,) = ax.collections
    ratios = contours.levels[1:] / contours.levels[:-1]
    np.testing.assert_allclose(ratios, 10**0.25)
    drawn = [path.vertices for path in contours.get_paths()]
    for level, vertices in zip(contours.levels, drawn, strict=True):
        x, y = vertices.T
        np.testing.assert_allclose((x - 0.3) ** 2 + 4 * y**2, level, atol=0.01)
    np.testing.assert_allclose(line(ax, 0), [[0, 0]])
    np.testing.assert_allclose(line(ax, 1), [[0.3, 0]], atol=1e-12)


@pytest.mark.parametrize("edge", [1.0, np.inf])
def test_flat_and_infinite_surfaces_can_be_drawn(edge):
    losses = np.ones((3, 3))
    losses[0] = edge
    assert not landscape.draw_surface(axes(), [-1, 0, 1], losses).collections


def test_trace_is_the_best_so_far():
    ax = axes()
    assert landscape.draw_trace(ax, [4, 8, 12, 16], [3.0, np.nan, 5.0, 1.0], start=4.0) is ax
    np.testing.assert_array_equal(line(ax, 0), [[0, 4], [4, 3], [8, 3], [12, 3], [16, 1]])


# --- errors ---------------------------------------------------------------------------------


def total(x):
    return jnp.sum(x)


def pole(x):
    return jnp.sum(jnp.log(x - 1.0))


def box(low, high, f=total, points=10):
    return landscape.separability(f, jnp.array(low), jnp.array(high), KEY, points=points)


PAIR = [1.0, 2.0]
BAD = {
    "integers": (lambda: landscape.hessian(total, [1, 2]), r"x: expected a float32.*int32\[2\]"),
    "a matrix": (lambda: landscape.surface(total, jnp.eye(2), 0, 1), r"x: .*float32\[2, 2\]"),
    "nothing": (lambda: landscape.hessian(total, jnp.zeros(0)), r"x: expected a float32 vector"),
    "half precision": (lambda: landscape.hessian(total, jnp.ones(2, "bfloat16")), "x: .*bfloat16"),
    "loss per variable": (lambda: landscape.hessian(lambda x: x, PAIR), r"f: .*float32\[2\]"),
    "two losses": (lambda: box([0.0], [1.0], lambda x: (x[0], x[0])), "f: expected a scalar"),
    "loss of half precision": (
        lambda: landscape.hessian(lambda x: total(x).astype("bfloat16"), PAIR),
        "f: .*float32, got bfloat16",
    ),
    "nan at x": (lambda: landscape.surface(pole, [0.5, 1.0], 0, 1), "x: the loss is not finite"),
    "nan near x": (lambda: landscape.hessian(pole, [1.04, 2.0]), "not finite within 0.05"),
    "nan in the box": (lambda: box([0.0], [2.0], pole), "low: the loss is not finite in the box"),
    "no width": (lambda: landscape.hessian(total, PAIR, width=(0.1, 0.0)), "width: .*positive"),
    "empty box": (lambda: box([0.0, 2.0], [1.0, 2.0]), "low: expected to lie below `high`"),
    "unequal corners": (lambda: box([0.0], [1.0, 2.0]), "low: expected to lie below `high`"),
    "matrix box": (lambda: box([[0.0]], [[1.0]]), "low: expected a float32 vector"),
    "few points": (lambda: box([0.0], [1.0], points=3), "points: expected more than 3"),
    "one variable": (lambda: landscape.surface(total, PAIR, 1, 1), "i, j: expected two places"),
    "one variable twice": (lambda: landscape.surface(total, PAIR, 1, -1), "got 1 and -1"),
    "beyond the end": (lambda: landscape.surface(total, PAIR, 0, 2), r"x \[2\], got 0 and 2"),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
