"""Measures against float64 twins, away from the origin and at the ends of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lnq import distortion


def pair(dtype="float32", offset=3.0, noise=0.1):
    rng = np.random.default_rng(0)
    a = rng.normal(offset, 1, (7, 33))
    return jnp.asarray(a, dtype), jnp.asarray(a + rng.normal(noise, noise, a.shape), dtype)


def cosine_distance(a, b):
    a, b = np.ravel(a), np.ravel(b)
    unit = a / np.linalg.norm(a) - b / np.linalg.norm(b)
    return 0.5 * unit @ unit


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(a, b):
    p, q = softmax(a), softmax(b)
    return (p * np.log(p / q)).sum(-1).mean()


TWINS = {
    "mse": (distortion.mse, lambda a, b: ((a - b) ** 2).mean()),
    "l1": (lambda a, b: distortion.lp_error(a, b, 1), lambda a, b: np.abs(a - b).mean()),
    "l2.4": (lambda a, b: distortion.lp_error(a, b, 2.4), lambda a, b: (abs(a - b) ** 2.4).mean()),
    "cosine": (distortion.cosine_distance, cosine_distance),
    "sqnr": (
        distortion.sqnr_db,
        lambda a, b: 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()),
    ),
    "kl": (distortion.kl, kl),
    "top1": (distortion.top1_agreement, lambda a, b: (a.argmax(-1) == b.argmax(-1)).mean()),
}
every_measure = pytest.mark.parametrize(("measure", "twin"), TWINS.values(), ids=TWINS.keys())


@every_measure
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_measures_match_float64_and_come_in_float32(measure, twin, dtype):
    a, b = pair(dtype)
    value = measure(a, b)
    assert (value.shape, value.dtype) == ((), jnp.float32)
    expected = twin(*(np.asarray(x.astype(jnp.float32), np.float64) for x in (a, b)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@every_measure
def test_measures_are_the_same_under_jit(measure, twin):
    np.testing.assert_allclose(jax.jit(measure)(*pair()), measure(*pair()), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("angle", [1e-4, 1e-2, 1.0, np.pi])
def test_cosine_distance_is_accurate_at_small_angles_and_any_size(angle, size):
    a, b = np.linalg.qr(np.random.default_rng(1).normal(size=(4096, 2)))[0].T
    turned = 3.7 * (np.cos(angle) * a + np.sin(angle) * b)
    pair = (jnp.asarray(x * size, jnp.float32) for x in (a, turned))
    distance = jax.jit(distortion.cosine_distance)(*pair)
    np.testing.assert_allclose(distance, 2 * np.sin(angle / 2) ** 2, rtol=1e-3)


def test_cosine_distance_of_zeros():
    zero, x = jnp.zeros(5), jnp.arange(5.0)
    assert distortion.cosine_distance(zero, zero) == 0
    assert distortion.cosine_distance(zero, x) == distortion.cosine_distance(x, zero) == 1


@pytest.mark.parametrize("axes", [None, (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_l2_norm_does_not_overflow_or_vanish(axes, size):
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 5)) * size, jnp.float32)
    expected = np.linalg.norm(np.asarray(x, np.float64).reshape(-1))
    if axes is not None:
        expected = np.sqrt((np.asarray(x, np.float64) ** 2).sum(axes, keepdims=True))
    norm = jax.jit(distortion.l2_norm, static_argnums=1)(x, axes)
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    assert norm.shape == expected.shape


def test_l2_norm_of_nothing_and_of_zeros_is_zero():
    assert distortion.l2_norm(jnp.zeros(0)) == distortion.l2_norm(jnp.zeros((2, 3))) == 0


@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_sqnr_of_an_exact_copy_is_infinite(size):
    x = size * jnp.arange(1.0, 5.0)
    assert distortion.sqnr_db(x, x) == jnp.inf


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sqnr_does_not_depend_on_the_size(size):
    a, b = pair()
    np.testing.assert_allclose(
        distortion.sqnr_db(a * size, b * size), distortion.sqnr_db(a, b), rtol=1e-5
    )


def test_kl_by_hand():
    p, q = np.array([[0.5, 0.5], [0.1, 0.9]]), np.array([[0.8, 0.2], [0.3, 0.7]])
    by_row = [
        0.5 * np.log(5 / 8) + 0.5 * np.log(5 / 2),
        0.1 * np.log(1 / 3) + 0.9 * np.log(9 / 7),
    ]
    shifted = np.log(p) + np.array([[100.0], [-50.0]])  # a constant per row changes no softmax
    value = distortion.kl(jnp.asarray(shifted, jnp.float32), jnp.asarray(np.log(q), jnp.float32))
    np.testing.assert_allclose(value, np.mean(by_row), rtol=1e-4)  # 100 costs float32 two digits


def test_kl_is_zero_only_between_equal_rows():
    a, b = pair()
    assert distortion.kl(a, a) == 0
    assert distortion.kl(a, b) > 0
    assert distortion.kl(a, b) != distortion.kl(b, a)


def test_top1_counts_rows():
    a = jnp.array([[1.0, 2, 3], [9, 0, 0], [0, 5, 1], [1, 0, 0]])
    b = jnp.array([[0.0, 1, 9], [0, 0, 1], [0, 2, 1], [0, 0, 1]])
    assert distortion.top1_agreement(a, b) == 0.5
