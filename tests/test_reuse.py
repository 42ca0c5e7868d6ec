"""A function in two halves is the function, and the first half has all that does not move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lnq import lapq, reuse


def gated(fixed, moving):
    """Calls, a loop and a custom derivative on both sides of the cut."""
    x = jax.nn.relu(fixed["x"] @ fixed["w"])
    x, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, fixed["stack"])
    return jax.nn.relu(x @ moving["w"]).sum(0), fixed["x"], x.sum() * moving["scale"]


def check(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.fixture(scope="module")
def arguments():
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    fixed = {"x": draw(5, 4), "w": draw(4, 4), "stack": draw(3, 4, 4)}
    return fixed, {"w": draw(4, 2), "scale": draw()}


def test_both_halves_together_are_the_function(arguments):
    fixed, moving = arguments
    first, second = reuse.split(gated, fixed, moving)
    other = jax.tree.map(lambda a: 2.0 * a - 0.5, moving)
    for here in (moving, other):
        got = jax.jit(second)(jax.jit(first)(fixed), fixed, here)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, gated(fixed, here)
        )


def test_the_second_half_holds_no_product_of_what_stays(arguments):
    fixed, moving = arguments
    first, second = reuse.split(gated, fixed, moving)
    kept = first(fixed)
    assert [a.shape for a in kept] == [(5, 4), ()]
    late = str(jax.make_jaxpr(second)(kept, fixed, moving))
    assert late.count("dot_general") == 1
    assert "scan" not in late


def test_gradients_pass_through_the_second_half(arguments):
    fixed, moving = arguments
    first, second = reuse.split(gated, fixed, moving)
    kept = first(fixed)
    got = jax.grad(lambda m: second(kept, fixed, m)[0].sum())(moving)
    want = jax.grad(lambda m: gated(fixed, m)[0].sum())(moving)
    check(got, want)


def test_nothing_moving_and_nothing_fixed_both_work():
    first, second = reuse.split(lambda x, _: x + 1.0, jnp.float32(2.0), ())
    assert second(first(jnp.float32(5.0)), jnp.float32(5.0), ()) == 6.0
    first, second = reuse.split(lambda _, y: y * 3.0, (), jnp.float32(2.0))
    assert first(()) == []
    assert second([], (), jnp.float32(5.0)) == 15.0


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(4)
    params = {f"w{i}": jnp.asarray(rng.normal(size=(12, 12)) / 3.5, jnp.float32) for i in range(4)}

    def apply_fn(params, x):
        for i in range(4):
            x = jax.nn.relu(x @ params[f"w{i}"] + x)
        return x

    x = jnp.asarray(rng.normal(size=(60, 12)), jnp.float32)
    return lapq.problem(apply_fn, params, x, weight_bits=3, act_bits=3, edge_bits=None)


def test_every_stage_computes_the_loss(made):
    """Point 10 of the method's list: prefix and plain agree on random points."""
    rng, loss = np.random.default_rng(5), jax.jit(made.loss)
    theta = np.asarray(made.widest) - 0.3
    assert [stage.share for stage in made.stages] == [1.0, 0.5, 0.25]
    for stage in made.stages:
        kept, rest = jax.jit(stage.keep)(theta, made.data), jax.jit(stage.loss)
        for _ in range(3):
            point = theta.copy()
            point[stage.first :] += rng.normal(size=theta.size - stage.first).astype(np.float32) / 3
            got = rest(point[stage.first :], kept, theta, made.data)
            np.testing.assert_allclose(got, loss(point, made.data), rtol=1e-5)


@pytest.mark.slow
def test_a_search_that_reuses_prefixes_ends_at_the_same_point_for_less(made):
    state = lapq.begin(made, ps=(2.0, 3.0))
    (plain,), (reused,) = (
        list(lapq.improve(made, state, 0, 1, reuse_prefixes=choice)) for choice in (False, True)
    )
    np.testing.assert_allclose(reused.search.x, plain.search.x, rtol=1e-5)
    np.testing.assert_allclose(reused.trace[:, 1:], plain.trace[:, 1:], rtol=1e-5)
    assert reused.cost - state.cost < 0.85 * (plain.cost - state.cost)
