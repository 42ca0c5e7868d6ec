r"""Minimise a function of a few dozen steps whose gradient is of little use.

A loss as a function of quantization steps is smooth at large and jagged at small, because codes
jump. So it is measured at a distance, along one direction at a time, and only measured values
decide. Along a direction d, from x, with a width h:

1. evaluate at -h and h; go on in steps that double where the lower end is still an end;
2. evaluate at the vertex of the parabola through the lowest point and its neighbours;
3. move to the lowest point seen, and let its distance, within a factor of two, be the next h.

That is three to five evaluations, all in one compiled call. Brent's method, in SciPy's Powell,
takes about 30, most of them for digits that the jumps do not have.

:func:`powell` goes through a set of directions in this way and renews the set as SciPy does; with
the axes alone it is coordinate descent. It yields after each sweep, and what it yields is all that
it needs to go on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from lnq.types import Progress

__all__ = ["Line", "Loss", "Move", "SearchState", "line_search", "powell", "start", "vertex"]

NARROWEST, WIDEST, FARTHEST = 0.01, 0.8, 1.6
"""Bounds of widths, and from how far on a line is not followed further; in units of x."""

POINTS = 9
"""Points that a line search can hold; steps that double from ``NARROWEST`` get to 1.27."""

Loss = Callable[..., jax.Array]
"""``loss(x, *args) -> scalar``; NaN counts as infinity."""


class Move(NamedTuple):
    """Outcome of a line search.

    Attributes:
      distance: How far to go along the direction; 0 where nothing better was seen.
      loss: The loss there.
      evaluations: How many were made.
    """

    distance: jax.Array
    loss: jax.Array
    evaluations: jax.Array


Line = Callable[..., Move]
"""``line(x, at_x, direction, width, *args) -> Move``."""


class SearchState(NamedTuple):
    """Between two sweeps; arrays only, so that anything can save it.

    Attributes:
      x: Where the search is, float32 ``[n]``.
      loss: The loss there.
      directions: One in each row, largest entry 1, ``[n, n]``.
      widths: How far along each direction to look first, ``[n]``.
      evaluations: How often the loss was evaluated; a part of it counts as that part.
      sweeps: How many sweeps were made.
    """

    x: np.ndarray
    loss: np.ndarray
    directions: np.ndarray
    widths: np.ndarray
    evaluations: np.ndarray
    sweeps: np.ndarray


def start(x: ArrayLike, loss: ArrayLike, widths: ArrayLike = 0.3) -> SearchState:
    """The state before the first sweep: the axes as directions.

    Args:
      x: Where to start, ``[n]``.
      loss: The loss there.
      widths: How far to look first, one number or ``[n]``; large, so that the local minima of the
        jumps are passed over.
    """
    n = np.size(x)
    return SearchState(
        np.asarray(x, np.float32),
        np.asarray(loss, np.float32),
        np.eye(n, dtype=np.float32),
        np.full(n, widths, np.float32),
        np.array(0.0),
        np.array(0),
    )


def vertex(places: jax.Array, values: jax.Array) -> jax.Array:
    """Where the parabola through three points is lowest; the middle one if that is nowhere.

    Example:
      >>> x = jnp.array([-1.0, 0.0, 2.0])
      >>> vertex(x, (x - 0.25) ** 2 + 3.0)
      Array(0.25, dtype=float32)
    """
    (a, b, c), (at_a, at_b, at_c) = places, values
    left, right = (at_b - at_a) / (b - a), (at_c - at_b) / (c - b)
    bend = (right - left) / (c - a)
    lowest = (a + b) / 2.0 - left / (2.0 * jnp.where(bend > 0.0, bend, 1.0))
    return jnp.where((bend > 0.0) & jnp.isfinite(lowest), lowest, b)


def line_search(
    loss: Loss,
    x: jax.Array,
    at_x: jax.Array,
    direction: jax.Array,
    width: jax.Array,
    *args: Any,
) -> Move:
    """Search along one direction; under ``jit`` it holds one copy of the loss.

    Args:
      loss: What to minimise.
      x: Where to start, ``[n]``.
      at_x: The loss there.
      direction: ``[n]``.
      width: Distance of the first two evaluations.
      *args: Handed on to ``loss``.

    Example:
      >>> bowl = lambda x: jnp.sum((x - 1.25) ** 2)
      >>> x, axis = jnp.zeros(1), jnp.ones(1)
      >>> line_search(bowl, x, bowl(x), axis, jnp.float32(1.0))
      Move(distance=Array(1.25, ...), loss=Array(0., ...), evaluations=Array(4, ...))
    """

    def turn(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        places, values, count, _ = state
        order = jnp.argsort(places)  # points that are not there yet stand at infinity
        lowest = jnp.argmin(values[order])
        three = order[jnp.clip(lowest - 1, 0, POINTS - 3) + jnp.arange(3)]
        at_end = (lowest == 0) | (lowest == count)
        best, beside = places[order[lowest]], places[order[jnp.abs(lowest - 1)]]
        last = (count >= 2) & (~at_end | (jnp.abs(best) >= FARTHEST) | (count == POINTS - 2))
        next_place = jnp.where(
            at_end, best + 2.0 * (best - beside), vertex(places[three], values[three])
        )
        place = jnp.where(count == 0, -width, jnp.where(count == 1, width, next_place))
        value = loss(x + place * direction, *args)
        value = jnp.where(jnp.isnan(value), jnp.inf, value)
        return places.at[count + 1].set(place), values.at[count + 1].set(value), count + 1, last

    nowhere = jnp.full(POINTS, jnp.inf).at[0]
    state = (nowhere.set(0.0), nowhere.set(at_x), jnp.int32(0), jnp.bool_(False))
    places, values, count, _ = lax.while_loop(lambda state: ~state[-1], turn, state)
    best = jnp.argmin(values)
    return Move(places[best], values[best], count)


def powell(
    loss: Loss,
    state: SearchState,
    *args: Any,
    joint: bool = True,
    line: Line | None = None,
    progress: Progress | None = None,
) -> Iterator[SearchState]:
    r"""Sweep through the directions, for ever; yields the state after each sweep.

    After a sweep from :math:`x_0` to :math:`x_n` with gains :math:`g_k` at most :math:`g`, the
    direction :math:`x_n - x_0` is searched too. It takes the place of the direction of the largest
    gain where :math:`f_0 > f_2` and

    .. math:: 2 (f_0 - 2 f_n + f_2)(f_0 - f_n - g)^2 < g (f_0 - f_2)^2, \qquad
              f_2 = f(2 x_n - x_0),

    which is SciPy's rule.

    Args:
      loss: What to minimise; pass it jitted or not, it is compiled once.
      state: From :func:`start`, or yielded before.
      *args: Handed on to ``loss``.
      joint: Whether directions are renewed; without it this is coordinate descent.
      line: What takes the place of :func:`line_search`, if anything.
      progress: Called after each line.

    Example:
      >>> valley = lambda x: 10.0 * (x[0] - x[1]) ** 2 + (x[0] - 0.75) ** 2
      >>> first = start(jnp.zeros(2), valley(jnp.zeros(2)))
      >>> states = powell(valley, first)
      >>> [float(next(states).loss) < bound for bound in (0.5, 1e-4)]
      [True, True]
    """
    line, at = line or jax.jit(partial(line_search, loss)), jax.jit(loss)
    while True:
        state = _sweep(line, at, state, args, joint, progress)
        yield state


def _sweep(
    line: Line,
    at: Callable[..., jax.Array],
    state: SearchState,
    args: tuple[Any, ...],
    joint: bool,
    progress: Progress | None,
) -> SearchState:
    x, loss, n = state.x, state.loss, len(state.x)
    directions, widths = state.directions.copy(), state.widths.copy()
    evaluations, gains = float(state.evaluations), np.zeros(n)

    def search(direction: np.ndarray, width: float) -> float:
        nonlocal x, loss, evaluations
        move = line(x, loss, direction, width, *args)
        x, loss = x + np.asarray(move.distance) * direction, np.asarray(move.loss)
        evaluations += float(move.evaluations)
        near = np.clip(abs(float(move.distance)), width / 2.0, width * 2.0)
        return float(np.clip(near, NARROWEST, WIDEST))

    for k in range(n):
        before = loss
        widths[k] = search(directions[k], widths[k])
        gains[k] = before - loss
        if progress:
            progress(k + 1, n, f"loss {loss:.4g} after {evaluations:.0f} evaluations")
    moved = x - state.x
    if joint and moved.any():
        beyond, reached = float(at(x + moved, *args)), float(loss)
        evaluations += 1
        size = np.abs(moved).max()
        width = search(moved / size, size)
        if _renews(float(state.loss), reached, beyond, gains.max()):
            k = gains.argmax()
            directions[k], widths[k] = directions[-1], widths[-1]
            directions[-1], widths[-1] = moved / size, width
    return SearchState(x, loss, directions, widths, np.array(evaluations), state.sweeps + 1)


def _renews(before: float, after: float, beyond: float, gain: float) -> bool:
    bend = 2.0 * (before - 2.0 * after + beyond) * (before - after - gain) ** 2
    return before > beyond and bend < gain * (before - beyond) ** 2
