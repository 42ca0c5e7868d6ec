"""Line searches and sweeps against formulas, a twin in NumPy and SciPy, away from the origin."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from lnq import search

# One line.


@pytest.mark.parametrize(
    ("places", "middle"), [([1.0, 1.5, 4.0], 2.3), ([-3.0, -1.0, -0.5], -0.9), ([2.0, 3.0, 4.0], 0)]
)
def test_vertex_of_a_parabola_is_where_it_is_lowest(places, middle):
    places = jnp.array(places)
    np.testing.assert_allclose(
        search.vertex(places, 3.0 * (places - middle) ** 2 - 7.0), middle, atol=1e-5
    )


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 3.0], [1.0, 2.0, 1.0], [2.0, 2.0, 2.0], [np.inf, 1.0, np.inf]]
)
def test_without_a_lowest_point_the_vertex_is_the_middle(values):
    assert search.vertex(jnp.array([2.0, 2.5, 3.0]), jnp.array(values)) == 2.5


DIRECTION = np.array([0.5, -1.0, 0.25], np.float32)
X = np.array([2.0, 3.0, -1.0], np.float32)


def along(x, bowl, slope, wall, jump):
    """On the line from ``X`` along ``DIRECTION``: a parabola, its middle at ``bowl[1]``.

    Plus a slope; NaN beyond the wall; with jumps of a given size.
    """
    t = (x - X) @ DIRECTION / (DIRECTION @ DIRECTION)
    value = 5.0 + bowl[0] * (t - bowl[1]) ** 2 + slope * t
    value = jnp.where(jump > 0.0, jnp.round(value / jump) * jump, value)
    return jnp.where((t - wall[0]) * wall[1] > 1e-6, jnp.nan, value)


line = jax.jit(partial(search.line_search, along))


def line_from(width, middle=0.0, bend=0.0, slope=0.0, wall=(1.0, 0.0), jump=0.0):
    arrays = [jnp.asarray(a, jnp.float32) for a in ((bend, middle), slope, wall, jump)]
    at_x = along(jnp.asarray(X), *arrays)
    move = line(jnp.asarray(X), at_x, jnp.asarray(DIRECTION), jnp.float32(width), *arrays)
    there = along(jnp.asarray(X + move.distance * DIRECTION), *arrays)
    np.testing.assert_allclose(move.loss, there, rtol=1e-5)
    assert move.loss <= at_x
    assert 3 <= move.evaluations <= search.POINTS - 1
    return move


@pytest.mark.parametrize(
    ("middle", "width", "evaluations"),
    [
        (0.1, 0.3, 3),  # -w and w, then the vertex
        (-0.14, 0.3, 3),
        (0.0, 0.3, 3),
        (0.2, 0.3, 4),  # the lower end is still an end: on to 3 w
        (-0.5, 0.3, 4),
        (0.31, 0.1, 5),  # and to 7 w
        (-1.2, 0.2, 6),
        (0.3, 0.01, 8),
        (0.005, 0.8, 3),
    ],
)
def test_the_middle_of_a_parabola_is_found_exactly(middle, width, evaluations):
    move = line_from(width, middle, bend=3.0)
    assert move.distance == pytest.approx(middle, abs=2e-4)
    assert move.loss == pytest.approx(5.0, abs=1e-5)
    assert move.evaluations == evaluations


def test_evaluations_are_those_that_were_made():
    ran = []

    def seen(x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum((x - 2.5) ** 2)

    x = jnp.array([1.0, 3.0])
    move = search.line_search(seen, x, seen(x), jnp.array([1.0, 0.0]), jnp.float32(0.3))
    jax.effects_barrier()
    assert len(ran) == 1 + move.evaluations == 1 + 5


@pytest.mark.parametrize("where", [0.0, -0.4, 0.4])
def test_small_jumps_do_not_hide_the_trend(where):
    move = line_from(0.3, where, bend=1.0, jump=0.02)
    assert abs(move.distance - where) <= 0.15  # 0.02 is the rise at a distance of 0.14


def test_a_plateau_is_no_reason_to_go():
    assert line_from(0.3).distance == 0.0


@pytest.mark.parametrize("sign", [-1, 1])
def test_beyond_a_wall_of_nan_the_search_turns_round(sign):
    stopped = line_from(0.3, sign * 1.0, bend=1.0, wall=(sign * 0.1, sign))
    assert stopped.distance == 0.0  # all that lies that way is NaN, and the other way is up
    away = line_from(0.3, -sign * 0.2, bend=1.0, wall=(sign * 0.1, sign))
    assert away.distance * sign < 0.0


def test_a_slope_without_an_end_is_followed_only_so_far():
    assert 1.6 <= line_from(0.3, slope=-1.0).distance < 8.0
    assert line_from(0.8, slope=1.0).distance < 0.0


def test_no_line_ends_higher_than_it_began():
    @jax.jit
    @partial(jax.vmap, in_axes=(0, 0))
    def searched(waves, width):
        def loss(x):
            t = x @ jnp.array([1.0, 0.0])
            return jnp.sum(waves[0] * jnp.sin(waves[1] * t + waves[2])) + 0.1 * t**2

        x = jnp.array([1.5, -2.0])
        move = search.line_search(loss, x, loss(x), jnp.array([1.0, 0.5]), width)
        there = loss(x + move.distance * jnp.array([1.0, 0.5]))
        return loss(x), move, there

    rng = np.random.default_rng(2)
    waves = rng.normal(size=(300, 3, 4)) * np.array([1.0, 5.0, 3.0])[None, :, None]
    widths = np.exp(rng.uniform(np.log(0.01), np.log(0.8), 300))
    before, move, there = searched(jnp.asarray(waves, jnp.float32), jnp.asarray(widths, np.float32))
    assert (move.loss <= before).all()
    np.testing.assert_allclose(move.loss, there, atol=1e-4)
    assert (move.loss < before - 1e-3).mean() > 0.9


# Sweeps. Quadratics with couplings as they were measured at 2 bits: condition 20, diagonals apart
# by a factor of ten, the largest normalized coupling 0.4.


def coupled(n, seed, freedom=4):
    rng = np.random.default_rng(seed)
    spread = np.exp(rng.uniform(np.log(0.5), np.log(5.0), n))
    v = rng.normal(size=(n, freedom * n))
    v /= np.linalg.norm(v, axis=1, keepdims=True)
    middle = rng.normal(-2.0, 0.5, n)
    return v @ v.T * np.sqrt(np.outer(spread, spread)), middle, middle + rng.normal(0, 0.3, n)


def quadratic(x, hessian, middle):
    return 1.0 + (x - middle) @ hessian @ (x - middle) / 2.0


def sweep(hessian, middle, x, sweeps, **options):
    """States after each sweep, and the excess over the least loss."""
    data = [jnp.asarray(a, jnp.float32) for a in (hessian, middle)]
    loss = jax.jit(quadratic)(jnp.asarray(x, jnp.float32), *data)
    states = [search.start(x, loss)]
    found = search.powell(quadratic, states[0], *data, **options)
    states += [next(found) for _ in range(sweeps)]
    return states, [quadratic(np.float64(s.x), hessian, middle) - 1.0 for s in states]


@pytest.mark.parametrize(("n", "seed"), [(15, 1), (33, 0)])
def test_two_sweeps_over_a_quadratic_do_what_scipys_do_with_half_the_evaluations(n, seed):
    hessian, middle, x = coupled(n, seed)
    assert 15 < np.linalg.cond(hessian) < 25
    states, excess = sweep(hessian, middle, x, 2)
    theirs = optimize.minimize(
        quadratic, x, (hessian, middle), method="Powell", options={"maxiter": 2}
    )
    assert excess[2] < excess[0] / 100
    assert excess[2] < 1.5 * (theirs.fun - 1.0)
    assert states[1].evaluations < 4.5 * n
    assert states[2].evaluations < 0.5 * theirs.nfev
    for state, gap in zip(states, excess, strict=True):
        assert float(state.loss) == pytest.approx(1.0 + gap, rel=1e-5)


def twin(hessian, x, sweeps):
    """Powell's method with SciPy's rule, on ``x @ hessian @ x / 2``, lines searched by formula."""

    def loss(x):
        return x @ hessian @ x / 2

    def searched(x, d):
        return x - d * (d @ hessian @ x) / (d @ hessian @ d)

    directions, path = np.eye(len(x)), []
    for _ in range(sweeps):
        first, gains = x, []
        for d in directions:
            before, x = loss(x), searched(x, d)
            gains.append(before - loss(x))
        joint, gain, k = x - first, max(gains), int(np.argmax(gains))
        f0, fn, f2 = loss(first), loss(x), loss(x + joint)
        if f0 > f2 and 2 * (f0 - 2 * fn + f2) * (f0 - fn - gain) ** 2 < gain * (f0 - f2) ** 2:
            directions = directions.copy()
            directions[k] = directions[-1]
            directions[-1] = joint / np.abs(joint).max()
        x = searched(x, joint)
        path.append((x, directions))
    return path


def test_directions_are_renewed_as_by_hand():
    hessian = np.where(np.eye(4), 1.0, 0.5) * np.sqrt(np.outer([1, 2, 3, 4.0], [1, 2, 3, 4.0]))
    middle, offset = np.array([-1.0, -2.0, 0.5, -3.0]), np.array([0.3, 0.4, 0.2, 0.35])
    states, _ = sweep(hessian, middle, middle + offset, 3)
    renewed = 0
    for state, (x, directions) in zip(states[1:], twin(hessian, offset, 3), strict=True):
        np.testing.assert_allclose(state.x - middle, x, atol=2e-3)
        np.testing.assert_allclose(state.directions, directions, atol=2e-2)
        renewed += not np.array_equal(directions, np.eye(4))
    assert renewed


def test_without_coupling_one_sweep_is_enough_and_joint_directions_are_of_no_use():
    spread, middle, x = np.array([0.3, 4.0, 1.0, 9.0]), -np.arange(1.0, 5.0), -1.1 * np.arange(1, 5)
    for joint in (True, False):
        states, excess = sweep(np.diag(spread), middle, x, 1, joint=joint)
        np.testing.assert_allclose(states[1].x, middle, atol=1e-3)
        assert excess[1] < 1e-6 * excess[0]
        np.testing.assert_array_equal(states[1].directions, np.eye(4))


def at_equal_evaluations(hessian, middle, x, sweeps):
    """Logarithms of the excess after each sweep of Powell's, and of coordinate descent there."""
    curves = []
    for joint in (True, False):
        states, excess = sweep(hessian, middle, x, sweeps, joint=joint)
        curves.append((np.array([int(s.evaluations) for s in states]), np.log(excess)))
    (at, powell), (grid, axes) = curves
    return powell, np.interp(at, grid, axes)


