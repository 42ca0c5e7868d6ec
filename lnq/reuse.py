"""Split a function in two, so that what does not change is computed once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex

__all__ = ["split"]

Halves = tuple[Callable[[Any], list[jax.Array]], Callable[[list[jax.Array], Any, Any], Any]]


def split(f: Callable[[Any, Any], Any], fixed: Any, moving: Any) -> Halves:
    """Trace ``f(fixed, moving)`` and part what depends on ``moving`` from what does not.

    Args:
      f: Any JAX function of two pytrees.
      fixed: What will not change; shapes and dtypes count.
      moving: What will; likewise.

    Returns:
      ``first(fixed) -> kept`` and ``second(kept, fixed, moving)``, such that
      ``f(fixed, moving) == second(first(fixed), fixed, moving)``. Both can be jitted.

    Example:
      >>> import jax.numpy as jnp
      >>> first, second = split(lambda x, scale: jnp.sum(jnp.exp(x)) * scale, jnp.zeros(3), 1.0)
      >>> kept = first(jnp.zeros(3))
      >>> kept, second(kept, jnp.zeros(3), 2.0)
      ([Array(3., dtype=float32)], Array(6., dtype=float32))
    """
    leaves, structure = jax.tree.flatten((fixed, moving))
    count = len(jax.tree.leaves(fixed))
    outputs: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        found, structure_out = jax.tree.flatten(f(*jax.tree.unflatten(structure, arrays)))
        outputs[:] = [structure_out]
        return found

    closed = jax.make_jaxpr(flat)(*leaves)
    jaxpr = closed.jaxpr
    early, late = _parted(jaxpr, set(jaxpr.invars[count:]))
    made = {var for eqn in early for var in eqn.outvars}
    read = [var for eqn in late for var in eqn.invars] + list(jaxpr.outvars)
    kept = list(dict.fromkeys(v for v in read if not isinstance(v, jex.Literal) and v in made))

    def part(eqns: list[jex.JaxprEqn], invars: list[Any], outvars: list[Any]) -> Callable[..., Any]:
        names = jaxpr.debug_info.with_unknown_names()
        new = jaxpr.replace(eqns=eqns, invars=invars, outvars=outvars, debug_info=names)
        return jex.jaxpr_as_fun(jex.ClosedJaxpr(new, closed.consts))

    before = part(early, jaxpr.invars[:count], kept)
    after = part(late, [*kept, *jaxpr.invars], jaxpr.outvars)
    return (
        lambda fixed: before(*jax.tree.leaves(fixed)),
        lambda kept, fixed, moving: jax.tree.unflatten(
            outputs[0], after(*kept, *jax.tree.leaves((fixed, moving)))
        ),
    )


def _parted(jaxpr: jex.Jaxpr, moving: set[Any]) -> tuple[list[jex.JaxprEqn], list[jex.JaxprEqn]]:
    """Equations that none of ``moving`` reaches, and the others."""
    early, late = [], []
    for eqn in jaxpr.eqns:
        if any(var in moving for var in eqn.invars if not isinstance(var, jex.Literal)):
            moving.update(eqn.outvars)
            late.append(eqn)
        else:
            early.append(eqn)
    return early, late
