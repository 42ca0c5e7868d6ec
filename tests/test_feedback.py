"""Rounding with error feedback: against the update written out, and against what it minimizes."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from lnq import feedback, quantizer
from lnq.quantizer import make_qparams

second_moment = jax.jit(feedback.second_moment)
least_squares = jax.jit(feedback.least_squares)
compensate = jax.jit(feedback.compensate)
affine_grid = jax.jit(quantizer.affine_grid)

INPUTS, OUTPUTS = 24, 16  # where nothing else is said


def numbers(shape, seed, mean=0.0, spread=1.0):
    return np.random.default_rng(seed).normal(mean, spread, shape).astype(np.float32)


def correlated(seed, rows=200, n=INPUTS):
    """Skewed rows whose columns share four causes, each column in a size of its own."""
    causes = numbers((rows, 4), seed) ** 3
    x = causes @ numbers((4, n), seed + 1) + 0.3 * numbers((rows, n), seed + 2, 1.0)
    return np.float32(x * np.linspace(0.3, 3.0, n))


def uneven_grid(w, bits):
    """One grid a column, from 70 % of its least to 90 % of its largest value: some are clipped."""
    return affine_grid(0.7 * w.min(-2, keepdims=True), 0.9 * w.max(-2, keepdims=True), bits)


def rounded(w, grid):
    return oracles.dequantize(oracles.quantize(w, grid), grid)


# Second moments.


def moment(x, damping):
    x = np.float64(x)
    h = x.T @ x / len(x)
    return h + damping * np.trace(h) / len(h) * np.eye(len(h))


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(7, 5), (1, 4), (6, 1)], ids=str)
def test_second_moments_are_sums_of_squares_and_a_share_of_their_mean(shape, damping):
    x = numbers(shape, 1, 2.0, 0.7)
    np.testing.assert_allclose(second_moment(x, damping), moment(x, damping), rtol=1e-5)


def test_damping_of_a_hundredth_is_the_default():
    x = correlated(1)
    np.testing.assert_allclose(second_moment(x), moment(x, 0.01), rtol=1e-4, atol=1e-4)


def test_halves_are_summed_in_float32():
    x = jnp.full((3000, 2), 0.25, jnp.bfloat16)
    np.testing.assert_array_equal(second_moment(x, 0.0), np.full((2, 2), 0.0625))


def test_data_of_zeros_has_a_moment_with_an_inverse_and_moves_nothing():
    h, w = second_moment(np.zeros((200, INPUTS), np.float32)), numbers((INPUTS, OUTPUTS), 1)
    assert (np.diag(h) > 0.0).all()
    np.testing.assert_array_equal(compensate(w, h, uneven_grid(w, 3)), w)


# Least squares.


@pytest.mark.parametrize("damping", [0.0, 0.01, 2.0])
def test_least_squares_are_those_of_the_stacked_system(damping):
    x, other, w = correlated(3), correlated(4), numbers((INPUTS, OUTPUTS), 5, 0.5)
    y = np.float32(other @ w)
    lam = damping * np.sum(np.float64(x) ** 2) / x.size
    stacked = np.concatenate([x / len(x) ** 0.5, lam**0.5 * np.eye(INPUTS)])
    target = np.concatenate([y / len(x) ** 0.5, lam**0.5 * w])
    expected = np.linalg.lstsq(stacked, target)[0]
    found = np.asarray(least_squares(x, y, w, damping))
    tolerance = 1e-2 if damping == 0.0 else 1e-3  # float32 on a system close to singular
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_weights_that_give_the_outputs_stay_and_so_do_those_of_dead_inputs():
    x, w = correlated(3), numbers((INPUTS, OUTPUTS), 5, 0.5)
    np.testing.assert_allclose(least_squares(x, np.float32(x @ w), w), w, atol=1e-4)
    x[:, 4] = 0.0
    found = np.asarray(least_squares(x, numbers((200, OUTPUTS), 6), w))
    np.testing.assert_array_equal(found[4], w[4])
    assert (np.abs(found - w).max(1) > 1e-3).sum() == INPUTS - 1


def test_fewer_rows_than_inputs_move_the_weights_only_where_there_is_data():
    x, w, y = numbers((3, 8), 1, 0.5), numbers((8, 2), 2), numbers((3, 2), 3)
    found = np.asarray(least_squares(x, y, w, 1e-3))
    assert np.linalg.norm(x @ found - y) < 1e-2 * np.linalg.norm(x @ w - y)
    beside = np.linalg.svd(np.float64(x))[2][3:]  # directions without data
    np.testing.assert_allclose(beside @ (found - w), 0.0, atol=1e-3)


# Feedback.


def eliminated(w, h, grid):
    """The update of Optimal Brain Quantization: each row rounded leaves the inverse."""
    w, inverse = np.float64(w), np.linalg.inv(np.float64(h))
    for j in range(len(w)):
        error = w[j] - rounded(w[j : j + 1], grid)[0]
        w[j + 1 :] -= np.outer(inverse[j + 1 :, j], error) / inverse[j, j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return w


def refitted(w, h, grid):
    """What the update is for: the rows to come are where they make the least of all error."""
    w, h = np.float64(w), np.float64(h)
    now, done = w.copy(), np.zeros_like(w)
    for j in range(len(w)):
        done[j] = rounded(now[j : j + 1], grid)[0]
        behind, ahead = slice(0, j + 1), slice(j + 1, len(w))
        pull = h[ahead, behind] @ (done[behind] - w[behind])
        now[ahead] = w[ahead] - np.linalg.solve(h[ahead, ahead], pull)
    return now


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [1, INPUTS])
def test_rows_go_where_elimination_and_refitting_put_them(n, bits):
    x, w = correlated(7, n=n), numbers((n, OUTPUTS), 8, 0.4)
    grid, h = uneven_grid(w, bits), second_moment(x)
    assert np.any(np.asarray(grid.zero_point) != 0.0)
    found = np.asarray(compensate(w, h, grid))
    for twin in (eliminated, refitted):
        expected = twin(w, h, grid)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(rounded(found, grid), rounded(expected, grid))


def test_a_case_by_hand():
    # H = [[2, 1], [1, 2]]: an error e of the first row asks of the second e / 2.
    h = np.array([[2.0, 1.0], [1.0, 2.0]], np.float32)
    w = np.array([[0.4, 1.5, 7.0, -3.0], [0.4, 0.0, 0.0, 0.25]], np.float32)
    grid = make_qparams(
        np.array([[1.0, 2.0, 1.0, 0.5]]),
        qmin=np.array([[-2.0, 0.0, -1.0, -4.0]]),
        qmax=np.array([[1.0, 3.0, 2.0, 3.0]]),
        zero_point=np.array([[0.0, 1.0, -1.0, 0.0]]),
    )
    # To 0; to 2 of {-2, 0, 2, 4}; to the end 3 of {0 .. 3}; to the end -2 of {-2 .. 1.5}.
    expected = np.array([[0.4, 1.5, 7.0, -3.0], [0.6, -0.25, 2.0, -0.25]])
    found = compensate(w, h, grid)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(rounded(found, grid)[0], [0.0, 2.0, 3.0, -2.0])


@pytest.mark.parametrize(("bits", "share"), [(1, 0.9), (2, 0.7), (4, 0.7), (8, 0.7)])
def test_outputs_are_closer_than_those_of_rounding_to_nearest_and_weights_farther(bits, share):
    x, w = correlated(9, 500), numbers((INPUTS, OUTPUTS), 20, 0.2)
    fitted, new = x[:200], x[200:]
    grid = affine_grid(w.min(0, keepdims=True), w.max(0, keepdims=True), bits)
    if bits == 1:  # two values, neither of them zero
        step, one = 2.0 * np.abs(w).mean(0, keepdims=True), np.ones((1, OUTPUTS))
        grid = make_qparams(step, qmin=-one, qmax=0.0 * one, zero_point=-0.5 * one)
    ours = rounded(compensate(w, second_moment(fitted), grid), grid) - w
    nearest = rounded(w, grid) - w
    for data in (fitted, new):
        assert np.linalg.norm(data @ ours) < share * np.linalg.norm(data @ nearest)
    assert np.linalg.norm(ours) > 1.1 * np.linalg.norm(nearest)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_inputs_that_have_nothing_in_common_are_rounded_to_nearest(bits):
    w = numbers((INPUTS, OUTPUTS), 1, 0.3)
    h = np.diag(np.linspace(0.02, 9.0, INPUTS)).astype(np.float32)
    np.testing.assert_array_equal(compensate(w, h, uneven_grid(w, bits)), w)


def test_weights_on_the_grid_stay():
    one = np.ones((1, OUTPUTS))
    grid = make_qparams(
        np.where(np.arange(OUTPUTS) % 3, 0.5, 0.25)[None], qmin=-4 * one, qmax=3 * one
    )
    codes = np.random.default_rng(1).integers(-4, 4, (INPUTS, OUTPUTS))
    w = np.float32(oracles.dequantize(codes, grid))
    np.testing.assert_array_equal(compensate(w, second_moment(correlated(2)), grid), w)


@pytest.mark.parametrize("row", [0, 5, INPUTS - 1])
def test_a_row_is_seen_by_itself_and_later_rows(row):
    w, h = numbers((INPUTS, OUTPUTS), 1, 0.3), second_moment(correlated(2))
    grid = uneven_grid(w, 3)
    changed = w.copy()
    changed[row] += 0.37 * np.asarray(grid.scale)[0]
    before, after = (np.asarray(compensate(a, h, grid)) for a in (w, changed))
    np.testing.assert_array_equal(before[0], w[0])
    np.testing.assert_array_equal(before[:row], after[:row])
    assert (before[row:] != after[row:]).any(1).all()


def test_a_column_is_seen_by_no_other():
    w, h = numbers((INPUTS, OUTPUTS), 1, 0.3), second_moment(correlated(2))
    grid = uneven_grid(w, 3)
    changed = w.copy()
    changed[:, 7] *= 1.7
    differs = np.asarray(compensate(w, h, grid)) != np.asarray(compensate(changed, h, grid))
    assert differs[:, 7].all()
    assert differs.sum() == INPUTS


def test_groups_may_be_mapped_over():
    x = np.stack([correlated(seed) for seed in (1, 5, 9)])
    w = numbers((3, INPUTS, OUTPUTS), 2, 0.3)
    grids = uneven_grid(w, np.array([1.0, 3.0, 8.0]).reshape(3, 1, 1))
    h = jax.jit(jax.vmap(second_moment))(x)
    found = jax.jit(jax.vmap(compensate))(w, h, grids)
    for i in range(3):
        np.testing.assert_allclose(h[i], moment(x[i], 0.01), rtol=1e-4, atol=1e-4)
        expected = eliminated(w[i], h[i], jax.tree.map(lambda a, i=i: a[i], grids))
        np.testing.assert_allclose(found[i], expected, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_all_the_same_share_their_error():
    x = numbers((5, 1), 1, 2.0) @ np.ones((1, INPUTS), np.float32)
    w = numbers((INPUTS, OUTPUTS), 2, 0.1)
    grid = affine_grid(w.min(0, keepdims=True), w.max(0, keepdims=True), 2)
    found = compensate(w, second_moment(x), grid)
    ours, nearest = (rounded(a, grid) - w for a in (found, w))
    assert np.isfinite(found).all()
    assert np.linalg.norm(x @ ours) < 0.5 * np.linalg.norm(x @ nearest)


def test_halves_come_back_as_float32():
    half = jnp.asarray(numbers((INPUTS, OUTPUTS), 1, 0.3), jnp.bfloat16)
    w = np.asarray(half, np.float32)
    h, grid = second_moment(correlated(2)), uneven_grid(w, 3)
    found = compensate(half, h, grid)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, compensate(w, h, grid))


# Leading axes.


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_second_moments_of_groups_are_those_of_each(damping):
    x = numbers((2, 3, 7, 5), 1, 2.0, 0.7)
    h = second_moment(x, damping)
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(h[i], moment(x[i], damping), rtol=1e-5)


def test_least_squares_of_groups_are_those_of_each():
    x, y = numbers((2, 3, 20, 4), 1, 0.5), numbers((2, 3, 20, 5), 2)
    w = numbers((2, 3, 4, 5), 3)
    found = least_squares(x, y, w, 0.1)
    for i in np.ndindex(2, 3):
        np.testing.assert_allclose(found[i], least_squares(x[i], y[i], w[i], 0.1), atol=1e-5)