def test_two_clips_of_the_published_hessian_are_done_in_three_sweeps():
    """Two conjugate directions are all that two variables need; the axes never are."""
    hessian, middle = np.array([[1.8627, 0.8969], [0.8969, 1.9392]]), np.array([-1.3, -2.1])
    powell, axes = at_equal_evaluations(hessian, middle, middle + np.array([0.3, 0.2]), 3)
    assert powell[3] < powell[0] - np.log(1e7)
    assert powell[3] < axes[3] - np.log(100)


@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_narrow_valley_joint_directions_are_worth_their_evaluations(seed):
    rng = np.random.default_rng(seed)
    middle = rng.normal(-2.0, 0.5, 15)
    hessian = np.where(np.eye(15), 1.0, 0.8)
    powell, axes = at_equal_evaluations(hessian, middle, middle + rng.normal(0.0, 0.3, 15), 4)
    assert (powell[3:] < axes[3:] - 0.2).all()


# What surrounds a sweep.


def test_a_search_goes_on_from_a_file_as_if_it_had_not_stopped(tmp_path):
    hessian, middle, x = coupled(5, 3)
    states, _ = sweep(hessian, middle, x, 3)
    np.savez(tmp_path / "state.npz", **states[1]._asdict())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        restored = search.SearchState(**file)
    data = [jnp.asarray(a, jnp.float32) for a in (hessian, middle)]
    rest = search.powell(quadratic, restored, *data)
    for expected in states[2:]:
        for a, b in zip(next(rest), expected, strict=True):
            np.testing.assert_array_equal(a, b, strict=True)


def test_sweeps_count_what_they_evaluate_report_it_and_compile_once():
    ran, said, compiled = [], [], []

    def seen(x, middle):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sum((x - middle) ** 4)

    def listener(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    middle = jnp.array([1.0, -2.0, 0.5])
    first = search.start([0.3, -1.0, 0.9], 1e3, [0.2, 0.4, 0.1])
    np.testing.assert_array_equal(first.widths, np.float32([0.2, 0.4, 0.1]))
    found = search.powell(seen, first, middle, progress=lambda *args: said.append(args))
    states = [next(found)]
    jax.monitoring.register_event_duration_secs_listener(listener)
    states += [next(found) for _ in range(3)]
    jax.monitoring.unregister_event_duration_listener(listener)
    jax.effects_barrier()
    assert not compiled
    assert len(ran) == states[-1].evaluations
    assert [int(state.sweeps) for state in states] == [1, 2, 3, 4]
    assert [args[:2] for args in said] == [(1, 3), (2, 3), (3, 3)] * 4
    assert said[0][2].startswith("loss ")
    assert said[0][2].endswith(" evaluations")
    losses = [float(state.loss) for state in states]
    assert losses == sorted(losses, reverse=True)


def test_not_a_number_counts_as_infinity():
    def loss(x):
        return jnp.where(x[1] > 2.1, jnp.nan, jnp.sum((x - jnp.array([1.0, 3.0])) ** 2))

    x = jnp.array([1.4, 1.8])
    (state,) = (s for s, _ in zip(search.powell(loss, search.start(x, loss(x))), "1", strict=False))
    assert state.x[0] == pytest.approx(1.0, abs=1e-3)
    assert 1.8 < state.x[1] <= 2.1
    assert float(state.loss) == pytest.approx((state.x[1] - 3.0) ** 2, abs=1e-5)
